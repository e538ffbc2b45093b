// How the work is laid out over threads, and how one sampling point becomes four cells with their weights.
//
// An item is one (picture, query, head). A group of neighbouring lanes serves it: each lane owns 16 bytes of channels
// of every row that the item reads, so that a group reads a row of 32 channels in one piece. The points of an item are
// dealt out to its lanes in rounds: each lane sets up one point per round, and then all lanes of the group visit the
// points of the round together, told by shuffles where they are. Items out of range repeat the last one and keep
// nothing, because a shuffle needs all lanes of a warp.
#pragma once

#include "../levels.h"
#include "numbers.cuh"

namespace hf_dino::cuda {

constexpr int kThreads = 128;  // per block
constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename T>
constexpr int kLanes = sizeof(T) == 2 ? 4 : 8;  // of a group; T is the type of value

// Blocks that a multiprocessor can hold at least, which limits registers: to 64 and 128 (128 and 255 for float64).
// Without it, compilers strive for more blocks, spill a few registers, and have fewer loads under way per thread.
template <typename T>
constexpr int kForwardBlocks = sizeof(T) == 8 ? 4 : 8;
template <typename T>
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 2 : 4;

// The sizes of one call. A row is the num_heads * head_dim numbers of a position.
struct Call {
  Levels levels;
  int32_t sequence_length, num_queries, num_heads, head_dim;
  int32_t row_size;
  int32_t num_points;  // per level
  int32_t blocks_per_picture;
};

// The sizes that decide how loops are unrolled: known when compiling for DINO's usual ones, or read from the call.
struct UsualShape {
  static constexpr bool kFixed = true;
  static constexpr int32_t kHeadDim = 32, kLevelCount = 4, kPointCount = 4, kLogPointCount = 2;
  static __device__ constexpr int32_t head_dim(const Call&) { return kHeadDim; }
  static __device__ constexpr int32_t num_points(const Call&) { return kPointCount; }
  static __device__ constexpr int32_t points_per_head(const Call&) { return kLevelCount * kPointCount; }
};

struct AnyShape {
  static constexpr bool kFixed = false;
  static __device__ int32_t head_dim(const Call& call) { return call.head_dim; }
  static __device__ int32_t num_points(const Call& call) { return call.num_points; }
  static __device__ int32_t points_per_head(const Call& call) { return call.levels.count * call.num_points; }
};

template <int kGroup>
__device__ __forceinline__ int32_t lane_in_group() {
  return static_cast<int32_t>(threadIdx.x % kGroup);
}

template <int kGroup, typename Number>
__device__ __forceinline__ Number from_lane(Number number, int lane) {
  return __shfl_sync(kWholeWarp, number, lane, kGroup);
}

template <typename Number>
__device__ __forceinline__ Number from_opposite_lane(Number number, int distance) {
  return __shfl_xor_sync(kWholeWarp, number, distance);
}

// Each lane gets the sum over its aligned run of `count` lanes, a power of two.
template <typename Number>
__device__ __forceinline__ Number sum_over_lanes(Number number, int count) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) number += from_opposite_lane(number, distance);
  return number;
}

template <typename Number>
__device__ __forceinline__ Number maximum_over_lanes(Number number, int count) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) {
    const Number other = from_opposite_lane(number, distance);
    number = other > number ? other : number;
  }
  return number;
}

// The numbers of another position, given those of a picture's first one. Counted in bytes, because 64 bits plus two
// 32-bit factors are one instruction.
template <typename Number>
__device__ __forceinline__ Number* at_position(Number* first, int32_t position, const Call& call) {
  using Byte = std::conditional_t<std::is_const_v<Number>, const char, char>;
  const int64_t bytes = static_cast<int64_t>(position) * static_cast<int32_t>(call.row_size * sizeof(Number));
  return reinterpret_cast<Number*>(reinterpret_cast<Byte*>(first) + bytes);
}

// One (picture, query, head), by where its numbers begin.
struct Item {
  int64_t query;   // of (picture, query)
  int64_t points;  // first of its points, of all points of the call
  int64_t value;   // its head's channels at the picture's first position
  int64_t output;  // its channels in the output
  bool active;     // false where the block reaches beyond the last item
};

// Blocks do not straddle pictures: what differs within a picture fits into 32 bits.
template <typename Shape, int kGroup>
__device__ __forceinline__ Item this_item(const Call& call) {
  const uint32_t picture = blockIdx.x / static_cast<uint32_t>(call.blocks_per_picture);
  const uint32_t block = blockIdx.x - picture * call.blocks_per_picture;
  const uint32_t candidate = block * (kThreads / kGroup) + threadIdx.x / kGroup;
  const uint32_t last = static_cast<uint32_t>(call.num_queries) * call.num_heads - 1;
  const uint32_t within = min(candidate, last);
  const uint32_t query = within / static_cast<uint32_t>(call.num_heads);
  const int32_t head = static_cast<int32_t>(within - query * call.num_heads);

  Item item;
  item.query = static_cast<int64_t>(picture) * call.num_queries + query;
  const int64_t index = item.query * call.num_heads + head;
  item.points = index * Shape::points_per_head(call);
  item.value = static_cast<int64_t>(picture) * call.sequence_length * call.row_size + head * Shape::head_dim(call);
  item.output = index * Shape::head_dim(call);
  item.active = candidate <= last;
  return item;
}

