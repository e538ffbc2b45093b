// The checks that make every pointer safe to follow, shared by the host code of both backends.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "shapes.h"

namespace hf_dino {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 16-bit values are computed with in 32 bits, and so are their locations: a bfloat16 location is off by a cell.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype;
}

inline void check_dtypes(const Tensor& value, const Tensor& points, const Tensor& weights) {
  const ScalarType dtype = value.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
          dtype == ScalarType::BFloat16,
      "value must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(
      points.scalar_type() == dtype || points.scalar_type() == compute_dtype(dtype),
      "sampling points must have the dtype of value, or float32 beside 16-bit values");
  STD_TORCH_CHECK(
      weights.scalar_type() == points.scalar_type(), "sampling points and attention weights must have one dtype");
}

inline void check_device(const Tensor& value, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(
      other.is_cuda() == value.is_cuda() && other.get_device_index() == value.get_device_index(), name,
      " must be on the device of value");
}

// Lays the levels out one after another; together they must fill the sequence.
inline Levels check_levels(const std::vector<int64_t>& spatial_shapes, int64_t sequence_length) {
  STD_TORCH_CHECK(
      spatial_shapes.size() % 2 == 0 && !spatial_shapes.empty(),
      "spatial_shapes must be height and width of each level");
  STD_TORCH_CHECK(
      spatial_shapes.size() <= 2 * kMaxLevels, "at most ", kMaxLevels, " levels, but there are ",
      spatial_shapes.size() / 2);
  Levels levels{};
  levels.count = static_cast<int32_t>(spatial_shapes.size() / 2);
  int64_t start = 0;
  for (int32_t level = 0; level < levels.count; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(height > 0 && width > 0, "level ", level, " is ", height, " x ", width, ": it must not be empty");
    // Each side is checked before the product: both fit in 32 bits, so the product cannot overflow.
    STD_TORCH_CHECK(
        height <= sequence_length && width <= sequence_length && height * width <= sequence_length - start,
        "spatial_shapes cover more positions than value has: ", sequence_length);
    levels.height[level] = static_cast<int32_t>(height);
    levels.width[level] = static_cast<int32_t>(width);
    levels.start[level] = static_cast<int32_t>(start);
    start += height * width;
  }
  STD_TORCH_CHECK(
      start == sequence_length, "spatial_shapes cover ", start, " positions but value has ", sequence_length);
  return levels;
}

// Returns the sizes of one call. `points` is (batch, queries, heads, levels, points, 2): locations or offsets;
// `weights` is the same without the last axis: attention weights or logits.
inline AttentionShapes check_inputs(
    const Tensor& value, const std::vector<int64_t>& spatial_shapes, const Tensor& points, const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4, "value must be (batch, sequence, heads, channels), but has ", value.dim(), " axes");
  STD_TORCH_CHECK(
      points.dim() == 6 && points.size(5) == 2,
      "sampling points must be (batch, queries, heads, levels, points, 2), but have ", points.dim(),
      " axes, the last one ", points.dim() > 0 ? points.size(points.dim() - 1) : 0, " long");
  STD_TORCH_CHECK(
      value.size(3) > 0 && points.size(4) > 0, "there must be channels and points, but there are ", value.size(3),
      " and ", points.size(4));
  STD_TORCH_CHECK(
      value.size(1) <= std::numeric_limits<int32_t>::max() - 2, "value has too many positions: ", value.size(1));
  check_dtypes(value, points, weights);
  check_device(value, points, "sampling points");
  check_device(value, weights, "attention weights");
  const AttentionShapes shapes{value.size(0),  value.size(1),  value.size(2),
                               value.size(3),  points.size(1), points.size(4),
                               check_levels(spatial_shapes, value.size(1))};
  STD_TORCH_CHECK(
      points.size(0) == shapes.batch_size && points.size(2) == shapes.num_heads &&
          points.size(3) == shapes.levels.count,
      "sampling points are for ", points.size(0), " images, ", points.size(2), " heads and ", points.size(3),
      " levels, but value and spatial_shapes for ", shapes.batch_size, ", ", shapes.num_heads, " and ",
      shapes.levels.count);
  STD_TORCH_CHECK(weights.dim() == 5, "attention weights must be (batch, queries, heads, levels, points)");
  for (int axis = 0; axis < 5; ++axis) {
    STD_TORCH_CHECK(
        weights.size(axis) == points.size(axis), "attention weights and sampling points disagree: axis ", axis, " is ",
        weights.size(axis), " and ", points.size(axis), " long");
  }
  return shapes;
}

// (batch, queries, levels, 2 or 4), in the dtype that is computed with.
inline void check_reference_points(
    const AttentionShapes& shapes, const Tensor& value, const Tensor& reference_points) {
  STD_TORCH_CHECK(
      reference_points.dim() == 4 && (reference_points.size(3) == 2 || reference_points.size(3) == 4),
      "reference_points must be (batch, queries, levels, 2 or 4)");
  STD_TORCH_CHECK(
      reference_points.size(0) == shapes.batch_size && reference_points.size(1) == shapes.num_queries &&
          reference_points.size(2) == shapes.levels.count,
      "reference_points are for ", reference_points.size(0), " images, ", reference_points.size(1), " queries and ",
      reference_points.size(2), " levels, but the sampling points for ", shapes.batch_size, ", ", shapes.num_queries,
      " and ", shapes.levels.count);
  STD_TORCH_CHECK(
      reference_points.scalar_type() == compute_dtype(value.scalar_type()),
      "reference_points must be float32, or float64 beside float64 values");
  check_device(value, reference_points, "reference_points");
}

inline void check_grad_output(const AttentionShapes& shapes, const Tensor& value, const Tensor& grad_output) {
  STD_TORCH_CHECK(
      grad_output.dim() == 3 && grad_output.size(0) == shapes.batch_size &&
          grad_output.size(1) == shapes.num_queries &&
          grad_output.size(2) == shapes.num_heads * shapes.head_dim,
      "grad_output must be (batch, queries, heads * channels)");
  STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output must have the dtype of value");
  check_device(value, grad_output, "grad_output");
}

inline void check_grad_weights(const Tensor& weights, const Tensor& grad_weights) {
  bool agree = grad_weights.dim() == 5 && grad_weights.scalar_type() == weights.scalar_type();
  for (int axis = 0; agree && axis < 5; ++axis) agree = grad_weights.size(axis) == weights.size(axis);
  STD_TORCH_CHECK(agree, "grad_weights must have the shape and dtype of the attention weights");
  check_device(weights, grad_weights, "grad_weights");
}

}  // namespace hf_dino
