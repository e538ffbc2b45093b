// How the work is laid out over threads, and how one sampling point becomes four cells with their weights.
//
// An item is one (picture, query, head). A group of neighbouring lanes serves it: each lane owns 16 bytes of channels
// of every row that the item reads, so that a group reads a row of 32 channels in one piece. The points of an item are
// dealt out to its lanes in rounds: each lane sets up one point per round, and then all lanes of the group visit the
// points of the round together, told by shuffles where they are. Items out of range repeat the last one and keep
// nothing, because a shuffle needs all lanes of a warp.
#pragma once

#include "../shapes.h"
#include "dtypes.cuh"

namespace hf_dino::cuda {

constexpr int kThreads = 128;  // per block
constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename T>
constexpr int kGroupSize = sizeof(T) == 2 ? 4 : 8;  // of a group; T is the type of value

// Blocks that a multiprocessor can hold at least, which limits registers: to 64 and 128 (128 and 255 for float64).
// Without it, compilers strive for more blocks, spill a few registers, and have fewer loads under way per thread.
template <typename T>
constexpr int kForwardBlocks = sizeof(T) == 8 ? 4 : 8;
template <typename T>
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 2 : 4;

// The sizes of one call. A row is the num_heads * head_dim numbers of a position.
struct KernelParams {
  Levels levels;
  int32_t sequence_length, num_queries, num_heads, head_dim;
  int32_t row_size;
  int32_t num_points;  // per level
  int32_t blocks_per_image;
};

// The sizes that decide how loops are unrolled: known when compiling for DINO's usual ones, or read from the call.
struct StaticShape {
  static constexpr bool kStatic = true;
  static constexpr int32_t kHeadDim = 32, kLevelCount = 4, kPointCount = 4, kLogPointCount = 2;
  static __device__ constexpr int32_t head_dim(const KernelParams&) { return kHeadDim; }
  static __device__ constexpr int32_t num_points(const KernelParams&) { return kPointCount; }
  static __device__ constexpr int32_t points_per_head(const KernelParams&) { return kLevelCount * kPointCount; }
};

struct DynamicShape {
  static constexpr bool kStatic = false;
  static __device__ int32_t head_dim(const KernelParams& params) { return params.head_dim; }
  static __device__ int32_t num_points(const KernelParams& params) { return params.num_points; }
  static __device__ int32_t points_per_head(const KernelParams& params) { return params.levels.count * params.num_points; }
};

template <int kGroup>
__device__ __forceinline__ int32_t lane_in_group() {
  return static_cast<int32_t>(threadIdx.x % kGroup);
}

template <int kGroup, typename C>
__device__ __forceinline__ C from_lane(C x, int lane) {
  return __shfl_sync(kWholeWarp, x, lane, kGroup);
}

template <typename C>
__device__ __forceinline__ C from_opposite_lane(C x, int distance) {
  return __shfl_xor_sync(kWholeWarp, x, distance);
}

// Each lane gets the sum over its aligned run of `count` lanes, a power of two.
template <typename C>
__device__ __forceinline__ C sum_over_lanes(C x, int count) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) x += from_opposite_lane(x, distance);
  return x;
}

