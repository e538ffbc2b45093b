// Vectors as wide as the including file says (HF_DINO_VEC_BYTES), in the vector extension of GCC and Clang: one source
// for AVX-512, AVX2 and every other architecture. PyTorch's at::vec is not part of the stable ABI.
//
// Everything is in an unnamed namespace: otherwise the linker could take a function that was compiled for a newer CPU
// in place of its namesake in another file.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

template <class Scalar, int kBytes>
struct VecOf {
  typedef Scalar type __attribute__((vector_size(kBytes)));
};

// Integers of the same size as a scalar, for indices and masks.
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

// The same bits as another vector type of the same size.
template <class To, class From>
inline To bit_cast(From vec) {
  return (To)vec;  // between vectors, a C-style cast does not convert
}

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

inline void store(float* to, Vec<float> vec) { std::memcpy(to, &vec, sizeof vec); }
inline void store(double* to, Vec<double> vec) { std::memcpy(to, &vec, sizeof vec); }
inline void store(int32_t* to, IntVec<float> vec) { std::memcpy(to, &vec, sizeof vec); }
inline void store(int64_t* to, IntVec<double> vec) { std::memcpy(to, &vec, sizeof vec); }

template <class Scalar>
inline Vec<Scalar> broadcast(Scalar scalar) {
  return scalar - Vec<Scalar>{};
}

// Masks are what comparisons return: all bits of a lane are set, or none.

// `vec` where the mask is set, else zero.
template <class V, class M>
inline V mask_and(M mask, V vec) {
  return bit_cast<V>(bit_cast<M>(vec) & mask);
}

// `a` where the mask is set, else `b`.
template <class V, class M>
inline V blend(M mask, V a, V b) {
  return bit_cast<V>((bit_cast<M>(a) & mask) | (bit_cast<M>(b) & ~mask));
}

// Lane i of the result is lane Index::of(i) of the concatenation of a and b. Both compilers require constant indices.
template <class Scalar, class Index, int... kLane>
inline Vec<Scalar> shuffle(Vec<Scalar> a, Vec<Scalar> b, Index, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::of(kLane)...);
#else
  return __builtin_shuffle(a, b, IntVec<Scalar>{Index::of(kLane)...});
#endif
}

// Every other block of kBlock lanes, starting with the first (kOdd = 0) or the second (kOdd = 1): those of a, then
// those of b, within groups of kGroup lanes. For kGroup = 4, kBlock = 1, kOdd = 0: a0 a2 b0 b2 | a4 a6 b4 b6 | ...
template <int kTotal, int kGroup, int kBlock, int kOdd>
struct DeinterleaveIndex {
  static constexpr int of(int lane) {
    const int group = lane / kGroup, block = lane % kGroup / kBlock, half = kGroup / kBlock / 2;
    return (block < half ? 0 : kTotal) + group * kGroup + (2 * (block % half) + kOdd) * kBlock + lane % kBlock;
  }
};

template <class Scalar, int kGroup, int kBlock, int kOdd>
inline Vec<Scalar> deinterleave(Vec<Scalar> a, Vec<Scalar> b) {
  return shuffle<Scalar>(
      a, b, DeinterleaveIndex<kSimdLanes<Scalar>, kGroup, kBlock, kOdd>{},
      std::make_integer_sequence<int, kSimdLanes<Scalar>>{});
}

// The lanes of two vectors in turn, a0 b0 a1 b1 ..., from lane kFirst of each on.
template <int kTotal, int kFirst>
struct InterleaveIndex {
  static constexpr int of(int lane) { return kFirst + lane / 2 + lane % 2 * kTotal; }
};

// The other half of the lanes of each group of kGroup.
template <int kGroup>
struct SwapHalvesIndex {
  static constexpr int of(int lane) { return lane ^ (kGroup / 2); }
};

// Reduces all lanes by a commutative and associative operation; the result is in every lane.
template <class Scalar, int kGroup = kSimdLanes<Scalar>, class Operation>
inline Vec<Scalar> reduce_lanes(Vec<Scalar> vec, Operation operation) {
  const Vec<Scalar> other =
      shuffle<Scalar>(vec, vec, SwapHalvesIndex<kGroup>{}, std::make_integer_sequence<int, kSimdLanes<Scalar>>{});
  if constexpr (kGroup > 2) {
    return reduce_lanes<Scalar, kGroup / 2>(operation(vec, other), operation);
  } else {
    return operation(vec, other);
  }
}

template <class Scalar, int kGroup, int kBlock>
inline Vec<Scalar> add_pairs(Vec<Scalar> a, Vec<Scalar> b) {
  return deinterleave<Scalar, kGroup, kBlock, 0>(a, b) + deinterleave<Scalar, kGroup, kBlock, 1>(a, b);
}

// Lane i of the result is the sum of the lanes of rows[i], for as many rows as lanes. Overwrites the rows. Each step
// halves the number of rows. Neighbors are added within 16 bytes first, because CPUs shuffle those most cheaply, then
// whole groups of 16 bytes.
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
