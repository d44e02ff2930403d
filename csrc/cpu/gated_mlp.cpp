// act(gate) * up and its gradients: one pass, each activation and its derivative from one exp.
#include "gated_mlp.h"

#include <algorithm>

#include "vec.h"

namespace fastft::FASTFT_ISA {
namespace {

struct Value {
  Vec act, slope;  // act(x) and act'(x)
};

struct Silu {
  static Vec act(Vec x) { return x * sigmoid(x); }
  static Value both(Vec x) {
    Vec s = sigmoid(x);
    return {x * s, s * fma(x, 1.f - s, broadcast(1.f))};
  }
};

struct Gelu {
  static Vec act(Vec x) { return x * normal(x).cdf; }
  static Value both(Vec x) {
    Normal n = normal(x);
    return {x * n.cdf, fma(x, n.density, n.cdf)};
  }
};

// (1 + tanh u) / 2 = sigmoid(2u), which keeps its digits where tanh u + 1 cancels.
struct GeluTanh {
  static constexpr float kScale = 1.59576912160573072f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
  static Vec gate(Vec x) { return sigmoid(x * fma(kScale * kCubic * x, x, broadcast(kScale))); }
  static Vec act(Vec x) { return x * gate(x); }
  static Value both(Vec x) {
    Vec s = gate(x), inner = fma(3.f * kScale * kCubic * x, x, broadcast(kScale));
    return {x * s, fma(x * s * (1.f - s), inner, s)};
  }
};

template <class Body>
void by_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::silu: body(Silu{}); break;
    case Activation::gelu: body(Gelu{}); break;
    case Activation::gelu_tanh: body(GeluTanh{}); break;
  }
}

// Pieces of rows, so that one long row is shared between the threads as well.
constexpr int64_t kPiece = 4096;
// An element costs little here: two grains, which is also where PyTorch's own go parallel.
constexpr int64_t kParallel = 2 * kGrain;

template <class Body>
void for_each_piece(int64_t rows, int64_t columns, Body&& body) {
  const int64_t pieces = (columns + kPiece - 1) / kPiece;
#pragma omp parallel for if (rows * columns >= kParallel)
  for (int64_t piece = 0; piece < rows * pieces; ++piece) {
    int64_t first = piece % pieces * kPiece;
    body(piece / pieces, first, std::min(kPiece, columns - first));
  }
}

// Columns [first, first + size) of a row.
template <class T, class Act>
void forward_piece(const GatedForward& a, Act activation, int64_t row, int64_t first, int64_t size) {
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
  T* h = static_cast<T*>(a.h) + row * a.columns + first;
  if (!a.up) {
    for_each_vec(size, [&](int64_t i, auto n) {
      store(h + i, activation.act(load(gate + i, n)), n);
    });
    return;
  }
  const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
  for_each_vec(size, [&](int64_t i, auto n) {
    store(h + i, activation.act(load(gate + i, n)) * load(up + i, n), n);
  });
}

}  // namespace

void gated_forward(const GatedForward& a) {
  by_dtype(a.dtype, [&](auto element) {
    by_activation(a.activation, [&](auto activation) {
      for_each_piece(a.rows, a.columns, [&](int64_t row, int64_t first, int64_t size) {
        forward_piece<decltype(element)>(a, activation, row, first, size);
      });
    });
  });
}

void gated_forward_row(const GatedForward& a, int64_t row) {
  by_dtype(a.dtype, [&](auto element) {
    by_activation(a.activation, [&](auto activation) {
      forward_piece<decltype(element)>(a, activation, row, 0, a.columns);
    });
  });
}

void gated_backward(const GatedBackward& a) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    by_activation(a.activation, [&](auto activation) {
      for_each_piece(a.rows, a.columns, [&](int64_t row, int64_t first, int64_t size) {
        const T* dh = static_cast<const T*>(a.dh) + row * a.dh_stride + first;
        const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
        const T* up = static_cast<const T*>(a.up) + row * a.up_stride + first;
        const int64_t out = row * a.columns + first;
        T* h = a.h ? static_cast<T*>(a.h) + out : nullptr;
        T* dgate = static_cast<T*>(a.dgate) + out;
        T* dup = static_cast<T*>(a.dup) + out;
        for_each_vec(size, [&](int64_t i, auto n) {
          Vec grad = load(dh + i, n), factor = load(up + i, n);
          Value value = activation.both(load(gate + i, n));
          if (h) store(h + i, value.act * factor, n);
          store(dgate + i, grad * factor * value.slope, n);
          store(dup + i, grad * value.act, n);
        });
      });
    });
  });
}

}  // namespace fastft::FASTFT_ISA
