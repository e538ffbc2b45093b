// How the gradient of value is summed: by many threads at once, and always in at least 32 bits. Sums of 16-bit numbers
// would lose a few percent at the coarse levels, whose cells are read a thousand times.
#pragma once

#include "work_layout.cuh"

namespace hf_dino::cuda {

__device__ __forceinline__ void atomic_add(double* sum, const double (&terms)[1]) { atomicAdd(sum, terms[0]); }

// One instruction for four numbers, from compute capability 9.0 on.
__device__ __forceinline__ void atomic_add(float* sum, const float (&terms)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(sum), make_float4(terms[0], terms[1], terms[2], terms[3]));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(sum + i, terms[i]);
#endif
}

// The fast way. The order of additions, and with it the last bits, differ from run to run.
template <typename C>
struct AtomicAccumulator {
  using Sum = C;
  Sum* sums;

  __device__ __forceinline__ void prepare() {}

  // Adds `weight` times the channels.
  template <int kCount>
  __device__ __forceinline__ void add(Sum* sum, C weight, const C (&channels)[kCount]) const {
    constexpr int kTerms = std::is_same_v<C, float> ? 4 : 1;
#pragma unroll
    for (int i = 0; i < kCount; i += kTerms) {
      C terms[kTerms];
#pragma unroll
      for (int j = 0; j < kTerms; ++j) terms[j] = weight * channels[i + j];
      atomic_add(sum + i, terms);
    }
  }
};

// The largest magnitude of the output's gradient, or of the attention weights, as the bits of a double. They order as
// magnitudes do, and those of NaN are above all others.
using Magnitude = unsigned long long;

// The deterministic way: sums of 64-bit integers, which do not depend on their order, in units of a power of two. The
// unit is as small as it can be without overflow: no bilinear weight is above one, so no term is above the product of
// the two largest magnitudes, and there are at most 2^log_terms terms. That leaves some 40 bits for a term, where a
// float has 24. The price is twice the memory, and no vector atomics.
template <typename C>
struct FixedPointAccumulator {
  using Sum = unsigned long long;
  Sum* sums;
  const Magnitude* largest;  // two
  int32_t log_terms;
  double inverse_scale, scale;  // the unit, and units per one; NaN where a magnitude is not finite, as the gradient is

  __device__ __forceinline__ void prepare() {
    const int32_t first = static_cast<int32_t>(largest[0] >> 52), second = static_cast<int32_t>(largest[1] >> 52);
    if (first == 2047 || second == 2047) {
      inverse_scale = scale = NAN;
      return;
    }
    // a magnitude with the exponent bits e is below 2^(e - 1022)
    const int32_t exponent = min(max(62 - log_terms - (first - 1022) - (second - 1022), -1022), 1022);
    scale = __longlong_as_double(static_cast<long long>(1023 + exponent) << 52);
    inverse_scale = __longlong_as_double(static_cast<long long>(1023 - exponent) << 52);
  }

  template <int kCount>
  __device__ __forceinline__ void add(Sum* sum, C weight, const C (&channels)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const long long term = __double2ll_rn(static_cast<double>(weight * channels[i]) * scale);
      atomicAdd(sum + i, static_cast<Sum>(term));  // wraps around as signed numbers do
    }
  }

  __device__ __forceinline__ C read(int64_t offset) const {
    return static_cast<C>(static_cast<double>(static_cast<long long>(sums[offset])) * inverse_scale);
  }
};

// The two kernels before and after a backward pass that sums in fixed point. Each thread takes every n-th number, where
// n is the number of threads.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    largest_magnitude_kernel(const T* numbers, int64_t count, Magnitude* largest) {
  Magnitude found = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const double magnitude = fabs(static_cast<double>(to_compute(load(numbers + i))));
    found = max(found, static_cast<Magnitude>(__double_as_longlong(magnitude)));
  }
  found = maximum_over_lanes(found, 32);
  if (threadIdx.x % 32 == 0) atomicMax(largest, found);
}

template <typename C>
__global__ void __launch_bounds__(kThreads)
    read_fixed_point_kernel(FixedPointAccumulator<C> accumulator, int64_t count, C* numbers) {
  accumulator.prepare();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    numbers[i] = accumulator.read(i);
  }
}

}  // namespace hf_dino::cuda
