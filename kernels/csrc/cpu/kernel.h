// The computation on the CPU, for vectors of the width that the including file chose.
//
// A query and head look at `count` = levels * points places. For all of them at once, as many per vector as there are
// lanes, `Plan` works out which four cells surround the place and how much each counts. Then one loop without branches
// reads (and, backward, adds to) four rows of channels per place. A place outside its map, or at no number, has four
// weights of zero and some cell that exists.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "simd.h"

namespace {

using namespace hf_dino;

// What is computed with: 32 bits for numbers of 16.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

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
int64_t padded(int64_t count) {
  return (count + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// memcpy for what is too short to be worth a call.
inline void copy_bytes(void* to, const void* from, size_t count) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  for (; count >= HF_DINO_VECTOR_BYTES; count -= HF_DINO_VECTOR_BYTES) {
    std::memcpy(target, source, HF_DINO_VECTOR_BYTES);
    target += HF_DINO_VECTOR_BYTES, source += HF_DINO_VECTOR_BYTES;
  }
  if (count > 0) std::memcpy(target, source, count);
}

template <class From>
inline void widen(const From* from, int64_t count, Compute<From>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// Reads `count` numbers at `index` of an array of the plan's type into whole vectors, in place if that is possible.
template <class C>
const C* read_points(const void* from, Type type, int64_t index, int64_t count, C* scratch) {
  if (type == Type::kHalf) {
    if constexpr (sizeof(C) == 4) widen(static_cast<const Half*>(from) + index, count, scratch);
    return scratch;
  }
  if (type == Type::kBFloat16) {
    if constexpr (sizeof(C) == 4) widen(static_cast<const BFloat16*>(from) + index, count, scratch);
    return scratch;
  }
  const C* numbers = static_cast<const C*>(from) + index;
  if (count % kLanes<C> == 0) return numbers;
  copy_bytes(scratch, numbers, count * sizeof(C));
  return scratch;
}

template <class C>
void write_points(const C* numbers, int64_t count, void* to, Type type, int64_t index) {
  if (type == Type::kHalf) {
    for (int64_t i = 0; i < count; ++i) round_to(static_cast<float>(numbers[i]), static_cast<Half*>(to) + index + i);
  } else if (type == Type::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      round_to(static_cast<float>(numbers[i]), static_cast<BFloat16*>(to) + index + i);
    }
  } else {
    copy_bytes(static_cast<C*>(to) + index, numbers, count * sizeof(C));
  }
}

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
  Vector<C> highest = load(logits);
  for (int64_t i = kLanes<C>; i < whole; i += kLanes<C>) {
    const Vector<C> next = load(logits + i);
    highest = choose(next > highest, next, highest);
  }
  C top = highest[0];
  for (int lane = 1; lane < kLanes<C>; ++lane) top = highest[lane] > top ? highest[lane] : top;
  Vector<C> sums{};
  for (int64_t i = 0; i < whole; i += kLanes<C>) {
    const Vector<C> power = exponential(load(logits + i) - top);
    store(logits + i, power);
    sums += power;
  }
  C sum = 0;
  for (int lane = 0; lane < kLanes<C>; ++lane) sum += sums[lane];
  for (int64_t i = 0; i < whole; i += kLanes<C>) store(logits + i, load(logits + i) / sum);
}

// Along one axis of a map: a cell, and how much it (`near`) and the cell after it (`far`) count. These are the hat
// functions max(0, 1 - distance), so a neighbour beyond the border counts zero by itself once the cell is one that has
// a successor.
template <class C>
struct Neighbours {
  Vector<C> offset;  // from the cell: -1 to 2, as beyond the borders it is not the cell next to the position
  Vector<C> near, far;
  IntegerVector<C> cell;

