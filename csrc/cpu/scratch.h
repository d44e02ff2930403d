// Working memory of a parallel region, taken before it starts: an exception must not leave one.
#pragma once

#include <omp.h>

#include <new>

#include "isa.h"

namespace fastft::FASTFT_ISA {

// `parts` pieces of `size` floats that nobody clears first.
struct Scratch {
  explicit Scratch(int64_t size, int parts = 1)
      : size((size + 15) / 16 * 16),
        data(static_cast<float*>(
            ::operator new(this->size * parts * 4 + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  // The piece of the calling thread, inside a region of at most `parts` threads.
  float* own() const { return data + omp_get_thread_num() * size; }
  int64_t size;
  float* data;
};

// How many threads share `items` pieces of work; one where it is too little to share.
inline int threads_for(int64_t items, bool worthwhile) {
  int64_t most = worthwhile ? omp_get_max_threads() : 1;
  return int(items < most ? (items < 1 ? 1 : items) : most);
}

}  // namespace fastft::FASTFT_ISA
