// One float32 vector of the widest register the instruction set has, with loads and stores that
// convert from and to bfloat16 and float16, and the elementary functions the operators need.
// Written on the compilers' vector extensions, so that one source serves every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace fastft::FASTFT_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t UVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HVec __attribute__((vector_size(2 * kWidth)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// Calls body(T{}) with the element type that `dtype` names.
template <class Body>
inline void by_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32: body(float{}); break;
    case DType::bfloat16: body(BFloat16{}); break;
    case DType::float16: body(Float16{}); break;
  }
}

inline Vec broadcast(float value) { return value - Vec{}; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline Vec abs(Vec x) { return (Vec)((IVec)x & 0x7fffffff); }

// ---- conversions -------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(Float16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff, bits;
  if (magnitude >= 0x7c00) {  // infinity and NaN
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude * 2^-24, exact in float32
    float value = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = uint16_t(bits >> 16) | 0x40;
  } else {
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
inline void from_float(float x, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    out->bits = sign | 0x7c00;
  } else if (bits >= 0x38800000) {
    bits -= 112u << 23;
    out->bits = sign | uint16_t((bits + 0xfff + ((bits >> 13) & 1)) >> 13);
  } else {  // subnormal: adding 0.5 makes the float unit round to the last place of float16
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out->bits = sign | uint16_t(bits - 0x3f000000);
  }
}

// ---- loads and stores of a whole vector ----------------------------------------------------------

inline Vec load(const float* p) {
  Vec out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline Vec load(const BFloat16* p) {
  // GCC 12 widens a vector in halves and joins them again; the processor needs one instruction.
#if defined(__AVX512F__)
  UVec wide = (UVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  UVec wide = (UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  HVec half;
  std::memcpy(&half, p, sizeof half);
  UVec wide = __builtin_convertvector(half, UVec);
#endif
  return (Vec)(wide << 16);
}
inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec out{};
  for (int i = 0; i < kWidth; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline void store(BFloat16* p, Vec x) {
  UVec bits = (UVec)x, high = bits >> 16;
  UVec rounded = (bits + 0x7fff + (high & 1)) >> 16;
  UVec kept = x == x ? rounded : high | 0x40;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)kept));
#else
  HVec half = __builtin_convertvector(kept, HVec);
  std::memcpy(p, &half, sizeof half);
#endif
}
inline void store(Float16* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kWidth; ++i) from_float(x[i], p + i);
#endif
}

// The last `count` < kWidth elements of a row; lanes beyond them read as `fill`.
template <class T>
inline Vec load(const T* p, int64_t count, float fill = 0.f) {
  Vec out = broadcast(fill);
  for (int i = 0; i < count; ++i) out[i] = to_float(p[i]);
  return out;
}
template <class T>
inline void store(T* p, Vec x, int64_t count) {
  for (int i = 0; i < count; ++i) from_float(x[i], p + i);
}

#if defined(__AVX2__)
// Of float32 in one instruction: a loop over lanes would take longer than a short row's product.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }
inline Vec load(const float* p, int64_t count, float fill = 0.f) {
  return (Vec)_mm512_mask_loadu_ps((__m512)broadcast(fill), first_lanes(count), p);
}
inline void store(float* p, Vec x, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)x);
}
#else
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* p, int64_t count, float fill = 0.f) {
  const __m256i lanes = first_lanes(count);
  return (Vec)_mm256_blendv_ps((__m256)broadcast(fill), _mm256_maskload_ps(p, lanes),
                               _mm256_castsi256_ps(lanes));
}
inline void store(float* p, Vec x, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)x);
}
#endif
#endif

// Calls body(i, count) for every vector of [0, n); `count` is kWidth but for the last.
template <class Body>
inline void for_each_vec(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, std::integral_constant<int, kWidth>{});
  if (i < n) body(i, n - i);
}
template <class T>
inline Vec load(const T* p, std::integral_constant<int, kWidth>, float = 0.f) { return load(p); }
template <class T>
inline void store(T* p, Vec x, std::integral_constant<int, kWidth>) { store(p, x); }

inline float sum(Vec x) {
  // Halving keeps the order of summation the same for a given width.
  float lanes[kWidth];
  std::memcpy(lanes, &x, sizeof x);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
inline float max(Vec x) {
  float out = x[0];
  for (int i = 1; i < kWidth; ++i) out = out < x[i] ? x[i] : out;
  return out;
}

// ---- elementary functions --------------------------------------------------------------------

// e^r and n for x = n ln 2 + r, |r| <= ln 2 / 2: a polynomial (Cephes expf), within 1 ulp.
struct Exponential {
  Vec fraction, power;  // e^x = fraction * 2^power
};
inline Exponential split_exp(Vec x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec n = fma(x, broadcast(1.44269504088896341f), broadcast(kRound)) - kRound;
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return {fma(p, r * r, r) + 1.f, n};
}

// e^x within 1 ulp. 2^n by scalef, or by exponent bits in two steps, so that subnormal results keep
// their value. NaN stays NaN.
inline Vec exp(Vec x) {
  auto [p, n] = split_exp(max(min(x, broadcast(89.f)), broadcast(-104.f)));
#if defined(__AVX512F__)
  Vec scaled = (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  IVec exponent = __builtin_convertvector(n, IVec);
  IVec half = exponent >> 1;
  Vec scaled = p * (Vec)((half + 127) << 23) * (Vec)((exponent - half + 127) << 23);
#endif
  return x == x ? scaled : x;
}

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

// tanh within 2 ulp (Cephes tanhf): an odd polynomial near zero, 1 - 2 / (e^{2|x|} + 1) elsewhere.
inline Vec tanh(Vec x) {
  Vec magnitude = abs(x), square = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  Vec small = fma(p * square, x, x);
  Vec large = 1.f - 2.f / (exp(magnitude + magnitude) + 1.f);
  large = x < 0.f ? -large : large;
  return magnitude < 0.625f ? small : large;
}

struct Normal {
  Vec cdf, density;
};

// The standard normal distribution: for u = |x| its tail is e^{-u^2/2} g(u), with g(u) a polynomial
// in r = 1 / (u + 2.5) times r (our fit, relative error 1.5e-8 before rounding, for all u where
// the tail is not zero in float32). One exp serves both, and nothing cancels below zero.
inline Normal normal(Vec x) {
  Vec r = 1.f / (abs(x) + 2.5f), power = exp(-0.5f * x * x);
  Vec p = broadcast(3.073467544e+2f);
  p = fma(p, r, broadcast(-6.747205347e+2f));
  p = fma(p, r, broadcast(5.835080749e+2f));
  p = fma(p, r, broadcast(-2.283326487e+2f));
  p = fma(p, r, broadcast(2.916900108e+1f));
  p = fma(p, r, broadcast(-2.616479689e+0f));
  p = fma(p, r, broadcast(3.566562468e+0f));
  p = fma(p, r, broadcast(2.080454883e+0f));
  p = fma(p, r, broadcast(9.976631432e-1f));
  p = fma(p, r, broadcast(3.989399327e-1f));
  Vec tail = power * (p * r);
  return {x < 0.f ? tail : 1.f - tail, power * 0.39894228040143268f};
}

}  // namespace fastft::FASTFT_ISA
