// The operators on the CPU: tensors in, tensors out. Chooses the code for this processor, decides what is copied, and
// shares the work among PyTorch's threads in parts that never write to one place: the result is the same, bit for bit,
// however many there are.
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "../problem.h"
#include "arguments.h"

namespace hf_dino {
namespace {

// Rows of a query and head that one thread takes at least; starting a thread costs as much as some dozens.
constexpr int64_t kGrain = 64;
// Reads per cell from which a copy of one head at a time pays for itself.
constexpr int64_t kReadsWorthACopy = 16;

const Processor& best_processor() {
#if defined(__x86_64__)
  if (kAvx512 != nullptr && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return *kAvx512;
  }
  if (kAvx2 != nullptr && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *kAvx2;
#endif
  return *kPortable;
}

// The best code that this processor runs. HF_DINO_CPU=avx2 or portable takes a lesser one, to test and compare it.
const Processor& processor() {
  const char* const wish = std::getenv("HF_DINO_CPU");
  const Processor& best = best_processor();
  if (wish == nullptr || *wish == '\0') return best;
  for (const Processor* candidate : {kAvx512, kAvx2, kPortable}) {
    if (candidate != nullptr && candidate->vector_bytes <= best.vector_bytes &&
        std::strcmp(wish, candidate == kAvx512 ? "avx512" : candidate == kAvx2 ? "avx2" : "portable") == 0) {
      return *candidate;
    }
  }
  STD_TORCH_CHECK(
      false, "HF_DINO_CPU is '", wish, "', but must be avx512, avx2 or portable, and no more than this processor has: ",
      best.name);
}

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return Type::kFloat;
  }
}

Sizes sizes_of(const Problem& problem) {
  return {problem.batch_size,  problem.num_heads,  problem.head_dim,
          problem.num_queries, problem.num_points, problem.levels};
}

bool is_empty(const Problem& problem) {
  return problem.batch_size * problem.num_queries * problem.num_heads == 0;
}

int64_t lanes(const Processor& processor, const Tensor& value) {
  return processor.vector_bytes / (value.scalar_type() == ScalarType::Double ? 8 : 4);
}

// Whether to work on copies that hold one head's rows next to each other. Rows that are no whole vectors are padded.
bool should_copy(const Problem& problem, const Processor& processor, const Tensor& value) {
  const int64_t reads = problem.num_queries * problem.points_per_head() * 4;
  return problem.head_dim % lanes(processor, value) != 0 || reads > kReadsWorthACopy * problem.sequence_length;
}

// Both forms of the forward pass; only the fused one has references and `softmax_weights`.
void run_forward(
    const Problem& problem, const Tensor& value, const Points& points, const Tensor& output, void* softmax_weights) {
  const Processor& code = processor();
  const ForwardArguments arguments{
      sizes_of(problem),
      type_of(value),
      value.data_ptr(),
      should_copy(problem, code, value),
      points,
      output.data_ptr(),
      softmax_weights};
  torch::stable::parallel_for(
      0, problem.batch_size * problem.num_heads * problem.num_queries, kGrain,
      [&](int64_t begin, int64_t end) { code.forward(arguments, begin, end); });
}

Tensor new_output(const Problem& problem, const Tensor& value) {
  return torch::stable::new_empty(
      value, {problem.batch_size, problem.num_queries, problem.num_heads * problem.head_dim});
}

Tensor deformable_attention(
    const Tensor& value_, std::vector<int64_t> spatial_shapes, const Tensor& locations_, const Tensor& weights_) {
  const Problem problem = read_problem(value_, spatial_shapes, locations_, weights_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_);
  const Tensor weights = torch::stable::contiguous(weights_);
  const Tensor output = new_output(problem, value);
  if (is_empty(problem)) return output;
  const Points points{locations.data_ptr(), weights.data_ptr(), type_of(locations), nullptr, 0};
  run_forward(problem, value, points, output, nullptr);
  return output;
}

std::tuple<Tensor, Tensor> fused_deformable_attention(
    const Tensor& value_, std::vector<int64_t> spatial_shapes, const Tensor& references_, const Tensor& offsets_,
    const Tensor& logits_) {
  const Problem problem = read_problem(value_, spatial_shapes, offsets_, logits_);
  check_reference_points(problem, value_, references_);
  const Tensor value = torch::stable::contiguous(value_), references = torch::stable::contiguous(references_);
  const Tensor offsets = torch::stable::contiguous(offsets_), logits = torch::stable::contiguous(logits_);
  const Tensor output = new_output(problem, value), weights = torch::stable::empty_like(logits);
  if (is_empty(problem)) return {output, weights};
  const Points points{
      offsets.data_ptr(), logits.data_ptr(), type_of(offsets), references.data_ptr(), references.size(3)};
  run_forward(problem, value, points, output, weights.data_ptr());
  return {output, weights};
}

Tensor zeros_like(const Tensor& tensor) {
  Tensor zeros = torch::stable::empty_like(tensor);
  return torch::stable::zero_(zeros);
}

struct Gradients {
  Tensor value, points, weights;  // of the attention weights, in the type computed with
  std::optional<Tensor> references;
};

Gradients run_backward(
    const Problem& problem, const Tensor& grad_output, const Tensor& value, const Tensor& points_tensor,
    const Points& points, BackwardArguments& arguments) {
  const Processor& code = processor();
  const ScalarType compute = compute_type(value.scalar_type());
  const bool in_place = compute == value.scalar_type() && !should_copy(problem, code, value);
  Gradients gradients{
      in_place ? torch::stable::new_zeros(value, {value.size(0), value.size(1), value.size(2), value.size(3)})
               : torch::stable::empty_like(value),
      torch::stable::empty_like(points_tensor),
      torch::stable::new_empty(
          value, {problem.batch_size, problem.num_queries, problem.num_heads, problem.levels.count, problem.num_points},
          compute),
      std::nullopt};
  if (points.references != nullptr) {
    gradients.references = torch::stable::new_empty(
        value,
        {problem.num_heads, problem.batch_size, problem.num_queries, problem.levels.count, points.reference_width},
        compute);
  }
  arguments = {
      sizes_of(problem),
      type_of(value),
      value.data_ptr(),
      grad_output.data_ptr(),
      points,
      gradients.value.data_ptr(),
      in_place,
      gradients.points.data_ptr(),
      gradients.weights.data_ptr(),
      gradients.references ? gradients.references->data_ptr() : nullptr};
  // A head of a picture is a task, and where there are too few of them for the threads, a level of it. How it is
  // divided changes nothing in the result.
  const int64_t heads = problem.batch_size * problem.num_heads;
  const bool enough = heads >= static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t level_groups = enough ? 1 : problem.levels.count;
  torch::stable::parallel_for(0, heads * level_groups, 1, [&](int64_t begin, int64_t end) {
    code.backward(arguments, level_groups, begin, end);
  });
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(
    const Tensor& grad_output_, const Tensor& value_, std::vector<int64_t> spatial_shapes, const Tensor& locations_,
    const Tensor& weights_, bool /*deterministic: it always is*/) {
  const Problem problem = read_problem(value_, spatial_shapes, locations_, weights_);
  check_grad_output(problem, value_, grad_output_);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  const Tensor value = torch::stable::contiguous(value_), locations = torch::stable::contiguous(locations_);
  const Tensor weights = torch::stable::contiguous(weights_);
  if (is_empty(problem)) return {zeros_like(value), zeros_like(locations), zeros_like(weights)};
  const Points points{locations.data_ptr(), weights.data_ptr(), type_of(locations), nullptr, 0};
  BackwardArguments arguments;
  Gradients gradients = run_backward(problem, grad_output, value, locations, points, arguments);
  return {gradients.value, gradients.points, torch::stable::to(gradients.weights, weights.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    const Tensor& grad_output_, std::optional<Tensor> grad_weights, const Tensor& value_,
    std::vector<int64_t> spatial_shapes, const Tensor& references_, const Tensor& offsets_, const Tensor& weights_,
    bool /*deterministic: it always is*/) {
  const Problem problem = read_problem(value_, spatial_shapes, offsets_, weights_);
  check_reference_points(problem, value_, references_);
  check_grad_output(problem, value_, grad_output_);
  const Tensor grad_output = torch::stable::contiguous(grad_output_);
  if (grad_weights) {
    check_grad_weights(weights_, *grad_weights);
    grad_weights = torch::stable::contiguous(*grad_weights);
  }
  const Tensor value = torch::stable::contiguous(value_), references = torch::stable::contiguous(references_);
  const Tensor offsets = torch::stable::contiguous(offsets_), weights = torch::stable::contiguous(weights_);
  if (is_empty(problem)) return {zeros_like(value), zeros_like(references), zeros_like(offsets), zeros_like(weights)};
  const Points points{
      offsets.data_ptr(), weights.data_ptr(), type_of(offsets), references.data_ptr(), references.size(3)};
  BackwardArguments arguments;
  Gradients gradients = run_backward(problem, grad_output, value, offsets, points, arguments);

  const Tensor grad_logits = torch::stable::empty_like(weights);
  const void* more = grad_weights ? grad_weights->data_ptr() : nullptr;
  const Processor& code = processor();
  torch::stable::parallel_for(
      0, problem.batch_size * problem.num_queries * problem.num_heads, kGrain, [&](int64_t begin, int64_t end) {
        code.softmax_backward(arguments, more, grad_logits.data_ptr(), begin, end);
      });
  const std::vector<int64_t> heads{0};
  return {gradients.value, torch::stable::sum(*gradients.references, heads), gradients.points, grad_logits};
}

// Bytes of the vectors that the operators run with.
int64_t cpu_vector_bytes() { return processor().vector_bytes; }

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
