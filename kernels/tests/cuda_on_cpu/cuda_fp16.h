// float16 as CUDA names it; see cuda_runtime.h.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half number) { return c10::detail::fp16_ieee_to_fp32_value(number.bits); }
inline __half __float2half_rn(float number) { return {c10::detail::fp16_ieee_from_fp32_value(number)}; }
