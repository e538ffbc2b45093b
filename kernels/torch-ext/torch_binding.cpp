// The schema of the four operators. hf_dino/deformable_attention_dino_detr.py has their reference implementation in
// PyTorch; csrc/cpu and csrc/cuda implement them; torch-ext/hf_dino_deformable_attention joins each forward operator
// with its backward operator.
#include <torch/csrc/stable/library.h>

// `spatial_shapes` is the height and width of each level in turn: numbers, not a tensor on the GPU, which would have to
// be waited for.
STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, library) {
  library.def(
      "deformable_attention("
      "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  library.def(
      "deformable_attention_backward("
      "Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
  library.def(
      "fused_deformable_attention("
      "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits) -> (Tensor, Tensor)");
  library.def(
      "fused_deformable_attention_backward("
      "Tensor grad_output, Tensor? grad_weights, Tensor value, SymInt[] spatial_shapes, Tensor reference_points, "
      "Tensor sampling_offsets, Tensor attention_weights, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
}

#if defined(CPU_KERNEL) || defined(CUDA_KERNEL)  // set by kernel-builder, which imports the library as a Python module
#include "registration.h"
REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#endif
