// The backward pass, mapped as the forward pass is. Each group of lanes reads the cells of its points once more. A
// lane adds its channels' share of the gradient to each cell, and multiplies its channels of the cell by the output's
// gradient. Those products are then summed over the group in such a way that each lane ends up with the points that it
// owns, and writes their gradients: no shared memory, no barrier, and nothing but the cells has to be zero at first.
#pragma once

#include "sampling_points.cuh"
#include "accumulators.cuh"

namespace hf_dino::cuda {

// Collects the gradients of an item's attention weights, as its lanes find them round by round.
template <typename P>
struct WeightsGradient {
  const P* weights;
  P* gradient;

  template <typename Shape, int kGroup>
  struct Collector {
    __device__ __forceinline__ void add(
        const WeightsGradient& all, const WorkItem& item, int32_t, int32_t own, compute_t<P>, compute_t<P> slope) {
      all.gradient[item.points + own] = from_compute<P>(slope);
    }

    __device__ __forceinline__ void finish(const WeightsGradient&, const WorkItem&, const KernelParams&) {}
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
    compute_t<P> slopes[Shape::kStatic ? StaticShape::kLevelCount * StaticShape::kPointCount / kGroup : 1];
    compute_t<P> total = 0;

    __device__ __forceinline__ void add(
        const LogitsGradient& all, const WorkItem& item, int32_t round, int32_t own, compute_t<P> weight,
        compute_t<P> slope) {
      if (all.grad_weights != nullptr) slope += to_compute(load(all.grad_weights + item.points + own));
      total = fma(weight, slope, total);
      if constexpr (Shape::kStatic) {
        slopes[round / kGroup] = slope;
      } else {
        static_assert(std::is_same_v<P, compute_t<P>>, "waiting must not round");
        all.gradient[item.points + own] = slope;
      }
    }

    __device__ __forceinline__ void finish(const LogitsGradient& all, const WorkItem& item, const KernelParams& params) {
      total = sum_over_lanes(total, kGroup);
      const int32_t count = Shape::points_per_head(params), lane = lane_in_group<kGroup>();
#pragma unroll
      for (int32_t round = 0; round < count; round += kGroup) {
        const int32_t own = round + lane;
        if (own >= count || !item.active) continue;
        P* const place = all.gradient + item.points + own;
        const compute_t<P> weight = to_compute(load(all.weights + item.points + own));
        if constexpr (Shape::kStatic) {
          *place = from_compute<P>(weight * (slopes[round / kGroup] - total));
        } else {
          *place = weight * (*place - total);
        }
      }
    }
  };
};

// Lane j of a group gets the sum over its lanes of numbers[j]. Each step halves what a lane has to sum: kGroup - 1
// shuffles in all, instead of kGroup * log2(kGroup).
template <int kGroup, typename C>
__device__ __forceinline__ C transposed_sum(C (&numbers)[kGroup]) {
  const int32_t lane = lane_in_group<kGroup>();
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const C mine = upper ? numbers[i + half] : numbers[i];
      const C theirs = upper ? numbers[i] : numbers[i + half];
      numbers[i] = mine + from_opposite_lane(theirs, half);
    }
  }
  return numbers[0];
}

// The gradients of one point, given the products of the output's gradient with its four cells, row by row.
template <typename C>
struct PointGrads {
  C weight;
  Position<C> position;
};

template <typename C>
__device__ __forceinline__ PointGrads<C> point_grads(const SamplePoint<C>& point, const C (&products)[4]) {
  if (!point.inside) return {};
  const AxisWeights<C>&x = point.x, &y = point.y;
  const C upper = x.first * products[0] + x.second * products[1];
  const C lower = x.first * products[2] + x.second * products[3];
  const C drow0 = x.dw0 * products[0] + x.dw1 * products[1];
  const C drow1 = x.dw0 * products[2] + x.dw1 * products[3];
  return {
      y.first * upper + y.second * lower,
      {point.weight * (y.first * drow0 + y.second * drow1),
       point.weight * (y.dw0 * upper + y.dw1 * lower)}};
}

template <typename T, typename Shape, typename Points, typename Weights, typename Sum>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T>) backward_kernel(
    const __grid_constant__ KernelParams params, const T* grad_output, const T* value, const Points points,
    const Weights weights, Sum grad_value) {
  using C = compute_t<T>;
  constexpr int kGroup = kGroupSize<T>;
  const int32_t lane = lane_in_group<kGroup>(), count = Shape::points_per_head(params);
  const WorkItem item = current_work_item<Shape, kGroup>(params);
  typename Weights::template Collector<Shape, kGroup> collector;
  grad_value.prepare();

#pragma unroll
  for (int32_t round = 0; round < count; round += kGroup) {
    const int32_t own = round + lane;
    const bool present = own < count && item.active;
    const int32_t level = present ? own / Shape::num_points(params) : 0;
    C weight = 0;
    SamplePoint<C> point{};
    if (present) {
      weight = to_compute(load(weights.weights + item.points + own));
      point = locate_point(points.position(item, own, level, params), weight, level, params.levels);
    }
    const CornerWeights<C> shares = corner_weights(point);

    C products[4][kGroup] = {};
    for (int32_t channel_tile = 0; channel_tile < num_channel_tiles<T, Shape>(params); ++channel_tile) {
      const Channels channels = channels_of_lane<T, Shape>(channel_tile, params);
      const T* const cell0 = value + item.value + channels.first;
      typename Sum::Cell* const first_sum = grad_value.sums + item.value + channels.first;
      C grads[kVecSize<T>];
      load_vector(grad_output + item.output + channels.first, channels.exist, grads);
#pragma unroll
      for (int source_lane = 0; source_lane < kGroup; ++source_lane) {
        if (round + source_lane >= count) break;
        const CornerCells<C> cells = broadcast_point<Shape, kGroup>(point, shares, source_lane, round + source_lane, params.levels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          C numbers[kVecSize<T>];
          load_vector(at_position(cell0, cells.positions[corner], params), channels.exist, numbers);
#pragma unroll
          for (int i = 0; i < kVecSize<T>; ++i) {
            products[corner][source_lane] = fma(grads[i], numbers[i], products[corner][source_lane]);
          }
          if (channels.exist) {
            grad_value.add(at_position(first_sum, cells.positions[corner], params), cells.weights[corner], grads);
          }
        }
      }
    }

    C own_products[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) own_products[corner] = transposed_sum<kGroup>(products[corner]);
    const PointGrads<C> slopes = point_grads(point, own_products);
    points.template take_gradient<Shape>(item, own, slopes.position, level, present, params);
    if (present) collector.add(weights, item, round, own, weight, slopes.weight);
  }
  collector.finish(weights, item, params);
}

}  // namespace hf_dino::cuda
