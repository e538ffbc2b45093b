// bfloat16 as CUDA names it; see cuda_runtime.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 number) { return c10::detail::f32_from_bits(number.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float number) { return {c10::detail::round_to_nearest_even(number)}; }
