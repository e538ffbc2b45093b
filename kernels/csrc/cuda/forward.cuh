// The forward pass: each group of lanes reads the cells of its item's points and adds them up in registers.
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
    const T* const cell0 = value + item.value + channels.first;
    C sum[kVecSize<T>] = {};
#pragma unroll
    for (int32_t round = 0; round < count; round += kGroup) {
      const int32_t own = round + lane;
      SamplePoint<C> point{};
      if (own < count) {
        const int32_t level = own / Shape::num_points(params);
        const C weight = weights.read(item, own);
        if (channel_tile == 0 && item.active) weights.store(item, own, weight);
        point = locate_point(points.position(item, own, level, params), weight, level, params.levels);
      }
      const CornerWeights<C> shares = corner_weights(point);
#pragma unroll(Shape::kStatic ? kGroup : 2)
      for (int source_lane = 0; source_lane < min(kGroup, count - round); ++source_lane) {
        const CornerCells<C> cells = broadcast_point<Shape, kGroup>(point, shares, source_lane, round + source_lane, params.levels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          C numbers[kVecSize<T>];
          load_vector(at_position(cell0, cells.positions[corner], params), channels.exist, numbers);
#pragma unroll
          for (int i = 0; i < kVecSize<T>; ++i) sum[i] = fma(cells.weights[corner], numbers[i], sum[i]);
        }
      }
    }
    if (item.active && channels.exist) store_vector(output + item.output + channels.first, sum);
  }
}

}  // namespace hf_dino::cuda