  Neighbours(Vector<C> position, Vector<C> has_successor, IntegerVector<C> last) {
    cell = __builtin_convertvector(position, IntegerVector<C>);
    cell += __builtin_convertvector(cell, Vector<C>) > position;  // true is -1: round down
    cell = only_where(cell > 0, cell);
    cell = choose(cell < last, cell, last);
    offset = position - __builtin_convertvector(cell, Vector<C>);
    near = hat(offset);
    far = hat(offset - 1) * has_successor;
  }

  static Vector<C> hat(Vector<C> distance) {
    const Vector<C> height = 1 - choose(distance < 0, -distance, distance);
    return only_where(height > 0, height);
  }

  // Of `near` and `far` by the position. At a cell's centre the one to the right, as grid_sample has it.
  Vector<C> near_slope() const {
    return choose(offset < 0, broadcast<C>(1), only_where(offset < 1, broadcast<C>(-1)));
  }
  Vector<C> far_slope(Vector<C> has_successor) const {
    return only_where(offset >= 0, choose(offset < 1, broadcast<C>(1), broadcast<C>(-1))) * has_successor;
  }
};

enum Corner { kTopLeft, kTopRight, kBottomLeft, kBottomRight, kCorners };

// The places that one query and head look at, on the levels [first_level, last_level).
template <class C>
class Plan {
  using Ints = IntegerVector<C>;

 public:
  const int64_t first_level, last_level, num_points;
  const int64_t count, whole;  // places, and the same in whole vectors

 private:
  Buffer<C> scales_, origins_, sizes_, has_successor_;  // x of every place, then y of every place
  Buffer<Integer<C>> last_, widths_, starts_;
  Buffer<C> scratch_;

 public:
  // cells from a place's cell to the one to its right and to the one below; zero where the map is one cell wide
  Buffer<int64_t> right, below;
  Buffer<Integer<C>> cell;
  Buffer<C> weights;   // attention
  Buffer<C> corners;   // attention times bilinear, corner by corner
  Buffer<C> bilinear;  // near x, far x, near y, far y and their slopes; only for gradients

  Plan(const Sizes& sizes, int64_t first_level, int64_t last_level)
      : first_level(first_level),
        last_level(last_level),
        num_points(sizes.num_points),
        count((last_level - first_level) * num_points),
        whole(padded<C>(count)),
        scales_(2 * whole),
        origins_(2 * whole),
        sizes_(2 * whole),
        has_successor_(2 * whole),
        last_(2 * whole),
        widths_(whole),
        starts_(whole),
        scratch_(2 * whole),
        right(whole),
        below(whole),
        cell(whole),
        weights(whole),
        corners(kCorners * whole),
        bilinear(8 * whole) {
    const Levels& levels = sizes.levels;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = first_level + i / num_points;
      const int32_t width = levels.width[level], height = levels.height[level];
      sizes_[i] = static_cast<C>(width), sizes_[whole + i] = static_cast<C>(height);
      has_successor_[i] = width > 1, has_successor_[whole + i] = height > 1;
      last_[i] = width > 1 ? width - 2 : 0, last_[whole + i] = height > 1 ? height - 2 : 0;
      right[i] = width > 1, below[i] = height > 1 ? width : 0;
      widths_[i] = width;
      starts_[i] = levels.start[level] - levels.start[first_level];
    }
    // position = origin + number * scale. For locations, fractions of the map, these never change.
    for (int64_t i = 0; i < 2 * whole; ++i) origins_[i] = -C(0.5), scales_[i] = sizes_[i];
  }

  const C* scales() const { return scales_.get(); }
  const C* sizes() const { return sizes_.get(); }

  // Offsets are in cells around a point, or in 1 / num_points half-sides around the centre of a box.
  void set_references(const C* references, int64_t width) {
    for (int64_t level = first_level; level < last_level; ++level) {
      const C* reference = references + level * width;
      const int64_t begin = (level - first_level) * num_points;
      for (int axis = 0; axis < 2; ++axis) {
        const C size = sizes_[axis * whole + begin];
        const C origin = reference[axis] * size - C(0.5);
        const C scale = width == 2 ? C(1) : reference[2 + axis] * size * (C(0.5) / num_points);
        for (int64_t i = begin; i < begin + num_points; ++i) {
          origins_[axis * whole + i] = origin, scales_[axis * whole + i] = scale;
        }
      }
    }
  }

