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

#include "../checks.h"
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

bool has_static_shape(const AttentionShapes& shapes) {
  return shapes.head_dim == StaticShape::kHeadDim && shapes.levels.count == StaticShape::kLevelCount &&
         shapes.num_points == StaticShape::kPointCount;
}

// The type in which kernels read points or weights. Only those for the usual shape read 16-bit ones as they are.
ScalarType type_of_points(bool use_static, const Tensor& value, const Tensor& points) {
  return use_static ? points.scalar_type() : compute_dtype(value.scalar_type());
}

int64_t divide_up(int64_t x, int64_t divisor) { return (x + divisor - 1) / divisor; }

// `lanes` serve one item.
KernelParams make_params(const AttentionShapes& shapes, int64_t head_dim, int lanes) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 16;
  const int64_t items_per_image = shapes.num_queries * shapes.num_heads;
  const int64_t blocks_per_image = divide_up(items_per_image, kThreads / lanes);
  STD_TORCH_CHECK(
      shapes.num_heads * head_dim <= kLimit && items_per_image <= kLimit &&
          shapes.points_per_head() <= kLimit && shapes.batch_size * blocks_per_image <= kLimit,
      "too large for one launch: ", shapes.batch_size, " pictures, ", shapes.num_queries, " queries, ",
      shapes.num_heads, " heads of ", shapes.head_dim, " channels and ", shapes.points_per_head(),
      " points; split the batch or the queries");
  return {
      shapes.levels,
      static_cast<int32_t>(shapes.sequence_length),
      static_cast<int32_t>(shapes.num_queries),
      static_cast<int32_t>(shapes.num_heads),
      static_cast<int32_t>(head_dim),
      static_cast<int32_t>(shapes.num_heads * head_dim),
      static_cast<int32_t>(shapes.num_points),
      static_cast<int32_t>(blocks_per_image)};
}

// The types and the shape that a kernel is compiled for.
template <typename ValueType, typename PointsType, typename ShapeType>
struct KernelTypes {
  using T = ValueType;
  using P = PointsType;
  using Shape = ShapeType;
};

template <typename T, typename Function>
void dispatch_16_bit_types(bool use_static, ScalarType points, const Function& function) {
  if (!use_static) {
    function(KernelTypes<T, float, DynamicShape>{});
  } else if (points == ScalarType::Float) {
    function(KernelTypes<T, float, StaticShape>{});
  } else {
    function(KernelTypes<T, T, StaticShape>{});
  }
}

// Calls `function` with the Kind for a value of this type and points and weights of that type. float64 serves to check
// gradients and has no code for the usual shape.
template <typename Function>
void dispatch_kernel_types(bool use_static, ScalarType value, ScalarType points, const Function& function) {
  switch (value) {
    case ScalarType::Double:
      return function(KernelTypes<double, double, DynamicShape>{});
    case ScalarType::Half:
      return dispatch_16_bit_types<__half>(use_static, points, function);
    case ScalarType::BFloat16:
      return dispatch_16_bit_types<__nv_bfloat16>(use_static, points, function);
    default:
      return use_static ? function(KernelTypes<float, float, StaticShape>{}) : function(KernelTypes<float, float, DynamicShape>{});
  }
}

// What all operators share: the sizes, the device, and value, points and weights as kernels read them. The backward
// pass that sums in fixed point has code for any shape only, and none for 16-bit values.
struct LaunchContext {
  AttentionShapes shapes;
  Device device;
  bool use_static;
  ScalarType type;   // in which kernels read value
  int64_t head_dim;  // with padding to whole vectors, of which there is at least one
  Tensor value, points, weights;

  LaunchContext(
      const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& points, const Tensor& weights,
      bool deterministic = false)
      : shapes(check_inputs(value, spatial_shapes, points, weights)),
        device(value),
        use_static(!deterministic && has_static_shape(shapes)),
        type(deterministic ? compute_dtype(value.scalar_type()) : value.scalar_type()),
        head_dim(vector_of(type) * std::max<int64_t>(divide_up(shapes.head_dim, vector_of(type)), 1)),
        value(padded(value)),
        points(prepared(points, type_of_points(use_static, value, points))),
        weights(prepared(weights, type_of_points(use_static, value, points))) {}

  static int64_t vector_of(ScalarType type) {
    return type == ScalarType::Double ? kVecSize<double> : type == ScalarType::Float ? kVecSize<float> : kVecSize<__half>;
  }

  ScalarType points_type() const { return points.scalar_type(); }
  ScalarType compute() const { return compute_dtype(type); }
  int lanes() const { return type == compute() ? kGroupSize<float> : kGroupSize<__half>; }

  bool is_padded() const { return head_dim != shapes.head_dim; }

  // The last axis is a head's channels.
  Tensor padded(const Tensor& tensor) const {
    return prepared(
        is_padded() ? torch::stable::pad(tensor, {0, head_dim - shapes.head_dim}) : tensor, type);
  }

