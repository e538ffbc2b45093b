// The backward pass, mapped as the forward pass is. Each group of lanes reads the cells of its points once more. A
// lane adds its channels' share of the gradient to each cell, and multiplies its channels of the cell by the output's
// gradient. Those products are then summed over the group in such a way that each lane ends up with the points that it
// owns, and writes their gradients: no shared memory, no barrier, and nothing but the cells has to be zero at first.
#pragma once

#include "points.cuh"
#include "sums.cuh"

namespace hf_dino::cuda {

// Collects the gradients of an item's attention weights, as its lanes find them round by round.
template <typename P>
struct WeightsGradient {
  const P* weights;
  P* gradient;

  template <typename Shape, int kGroup>
  struct Collector {
    __device__ __forceinline__ void add(
        const WeightsGradient& all, const Item& item, int32_t, int32_t own, Compute<P>, Compute<P> slope) {
      all.gradient[item.points + own] = narrow<P>(slope);
    }

    __device__ __forceinline__ void finish(const WeightsGradient&, const Item&, const Call&) {}
  };
};

// The same where the weights p are the softmax of logits. The logits' gradient is p * (g - sum(p * g)), where g is the
// weights'.
template <typename P>
struct LogitsGradient {
  const P* weights;
  const P* grad_weights;  // what reaches the weights other than through the sampling, or null
  P* gradient;

  template <typename Shape, int kGroup>
  struct Collector {
    // Until the sum is known, the slopes wait in registers, or where their results will be if there may be any number.
    Compute<P> slopes[Shape::kFixed ? UsualShape::kLevelCount * UsualShape::kPointCount / kGroup : 1];
    Compute<P> total = 0;

    __device__ __forceinline__ void add(
        const LogitsGradient& all, const Item& item, int32_t round, int32_t own, Compute<P> weight,
        Compute<P> slope) {
      if (all.grad_weights != nullptr) slope += widen(load(all.grad_weights + item.points + own));
      total = fma(weight, slope, total);
      if constexpr (Shape::kFixed) {
        slopes[round / kGroup] = slope;
      } else {
        static_assert(std::is_same_v<P, Compute<P>>, "waiting must not round");
        all.gradient[item.points + own] = slope;
      }
    }

    __device__ __forceinline__ void finish(const LogitsGradient& all, const Item& item, const Call& call) {
      total = sum_over_lanes(total, kGroup);
      const int32_t count = Shape::points_per_head(call), lane = lane_in_group<kGroup>();
#pragma unroll
      for (int32_t round = 0; round < count; round += kGroup) {
        const int32_t own = round + lane;
        if (own >= count || !item.active) continue;
        P* const place = all.gradient + item.points + own;
        const Compute<P> weight = widen(load(all.weights + item.points + own));
        if constexpr (Shape::kFixed) {
          *place = narrow<P>(weight * (slopes[round / kGroup] - total));
        } else {
          *place = weight * (*place - total);
        }
      }
    }
  };
};

// Lane j of a group gets the sum over its lanes of numbers[j]. Each step halves what a lane has to sum: kGroup - 1
// shuffles in all, instead of kGroup * log2(kGroup).
template <int kGroup, typename Number>
__device__ __forceinline__ Number transposed_sum(Number (&numbers)[kGroup]) {
  const int32_t lane = lane_in_group<kGroup>();
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Number mine = upper ? numbers[i + half] : numbers[i];
      const Number theirs = upper ? numbers[i] : numbers[i + half];
      numbers[i] = mine + from_opposite_lane(theirs, half);
    }
  }
  return numbers[0];
}

// The gradients of one point, given the products of the output's gradient with its four cells, row by row.
template <typename Number>
struct PointSlopes {
  Number weight;
  Spot<Number> spot;
};

template <typename Number>
__device__ __forceinline__ PointSlopes<Number> point_slopes(const Point<Number>& point, const Number (&products)[4]) {
  if (!point.inside) return {};
  const Neighbours<Number>&x = point.x, &y = point.y;
  const Number upper = x.first * products[0] + x.second * products[1];
  const Number lower = x.first * products[2] + x.second * products[3];
  const Number upper_slope = x.first_slope * products[0] + x.second_slope * products[1];
  const Number lower_slope = x.first_slope * products[2] + x.second_slope * products[3];
  return {
      y.first * upper + y.second * lower,
      {point.weight * (y.first * upper_slope + y.second * lower_slope),
       point.weight * (y.first_slope * upper + y.second_slope * lower)}};
}

template <typename T, typename Shape, typename Points, typename Weights, typename Sum>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T>) backward_kernel(
    const __grid_constant__ Call call, const T* grad_output, const T* value, const Points points,
    const Weights weights, Sum grad_value) {
  using Number = Compute<T>;
  constexpr int kGroup = kLanes<T>;
  const int32_t lane = lane_in_group<kGroup>(), count = Shape::points_per_head(call);
  const Item item = this_item<Shape, kGroup>(call);
  typename Weights::template Collector<Shape, kGroup> collector;
  grad_value.prepare();

#pragma unroll
  for (int32_t round = 0; round < count; round += kGroup) {
    const int32_t own = round + lane;
    const bool present = own < count && item.active;
    const int32_t level = present ? own / Shape::num_points(call) : 0;
    Number weight = 0;
    Point<Number> point{};
    if (present) {
      weight = widen(load(weights.weights + item.points + own));
      point = place_point(points.spot(item, own, level, call), weight, level, call.levels);
    }
    const CellWeights<Number> shares = cell_weights(point);

    Number products[4][kGroup] = {};
    for (int32_t strip = 0; strip < num_strips<T, Shape>(call); ++strip) {
      const Channels channels = channels_of_lane<T, Shape>(strip, call);
      const T* const first_cell = value + item.value + channels.first;
      typename Sum::Cell* const first_sum = grad_value.sums + item.value + channels.first;
      Number grads[kVector<T>];
      load_vector(grad_output + item.output + channels.first, channels.exist, grads);
#pragma unroll
      for (int owner = 0; owner < kGroup; ++owner) {
        if (round + owner >= count) break;
        const Cells<Number> cells = visit<Shape, kGroup>(point, shares, owner, round + owner, call.levels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          Number numbers[kVector<T>];
          load_vector(at_position(first_cell, cells.positions[corner], call), channels.exist, numbers);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            products[corner][owner] = fma(grads[i], numbers[i], products[corner][owner]);
          }
          if (channels.exist) {
            grad_value.add(at_position(first_sum, cells.positions[corner], call), cells.weights[corner], grads);
          }
        }
      }
    }

    Number own_products[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) own_products[corner] = transposed_sum<kGroup>(products[corner]);
    const PointSlopes<Number> slopes = point_slopes(point, own_products);
    points.template take_gradient<Shape>(item, own, slopes.spot, level, present, call);
    if (present) collector.add(weights, item, round, own, weight, slopes.weight);
  }
  collector.finish(weights, item, call);
}

}  // namespace hf_dino::cuda
