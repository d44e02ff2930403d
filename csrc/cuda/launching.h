// What the CUDA bindings share: the device and stream of a tensor, and launchers' failures.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../kernels/cuda/launch.h"
#include "../tensor.h"

namespace fastft::cuda {

// The current stream of a device.
Stream stream_of(int32_t device);

// Calls launcher(argument, stream) on the tensor's device and current stream.
template <class Argument>
void launch(const Tensor& on, Failure (*launcher)(const Argument*, Stream),
            const Argument& argument) {
  torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  Failure failed = launcher(&argument, stream_of(on.get_device_index()));
  STD_TORCH_CHECK(!failed, "CUDA: ", failed ? failed : "");
}


inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": expected a tensor on the same CUDA device as the others");
}

}  // namespace fastft::cuda
