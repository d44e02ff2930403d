// One read and one write of every element; a token's angles stay in the cache over all its heads.
#include "rotary.h"

#include "vec.h"

namespace fastft::FASTFT_ISA {
namespace {

template <class T, class A>
void rotate_token(const Rotary& a, const Rotated& part, int64_t batch, int64_t token) {
  const A* cos = static_cast<const A*>(a.cos) + batch * a.cos_batch + token * a.cos_token;
  const A* sin = static_cast<const A*>(a.sin) + batch * a.sin_batch + token * a.sin_token;
  const A* sin_low = a.transposed ? sin + a.half : sin;
  const A* sin_high = a.transposed ? sin : sin + a.half;
  const float sign = a.transposed ? -1.f : 1.f;
  const int64_t rotated = 2 * a.half;
  for (int64_t head = 0; head < part.heads; ++head) {
    const T* x = static_cast<const T*>(part.x) + batch * part.x_batch + token * part.x_token +
                 head * part.x_head;
    T* y = static_cast<T*>(part.y) + batch * part.y_batch + token * part.y_token +
           head * part.y_head;
    for_each_vec(a.half, [&](int64_t i, auto n) {
      Vec low = load(x + i, n), high = load(x + a.half + i, n);
      Vec turned_low = high * load(sin_low + i, n) * sign;
      Vec turned_high = low * load(sin_high + i, n) * sign;
      store(y + i, fma(low, load(cos + i, n), -turned_low), n);
      store(y + a.half + i, fma(high, load(cos + a.half + i, n), turned_high), n);
    });
    for (int64_t i = rotated; i < a.head_dim; ++i) y[i] = x[i];
  }
}

// An element costs little here: two grains, which is also where PyTorch's own go parallel.
constexpr int64_t kParallel = 2 * kGrain;

template <class T, class A>
void rotate_row(const Rotary& a, int64_t row) {
  for (int i = 0; i < a.count; ++i)
    rotate_token<T, A>(a, a.parts[i], row / a.tokens, row % a.tokens);
}

template <class T, class A>
void rotate(const Rotary& a) {
  int64_t heads = 0;
  for (int i = 0; i < a.count; ++i) heads += a.parts[i].heads;
  const int64_t rows = a.batch * a.tokens;
#pragma omp parallel for if (rows * heads * a.head_dim >= kParallel)
  for (int64_t row = 0; row < rows; ++row) rotate_row<T, A>(a, row);
}

template <class Body>
void by_dtypes(const Rotary& a, Body&& body) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.angle_dtype == DType::float32) body(T{}, float{});
    else body(T{}, T{});
  });
}

}  // namespace

void rotary(const Rotary& a) {
  by_dtypes(a, [&](auto x, auto angle) { rotate<decltype(x), decltype(angle)>(a); });
}

void rotary_row(const Rotary& a, int64_t row) {
  by_dtypes(a, [&](auto x, auto angle) { rotate_row<decltype(x), decltype(angle)>(a, row); });
}

}  // namespace fastft::FASTFT_ISA
