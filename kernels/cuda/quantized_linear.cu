// Half types go through the tensor cores at every width, so that bits do not depend on it: the
// weight is the matrix of 16 rows, the tokens are its 8 columns, once or twice. A block owns 16
// outputs. Its warps take 64 bytes of each weight row in turns, and their sums meet in shared memory
// in the order of the warps. A product's order along the inputs is free as long as both sides share
// it, so a thread multiplies just what its 16-byte loads brought.
//
// float32 has a warp per output, in plain multiply-adds. The adapter's x A^T is a kernel before.
#include "quantized_linear.h"

#include "stored_weight.cuh"

namespace fastft::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTile = 16;     // tokens that share a read of the weight
constexpr int kOutputs = 16;  // of a block of the tensor cores

// ---- the adapter ---------------------------------------------------------------------------------

// low[row, j] = x[row] . a[j]: a block per element.
template <class X, class A>
__global__ void __launch_bounds__(kThreads) low_kernel(const QuantizedLinear a) {
  const int64_t row = blockIdx.x / a.rank, j = blockIdx.x % a.rank;
  const X* x = static_cast<const X*>(a.x.data) + row * a.x.stride;
  const A* w = static_cast<const A*>(a.a.data) + j * a.a.stride;
  float sum = 0.f;
  for (int64_t k = threadIdx.x; k < a.in; k += kThreads)
    sum = fmaf(to_float(x[k]), to_float(w[k]), sum);
  sum = block_reduce<false>(sum);
  if (threadIdx.x == 0) a.low[blockIdx.x] = sum;
}

template <class B>
__device__ __forceinline__ float low_times(const QuantizedLinear& a, int64_t row, int64_t channel) {
  const float* low = a.low + row * a.rank;
  const B* b = static_cast<const B*>(a.b.data) + channel * a.b.stride;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t j = 0; j < a.rank; ++j) sum = fmaf(low[j], to_float(b[j]), sum);
  return sum * a.lora_scale;
}

// What is added to the sum over the inputs: the bias and the adapter.
__device__ __forceinline__ float addend(const QuantizedLinear& a, int64_t row, int64_t channel) {
  float bias = 0.f, low = 0.f;
  if (a.bias.data) {
    const int64_t at = channel * a.bias.stride;
    switch (a.bias.dtype) {
      case DType::bfloat16: bias = to_float(static_cast<const bfloat16*>(a.bias.data)[at]); break;
      case DType::float16: bias = to_float(static_cast<const float16*>(a.bias.data)[at]); break;
      default: bias = static_cast<const float*>(a.bias.data)[at];
    }
  }
  if (a.rank) switch (a.b.dtype) {
      case DType::bfloat16: low = low_times<bfloat16>(a, row, channel); break;
      case DType::float16: low = low_times<float16>(a, row, channel); break;
      default: low = low_times<float>(a, row, channel);
    }
  return bias + low;
}

template <class T>
__device__ __forceinline__ void finish(const QuantizedLinear& a, int64_t row, int64_t channel,
                                       float sum, float added) {
  const float scale = a.layout == WeightLayout::int8
                          ? static_cast<const float*>(a.scale)[channel * a.scale_stride]
                          : 1.f;
  static_cast<T*>(a.y)[row * a.out + channel] = from_float<T>(fmaf(sum, scale, added));
}

// ---- tensor cores --------------------------------------------------------------------------------

// What a thread multiplies in one step: a piece of two rows of the weight, and its tokens' inputs.
template <class Layout, int kColumns>
struct Step {
  Piece upper, lower;
  uint32_t x[kColumns][Layout::kInputs / 8][4];
};

// Steps that a thread computes while as many are under way: as a wait for one load may be one for
// all before it, each batch is asked for whole, before the work on the last one. Two batches
// take the registers of a thread; sm_75's emulated bfloat16 leaves few, and 0 is none under way.
template <class Layout, int kColumns>
__device__ constexpr int batch_steps() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr int words = 24;
#else
  constexpr int words = 48;
#endif
  return words / int(sizeof(Step<Layout, kColumns>) / 4);
}

template <class T, class Layout, int kColumns>
__device__ __forceinline__ void multiply(float (&c)[kColumns][4],
                                         const Step<Layout, kColumns>& step) {
#pragma unroll
  for (int j = 0; j < Layout::kInputs / 4; ++j) {
    uint32_t high[2], low[2];
    Layout::template words<T>(step.upper, j, high);
    Layout::template words<T>(step.lower, j, low);
    const uint32_t rows[4] = {high[0], low[0], high[1], low[1]};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const uint32_t* x = step.x[n][j / 2] + j % 2 * 2;
      uint32_t b[2] = {x[0], x[1]};
      if (Layout::kCrossed) {
        b[0] = (x[0] & 0xffffu) | x[1] << 16;
        b[1] = x[0] >> 16 | (x[1] & 0xffff0000u);
      }
      mma<T>(c[n], rows, b);
    }
  }
}

