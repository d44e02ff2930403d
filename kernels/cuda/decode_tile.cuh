// What a block of threads of decode_attention.cu works on: slots, lines, and who sees what.
#pragma once

#include "common.cuh"
#include "decode_attention.h"

namespace fastft::cuda {

constexpr int kBlock = int(kDecodeBlock);
constexpr int kLines = 16;  // rows of a matrix product
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kGroup = 16;    // slots that a warp takes at a time: the depth of a matrix product
constexpr int kColumns = 64;  // of the values at a time
// Rows of scores and of sums lie so far apart that a warp's accesses meet different banks.
constexpr int kScores = kBlock + 4, kSums = kColumns + 1;

struct Span {
  int begin, end;
  __device__ bool empty() const { return begin >= end; }
  __device__ bool has(int slot) const { return begin <= slot && slot < end; }
  __device__ bool meets(int from, int to) const { return begin < to && from < end; }
};

__device__ __forceinline__ int length_of(const DecodeAttention& a, int row) {
  const int length = a.lengths[row];
  return length < 0 ? 0 : length > a.capacity ? int(a.capacity) : length;
}

// The slots that a query sees.
__device__ __forceinline__ Span seen(const DecodeAttention& a, int length, int query) {
  int64_t end = length - a.queries + query + 1, begin = end - a.window;
  return {int(begin < 0 ? 0 : begin), int(end < 0 ? 0 : end)};
}

// What a block of threads works on. Slots are counted from its first.
struct Tile {
  int row, kv_head, groups, lines;  // all lines of the key head
  int first, count;                 // the lines of this tile
  int base;                         // its first slot
  int length;                       // read once: no barrier has it read again

  __device__ Tile(const DecodeAttention& a) {
    groups = int(a.heads / a.kv_heads), lines = int(a.queries) * groups;
    int tiles = (lines + kLines - 1) / kLines;
    row = blockIdx.z, kv_head = blockIdx.y / tiles, first = blockIdx.y % tiles * kLines;
    count = lines - first < kLines ? lines - first : kLines;
    base = blockIdx.x * kBlock;
    length = length_of(a, row);
  }
  __device__ int first_query() const { return first / groups; }
  __device__ int last_query() const { return (first + count - 1) / groups; }
  // What the queries from one to another see, any of them, of this block.
  __device__ Span slots(const DecodeAttention& a, int query, int last) const {
    int begin = seen(a, length, query).begin - base, end = seen(a, length, last).end - base;
    return {begin < 0 ? 0 : begin, end > kBlock ? kBlock : end};
  }
};

template <class T>
__device__ __forceinline__ const T* at(const CachedHeads& x, int64_t row, int64_t token,
                                       int64_t head) {
  return static_cast<const T*>(x.data) + row * x.row_stride + token * x.token_stride +
         head * x.head_stride;
}

}  // namespace fastft::cuda
