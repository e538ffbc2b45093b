// The CUDA backend, compiled for the CPU as a library of operators of its own that take tensors on the CPU.
#define aoti_torch_create_device_guard cuda_on_cpu_create_device_guard
#define aoti_torch_delete_device_guard cuda_on_cpu_delete_device_guard
#define aoti_torch_get_current_cuda_stream cuda_on_cpu_get_current_stream

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {
AOTITorchError cuda_on_cpu_create_device_guard(int32_t, DeviceGuardHandle*) { return 0; }
AOTITorchError cuda_on_cpu_delete_device_guard(DeviceGuardHandle) { return 0; }
AOTITorchError cuda_on_cpu_get_current_stream(int32_t, void**) { return 0; }
}

#include "../../torch-ext/torch_binding.cpp"

#define CUDA CPU  // the dispatch key that the operators are registered for
#include "../../csrc/cuda/deformable_attention.cu"
