// Two kernels. In the first, a block of threads owns kBlock slots of one key head, at a multiple of
// kBlock, and up to 16 of the lines that read it (line l is head l % groups of query l / groups).
// It leaves their maxima, sums and weighted values in memory; the second merges these in ascending
// order. Half types go through the warp's matrix product, whose rows are the lines, however few:
// what a line gets depends on no other. The grid is the capacity's, so that a CUDA graph serves
// every length; blocks behind the length return at once.
#include "decode_attention.h"

#include "decode_tile.cuh"

namespace fastft::cuda {
namespace {

// Whether every row of x can be read 16 bytes at a time. A kernel has this as kAligned: where it is
// a value of run time, every load gets a branch of its own, and waits for the one before.
template <class T>
bool packs_aligned(const CachedHeads& x) {
  return aligned16(x.data) &&
         (x.row_stride | x.token_stride | x.head_stride) % Pack<T>::size == 0;
}

template <bool kAligned, class T>
__device__ __forceinline__ Pack<T> load_or_zero(const T* from, bool there) {
  return there ? load(from, kAligned) : Pack<T>{};
}

template <class T>
__device__ __forceinline__ uint32_t word_of(T low, T high) {
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// Elements from one query to the next in shared memory: zeros up to a multiple of 32, and a pack.
template <class T>
__host__ __device__ inline int query_width(int64_t dim) {
  return int((dim + 31) / 32 * 32) + Pack<T>::size;
}

template <class T>
__device__ void stage_queries(const DecodeAttention& a, const Tile& s, T* queries) {
  int width = query_width<T>(a.dim);
  for (int i = threadIdx.x; i < kLines * width; i += kThreads) {
    int line = s.first + i / width, d = i % width;
    bool there = line < s.lines && d < a.dim;
    queries[i] = there ? at<T>(a.q, s.row, line / s.groups,
                               s.kv_head * s.groups + line % s.groups)[d]
                       : T{};
  }
}

// ---- scores (kLines, kBlock) = queries keys^T, for the slots in `slots`; no others are read ----

// Half types. A thread of the matrix product holds two neighbours along its depth; which dims these
// are is free, so a thread loads 16 bytes of a key's row and uses them in two products. The loads
// of kAhead steps of 32 dims leave before the first product.
template <bool kAligned, class T>
__device__ void make_scores(const DecodeAttention& a, const Tile& s, Span slots, const T* queries,
                            float* scores) {
  constexpr int kAhead = kAligned ? 4 : 1;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int width = query_width<T>(a.dim), depth = width - Pack<T>::size;
  for (int group = warp * kGroup; group < kBlock; group += kWarps * kGroup) {
    if (!slots.meets(group, group + kGroup)) continue;
    float sums[2][4] = {};
    const T* key[2];
    bool there[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      // Column n of product u is this slot, so that a thread's sums are four slots in a row.
      int slot = group + g / 2 * 4 + 2 * u + g % 2;
      there[u] = slots.has(slot);
      key[u] = at<T>(a.k, s.row, s.base + (there[u] ? slot : slots.begin), s.kv_head);
    }
    for (int begin = 0; begin < depth; begin += 32 * kAhead) {
      Pack<T> x[kAhead][2];
#pragma unroll
      for (int i = 0; i < 2 * kAhead; ++i) {
        int step = i / 2, u = i % 2, d = begin + 32 * step + 8 * t;
        x[step][u] = load_or_zero<kAligned>(key[u] + d, there[u] && d < a.dim);
      }
#pragma unroll
      for (int step = 0; step < kAhead; ++step) {
        int d = begin + 32 * step + 8 * t;
        if (begin + 32 * step >= depth) break;
        auto top = bit_cast<uint4>(load(queries + g * width + d, true));
        auto bottom = bit_cast<uint4>(load(queries + (g + 8) * width + d, true));
        const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
        const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          auto words = bit_cast<uint4>(x[step][u]);
          mma<T>(sums[u], first, {words.x, words.y});
          mma<T>(sums[u], second, {words.z, words.w});
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int u = i / 4, c = i % 4;
      scores[(g + c / 2 * 8) * kScores + group + 4 * t + 2 * u + c % 2] = sums[u][c];
    }
  }
}

// float32: a thread to a slot.
static_assert(kThreads == kBlock);
template <bool kAligned>
__device__ void make_scores(const DecodeAttention& a, const Tile& s, Span slots,
                            const float* queries, float* scores) {
  const int slot = threadIdx.x, width = query_width<float>(a.dim);
  if (!slots.has(slot)) return;
  const float* key = at<float>(a.k, s.row, s.base + slot, s.kv_head);
  float sums[kLines] = {};
  for (int begin = 0; begin < a.dim; begin += 8) {  // a divisor of dim
    const Pack<float> x[2] = {load(key + begin, kAligned), load(key + begin + 4, kAligned)};
#pragma unroll
    for (int pack = 0; pack < 2; ++pack) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        Pack<float> q = load(queries + line * width + begin + 4 * pack, true);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[line] = fmaf(q.item[i], x[pack].item[i], sums[line]);
      }
    }
  }
#pragma unroll
  for (int line = 0; line < kLines; ++line) scores[line * kScores + slot] = sums[line];
}

// Scores become e^(score - max), 0 where a line does not see the slot; max and sum go to `stats`.
template <class T>
__device__ void make_weights(const DecodeAttention& a, const Tile& s, float* scores,
                             float* stats) {
  const int lane = threadIdx.x % kWarp;
  for (int line = threadIdx.x / kWarp; line < kLines; line += kWarps) {
    int query = (s.first + line) / s.groups;
    Span own = line < s.count ? s.slots(a, query, query) : Span{0, 0};
    float* row = scores + line * kScores;
    float t[kBlock / kWarp], largest = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kBlock / kWarp; ++i) {
      int slot = lane + i * kWarp;
      t[i] = own.has(slot) ? row[slot] * a.scale : -INFINITY;
      if (a.softcap != 0.f && own.has(slot)) t[i] = a.softcap * tanhf(t[i] / a.softcap);
      largest = fmaxf(largest, t[i]);
    }
    largest = warp_max(largest);
    const float shift = largest == -INFINITY ? 0.f : largest;
#pragma unroll
    for (int i = 0; i < kBlock / kWarp; ++i) {
      // As the products take it: the sum of what is rounded is what the values are weighted with.
      t[i] = to_float(from_float<T>(expf(t[i] - shift)));
      row[lane + i * kWarp] = t[i];
      sum += t[i];
    }
    sum = warp_sum(sum);
    if (lane == 0 && line < s.count)
      stats[2 * (s.first + line)] = largest, stats[2 * (s.first + line) + 1] = sum;
  }
}

// ---- sums (kWarps, kLines, kColumns) = weights values, each warp's over its own of `slots` ------

// Half types. The loads of kAhead groups leave before the first product.
template <bool kAligned, class T>
__device__ void weigh(const DecodeAttention& a, const Tile& s, Span slots, int column,
                      const T* cache, const float* weights, float* sums) {
  constexpr int kAhead = kAligned ? 2 : 1, kStep = kWarps * kGroup;
  static_assert(kBlock % (kAhead * kStep) == 0);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const bool inside = column + 8 * g < a.dim;
  float c[8][4] = {};
#pragma unroll 1
  for (int begin = warp * kGroup; begin < kBlock; begin += kAhead * kStep) {
    Pack<T> loaded[kAhead][4];
#pragma unroll
    for (int i = 0; i < 4 * kAhead; ++i) {
      int slot = begin + i / 4 * kStep + 4 * t + i % 4;
      const T* from = cache + slot * a.v.token_stride + column + 8 * g;
      loaded[i / 4][i % 4] = load_or_zero<kAligned>(from, slots.has(slot) && inside);
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const int group = begin + n * kStep;
      if (!slots.meets(group, group + kGroup)) continue;
      const Pack<T>(&x)[4] = loaded[n];
      uint32_t p[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack<float> w = load(weights + (g + 8 * half) * kScores + group + 4 * t, true);
        p[half] = word_of(from_float<T>(w.item[0]), from_float<T>(w.item[1]));
        p[half + 2] = word_of(from_float<T>(w.item[2]), from_float<T>(w.item[3]));
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)  // column n of product j is column 8 n + j of the values
        mma<T>(c[j], p, {word_of(x[0].item[j], x[1].item[j]), word_of(x[2].item[j], x[3].item[j])});
    }
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    int j = i / 4, n = i % 4;
    sums[(warp * kLines + g + n / 2 * 8) * kSums + 8 * (2 * t + n % 2) + j] = c[j][n];
  }
}

template <bool kAligned>
__device__ void weigh(const DecodeAttention& a, const Tile& s, Span slots, int column,
                      const float* cache, const float* weights, float* sums) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float c[kLines][2] = {};
  for (int group = warp * kGroup; group < kBlock; group += kWarps * kGroup) {
    if (!slots.meets(group, group + kGroup)) continue;
#pragma unroll 1
    for (int slot = group; slot < group + kGroup; slot += 4) {
      float x[4][2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int d = column + lane + i % 2 * kWarp;
        bool there = slots.has(slot + i / 2) && d < a.dim;
        x[i / 2][i % 2] = there ? cache[(slot + i / 2) * a.v.token_stride + d] : 0.f;
      }
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        Pack<float> w = load(weights + line * kScores + slot, true);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          c[line][i % 2] = fmaf(w.item[i / 2], x[i / 2][i % 2], c[line][i % 2]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kLines; ++i)
    sums[(warp * kLines + i / 2) * kSums + lane + i % 2 * kWarp] = c[i / 2][i % 2];
}

// The warps' sums added up, for this tile's lines from one to another; false if one is not finite.
__device__ bool write_values(const DecodeAttention& a, const Tile& s, int column, int from, int to,
                             const float* sums, float* values) {
  bool finite = true;
  from -= s.first, to = to - s.first < s.count ? to - s.first : s.count;
  for (int i = threadIdx.x; i < kLines * kColumns; i += kThreads) {
    int line = i / kColumns, d = i % kColumns;
    if (line < from || line >= to || column + d >= a.dim) continue;
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[(warp * kLines + line) * kSums + d];
    values[(s.first + line) * a.dim + column + d] = total;
    finite &= fabsf(total) < INFINITY;
  }
  return finite;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) block_kernel(const DecodeAttention a) {
  FASTFT_SHARED(shared);
  const Tile s(a);
  const Span slots = s.slots(a, s.first_query(), s.last_query());
  if (slots.empty()) return;
  float* scores = reinterpret_cast<float*>(shared);
  char* rest = shared + kLines * kScores * sizeof(float);
  T* queries = reinterpret_cast<T*>(rest);  // until the scores are there
  float* sums = reinterpret_cast<float*>(rest);
  float* values = a.partials + ((int64_t(s.row) * a.kv_heads + s.kv_head) * gridDim.x +
                                blockIdx.x) * s.lines * (a.dim + 2);
  stage_queries(a, s, queries);
  __syncthreads();
  make_scores<kAligned>(a, s, slots, queries, scores);
  __syncthreads();
  make_weights<T>(a, s, scores, values + s.lines * a.dim);
  __syncthreads();
  const T* cache = at<T>(a.v, s.row, s.base, s.kv_head);
  const int low = s.first_query(), high = s.last_query();
  const Span oldest = s.slots(a, low, low), newest = s.slots(a, high, high);
  const bool ragged = oldest.begin != newest.begin || oldest.end != newest.end;
  for (int column = 0; column < a.dim; column += kColumns) {
    int passes = 1;
    for (int pass = 0; pass < passes; ++pass) {
      int from = pass ? low + pass - 1 : low, to = pass ? from : high;
      weigh<kAligned>(a, s, s.slots(a, from, to), column, cache, scores, sums);
      __syncthreads();
      bool finite = write_values(a, s, column, from * s.groups, (to + 1) * s.groups, sums, values);
      __syncthreads();
      // A slot that only some queries see has a weight of 0 for the others, which NaN and infinity
      // survive: then every query goes alone.
      if (pass == 0 && ragged && block_reduce<true>(finite ? 0.f : 1.f) != 0.f)
        passes += high - low + 1;
    }
  }
}

// A block of threads to a line, a thread to a column. The loads of kAhead blocks leave together, or
// each block would wait for the memory anew; selects, as branches would put them apart again.
template <class T>
__global__ void __launch_bounds__(256) merge_kernel(const DecodeAttention a, int64_t blocks) {
  constexpr int kAhead = 8;
  const int groups = int(a.heads / a.kv_heads), lines = int(a.queries) * groups;
  const int line = blockIdx.x % lines, item = blockIdx.x / lines, d = threadIdx.x;
  const int row = item / int(a.kv_heads), query = line / groups;
  if (d >= a.dim) return;
  const Span own = seen(a, length_of(a, row), query);
  const int64_t stride = int64_t(lines) * (a.dim + 2);
  const int end = (own.end + kBlock - 1) / kBlock;
  float largest = -INFINITY, sum = 0.f, value = 0.f;
  for (int begin = own.begin / kBlock; begin < end; begin += kAhead) {
    const float* values = a.partials + (item * blocks + begin) * stride;
    float others[kAhead], sums[kAhead], columns[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool there = begin + i < end;
      const float* from = values + i * stride;
      const float* stats = from + lines * a.dim + 2 * line;
      // Where there is none, what changes no bit of the result: not even that of a -0.
      others[i] = there ? stats[0] : -INFINITY;
      sums[i] = there ? stats[1] : 0.f;
      columns[i] = there ? from[line * a.dim + d] : -0.f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const float other = others[i], both = fmaxf(largest, other);
      const float shrink = expf(largest - both), weight = expf(other - both);
      // Equal also where both are -inf, whose difference is none.
      const float old = largest == both ? 1.f : shrink, add = other == both ? 1.f : weight;
      sum = fmaf(sums[i], add, sum * old);
      value = fmaf(columns[i], add, value * old);
      largest = both;
    }
  }
  int64_t head = int64_t(item) % a.kv_heads * groups + line % groups;
  static_cast<T*>(a.out)[((row * a.queries + query) * a.heads + head) * a.dim + d] =
      from_float<T>(own.empty() ? 0.f : value / sum);
}

template <class T>
cudaError_t launch(const DecodeAttention& a, cudaStream_t stream) {
  const int64_t blocks = (a.capacity + kBlock - 1) / kBlock;
  const int64_t lines = a.queries * (a.heads / a.kv_heads);
  const int64_t tiles = (lines + kLines - 1) / kLines;
  size_t queries = kLines * query_width<T>(a.dim) * sizeof(T);
  size_t sums = kWarps * kLines * kSums * sizeof(float);
  size_t bytes = kLines * kScores * sizeof(float) + (queries > sums ? queries : sums);
  const bool aligned = packs_aligned<T>(a.k) && packs_aligned<T>(a.v);
  const auto kernel = aligned ? block_kernel<T, true> : block_kernel<T, false>;
  FASTFT_LAUNCH(kernel, dim3(unsigned(blocks), unsigned(a.kv_heads * tiles), unsigned(a.batch)),
                dim3(kThreads), bytes, stream, a);
  if (cudaError_t error = cudaGetLastError()) return error;
  unsigned threads = unsigned((a.dim + kWarp - 1) / kWarp * kWarp);
  FASTFT_LAUNCH(merge_kernel<T>, dim3(unsigned(a.batch * a.kv_heads * lines)), dim3(threads), 0,
                stream, a, blocks);
  return cudaGetLastError();
}

}  // namespace
}  // namespace fastft::cuda

using namespace fastft::cuda;

Failure fastft_decode_attention(const DecodeAttention* a, Stream stream) {
  cudaError_t error = with_type(a->dtype, [&](auto type) {
    return launch<decltype(type)>(*a, static_cast<cudaStream_t>(stream));
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