template <typename C>
__device__ __forceinline__ C maximum_over_lanes(C x, int count) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) {
    const C other = from_opposite_lane(x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// The numbers of another position, given those of a picture's first one. Counted in bytes, because 64 bits plus two
// 32-bit factors are one instruction.
template <typename C>
__device__ __forceinline__ C* at_position(C* first, int32_t position, const KernelParams& params) {
  using Byte = std::conditional_t<std::is_const_v<C>, const char, char>;
  const int64_t bytes = static_cast<int64_t>(position) * static_cast<int32_t>(params.row_size * sizeof(C));
  return reinterpret_cast<C*>(reinterpret_cast<Byte*>(first) + bytes);
}

// One (picture, query, head), by where its numbers begin.
struct WorkItem {
  int64_t query;   // of (picture, query)
  int64_t points;  // first of its points, of all points of the call
  int64_t value;   // its head's channels at the picture's first position
  int64_t output;  // its channels in the output
  bool active;     // false where the block reaches beyond the last item
};

// Blocks do not straddle pictures: what differs within a picture fits into 32 bits.
template <typename Shape, int kGroup>
__device__ __forceinline__ WorkItem current_work_item(const KernelParams& params) {
  const uint32_t image = blockIdx.x / static_cast<uint32_t>(params.blocks_per_image);
  const uint32_t block = blockIdx.x - image * params.blocks_per_image;
  const uint32_t candidate = block * (kThreads / kGroup) + threadIdx.x / kGroup;
  const uint32_t last = static_cast<uint32_t>(params.num_queries) * params.num_heads - 1;
  const uint32_t within = min(candidate, last);
  const uint32_t query = within / static_cast<uint32_t>(params.num_heads);
  const int32_t head = static_cast<int32_t>(within - query * params.num_heads);

  WorkItem item;
  item.query = static_cast<int64_t>(image) * params.num_queries + query;
  const int64_t index = item.query * params.num_heads + head;
  item.points = index * Shape::points_per_head(params);
  item.value = static_cast<int64_t>(image) * params.sequence_length * params.row_size + head * Shape::head_dim(params);
  item.output = index * Shape::head_dim(params);
  item.active = candidate <= last;
  return item;
}

// Where a point lies, in cells: (0, 0) is the centre of its map's first cell.
template <typename C>
struct Position {
  C x, y;
};

// Two neighbouring cells along one axis, both inside the map, and the shares that a position takes of them. A position
// beyond the centre of an outermost cell takes its share of that cell and nothing of the other. A map that is one cell
// long has the cell twice, the second time with share zero.
template <typename C>
struct AxisWeights {
  int32_t cell0;
  C first, second;              // shares
  C dw0, dw1;  // how the shares change with the position
};

template <typename C>
__device__ __forceinline__ AxisWeights<C> neighbors(C position, int32_t length) {
  const C below = floor(position);
  const C fraction = position - below;
  const int32_t left = static_cast<int32_t>(below);
  const bool has_left = left >= 0, has_right = left + 1 < length;
  const C left_share = has_left ? 1 - fraction : C(0), right_share = has_right ? fraction : C(0);
  const C left_slope = has_left ? C(-1) : C(0), right_slope = has_right ? C(1) : C(0);
  const int32_t cell0 = min(max(left, 0), max(length - 2, 0));
  return cell0 == left
             ? AxisWeights<C>{cell0, left_share, right_share, left_slope, right_slope}
             : AxisWeights<C>{cell0, right_share, left_share, right_slope, left_slope};
}

template <typename C>
__device__ __forceinline__ C clamp_to_map(C position, int32_t length) {
  return fmin(fmax(position, C(0)), C(length - 1));
}

// A point as the lane that owns it knows it. One that is not inside its map stands at the map's border with weight
// zero, or at its corner if it is not a number. So there is something to read, and the zeros that it adds to
// gradients, which cost less than asking each time, do not all meet in one cell.
template <typename C>
struct SamplePoint {
  bool inside;
  int32_t level;
  int32_t cell;  // the position of the first of its four cells
  AxisWeights<C> x, y;
  C weight;
};

template <typename C>
__device__ __forceinline__ SamplePoint<C> locate_point(
    const Position<C>& position, C weight, int32_t level, const Levels& levels) {
  const int32_t width = levels.width[level], height = levels.height[level];
  SamplePoint<C> point;
  // false for what is not a number, and what is true can be converted to an integer
  point.inside = position.x >= -1 && position.x < C(width) && position.y >= -1 && position.y < C(height);
  point.level = level;
  point.x = neighbors(point.inside ? position.x : clamp_to_map(position.x, width), width);
  point.y = neighbors(point.inside ? position.y : clamp_to_map(position.y, height), height);
  point.cell = levels.start[level] + point.y.cell0 * width + point.x.cell0;
  point.weight = point.inside ? weight : C(0);
  return point;
}

// Shares times the attention weight, of the four cells of a point, row by row.
template <typename C>
struct CornerWeights {
  C numbers[4];
};

// The four cells of a point as all lanes of its group know them.
template <typename C>
struct CornerCells {
  int32_t positions[4];
  C weights[4];
};

template <typename C>
__device__ __forceinline__ CornerWeights<C> corner_weights(const SamplePoint<C>& point) {
  const C upper = point.weight * point.y.first, lower = point.weight * point.y.second;
  return {{upper * point.x.first, upper * point.x.second, lower * point.x.first, lower * point.x.second}};
}

// What lane `owner` of each group knows about its point, whose number within the item is `index`.
template <typename Shape, int kGroup, typename C>
__device__ __forceinline__ CornerCells<C> broadcast_point(
    const SamplePoint<C>& point, const CornerWeights<C>& weights, int source_lane, int32_t index, const Levels& levels) {
  const int32_t level = Shape::kStatic ? index / StaticShape::kPointCount : from_lane<kGroup>(point.level, source_lane);
  const int32_t right = levels.width[level] > 1, below = levels.height[level] > 1 ? levels.width[level] : 0;
  const int32_t first = from_lane<kGroup>(point.cell, source_lane);
  CornerCells<C> cells{{first, first + right, first + below, first + below + right}, {}};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    cells.weights[corner] = from_lane<kGroup>(weights.numbers[corner], source_lane);
  }
  return cells;
}

// A head's channels are whole vectors. Its lanes take one each, and go on to the next strip if there are more.
template <typename T, typename Shape>
__device__ __forceinline__ int32_t num_channel_tiles(const KernelParams& params) {
  constexpr int32_t kWidth = kGroupSize<T> * kVecSize<T>;
  return (Shape::head_dim(params) + kWidth - 1) / kWidth;
}

struct Channels {
  int32_t first;
  bool exist;  // false for lanes beyond the end of the last strip
};

template <typename T, typename Shape>
__device__ __forceinline__ Channels channels_of_lane(int32_t channel_tile, const KernelParams& params) {
  const int32_t first = (channel_tile * kGroupSize<T> + lane_in_group<kGroupSize<T>>()) * kVecSize<T>;
  return {first, first < Shape::head_dim(params)};
}

}  // namespace hf_dino::cuda
