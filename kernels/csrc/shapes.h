// The sizes of one call. Free of PyTorch, so that the kernels of every backend can include it.
#pragma once

#include <cstdint>

namespace hf_dino {

constexpr int32_t kMaxLevels = 32;

// Where the feature levels lie in `value`. Small enough to be an argument of a CUDA kernel.
struct Levels {
  int32_t count;
  int32_t height[kMaxLevels];  // in cells
  int32_t width[kMaxLevels];
  int32_t start[kMaxLevels];  // position of the level's first cell in the sequence
};

struct AttentionShapes {
  int64_t batch_size, sequence_length, num_heads, head_dim;  // of value
  int64_t num_queries, num_points;                           // points per level
  Levels levels;

  int64_t points_per_head() const { return levels.count * num_points; }
  int64_t num_rows() const { return batch_size * num_queries * num_heads; }
};

}  // namespace hf_dino
