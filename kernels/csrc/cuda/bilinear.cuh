// Bilinear sampling: how the position of a point becomes four cells, (y0, x0), (y0, x1), (y1, x0) and (y1, x1), where
// x1 = x0 + 1 and y1 = y0 + 1, and a weight for each.
#pragma once

#include "work_layout.cuh"

namespace hf_dino::cuda {

// In cells: (0, 0) is the center of the map's first cell.
template <typename C>
struct Position {
  C x, y;
};

// Fractions of the map to cells: the fraction 0 is the map's border, half a cell before the center of the first cell.
template <typename C>
__device__ __forceinline__ Position<C> to_cells(C x, C y, const Levels& levels, int32_t level) {
  return {fma(x, C(levels.width[level]), C(-0.5)), fma(y, C(levels.height[level]), C(-0.5))};
}

// Linear interpolation along one axis, between cell0 and the cell after it, both inside the map. Beyond the center of
// an outermost cell, that cell keeps its weight and the other one has weight zero. A map that is one cell long has the
// cell twice, the second time with weight zero.
template <typename C>
struct AxisWeights {
  int32_t cell0;
  C w0, w1;
  C dw0, dw1;  // derivatives by the position
};

template <typename C>
__device__ __forceinline__ AxisWeights<C> axis_weights(C position, int32_t length) {
  const C rounded_down = floor(position);
  const C fraction = position - rounded_down;
  const int32_t left = static_cast<int32_t>(rounded_down);
  const bool has_left = left >= 0, has_right = left + 1 < length;
  const C w_left = has_left ? 1 - fraction : C(0), w_right = has_right ? fraction : C(0);
  const C dw_left = has_left ? C(-1) : C(0), dw_right = has_right ? C(1) : C(0);
  // Where cell0 was moved inside the map, the left one of the pair is the right neighbor, or the other way round.
  const int32_t cell0 = min(max(left, 0), max(length - 2, 0));
  return cell0 == left ? AxisWeights<C>{cell0, w_left, w_right, dw_left, dw_right}
                       : AxisWeights<C>{cell0, w_right, w_left, dw_right, dw_left};
}

template <typename C>
__device__ __forceinline__ C clamp_to_map(C position, int32_t length) {
  return fmin(fmax(position, C(0)), C(length - 1));
}

// A point as the lane that computes it knows it. A point outside its map stands at the map's border with weight zero,
// at a NaN at its corner. So there is a cell to read, and the zeros that it adds to gradients, which cost less than a
// branch, do not all meet in one cell.
template <typename C>
struct SamplePoint {
  bool inside;
  int32_t level;
  int32_t y0x0;  // position of the cell (y0, x0) in the sequence
  AxisWeights<C> x, y;
  C weight;  // attention weight
};

template <typename C>
__device__ __forceinline__ SamplePoint<C> sample_point(
    const Position<C>& position, C weight, int32_t level, const Levels& levels) {
  const int32_t width = levels.width[level], height = levels.height[level];
  SamplePoint<C> point;
  // false for NaN; where it is true, the position can be converted to an integer
  point.inside = position.x >= -1 && position.x < C(width) && position.y >= -1 && position.y < C(height);
  point.level = level;
  point.x = axis_weights(point.inside ? position.x : clamp_to_map(position.x, width), width);
  point.y = axis_weights(point.inside ? position.y : clamp_to_map(position.y, height), height);
  point.y0x0 = levels.start[level] + point.y.cell0 * width + point.x.cell0;
  point.weight = point.inside ? weight : C(0);
  return point;
}

// Attention weight times bilinear weight of the four cells, in the order y0x0, y0x1, y1x0, y1x1.
template <typename C>
struct CornerWeights {
  C weights[4];
};

template <typename C>
__device__ __forceinline__ CornerWeights<C> corner_weights(const SamplePoint<C>& point) {
  const C wy0 = point.weight * point.y.w0, wy1 = point.weight * point.y.w1;
  return {{wy0 * point.x.w0, wy0 * point.x.w1, wy1 * point.x.w0, wy1 * point.x.w1}};
}

// The four cells of a point as all lanes of its group know them, in the same order.
template <typename C>
struct CornerCells {
  int32_t positions[4];
  C weights[4];
};

// Tells all lanes of a group the cells of the point that lane `source_lane` computed. `index` is the point's number
// within the work item.
template <typename Shape, int kGroup, typename C>
__device__ __forceinline__ CornerCells<C> broadcast_point(
    const SamplePoint<C>& point, const CornerWeights<C>& weights, int source_lane, int32_t index,
    const Levels& levels) {
  const int32_t level = Shape::kStatic ? index / StaticShape::kNumPoints : from_lane<kGroup>(point.level, source_lane);
  const int32_t x1 = levels.width[level] > 1, y1 = levels.height[level] > 1 ? levels.width[level] : 0;
  const int32_t y0x0 = from_lane<kGroup>(point.y0x0, source_lane);
  CornerCells<C> cells{{y0x0, y0x0 + x1, y0x0 + y1, y0x0 + y1 + x1}, {}};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    cells.weights[corner] = from_lane<kGroup>(weights.weights[corner], source_lane);
  }
  return cells;
}

// The gradients of one point's attention weight and position.
template <typename C>
struct PointGrads {
  C weight;
  Position<C> position;
};

// `dots` are the dot products of the output's gradient with the four cells.
template <typename C>
__device__ __forceinline__ PointGrads<C> point_grads(const SamplePoint<C>& point, const C (&dots)[4]) {
  if (!point.inside) return {};
  const AxisWeights<C>&x = point.x, &y = point.y;
  const C dot_y0 = x.w0 * dots[0] + x.w1 * dots[1];
  const C dot_y1 = x.w0 * dots[2] + x.w1 * dots[3];
  const C ddot_y0 = x.dw0 * dots[0] + x.dw1 * dots[1];  // by x
  const C ddot_y1 = x.dw0 * dots[2] + x.dw1 * dots[3];
  return {
      y.w0 * dot_y0 + y.w1 * dot_y1,
      {point.weight * (y.w0 * ddot_y0 + y.w1 * ddot_y1), point.weight * (y.dw0 * dot_y0 + y.dw1 * dot_y1)}};
}

}  // namespace hf_dino::cuda
