// Attention in blocks of queries and keys (arXiv 2205.14135): scores live in a tile in the first
// cache, and products, mask, softmax and dropout go over it panel by panel of a few rows. A work
// item is a fixed part of one sequence and one key head, with all query heads that read it; it
// owns what it writes.
#include "attention.h"

#include <algorithm>
#include <limits>
#include <memory>

#include "tile.h"

namespace fastft::FASTFT_ISA {
namespace {

constexpr int64_t kKeys = 64;     // keys of a block
constexpr int64_t kQueries = 48;  // queries of a block
constexpr int64_t kChunk = 240;   // queries of a work item of the forward pass
constexpr int64_t kFewItems = 64;  // below it, the backward pass makes every head a work item

// Memory that nobody clears first.
struct Scratch {
  explicit Scratch(int64_t size)
      : data(static_cast<float*>(::operator new(size * 4 + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  float* data;
};

struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
Span clip(Span a, int64_t begin, int64_t end) {
  return {std::max(a.begin, begin), std::min(a.end, end)};
}

// One sequence and one key head.
struct Item {
  int64_t q0, k0, queries, keys, kv_head;
};

Item item_of(const AttentionForward& a, int64_t sequence, int64_t kv_head) {
  int64_t q0 = a.cu_q[sequence], k0 = a.cu_k[sequence];
  return {q0, k0, a.cu_q[sequence + 1] - q0, a.cu_k[sequence + 1] - k0, kv_head};
}

// The keys that some query of [first, last] sees, and the queries that see some key of them.
Span keys_seen(const AttentionForward& a, const Item& s, int64_t first, int64_t last) {
  int64_t shift = s.keys - s.queries;
  return clip({first + shift - a.back, last + shift + a.ahead + 1}, 0, s.keys);
}
Span queries_seeing(const AttentionForward& a, const Item& s, int64_t first, int64_t last) {
  int64_t shift = s.keys - s.queries;
  return clip({first - shift - a.ahead, last - shift + a.back + 1}, 0, s.queries);
}

template <class T>
const T* at(const Heads& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token_stride + head * x.head_stride;
}

// All ones in the lanes whose column lies in the span.
inline IVec inside(Span span, int64_t column) {
  Vec index = lane_numbers(Lanes{}) + float(column);
  return (IVec)(index >= float(span.begin)) & (IVec)(index < float(span.end));
}

// e^x for x that is not above 88; 0 below -87, so that no subnormal slows the products.
inline Vec exp_of_difference(Vec x) {
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
  p = fma(p, r * r, r) + 1.f;
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

// ---- forward -----------------------------------------------------------------------------------

// State of the softmax of one row.
struct Running {
  float max, sum;
};

// Turns one row of products into probabilities, for the columns [begin, end) of a block whose first
// key is `block`; `seen` counts from it too. Returns what the sums so far must be multiplied by.
float softmax_row(const AttentionForward& a, const Item& s, float* row, int64_t begin, int64_t end,
                  Span seen, int64_t block, int64_t head, int64_t query, Running& state) {
  if (seen.empty()) {
    for (int64_t c = begin; c < end; c += kWidth) store(row + c, Vec{});
    return 1.f;
  }
  Vec maxima = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t c = begin; c < end; c += kWidth) {
    Vec t = load(row + c) * a.scale;
    if (a.softcap != 0) t = a.softcap * tanh(t * (1.f / a.softcap));
    if (c < seen.begin || c + kWidth > seen.end)
      t = inside(seen, c) ? t : broadcast(-std::numeric_limits<float>::infinity());
    store(row + c, t);
    maxima = max(t, maxima);
  }
  float largest = fold(maxima, [](Vec x, Vec y) { return max(x, y); })[0];
  largest = std::max(largest, state.max);
  Vec sums{};
  for (int64_t c = begin; c < end; c += kWidth) {
    Vec p = exp_of_difference(load(row + c) - largest);
    store(row + c, p);
    sums += p;
  }
  float correction = state.sum == 0 ? 1.f : exp_of_difference(broadcast(state.max - largest))[0];
  state.sum = state.sum * correction + fold(sums, [](Vec x, Vec y) { return x + y; })[0];
  state.max = largest;
  if (a.dropout != 0) {
    Dropout dropout(a, head, s.q0 + query);
    for (int64_t c = begin; c < end; c += kWidth)
      store(row + c, load(row + c) * dropout(s.k0 + block + c));
  }
  return correction;
}

// Queries [first, last) of one head over all keys. keys_t: blocks of (dim, kKeys), one after another.
template <class T>
void forward_block(const AttentionForward& a, const Item& s, int64_t head, int64_t first,
                   int64_t last, const float* keys_t, Rows values, float* scratch) {
  int64_t padded = round_up(a.dim, kWidth);
  float* out = scratch;
  float* scores = out + kQueries * padded;
  Rows q = float_rows(at<T>(a.q, s.q0 + first, head), a.q.token_stride, last - first, a.dim,
                      scores + kTileRows * kKeys);
  Running state[kQueries];
  for (Running& row : state) row = {-std::numeric_limits<float>::infinity(), 0.f};
  std::fill(out, out + (last - first) * padded, 0.f);
  Span all = keys_seen(a, s, first, last - 1);
  for (int64_t block = all.begin / kKeys * kKeys; block < all.end; block += kKeys) {
    int64_t width = std::min(kKeys, s.keys - block);
    for (int64_t row = 0; row < last - first;) {
      int rows = next_rows(last - first - row);
      Span seen = keys_seen(a, s, first + row, first + row + rows - 1);
      seen = clip({seen.begin - block, seen.end - block}, 0, width);
      if (!seen.empty()) {
        int64_t begin = seen.begin / kWidth * kWidth, end = round_up(seen.end, kWidth);
        product({q[row], q.stride, 1, keys_t + block * a.dim, kKeys, scores, kKeys, a.dim, false},
                rows, begin, end);
        for (int r = 0; r < rows; ++r) {
          Span own = keys_seen(a, s, first + row + r, first + row + r);
          own = clip({own.begin - block, own.end - block}, 0, width);
          float correction = softmax_row(a, s, scores + r * kKeys, begin, end, own, block, head,
                                         first + row + r, state[row + r]);
          float* sums = out + (row + r) * padded;
          if (correction != 1.f)
            for (int64_t c = 0; c < padded; c += kWidth) store(sums + c, load(sums + c) * correction);
        }
        product({scores + begin, kKeys, 1, values[block + begin], values.stride,
                 out + row * padded, padded, std::min(end, width) - begin, true},
                rows, 0, padded);
      }
      row += rows;
    }
  }
  for (int64_t row = 0; row < last - first; ++row) {
    float total = state[row].sum, inverse = total == 0 ? 0.f : 1.f / total;
    int64_t token = s.q0 + first + row;
    T* to = static_cast<T*>(a.out) + (token * a.heads + head) * a.dim;
    for_each_vec(a.dim, [&](int64_t i, auto n) {
      store(to + i, load(out + row * padded + i) * inverse, n);
    });
    a.lse[head * a.tokens_q + token] = state[row].max + std::log(total);
  }
}

template <class T>
void forward_item(const AttentionForward& a, const Item& s, Span chunk, float* scratch) {
  if (chunk.empty()) return;
  int64_t padded = round_up(a.dim, kWidth), groups = a.heads / a.kv_heads;
  int64_t blocks = (s.keys + kKeys - 1) / kKeys;
  float* keys_t = scratch;
  float* values = keys_t + blocks * kKeys * a.dim;
  float* rest = values + s.keys * padded;
  Span seen = keys_seen(a, s, chunk.begin, chunk.end - 1);
  for (int64_t block = seen.begin / kKeys * kKeys; block < seen.end; block += kKeys)
    transpose_tile(at<T>(a.k, s.k0 + block, s.kv_head), a.k.token_stride,
                   std::min(kKeys, s.keys - block), a.dim, keys_t + block * a.dim, kKeys);
  Rows v = float_rows(at<T>(a.v, s.k0, s.kv_head), a.v.token_stride, s.keys, a.dim, values);
  for (int64_t head = s.kv_head * groups; head < (s.kv_head + 1) * groups; ++head)
    for (int64_t first = chunk.begin; first < chunk.end; first += kQueries)
      forward_block<T>(a, s, head, first, std::min(first + kQueries, chunk.end), keys_t, v, rest);
}

int64_t longest(const int64_t* cu, int64_t sequences) {
  int64_t out = 0;
  for (int64_t s = 0; s < sequences; ++s) out = std::max(out, cu[s + 1] - cu[s]);
  return out;
}

// Multiply-adds of one product, without regard to masks.
int64_t work_of(const AttentionForward& a) {
  int64_t pairs = 0;
  for (int64_t s = 0; s < a.sequences; ++s)
    pairs += (a.cu_q[s + 1] - a.cu_q[s]) * (a.cu_k[s + 1] - a.cu_k[s]);
  return pairs * a.heads * a.dim;
}

// ---- backward ----------------------------------------------------------------------------------

// What a work item of the backward pass keeps at hand: one block of keys, one block of queries.
struct Backward {
  Backward(const AttentionForward& a, float* scratch) : padded(round_up(a.dim, kWidth)) {
    auto take = [&](int64_t size) { return std::exchange(scratch, scratch + size); };
    keys_t = take(kKeys * a.dim), values_t = take(kKeys * a.dim);
    keys_copy = take(kKeys * padded), dk = take(kKeys * padded), dv = take(kKeys * padded);
    q_copy = take(kQueries * padded), dout_copy = take(kQueries * padded);
    p = take(kQueries * kKeys), ds = take(kQueries * kKeys);
    rest = scratch;
  }
  static int64_t size(const AttentionForward& a) {
    int64_t padded = round_up(a.dim, kWidth);
    return 2 * kKeys * a.dim + (3 * kKeys + 2 * kQueries) * padded + 2 * kQueries * kKeys;
  }
  int64_t padded;
  float *keys_t, *values_t;             // (dim, kKeys)
  float *keys_copy, *dk, *dv;           // (kKeys, padded)
  float *q_copy, *dout_copy;            // (kQueries, padded)
  float *p, *ds;                        // (kQueries, kKeys): first the products, then these
  float* rest;
  Rows keys;
};

// Turns a row of the products q k and dout v into p * keep and ds; both are 0 where nothing is seen.
void gradient_row(const AttentionForward& a, const Item& s, float* p_row, float* ds_row,
                  int64_t begin, int64_t end, int64_t width, Span seen, int64_t block, int64_t head,
                  int64_t query, float total) {
  float lse = a.lse[head * a.tokens_q + s.q0 + query];
  Dropout dropout(a, head, s.q0 + query);
  for (int64_t c = begin; c < end; c += kWidth) {
    Vec t = load(p_row + c) * a.scale, slope = broadcast(a.scale);
    if (a.softcap != 0) {
      Vec capped = tanh(t * (1.f / a.softcap));
      t = a.softcap * capped;
      slope *= 1.f - capped * capped;
    }
    Vec p = exp_of_difference(t - lse), dp = load(ds_row + c), kept = p;
    if (a.dropout != 0) {
      Vec factor = dropout(s.k0 + block + c);
      dp *= factor, kept *= factor;
    }
    Vec ds = p * (dp - total) * slope;
    if (c < seen.begin || c + kWidth > seen.end) {
      IVec mask = inside(seen, c);
      kept = mask ? kept : Vec{}, ds = mask ? ds : Vec{};
    }
    store(p_row + c, kept);
    store(ds_row + c, ds);
  }
  for (float* row : {p_row, ds_row}) {
    for (int64_t c = 0; c < begin; c += kWidth) store(row + c, Vec{});
    for (int64_t c = end; c < width; c += kWidth) store(row + c, Vec{});
  }
}

// Queries [first, last) of one head against the block of keys that starts at `block`.
template <class T>
void backward_block(const AttentionBackward& b, const Item& s, Backward& w, int64_t head,
                    int64_t first, int64_t last, int64_t block, float* dq, const float* totals) {
  const AttentionForward& a = b.forward;
  int64_t width = std::min(kKeys, s.keys - block), count = last - first;
  Rows q = float_rows(at<T>(a.q, s.q0 + first, head), a.q.token_stride, count, a.dim, w.q_copy);
  Rows dout = float_rows(at<T>(b.dout, s.q0 + first, head), b.dout.token_stride, count, a.dim,
                         w.dout_copy);
  for (int64_t row = 0; row < count;) {
    int rows = next_rows(count - row);
    Span seen = keys_seen(a, s, first + row, first + row + rows - 1);
    seen = clip({seen.begin - block, seen.end - block}, 0, width);
    int64_t begin = seen.empty() ? 0 : seen.begin / kWidth * kWidth;
    int64_t end = seen.empty() ? 0 : round_up(seen.end, kWidth);
    float *p = w.p + row * kKeys, *ds = w.ds + row * kKeys;
    product({q[row], q.stride, 1, w.keys_t, kKeys, p, kKeys, a.dim, false}, rows, begin, end);
    product({dout[row], dout.stride, 1, w.values_t, kKeys, ds, kKeys, a.dim, false}, rows, begin,
            end);
    for (int r = 0; r < rows; ++r) {
      Span own = keys_seen(a, s, first + row + r, first + row + r);
      own = clip({own.begin - block, own.end - block}, 0, width);
      gradient_row(a, s, p + r * kKeys, ds + r * kKeys, begin, end, width, own, block, head,
                   first + row + r, totals[first + row + r]);
    }
    if (b.dq && begin < end)
      product({ds + begin, kKeys, 1, w.keys[begin], w.keys.stride, dq + (first + row) * w.padded,
               w.padded, std::min(end, width) - begin, true},
              rows, 0, w.padded);
    row += rows;
  }
  for (int64_t key = 0; key < width;) {
    int rows = next_rows(width - key);
    Span seeing = queries_seeing(a, s, block + key, block + key + rows - 1);
    seeing = clip({seeing.begin - first, seeing.end - first}, 0, count);
    if (!seeing.empty()) {
      int64_t from = seeing.begin * kKeys + key, steps = seeing.end - seeing.begin;
      if (b.dv)
        product({w.p + from, 1, kKeys, dout[seeing.begin], dout.stride, w.dv + key * w.padded,
                 w.padded, steps, true},
                rows, 0, w.padded);
      if (b.dk)
        product({w.ds + from, 1, kKeys, q[seeing.begin], q.stride, w.dk + key * w.padded, w.padded,
                 steps, true},
                rows, 0, w.padded);
    }
    key += rows;
  }
}

template <class T>
void write_rows(const float* from, int64_t from_stride, int64_t rows, int64_t dim, T* to,
                int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row)
    for_each_vec(dim, [&](int64_t i, auto n) {
      store(to + row * to_stride + i, load(from + row * from_stride + i), n);
    });
}

// The heads [head, head + heads) of one sequence, which share a key head. With `partial`, dk and dv
// of the one head go there as float32: (2, heads, tokens_k, dim).
template <class T>
void backward_item(const AttentionBackward& b, const Item& s, int64_t head, int64_t heads,
                   float* partial, float* scratch) {
  const AttentionForward& a = b.forward;
  Backward w(a, scratch);
  float* totals = w.rest;                   // (heads, queries): sum(dout * out)
  float* dq = totals + heads * s.queries;   // (heads, queries, padded)
  std::fill(dq, dq + heads * s.queries * w.padded, 0.f);
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < s.queries; ++i) {
      const T* dout = at<T>(b.dout, s.q0 + i, head + h);
      const T* out = static_cast<const T*>(a.out) + ((s.q0 + i) * a.heads + head + h) * a.dim;
      Vec sums{};
      for_each_vec(a.dim, [&](int64_t c, auto n) {
        sums = fma(load(dout + c, n), load(out + c, n), sums);
      });
      totals[h * s.queries + i] = fold(sums, [](Vec x, Vec y) { return x + y; })[0];
    }
  for (int64_t block = 0; block < s.keys; block += kKeys) {
    int64_t width = std::min(kKeys, s.keys - block), token = s.k0 + block;
    const T* k = at<T>(a.k, token, s.kv_head);
    transpose_tile(k, a.k.token_stride, width, a.dim, w.keys_t, kKeys);
    transpose_tile(at<T>(a.v, token, s.kv_head), a.v.token_stride, width, a.dim, w.values_t, kKeys);
    w.keys = float_rows(k, a.k.token_stride, width, a.dim, w.keys_copy);
    std::fill(w.dk, w.dk + width * w.padded, 0.f);
    std::fill(w.dv, w.dv + width * w.padded, 0.f);
    Span seeing = queries_seeing(a, s, block, block + width - 1);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t first = seeing.begin; first < seeing.end; first += kQueries)
        backward_block<T>(b, s, w, head + h, first, std::min(first + kQueries, seeing.end), block,
                          dq + h * s.queries * w.padded, totals + h * s.queries);
    for (int which = 0; which < 2; ++which) {
      const float* from = which ? w.dv : w.dk;
      void* to = which ? b.dv : b.dk;
      if (!to) continue;
      if (partial)
        write_rows(from, w.padded, width, a.dim,
                   partial + ((which * a.heads + head) * a.tokens_k + token) * a.dim, a.dim);
      else
        write_rows(from, w.padded, width, a.dim,
                   static_cast<T*>(to) + (token * a.kv_heads + s.kv_head) * a.dim,
                   a.kv_heads * a.dim);
    }
  }
  for (int64_t h = 0; b.dq && h < heads; ++h)
    write_rows(dq + h * s.queries * w.padded, w.padded, s.queries, a.dim,
               static_cast<T*>(b.dq) + (s.q0 * a.heads + head + h) * a.dim, a.heads * a.dim);
}

// Adds what the heads of each group left in `partial`, always in the same order.
template <class T>
void add_groups(const AttentionForward& a, const float* partial, T* out) {
  int64_t groups = a.heads / a.kv_heads;
#pragma omp parallel for if (a.tokens_k * a.heads * a.dim >= kGrain)
  for (int64_t token = 0; token < a.tokens_k; ++token)
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for_each_vec(a.dim, [&](int64_t i, auto n) {
        Vec total{};
        for (int64_t g = 0; g < groups; ++g)
          total += load(partial + ((head * groups + g) * a.tokens_k + token) * a.dim + i, n);
        store(out + (token * a.kv_heads + head) * a.dim + i, total, n);
      });
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  int64_t keys = round_up(longest(a.cu_k, a.sequences), kKeys), padded = round_up(a.dim, kWidth);
  int64_t chunks = (longest(a.cu_q, a.sequences) + kChunk - 1) / kChunk;
  int64_t items = a.sequences * a.kv_heads * chunks;
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel if (work_of(a) >= 16 * kGrain)
    {
      Scratch scratch(keys * (a.dim + padded) + 2 * kQueries * padded + kTileRows * kKeys);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < items; ++i) {
        Item s = item_of(a, i / chunks / a.kv_heads, i / chunks % a.kv_heads);
        // The last chunk first: under a causal mask it is the longest.
        int64_t begin = (chunks - 1 - i % chunks) * kChunk;
        forward_item<T>(a, s, {begin, std::min(begin + kChunk, s.queries)}, scratch.data);
      }
    }
  });
}

