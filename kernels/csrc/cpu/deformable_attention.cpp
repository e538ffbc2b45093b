// The operators on the CPU: tensors in, tensors out. Chooses the kernels for this CPU, decides whether heads are
// copied, and shares the work among PyTorch's threads in parts that never write to one place: the result is the same,
// bit for bit, for any number of threads.
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "kernel_args.h"

namespace hf_dino {
namespace {

// A row is one (image, query, head). Starting a thread costs as much as some dozens of them.
constexpr int64_t kMinRowsPerThread = 64;
// A copy of one head at a time pays for itself from so many reads per cell on.
constexpr int64_t kMinReadsPerCell = 16;

const CpuKernels& best_cpu_kernels() {
#if defined(__x86_64__)
  if (kAvx512 != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return *kAvx512;
  }
  if (kAvx2 != nullptr && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *kAvx2;
#endif
  return *kDefault;
}

// The best kernels for this CPU, or those that HF_DINO_CPU_CAPABILITY names, as ATEN_CPU_CAPABILITY does for PyTorch's.
const CpuKernels& cpu_kernels() {
  const char* const requested = std::getenv("HF_DINO_CPU_CAPABILITY");
  const CpuKernels& best = best_cpu_kernels();
  if (requested == nullptr || *requested == '\0') return best;
  for (const CpuKernels* kernels : {kAvx512, kAvx2, kDefault}) {
    const bool is_supported = kernels != nullptr && kernels->vec_bytes <= best.vec_bytes;
    if (is_supported && std::strcmp(requested, kernels->capability) == 0) return *kernels;
  }
  STD_TORCH_CHECK(
      false, "HF_DINO_CPU_CAPABILITY must be avx512, avx2 or default, and this CPU has at most ", best.capability,
      ", but got '", requested, "'");
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat;
  }
}

// Whether to work on copies that hold one head's rows next to each other. They also pad rows to whole vectors.
bool should_copy_heads(const AttentionShapes& shapes, const CpuKernels& kernels, const Tensor& value) {
  const int64_t lanes = kernels.vec_bytes / (value.scalar_type() == ScalarType::Double ? 8 : 4);
  const int64_t reads = shapes.num_queries * shapes.points_per_head() * 4;
  return shapes.head_dim % lanes != 0 || reads > kMinReadsPerCell * shapes.sequence_length;
}

// Both forms of the forward pass; only the fused one has references and `softmax_weights`.
void run_forward(
    const AttentionShapes& shapes, const Tensor& value, const PointArgs& points, const Tensor& output,
    void* softmax_weights) {
  const CpuKernels& kernels = cpu_kernels();
  const ForwardArgs args{
      shapes,
      dtype_of(value),
      value.data_ptr(),
      should_copy_heads(shapes, kernels, value),
      points,
      output.data_ptr(),
      softmax_weights};
  torch::stable::parallel_for(0, shapes.num_rows(), kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    kernels.forward(args, begin, end);
  });
}

Tensor new_output(const AttentionShapes& shapes, const Tensor& value) {
  return torch::stable::new_empty(
      value, {shapes.batch_size, shapes.num_queries, shapes.num_heads * shapes.head_dim});
}

Tensor deformable_attention(
    const Tensor& value_, std::vector<int64_t> spatial_shapes, const Tensor& locations_, const Tensor& weights_) {
  const AttentionShapes shapes = check_inputs(value_, spatial_shapes, locations_, weights_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_);
  const Tensor weights = torch::stable::contiguous(weights_);
  const Tensor output = new_output(shapes, value);
  if (shapes.num_rows() == 0) return output;
  const PointArgs points{locations.data_ptr(), weights.data_ptr(), dtype_of(locations), nullptr, 0};
  run_forward(shapes, value, points, output, nullptr);
  return output;
}

std::tuple<Tensor, Tensor> fused_deformable_attention(
    const Tensor& value_, std::vector<int64_t> spatial_shapes, const Tensor& references_, const Tensor& offsets_,
    const Tensor& logits_) {
  const AttentionShapes shapes = check_inputs(value_, spatial_shapes, offsets_, logits_);
  check_reference_points(shapes, value_, references_);
  const Tensor value = torch::stable::contiguous(value_), references = torch::stable::contiguous(references_);
  const Tensor offsets = torch::stable::contiguous(offsets_), logits = torch::stable::contiguous(logits_);
  const Tensor output = new_output(shapes, value), weights = torch::stable::empty_like(logits);
  if (shapes.num_rows() == 0) return {output, weights};
  const PointArgs points{
      offsets.data_ptr(), logits.data_ptr(), dtype_of(offsets), references.data_ptr(), references.size(3)};
  run_forward(shapes, value, points, output, weights.data_ptr());
  return {output, weights};
}

Tensor zeros_like(const Tensor& tensor) {
  Tensor zeros = torch::stable::empty_like(tensor);
  return torch::stable::zero_(zeros);
}

struct Gradients {
  Tensor value, coords;
  Tensor weights;                    // of the attention weights, in the dtype computed with
  std::optional<Tensor> references;  // (heads, batch, queries, levels, reference_dim), to be summed over the heads
};

// Both forms of the backward pass; only the fused one has references. Fills `args`, which softmax_backward takes.
Gradients run_backward(
    const AttentionShapes& shapes, const Tensor& grad_output, const Tensor& value, const Tensor& coords,
    const PointArgs& points, BackwardArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  const ScalarType compute = compute_dtype(value.scalar_type());
  const bool in_place = compute == value.scalar_type() && !should_copy_heads(shapes, kernels, value);
  Gradients gradients{
      in_place ? torch::stable::new_zeros(value, {value.size(0), value.size(1), value.size(2), value.size(3)})
               : torch::stable::empty_like(value),
      torch::stable::empty_like(coords),
      torch::stable::new_empty(
          value, {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count, shapes.num_points},
          compute),
      std::nullopt};
  if (points.references != nullptr) {
    gradients.references = torch::stable::new_empty(
        value,
        {shapes.num_heads, shapes.batch_size, shapes.num_queries, shapes.levels.count, points.reference_dim},
        compute);
  }
  args = {
      shapes,
      dtype_of(value),
      value.data_ptr(),
      grad_output.data_ptr(),
      points,
      gradients.value.data_ptr(),
      in_place,
      gradients.coords.data_ptr(),
      gradients.weights.data_ptr(),
      gradients.references ? gradients.references->data_ptr() : nullptr};
  // A task is a head of an image or, where that makes fewer tasks than threads, a level of it. Either way the same
  // numbers are added in the same order.
  const int64_t heads = shapes.batch_size * shapes.num_heads;
  const bool enough = heads >= static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t level_groups = enough ? 1 : shapes.levels.count;
  torch::stable::parallel_for(0, heads * level_groups, 1, [&](int64_t begin, int64_t end) {
    kernels.backward(args, level_groups, begin, end);
  });
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(
    const Tensor& grad_output_, const Tensor& value_, std::vector<int64_t> spatial_shapes, const Tensor& locations_,
    const Tensor& weights_, bool /*deterministic: it always is*/) {
  const AttentionShapes shapes = check_inputs(value_, spatial_shapes, locations_, weights_);
  check_grad_output(shapes, value_, grad_output_);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_);
  const Tensor weights = torch::stable::contiguous(weights_);
  if (shapes.num_rows() == 0) return {zeros_like(value), zeros_like(locations), zeros_like(weights)};
  const PointArgs points{locations.data_ptr(), weights.data_ptr(), dtype_of(locations), nullptr, 0};
  BackwardArgs args;
  Gradients gradients = run_backward(shapes, grad_output, value, locations, points, args);
  return {gradients.value, gradients.coords, torch::stable::to(gradients.weights, weights.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    const Tensor& grad_output_, std::optional<Tensor> grad_weights, const Tensor& value_,
    std::vector<int64_t> spatial_shapes, const Tensor& references_, const Tensor& offsets_, const Tensor& weights_,
    bool /*deterministic: it always is*/) {
  const AttentionShapes shapes = check_inputs(value_, spatial_shapes, offsets_, weights_);
  check_reference_points(shapes, value_, references_);
  check_grad_output(shapes, value_, grad_output_);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  if (grad_weights) {
    check_grad_weights(weights_, *grad_weights);
    grad_weights = torch::stable::contiguous(*grad_weights);
  }
  const Tensor value = torch::stable::contiguous(value_), references = torch::stable::contiguous(references_);
  const Tensor offsets = torch::stable::contiguous(offsets_), weights = torch::stable::contiguous(weights_);
  if (shapes.num_rows() == 0) {
    return {zeros_like(value), zeros_like(references), zeros_like(offsets), zeros_like(weights)};
  }
  const PointArgs points{
      offsets.data_ptr(), weights.data_ptr(), dtype_of(offsets), references.data_ptr(), references.size(3)};
  BackwardArgs args;
  Gradients gradients = run_backward(shapes, grad_output, value, offsets, points, args);

  const Tensor grad_logits = torch::stable::empty_like(weights);
  const void* grad_from_weights = grad_weights ? grad_weights->data_ptr() : nullptr;
  const CpuKernels& kernels = cpu_kernels();
  torch::stable::parallel_for(0, shapes.num_rows(), kMinRowsPerThread, [&](int64_t begin, int64_t end) {
    kernels.softmax_backward(args, grad_from_weights, grad_logits.data_ptr(), begin, end);
  });
  const std::vector<int64_t> heads{0};
  return {gradients.value, torch::stable::sum(*gradients.references, heads), gradients.coords, grad_logits};
}

// Bytes of the vectors that the operators run with.
int64_t cpu_vector_bytes() { return cpu_kernels().vec_bytes; }

}  // namespace
}  // namespace hf_dino

STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, library) { library.def("cpu_vector_bytes() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, library) {
  library.impl("cpu_vector_bytes", TORCH_BOX(&hf_dino::cpu_vector_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, library) {
  library.impl("deformable_attention", TORCH_BOX(&hf_dino::deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&hf_dino::deformable_attention_backward));
  library.impl("fused_deformable_attention", TORCH_BOX(&hf_dino::fused_deformable_attention));
  library.impl("fused_deformable_attention_backward", TORCH_BOX(&hf_dino::fused_deformable_attention_backward));
}
