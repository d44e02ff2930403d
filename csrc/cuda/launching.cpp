#include "launching.h"

#include <dlfcn.h>

namespace fastft::cuda {

// PyTorch's stable interface for it lies in libtorch_cuda, which a torch without CUDA does not have:
// linking to it would keep this extension from loading there. The library is never loaded from
// here, only found: a tensor on a CUDA device means that it is loaded.
Stream stream_of(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? Get(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "CUDA: libtorch_cuda.so is not loaded, or does not give its streams");
  Stream stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "CUDA: no current stream");
  return stream;
}

}  // namespace fastft::cuda