  void set_weights(const Points& points, int64_t index) {
    const C* numbers = read_points(points.weights, points.type, index, count, weights.get());
    if (numbers != weights.get()) copy_bytes(weights.get(), numbers, count * sizeof(C));
  }

  // Finds cells and corner weights of the places at `index` of `points`, with the weights that were set.
  template <bool kSlopes>
  void place(const Points& points, int64_t index) {
    const C* xy = read_points(points.points, points.type, 2 * index, 2 * count, scratch_.get());
    for (int64_t i = 0; i < whole; i += kLanes<C>) {
      const Vector<C> first = load(xy + 2 * i), second = load(xy + 2 * i + kLanes<C>);
      const Vector<C> x = position(one_of_each_pair<C, kLanes<C>, 1, 0>(first, second), i);
      const Vector<C> y = position(one_of_each_pair<C, kLanes<C>, 1, 1>(first, second), whole + i);
      // false for what is no number
      const Ints inside = (x >= -1) & (x < load(&sizes_[i])) & (y >= -1) & (y < load(&sizes_[whole + i]));
      const Vector<C> right_exists = load(&has_successor_[i]), below_exists = load(&has_successor_[whole + i]);
      const Neighbours<C> across(only_where(inside, x), right_exists, load(&last_[i]));
      const Neighbours<C> down(only_where(inside, y), below_exists, load(&last_[whole + i]));
      store(&cell[i], down.cell * load(&widths_[i]) + across.cell + load(&starts_[i]));

      const Vector<C> weight = load(&weights[i]);
      const Vector<C> above = only_where(inside, down.near) * weight, under = only_where(inside, down.far) * weight;
      store(&corners[kTopLeft * whole + i], above * across.near);
      store(&corners[kTopRight * whole + i], above * across.far);
      store(&corners[kBottomLeft * whole + i], under * across.near);
      store(&corners[kBottomRight * whole + i], under * across.far);
      if constexpr (kSlopes) {
        store(&bilinear[0 * whole + i], only_where(inside, across.near));
        store(&bilinear[1 * whole + i], only_where(inside, across.far));
        store(&bilinear[2 * whole + i], only_where(inside, down.near));
        store(&bilinear[3 * whole + i], only_where(inside, down.far));
        store(&bilinear[4 * whole + i], only_where(inside, across.near_slope()));
        store(&bilinear[5 * whole + i], only_where(inside, across.far_slope(right_exists)));
        store(&bilinear[6 * whole + i], only_where(inside, down.near_slope()));
        store(&bilinear[7 * whole + i], only_where(inside, down.far_slope(below_exists)));
      }
    }
  }

 private:
  Vector<C> position(Vector<C> numbers, int64_t i) const { return load(&origins_[i]) + numbers * load(&scales_[i]); }
};

// ---- forward ----

// Adds up kVectors vectors of channels of all places. The two rows of cells have sums of their own, because an addition
// has to wait for the one before it.
template <int kVectors, class T, class C>
inline void gather(const T* value, int64_t stride, const Plan<C>& plan, C* output) {
  const C* corners = plan.corners.get();
  Vector<C> above[kVectors] = {}, under[kVectors] = {};
  for (int64_t i = 0; i < plan.count; ++i) {
    const T* top_left = value + plan.cell[i] * stride;
    const T* top_right = top_left + plan.right[i] * stride;
    const T* bottom_left = top_left + plan.below[i] * stride;
    const T* bottom_right = bottom_left + plan.right[i] * stride;
    const C w0 = corners[kTopLeft * plan.whole + i], w1 = corners[kTopRight * plan.whole + i];
    const C w2 = corners[kBottomLeft * plan.whole + i], w3 = corners[kBottomRight * plan.whole + i];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t channel = v * kLanes<C>;
      above[v] += load(top_left + channel) * w0;
      above[v] += load(top_right + channel) * w1;
      under[v] += load(bottom_left + channel) * w2;
      under[v] += load(bottom_right + channel) * w3;
    }
  }
  for (int v = 0; v < kVectors; ++v) store(output + v * kLanes<C>, above[v] + under[v]);
}

