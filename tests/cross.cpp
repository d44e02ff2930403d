// Kernels against plain loops, on a processor other than the one that compiled them: exit status 0
// where they agree. Built by tests/cross.py, without torch.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../csrc/cpu/gated_mlp.h"
#include "../csrc/cpu/norm.h"

namespace {

// Numbers in [-2, 2), the same everywhere.
float number(int64_t i) { return float((i * 7919 + 13) % 1024) / 256.0f - 2.0f; }

double norm_error(int64_t rows, int64_t hidden, bool center) {
  std::vector<float> x(rows * hidden), weight(hidden), y(rows * hidden), mean(rows), rstd(rows);
  for (size_t i = 0; i < x.size(); i++) x[i] = number(i);
  for (int64_t j = 0; j < hidden; j++) weight[j] = number(j + 5);
  fastft::NormForward norm{};
  norm.dtype = fastft::DType::float32;
  norm.rows = rows, norm.hidden = norm.x_stride = hidden;
  norm.x = x.data(), norm.weight = weight.data(), norm.y = y.data();
  norm.eps = 1e-6f, norm.center = center;
  norm.mean = center ? mean.data() : nullptr, norm.rstd = rstd.data();
  fastft::baseline::norm_forward(norm);
  double worst = 0;
  for (int64_t i = 0; i < rows; i++) {
    double middle = 0, square = 0;
    if (center)
      for (int64_t j = 0; j < hidden; j++) middle += x[i * hidden + j] / double(hidden);
    for (int64_t j = 0; j < hidden; j++)
      square += std::pow(x[i * hidden + j] - middle, 2) / double(hidden);
    for (int64_t j = 0; j < hidden; j++) {
      double wanted = (x[i * hidden + j] - middle) / std::sqrt(square + 1e-6) * weight[j];
      worst = std::fmax(worst, std::fabs(wanted - y[i * hidden + j]));
    }
  }
  return worst;
}

double silu_error(int64_t rows, int64_t columns) {
  std::vector<float> gate(rows * columns), up(rows * columns), h(rows * columns);
  for (size_t i = 0; i < gate.size(); i++) gate[i] = 3 * number(i), up[i] = number(3 * i + 1);
  fastft::GatedForward mlp{};
  mlp.dtype = fastft::DType::float32, mlp.activation = fastft::Activation::silu;
  mlp.rows = rows, mlp.columns = mlp.gate_stride = mlp.up_stride = columns;
  mlp.gate = gate.data(), mlp.up = up.data(), mlp.h = h.data();
  fastft::baseline::gated_forward(mlp);
  double worst = 0;
  for (size_t i = 0; i < h.size(); i++) {
    double wanted = gate[i] / (1 + std::exp(-double(gate[i]))) * up[i];
    worst = std::fmax(worst, std::fabs(wanted - h[i]));
  }
  return worst;
}

}  // namespace

int main() {
  double worst = std::fmax(norm_error(5, 67, false), norm_error(70, 576, true));
  worst = std::fmax(worst, std::fmax(silu_error(3, 37), silu_error(40, 1536)));
  std::printf("largest error %.2g\n", worst);
  return worst < 2e-5 ? 0 : 1;
}
