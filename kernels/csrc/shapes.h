// Where the feature levels lie in `value`; small enough to be an argument of a CUDA kernel.
#pragma once

#include <cstdint>

namespace hf_dino {

constexpr int32_t kMaxLevels = 32;

struct Levels {
  int32_t count;
  int32_t height[kMaxLevels];
  int32_t width[kMaxLevels];
  int32_t start[kMaxLevels];  // the position of the level's first cell
};

}  // namespace hf_dino
