// The operators on CUDA: tensors in, tensors out. All work is queued on the current stream and none is waited for, so
// that the operators can be captured into CUDA graphs.
#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../problem.h"
#include "backward.cuh"
#include "forward.cuh"

namespace hf_dino::cuda {
namespace {

// Makes the device of a tensor the current one for as long as it lives, and launches on that device's current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == 0,
        "the current CUDA stream could not be found");
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream_);
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
    STD_TORCH_CHECK(
        status == cudaSuccess, "deformable attention could not be launched: ", cudaGetErrorString(status),
        ". If there is no kernel image, compile for this GPU's architecture.");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The tensor as kernels read it: of this type, contiguous, and aligned as whole vectors, which a view of a longer
// tensor need not be.
Tensor prepared(const Tensor& tensor, ScalarType type) {
  Tensor result = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  if (!result.is_contiguous()) result = torch::stable::contiguous(result);
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 16 == 0;
  return aligned ? result : torch::stable::clone(result);
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

Tensor in_type_of(const Tensor& original, const Tensor& tensor) {
  return tensor.scalar_type() == original.scalar_type() ? tensor : torch::stable::to(tensor, original.scalar_type());
}

bool has_usual_shape(const Problem& problem) {
  return problem.head_dim == UsualShape::kHeadDim && problem.levels.count == UsualShape::kLevelCount &&
         problem.num_points == UsualShape::kPointCount;
}

// The type in which kernels read points or weights. Only those for the usual shape read 16-bit ones as they are.
ScalarType type_of_points(bool usual, const Tensor& value, const Tensor& points) {
  return usual ? points.scalar_type() : compute_type(value.scalar_type());
}

int64_t divide_up(int64_t number, int64_t divisor) { return (number + divisor - 1) / divisor; }

// `lanes` serve one item.
Call call_of(const Problem& problem, int64_t head_dim, int lanes) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 16;
  const int64_t items_per_picture = problem.num_queries * problem.num_heads;
  const int64_t blocks_per_picture = divide_up(items_per_picture, kThreads / lanes);
  STD_TORCH_CHECK(
      problem.num_heads * head_dim <= kLimit && items_per_picture <= kLimit &&
          problem.points_per_head() <= kLimit && problem.batch_size * blocks_per_picture <= kLimit,
      "too large for one launch: ", problem.batch_size, " pictures, ", problem.num_queries, " queries, ",
      problem.num_heads, " heads of ", problem.head_dim, " channels and ", problem.points_per_head(),
      " points; split the batch or the queries");
  return {
      problem.levels,
      static_cast<int32_t>(problem.sequence_length),
      static_cast<int32_t>(problem.num_queries),
      static_cast<int32_t>(problem.num_heads),
      static_cast<int32_t>(head_dim),
      static_cast<int32_t>(problem.num_heads * head_dim),
      static_cast<int32_t>(problem.num_points),
      static_cast<int32_t>(blocks_per_picture)};
}

// The types and the shape that a kernel is compiled for.
template <typename ValueType, typename PointsType, typename ShapeType>
struct Kind {
  using T = ValueType;
  using P = PointsType;
  using Shape = ShapeType;
};

template <typename T, typename Function>
void with_16_bit_kind(bool usual, ScalarType points, const Function& function) {
  if (!usual) {
    function(Kind<T, float, AnyShape>{});
  } else if (points == ScalarType::Float) {
    function(Kind<T, float, UsualShape>{});
  } else {
    function(Kind<T, T, UsualShape>{});
  }
}

// Calls `function` with the Kind for a value of this type and points and weights of that type. float64 serves to check
// gradients and has no code for the usual shape.
template <typename Function>
void with_kind(bool usual, ScalarType value, ScalarType points, const Function& function) {
  switch (value) {
    case ScalarType::Double:
      return function(Kind<double, double, AnyShape>{});
    case ScalarType::Half:
      return with_16_bit_kind<__half>(usual, points, function);
    case ScalarType::BFloat16:
      return with_16_bit_kind<__nv_bfloat16>(usual, points, function);
    default:
      return usual ? function(Kind<float, float, UsualShape>{}) : function(Kind<float, float, AnyShape>{});
  }
}

