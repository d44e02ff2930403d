// Attention, forward, in blocks of queries and keys (arXiv 2205.14135): scores live in a tile in
// the first cache, and products, mask, softmax and dropout go over it panel by panel of a few rows. A
// work item is a chunk of one sequence's queries and one key head, with all query heads that read
// it; it owns what it writes.
#include "attention_block.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastft::FASTFT_ISA {
namespace {

constexpr int64_t kChunk = 240;  // queries of a work item
// With fewer rows per key head, a transpose of the keys costs more than it saves (measured with
// AVX2: one query, 2,048 keys, 4 query heads per key head of 128).
constexpr int64_t kTransposeRows = 8;

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
  // Products that overflow to -inf count for nothing beside finite ones, here or further on.
  float shift = largest == -std::numeric_limits<float>::infinity() ? 0.f : largest;
  Vec sums{};
  for (int64_t c = begin; c < end; c += kWidth) {
    Vec p = exp_of_difference(load(row + c) - shift);
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

// The keys of a work item: transposed in blocks of (dim, kKeys), one after another, or as they are.
struct Keys {
  const float* transposed;  // or null
  Rows rows;
};

// scores[r][c] = q[r] k[block + c] for the columns [begin, end); those from `width` on are 0.
void score_panel(const Keys& keys, Rows q, int64_t dim, int64_t block, int rows, int64_t begin,
                 int64_t end, int64_t width, float* scores) {
  if (keys.transposed) {
    product({q.data, q.stride, 1, keys.transposed + block * dim, kKeys, scores, kKeys, dim, false},
            rows, begin, end);
    return;
  }
  for (int r = 0; r < rows; ++r)
    for (int64_t c = begin; c < end; ++c) {
      Vec sums{};
      for (int64_t i = 0; c < width && i < dim; i += kWidth)
        sums = fma(load(q[r] + i), load(keys.rows[block + c] + i), sums);
      scores[r * kKeys + c] = fold(sums, [](Vec x, Vec y) { return x + y; })[0];
    }
}

// Whether all values of [begin, end) are finite; the padding of `rows` is.
bool all_finite(Rows rows, Span span, int64_t padded) {
  Vec zeros{};
  for (int64_t row = span.begin; row < span.end; ++row)
    for (int64_t c = 0; c < padded; c += kWidth) zeros = fma(load(rows[row] + c), Vec{}, zeros);
  return fold(zeros, [](Vec x, Vec y) { return x + y; })[0] == 0;
}

// Queries [first, last) of one head over all keys; each `alone` where rows that share a panel would
// meet, with a probability of 0, the values that only others see.
template <class T>
void forward_block(const AttentionForward& a, const Item& s, int64_t head, int64_t first,
                   int64_t last, const Keys& keys, Rows values, bool alone, float* scratch) {
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
      int rows = alone ? 1 : next_rows(last - first - row);
      Span seen = keys_seen(a, s, first + row, first + row + rows - 1);
      seen = clip({seen.begin - block, seen.end - block}, 0, width);
      if (!seen.empty()) {
        int64_t begin = seen.begin / kWidth * kWidth, end = round_up(seen.end, kWidth);
        score_panel(keys, {q[row], q.stride}, a.dim, block, rows, begin, end, width, scores);
        for (int r = 0; r < rows; ++r) {
          Span own = keys_seen(a, s, first + row + r, first + row + r);
          own = clip({own.begin - block, own.end - block}, 0, width);
          float correction = softmax_row(a, s, scores + r * kKeys, begin, end, own, block, head,
                                         first + row + r, state[row + r]);
          float* sums = out + (row + r) * padded;
          if (correction != 1.f)
            for (int64_t c = 0; c < padded; c += kWidth)
              store(sums + c, load(sums + c) * correction);
        }
        product({scores + seen.begin, kKeys, 1, values[block + seen.begin], values.stride,
                 out + row * padded, padded, seen.end - seen.begin, true},
                rows, 0, padded);
      }
      row += rows;
    }
  }
  for (int64_t row = 0; row < last - first; ++row) {
    bool blind = keys_seen(a, s, first + row, first + row).empty();
    float total = state[row].sum, inverse = blind ? 0.f : 1.f / total;
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
  float* values = scratch + round_up(s.keys, kKeys) * padded;
  float* rest = values + s.keys * padded;
  Span seen = keys_seen(a, s, chunk.begin, chunk.end - 1);
  Keys keys{};
  if ((chunk.end - chunk.begin) * groups < kTransposeRows) {
    keys.rows = float_rows(at<T>(a.k, s.k0, s.kv_head), a.k.token_stride, s.keys, a.dim, scratch);
  } else {
    for (int64_t block = seen.begin / kKeys * kKeys; block < seen.end; block += kKeys)
      transpose_tile(at<T>(a.k, s.k0 + block, s.kv_head), a.k.token_stride,
                     std::min(kKeys, s.keys - block), a.dim, scratch + block * a.dim, kKeys);
    keys.transposed = scratch;
  }
  Rows v = float_rows(at<T>(a.v, s.k0, s.kv_head), a.v.token_stride, s.keys, a.dim, values);
  // 0 times infinity or NaN is NaN.
  bool alone = chunk.end - chunk.begin > 1 && !all_finite(v, seen, padded);
  for (int64_t head = s.kv_head * groups; head < (s.kv_head + 1) * groups; ++head)
    for (int64_t first = chunk.begin; first < chunk.end; first += kQueries)
      forward_block<T>(a, s, head, first, std::min(first + kQueries, chunk.end), keys, v, alone,
                       rest);
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  int64_t keys = round_up(longest(a.cu_k, a.sequences), kKeys), padded = round_up(a.dim, kWidth);
  int64_t chunks = (longest(a.cu_q, a.sequences) + kChunk - 1) / kChunk;
  int64_t items = a.sequences * a.kv_heads * chunks;
  const int threads = threads_for(items, work_of(a) >= 16 * kGrain);
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    Scratch scratch(2 * keys * padded + 2 * kQueries * padded + kTileRows * kKeys, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < items; ++i) {
        Item s = item_of(a, i / chunks / a.kv_heads, i / chunks % a.kv_heads);
        // The last chunk first: under a causal mask it is the longest.
        int64_t begin = (chunks - 1 - i % chunks) * kChunk;
        forward_item<T>(a, s, {begin, std::min(begin + kChunk, s.queries)}, scratch.own());
      }
    }
  });
}

}  // namespace fastft::FASTFT_ISA