// As many vectors as fit the registers of every processor.
template <class C>
constexpr int kVectors = 32 / kLanes<C> < 4 ? 32 / kLanes<C> : 4;

template <class T, class C>
inline void write_channels(const C* channels, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) store(to + i, load(channels + i));
  for (; i < count; ++i) round_to(channels[i], to + i);
}

template <class T, class C>
inline void read_channels(const T* from, int64_t count, C* channels) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) store(channels + i, load(from + i));
  for (; i < count; ++i) channels[i] = to_float(from[i]);
}

template <class T>
void forward(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Sizes& sizes = arguments.sizes;
  const Points& points = arguments.points;
  const Rows& value = arguments.value;
  const int64_t whole_channels = padded<C>(sizes.head_dim);
  Plan<C> plan(sizes, 0, sizes.levels.count);
  Buffer<C> channels(whole_channels);
  const bool heads_first = value.head_stride < value.cell_stride;
  for (int64_t row = begin; row < end; ++row) {
    // neighbours in memory one after the other: queries in copies of one head, else the heads of a query
    const int64_t inner = heads_first ? row % sizes.num_heads : row % sizes.num_queries;
    const int64_t middle = row / (heads_first ? sizes.num_heads : sizes.num_queries);
    const int64_t batch = row / (sizes.num_heads * sizes.num_queries);
    const int64_t head = heads_first ? inner : middle % sizes.num_heads;
    const int64_t query = heads_first ? middle % sizes.num_queries : inner;
    const int64_t outer = batch * sizes.num_queries + query;
    const int64_t index = (outer * sizes.num_heads + head) * plan.count;
    plan.set_weights(points, index);
    if (points.references != nullptr) {
      const int64_t width = points.reference_width;
      plan.set_references(static_cast<const C*>(points.references) + outer * sizes.levels.count * width, width);
      softmax(plan.weights.get(), plan.count);
      write_points(plan.weights.get(), plan.count, arguments.softmax_weights, points.type, index);
    }
    plan.template place<false>(points, index);

    const T* rows = static_cast<const T*>(value.data) + batch * value.batch_stride + head * value.head_stride;
    int64_t channel = 0;
    for (; channel + kVectors<C> * kLanes<C> <= whole_channels; channel += kVectors<C> * kLanes<C>) {
      gather<kVectors<C>>(rows + channel, value.cell_stride, plan, &channels[channel]);
    }
    for (; channel < whole_channels; channel += kLanes<C>) {
      gather<1>(rows + channel, value.cell_stride, plan, &channels[channel]);
    }
    T* output = static_cast<T*>(arguments.output) + (outer * sizes.num_heads + head) * sizes.head_dim;
    write_channels(channels.get(), sizes.head_dim, output);
  }
}

template <class T>
void copy_by_head(const ForwardArguments& arguments, Rows to, int64_t begin, int64_t end) {
  const Sizes& sizes = arguments.sizes;
  const Rows& from = arguments.value;
  const int64_t cells = from.batch_stride / from.cell_stride;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / cells, cell = row % cells;
    for (int64_t head = 0; head < sizes.num_heads; ++head) {
      const T* source = static_cast<const T*>(from.data) + batch * from.batch_stride + cell * from.cell_stride +
                        head * from.head_stride;
      T* target =
          static_cast<T*>(to.data) + batch * to.batch_stride + head * to.head_stride + cell * to.cell_stride;
      copy_bytes(target, source, sizes.head_dim * sizeof(T));
      for (int64_t channel = sizes.head_dim; channel < to.cell_stride; ++channel) target[channel] = T{};
    }
  }
}

