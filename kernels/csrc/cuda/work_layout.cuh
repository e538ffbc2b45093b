// How the work is laid out over threads.
//
// A work item is one (image, query, head). A group of neighboring lanes serves it: each lane owns 16 bytes of channels
// of every cell that the item reads, so that a group reads a row of 32 channels in one piece. The points of an item are
// dealt out to its lanes in rounds: each lane computes the cells and weights of one point per round, and then all lanes
// of the group read the points of the round together, told by shuffles where they are. Work items out of range repeat
// the last one and store nothing, because a shuffle needs all lanes of a warp.
#pragma once

#include "../shapes.h"
#include "dtypes.cuh"

namespace hf_dino::cuda {

constexpr int kThreads = 128;  // per block
constexpr unsigned kFullWarp = 0xffffffffu;

// Lanes of a group; T is the dtype of value.
template <typename T>
constexpr int kGroupSize = sizeof(T) == 2 ? 4 : 8;

// Blocks that a multiprocessor can hold at least, which limits registers: to 64 and 128 (128 and 255 for float64).
// Without it, compilers aim at more blocks, spill a few registers, and have fewer loads in flight per thread.
template <typename T>
constexpr int kForwardBlocks = sizeof(T) == 8 ? 4 : 8;
template <typename T>
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 2 : 4;

// The sizes of one call, as an argument of kernels.
struct KernelParams {
  Levels levels;
  int32_t sequence_length, num_queries, num_heads, head_dim;
  int32_t row_size;    // num_heads * head_dim: the numbers of a position
  int32_t num_points;  // per level
  int32_t blocks_per_image;
};

// The sizes that decide how loops are unrolled: DINO's, known when compiling, or any, read from the parameters.
struct StaticShape {
  static constexpr bool kStatic = true;
  static constexpr int32_t kHeadDim = 32, kNumLevels = 4, kNumPoints = 4, kLogNumPoints = 2;
  static __device__ constexpr int32_t head_dim(const KernelParams&) { return kHeadDim; }
  static __device__ constexpr int32_t num_points(const KernelParams&) { return kNumPoints; }
  static __device__ constexpr int32_t points_per_head(const KernelParams&) { return kNumLevels * kNumPoints; }
};

struct DynamicShape {
  static constexpr bool kStatic = false;
  static __device__ int32_t head_dim(const KernelParams& params) { return params.head_dim; }
  static __device__ int32_t num_points(const KernelParams& params) { return params.num_points; }
  static __device__ int32_t points_per_head(const KernelParams& params) {
    return params.levels.count * params.num_points;
  }
};

template <int kGroup>
__device__ __forceinline__ int32_t lane_in_group() {
  return static_cast<int32_t>(threadIdx.x % kGroup);
}

template <int kGroup, typename C>
__device__ __forceinline__ C from_lane(C number, int lane) {
  return __shfl_sync(kFullWarp, number, lane, kGroup);
}

template <typename C>
__device__ __forceinline__ C from_opposite_lane(C number, int distance) {
  return __shfl_xor_sync(kFullWarp, number, distance);
}

// Each lane gets the sum over its aligned run of `count` lanes, a power of two.
template <typename C>
__device__ __forceinline__ C sum_over_lanes(C number, int count) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) number += from_opposite_lane(number, distance);
  return number;
}

template <typename C>
__device__ __forceinline__ C maximum_over_lanes(C number, int count) {
#pragma unroll
  for (int distance = count / 2; distance > 0; distance /= 2) {
    const C other = from_opposite_lane(number, distance);
    number = other > number ? other : number;
  }
  return number;
}

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

// The numbers of a position, given those of the first position of its image. Counted in bytes, because 64 bits plus a
// product of two 32-bit factors is one instruction.
template <typename Number>
__device__ __forceinline__ Number* at_position(Number* first, int32_t position, const KernelParams& params) {
  using Byte = std::conditional_t<std::is_const_v<Number>, const char, char>;
  const int64_t bytes = static_cast<int64_t>(position) * static_cast<int32_t>(params.row_size * sizeof(Number));
  return reinterpret_cast<Number*>(reinterpret_cast<Byte*>(first) + bytes);
}

// One (image, query, head), by the indices at which its numbers begin.
struct WorkItem {
  int64_t batch_query;  // of (image, query)
  int64_t points;       // its first point
  int64_t value;        // its head's channels at the first position of the image
  int64_t output;       // its channels in the output
  bool active;          // false where the block reaches beyond the last item
};

// A block serves one image only: what differs within an image fits into 32 bits.
template <typename Shape, int kGroup>
__device__ __forceinline__ WorkItem current_work_item(const KernelParams& params) {
  const uint32_t image = blockIdx.x / static_cast<uint32_t>(params.blocks_per_image);
  const uint32_t block = blockIdx.x - image * params.blocks_per_image;
  const uint32_t candidate = block * (kThreads / kGroup) + threadIdx.x / kGroup;
  const uint32_t last = static_cast<uint32_t>(params.num_queries) * params.num_heads - 1;
  const uint32_t within_image = min(candidate, last);
  const uint32_t query = within_image / static_cast<uint32_t>(params.num_heads);
  const int32_t head = static_cast<int32_t>(within_image - query * params.num_heads);

  WorkItem item;
  item.batch_query = static_cast<int64_t>(image) * params.num_queries + query;
  const int64_t index = item.batch_query * params.num_heads + head;
  item.points = index * Shape::points_per_head(params);
  item.value = static_cast<int64_t>(image) * params.sequence_length * params.row_size + head * Shape::head_dim(params);
  item.output = index * Shape::head_dim(params);
  item.active = candidate <= last;
  return item;
}

// A head's channels are whole vectors. Its lanes take one each, and go on to the next tile if there are more.
template <typename T, typename Shape>
__device__ __forceinline__ int32_t num_channel_tiles(const KernelParams& params) {
  constexpr int32_t kTileSize = kGroupSize<T> * kVecSize<T>;
  return (Shape::head_dim(params) + kTileSize - 1) / kTileSize;
}

struct Channels {
  int32_t first;
  bool exist;  // false for lanes beyond the end of the last tile
};

template <typename T, typename Shape>
__device__ __forceinline__ Channels channels_of_lane(int32_t channel_tile, const KernelParams& params) {
  const int32_t first = (channel_tile * kGroupSize<T> + lane_in_group<kGroupSize<T>>()) * kVecSize<T>;
  return {first, first < Shape::head_dim(params)};
}

}  // namespace hf_dino::cuda
