// A block owns a row. Its thread t reads packs t, t + threads, ... of 16 bytes, whatever the row's
// address, so that a row's bits depend on nothing but the row. For losses and gradients at once the
// row stays in shared memory between its two passes, as far as that reaches without keeping a
// second block from the multiprocessor; what is left comes from L2, which held it a moment ago.
#include "cross_entropy.h"

#include "common.cuh"

namespace fastft::cuda {
namespace {

constexpr int kThreads = 512;
constexpr float kLowest = -3.402823466e38f;  // in place of -inf, whose difference from itself is NaN

// The row a block or piece works on.
template <class T>
struct Row {
  const T* logits;
  T* dlogits;
  int64_t label;
  bool kept, wrong, aligned;

  __device__ Row(const CrossEntropy& a, int64_t row) {
    logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
    dlogits = static_cast<T*>(a.dlogits) + (a.dlogits ? row * a.dlogits_stride : 0);
    label = a.labels[row * a.labels_stride];
    bool counts = label != a.ignore_index;
    kept = counts && label >= 0 && label < a.vocab;
    wrong = counts && !kept;
    aligned = aligned16(logits) && (!a.dlogits || aligned16(dlogits));
  }
};

// How many elements of pack p lie inside a row.
template <class T>
__device__ __forceinline__ int inside(int64_t vocab, int64_t p) {
  int64_t left = vocab - p * Pack<T>::size;
  return left < Pack<T>::size ? int(left) : Pack<T>::size;
}

// As the words that were loaded: taking elements out of them waits for the load, and is left to
// whoever uses them. What lies outside the row is 0.
template <class T>
__device__ __forceinline__ uint4 read(const Row<T>& row, int64_t vocab, int64_t p) {
  const T* from = row.logits + p * Pack<T>::size;
  if (row.aligned && inside<T>(vocab, p) == Pack<T>::size)
    return *reinterpret_cast<const uint4*>(from);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i)
    pack.item[i] = i < inside<T>(vocab, p) ? from[i] : from_float<T>(0.f);
  return bit_cast<uint4>(pack);
}

template <class T>
__device__ __forceinline__ void write(const CrossEntropy& a, const Row<T>& row,
                                      const Pack<T>& pack, int64_t p) {
  T* to = row.dlogits + p * Pack<T>::size;
  if (inside<T>(a.vocab, p) == Pack<T>::size) return store(to, pack, row.aligned);
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i)
    if (i < inside<T>(a.vocab, p)) to[i] = pack.item[i];
}

// A logit as the loss sees it; t is its tanh where it is capped.
template <bool kGeneral>
__device__ __forceinline__ float seen(const CrossEntropy& a, float u, float& t) {
  float z = u * a.logit_scale;
  if (kGeneral && a.softcap != 0.f) {
    t = tanhf(z / a.softcap);
    return a.softcap * t;
  }
  return z;
}

// The gradient of one pack, written.
template <class T, bool kGeneral>
__device__ __forceinline__ void write_gradient(const CrossEntropy& a, const Row<T>& row,
                                               uint4 words, int64_t p, float maximum, float mass,
                                               float own, float upstream) {
  Pack<T> pack = bit_cast<Pack<T>>(words);
  float spread = kGeneral ? a.label_smoothing / float(a.vocab) : 0.f;
  int64_t first = p * Pack<T>::size;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    float t = 0.f, z = seen<kGeneral>(a, to_float(pack.item[i]), t);
    float grad = mass * expf(z - maximum);
    if (kGeneral && spread != 0.f && first + i < a.vocab)
      grad -= a.weight ? spread * a.weight[first + i] : spread;
    if (first + i == row.label) grad -= own;
    if (kGeneral) grad *= 1.f - t * t;
    pack.item[i] = from_float<T>(grad * upstream);
  }
  write(a, row, pack, p);
}

// What every element of a row with a wrong label, or without one, gets.
template <class T>
__device__ __forceinline__ void write_constant(const CrossEntropy& a, const Row<T>& row, int64_t p,
                                               float value) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) pack.item[i] = from_float<T>(value);
  write(a, row, pack, p);
}

// The factors of a row's gradient that no column changes.
template <bool kGeneral>
struct Factors {
  float own, mass, upstream;

  __device__ Factors(const CrossEntropy& a, int64_t row, int64_t label, float total) {
    own = 1.f, mass = 1.f;
    if (kGeneral) {
      own = (1.f - a.label_smoothing) * (a.weight ? a.weight[label] : 1.f);
      float sum = a.weight ? *a.weight_sum : float(a.vocab);
      mass = own + a.label_smoothing / float(a.vocab) * sum;
    }
    mass /= total;
    upstream = a.logit_scale * (a.dlosses ? a.dlosses[row * a.dlosses_stride] : 1.f);
  }
};