  Tensor unpadded(Tensor tensor) const {
    if (!is_padded()) return tensor;
    return torch::stable::contiguous(torch::stable::narrow(tensor, -1, 0, shapes.head_dim));
  }

  // The last axis is all heads' channels.
  Tensor padded_output(const Tensor& tensor) const {
    if (!is_padded()) return prepared(tensor, type);
    return padded(torch::stable::reshape(
        tensor, {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.head_dim}));
  }

  Tensor unpadded_output(const Tensor& tensor) const {
    if (!is_padded()) return tensor;
    const Tensor by_head =
        torch::stable::view(tensor, {shapes.batch_size, shapes.num_queries, shapes.num_heads, head_dim});
    return torch::stable::view(
        unpadded(by_head), {shapes.batch_size, shapes.num_queries, shapes.num_heads * shapes.head_dim});
  }

  Tensor empty_output() const {
    return empty(value, {shapes.batch_size, shapes.num_queries, shapes.num_heads * head_dim}, type);
  }

  // Gradients of value are summed up in at least 32 bits.
  Tensor zero_grad_value() const {
    return torch::stable::new_zeros(
        value, {shapes.batch_size, shapes.sequence_length, shapes.num_heads, head_dim}, compute());
  }

  Tensor empty_points() const {
    return empty(
        value,
        {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count, shapes.num_points, 2},
        points_type());
  }

  Tensor empty_weights() const {
    return empty(
        value, {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count, shapes.num_points},
        points_type());
  }

  // Calls `function` with the Kind of this call and its Call and number of blocks, unless there is nothing to do.
  template <typename Function>
  void run(const Function& function) const {
    if (shapes.batch_size * shapes.num_queries * shapes.num_heads == 0) return;
    dispatch_kernel_types(use_static, type, points_type(), [&](auto types) {
      const KernelParams params = make_params(shapes, head_dim, kGroupSize<typename decltype(types)::T>);
      function(types, params, shapes.batch_size * params.blocks_per_image);
    });
  }
};

// Of kernels that walk over their numbers in strides: enough for any GPU.
constexpr int64_t kMostBlocksInStrides = 4096;

// At most this power of two points can read one cell: those of its picture, head and level.
int32_t log_of_terms(const AttentionShapes& shapes) {
  int32_t log = 0;
  while (shapes.num_queries * shapes.num_points > int64_t{1} << log) ++log;
  return log;
}

template <typename P>
OffsetInput<P> offsets_of(const LaunchContext& context, const Tensor& references) {
  OffsetInput<P> offsets{};
  offsets.references = read<compute_t<P>>(references);
  offsets.reference_size = static_cast<int32_t>(references.size(3));
  offsets.step = compute_t<P>(0.5) / context.shapes.num_points;
  offsets.offsets = read<P>(context.points);
  return offsets;
}

// Neighbouring points whose gradients the lanes of a group can sum up, as a power of two: all of a level, or one.
int32_t log_of_part(const AttentionShapes& shapes, int lanes) {
  for (int32_t log = 0; 1 << log <= lanes; ++log) {
    if (shapes.num_points == 1 << log) return log;
  }
  return 0;
}

// Sums up the gradient of value while `points` and `weights` take those of the points and weights.
template <typename KernelTypes, typename Points, typename Weights>
void launch_backward(
    const LaunchContext& context, const KernelParams& params, int64_t blocks, const Tensor& grad_output, const Points& points,
    const Weights& weights, bool deterministic, const Tensor& grad_value) {
  using T = typename KernelTypes::T;
  using Shape = typename KernelTypes::Shape;
  using C = compute_t<T>;
  const Device& device = context.device;
  const T* const grad = read<T>(grad_output);
  const T* const value = read<T>(context.value);
  C* const sums = write<C>(grad_value);
  if (!deterministic) {
    const AtomicAccumulator<C> sum{sums};
    return device.launch(
        backward_kernel<T, Shape, Points, Weights, AtomicAccumulator<C>>, blocks, params, grad, value, points, weights,
        sum);
  }
  if constexpr (!Shape::kStatic && std::is_same_v<T, C>) {
    const int64_t count = grad_value.numel();
    const auto blocks_for = [](int64_t numbers) {
      return std::clamp<int64_t>(numbers / (4 * kThreads), 1, kMostBlocksInStrides);
    };
    const Tensor integers = torch::stable::new_zeros(context.value, {count + 2}, ScalarType::Long);
    Magnitude* const largest = write<Magnitude>(integers) + count;
    const FixedPointAccumulator<C> sum{
        write<unsigned long long>(integers), largest, log_of_terms(context.shapes), 0.0, 0.0};
    device.launch(
        largest_magnitude_kernel<C>, blocks_for(grad_output.numel()), grad, grad_output.numel(), largest);
    device.launch(
        largest_magnitude_kernel<C>, blocks_for(context.weights.numel()), read<C>(context.weights),
        context.weights.numel(), largest + 1);
    device.launch(
        backward_kernel<T, Shape, Points, Weights, FixedPointAccumulator<C>>, blocks, params, grad, value, points, weights,
        sum);
    device.launch(read_fixed_point_kernel<C>, blocks_for(count), sum, count, sums);
  }
}

