// The forward pass: each group of lanes reads the cells of its work item's points and adds them up in registers. There
// is no shared memory and no barrier; the loads of a round do not depend on one another, so that many are in flight.
#pragma once

#include "sampling_points.cuh"

namespace hf_dino::cuda {

template <typename T, typename Shape, typename Points, typename Weights>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T>) forward_kernel(
    const __grid_constant__ KernelParams params, const T* value, const Points points, Weights weights, T* output) {
  using C = compute_t<T>;
  constexpr int kGroup = kGroupSize<T>;
  const int32_t lane = lane_in_group<kGroup>(), count = Shape::points_per_head(params);
  const WorkItem item = current_work_item<Shape, kGroup>(params);
  weights.template prepare<Shape, kGroup>(item, params);

  for (int32_t channel_tile = 0; channel_tile < num_channel_tiles<T, Shape>(params); ++channel_tile) {
    const Channels channels = channels_of_lane<T, Shape>(channel_tile, params);
    const T* const first_position = value + item.value + channels.first;
    C sums[kVecSize<T>] = {};
#pragma unroll
    for (int32_t round = 0; round < count; round += kGroup) {
      // each lane computes the point `own` of this round ...
      const int32_t own = round + lane;
      SamplePoint<C> point{};
      if (own < count) {
        const int32_t level = own / Shape::num_points(params);
        const C weight = weights.load_weight(item, own);
        if (channel_tile == 0 && item.active) weights.store_weight(item, own, weight);
        point = sample_point(points.position(item, own, level, params), weight, level, params.levels);
      }
      const CornerWeights<C> corners = corner_weights(point);
      // ... and its channels of all points of this round
#pragma unroll(Shape::kStatic ? kGroup : 2)
      for (int source_lane = 0; source_lane < min(kGroup, count - round); ++source_lane) {
        const CornerCells<C> cells =
            broadcast_point<Shape, kGroup>(point, corners, source_lane, round + source_lane, params.levels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          C numbers[kVecSize<T>];
          load_channels(at_position(first_position, cells.positions[corner], params), channels.exist, numbers);
#pragma unroll
          for (int i = 0; i < kVecSize<T>; ++i) sums[i] = fma(cells.weights[corner], numbers[i], sums[i]);
        }
      }
    }
    if (item.active && channels.exist) store_channels(output + item.output + channels.first, sums);
  }
}

}  // namespace hf_dino::cuda