void attention_backward(const AttentionBackward& b) {
  const AttentionForward& a = b.forward;
  int64_t groups = a.heads / a.kv_heads;
  // Few sequences leave cores idle unless the heads of a group are separate items; fixed by the
  // shapes alone, so that the bits do not depend on the threads.
  bool split = groups > 1 && a.sequences * a.kv_heads < kFewItems;
  int64_t heads = split ? 1 : groups, items = a.sequences * a.heads / heads;
  Scratch partial(split ? 2 * a.heads * a.tokens_k * a.dim : 0);
  int64_t queries = longest(a.cu_q, a.sequences);
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel if (work_of(a) >= 16 * kGrain)
    {
      Scratch scratch(Backward::size(a) + heads * queries * (1 + round_up(a.dim, kWidth)));
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < items; ++i) {
        int64_t per_sequence = a.heads / heads, head = i % per_sequence * heads;
        Item s = item_of(a, i / per_sequence, head / groups);
        backward_item<T>(b, s, head, heads, split ? partial.data : nullptr, scratch.data);
      }
    }
    if (split && b.dk) add_groups(a, partial.data, static_cast<T*>(b.dk));
    if (split && b.dv)
      add_groups(a, partial.data + a.heads * a.tokens_k * a.dim, static_cast<T*>(b.dv));
  });
}

}  // namespace fastft::FASTFT_ISA
