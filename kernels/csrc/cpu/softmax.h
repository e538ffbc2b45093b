// Logits to attention weights, and the gradient of that.
#pragma once

#include <cmath>
#include <limits>

#include "convert.h"

namespace {

inline Vec<double> exponential(Vec<double> x) {
  for (int lane = 0; lane < kSimdLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// e^x for x <= 0, to about 1e-7. With x = n ln(2) + rest, it is 2^n, made from the bits of n, times a Taylor polynomial
// of the rest, which is at most ln(2) / 2.
inline Vec<float> exponential(Vec<float> x) {
  x = blend(x < -87.0f, broadcast(-87.0f), x);  // below, 2^n is subnormal
  const IntVec<float> n = __builtin_convertvector(x * 1.44269504f - 0.5f, IntVec<float>);
  const Vec<float> n_float = __builtin_convertvector(n, Vec<float>);
  const Vec<float> rest = (x - n_float * 0.693359375f) + n_float * 2.12194440e-4f;  // ln(2) in two parts
  Vec<float> sum = rest * (1.0f / 5040) + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const IntVec<float> power_bits = (n + 127) << 23;
  return sum * bit_cast<Vec<float>>(power_bits);
}

// Replaces logits by weights that sum to 1. `logits` must have room for padded(count) numbers, which are overwritten.
template <class C>
void softmax(C* logits, int64_t count) {
  const int64_t padded_count = padded<C>(count);
  for (int64_t i = count; i < padded_count; ++i) logits[i] = -std::numeric_limits<C>::infinity();
  const auto maximum = [](Vec<C> a, Vec<C> b) { return blend(b > a, b, a); };
  Vec<C> highest = load(logits);
  for (int64_t i = kSimdLanes<C>; i < padded_count; i += kSimdLanes<C>) highest = maximum(highest, load(logits + i));
  highest = reduce_lanes<C>(highest, maximum);
  Vec<C> sum{};
  for (int64_t i = 0; i < padded_count; i += kSimdLanes<C>) {
    const Vec<C> power = exponential(load(logits + i) - highest);
    store(logits + i, power);
    sum += power;
  }
  const Vec<C> factor = 1 / reduce_lanes<C>(sum, [](Vec<C> a, Vec<C> b) { return a + b; });
  for (int64_t i = 0; i < padded_count; i += kSimdLanes<C>) store(logits + i, load(logits + i) * factor);
}

// The gradient of the logits, w * (g - sum(w * g)), for the rows [begin, end). The gradient g of the weights w is
// args.grad_weights plus, if not null, `grad_from_weights`: what reaches the weights other than through the sampling.
template <class T>
void softmax_backward(
    const BackwardArgs& args, const void* grad_from_weights, void* grad_logits, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const PointArgs& points = args.points;
  const int64_t count = args.shapes.points_per_head();
  Buffer<C> weight_scratch(padded<C>(count)), grad_scratch(padded<C>(count)), grads(count);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t index = row * count;
    const C* weights = load_points(points.weights, points.dtype, index, count, count, weight_scratch.get());
    copy_bytes(grads.get(), static_cast<const C*>(args.grad_weights) + index, count * sizeof(C));
    if (grad_from_weights != nullptr) {
      const C* others = load_points(grad_from_weights, points.dtype, index, count, count, grad_scratch.get());
      for (int64_t i = 0; i < count; ++i) grads[i] += others[i];
    }
    C sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * grads[i];
    for (int64_t i = 0; i < count; ++i) grads[i] = weights[i] * (grads[i] - sum);
    store_points(grads.get(), count, grad_logits, points.dtype, index);
  }
}

}  // namespace