// kept_packs: how many packs of the row stay in shared memory for the gradient.
template <class T, bool kGeneral, bool kGradient>
__global__ void __launch_bounds__(kThreads, 2) row_kernel(const CrossEntropy a, int kept_packs) {
  FASTFT_SHARED(shared);
  uint4* kept = reinterpret_cast<uint4*>(shared);
  const int64_t packs = (a.vocab + Pack<T>::size - 1) / Pack<T>::size;
  const int64_t index = blockIdx.x;
  const Row<T> row(a, index);
  if (!row.kept) {
    float value = row.wrong ? NAN : 0.f;
    if (threadIdx.x == 0) {
      a.losses[index] = value;
      if (a.stats) a.stats[2 * index] = 0.f, a.stats[2 * index + 1] = 1.f;
    }
    if (kGradient)
      for (int64_t p = threadIdx.x; p < packs; p += blockDim.x) write_constant(a, row, p, value);
    return;
  }
  float t = 0.f, own = seen<kGeneral>(a, to_float(row.logits[row.label]), t);
  // Sums of differences from a logit of the row lose less than sums of the logits.
  const float origin = fabsf(own) < INFINITY ? own : 0.f;
  float maximum = kLowest, total = 0.f, rest = 0.f;
  uint4 next = {};
  if (threadIdx.x < packs) next = read(row, a.vocab, threadIdx.x);
  for (int64_t p = threadIdx.x; p < packs; p += blockDim.x) {
    // The next read is under way while this pack is worked on.
    const uint4 words = next;
    if (p + blockDim.x < packs) next = read(row, a.vocab, p + blockDim.x);
    if (kGradient && p < kept_packs) kept[p] = words;
    const Pack<T> pack = bit_cast<Pack<T>>(words);
    float z[Pack<T>::size], highest = maximum;
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) {
      const bool in = i < inside<T>(a.vocab, p);
      z[i] = in ? seen<kGeneral>(a, to_float(pack.item[i]), t) : -INFINITY;
      highest = fmaxf(highest, z[i]);
      if (kGeneral && a.label_smoothing != 0.f && in)
        rest += (z[i] - origin) * (a.weight ? a.weight[p * Pack<T>::size + i] : 1.f);
    }
    total *= expf(maximum - highest);
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) total += expf(z[i] - highest);
    maximum = highest;
  }
  const float row_maximum = block_reduce<true>(maximum);
  total = block_reduce<false>(total * expf(maximum - row_maximum));
  if (kGeneral && a.label_smoothing != 0.f) rest = block_reduce<false>(rest);
  if (threadIdx.x == 0) {
    float logarithm = logf(total), loss = logarithm - (own - row_maximum);
    if (kGeneral) {
      loss *= (1.f - a.label_smoothing) * (a.weight ? a.weight[row.label] : 1.f);
      float sum = a.weight ? *a.weight_sum : float(a.vocab);
      if (a.label_smoothing != 0.f)
        loss += a.label_smoothing / float(a.vocab) *
                (sum * (logarithm + (row_maximum - origin)) - rest);
    }
    a.losses[index] = loss;
    if (a.stats) a.stats[2 * index] = row_maximum, a.stats[2 * index + 1] = total;
  }
  if (!kGradient) return;
  const Factors<kGeneral> f(a, index, row.label, total);
  for (int64_t p = threadIdx.x; p < packs; p += blockDim.x) {
    const uint4 words = p < kept_packs ? kept[p] : read(row, a.vocab, p);
    write_gradient<T, kGeneral>(a, row, words, p, row_maximum, f.mass, f.own, f.upstream);
  }
}

// A block owns up to kThreads * kPacksOfThread packs of a row.
constexpr int kPacksOfThread = 2;

