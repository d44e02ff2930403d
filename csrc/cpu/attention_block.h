// What both passes of attention share: work items, who sees whom, the exponential, dropout.
#pragma once

#include <algorithm>

#include "attention.h"
#include "scratch.h"
#include "tile.h"

namespace fastft::FASTFT_ISA {

constexpr int64_t kKeys = 64;     // keys of a block
constexpr int64_t kQueries = 48;  // queries of a block

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
inline Span clip(Span a, int64_t begin, int64_t end) {
  return {std::max(a.begin, begin), std::min(a.end, end)};
}

// One sequence and one key head.
struct Item {
  int64_t q0, k0, queries, keys, kv_head;
};

inline Item item_of(const AttentionForward& a, int64_t sequence, int64_t kv_head) {
  int64_t q0 = a.cu_q[sequence], k0 = a.cu_k[sequence];
  return {q0, k0, a.cu_q[sequence + 1] - q0, a.cu_k[sequence + 1] - k0, kv_head};
}

// The keys that some query of [first, last] sees, and the queries that see some key of them.
inline Span keys_seen(const AttentionForward& a, const Item& s, int64_t first, int64_t last) {
  int64_t shift = s.keys - s.queries;
  return clip({first + shift - a.back, last + shift + a.ahead + 1}, 0, s.keys);
}
inline Span queries_seeing(const AttentionForward& a, const Item& s, int64_t first, int64_t last) {
  int64_t shift = s.keys - s.queries;
  return clip({first - shift - a.ahead, last - shift + a.back + 1}, 0, s.queries);
}

template <class T>
inline const T* at(const Heads& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

// All ones in the lanes whose column lies in the span.
inline IVec inside(Span span, int64_t column) {
  Vec index = lane_numbers(Lanes{}) + float(column);
  return (IVec)(index >= float(span.begin)) & (IVec)(index < float(span.end));
}

// e^x for x that is not above 88; 0 below -87, so that no subnormal slows the products.
inline Vec exp_of_difference(Vec x) {
  auto [p, n] = split_exp(x);
  IVec exponent = __builtin_convertvector(n, IVec);
  return x < -87.f ? Vec{} : p * (Vec)((exponent + 127) << 23);
}

// ---- dropout -----------------------------------------------------------------------------------

template <class Bits>
inline Bits mix(Bits x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The factor of every probability of one row: 0 or 1 / (1 - dropout).
struct Dropout {
  Dropout(const AttentionForward& a, int64_t head, int64_t query)
      : factor(a.dropout == 0 ? 1.f : 1.f / (1.f - a.dropout)), threshold(a.threshold) {
    uint32_t low = mix(uint32_t(a.seed)), high = mix(uint32_t(a.seed >> 32) + low);
    first = mix(mix(low ^ uint32_t(query)) + uint32_t(head));
    second = mix(mix(high + uint32_t(query)) ^ uint32_t(head));
  }
  Vec operator()(int64_t key) const {
    UVec index = __builtin_convertvector(lane_numbers(Lanes{}), UVec) + uint32_t(key);
    UVec hash = mix(mix(index ^ first) + second);
    return hash >= threshold ? broadcast(factor) : Vec{};
  }
  float factor;
  uint32_t threshold, first, second;
};

inline int64_t longest(const int64_t* cu, int64_t sequences) {
  int64_t out = 0;
  for (int64_t s = 0; s < sequences; ++s) out = std::max(out, cu[s + 1] - cu[s]);
  return out;
}

// Multiply-adds of one product, without regard to masks.
inline int64_t work_of(const AttentionForward& a) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < a.sequences; ++s)
    pairs += (a.cu_q[s + 1] - a.cu_q[s]) * (a.cu_k[s + 1] - a.cu_k[s]);
  return pairs * a.heads * a.dim;
}

}  // namespace fastft::FASTFT_ISA