// What all operators share: the sizes, the device, and value, points and weights as kernels read them. The backward
// pass that sums in fixed point has code for any shape only, and none for 16-bit values.
struct Setting {
  Problem problem;
  Device device;
  bool usual;
  ScalarType type;   // in which kernels read value
  int64_t head_dim;  // with padding to whole vectors, of which there is at least one
  Tensor value, points, weights;

  Setting(
      const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& points, const Tensor& weights,
      bool deterministic = false)
      : problem(read_problem(value, spatial_shapes, points, weights)),
        device(value),
        usual(!deterministic && has_usual_shape(problem)),
        type(deterministic ? compute_type(value.scalar_type()) : value.scalar_type()),
        head_dim(vector_of(type) * std::max<int64_t>(divide_up(problem.head_dim, vector_of(type)), 1)),
        value(padded(value)),
        points(prepared(points, type_of_points(usual, value, points))),
        weights(prepared(weights, type_of_points(usual, value, points))) {}

  static int64_t vector_of(ScalarType type) {
    return type == ScalarType::Double ? kVector<double> : type == ScalarType::Float ? kVector<float> : kVector<__half>;
  }

  ScalarType points_type() const { return points.scalar_type(); }
  ScalarType compute() const { return compute_type(type); }
  int lanes() const { return type == compute() ? kLanes<float> : kLanes<__half>; }

  bool is_padded() const { return head_dim != problem.head_dim; }

  // The last axis is a head's channels.
  Tensor padded(const Tensor& tensor) const {
    return prepared(
        is_padded() ? torch::stable::pad(tensor, {0, head_dim - problem.head_dim}) : tensor, type);
  }

  Tensor unpadded(Tensor tensor) const {
    if (!is_padded()) return tensor;
    return torch::stable::contiguous(torch::stable::narrow(tensor, -1, 0, problem.head_dim));
  }

  // The last axis is all heads' channels.
  Tensor padded_output(const Tensor& tensor) const {
    if (!is_padded()) return prepared(tensor, type);
    return padded(torch::stable::reshape(
        tensor, {problem.batch_size, problem.num_queries, problem.num_heads, problem.head_dim}));
  }

  Tensor unpadded_output(const Tensor& tensor) const {
    if (!is_padded()) return tensor;
    const Tensor by_head =
        torch::stable::view(tensor, {problem.batch_size, problem.num_queries, problem.num_heads, head_dim});
    return torch::stable::view(
        unpadded(by_head), {problem.batch_size, problem.num_queries, problem.num_heads * problem.head_dim});
  }

  Tensor empty_output() const {
    return empty(value, {problem.batch_size, problem.num_queries, problem.num_heads * head_dim}, type);
  }

  // Gradients of value are summed up in at least 32 bits.
  Tensor zero_grad_value() const {
    return torch::stable::new_zeros(
        value, {problem.batch_size, problem.sequence_length, problem.num_heads, head_dim}, compute());
  }

  Tensor empty_points() const {
    return empty(
        value,
        {problem.batch_size, problem.num_queries, problem.num_heads, problem.levels.count, problem.num_points, 2},
        points_type());
  }

  Tensor empty_weights() const {
    return empty(
        value, {problem.batch_size, problem.num_queries, problem.num_heads, problem.levels.count, problem.num_points},
        points_type());
  }

  // Calls `function` with the Kind of this call and its Call and number of blocks, unless there is nothing to do.
  template <typename Function>
  void run(const Function& function) const {
    if (problem.batch_size * problem.num_queries * problem.num_heads == 0) return;
    with_kind(usual, type, points_type(), [&](auto kind) {
      const Call call = call_of(problem, head_dim, kLanes<typename decltype(kind)::T>);
      function(kind, call, problem.batch_size * call.blocks_per_picture);
    });
  }
};

// Of kernels that walk over their numbers in strides: enough for any GPU.
constexpr int64_t kMostBlocksInStrides = 4096;

