// Vectors as wide as the file that includes this says (HF_DINO_VECTOR_BYTES), in the vector extension of GCC and Clang:
// one text for AVX-512, AVX2 and every other architecture. Everything is in an unnamed namespace, so that no linker can
// take a function that was compiled for a newer processor in place of its namesake.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernel_args.h"

namespace {

using hf_dino::BFloat16;
using hf_dino::Half;

template <class Scalar, int kBytes>
struct VecOf {
  typedef Scalar type __attribute__((vector_size(kBytes)));
};

// The integers beside a number of the same size: indices and masks.
template <class Scalar>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

template <class Scalar>
constexpr int kSimdLanes = HF_DINO_VEC_BYTES / sizeof(Scalar);
template <class Scalar>
using Vec = typename VecOf<Scalar, HF_DINO_VEC_BYTES>::type;
template <class Scalar>
using Int = typename IntOf<Scalar>::type;
template <class Scalar>
using IntVec = typename VecOf<Int<Scalar>, HF_DINO_VEC_BYTES>::type;

// The same bits as another vector of the same size.
template <class To, class From>
inline To bit_cast(From vector) {
  return (To)vector;  // what a cast between vectors means, in this spelling only
}

// ---- numbers of 16 bits, one at a time ----

inline float to_compute(BFloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline float to_compute(Half number) {
  const uint32_t sign = (number.bits & 0x8000u) << 16, exponent = (number.bits >> 10) & 0x1fu;
  const uint32_t fraction = number.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24, exact in 32 bits
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 0x1f ? 0xffu : exponent + 112;
  const uint32_t bits = sign | (wide_exponent << 23) | (fraction << 13);
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void from_compute(float number, BFloat16* result) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  result->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void from_compute(float number, Half* result) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint16_t rounded;
  if (magnitude > 0x7f800000u) {
    rounded = 0x7e00;  // not a number
  } else if (magnitude >= 0x47800000u) {
    rounded = 0x7c00;  // 2^16 and more
  } else if (magnitude < 0x38800000u) {  // below 2^-14: let an addition round to a multiple of 2^-24
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    uint32_t sum;
    std::memcpy(&sum, &value, sizeof sum);
    rounded = static_cast<uint16_t>(sum - 0x3f000000u);
  } else {  // to the nearest, ties to even; the carry may make it infinite, as it should
    rounded = static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  }
  result->bits = sign | rounded;
}

inline float to_compute(float number) { return number; }
inline double to_compute(double number) { return number; }
inline void from_compute(float number, float* result) { *result = number; }
inline void from_compute(double number, double* result) { *result = number; }

// ---- numbers of 16 bits, a vector at a time ----

inline Vec<float> load(const float* from) {
  Vec<float> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Vec<double> load(const double* from) {
  Vec<double> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Vec<float> load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC 12 makes more of the general form than this one instruction
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bit_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
#elif defined(__AVX2__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return bit_cast<Vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
#else
  typename VecOf<uint16_t, HF_DINO_VEC_BYTES / 2>::type narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  using Wide = typename VecOf<uint32_t, HF_DINO_VEC_BYTES>::type;
  return bit_cast<Vec<float>>(__builtin_convertvector(narrow, Wide) << 16);
#endif
}

inline Vec<float> load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec<float> result{};
  for (int lane = 0; lane < kSimdLanes<float>; ++lane) result[lane] = to_compute(from[lane]);
  return result;
#endif
}

inline void store(float* to, Vec<float> vector) { std::memcpy(to, &vector, sizeof vector); }
inline void store(double* to, Vec<double> vector) { std::memcpy(to, &vector, sizeof vector); }

inline void store(BFloat16* to, Vec<float> vector) {
  using Wide = typename VecOf<uint32_t, HF_DINO_VEC_BYTES>::type;
  using Narrow = typename VecOf<uint16_t, HF_DINO_VEC_BYTES / 2>::type;
  const Wide bits = bit_cast<Wide>(vector);
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide is_number = bit_cast<Wide>(vector == vector);
  const Narrow narrow = __builtin_convertvector((rounded & is_number) | (0x7fc0u & ~is_number), Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Half* to, Vec<float> vector) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kSimdLanes<float>; ++lane) from_compute(vector[lane], to + lane);
#endif
}

inline IntVec<float> load(const int32_t* from) {
  IntVec<float> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline IntVec<double> load(const int64_t* from) {
  IntVec<double> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline void store(int32_t* to, IntVec<float> vector) { std::memcpy(to, &vector, sizeof vector); }
inline void store(int64_t* to, IntVec<double> vector) { std::memcpy(to, &vector, sizeof vector); }

// ---- arithmetic that the language does not have ----

// `numbers` where the mask is set, else zero.
template <class V, class M>
inline V mask_and(M mask, V numbers) {
  return bit_cast<V>(bit_cast<M>(numbers) & mask);
}

template <class V, class M>
inline V blend(M mask, V yes, V no) {
  return bit_cast<V>((bit_cast<M>(yes) & mask) | (bit_cast<M>(no) & ~mask));
}

template <class Scalar>
inline Vec<Scalar> broadcast(Scalar number) {
  return number - Vec<Scalar>{};
}

// Reads lane `index(i)` of a, followed by b, into lane i. Both compilers want constants, and spell it differently.
template <class Scalar, class Index, int... kLane>
inline Vec<Scalar> shuffle(Vec<Scalar> a, Vec<Scalar> b, Index, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::of(kLane)...);
#else
  return __builtin_shuffle(a, b, IntVec<Scalar>{Index::of(kLane)...});
#endif
}

// Pairs of neighbouring blocks, the first (kOdd = 0) or second (kOdd = 1) of each pair: of a, then of b, within
// groups of kGroup lanes.
template <int kTotal, int kGroup, int kRowsPerBlock, int kOdd>
struct DeinterleaveIndex {
  static constexpr int of(int lane) {
    const int group = lane / kGroup, block = lane % kGroup / kRowsPerBlock, half = kGroup / kRowsPerBlock / 2;
    return (block < half ? 0 : kTotal) + group * kGroup + (2 * (block % half) + kOdd) * kRowsPerBlock + lane % kRowsPerBlock;
  }
};

template <class Scalar, int kGroup, int kRowsPerBlock, int kOdd>
inline Vec<Scalar> deinterleave(Vec<Scalar> a, Vec<Scalar> b) {
  return shuffle<Scalar>(
      a, b, DeinterleaveIndex<kSimdLanes<Scalar>, kGroup, kRowsPerBlock, kOdd>{},
      std::make_integer_sequence<int, kSimdLanes<Scalar>>{});
}

template <class Scalar, int kGroup, int kRowsPerBlock>
inline Vec<Scalar> add_pairs(Vec<Scalar> a, Vec<Scalar> b) {
  return deinterleave<Scalar, kGroup, kRowsPerBlock, 0>(a, b) + deinterleave<Scalar, kGroup, kRowsPerBlock, 1>(a, b);
}

// Two vectors of channels at once, in an order that suits the dtype; `store_pair` puts them in order again. Of
// bfloat16 the even and the odd channels: they are the halves of 32-bit words, which costs no shuffling.
template <class T, class V>
inline void load_pair(const T* from, V* first, V* second) {
  *first = load(from);
  *second = load(from + HF_DINO_VEC_BYTES / sizeof((*first)[0]));
}

inline void load_pair(const BFloat16* from, Vec<float>* first, Vec<float>* second) {
  typename VecOf<uint32_t, HF_DINO_VEC_BYTES>::type words;
  std::memcpy(&words, from, sizeof words);
  *first = bit_cast<Vec<float>>(words << 16);
  *second = bit_cast<Vec<float>>(words & 0xffff0000u);
}

// Lanes of two vectors in turn, from the `kFirst`-th on.
template <int kTotal, int kFirst>
struct InterleaveIndex {
  static constexpr int of(int lane) { return kFirst + lane / 2 + lane % 2 * kTotal; }
};

template <class T, class C>
inline void store_pair(C* to, Vec<C> first, Vec<C> second) {
  constexpr int kTotal = kSimdLanes<C>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto lanes = std::make_integer_sequence<int, kTotal>{};
    store(to, shuffle<C>(first, second, InterleaveIndex<kTotal, 0>{}, lanes));
    store(to + kTotal, shuffle<C>(first, second, InterleaveIndex<kTotal, kTotal / 2>{}, lanes));
  } else {
    store(to, first);
    store(to + kTotal, second);
  }
}

// The other half of the lanes of each group of kGroup.
template <int kGroup>
struct SwapHalvesIndex {
  static constexpr int of(int lane) { return lane ^ (kGroup / 2); }
};

// All lanes together by an operation that may take them in any order; the result is in every lane.
template <class Scalar, int kGroup = kSimdLanes<Scalar>, class Operation>
inline Vec<Scalar> reduce_lanes(Vec<Scalar> vector, Operation operation) {
  const Vec<Scalar> other =
      shuffle<Scalar>(vector, vector, SwapHalvesIndex<kGroup>{}, std::make_integer_sequence<int, kSimdLanes<Scalar>>{});
  if constexpr (kGroup > 2) {
    return reduce_lanes<Scalar, kGroup / 2>(operation(vector, other), operation);
  } else {
    return operation(vector, other);
  }
}

// The sum of the lanes of rows[i] in lane i, for as many rows as lanes. Overwrites the rows. Neighbours are added
// within 16 bytes first, which is what processors shuffle most cheaply, then whole groups of 16 bytes.
template <class Scalar>
inline Vec<Scalar> transposed_sum(Vec<Scalar>* rows) {
  constexpr int kTotal = kSimdLanes<Scalar>, kGroup = 16 / sizeof(Scalar);
  int count = kTotal;
  for (int added = 1; added < kGroup; added *= 2) {
    count /= 2;
    for (int i = 0; i < count; ++i) rows[i] = add_pairs<Scalar, kGroup, 1>(rows[2 * i], rows[2 * i + 1]);
  }
  if constexpr (kTotal > kGroup) {
    for (; count > 1;) {
      count /= 2;
      for (int i = 0; i < count; ++i) rows[i] = add_pairs<Scalar, kTotal, kGroup>(rows[2 * i], rows[2 * i + 1]);
    }
  }
  return rows[0];
}

}  // namespace
