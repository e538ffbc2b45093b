// The two forms in which a caller says where to look and how much: locations and weights, or reference points, offsets
// and logits. Each is a structure of pointers that reads one point at a time and takes the point's gradient back.
#pragma once

#include "bilinear.cuh"

namespace hf_dino::cuda {

// Fractions of the map; (0, 0) is the map's corner, half a cell before the centre of its first cell.
template <typename C>
__device__ __forceinline__ Position<C> to_cell_units(C x, C y, const Levels& levels, int32_t level) {
  return {fma(x, C(levels.width[level]), C(-0.5)), fma(y, C(levels.height[level]), C(-0.5))};
}

template <typename P>
struct LocationInput {
  const P* locations;
  P* gradient;

  __device__ __forceinline__ Position<compute_t<P>> position(
      const WorkItem& item, int32_t index, int32_t level, const KernelParams& params) const {
    const Pair<P> location = load_pair(locations + 2 * (item.points + index));
    return to_cell_units(to_compute(location.x), to_compute(location.y), params.levels, level);
  }

  // `slope` is the gradient of the spot. All lanes of a warp come here, those without a point with `present` false.
  template <typename Shape>
  __device__ __forceinline__ void take_gradient(
      const WorkItem& item, int32_t index, const Position<compute_t<P>>& slope, int32_t level, bool present,
      const KernelParams& params) const {
    if (!present) return;
    reinterpret_cast<Pair<P>*>(gradient)[item.points + index] = {
        from_compute<P>(slope.x * params.levels.width[level]), from_compute<P>(slope.y * params.levels.height[level])};
  }
};

// Offsets are in cells around a point (reference_size 2: x, y), or in steps around the centre of a box (reference_size
// 4: centre x, centre y, width, height).
template <typename P>
struct OffsetInput {
  using C = compute_t<P>;

  const C* references;  // (pictures, queries, levels, reference_size)
  int32_t reference_size;
  C step;  // in sides of the box: half of one, divided by the points of a level
  const P* offsets;
  P* gradient;
  // The gradient of a reference is a sum over heads and points. Only the sum over 2^log_part neighbouring points is
  // taken here, by shuffles; the operator adds up the parts, so that no atomics are needed.
  C* reference_parts;  // (all points / 2^log_part, reference_size)
  int32_t log_part;

  __device__ __forceinline__ const C* reference(const WorkItem& item, int32_t level, const KernelParams& params) const {
    return references + (item.query * params.levels.count + level) * reference_size;
  }

  __device__ __forceinline__ Position<C> offset(const WorkItem& item, int32_t index) const {
    const Pair<P> offset = load_pair(offsets + 2 * (item.points + index));
    return {to_compute(offset.x), to_compute(offset.y)};
  }

  __device__ __forceinline__ Position<C> position(
      const WorkItem& item, int32_t index, int32_t level, const KernelParams& params) const {
    const Position<C> away = offset(item, index);
    const C* const at = reference(item, level, params);
    const Pair<C> center = load_pair(at);
    if (reference_size == 2) {
      const Position<C> position = to_cell_units(center.x, center.y, params.levels, level);
      return {position.x + away.x, position.y + away.y};
    }
    const Pair<C> size = load_pair(at + 2);
    return to_cell_units(
        fma(away.x, size.x * step, center.x), fma(away.y, size.y * step, center.y), params.levels, level);
  }

  template <typename Shape>
  __device__ __forceinline__ void take_gradient(
      const WorkItem& item, int32_t index, const Position<C>& slope, int32_t level, bool present,
      const KernelParams& params) const {
    const C x = slope.x * params.levels.width[level], y = slope.y * params.levels.height[level];
    C part[4] = {x, y, 0, 0};
    Pair<P> grad_offset{from_compute<P>(slope.x), from_compute<P>(slope.y)};
    if (reference_size == 4 && present) {
      const Pair<C> size = load_pair(reference(item, level, params) + 2);
      const Position<C> away = offset(item, index);
      grad_offset = {from_compute<P>(x * (size.x * step)), from_compute<P>(y * (size.y * step))};
      part[2] = x * away.x * step;
      part[3] = y * away.y * step;
    }
    if (present) reinterpret_cast<Pair<P>*>(gradient)[item.points + index] = grad_offset;

    const int32_t log = Shape::kStatic ? StaticShape::kLogPointCount : log_part;
    const bool first = present && (index & ((1 << log) - 1)) == 0;
    C* const sums = reference_parts + ((item.points + index) >> log) * reference_size;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= reference_size) break;
      const C sum = sum_over_lanes(part[i], 1 << log);
      if (first) sums[i] = sum;
    }
  }
};

// Attention weights as the caller gives them. `P` may be wider than 16 bits beside 16-bit values.
template <typename P>
struct WeightInput {
  const P* weights;

  template <typename Shape, int kGroup>
  __device__ __forceinline__ void prepare(const WorkItem&, const KernelParams&) {}

  __device__ __forceinline__ compute_t<P> read(const WorkItem& item, int32_t index) const {
    return to_compute(load(weights + item.points + index));
  }

  __device__ __forceinline__ void store(const WorkItem&, int32_t, compute_t<P>) const {}
};

// Attention weights as the softmax of logits over all points of an item; they are also written.
template <typename P>
struct LogitInput {
  const P* logits;
  P* weights;
  compute_t<P> maximum, factor;

  __device__ __forceinline__ compute_t<P> exponential(const WorkItem& item, int32_t index) const {
    return exp(to_compute(load(logits + item.points + index)) - maximum);
  }

  template <typename Shape, int kGroup>
  __device__ __forceinline__ void prepare(const WorkItem& item, const KernelParams& params) {
    const int32_t count = Shape::points_per_head(params), lane = lane_in_group<kGroup>();
    maximum = -INFINITY;
#pragma unroll
    for (int32_t first = 0; first < count; first += kGroup) {
      if (first + lane < count) maximum = fmax(maximum, to_compute(load(logits + item.points + first + lane)));
    }
    maximum = maximum_over_lanes(maximum, kGroup);
    compute_t<P> total = 0;
#pragma unroll
    for (int32_t first = 0; first < count; first += kGroup) {
      if (first + lane < count) total += exponential(item, first + lane);
    }
    factor = 1 / sum_over_lanes(total, kGroup);
  }

  __device__ __forceinline__ compute_t<P> read(const WorkItem& item, int32_t index) const {
    return exponential(item, index) * factor;
  }

  __device__ __forceinline__ void store(const WorkItem& item, int32_t index, compute_t<P> weight) const {
    weights[item.points + index] = from_compute<P>(weight);
  }
};

}  // namespace hf_dino::cuda