// Whether every 16 bytes of the tokens lie at a multiple of 16.
__host__ __device__ __forceinline__ bool aligned_tokens(const QuantizedLinear& a) {
  return aligned16(a.x.data) && a.x.stride % 8 == 0;
}

// kWhole: every load is of 16 bytes at a multiple of 16, all inside a row or all past its end.
template <class T, class Layout, int kColumns, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) mma_kernel(const QuantizedLinear a, int tiles) {
  constexpr int kInputs = Layout::kInputs, kStep = 4 * kInputs * kWarps;
  constexpr int kAhead = kWhole ? batch_steps<Layout, kColumns>() : 0, kSteps = kAhead ? kAhead : 1;
  __shared__ float sums[kWarps][8 * kColumns][kOutputs];
  const int64_t first_row = int64_t(blockIdx.x % tiles) * kTile;
  const int64_t first_channel = int64_t(blockIdx.x / tiles) * kOutputs;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;

  const bool aligned = aligned_rows<Layout>(a), x_aligned = aligned_tokens(a);
  const WeightRow<Layout> top(a, first_channel + g), bottom(a, first_channel + g + 8);
  const T* x[kColumns];
  bool there[kColumns];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const int64_t row = first_row + 8 * n + g;
    there[n] = row < a.rows;
    x[n] = static_cast<const T*>(a.x.data) + (there[n] ? row : 0) * a.x.stride;
  }

  // `start` is the same for a whole warp, k is the thread's own.
  const int in = int(a.in);
  int start = warp * 4 * kInputs;
  Step<Layout, kColumns> now[kSteps], next[kSteps];
  auto read = [&](Step<Layout, kColumns>(&batch)[kSteps], int from) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = from + s * kStep + t * kInputs;
      batch[s].upper = kWhole ? top.read_whole(a, k) : top.read(a, k, aligned);
      batch[s].lower = kWhole ? bottom.read_whole(a, k) : bottom.read(a, k, aligned);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < kInputs / 8; ++i)
          if (kWhole)
            read16(batch[s].x[n][i], x[n] + k + 8 * i, there[n] && k < in);
          else
            read16(batch[s].x[n][i], x[n] + k + 8 * i,
                   there[n] ? 2 * (int64_t(in) - k - 8 * i) : 0, x_aligned);
    }
  };
  if (kAhead) read(now, start);
  // Its reads are hidden behind those of the weight.
  const int token = threadIdx.x / kOutputs, output = threadIdx.x % kOutputs;
  const int64_t row = first_row + token, channel = first_channel + output;
  const bool mine = token < 8 * kColumns && row < a.rows && channel < a.out;
  const float added = mine ? addend(a, row, channel) : 0.f;

  float c[kColumns][4] = {};
  // The copy is where a thread waits. Unrolled, it would wait for what it has only just asked for:
  // the batches would share a scoreboard.
#pragma unroll 1
  while (start < in) {
    if (kAhead)
      read(next, start + kAhead * kStep);
    else
      read(now, start);
#pragma unroll
    for (int s = 0; s < kSteps; ++s, start += kStep)
      if (start < in) multiply<T>(c, now[s]);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) now[s] = next[s];
  }
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[warp][8 * n + 2 * t + i % 2][g + i / 2 * 8] = c[n][i];
  __syncthreads();
  if (!mine) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][token][output];
  finish<T>(a, row, channel, sum, added);
}

// ---- float32 -------------------------------------------------------------------------------------

__device__ __forceinline__ void read_floats(float (&x)[4], const float* from, int inside,
                                            bool aligned) {
  if (inside >= 4 && aligned) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = i < inside ? from[i] : 0.f;
}

