// Memory: buffers, prefetching, and loading and storing numbers of every dtype as what is computed with.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernel_args.h"
#include "vec.h"

namespace {

using namespace hf_dino;

// 16-bit numbers are computed with in 32 bits, the others in their own type.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

// How many vectors of channels a loop handles at once: as many as fit the registers of every CPU.
template <class C>
constexpr int kMaxUnroll = 32 / kSimdLanes<C> < 4 ? 32 / kSimdLanes<C> : 4;

// `count`, rounded up to whole vectors.
template <class C>
int64_t padded(int64_t count) {
  return (count + kSimdLanes<C> - 1) / kSimdLanes<C> * kSimdLanes<C>;
}

// An array of zeros on a cache line of its own.
template <class Item>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(Item) + 63) / 64 * 64;
    data_ = static_cast<Item*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Item* get() const { return data_; }
  Item& operator[](int64_t i) const { return data_[i]; }

 private:
  Item* data_;
};

inline float to_compute(float number) { return number; }
inline double to_compute(double number) { return number; }

// bfloat16 is the upper half of a float.
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

// Rounding is to the nearest, ties to even.
inline void from_compute(float number, float* result) { *result = number; }
inline void from_compute(double number, double* result) { *result = number; }

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
    rounded = 0x7e00;  // NaN
  } else if (magnitude >= 0x47800000u) {
    rounded = 0x7c00;  // 2^16 and more: infinite
  } else if (magnitude < 0x38800000u) {  // below 2^-14, subnormal: adding 0.5 rounds to a multiple of 2^-24
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    uint32_t sum;
    std::memcpy(&sum, &value, sizeof sum);
    rounded = static_cast<uint16_t>(sum - 0x3f000000u);
  } else {  // the carry may make it infinite, as it should
    rounded = static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  }
  result->bits = sign | rounded;
}

inline Vec<float> load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC 12 compiles the general form to more than this one instruction
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

inline void store(BFloat16* to, Vec<float> vec) {
  using Wide = typename VecOf<uint32_t, HF_DINO_VEC_BYTES>::type;
  using Narrow = typename VecOf<uint16_t, HF_DINO_VEC_BYTES / 2>::type;
  const Wide bits = bit_cast<Wide>(vec);
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide is_number = bit_cast<Wide>(vec == vec);
  const Narrow narrow = __builtin_convertvector((rounded & is_number) | (0x7fc0u & ~is_number), Narrow);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Half* to, Vec<float> vec) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(vec, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(vec, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kSimdLanes<float>; ++lane) from_compute(vec[lane], to + lane);
#endif
}

// Loads two vectors of channels in the order that is cheapest for the dtype; `store_pair` restores their order. Of
// bfloat16 these are the even and the odd channels: they are the halves of 32-bit words, which saves the shuffles.
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

// memcpy for what is too short to be worth a call.
inline void copy_bytes(void* to, const void* from, size_t count) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  for (; count >= HF_DINO_VEC_BYTES; count -= HF_DINO_VEC_BYTES) {
    std::memcpy(target, source, HF_DINO_VEC_BYTES);
    target += HF_DINO_VEC_BYTES, source += HF_DINO_VEC_BYTES;
  }
  for (; count >= 16; count -= 16) {
    std::memcpy(target, source, 16);
    target += 16, source += 16;
  }
  for (; count > 0; --count) *target++ = *source++;
}

inline void prefetch_bytes(const void* from, int64_t count) {
  for (int64_t byte = 0; byte < count; byte += 64) __builtin_prefetch(static_cast<const char*>(from) + byte);
}

// Copies rows that lie far apart next to each other. The hardware does not prefetch such long strides by itself.
template <class T>
void gather_rows(const T* from, int64_t from_stride, int64_t rows, int64_t length, T* to, int64_t to_stride) {
  constexpr int64_t kPrefetchDistance = 32;  // rows
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t ahead = row + kPrefetchDistance;
    if (ahead < rows) prefetch_bytes(from + ahead * from_stride, length * sizeof(T));
    copy_bytes(to + row * to_stride, from + row * from_stride, length * sizeof(T));
  }
}

template <class From>
inline void convert(const From* from, int64_t count, compute_t<From>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_compute(from[i]);
}

// Loads `count` coordinates or weights at `index` of an array as what is computed with. The caller may read `needed`
// numbers, which is more than `count` where the last vector is not full. Returns `scratch`, or the numbers in place
// where nothing is to be converted and no more of them are needed.
template <class C>
const C* load_points(const void* from, DType dtype, int64_t index, int64_t count, int64_t needed, C* scratch) {
  if (dtype == DType::kHalf) {
    if constexpr (sizeof(C) == 4) convert(static_cast<const Half*>(from) + index, count, scratch);
    return scratch;
  }
  if (dtype == DType::kBFloat16) {
    if constexpr (sizeof(C) == 4) convert(static_cast<const BFloat16*>(from) + index, count, scratch);
    return scratch;
  }
  const C* numbers = static_cast<const C*>(from) + index;
  if (count == needed) return numbers;
  copy_bytes(scratch, numbers, count * sizeof(C));
  return scratch;
}

template <class C>
void store_points(const C* numbers, int64_t count, void* to, DType dtype, int64_t index) {
  if (dtype == DType::kHalf) {
    for (int64_t i = 0; i < count; ++i) {
      from_compute(static_cast<float>(numbers[i]), static_cast<Half*>(to) + index + i);
    }
  } else if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      from_compute(static_cast<float>(numbers[i]), static_cast<BFloat16*>(to) + index + i);
    }
  } else {
    copy_bytes(static_cast<C*>(to) + index, numbers, count * sizeof(C));
  }
}

template <class T, class C>
inline void store_channels(const C* channels, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kSimdLanes<C> <= count; i += kSimdLanes<C>) store(to + i, load(channels + i));
  for (; i < count; ++i) from_compute(channels[i], to + i);
}

template <class T, class C>
inline void load_channels(const T* from, int64_t count, C* channels) {
  int64_t i = 0;
  for (; i + kSimdLanes<C> <= count; i += kSimdLanes<C>) store(channels + i, load(from + i));
  for (; i < count; ++i) channels[i] = to_compute(from[i]);
}

}  // namespace