// At most this power of two points can read one cell: those of its picture, head and level.
int32_t log_of_terms(const Problem& problem) {
  int32_t log = 0;
  while (problem.num_queries * problem.num_points > int64_t{1} << log) ++log;
  return log;
}

template <typename P>
Offsets<P> offsets_of(const Setting& setting, const Tensor& references) {
  Offsets<P> offsets{};
  offsets.references = read<Compute<P>>(references);
  offsets.reference_size = static_cast<int32_t>(references.size(3));
  offsets.step = Compute<P>(0.5) / setting.problem.num_points;
  offsets.offsets = read<P>(setting.points);
  return offsets;
}

// Neighbouring points whose gradients the lanes of a group can sum up, as a power of two: all of a level, or one.
int32_t log_of_part(const Problem& problem, int lanes) {
  for (int32_t log = 0; 1 << log <= lanes; ++log) {
    if (problem.num_points == 1 << log) return log;
  }
  return 0;
}

// Sums up the gradient of value while `points` and `weights` take those of the points and weights.
template <typename Kind, typename Points, typename Weights>
void launch_backward(
    const Setting& setting, const Call& call, int64_t blocks, const Tensor& grad_output, const Points& points,
    const Weights& weights, bool deterministic, const Tensor& grad_value) {
  using T = typename Kind::T;
  using Shape = typename Kind::Shape;
  using Number = Compute<T>;
  const Device& device = setting.device;
  const T* const grad = read<T>(grad_output);
  const T* const value = read<T>(setting.value);
  Number* const sums = write<Number>(grad_value);
  if (!deterministic) {
    const AtomicSum<Number> sum{sums};
    return device.launch(
        backward_kernel<T, Shape, Points, Weights, AtomicSum<Number>>, blocks, call, grad, value, points, weights,
        sum);
  }
  if constexpr (!Shape::kFixed && std::is_same_v<T, Number>) {
    const int64_t count = grad_value.numel();
    const auto blocks_for = [](int64_t numbers) {
      return std::clamp<int64_t>(numbers / (4 * kThreads), 1, kMostBlocksInStrides);
    };
    const Tensor integers = torch::stable::new_zeros(setting.value, {count + 2}, ScalarType::Long);
    Magnitude* const largest = write<Magnitude>(integers) + count;
    const FixedPointSum<Number> sum{
        write<unsigned long long>(integers), largest, log_of_terms(setting.problem), 0.0, 0.0};
    device.launch(
        largest_magnitude_kernel<Number>, blocks_for(grad_output.numel()), grad, grad_output.numel(), largest);
    device.launch(
        largest_magnitude_kernel<Number>, blocks_for(setting.weights.numel()), read<Number>(setting.weights),
        setting.weights.numel(), largest + 1);
    device.launch(
        backward_kernel<T, Shape, Points, Weights, FixedPointSum<Number>>, blocks, call, grad, value, points, weights,
        sum);
    device.launch(read_fixed_point_kernel<Number>, blocks_for(count), sum, count, sums);
  }
}

Tensor deformable_attention(
    Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations, Tensor attention_weights) {
  const Setting setting(value, spatial_shapes, sampling_locations, attention_weights);
  const Tensor output = setting.empty_output();
  setting.run([&](auto kind, const Call& call, int64_t blocks) {
    using T = typename decltype(kind)::T;
    using P = typename decltype(kind)::P;
    setting.device.launch(
        forward_kernel<T, typename decltype(kind)::Shape, Locations<P>, GivenWeights<P>>, blocks, call,
        read<T>(setting.value), Locations<P>{read<P>(setting.points), nullptr},
        GivenWeights<P>{read<P>(setting.weights)}, write<T>(output));
  });
  return setting.unpadded_output(output);
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
    Tensor attention_weights, bool deterministic) {
  const Setting setting(value, spatial_shapes, sampling_locations, attention_weights, deterministic);
  check_grad_output(setting.problem, value, grad_output);
  const Tensor grad = setting.padded_output(grad_output);
  const Tensor grad_value = setting.zero_grad_value();
  const Tensor grad_locations = setting.empty_points(), grad_weights = setting.empty_weights();
  setting.run([&](auto kind, const Call& call, int64_t blocks) {
    using P = typename decltype(kind)::P;
    launch_backward<decltype(kind)>(
        setting, call, blocks, grad, Locations<P>{read<P>(setting.points), write<P>(grad_locations)},
        WeightsGradient<P>{read<P>(setting.weights), write<P>(grad_weights)}, deterministic, grad_value);
  });
  return {
      in_type_of(value, setting.unpadded(grad_value)), in_type_of(sampling_locations, grad_locations),
      in_type_of(attention_weights, grad_weights)};
}

