// Cross entropy: one read of the logits forward, one read and one write backward, in float32.
#include "cross_entropy.h"

#include <algorithm>
#include <limits>

#include "vec.h"

namespace fastft::FASTFT_ISA {
namespace {

// A block stays in the first-level cache between its maximum and its exponentials.
constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Stats {
  float maximum, sum;
};

// What the loss sees: z = c tanh(s u / c).
inline Vec seen(const CrossEntropy& a, Vec u) {
  if (a.logit_scale != 1.f) u *= a.logit_scale;
  return a.softcap != 0.f ? a.softcap * tanh(u / a.softcap) : u;
}
// dz/du, from z.
inline Vec slope(const CrossEntropy& a, Vec z) {
  if (a.softcap == 0.f) return broadcast(a.logit_scale);
  Vec t = z / a.softcap;
  return a.logit_scale * (1.f - t * t);
}
inline float finite_or_zero(float x) { return x == -kInfinity ? 0.f : x; }

template <class T>
Stats forward_row(const CrossEntropy& a, int64_t row, int64_t label) {
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
  float scratch[kBlock];
  float maximum = -kInfinity, pivot = 0.f;
  // `deviation` is the weighted sum of z - pivot: far from zero, a sum of z would lose its digits.
  double total = 0, deviation = 0;
  for (int64_t start = 0; start < a.vocab; start += kBlock) {
    int64_t size = std::min(kBlock, a.vocab - start);
    Vec most = broadcast(-kInfinity);
    for_each_vec(size, [&](int64_t i, auto n) {
      Vec z = seen(a, load(logits + start + i, n, -kInfinity));
      store(scratch + i, z, n);
      most = max(load(scratch + i, n, -kInfinity), most);
    });
    float block = max(most);
    if (start == 0) pivot = finite_or_zero(block);
    if (block > maximum) {
      // Before the first finite block the sum is 0, and stays it: 0 e^(inf) would be NaN.
      if (total != 0) total *= std::exp(double(maximum) - double(block));
      maximum = block;
    }
    // Rows that begin with -inf everywhere have no finite maximum to subtract yet.
    float shift = finite_or_zero(maximum);
    Vec sums{}, deviations{};
    for_each_vec(size, [&](int64_t i, auto n) {
      sums += exp(load(scratch + i, n, -kInfinity) - shift);
    });
    total += double(sum(sums));
    if (a.label_smoothing != 0.f) {
      for_each_vec(size, [&](int64_t i, auto n) {
        Vec d = load(scratch + i, n, pivot) - pivot;
        deviations += a.weight ? d * load(a.weight + start + i, n) : d;
      });
      deviation += double(sum(deviations));
    }
  }
  Stats stats{maximum, float(total)};
  double z = seen(a, broadcast(to_float(logits[label])))[0], logarithm = std::log(total);
  double weight = a.weight ? a.weight[label] : 1.f, smoothing = a.label_smoothing;
  double loss = (1 - smoothing) * weight * (double(maximum) - z + logarithm);
  if (smoothing != 0) {
    double spread = a.weight_sum * (double(maximum) - pivot + logarithm) - deviation;
    loss += smoothing / a.vocab * spread;
  }
  a.losses[row] = float(loss);
  return stats;
}

template <class T>
void backward_row(const CrossEntropy& a, int64_t row, int64_t label, Stats stats) {
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
  T* out = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
  float upstream = a.dlosses ? a.dlosses[row] : 1.f;
  float spread = a.label_smoothing / a.vocab;
  float target = (1.f - a.label_smoothing) * (a.weight ? a.weight[label] : 1.f);
  float mass = (target + float(spread * a.weight_sum)) / stats.sum;
  auto gradient = [&](Vec z, Vec weight) {
    Vec g = mass * exp(z - stats.maximum);
    if (spread != 0.f) g -= spread * weight;
    return g;
  };
  // The label's own logit is read before the row is written, which may be the same memory.
  Vec z = seen(a, broadcast(to_float(logits[label])));
  Vec at_label = gradient(z, broadcast(a.weight ? a.weight[label] : 1.f)) - target;
  at_label *= upstream * slope(a, z);
  for_each_vec(a.vocab, [&](int64_t i, auto n) {
    Vec z = seen(a, load(logits + i, n));
    Vec g = gradient(z, a.weight ? load(a.weight + i, n) : broadcast(1.f));
    store(out + i, g * (upstream * slope(a, z)), n);
  });
  from_float(at_label[0], out + label);
}

template <class T>
void no_gradient(const CrossEntropy& a, int64_t row) {
  T* out = static_cast<T*>(a.dlogits) + row * a.dlogits_stride;
  for (int64_t i = 0; i < a.vocab; ++i) out[i] = T{};
}

// Calls labelled<T>(row, label) or ignored<T>(row) for every row.
template <class Labelled, class Ignored>
void for_rows(const CrossEntropy& a, Labelled&& labelled, Ignored&& ignored) {
  by_dtype(a.dtype, [&](auto element) {
#pragma omp parallel for if (a.rows * a.vocab >= kGrain)
    for (int64_t row = 0; row < a.rows; ++row) {
      if (a.labels[row] == a.ignore_index)
        ignored(element, row);
      else
        labelled(element, row, a.labels[row]);
    }
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropy& a) {
  for_rows(
      a,
      [&](auto element, int64_t row, int64_t label) {
        Stats stats = forward_row<decltype(element)>(a, row, label);
        a.stats[2 * row] = stats.maximum, a.stats[2 * row + 1] = stats.sum;
      },
      [&](auto, int64_t row) {
        a.losses[row] = 0.f, a.stats[2 * row] = 0.f, a.stats[2 * row + 1] = 1.f;
      });
}

void cross_entropy_backward(const CrossEntropy& a) {
  for_rows(
      a,
      [&](auto element, int64_t row, int64_t label) {
        backward_row<decltype(element)>(a, row, label, {a.stats[2 * row], a.stats[2 * row + 1]});
      },
      [&](auto element, int64_t row) { no_gradient<decltype(element)>(a, row); });
}

void cross_entropy_both(const CrossEntropy& a) {
  for_rows(
      a,
      [&](auto element, int64_t row, int64_t label) {
        using T = decltype(element);
        backward_row<T>(a, row, label, forward_row<T>(a, row, label));
      },
      [&](auto element, int64_t row) {
        a.losses[row] = 0.f;
        no_gradient<decltype(element)>(a, row);
      });
}

}  // namespace fastft::FASTFT_ISA
