// RMSNorm and LayerNorm: one read of the row and one write, statistics and sums in float32.
#include "norm.h"

#include "scratch.h"
#include "vec.h"

namespace fastft::FASTFT_ISA {
namespace {

// `values` are the row's as float32: the row itself, or `scratch`.
template <class T>
void forward_row(const NormForward& a, int64_t row, float* scratch) {
  const float* values = scratch;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  T* y = static_cast<T*>(a.y) + row * a.hidden;
  // Fused by name: left to the compiler, a row would have other bits with a residual than without.
  Vec sums{};
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
    T* total = static_cast<T*>(a.total) + row * a.hidden;
    for_each_vec(a.hidden, [&](int64_t i, auto n) {
      // The sum is what the model carries on, so it is normalised as stored, rounded.
      store(total + i, load(x + i, n) + load(residual + i, n), n);
      Vec value = load(total + i, n);
      store(scratch + i, value, n);
      sums = a.center ? sums + value : fma(value, value, sums);
    });
  } else if constexpr (std::is_same_v<T, float>) {
    values = x;
    for_each_vec(a.hidden, [&](int64_t i, auto n) {
      Vec value = load(x + i, n);
      sums = a.center ? sums + value : fma(value, value, sums);
    });
  } else {
    for_each_vec(a.hidden, [&](int64_t i, auto n) {
      Vec value = load(x + i, n);
      store(scratch + i, value, n);
      sums = a.center ? sums + value : fma(value, value, sums);
    });
  }
  float mean = 0.f, square = sum(sums);
  if (a.center) {
    mean = square / a.hidden;
    Vec squares{};
    for_each_vec(a.hidden, [&](int64_t i, auto n) {
      Vec centred = load(values + i, n, mean) - mean;
      squares = fma(centred, centred, squares);
    });
    square = sum(squares);
    a.mean[row] = mean;
  }
  float rstd = 1.f / std::sqrt(square / a.hidden + a.eps);
  a.rstd[row] = rstd;
  for_each_vec(a.hidden, [&](int64_t i, auto n) {
    Vec value = (load(values + i, n) - mean) * rstd;
    if (a.weight) value *= load(a.weight + i, n);
    if (a.bias) value += load(a.bias + i, n);
    store(y + i, value, n);
  });
}

template <class T>
void backward_row(const NormBackward& a, int64_t row, float* dweight, float* dbias) {
  const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* dtotal = a.dtotal ? static_cast<const T*>(a.dtotal) + row * a.dtotal_stride : nullptr;
  T* dx = static_cast<T*>(a.dx) + row * a.hidden;
  float mean = a.center ? a.mean[row] : 0.f, rstd = a.rstd[row];
  Vec sums{}, dots{};
  for_each_vec(a.hidden, [&](int64_t i, auto n) {
    Vec normalised = (load(x + i, n, mean) - mean) * rstd, grad = load(dy + i, n);
    if (dweight) store(dweight + i, load(dweight + i, n) + grad * normalised, n);
    if (dbias) store(dbias + i, load(dbias + i, n) + grad, n);
    if (a.weight) grad *= load(a.weight + i, n);
    sums += grad;
    dots = fma(grad, normalised, dots);
  });
  float mean_grad = a.center ? sum(sums) / a.hidden : 0.f, mean_dot = sum(dots) / a.hidden;
  for_each_vec(a.hidden, [&](int64_t i, auto n) {
    Vec normalised = (load(x + i, n) - mean) * rstd, grad = load(dy + i, n);
    if (a.weight) grad *= load(a.weight + i, n);
    Vec out = (grad - mean_grad - normalised * mean_dot) * rstd;
    if (dtotal) out += load(dtotal + i, n);
    store(dx + i, out, n);
  });
}

}  // namespace

void norm_forward(const NormForward& a) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const int threads = threads_for(a.rows, a.rows * a.hidden >= kGrain);
    Scratch scratch(a.hidden, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < a.rows; ++row) forward_row<T>(a, row, scratch.own());
  });
}

void norm_forward_row(const NormForward& a, int64_t row, float* scratch) {
  by_dtype(a.dtype, [&](auto element) { forward_row<decltype(element)>(a, row, scratch); });
}

void norm_backward(const NormBackward& a) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for if (a.rows * a.hidden >= kGrain)
    for (int64_t block = 0; block < a.blocks; ++block) {
      float* dweight = a.dweight ? a.dweight + block * a.hidden : nullptr;
      float* dbias = a.dbias ? a.dbias + block * a.hidden : nullptr;
      for (int64_t i = 0; dweight && i < a.hidden; ++i) dweight[i] = 0.f;
      for (int64_t i = 0; dbias && i < a.hidden; ++i) dbias[i] = 0.f;
      int64_t end = a.rows * (block + 1) / a.blocks;
      for (int64_t row = a.rows * block / a.blocks; row < end; ++row)
        backward_row<T>(a, row, dweight, dbias);
    }
  });
}

}  // namespace fastft::FASTFT_ISA
