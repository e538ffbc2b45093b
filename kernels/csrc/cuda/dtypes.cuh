// Numbers in memory (T, P) and as they are computed with (C): 16-bit ones in 32 bits, the others in their own type.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hf_dino::cuda {

template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_compute(float number) { return number; }
__device__ __forceinline__ double to_compute(double number) { return number; }
__device__ __forceinline__ float to_compute(__half number) { return __half2float(number); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 number) { return __bfloat162float(number); }

template <typename T>
__device__ __forceinline__ T from_compute(compute_t<T> number) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(number);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(number);
  } else {
    return number;
  }
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

// The channels that one lane reads at once: 16 bytes.
template <typename T>
constexpr int kVecSize = 16 / sizeof(T);

template <typename T>
struct alignas(16) PackedChannels {
  T numbers[kVecSize<T>];
};

// Loads through the read-only cache, in one instruction for a number, a Pair or PackedChannels.
template <typename Packed>
__device__ __forceinline__ Packed load(const Packed* pointer) {
  constexpr size_t kSize = sizeof(Packed);
  using Small = std::conditional_t<kSize == 4, unsigned, unsigned short>;
  using Word = std::conditional_t<kSize == 16, uint4, std::conditional_t<kSize == 8, uint2, Small>>;
  static_assert(sizeof(Word) == kSize);
  const Word bits = __ldg(reinterpret_cast<const Word*>(pointer));
  Packed packed;
  memcpy(&packed, &bits, sizeof(Packed));
  return packed;
}

template <typename T>
__device__ __forceinline__ Pair<T> load_pair(const T* pointer) {
  return load(reinterpret_cast<const Pair<T>*>(pointer));
}

// Without `exist`, reads nothing and returns zeros.
template <typename T>
__device__ __forceinline__ void load_channels(const T* pointer, bool exist, compute_t<T> (&numbers)[kVecSize<T>]) {
  using Packed = PackedChannels<T>;
  const Packed packed = exist ? load(reinterpret_cast<const Packed*>(pointer)) : Packed{};
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // bfloat16 is the upper half of a float: one instruction each, where conversion one by one takes two
    unsigned pairs[4];
    memcpy(pairs, &packed, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = __uint_as_float(pairs[i] << 16);
      numbers[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVecSize<T>; ++i) numbers[i] = to_compute(packed.numbers[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store_channels(T* pointer, const compute_t<T> (&numbers)[kVecSize<T>]) {
  PackedChannels<T> packed;
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) packed.numbers[i] = from_compute<T>(numbers[i]);
  *reinterpret_cast<PackedChannels<T>*>(pointer) = packed;
}

}  // namespace hf_dino::cuda
