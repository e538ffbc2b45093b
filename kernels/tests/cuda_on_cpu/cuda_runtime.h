// CUDA's words for a C++ compiler that knows none, so that kernels can be run and checked where there is no GPU. For
// tests only: slow, one warp after another. What it provides is what csrc/cuda uses.
//
// The 32 lanes of a warp are fibers. A lane runs until it shuffles; when all have come to the shuffle, each goes on
// with the number it was waiting for. A shuffle that not all lanes come to, or not to the same one, ends the process,
// and so does an access that is not aligned. Blocks, and the warps of each, run in an order drawn for each launch.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::exp;
using std::fabs;
using std::floor;
using std::fma;
using std::fmax;
using std::fmin;
using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
  dim3() = default;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message);
  std::abort();
}

template <typename T>
void check_alignment(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) fail("an access is not aligned");
}

inline std::vector<unsigned> any_order(unsigned count) {
  static std::mt19937 random;
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

class Warp {
 public:
  static constexpr int kSize = 32;
  static inline Warp* current = nullptr;

  Warp(const std::function<void()>& body, unsigned first_thread) : body_(body), first_thread_(first_thread) {
    static std::vector<char> stacks(kSize * kStackSize);  // one warp lives at a time
    for (int lane = 0; lane < kSize; ++lane) {
      Lane& fiber = lanes_[lane];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.data() + lane * kStackSize;
      fiber.context.uc_stack.ss_size = kStackSize;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Warp::run_lane, 0);
    }
  }

  void run();

  // Called by a lane: hands in a number and comes back with that of another lane.
  template <typename T>
  T exchange(unsigned mask, T number, int source) {
    static_assert(sizeof(T) <= sizeof(Slot));
    if (mask != 0xffffffffu) fail("a shuffle is not for the whole warp");
    if (source < 0 || source >= kSize) fail("a shuffle asks for a lane that does not exist");
    Lane& fiber = lanes_[lane_];
    const int turn = fiber.shuffles++ % 2;  // the faster lanes may already be at the next shuffle
    std::memcpy(&fiber.slots[turn], &number, sizeof(T));
    fiber.bytes = sizeof(T);
    swapcontext(&fiber.context, &scheduler_);
    T result;
    std::memcpy(&result, &lanes_[source].slots[turn], sizeof(T));
    return result;
  }

  int lane() const { return lane_; }

 private:
  using Slot = unsigned long long;
  static constexpr size_t kStackSize = 256 * 1024;

  struct Lane {
    ucontext_t context{};
    Slot slots[2];
    size_t bytes = 0;
    long shuffles = 0;
    bool done = false;
  };

  static void run_lane() {
    current->body_();
    current->lanes_[current->lane_].done = true;
  }

  const std::function<void()>& body_;
  unsigned first_thread_;
  int lane_ = 0;
  ucontext_t scheduler_{};
  Lane lanes_[kSize];
};

}  // namespace cuda_on_cpu

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

inline void cuda_on_cpu::Warp::run() {
  current = this;
  while (!lanes_[0].done) {
    for (lane_ = 0; lane_ < kSize; ++lane_) {
      threadIdx.x = first_thread_ + lane_;
      swapcontext(&scheduler_, &lanes_[lane_].context);
    }
    for (const Lane& fiber : lanes_) {
      if (fiber.done != lanes_[0].done) fail("some lanes have ended while others wait for them at a shuffle");
      if (fiber.shuffles != lanes_[0].shuffles || fiber.bytes != lanes_[0].bytes) {
        fail("lanes are at different shuffles");
      }
    }
  }
}

template <typename T>
T __shfl_sync(unsigned mask, T number, int lane, int width) {
  cuda_on_cpu::Warp& warp = *cuda_on_cpu::Warp::current;
  return warp.exchange(mask, number, warp.lane() / width * width + lane % width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T number, int distance) {
  cuda_on_cpu::Warp& warp = *cuda_on_cpu::Warp::current;
  return warp.exchange(mask, number, warp.lane() ^ distance);
}

template <typename T>
T __ldg(const T* pointer) {
  cuda_on_cpu::check_alignment(pointer);
  T number;
  std::memcpy(&number, pointer, sizeof(T));
  return number;
}

template <typename T>
T atomicAdd(T* pointer, T number) {
  cuda_on_cpu::check_alignment(pointer);
  return std::exchange(*pointer, *pointer + number);
}

template <typename T>
T atomicMax(T* pointer, T number) {
  cuda_on_cpu::check_alignment(pointer);
  return std::exchange(*pointer, std::max(*pointer, number));
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float __uint_as_float(unsigned bits) { return bits_as<float>(bits); }
inline double __longlong_as_double(long long bits) { return bits_as<double>(bits); }
inline long long __double_as_longlong(double number) { return bits_as<long long>(number); }
inline long long __double2ll_rn(double number) { return std::llrint(number); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (config->gridDim.x == 0) cuda_on_cpu::fail("a launch without blocks is an error");
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (const unsigned block : cuda_on_cpu::any_order(gridDim.x)) {
    for (const unsigned warp : cuda_on_cpu::any_order(blockDim.x / cuda_on_cpu::Warp::kSize)) {
      blockIdx.x = block;
      cuda_on_cpu::Warp(body, warp * cuda_on_cpu::Warp::kSize).run();
    }
  }
  return cudaSuccess;
}