// ---- backward ----

// For kVectors vectors of channels: adds each place's share of the output's gradient to the four cells around it, and
// to `products` (zero before the first channels) the products of that gradient with the four cells, to be summed over
// the lanes later.
template <int kVectors, bool kFirst, class T, class C>
inline void scatter(
    const T* value, C* grad_value, int64_t stride, const C* grad_output, const Plan<C>& plan, Vector<C>* products) {
  Vector<C> grad[kVectors];
  for (int v = 0; v < kVectors; ++v) grad[v] = load(grad_output + v * kLanes<C>);
  for (int64_t i = 0; i < plan.count; ++i) {
    const int64_t top_left = plan.cell[i], bottom_left = top_left + plan.below[i], right = plan.right[i];
    const int64_t cells[kCorners] = {top_left, top_left + right, bottom_left, bottom_left + right};
    for (int corner = 0; corner < kCorners; ++corner) {
      const T* from = value + cells[corner] * stride;
      C* to = grad_value + cells[corner] * stride;
      const C weight = plan.corners[corner * plan.whole + i];
      Vector<C> product = kFirst ? Vector<C>{} : products[corner * plan.whole + i];
      for (int v = 0; v < kVectors; ++v) {
        const int64_t channel = v * kLanes<C>;
        product += load(from + channel) * grad[v];
        store(to + channel, load(to + channel) + grad[v] * weight);
      }
      products[corner * plan.whole + i] = product;
    }
  }
}

template <class T, class C>
inline void scatter_all(
    const T* value, C* grad_value, int64_t stride, const C* grad_output, int64_t channels, const Plan<C>& plan,
    Vector<C>* products) {
  constexpr int kMany = kVectors<C> * kLanes<C>;
  int64_t channel = 0;
  if (channels >= kMany) {
    scatter<kVectors<C>, true>(value, grad_value, stride, grad_output, plan, products);
    channel = kMany;
  } else {
    scatter<1, true>(value, grad_value, stride, grad_output, plan, products);
    channel = kLanes<C>;
  }
  for (; channel + kMany <= channels; channel += kMany) {
    scatter<kVectors<C>, false>(
        value + channel, grad_value + channel, stride, grad_output + channel, plan, products);
  }
  for (; channel < channels; channel += kLanes<C>) {
    scatter<1, false>(value + channel, grad_value + channel, stride, grad_output + channel, plan, products);
  }
}

// The gradients of a place's weight and position, from its products with the four cells. `products` are used up.
template <class C>
void differentiate(const Plan<C>& plan, Vector<C>* products, C* grad_weights, C* grad_x, C* grad_y) {
  const int64_t whole = plan.whole;
  const C* bilinear = plan.bilinear.get();
  for (int64_t i = 0; i < whole; i += kLanes<C>) {
    const Vector<C> top_left = sum_of_each_row<C>(products + kTopLeft * whole + i);
    const Vector<C> top_right = sum_of_each_row<C>(products + kTopRight * whole + i);
    const Vector<C> bottom_left = sum_of_each_row<C>(products + kBottomLeft * whole + i);
    const Vector<C> bottom_right = sum_of_each_row<C>(products + kBottomRight * whole + i);
    const Vector<C> left = load(bilinear + i), right = load(bilinear + whole + i);
    const Vector<C> above = load(bilinear + 2 * whole + i), under = load(bilinear + 3 * whole + i);
    const Vector<C> left_slope = load(bilinear + 4 * whole + i), right_slope = load(bilinear + 5 * whole + i);
    const Vector<C> above_slope = load(bilinear + 6 * whole + i), under_slope = load(bilinear + 7 * whole + i);
    const Vector<C> top = left * top_left + right * top_right, bottom = left * bottom_left + right * bottom_right;
    const Vector<C> weight = load(&plan.weights[i]);
    store(grad_weights + i, above * top + under * bottom);
    store(
        grad_x + i, weight * (above * (left_slope * top_left + right_slope * top_right) +
                              under * (left_slope * bottom_left + right_slope * bottom_right)));
    store(grad_y + i, weight * (above_slope * top + under_slope * bottom));
  }
}