// Where a point lies, in cells: (0, 0) is the centre of its map's first cell.
template <typename Number>
struct Spot {
  Number x, y;
};

// Two neighbouring cells along one axis, both inside the map, and the shares that a position takes of them. A position
// beyond the centre of an outermost cell takes its share of that cell and nothing of the other. A map that is one cell
// long has the cell twice, the second time with share zero.
template <typename Number>
struct Neighbours {
  int32_t first_cell;
  Number first, second;              // shares
  Number first_slope, second_slope;  // how the shares change with the position
};

template <typename Number>
__device__ __forceinline__ Neighbours<Number> neighbours(Number position, int32_t length) {
  const Number below = floor(position);
  const Number fraction = position - below;
  const int32_t left = static_cast<int32_t>(below);
  const bool has_left = left >= 0, has_right = left + 1 < length;
  const Number left_share = has_left ? 1 - fraction : Number(0), right_share = has_right ? fraction : Number(0);
  const Number left_slope = has_left ? Number(-1) : Number(0), right_slope = has_right ? Number(1) : Number(0);
  const int32_t first_cell = min(max(left, 0), max(length - 2, 0));
  return first_cell == left
             ? Neighbours<Number>{first_cell, left_share, right_share, left_slope, right_slope}
             : Neighbours<Number>{first_cell, right_share, left_share, right_slope, left_slope};
}

template <typename Number>
__device__ __forceinline__ Number into_map(Number position, int32_t length) {
  return fmin(fmax(position, Number(0)), Number(length - 1));
}

// A point as the lane that owns it knows it. One that is not inside its map stands at the map's border with weight
// zero, or at its corner if it is not a number. So there is something to read, and the zeros that it adds to
// gradients, which cost less than asking each time, do not all meet in one cell.
template <typename Number>
struct Point {
  bool inside;
  int32_t level;
  int32_t cell;  // the position of the first of its four cells
  Neighbours<Number> x, y;
  Number weight;
};

template <typename Number>
__device__ __forceinline__ Point<Number> place_point(
    const Spot<Number>& spot, Number weight, int32_t level, const Levels& levels) {
  const int32_t width = levels.width[level], height = levels.height[level];
  Point<Number> point;
  // false for what is not a number, and what is true can be converted to an integer
  point.inside = spot.x >= -1 && spot.x < Number(width) && spot.y >= -1 && spot.y < Number(height);
  point.level = level;
  point.x = neighbours(point.inside ? spot.x : into_map(spot.x, width), width);
  point.y = neighbours(point.inside ? spot.y : into_map(spot.y, height), height);
  point.cell = levels.start[level] + point.y.first_cell * width + point.x.first_cell;
  point.weight = point.inside ? weight : Number(0);
  return point;
}

// Shares times the attention weight, of the four cells of a point, row by row.
template <typename Number>
struct CellWeights {
  Number numbers[4];
};

// The four cells of a point as all lanes of its group know them.
template <typename Number>
struct Cells {
  int32_t positions[4];
  Number weights[4];
};

template <typename Number>
__device__ __forceinline__ CellWeights<Number> cell_weights(const Point<Number>& point) {
  const Number upper = point.weight * point.y.first, lower = point.weight * point.y.second;
  return {{upper * point.x.first, upper * point.x.second, lower * point.x.first, lower * point.x.second}};
}

// What lane `owner` of each group knows about its point, whose number within the item is `index`.
template <typename Shape, int kGroup, typename Number>
__device__ __forceinline__ Cells<Number> visit(
    const Point<Number>& point, const CellWeights<Number>& weights, int owner, int32_t index, const Levels& levels) {
  const int32_t level = Shape::kFixed ? index / UsualShape::kPointCount : from_lane<kGroup>(point.level, owner);
  const int32_t right = levels.width[level] > 1, below = levels.height[level] > 1 ? levels.width[level] : 0;
  const int32_t first = from_lane<kGroup>(point.cell, owner);
  Cells<Number> cells{{first, first + right, first + below, first + below + right}, {}};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    cells.weights[corner] = from_lane<kGroup>(weights.numbers[corner], owner);
  }
  return cells;
}

// A head's channels are whole vectors. Its lanes take one each, and go on to the next strip if there are more.
template <typename T, typename Shape>
__device__ __forceinline__ int32_t num_strips(const Call& call) {
  constexpr int32_t kWidth = kLanes<T> * kVector<T>;
  return (Shape::head_dim(call) + kWidth - 1) / kWidth;
}

struct Channels {
  int32_t first;
  bool exist;  // false for lanes beyond the end of the last strip
};

template <typename T, typename Shape>
__device__ __forceinline__ Channels channels_of_lane(int32_t strip, const Call& call) {
  const int32_t first = (strip * kLanes<T> + lane_in_group<kLanes<T>>()) * kVector<T>;
  return {first, first < Shape::head_dim(call)};
}

}  // namespace hf_dino::cuda
