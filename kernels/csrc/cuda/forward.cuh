// The forward pass: each group of lanes reads the cells of its item's points and adds them up in registers.
#pragma once

#include "points.cuh"

namespace hf_dino::cuda {

template <typename T, typename Shape, typename Points, typename Weights>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T>) forward_kernel(
    const __grid_constant__ Call call, const T* value, const Points points, Weights weights, T* output) {
  using Number = Compute<T>;
  constexpr int kGroup = kLanes<T>;
  const int32_t lane = lane_in_group<kGroup>(), count = Shape::points_per_head(call);
  const Item item = this_item<Shape, kGroup>(call);
  weights.template prepare<Shape, kGroup>(item, call);

  for (int32_t strip = 0; strip < num_strips<T, Shape>(call); ++strip) {
    const Channels channels = channels_of_lane<T, Shape>(strip, call);
    const T* const first_cell = value + item.value + channels.first;
    Number sum[kVector<T>] = {};
#pragma unroll
    for (int32_t round = 0; round < count; round += kGroup) {
      const int32_t own = round + lane;
      Point<Number> point{};
      if (own < count) {
        const int32_t level = own / Shape::num_points(call);
        const Number weight = weights.read(item, own);
        if (strip == 0 && item.active) weights.keep(item, own, weight);
        point = place_point(points.spot(item, own, level, call), weight, level, call.levels);
      }
      const CellWeights<Number> shares = cell_weights(point);
#pragma unroll(Shape::kFixed ? kGroup : 2)
      for (int owner = 0; owner < min(kGroup, count - round); ++owner) {
        const Cells<Number> cells = visit<Shape, kGroup>(point, shares, owner, round + owner, call.levels);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          Number numbers[kVector<T>];
          load_vector(at_position(first_cell, cells.positions[corner], call), channels.exist, numbers);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) sum[i] = fma(cells.weights[corner], numbers[i], sum[i]);
        }
      }
    }
    if (item.active && channels.exist) store_vector(output + item.output + channels.first, sum);
  }
}

}  // namespace hf_dino::cuda