// From gradients by position (`grad_x`, `grad_y`) to those of the references, level by level.
template <class C>
void write_reference_gradients(
    const Plan<C>& plan, const C* xy, const C* grad_x, const C* grad_y, int64_t width, C* to) {
  for (int64_t level = plan.first_level; level < plan.last_level; ++level) {
    const int64_t begin = (level - plan.first_level) * plan.num_points;
    for (int axis = 0; axis < 2; ++axis) {
      const C* grad = axis == 0 ? grad_x : grad_y;
      const C size = plan.sizes()[axis * plan.whole + begin];
      C centre = 0, side = 0;
      for (int64_t i = begin; i < begin + plan.num_points; ++i) {
        centre += grad[i];
        side += grad[i] * xy[2 * i + axis];
      }
      to[level * width + axis] = centre * size;
      if (width == 4) to[level * width + 2 + axis] = side * size * (C(0.5) / plan.num_points);
    }
  }
}

template <class T>
void backward_task(const BackwardArguments& arguments, int64_t batch, int64_t head, int64_t first, int64_t last) {
  using C = Compute<T>;
  const Sizes& sizes = arguments.sizes;
  const Levels& levels = sizes.levels;
  const Points& points = arguments.points;
  const int64_t heads = sizes.num_heads, head_dim = sizes.head_dim, whole_channels = padded<C>(head_dim);
  const int64_t all_cells = levels.start[levels.count - 1] +
                            int64_t{1} * levels.height[levels.count - 1] * levels.width[levels.count - 1];
  const int64_t cells =
      levels.start[last - 1] + int64_t{1} * levels.height[last - 1] * levels.width[last - 1] - levels.start[first];
  const int64_t stride = heads * head_dim;
  const int64_t start = ((batch * all_cells + levels.start[first]) * heads + head) * head_dim;
  const T* value = static_cast<const T*>(arguments.value) + start;
  T* grad_value = static_cast<T*>(arguments.grad_value) + start;

  // one head's rows next to each other fit the caches better, and there gradients have all their bits
  const bool copies = !arguments.in_place;
  Buffer<T> value_copy(copies ? cells * whole_channels : 0);
  Buffer<C> grad_copy(copies ? cells * whole_channels : 0);
  for (int64_t cell = 0; copies && cell < cells; ++cell) {
    copy_bytes(&value_copy[cell * whole_channels], value + cell * stride, head_dim * sizeof(T));
  }
  const T* rows = copies ? value_copy.get() : value;
  C* grad_rows = copies ? grad_copy.get() : reinterpret_cast<C*>(grad_value);  // in place, C is T
  const int64_t row_stride = copies ? whole_channels : stride;

  Plan<C> plan(sizes, first, last);
  Buffer<Vector<C>> products(kCorners * plan.whole);
  Buffer<C> grad_output(whole_channels), grad_weights(plan.whole), grad_x(plan.whole), grad_y(plan.whole);
  Buffer<C> grad_xy(2 * plan.whole), xy_scratch(2 * plan.whole);
  for (int64_t query = 0; query < sizes.num_queries; ++query) {
    const int64_t outer = batch * sizes.num_queries + query;
    const int64_t index = (outer * heads + head) * levels.count * sizes.num_points + first * sizes.num_points;
    const int64_t width = points.reference_width;
    if (points.references != nullptr) {
      plan.set_references(static_cast<const C*>(points.references) + outer * levels.count * width, width);
    }
    plan.set_weights(points, index);
    plan.template place<true>(points, index);
    read_channels(
        static_cast<const T*>(arguments.grad_output) + (outer * heads + head) * head_dim, head_dim, grad_output.get());

    scatter_all(rows, grad_rows, row_stride, grad_output.get(), whole_channels, plan, products.get());
    differentiate(plan, products.get(), grad_weights.get(), grad_x.get(), grad_y.get());

    copy_bytes(static_cast<C*>(arguments.grad_weights) + index, grad_weights.get(), plan.count * sizeof(C));
    for (int64_t i = 0; i < plan.count; ++i) {
      grad_xy[2 * i] = grad_x[i] * plan.scales()[i];
      grad_xy[2 * i + 1] = grad_y[i] * plan.scales()[plan.whole + i];
    }
    write_points(grad_xy.get(), 2 * plan.count, arguments.grad_points, points.type, 2 * index);
    if (points.references != nullptr) {
      const C* xy = read_points(points.points, points.type, 2 * index, 2 * plan.count, xy_scratch.get());
      const int64_t row = (head * sizes.batch_size * sizes.num_queries + outer) * levels.count * width;
      write_reference_gradients(
          plan, xy, grad_x.get(), grad_y.get(), width, static_cast<C*>(arguments.grad_references) + row);
    }
  }
  for (int64_t cell = 0; copies && cell < cells; ++cell) {
    write_channels(&grad_copy[cell * whole_channels], head_dim, grad_value + cell * stride);
  }
}

