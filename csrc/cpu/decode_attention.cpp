// Attention over a KV cache. The slots are cut into blocks at fixed positions; a block's maximum,
// sum and weighted values are made on their own and merged in ascending order, so that who computes
// a block, and beside what, changes no bit. All that read a key head share the reads of its slots.
#include "decode_attention.h"

#include <algorithm>
#include <limits>

#include "attention_block.h"

namespace fastft::FASTFT_ISA {
namespace {

constexpr int64_t kBlock = 256;  // slots of a block, read in tiles of kKeys that stay in the cache
constexpr int64_t kStep = 16;    // values added up between two requests for the next
constexpr float kNone = -std::numeric_limits<float>::infinity();

// One row of the batch and one key head, with all that read it: line l is head l % groups of query
// l / groups. Later lines see later slots.
struct Readers {
  const DecodeAttention& a;
  int64_t row, kv_head, groups, lines, padded;

  Readers(const DecodeAttention& a, int64_t item)
      : a(a), row(item / a.kv_heads), kv_head(item % a.kv_heads), groups(a.heads / a.kv_heads),
        lines(a.queries * groups), padded(round_up(a.dim, kWidth)) {}
  Span seen(int64_t line) const {
    int64_t length = a.lengths[row], position = length - a.queries + line / groups;
    return clip({position - a.window + 1, position + 1}, 0, length);
  }
  Span seen() const { return lines ? Span{seen(0).begin, seen(lines - 1).end} : Span{0, 0}; }
};

// What blocks give and what they are merged into, for each line: the largest score, the sum of
// e^(score - largest), and that of the values with these weights.
struct Softmax {
  float *values, *sum, *max;
  Softmax(float* data, const Readers& s)
      : values(data), sum(values + s.lines * s.padded), max(sum + s.lines) {}
  static int64_t size(const Readers& s) { return s.lines * (s.padded + 2); }
  void clear(const Readers& s) {
    std::fill(values, max, 0.f);
    std::fill(max, max + s.lines, kNone);
  }
};

// All lanes of each vector added up, in the order of `fold`: lane l of the result is x[l]'s sum.
template <int S = kWidth / 2>
inline Vec fold_each(Vec (&x)[kWidth]) {
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i)
    x[i] = low_lanes<S>(x[i], x[i + S], Lanes{}) + high_lanes<S>(x[i], x[i + S], Lanes{});
  if constexpr (S > 1) return fold_each<S / 2>(x);
  return x[0];
}

// Rows that will be read next. Asked for a few at a time between products, so that memory works
// while the processor computes.
struct Ahead {
  const char* data;
  int64_t stride, bytes, rows;
  void fetch(int64_t first, int64_t count) const {
    for (int64_t row = first; row < std::min(first + count, rows); ++row)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + row * stride + i);
  }
};

// scores[l][c] = q[l] k[c] for L lines, kWidth products at a time.
template <int L>
void score_lines(Rows q, Rows k, int64_t padded, int64_t keys, const Ahead& ahead,
                 float* scores) {
  constexpr int K = kWidth / L;
  for (int64_t c = 0; c < keys; c += K) {
    ahead.fetch(c, K);
    const float* key[K];
    // The last key again where there is none: who made a product does not matter, its slot does.
    for (int j = 0; j < K; ++j) key[j] = k[std::min(c + j, keys - 1)];
    Vec sums[kWidth] = {};
    for (int64_t i = 0; i < padded; i += kWidth) {
      Vec query[L];
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) query[l] = load(q[l] + i);
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) {
        Vec x = load(key[j] + i);
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l) sums[l * K + j] = fma(query[l], x, sums[l * K + j]);
      }
    }
    float products[kWidth];
    store(products, fold_each(sums));
    int64_t kept = std::min<int64_t>(K, keys - c);
    for (int l = 0; l < L; ++l) std::copy_n(products + l * K, kept, scores + l * kBlock + c);
  }
}

void score_tile(Rows q, Rows k, int64_t lines, int64_t padded, int64_t keys, Ahead ahead,
                float* scores) {
  int64_t l = 0;
  for (; l + 4 <= lines; l += 4, ahead.rows = 0)
    score_lines<4>({q[l], q.stride}, k, padded, keys, ahead, scores + l * kBlock);
  if (l + 2 <= lines) {
    score_lines<2>({q[l], q.stride}, k, padded, keys, ahead, scores + l * kBlock);
    l += 2, ahead.rows = 0;
  }
  if (l < lines) score_lines<1>({q[l], q.stride}, k, padded, keys, ahead, scores + l * kBlock);
}