template <class T, bool kGeneral>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const CrossEntropy a, int pieces) {
  const int64_t index = blockIdx.x / pieces;
  const int64_t packs = (a.vocab + Pack<T>::size - 1) / Pack<T>::size;
  const Row<T> row(a, index);
  const float maximum = a.stats[2 * index], total = a.stats[2 * index + 1];
  const Factors<kGeneral> f(a, index, row.kept ? row.label : 0, total);
  int64_t p = int64_t(blockIdx.x % pieces) * kPacksOfThread * blockDim.x + threadIdx.x;
  // All reads before the first write, which might be to where the next read is from.
  uint4 words[kPacksOfThread] = {};
#pragma unroll
  for (int i = 0; i < kPacksOfThread; ++i)
    if (row.kept && p + i * blockDim.x < packs) words[i] = read(row, a.vocab, p + i * blockDim.x);
#pragma unroll
  for (int i = 0; i < kPacksOfThread; ++i, p += blockDim.x) {
    if (p >= packs) return;
    if (row.kept)
      write_gradient<T, kGeneral>(a, row, words[i], p, maximum, f.mass, f.own, f.upstream);
    else
      write_constant(a, row, p, row.wrong ? NAN : 0.f);
  }
}

bool general(const CrossEntropy& a) {
  return a.weight || a.label_smoothing != 0.f || a.softcap != 0.f;
}

// Whole warps, no more than the packs of a row: a function of the vocabulary alone.
int threads_for(int64_t packs) {
  int64_t rounded = (packs + kWarp - 1) / kWarp * kWarp;
  return rounded < kThreads ? int(rounded) : kThreads;
}

template <class T, bool kGeneral, bool kGradient>
cudaError_t launch_rows(const CrossEntropy& a, cudaStream_t stream) {
  int64_t packs = (a.vocab + Pack<T>::size - 1) / Pack<T>::size;
  int64_t bytes = 0;
  auto kernel = row_kernel<T, kGeneral, kGradient>;
  if (kGradient) {
    int device = 0, of_processor = 0;
    if (cudaError_t error = cudaGetDevice(&device)) return error;
    if (cudaError_t error = cudaDeviceGetAttribute(
            &of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device))
      return error;
    // Half of a multiprocessor's, less what the system and the reductions of a block take.
    int64_t limit = (of_processor / 2 - 2048) / 16 * 16;
    bytes = packs * 16 < limit ? packs * 16 : limit;
    // What a launch may have unasked for is less than 48 KB by its static memory. Asked for is the
    // device's limit, the same for every row: another thread's launch must not lower ours.
    if (bytes > 40 * 1024)
      if (cudaError_t error = cudaFuncSetAttribute(
              reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
              int(limit)))
        return error;
  }
  FASTFT_LAUNCH(kernel, dim3(unsigned(a.rows)), dim3(threads_for(packs)), size_t(bytes), stream, a,
                int(bytes / 16));
  return cudaGetLastError();
}

template <class T, bool kGeneral>
cudaError_t launch_backward(const CrossEntropy& a, cudaStream_t stream) {
  int64_t packs = (a.vocab + Pack<T>::size - 1) / Pack<T>::size;
  int threads = threads_for(packs);
  int64_t pieces = (packs + kPacksOfThread * threads - 1) / (kPacksOfThread * threads);
  auto kernel = backward_kernel<T, kGeneral>;
  // Rows in slices, where rows times pieces is more than a grid holds.
  int64_t step = 0x7fffffff / pieces;
  for (int64_t start = 0; start < a.rows; start += step) {
    CrossEntropy part = a;
    part.rows = a.rows - start < step ? a.rows - start : step;
    part.logits = static_cast<const T*>(a.logits) + start * a.logits_stride;
    part.labels = a.labels + start * a.labels_stride;
    part.stats = a.stats + 2 * start;
    part.dlogits = static_cast<T*>(a.dlogits) + start * a.dlogits_stride;
    if (a.dlosses) part.dlosses = a.dlosses + start * a.dlosses_stride;
    FASTFT_LAUNCH(kernel, dim3(unsigned(part.rows * pieces)), dim3(threads), 0, stream, part,
                  int(pieces));
  }
  return cudaGetLastError();
}

Failure message(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <bool kGradient>
Failure rows(const CrossEntropy* a, Stream stream) {
  return message(with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    auto s = static_cast<cudaStream_t>(stream);
    return general(*a) ? launch_rows<T, true, kGradient>(*a, s)
                       : launch_rows<T, false, kGradient>(*a, s);
  }));
}

}  // namespace
}  // namespace fastft::cuda

using namespace fastft::cuda;

Failure fastft_cross_entropy_forward(const CrossEntropy* a, Stream stream) {
  return rows<false>(a, stream);
}

Failure fastft_cross_entropy_both(const CrossEntropy* a, Stream stream) {
  return rows<true>(a, stream);
}

Failure fastft_cross_entropy_backward(const CrossEntropy* a, Stream stream) {
  return message(with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    auto s = static_cast<cudaStream_t>(stream);
    return general(*a) ? launch_backward<T, true>(*a, s) : launch_backward<T, false>(*a, s);
  }));
}
