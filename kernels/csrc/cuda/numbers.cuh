// Numbers as they lie in memory and as they are computed with: 16-bit ones in 32 bits, the others in their own type.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hf_dino::cuda {

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float number) { return number; }
__device__ __forceinline__ double widen(double number) { return number; }
__device__ __forceinline__ float widen(__half number) { return __half2float(number); }
__device__ __forceinline__ float widen(__nv_bfloat16 number) { return __bfloat162float(number); }

template <typename T>
__device__ __forceinline__ T narrow(Compute<T> number) {
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

// What one lane reads at once: 16 bytes of channels.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T numbers[kVector<T>];
};

// Through the read-only cache, as one instruction where Packed is a Pair or a Vector.
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

// `wanted` false reads nothing and gives zeros.
template <typename T>
__device__ __forceinline__ void load_vector(const T* pointer, bool wanted, Compute<T> (&numbers)[kVector<T>]) {
  const Vector<T> vector = wanted ? load(reinterpret_cast<const Vector<T>*>(pointer)) : Vector<T>{};
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // it is the upper half of a float: one instruction each, where conversion one by one takes two
    unsigned pairs[4];
    memcpy(pairs, &vector, sizeof(pairs));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = __uint_as_float(pairs[i] << 16);
      numbers[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) numbers[i] = widen(vector.numbers[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store_vector(T* pointer, const Compute<T> (&numbers)[kVector<T>]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) vector.numbers[i] = narrow<T>(numbers[i]);
  *reinterpret_cast<Vector<T>*>(pointer) = vector;
}

}  // namespace hf_dino::cuda
