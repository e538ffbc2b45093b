// Numbers in memory: buffers, rows that are copied, and the reading and writing of every dtype.
#pragma once

#include <cstdlib>
#include <new>

#include "kernel_args.h"
#include "vec.h"

namespace {

using namespace hf_dino;

// What is computed with: 32 bits for numbers of 16.
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

// Zeros.
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

template <class C>
int64_t pad_to_vec(int64_t count) {
  return (count + kSimdLanes<C> - 1) / kSimdLanes<C> * kSimdLanes<C>;
}

// As many vectors as fit the registers of every processor.
template <class C>
constexpr int kMaxUnroll = 32 / kSimdLanes<C> < 4 ? 32 / kSimdLanes<C> : 4;

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

// Copies rows that lie far apart next to each other. The processor does not foresee such strides by itself.
template <class T>
void gather_rows(const T* from, int64_t from_stride, int64_t rows, int64_t length, T* to, int64_t to_stride) {
  constexpr int64_t kPrefetchRows = 32;
  for (int64_t row = 0; row < rows; ++row) {
    if (row + kPrefetchRows < rows) prefetch_bytes(from + (row + kPrefetchRows) * from_stride, length * sizeof(T));
    copy_bytes(to + row * to_stride, from + row * from_stride, length * sizeof(T));
  }
}

template <class From>
inline void convert(const From* from, int64_t count, compute_t<From>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_compute(from[i]);
}

// `count` numbers at `index` of an array of the points' type, as what is computed with. `needed` numbers may be read
// there, which is more where the last vector is not full; the numbers stay where they are if that is safe.
template <class C>
const C* load_points(const void* from, DType type, int64_t index, int64_t count, int64_t needed, C* scratch) {
  if (type == DType::kHalf) {
    if constexpr (sizeof(C) == 4) convert(static_cast<const Half*>(from) + index, count, scratch);
    return scratch;
  }
  if (type == DType::kBFloat16) {
    if constexpr (sizeof(C) == 4) convert(static_cast<const BFloat16*>(from) + index, count, scratch);
    return scratch;
  }
  const C* numbers = static_cast<const C*>(from) + index;
  if (count == needed) return numbers;
  copy_bytes(scratch, numbers, count * sizeof(C));
  return scratch;
}

template <class C>
void store_points(const C* numbers, int64_t count, void* to, DType type, int64_t index) {
  if (type == DType::kHalf) {
    for (int64_t i = 0; i < count; ++i) from_compute(static_cast<float>(numbers[i]), static_cast<Half*>(to) + index + i);
  } else if (type == DType::kBFloat16) {
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
