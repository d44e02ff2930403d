// Registers `round_rows`, `round_apart`, `int8_columns`, `int8_product` and `scale_sums_` for the CPU.
#include <algorithm>
#include <limits>
#include <numeric>

#include "cpu/int8_product.h"
#include "cpu/int8_rounding.h"

#include "tensor.h"

namespace fastft {
namespace {

const int8_t* bytes_of(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_rows(t, name, rows, columns);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Char, name, ": expected int8");
  return static_cast<const int8_t*>(t.data_ptr());
}

const int64_t* chosen_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Long && t.is_contiguous(),
                  "columns: expected contiguous int64 (count,)");
  return static_cast<const int64_t*>(t.data_ptr());
}

RoundRows rows_of(const Tensor& x) {
  RoundRows r{};
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (rows, columns)");
  r.dtype = dtype_of(x, "x"), r.rows = x.size(0), r.columns = x.size(1);
  check_rows(x, "x", r.rows, r.columns);
  r.x = x.data_ptr(), r.stride = x.stride(0);
  return r;
}

std::tuple<Tensor, Tensor> rounded(const Tensor& x, RoundRows& r) {
  Tensor values = torch::stable::new_empty(x, {r.rows, r.columns}, ScalarType::Char);
  Tensor scale = empty_float(x, {r.rows});
  r.values = static_cast<int8_t*>(values.data_ptr()), r.scale = static_cast<float*>(scale.data_ptr());
  FASTFT_DISPATCH(round_rows(r));
  return {values, scale};
}

std::tuple<Tensor, Tensor> round_rows(Tensor x, OptionalTensor factors) {
  RoundRows r = rows_of(x);
  if (factors) r.factors = floats_of(*factors, "factors", r.columns);
  return rounded(x, r);
}

// The `count` columns of the largest peaks, the first of equal ones, in ascending order.
void choose(const std::vector<float>& peaks, int64_t count, int64_t* chosen) {
  std::vector<int64_t> order(peaks.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int64_t a, int64_t b) {
    return peaks[a] != peaks[b] ? peaks[a] > peaks[b] : a < b;
  });
  std::copy_n(order.begin(), count, chosen);
  std::sort(chosen, chosen + count);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> round_apart(Tensor x, int64_t count) {
  RoundRows r = rows_of(x);
  STD_TORCH_CHECK(count >= 0 && count <= r.columns, "count: expected 0 to ", r.columns);
  std::vector<float> peaks(r.columns), factors(r.columns, 1.f);
  FASTFT_DISPATCH(column_peaks({r.dtype, r.rows, r.columns, r.x, r.stride, peaks.data()}));
  // NaN has no order; its rows give NaN whichever columns are chosen.
  for (float& peak : peaks)
    if (peak != peak) peak = std::numeric_limits<float>::infinity();
  Tensor columns = torch::stable::new_empty(x, {count}, ScalarType::Long);
  auto* chosen = static_cast<int64_t*>(columns.data_ptr());
  choose(peaks, count, chosen);
  for (int64_t i = 0; i < count; ++i) factors[chosen[i]] = 0.f;
  Tensor apart = empty_float(x, {r.rows, count});
  r.factors = factors.data(), r.count = count, r.chosen = chosen;
  r.apart = static_cast<float*>(apart.data_ptr());
  auto [values, scale] = rounded(x, r);
  return {values, scale, columns, apart};
}

Tensor int8_columns(Tensor values, Tensor scale, Tensor columns) {
  Int8Columns c{};
  STD_TORCH_CHECK(values.dim() == 2, "values: expected shape (out, in)");
  c.out = values.size(0), c.count = columns.size(0), c.chosen = chosen_of(columns);
  c.values = bytes_of(values, "values", c.out, values.size(1)), c.stride = values.stride(0);
  c.scale = floats_of(scale, "scale", c.out);
  for (int64_t i = 0; i < c.count; ++i)
    STD_TORCH_CHECK(c.chosen[i] >= 0 && c.chosen[i] < values.size(1), "columns: expected 0 to ",
                    values.size(1) - 1);
  Tensor y = empty_float(values, {c.count, c.out});
  c.y = static_cast<float*>(y.data_ptr());
  FASTFT_DISPATCH(int8_columns(c));
  return y;
}

Tensor int8_product(Tensor a, Tensor a_scale, Tensor b, OptionalTensor b_scale, OptionalTensor bias,
                    bool transposed) {
  Int8Product p{};
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a, b: expected two dimensions");
  p.rows = a.size(0), p.inner = a.size(1), p.out = b.size(transposed ? 1 : 0);
  p.a = bytes_of(a, "a", p.rows, p.inner);
  STD_TORCH_CHECK(a.is_contiguous(), "a: expected a contiguous tensor");
  p.b = bytes_of(b, "b", transposed ? p.inner : p.out, transposed ? p.out : p.inner);
  p.b_stride = b.stride(0), p.transposed = transposed;
  p.a_scale = floats_of(a_scale, "a_scale", p.rows);
  if (b_scale) p.b_scale = floats_of(*b_scale, "b_scale", p.out);
  if (bias) p.bias = floats_of(*bias, "bias", p.out);
  Tensor y = empty_float(a, {p.rows, p.out});
  p.y = static_cast<float*>(y.data_ptr());
  FASTFT_DISPATCH(int8_product(p));
  return y;
}

void scale_sums(Tensor sums, Tensor a_scale, OptionalTensor b_scale, OptionalTensor bias,
                OptionalTensor total) {
  ScaleSums s{};
  STD_TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && sums.scalar_type() == ScalarType::Int,
                  "sums: expected contiguous int32 (rows, columns)");
  s.rows = sums.size(0), s.columns = sums.size(1);
  s.sums = static_cast<int32_t*>(sums.data_ptr());
  s.row_scale = floats_of(a_scale, "a_scale", s.rows);
  if (b_scale) s.column_scale = floats_of(*b_scale, "b_scale", s.columns);
  if (bias) s.bias = floats_of(*bias, "bias", s.columns);
  if (total) {
    check_rows(*total, "total", s.rows, s.columns);
    STD_TORCH_CHECK(total->scalar_type() == ScalarType::Float, "total: expected float32");
    s.total = static_cast<const float*>(total->data_ptr()), s.total_stride = total->stride(0);
  }
  FASTFT_DISPATCH(scale_sums(s));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("round_rows", TORCH_BOX(&round_rows));
  m.impl("round_apart", TORCH_BOX(&round_apart));
  m.impl("int8_columns", TORCH_BOX(&int8_columns));
  m.impl("int8_product", TORCH_BOX(&int8_product));
  m.impl("scale_sums_", TORCH_BOX(&scale_sums));
}

}  // namespace fastft