// Turns the scores of the slots in `seen` into e^(score - max).
void softmax_line(const DecodeAttention& a, float* scores, Span seen, float* max, float* sum) {
  int64_t first = seen.begin / kWidth * kWidth;
  Vec maxima = broadcast(kNone), sums{};
  for (int64_t c = first; c < seen.end; c += kWidth) {
    Vec t = load(scores + c) * a.scale;
    if (a.softcap != 0) t = a.softcap * tanh(t * (1.f / a.softcap));
    if (c < seen.begin || c + kWidth > seen.end) t = inside(seen, c) ? t : broadcast(kNone);
    store(scores + c, t);
    maxima = fastft::FASTFT_ISA::max(t, maxima);
  }
  *max = fold(maxima, [](Vec x, Vec y) { return fastft::FASTFT_ISA::max(x, y); })[0];
  float shift = *max == kNone ? 0.f : *max;
  for (int64_t c = first; c < seen.end; c += kWidth) {
    Vec p = exp_of_difference(load(scores + c) - shift);
    store(scores + c, p);
    sums += p;
  }
  *sum = fold(sums, [](Vec x, Vec y) { return x + y; })[0];
}

// values += weights v over the slots of `part`, the first of which is v's first row. A line adds
// the slots that it sees and no other: a weight of 0 would not silence NaN.
void weigh_tile(const Readers& s, const float* scores, int64_t block, Span part, Rows v,
                Ahead ahead, float* values) {
  auto add = [&](int64_t line, int lines, Span slots) {
    if (slots.empty()) return;
    product({scores + line * kBlock + slots.begin - block, kBlock, 1, v[slots.begin - part.begin],
             v.stride, values + line * s.padded, s.padded, slots.end - slots.begin, true},
            lines, 0, s.padded);
  };
  for (int64_t line = 0; line < s.lines;) {
    int lines = next_rows(s.lines - line);
    Span all = clip(part, s.seen(line + lines - 1).begin, s.seen(line).end);
    if (all.empty()) all = {part.end, part.end};
    for (int l = 0; l < lines; ++l)
      add(line + l, 1, clip(s.seen(line + l), part.begin, all.begin));
    for (int64_t slot = all.begin; slot < all.end; slot += kStep) {
      ahead.fetch(slot - part.begin, kStep);
      add(line, lines, clip(all, slot, slot + kStep));
    }
    ahead.rows = 0;
    for (int l = 0; l < lines; ++l) add(line + l, 1, clip(s.seen(line + l), all.end, part.end));
    line += lines;
  }
}

// Working memory of one thread.
struct Workspace {
  float *q, *scores, *tile, *block, *merged;
  Workspace(float* data, const Readers& s)
      : q(data), scores(q + s.lines * s.padded), tile(scores + s.lines * kBlock),
        block(tile + kKeys * s.padded), merged(block + Softmax::size(s)) {}
  static int64_t size(const Readers& s) {
    return s.lines * (s.padded + kBlock) + kKeys * s.padded + 2 * Softmax::size(s);
  }
};

template <class T>
const T* at(const CachedHeads& x, int64_t row, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + token * x.token_stride +
         head * x.head_stride;
}

template <class T>
void read_queries(const Readers& s, float* q) {
  for (int64_t query = 0; query < s.a.queries; ++query)
    for (int64_t g = 0; g < s.groups; ++g, q += s.padded) {
      const T* from = at<T>(s.a.q, s.row, query, s.kv_head * s.groups + g);
      for_each_vec(s.a.dim, [&](int64_t i, auto n) { store(q + i, load(from + i, n)); });
    }
}

template <class T>
Rows rows_at(const Readers& s, const CachedHeads& x, Span slots, float* scratch) {
  return float_rows(at<T>(x, s.row, slots.begin, s.kv_head), x.token_stride,
                    slots.end - slots.begin, s.a.dim, scratch);
}
template <class T>
Ahead ahead_at(const Readers& s, const CachedHeads& x, Span slots) {
  slots = clip(slots, 0, s.seen().end);
  return {reinterpret_cast<const char*>(at<T>(x, s.row, slots.begin, s.kv_head)),
          int64_t(sizeof(T)) * x.token_stride, int64_t(sizeof(T)) * s.a.dim,
          slots.end - slots.begin};
}

template <class T>
void attend(const Readers& s, int64_t block, const Workspace& w, Softmax out) {
  Span slots = clip(s.seen(), block, block + kBlock);
  auto for_each_tile = [&](auto&& body) {
    for (int64_t end, begin = slots.begin; begin < slots.end; begin = end) {
      end = std::min(begin / kKeys * kKeys + kKeys, slots.end);
      body(Span{begin, end});
    }
  };
  if (s.a.query_dtype == s.a.dtype) {
    read_queries<T>(s, w.q);
  } else {
    read_queries<float>(s, w.q);
  }
  out.clear(s);
  for_each_tile([&](Span part) {
    score_tile({w.q, s.padded}, rows_at<T>(s, s.a.k, part, w.tile), s.lines, s.padded,
               part.end - part.begin, ahead_at<T>(s, s.a.v, part), w.scores + part.begin - block);
  });
  for (int64_t line = 0; line < s.lines; ++line) {
    Span seen = s.seen(line);
    seen = clip({seen.begin - block, seen.end - block}, 0, kBlock);
    if (!seen.empty())
      softmax_line(s.a, w.scores + line * kBlock, seen, out.max + line, out.sum + line);
  }
  for_each_tile([&](Span part) {
    Span next{part.begin + kBlock, part.end + kBlock};
    weigh_tile(s, w.scores, block, part, rows_at<T>(s, s.a.v, part, w.tile),
               ahead_at<T>(s, s.a.k, next), out.values);
  });
}

