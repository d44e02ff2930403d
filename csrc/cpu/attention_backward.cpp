// Attention, backward, in blocks of keys and queries: probabilities are made again from the saved
// log-sum-exp, so nothing of the size of the scores is ever kept. A work item is one sequence and
// one key head with all query heads that read it, or one of them; it owns what it writes.
#include "attention_block.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace fastft::FASTFT_ISA {
namespace {

constexpr int64_t kFewItems = 12;  // below it, every query head is a work item

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

// Turns a row of the products q k and dout v into p * keep and ds; 0 where nothing is seen.
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
    // Above 0 by rounding alone: large scores, added up in another order than forward.
    Vec p = exp_of_difference(min(Vec{}, t - lse)), dp = load(ds_row + c), kept = p;
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

void clear_keys(const AttentionBackward& b) {
  const AttentionForward& a = b.forward;
  int64_t size = a.tokens_k * a.kv_heads * a.dim * (a.dtype == DType::float32 ? 4 : 2);
  for (void* grad : {b.dk, b.dv})
    if (grad && size > 0) std::memset(grad, 0, size);
}

}  // namespace

void attention_backward(const AttentionBackward& b) {
  const AttentionForward& a = b.forward;
  int64_t groups = a.heads / a.kv_heads;
  // Without query heads, keys and values get gradients of 0 all the same.
  if (groups == 0) return clear_keys(b);
  // Few sequences leave cores idle unless the heads of a group are separate items; fixed by the
  // shapes alone, so that the bits do not depend on the threads.
  bool split = groups > 1 && a.sequences * a.kv_heads < kFewItems;
  int64_t heads = split ? 1 : groups, items = a.sequences * a.heads / heads;
  Scratch partial(split ? 2 * a.heads * a.tokens_k * a.dim : 0);
  int64_t queries = longest(a.cu_q, a.sequences);
  const int threads = threads_for(items, work_of(a) >= 16 * kGrain);
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    Scratch scratch(Backward::size(a) + heads * queries * (1 + round_up(a.dim, kWidth)), threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < items; ++i) {
        int64_t per_sequence = a.heads / heads, head = i % per_sequence * heads;
        Item s = item_of(a, i / per_sequence, head / groups);
        backward_item<T>(b, s, head, heads, split ? partial.data : nullptr, scratch.own());
      }
    }
    if (split && b.dk) add_groups(a, partial.data, static_cast<T*>(b.dk));
    if (split && b.dv)
      add_groups(a, partial.data + a.heads * a.tokens_k * a.dim, static_cast<T*>(b.dv));
  });
}

}  // namespace fastft::FASTFT_ISA
