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
        "the current CUDA stream cannot be read");
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream_);
    const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
    STD_TORCH_CHECK(
        status == cudaSuccess, "deformable attention cannot be launched: ", cudaGetErrorString(status),
        ". If there is no kernel image, compile for this GPU's architecture.");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// The tensor as kernels read it: of this dtype, contiguous, and aligned to whole vectors, which a view of a longer
// tensor need not be.
Tensor prepared(const Tensor& tensor, ScalarType dtype) {
  Tensor result = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  if (!result.is_contiguous()) result = torch::stable::contiguous(result);
  const bool aligned = reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 16 == 0;
  return aligned ? result : torch::stable::clone(result);
}

template <typename T>
const T* read_ptr(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write_ptr(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

Tensor to_dtype_of(const Tensor& other, const Tensor& tensor) {
  return tensor.scalar_type() == other.scalar_type() ? tensor : torch::stable::to(tensor, other.scalar_type());
}

bool has_static_shape(const AttentionShapes& shapes) {
  return shapes.head_dim == StaticShape::kHeadDim && shapes.levels.count == StaticShape::kNumLevels &&
         shapes.num_points == StaticShape::kNumPoints;
}

// The dtype in which kernels read points or weights. Only those for the static shape read 16-bit ones as they are.
ScalarType points_dtype(bool use_static, const Tensor& value, const Tensor& points) {
  return use_static ? points.scalar_type() : compute_dtype(value.scalar_type());
}

int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// `group_size` lanes serve one work item.
KernelParams make_params(const AttentionShapes& shapes, int64_t head_dim, int group_size) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / 16;
  const int64_t items_per_image = shapes.num_queries * shapes.num_heads;
  const int64_t blocks_per_image = divide_up(items_per_image, kThreads / group_size);
  STD_TORCH_CHECK(
      shapes.num_heads * head_dim <= kLimit && items_per_image <= kLimit &&
          shapes.points_per_head() <= kLimit && shapes.batch_size * blocks_per_image <= kLimit,
      "too large for one launch: ", shapes.batch_size, " images, ", shapes.num_queries, " queries, ",
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

// What a kernel is compiled for: the type of value, that of points and weights, and the shape.
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

// Calls `function` with the KernelTypes for these dtypes. float64 serves to check gradients and has no kernels for the
// static shape.
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
      return use_static ? function(KernelTypes<float, float, StaticShape>{})
                        : function(KernelTypes<float, float, DynamicShape>{});
  }
}

// What all operators share: the sizes, the device, and value, points and weights as kernels read them. The backward
// pass that sums in fixed point has kernels for the dynamic shape only, and none for 16-bit values.
struct LaunchContext {
  AttentionShapes shapes;
  Device device;
  bool use_static;
  ScalarType dtype;  // in which kernels read value
  int64_t head_dim;  // with padding to whole vectors, of which there is at least one
  Tensor value, points, weights;

  LaunchContext(
      const Tensor& value_, const std::vector<int64_t>& spatial_shapes, const Tensor& points_, const Tensor& weights_,
      bool deterministic = false)
      : shapes(check_inputs(value_, spatial_shapes, points_, weights_)),
        device(value_),
        use_static(!deterministic && has_static_shape(shapes)),
        dtype(deterministic ? compute_dtype(value_.scalar_type()) : value_.scalar_type()),
        head_dim(vec_size() * std::max<int64_t>(divide_up(shapes.head_dim, vec_size()), 1)),
        value(padded(value_)),
        points(prepared(points_, points_dtype(use_static, value_, points_))),
        weights(prepared(weights_, points_dtype(use_static, value_, points_))) {}

  // Channels in one vector.
  int64_t vec_size() const {
    return dtype == ScalarType::Double  ? kVecSize<double>
           : dtype == ScalarType::Float ? kVecSize<float>
                                        : kVecSize<__half>;
  }

  ScalarType compute() const { return compute_dtype(dtype); }
  int group_size() const { return dtype == compute() ? kGroupSize<float> : kGroupSize<__half>; }

  bool is_padded() const { return head_dim != shapes.head_dim; }

  // The last axis is a head's channels.
  Tensor padded(const Tensor& tensor) const {
    return prepared(
        is_padded() ? torch::stable::pad(tensor, {0, head_dim - shapes.head_dim}) : tensor, dtype);
  }

  Tensor unpadded(Tensor tensor) const {
    if (!is_padded()) return tensor;
    return torch::stable::contiguous(torch::stable::narrow(tensor, -1, 0, shapes.head_dim));
  }

  // The last axis is all heads' channels.
  Tensor padded_output(const Tensor& tensor) const {
    if (!is_padded()) return prepared(tensor, dtype);
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
    return empty(value, {shapes.batch_size, shapes.num_queries, shapes.num_heads * head_dim}, dtype);
  }

  // The gradient of value is summed in at least 32 bits.
  Tensor zero_grad_value() const {
    return torch::stable::new_zeros(
        value, {shapes.batch_size, shapes.sequence_length, shapes.num_heads, head_dim}, compute());
  }

  Tensor empty_points() const {
    return empty(
        value,
        {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count, shapes.num_points, 2},
        points.scalar_type());
  }

  Tensor empty_weights() const {
    return empty(
        value, {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count, shapes.num_points},
        points.scalar_type());
  }

  // Calls `function` with KernelTypes, KernelParams and the number of blocks, unless there is nothing to do.
  template <typename Function>
  void run(const Function& function) const {
    if (shapes.num_rows() == 0) return;
    dispatch_kernel_types(use_static, dtype, points.scalar_type(), [&](auto types) {
      const KernelParams params = make_params(shapes, head_dim, kGroupSize<typename decltype(types)::T>);
      function(types, params, shapes.batch_size * params.blocks_per_image);
    });
  }
};

// For kernels whose threads take several numbers each: enough for any GPU.
constexpr int64_t kMaxStridedBlocks = 4096;

// The power of two that bounds how many points read one cell: those of its image, head and level.
int32_t log_num_terms(const AttentionShapes& shapes) {
  int32_t log = 0;
  while (shapes.num_queries * shapes.num_points > int64_t{1} << log) ++log;
  return log;
}

template <typename P>
OffsetInput<P> make_offset_input(const LaunchContext& context, const Tensor& references) {
  OffsetInput<P> offsets{};
  offsets.references = read_ptr<compute_t<P>>(references);
  offsets.reference_dim = static_cast<int32_t>(references.size(3));
  offsets.box_unit = compute_t<P>(0.5) / context.shapes.num_points;
  offsets.offsets = read_ptr<P>(context.points);
  return offsets;
}

// How many neighboring points the lanes of a group sum to one part of a reference's gradient, as a power of two: all
// points of a level, or one.
int32_t log_part_size(const AttentionShapes& shapes, int group_size) {
  for (int32_t log = 0; 1 << log <= group_size; ++log) {
    if (shapes.num_points == 1 << log) return log;
  }
  return 0;
}

// Sums the gradient of value, while `points` and `weights` store those of the points and weights.
template <typename Types, typename Points, typename Weights>
void launch_backward(
    const LaunchContext& context, const KernelParams& params, int64_t blocks, const Tensor& grad_output,
    const Points& points, const Weights& weights, bool deterministic, const Tensor& grad_value) {
  using T = typename Types::T;
  using Shape = typename Types::Shape;
  using C = compute_t<T>;
  const Device& device = context.device;
  const T* const grad = read_ptr<T>(grad_output);
  const T* const value = read_ptr<T>(context.value);
  C* const sums = write_ptr<C>(grad_value);
  if (!deterministic) {
    const AtomicAccumulator<C> accumulator{sums};
    return device.launch(
        backward_kernel<T, Shape, Points, Weights, AtomicAccumulator<C>>, blocks, params, grad, value, points, weights,
        accumulator);
  }
  if constexpr (!Shape::kStatic && std::is_same_v<T, C>) {
    const int64_t count = grad_value.numel();
    const auto blocks_for = [](int64_t numbers) {
      return std::clamp<int64_t>(numbers / (4 * kThreads), 1, kMaxStridedBlocks);
    };
    const Tensor integers = torch::stable::new_zeros(context.value, {count + 2}, ScalarType::Long);
    Magnitude* const largest = write_ptr<Magnitude>(integers) + count;
    const FixedPointAccumulator<C> accumulator{
        write_ptr<unsigned long long>(integers), largest, log_num_terms(context.shapes), 0.0, 0.0};
    device.launch(
        largest_magnitude_kernel<C>, blocks_for(grad_output.numel()), grad, grad_output.numel(), largest);
    device.launch(
        largest_magnitude_kernel<C>, blocks_for(context.weights.numel()), read_ptr<C>(context.weights),
        context.weights.numel(), largest + 1);
    device.launch(
        backward_kernel<T, Shape, Points, Weights, FixedPointAccumulator<C>>, blocks, params, grad, value, points,
        weights, accumulator);
    device.launch(read_fixed_point_kernel<C>, blocks_for(count), accumulator, count, sums);
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
        read_ptr<T>(context.value), LocationInput<P>{read_ptr<P>(context.points), nullptr},
        WeightInput<P>{read_ptr<P>(context.weights)}, write_ptr<T>(output));
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
        context, params, blocks, grad, LocationInput<P>{read_ptr<P>(context.points), write_ptr<P>(grad_locations)},
        WeightsGradient<P>{read_ptr<P>(context.weights), write_ptr<P>(grad_weights)}, deterministic, grad_value);
  });
  return {
      to_dtype_of(value, context.unpadded(grad_value)), to_dtype_of(sampling_locations, grad_locations),
      to_dtype_of(attention_weights, grad_weights)};
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
        read_ptr<T>(context.value), make_offset_input<P>(context, references),
        LogitInput<P>{read_ptr<P>(context.weights), write_ptr<P>(weights), 0, 0}, write_ptr<T>(output));
  });
  return {context.unpadded_output(output), to_dtype_of(attention_logits, weights)};
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
  std::optional<Tensor> grad_from_weights;
  if (grad_weights) grad_from_weights = prepared(*grad_weights, context.points.scalar_type());

  const Tensor grad_value = context.zero_grad_value();
  const Tensor grad_offsets = context.empty_points(), grad_logits = context.empty_weights();
  const int32_t log_part = log_part_size(shapes, context.group_size());
  const Tensor grad_reference_parts = empty(
      value,
      {shapes.batch_size, shapes.num_queries, shapes.num_heads, shapes.levels.count,
       shapes.num_points >> log_part, references.size(3)},
      context.compute());
  context.run([&](auto types, const KernelParams& params, int64_t blocks) {
    using P = typename decltype(types)::P;
    OffsetInput<P> offsets = make_offset_input<P>(context, references);
    offsets.grad_offsets = write_ptr<P>(grad_offsets);
    offsets.grad_reference_parts = write_ptr<compute_t<P>>(grad_reference_parts);
    offsets.log_part = log_part;
    launch_backward<decltype(types)>(
        context, params, blocks, grad, offsets,
        LogitsGradient<P>{
            read_ptr<P>(context.weights), grad_from_weights ? read_ptr<P>(*grad_from_weights) : nullptr,
            write_ptr<P>(grad_logits)},
        deterministic, grad_value);
  });
  constexpr int64_t kHeadsAndPoints[] = {2, 4};
  return {
      to_dtype_of(value, context.unpadded(grad_value)), torch::stable::sum(grad_reference_parts, kHeadsAndPoints),
      to_dtype_of(sampling_offsets, grad_offsets), to_dtype_of(attention_weights, grad_logits)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, library) {
  library.impl("deformable_attention", TORCH_BOX(&deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&deformable_attention_backward));
  library.impl("fused_deformable_attention", TORCH_BOX(&fused_deformable_attention));
  library.impl("fused_deformable_attention_backward", TORCH_BOX(&fused_deformable_attention_backward));
}

}  // namespace hf_dino::cuda