template <class Layout, int kRows>
__global__ void __launch_bounds__(kThreads, 2) fma_kernel(const QuantizedLinear a, int tiles) {
  const int64_t first = int64_t(blockIdx.x % tiles) * kRows;
  const int64_t channel = int64_t(blockIdx.x / tiles) * kWarps + threadIdx.x / kWarp;
  if (channel >= a.out) return;
  const int lane = threadIdx.x % kWarp, in = int(a.in);
  const int rows = a.rows - first < kRows ? int(a.rows - first) : kRows;
  const bool aligned = aligned_rows<Layout>(a);
  const float* x = static_cast<const float*>(a.x.data) + first * a.x.stride;
  const bool x_aligned = aligned16(a.x.data) && a.x.stride % 4 == 0;
  const WeightRow<Layout> weight(a, channel);
  float sums[kRows] = {};
  for (int k = lane * Layout::kInputs; k < in; k += kWarp * Layout::kInputs) {
    const Piece piece = weight.read(a, k, aligned);
#pragma unroll
    for (int j = 0; j < Layout::kInputs / 4; ++j) {
      float w[4], values[4];
      Layout::quad(piece, j, w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        read_floats(values, x + r * a.x.stride + k + 4 * j, in - k - 4 * j, x_aligned);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r] = fmaf(w[i], values[i], sums[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = warp_sum(sums[r]);
    if (lane == r && r < rows)
      finish<float>(a, first + r, channel, sum, addend(a, first + r, channel));
  }
}

// ---- launchers -----------------------------------------------------------------------------------

unsigned blocks(int64_t tiles, int64_t outputs, int of_block) {
  return unsigned(tiles * ((outputs + of_block - 1) / of_block));
}

template <class T, class Layout>
void launch_mma(const QuantizedLinear& a, cudaStream_t stream) {
  const int64_t tiles = (a.rows + kTile - 1) / kTile;
  const bool whole = aligned_rows<Layout>(a) && aligned_tokens(a) && a.in % Layout::kInputs == 0;
  auto kernel = whole ? a.rows > 8 ? mma_kernel<T, Layout, 2, true> : mma_kernel<T, Layout, 1, true>
                : a.rows > 8 ? mma_kernel<T, Layout, 2, false> : mma_kernel<T, Layout, 1, false>;
  FASTFT_LAUNCH(kernel, dim3(blocks(tiles, a.out, kOutputs)), dim3(kThreads), 0, stream, a,
                int(tiles));
}

template <class Layout, int kRows>
void launch_rows(const QuantizedLinear& a, cudaStream_t stream) {
  const int64_t tiles = (a.rows + kRows - 1) / kRows;
  auto kernel = fma_kernel<Layout, kRows>;
  FASTFT_LAUNCH(kernel, dim3(blocks(tiles, a.out, kWarps)), dim3(kThreads), 0, stream, a,
                int(tiles));
}

template <class Layout>
void launch_fma(const QuantizedLinear& a, cudaStream_t stream) {
  if (a.rows == 1) return launch_rows<Layout, 1>(a, stream);
  if (a.rows <= 4) return launch_rows<Layout, 4>(a, stream);
  return launch_rows<Layout, kTile>(a, stream);
}

void launch_floats(const QuantizedLinear& a, cudaStream_t stream) {
  switch (a.layout) {
    case WeightLayout::float32: return launch_fma<Plain<float>>(a, stream);
    case WeightLayout::bfloat16: return launch_fma<Plain<bfloat16>>(a, stream);
    case WeightLayout::float16: return launch_fma<Plain<float16>>(a, stream);
    case WeightLayout::int8: return launch_fma<Int8<false>>(a, stream);
    case WeightLayout::int8_grouped: return launch_fma<Int8<true>>(a, stream);
    case WeightLayout::int4: return launch_fma<Int4>(a, stream);
  }
}

template <class T>
void launch_halves(const QuantizedLinear& a, cudaStream_t stream) {
  switch (a.layout) {
    case WeightLayout::int8: return launch_mma<T, Int8<false>>(a, stream);
    case WeightLayout::int8_grouped: return launch_mma<T, Int8<true>>(a, stream);
    case WeightLayout::int4: return launch_mma<T, Int4>(a, stream);
    default: return launch_mma<T, Plain<T>>(a, stream);
  }
}

}  // namespace
}  // namespace fastft::cuda

using namespace fastft;
using namespace fastft::cuda;

Failure fastft_quantized_linear(const QuantizedLinear* argument, Stream stream) {
  const QuantizedLinear& a = *argument;
  auto s = static_cast<cudaStream_t>(stream);
  with_type(a.x.dtype, [&](auto type) {
    using X = decltype(type);
    if (a.rank)
      with_type(a.a.dtype, [&](auto other) {
        auto kernel = low_kernel<X, decltype(other)>;
        FASTFT_LAUNCH(kernel, dim3(unsigned(a.rows * a.rank)), dim3(kThreads), 0, s, a);
      });
    if constexpr (sizeof(X) == 4)
      launch_floats(a, s);
    else
      launch_halves<X>(a, s);
  });
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
