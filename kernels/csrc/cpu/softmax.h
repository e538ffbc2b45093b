// Logits to attention weights, and the gradient of that.
#pragma once

#include <cmath>
#include <limits>

#include "memory.h"

namespace {

inline Vector<double> exponential(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// e^x for x <= 0, to about 1e-7: 2^n by its bits, and a Taylor polynomial for the rest, which is at most ln(2) / 2.
inline Vector<float> exponential(Vector<float> x) {
  using Ints = IntegerVector<float>;
  x = choose(x < -87.0f, broadcast(-87.0f), x);  // below it 2^n is subnormal
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Vector<float> whole = __builtin_convertvector(n, Vector<float>);
  const Vector<float> rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln(2) in two parts
  Vector<float> sum = rest * (1.0f / 5040) + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const Ints power = (n + 127) << 23;
  return sum * bits_of<Vector<float>>(power);
}

// Logits to weights that sum to 1. Beyond `count`, up to whole vectors, `logits` is overwritten too.
template <class C>
void softmax(C* logits, int64_t count) {
  const int64_t whole = padded<C>(count);
  for (int64_t i = count; i < whole; ++i) logits[i] = -std::numeric_limits<C>::infinity();
  const auto larger = [](Vector<C> a, Vector<C> b) { return choose(b > a, b, a); };
  Vector<C> highest = load(logits);
  for (int64_t i = kLanes<C>; i < whole; i += kLanes<C>) highest = larger(highest, load(logits + i));
  highest = reduce_lanes<C>(highest, larger);
  Vector<C> sum{};
  for (int64_t i = 0; i < whole; i += kLanes<C>) {
    const Vector<C> power = exponential(load(logits + i) - highest);
    store(logits + i, power);
    sum += power;
  }
  const Vector<C> share = 1 / reduce_lanes<C>(sum, [](Vector<C> a, Vector<C> b) { return a + b; });
  for (int64_t i = 0; i < whole; i += kLanes<C>) store(logits + i, load(logits + i) * share);
}

// d softmax: weight * (gradient - sum of weight * gradient), for rows of `count` numbers.
template <class T>
void softmax_backward(
    const BackwardArguments& arguments, const void* grad_softmax_weights, void* grad_logits, int64_t begin,
    int64_t end) {
  using C = Compute<T>;
  const Points& points = arguments.points;
  const int64_t count = arguments.sizes.levels.count * arguments.sizes.num_points;
  Buffer<C> weight_scratch(padded<C>(count)), more_scratch(padded<C>(count)), grads(count);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t index = row * count;
    const C* weights = read_points(points.weights, points.type, index, count, count, weight_scratch.get());
    copy_bytes(grads.get(), static_cast<const C*>(arguments.grad_weights) + index, count * sizeof(C));
    if (grad_softmax_weights != nullptr) {
      const C* more = read_points(grad_softmax_weights, points.type, index, count, count, more_scratch.get());
      for (int64_t i = 0; i < count; ++i) grads[i] += more[i];
    }
    C sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * grads[i];
    for (int64_t i = 0; i < count; ++i) grads[i] = weights[i] * (grads[i] - sum);
    write_points(grads.get(), count, grad_logits, points.type, index);
  }
}

}  // namespace
