// The backward pass, laid out as the forward pass. Each group of lanes reads the cells of its points once more. A lane
// adds its channels' share of the output's gradient to each cell, and multiplies its channels of the cell by the
// output's gradient. These products are then summed over the group in such a way that each lane ends up with the dot
// products of the points that it owns, and stores their gradients: no shared memory, no barrier, and nothing but the
// cells has to be zero at first.
#pragma once

#include "accumulators.cuh"
#include "sampling_points.cuh"

namespace hf_dino::cuda {

// Stores the gradients of a work item's attention weights, as its lanes find them round by round.
template <typename P>
struct WeightsGradient {
  const P* weights;
  P* grad_weights;

  template <typename Shape, int kGroup>
  struct Collector {
    __device__ __forceinline__ void add(
        const WeightsGradient& all, const WorkItem& item, int32_t, int32_t own, compute_t<P>, compute_t<P> grad) {
      all.grad_weights[item.points + own] = from_compute<P>(grad);
    }

    __device__ __forceinline__ void finish(const WeightsGradient&, const WorkItem&, const KernelParams&) {}
  };
};

// The same where the weights w are the softmax of logits. The gradient of the logits is w * (g - sum(w * g)), where g
// is the gradient of the weights.
template <typename P>
struct LogitsGradient {
  const P* weights;
  const P* grad_from_weights;  // what reaches the weights other than through the sampling, or null
  P* grad_logits;

  template <typename Shape, int kGroup>
  struct Collector {
    // Until the sum is known, the gradients of the weights wait in registers or, with a dynamic shape, in the output.
    compute_t<P> grads[Shape::kStatic ? StaticShape::kNumLevels * StaticShape::kNumPoints / kGroup : 1];
    compute_t<P> total = 0;

    __device__ __forceinline__ void add(
        const LogitsGradient& all, const WorkItem& item, int32_t round, int32_t own, compute_t<P> weight,
        compute_t<P> grad) {
      if (all.grad_from_weights != nullptr) grad += to_compute(load(all.grad_from_weights + item.points + own));
      total = fma(weight, grad, total);
      if constexpr (Shape::kStatic) {
        grads[round / kGroup] = grad;
      } else {
        static_assert(std::is_same_v<P, compute_t<P>>, "the output must hold the gradient without rounding");
        all.grad_logits[item.points + own] = grad;
      }
    }

    __device__ __forceinline__ void finish(
        const LogitsGradient& all, const WorkItem& item, const KernelParams& params) {
      total = sum_over_lanes(total, kGroup);
      const int32_t count = Shape::points_per_head(params), lane = lane_in_group<kGroup>();
#pragma unroll
      for (int32_t round = 0; round < count; round += kGroup) {
        const int32_t own = round + lane;
        if (own >= count || !item.active) continue;
        P* const to = all.grad_logits + item.points + own;
        const compute_t<P> weight = to_compute(load(all.weights + item.points + own));
        if constexpr (Shape::kStatic) {
          *to = from_compute<P>(weight * (grads[round / kGroup] - total));
        } else {
          *to = weight * (*to - total);
        }
      }
    }
  };
};

template <typename T, typename Shape, typename Points, typename Weights, typename Accumulator>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T>) backward_kernel(
    const __grid_constant__ KernelParams params, const T* grad_output, const T* value, const Points points,
    const Weights weights, Accumulator grad_value) {
  using C = compute_t<T>;
  constexpr int kGroup = kGroupSize<T>;
  const int32_t lane = lane_in_group<kGroup>(), count = Shape::points_per_head(params);
  const WorkItem item = current_work_item<Shape, kGroup>(params);
  typename Weights::template Collector<Shape, kGroup> collector;
  grad_value.prepare();

#pragma unroll
  for (int32_t round = 0; round < count; round += kGroup) {
    // each lane computes the point `own` of this round ...
    const int32_t own = round + lane;
    const bool present = own < count && item.active;
    const int32_t level = present ? own / Shape::num_points(params) : 0;
    C weight = 0;
    SamplePoint<C> point{};
    if (present) {
      weight = to_compute(load(weights.weights + item.points + own));
      point = sample_point(points.position(item, own, level, params), weight, level, params.levels);
    }
    const CornerWeights<C> corners = corner_weights(point);

    // ... and its channels of all points of this round
    C products[4][kGroup] = {};
    for (int32_t channel_tile = 0; channel_tile < num_channel_tiles<T, Shape>(params); ++channel_tile) {
      const Channels channels = channels_of_lane<T, Shape>(channel_tile, params);
      const T* const first_position = value + item.value + channels.first;
      typename Accumulator::Sum* const first_sum = grad_value.sums + item.value + channels.first;
      C grads[kVecSize<T>];
      load_channels(grad_output + item.output + channels.first, channels.exist, grads);
#pragma unroll
      for (int source_lane = 0; source_lane < kGroup; ++source_lane) {
        if (round + source_lane >= count) break;
        const CornerCells<C> cells =
            broadcast_point<Shape, kGroup>(point, corners, source_lane, round + source_lane, params.levels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          C numbers[kVecSize<T>];
          load_channels(at_position(first_position, cells.positions[corner], params), channels.exist, numbers);
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

    C dots[4];  // of the point `own`
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) dots[corner] = transposed_sum<kGroup>(products[corner]);
    const PointGrads<C> point_gradients = point_grads(point, dots);
    points.template store_grad<Shape>(item, own, point_gradients.position, level, present, params);
    if (present) collector.add(weights, item, round, own, weight, point_gradients.weight);
  }
  collector.finish(weights, item, params);
}

}  // namespace hf_dino::cuda