template <class T>
void backward(const BackwardArguments& arguments, int64_t level_groups, int64_t begin, int64_t end) {
  const Sizes& sizes = arguments.sizes;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task % level_groups, head = task / level_groups % sizes.num_heads;
    const int64_t first = group * sizes.levels.count / level_groups;
    const int64_t last = (group + 1) * sizes.levels.count / level_groups;
    backward_task<T>(arguments, task / level_groups / sizes.num_heads, head, first, last);
  }
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
    const C* weights = read_points(points.weights, points.type, index, count, weight_scratch.get());
    copy_bytes(grads.get(), static_cast<const C*>(arguments.grad_weights) + index, count * sizeof(C));
    if (grad_softmax_weights != nullptr) {
      const C* more = read_points(grad_softmax_weights, points.type, index, count, more_scratch.get());
      for (int64_t i = 0; i < count; ++i) grads[i] += more[i];
    }
    C sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += weights[i] * grads[i];
    for (int64_t i = 0; i < count; ++i) grads[i] = weights[i] * (grads[i] - sum);
    write_points(grads.get(), count, grad_logits, points.type, index);
  }
}

// ---- one entry for every dtype ----

template <class Function>
void for_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat:
      return function(float{});
    case Type::kDouble:
      return function(double{});
    case Type::kHalf:
      return function(Half{});
    case Type::kBFloat16:
      return function(BFloat16{});
  }
}

void copy_by_head_entry(const ForwardArguments& arguments, Rows to, int64_t begin, int64_t end) {
  for_type(arguments.type, [&](auto number) { copy_by_head<decltype(number)>(arguments, to, begin, end); });
}

void forward_entry(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  for_type(arguments.type, [&](auto number) { forward<decltype(number)>(arguments, begin, end); });
}

void backward_entry(const BackwardArguments& arguments, int64_t level_groups, int64_t begin, int64_t end) {
  for_type(arguments.type, [&](auto number) { backward<decltype(number)>(arguments, level_groups, begin, end); });
}

void softmax_backward_entry(
    const BackwardArguments& arguments, const void* grad_softmax_weights, void* grad_logits, int64_t begin,
    int64_t end) {
  for_type(arguments.type, [&](auto number) {
    softmax_backward<decltype(number)>(arguments, grad_softmax_weights, grad_logits, begin, end);
  });
}

const hf_dino::Processor kThisProcessor = {
    HF_DINO_PROCESSOR_NAME, HF_DINO_VECTOR_BYTES, copy_by_head_entry,
    forward_entry,          backward_entry,       softmax_backward_entry,
};

}  // namespace