std::tuple<Tensor, Tensor> fused_deformable_attention(
    Tensor value, std::vector<int64_t> spatial_shapes, Tensor reference_points, Tensor sampling_offsets,
    Tensor attention_logits) {
  const Setting setting(value, spatial_shapes, sampling_offsets, attention_logits);
  check_reference_points(setting.problem, value, reference_points);
  const Tensor references = prepared(reference_points, setting.compute());
  const Tensor output = setting.empty_output(), weights = setting.empty_weights();
  setting.run([&](auto kind, const Call& call, int64_t blocks) {
    using T = typename decltype(kind)::T;
    using P = typename decltype(kind)::P;
    setting.device.launch(
        forward_kernel<T, typename decltype(kind)::Shape, Offsets<P>, SoftmaxWeights<P>>, blocks, call,
        read<T>(setting.value), offsets_of<P>(setting, references),
        SoftmaxWeights<P>{read<P>(setting.weights), write<P>(weights), 0, 0}, write<T>(output));
  });
  return {setting.unpadded_output(output), in_type_of(attention_logits, weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    Tensor grad_output, std::optional<Tensor> grad_weights, Tensor value, std::vector<int64_t> spatial_shapes,
    Tensor reference_points, Tensor sampling_offsets, Tensor attention_weights, bool deterministic) {
  const Setting setting(value, spatial_shapes, sampling_offsets, attention_weights, deterministic);
  const Problem& problem = setting.problem;
  check_grad_output(problem, value, grad_output);
  check_reference_points(problem, value, reference_points);
  if (grad_weights) check_grad_weights(attention_weights, *grad_weights);
  const Tensor grad = setting.padded_output(grad_output);
  const Tensor references = prepared(reference_points, setting.compute());
  std::optional<Tensor> also_to_weights;
  if (grad_weights) also_to_weights = prepared(*grad_weights, setting.points_type());

  const Tensor grad_value = setting.zero_grad_value();
  const Tensor grad_offsets = setting.empty_points(), grad_logits = setting.empty_weights();
  const int32_t log_part = log_of_part(problem, setting.lanes());
  const Tensor reference_parts = empty(
      value,
      {problem.batch_size, problem.num_queries, problem.num_heads, problem.levels.count,
       problem.num_points >> log_part, references.size(3)},
      setting.compute());
  setting.run([&](auto kind, const Call& call, int64_t blocks) {
    using P = typename decltype(kind)::P;
    Offsets<P> offsets = offsets_of<P>(setting, references);
    offsets.gradient = write<P>(grad_offsets);
    offsets.reference_parts = write<Compute<P>>(reference_parts);
    offsets.log_part = log_part;
    launch_backward<decltype(kind)>(
        setting, call, blocks, grad, offsets,
        LogitsGradient<P>{
            read<P>(setting.weights), also_to_weights ? read<P>(*also_to_weights) : nullptr, write<P>(grad_logits)},
        deterministic, grad_value);
  });
  constexpr int64_t kHeadsAndPoints[] = {2, 4};
  return {
      in_type_of(value, setting.unpadded(grad_value)), torch::stable::sum(reference_parts, kHeadsAndPoints),
      in_type_of(sampling_offsets, grad_offsets), in_type_of(attention_weights, grad_logits)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, library) {
  library.impl("deformable_attention", TORCH_BOX(&deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&deformable_attention_backward));
  library.impl("fused_deformable_attention", TORCH_BOX(&fused_deformable_attention));
  library.impl("fused_deformable_attention_backward", TORCH_BOX(&fused_deformable_attention_backward));
}

}  // namespace hf_dino::cuda
