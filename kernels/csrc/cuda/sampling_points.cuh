// The two forms in which a caller gives sampling points and weights: locations and attention weights, or reference
// points, offsets and logits. Each is a structure of pointers that reads one point at a time and stores its gradient.
#pragma once

#include "bilinear.cuh"

namespace hf_dino::cuda {

// Locations as fractions of the map.
template <typename P>
struct LocationInput {
  const P* locations;
  P* grad_locations;

  __device__ __forceinline__ Position<compute_t<P>> position(
      const WorkItem& item, int32_t index, int32_t level, const KernelParams& params) const {
    const Pair<P> location = load_pair(locations + 2 * (item.points + index));
    return to_cells(to_compute(location.x), to_compute(location.y), params.levels, level);
  }

  // `grad` is the gradient of the position. All lanes of a warp call this, those without a point with `present` false.
  template <typename Shape>
  __device__ __forceinline__ void store_grad(
      const WorkItem& item, int32_t index, const Position<compute_t<P>>& grad, int32_t level, bool present,
      const KernelParams& params) const {
    if (!present) return;
    reinterpret_cast<Pair<P>*>(grad_locations)[item.points + index] = {
        from_compute<P>(grad.x * params.levels.width[level]), from_compute<P>(grad.y * params.levels.height[level])};
  }
};

// Offsets in cells around a point (reference_dim 2: x, y), or in parts of a box around its center (reference_dim 4:
// center x, center y, width, height).
template <typename P>
struct OffsetInput {
  using C = compute_t<P>;

  const C* references;  // (images, queries, levels, reference_dim)
  int32_t reference_dim;
  C box_unit;  // sides of the box per unit of an offset: 0.5 / points of a level
  const P* offsets;
  P* grad_offsets;
  // The gradient of a reference is a sum over heads and points. Only the sum over 2^log_part neighboring points is
  // computed here, by shuffles; the operator adds up the parts, so that no atomics are needed.
  C* grad_reference_parts;  // (all points / 2^log_part, reference_dim)
  int32_t log_part;

  __device__ __forceinline__ const C* reference(
      const WorkItem& item, int32_t level, const KernelParams& params) const {
    return references + (item.batch_query * params.levels.count + level) * reference_dim;
  }

  __device__ __forceinline__ Position<C> offset(const WorkItem& item, int32_t index) const {
    const Pair<P> offset = load_pair(offsets + 2 * (item.points + index));
    return {to_compute(offset.x), to_compute(offset.y)};
  }

  __device__ __forceinline__ Position<C> position(
      const WorkItem& item, int32_t index, int32_t level, const KernelParams& params) const {
    const Position<C> by = offset(item, index);
    const C* const box = reference(item, level, params);
    const Pair<C> center = load_pair(box);
    if (reference_dim == 2) {
      const Position<C> around = to_cells(center.x, center.y, params.levels, level);
      return {around.x + by.x, around.y + by.y};
    }
    const Pair<C> size = load_pair(box + 2);
    return to_cells(
        fma(by.x, size.x * box_unit, center.x), fma(by.y, size.y * box_unit, center.y), params.levels, level);
  }

  // As for locations; the sums over neighboring points need all lanes of a warp.
  template <typename Shape>
  __device__ __forceinline__ void store_grad(
      const WorkItem& item, int32_t index, const Position<C>& grad, int32_t level, bool present,
      const KernelParams& params) const {
    const C x = grad.x * params.levels.width[level], y = grad.y * params.levels.height[level];
    C part[4] = {x, y, 0, 0};
    Pair<P> grad_offset{from_compute<P>(grad.x), from_compute<P>(grad.y)};
    if (reference_dim == 4 && present) {
      const Pair<C> size = load_pair(reference(item, level, params) + 2);
      const Position<C> by = offset(item, index);
      grad_offset = {from_compute<P>(x * (size.x * box_unit)), from_compute<P>(y * (size.y * box_unit))};
      part[2] = x * by.x * box_unit;
      part[3] = y * by.y * box_unit;
    }
    if (present) reinterpret_cast<Pair<P>*>(grad_offsets)[item.points + index] = grad_offset;

    const int32_t log = Shape::kStatic ? StaticShape::kLogNumPoints : log_part;
    const bool is_first = present && (index & ((1 << log) - 1)) == 0;
    C* const sums = grad_reference_parts + ((item.points + index) >> log) * reference_dim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= reference_dim) break;
      const C sum = sum_over_lanes(part[i], 1 << log);
      if (is_first) sums[i] = sum;
    }
  }
};

// Attention weights as the caller gives them. P may be wider than 16 bits beside 16-bit values.
template <typename P>
struct WeightInput {
  const P* weights;

  template <typename Shape, int kGroup>
  __device__ __forceinline__ void prepare(const WorkItem&, const KernelParams&) {}

  __device__ __forceinline__ compute_t<P> load_weight(const WorkItem& item, int32_t index) const {
    return to_compute(load(weights + item.points + index));
  }

  __device__ __forceinline__ void store_weight(const WorkItem&, int32_t, compute_t<P>) const {}
};

// Attention weights as the softmax of logits over all points of a work item; they are also stored.
template <typename P>
struct LogitInput {
  const P* logits;
  P* weights;
  compute_t<P> maximum, factor;  // of the current work item, which `prepare` computes

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

  __device__ __forceinline__ compute_t<P> load_weight(const WorkItem& item, int32_t index) const {
    return exponential(item, index) * factor;
  }

  __device__ __forceinline__ void store_weight(const WorkItem& item, int32_t index, compute_t<P> weight) const {
    weights[item.points + index] = from_compute<P>(weight);
  }
};

}  // namespace hf_dino::cuda
