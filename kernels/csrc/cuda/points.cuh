// The two forms in which a caller says where to look and how much: locations and weights, or reference points, offsets
// and logits. Each is a structure of pointers that reads one point at a time and takes the point's gradient back.
#pragma once

#include "sampling.cuh"

namespace hf_dino::cuda {

// Fractions of the map; (0, 0) is the map's corner, half a cell before the centre of its first cell.
template <typename Number>
__device__ __forceinline__ Spot<Number> spot_of_fraction(Number x, Number y, const Levels& levels, int32_t level) {
  return {fma(x, Number(levels.width[level]), Number(-0.5)), fma(y, Number(levels.height[level]), Number(-0.5))};
}

template <typename P>
struct Locations {
  const P* locations;
  P* gradient;

  __device__ __forceinline__ Spot<Compute<P>> spot(
      const Item& item, int32_t index, int32_t level, const Call& call) const {
    const Pair<P> location = load_pair(locations + 2 * (item.points + index));
    return spot_of_fraction(widen(location.x), widen(location.y), call.levels, level);
  }

  // `slope` is the gradient of the spot. All lanes of a warp come here, those without a point with `present` false.
  template <typename Shape>
  __device__ __forceinline__ void take_gradient(
      const Item& item, int32_t index, const Spot<Compute<P>>& slope, int32_t level, bool present,
      const Call& call) const {
    if (!present) return;
    reinterpret_cast<Pair<P>*>(gradient)[item.points + index] = {
        narrow<P>(slope.x * call.levels.width[level]), narrow<P>(slope.y * call.levels.height[level])};
  }
};

// Offsets are in cells around a point (reference_size 2: x, y), or in steps around the centre of a box (reference_size
// 4: centre x, centre y, width, height).
template <typename P>
struct Offsets {
  using Number = Compute<P>;

  const Number* references;  // (pictures, queries, levels, reference_size)
  int32_t reference_size;
  Number step;  // in sides of the box: half of one, divided by the points of a level
  const P* offsets;
  P* gradient;
  // The gradient of a reference is a sum over heads and points. Only the sum over 2^log_part neighbouring points is
  // taken here, by shuffles; the operator adds up the parts, so that no atomics are needed.
  Number* reference_parts;  // (all points / 2^log_part, reference_size)
  int32_t log_part;

  __device__ __forceinline__ const Number* reference(const Item& item, int32_t level, const Call& call) const {
    return references + (item.query * call.levels.count + level) * reference_size;
  }

  __device__ __forceinline__ Spot<Number> offset(const Item& item, int32_t index) const {
    const Pair<P> offset = load_pair(offsets + 2 * (item.points + index));
    return {widen(offset.x), widen(offset.y)};
  }

  __device__ __forceinline__ Spot<Number> spot(
      const Item& item, int32_t index, int32_t level, const Call& call) const {
    const Spot<Number> away = offset(item, index);
    const Number* const at = reference(item, level, call);
    const Pair<Number> centre = load_pair(at);
    if (reference_size == 2) {
      const Spot<Number> spot = spot_of_fraction(centre.x, centre.y, call.levels, level);
      return {spot.x + away.x, spot.y + away.y};
    }
    const Pair<Number> size = load_pair(at + 2);
    return spot_of_fraction(
        fma(away.x, size.x * step, centre.x), fma(away.y, size.y * step, centre.y), call.levels, level);
  }

  template <typename Shape>
  __device__ __forceinline__ void take_gradient(
      const Item& item, int32_t index, const Spot<Number>& slope, int32_t level, bool present,
      const Call& call) const {
    const Number x = slope.x * call.levels.width[level], y = slope.y * call.levels.height[level];
    Number part[4] = {x, y, 0, 0};
    Pair<P> grad_offset{narrow<P>(slope.x), narrow<P>(slope.y)};
    if (reference_size == 4 && present) {
      const Pair<Number> size = load_pair(reference(item, level, call) + 2);
      const Spot<Number> away = offset(item, index);
      grad_offset = {narrow<P>(x * (size.x * step)), narrow<P>(y * (size.y * step))};
      part[2] = x * away.x * step;
      part[3] = y * away.y * step;
    }
    if (present) reinterpret_cast<Pair<P>*>(gradient)[item.points + index] = grad_offset;

    const int32_t log = Shape::kFixed ? UsualShape::kLogPointCount : log_part;
    const bool first = present && (index & ((1 << log) - 1)) == 0;
    Number* const sums = reference_parts + ((item.points + index) >> log) * reference_size;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= reference_size) break;
      const Number sum = sum_over_lanes(part[i], 1 << log);
      if (first) sums[i] = sum;
    }
  }
};

// Attention weights as the caller gives them. `P` may be wider than 16 bits beside 16-bit values.
template <typename P>
struct GivenWeights {
  const P* weights;

  template <typename Shape, int kGroup>
  __device__ __forceinline__ void prepare(const Item&, const Call&) {}

  __device__ __forceinline__ Compute<P> read(const Item& item, int32_t index) const {
    return widen(load(weights + item.points + index));
  }

  __device__ __forceinline__ void keep(const Item&, int32_t, Compute<P>) const {}
};

// Attention weights as the softmax of logits over all points of an item; they are also written.
template <typename P>
struct SoftmaxWeights {
  const P* logits;
  P* weights;
  Compute<P> maximum, factor;

  __device__ __forceinline__ Compute<P> exponential(const Item& item, int32_t index) const {
    return exp(widen(load(logits + item.points + index)) - maximum);
  }

  template <typename Shape, int kGroup>
  __device__ __forceinline__ void prepare(const Item& item, const Call& call) {
    const int32_t count = Shape::points_per_head(call), lane = lane_in_group<kGroup>();
    maximum = -INFINITY;
#pragma unroll
    for (int32_t first = 0; first < count; first += kGroup) {
      if (first + lane < count) maximum = fmax(maximum, widen(load(logits + item.points + first + lane)));
    }
    maximum = maximum_over_lanes(maximum, kGroup);
    Compute<P> total = 0;
#pragma unroll
    for (int32_t first = 0; first < count; first += kGroup) {
      if (first + lane < count) total += exponential(item, first + lane);
    }
    factor = 1 / sum_over_lanes(total, kGroup);
  }

  __device__ __forceinline__ Compute<P> read(const Item& item, int32_t index) const {
    return exponential(item, index) * factor;
  }

  __device__ __forceinline__ void keep(const Item& item, int32_t index, Compute<P> weight) const {
    weights[item.points + index] = narrow<P>(weight);
  }
};

}  // namespace hf_dino::cuda