void merge(const Readers& s, int64_t block, Softmax from, Softmax to) {
  for (int64_t line = 0; line < s.lines; ++line) {
    if (clip(s.seen(line), block, block + kBlock).empty()) continue;
    float largest = std::max(to.max[line], from.max[line]);
    // Equal also where both are -inf, whose difference is none.
    auto factor = [&](float max) {
      return max == largest ? 1.f : exp_of_difference(broadcast(max - largest))[0];
    };
    float old = factor(to.max[line]), add = factor(from.max[line]);
    to.max[line] = largest;
    to.sum[line] = to.sum[line] * old + from.sum[line] * add;
    float *values = to.values + line * s.padded, *more = from.values + line * s.padded;
    for (int64_t i = 0; i < s.padded; i += kWidth)
      store(values + i, fma(load(more + i), broadcast(add), load(values + i) * old));
  }
}

template <class T>
void finish(const Readers& s, Softmax merged) {
  T* out = static_cast<T*>(s.a.out);
  for (int64_t line = 0; line < s.lines; ++line) {
    int64_t query = line / s.groups, head = s.kv_head * s.groups + line % s.groups;
    float inverse = s.seen(line).empty() ? 0.f : 1.f / merged.sum[line];
    T* to = out + ((s.row * s.a.queries + query) * s.a.heads + head) * s.a.dim;
    for_each_vec(s.a.dim, [&](int64_t i, auto n) {
      store(to + i, load(merged.values + line * s.padded + i) * inverse, n);
    });
  }
}

// How the work is cut. Few items leave threads idle: then their blocks are shared out as well, and
// merged afterwards.
struct Work {
  int64_t items, blocks = 1, pairs = 0;
  bool split;
  Work(const DecodeAttention& a, int threads) : items(a.batch * a.kv_heads) {
    for (int64_t row = 0; row < a.batch; ++row) {
      blocks = std::max<int64_t>(blocks, (a.lengths[row] + kBlock - 1) / kBlock);
      pairs += a.lengths[row] * a.queries * a.heads;
    }
    split = threads > 1 && blocks > 1 && items < 4 * threads;
  }
};

// Shared by the threads of the region it is called in.
template <class T>
void attend_all(const DecodeAttention& a, float* room) {
  const Work work(a, omp_get_num_threads());
  const Readers any(a, 0);
  const int64_t own = round_up(Workspace::size(any), 16), part = round_up(Softmax::size(any), 16);
  float* partials = room + omp_get_num_threads() * own;
  room += omp_get_thread_num() * own;
  auto merge_all = [&](const Readers& s, auto&& made) {
    Softmax merged(Workspace(room, s).merged, s);
    merged.clear(s);
    for (int64_t block = s.seen().begin / kBlock; block * kBlock < s.seen().end; ++block)
      merge(s, block * kBlock, made(block), merged);
    if (a.query_dtype == a.dtype) {
      finish<T>(s, merged);
    } else {
      finish<float>(s, merged);
    }
  };
  if (!work.split) {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < work.items; ++item) {
      const Readers s(a, item);
      const Workspace w(room, s);
      merge_all(s, [&](int64_t block) {
        attend<T>(s, block * kBlock, w, Softmax(w.block, s));
        return Softmax(w.block, s);
      });
    }
    return;
  }
  auto partial = [&](const Readers& s, int64_t item, int64_t block) {
    return Softmax(partials + (item * work.blocks + block) * part, s);
  };
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < work.items * work.blocks; ++i) {
    const int64_t item = i / work.blocks, block = i % work.blocks;
    const Readers s(a, item);
    if (!clip(s.seen(), block * kBlock, block * kBlock + kBlock).empty())
      attend<T>(s, block * kBlock, Workspace(room, s), partial(s, item, block));
  }
#pragma omp for schedule(dynamic)
  for (int64_t item = 0; item < work.items; ++item) {
    const Readers s(a, item);
    merge_all(s, [&](int64_t block) { return partial(s, item, block); });
  }
}

}  // namespace

int64_t decode_attention_floats(const DecodeAttention& a, int threads) {
  const Readers any(a, 0);
  const Work work(a, threads);
  return threads * round_up(Workspace::size(any), 16) +
         (work.split ? work.items * work.blocks : 0) * round_up(Softmax::size(any), 16);
}

void shared_decode_attention(const DecodeAttention& a, float* room) {
  by_dtype(a.dtype, [&](auto element) { attend_all<decltype(element)>(a, room); });
}

void decode_attention(const DecodeAttention& a) {
  const Work work(a, 1);
  const int threads = threads_for(work.items * work.blocks, work.pairs * a.dim >= 16 * kGrain);
  Scratch room(decode_attention_floats(a, threads));
#pragma omp parallel num_threads(threads)
  shared_decode_attention(a, room.data);
}

}  // namespace fastft::FASTFT_ISA