Tensor deformable_attention(
    Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations, Tensor attention_weights) {
  const LaunchContext context(value, spatial_shapes, sampling_locations, attention_weights);
  const Tensor output = context.empty_output();
  context.run([&](auto types, const KernelParams& params, int64_t blocks) {
    using T = typename decltype(types)::T;
    using P = typename decltype(types)::P;
    context.device.launch(
        forward_kernel<T, typename decltype(types)::Shape, LocationInput<P>, WeightInput<P>>, blocks, params,
        read<T>(context.value), LocationInput<P>{read<P>(context.points), nullptr},
        WeightInput<P>{read<P>(context.weights)}, write<T>(output));
  });
  return context.unpadded_output(output);
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(
    Tensor grad_output, Tensor value, std::vector<int64_t> spatial_shapes, Tensor sampling_locations,
    Tensor attention_weights, bool deterministic) {
  const LaunchContext context(value, spatial_shapes, sampling_locations, attention_weights, deterministic);
  check_grad_output(context.shapes, value, grad_output);
  const Tensor grad = context.padded_output(grad_output);
  const Tensor grad_value = context.zero_grad_value();
  const Tensor grad_locations = context.empty_points(), grad_weights = context.empty_weights();
  context.run([&](auto types, const KernelParams& params, int64_t blocks) {
    using P = typename decltype(types)::P;
    launch_backward<decltype(types)>(
        context, params, blocks, grad, LocationInput<P>{read<P>(context.points), write<P>(grad_locations)},
        WeightsGradient<P>{read<P>(context.weights), write<P>(grad_weights)}, deterministic, grad_value);
  });
  return {
      in_type_of(value, context.unpadded(grad_value)), in_type_of(sampling_locations, grad_locations),
      in_type_of(attention_weights, grad_weights)};
}

std::tuple<Tensor, Tensor> fused_deformable_attention(
    Tensor value, std::vector<int64_t> spatial_shapes, Tensor reference_points, Tensor sampling_offsets,
    Tensor attention_logits) {
  const LaunchContext context(value, spatial_shapes, sampling_offsets, attention_logits);
  check_reference_points(context.shapes, value, reference_points);
  const Tensor references = prepared(reference_points, context.compute());
  const Tensor output = context.empty_output(), weights = context.empty_weights();
  context.run([&](auto types, const KernelParams& params, int64_t blocks) {
    using T = typename decltype(types)::T;
    using P = typename decltype(types)::P;
    context.device.launch(
        forward_kernel<T, typename decltype(types)::Shape, OffsetInput<P>, LogitInput<P>>, blocks, params,
        read<T>(context.value), offsets_of<P>(context, references),
        LogitInput<P>{read<P>(context.weights), write<P>(weights), 0, 0}, write<T>(output));
  });
  return {context.unpadded_output(output), in_type_of(attention_logits, weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    Tensor grad_output, std::optional<Tensor> grad_weights, Tensor value, std::vector<int64_t> spatial_shapes,
    Tensor reference_points, Tensor sampling_offsets, Tensor attention_weights, bool deterministic) {
  const LaunchContext context(value, spatial_shapes, sampling_offsets, attention_weights, deterministic);
  const AttentionShapes& shapes = context.shapes;
  check_grad_output(shapes, value, grad_output);
  check_reference_points(shapes, value, reference_points);
  if (grad_weights) check_grad_weights(attention_weights, *grad_weights);
  const Tensor grad = context.padded_output(grad_output);
  const Tensor references = prepared(reference_points, context.compute());
  std::optional<Tensor> also_to_weights;
  if (grad_weights) also_to_weights = prepared(*grad_weights, context.points_type());

  const Tensor grad_value = context.zero_grad_value();
  const Tensor grad_offsets = context.empty_points(), grad_logits = context.empty_weights();
  const int32_t log_part = log_of_part(shapes, context.lanes());
  const Tensor reference_parts = empty(
      value,
      {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count,
       shapes.num_points >> log_part, references.size(3)},
      context.compute());
  context.run([&](auto types, const KernelParams& params, int64_t blocks) {
    using P = typename decltype(types)::P;
    OffsetInput<P> offsets = offsets_of<P>(context, references);
    offsets.gradient = write<P>(grad_offsets);
    offsets.reference_parts = write<compute_t<P>>(reference_parts);
    offsets.log_part = log_part;
    launch_backward<decltype(types)>(
        context, params, blocks, grad, offsets,
        LogitsGradient<P>{
            read<P>(context.weights), also_to_weights ? read<P>(*also_to_weights) : nullptr, write<P>(grad_logits)},
        deterministic, grad_value);
  });
  constexpr int64_t kHeadsAndPoints[] = {2, 4};
  return {
      in_type_of(value, context.unpadded(grad_value)), torch::stable::sum(reference_parts, kHeadsAndPoints),
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
