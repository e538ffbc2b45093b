// The computation on the CPU, for vectors of the width that the including file chose.
//
// A query and head look at `count` = levels * points places. For all of them at once, as many per vector as there are
// lanes, `Geometry` works out which four cells surround a place and how much each counts: `Places`. Then one loop
// without branches reads (and, backward, adds to) four rows of channels per place. A place outside its map, or at no
// number, has four weights of zero and some cell that exists; so an infinite cell may spoil queries that do not use it.
#include <algorithm>
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

inline int64_t end_of_level(const Levels& levels, int64_t level) {
  return levels.start[level] + int64_t{1} * levels.height[level] * levels.width[level];
}

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
void collect_rows(const T* from, int64_t from_stride, int64_t rows, int64_t length, T* to, int64_t to_stride) {
  constexpr int64_t kRowsAhead = 32;
  for (int64_t row = 0; row < rows; ++row) {
    if (row + kRowsAhead < rows) prefetch_bytes(from + (row + kRowsAhead) * from_stride, length * sizeof(T));
    copy_bytes(to + row * to_stride, from + row * from_stride, length * sizeof(T));
  }
}

template <class From>
inline void widen(const From* from, int64_t count, Compute<From>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// `count` numbers at `index` of an array of the points' type, as what is computed with. `needed` numbers may be read
// there, which is more where the last vector is not full; the numbers stay where they are if that is safe.
template <class C>
const C* read_points(const void* from, Type type, int64_t index, int64_t count, int64_t needed, C* scratch) {
  if (type == Type::kHalf) {
    if constexpr (sizeof(C) == 4) widen(static_cast<const Half*>(from) + index, count, scratch);
    return scratch;
  }
  if (type == Type::kBFloat16) {
    if constexpr (sizeof(C) == 4) widen(static_cast<const BFloat16*>(from) + index, count, scratch);
    return scratch;
  }
  const C* numbers = static_cast<const C*>(from) + index;
  if (count == needed) return numbers;
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

// Rows that are worked on together.
constexpr int64_t kBlock = 32;
// So many rows ahead points are asked for.
constexpr int64_t kAhead = 4;

// Where the queries and heads of a block look, and how much each cell there counts; row by row.
template <class C>
struct Places {
  Buffer<Integer<C>> cell;  // top left of the four; counted from the first one of the levels
  Buffer<C> weights;        // attention
  Buffer<C> corners;        // attention times bilinear, corner by corner
  // only for gradients
  Buffer<C> bilinear;  // near x, far x, near y, far y and their slopes
  Buffer<C> scales;    // by how much a place moves with its numbers: x of every place, then y of every place

  Places(int64_t whole, bool slopes)
      : cell(kBlock * whole),
        weights(kBlock * whole),
        corners(kBlock * kCorners * whole),
        bilinear(slopes ? kBlock * 8 * whole : 0),
        scales(slopes ? kBlock * 2 * whole : 0) {}
};

// What all queries and heads have in common on the levels [first_level, last_level), the reference points of a block of
// rows, and the places found with them.
template <class C>
class Geometry {
  using Ints = IntegerVector<C>;

 public:
  const int64_t first_level, last_level, num_points;
  const int64_t count, whole;  // places, and the same in whole vectors

 private:
  // position = centre * size - 0.5 + number * span * unit, with x of every place, then y of every place
  Buffer<C> centres_, spans_;  // row by row
  Buffer<C> sizes_, units_, has_successor_;
  Buffer<Integer<C>> last_, widths_, starts_;
  Buffer<int64_t> levels_;  // of every place, from the first one on
  Buffer<C> scratch_;

 public:
  const int64_t stride;  // numbers from a cell to the next one
  // numbers from a place's cell to the one to its right and to the one below; zero where the map is one cell wide
  Buffer<int64_t> right, below;

  Geometry(
      const Sizes& sizes, int64_t reference_width, int64_t first_level, int64_t last_level, int64_t stride, bool slopes)
      : first_level(first_level),
        last_level(last_level),
        num_points(sizes.num_points),
        count((last_level - first_level) * num_points),
        whole(padded<C>(count)),
        centres_(kBlock * 2 * whole),
        spans_(kBlock * 2 * whole),
        sizes_(2 * whole),
        units_(2 * whole),
        has_successor_(2 * whole),
        last_(2 * whole),
        widths_(whole),
        starts_(whole),
        levels_(whole),
        scratch_(2 * whole),
        stride(stride),
        right(whole),
        below(whole),
        places(whole, slopes) {
    const Levels& levels = sizes.levels;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = first_level + i / num_points;
      const int32_t width = levels.width[level], height = levels.height[level];
      sizes_[i] = static_cast<C>(width), sizes_[whole + i] = static_cast<C>(height);
      has_successor_[i] = width > 1, has_successor_[whole + i] = height > 1;
      last_[i] = width > 1 ? width - 2 : 0, last_[whole + i] = height > 1 ? height - 2 : 0;
      right[i] = width > 1 ? stride : 0, below[i] = height > 1 ? width * stride : 0;
      widths_[i] = width;
      levels_[i] = level - first_level;
      starts_[i] = levels.start[level] - levels.start[first_level];
    }
    // locations are fractions of a map; offsets are in cells around a point, or around the centre of a box in
    // 1 / num_points half-sides
    for (int64_t i = 0; i < 2 * whole; ++i) {
      units_[i] = reference_width == 2 ? 1 : reference_width == 4 ? sizes_[i] * (C(0.5) / num_points) : sizes_[i];
    }
    for (int64_t i = 0; i < kBlock * 2 * whole; ++i) spans_[i] = 1;
  }

  Places<C> places;

  const C* scales(int64_t row) const { return &places.scales[row * 2 * whole]; }
  const C* sizes() const { return sizes_.get(); }

  // Only copies: arithmetic on single numbers might be rounded otherwise than on vectors of them, and so depend on how
  // the levels are divided.
  void set_references(const C* references, int64_t width, int64_t row) {
    references += first_level * width;
    C* centres = centres_.get() + row * 2 * whole;
    C* spans = spans_.get() + row * 2 * whole;
    for (int64_t i = 0; i < count; ++i) {
      const C* reference = references + levels_[i] * width;
      centres[i] = reference[0], centres[whole + i] = reference[1];
      if (width == 4) spans[i] = reference[2], spans[whole + i] = reference[3];
    }
  }

  // Reads the weights, or logits, at `index` of `points`.
  C* read_weights(const Points& points, int64_t index, int64_t row) {
    C* weights = &places.weights[row * whole];
    const C* numbers = read_points(points.weights, points.type, index, count, whole, weights);
    if (numbers != weights) copy_bytes(weights, numbers, count * sizeof(C));
    return weights;
  }

  // Finds the places at `index` of `points` for a row that has its weights and references already.
  template <bool kSlopes>
  void place(const Points& points, int64_t index, int64_t row) {
    const C* xy = read_points(points.points, points.type, 2 * index, 2 * count, 2 * whole, scratch_.get());
    const C* centres = centres_.get() + row * 2 * whole;
    const C* spans = spans_.get() + row * 2 * whole;
    for (int64_t i = 0; i < whole; i += kLanes<C>) {
      const Vector<C> first = load(xy + 2 * i), second = load(xy + 2 * i + kLanes<C>);
      const Vector<C> xs = one_of_each_pair<C, kLanes<C>, 1, 0>(first, second);
      const Vector<C> ys = one_of_each_pair<C, kLanes<C>, 1, 1>(first, second);
      const Vector<C> x_scale = load(spans + i) * load(&units_[i]);
      const Vector<C> y_scale = load(spans + whole + i) * load(&units_[whole + i]);
      const Vector<C> x = load(centres + i) * load(&sizes_[i]) - C(0.5) + xs * x_scale;
      const Vector<C> y = load(centres + whole + i) * load(&sizes_[whole + i]) - C(0.5) + ys * y_scale;
      // false for what is no number
      const Ints inside = (x >= -1) & (x < load(&sizes_[i])) & (y >= -1) & (y < load(&sizes_[whole + i]));
      const Vector<C> right_exists = load(&has_successor_[i]), below_exists = load(&has_successor_[whole + i]);
      const Neighbours<C> across(only_where(inside, x), right_exists, load(&last_[i]));
      const Neighbours<C> down(only_where(inside, y), below_exists, load(&last_[whole + i]));
      store(&places.cell[row * whole + i], down.cell * load(&widths_[i]) + across.cell + load(&starts_[i]));

      const Vector<C> weight = load(&places.weights[row * whole + i]);
      const Vector<C> above = only_where(inside, down.near) * weight, under = only_where(inside, down.far) * weight;
      C* corners = &places.corners[row * kCorners * whole + i];
      store(corners + kTopLeft * whole, above * across.near);
      store(corners + kTopRight * whole, above * across.far);
      store(corners + kBottomLeft * whole, under * across.near);
      store(corners + kBottomRight * whole, under * across.far);
      if constexpr (kSlopes) {
        store(&places.scales[row * 2 * whole + i], x_scale);
        store(&places.scales[row * 2 * whole + whole + i], y_scale);
        C* bilinear = &places.bilinear[row * 8 * whole + i];
        store(bilinear + 0 * whole, only_where(inside, across.near));
        store(bilinear + 1 * whole, only_where(inside, across.far));
        store(bilinear + 2 * whole, only_where(inside, down.near));
        store(bilinear + 3 * whole, only_where(inside, down.far));
        store(bilinear + 4 * whole, only_where(inside, across.near_slope()));
        store(bilinear + 5 * whole, only_where(inside, across.far_slope(right_exists)));
        store(bilinear + 6 * whole, only_where(inside, down.near_slope()));
        store(bilinear + 7 * whole, only_where(inside, down.far_slope(below_exists)));
      }
    }
  }

  // Asks for the points at `index`.
  void prefetch_points(const Points& points, int64_t index) const {
    const int64_t bytes = points.type == Type::kDouble ? 8 : points.type == Type::kFloat ? 4 : 2;
    prefetch_bytes(static_cast<const char*>(points.weights) + index * bytes, count * bytes);
    prefetch_bytes(static_cast<const char*>(points.points) + 2 * index * bytes, 2 * count * bytes);
  }

  // Asks for the rows of the places' cells.
  template <class Item>
  void prefetch_cells(const Item* rows, int64_t channels, int64_t row) const {
    const int64_t bytes = channels * sizeof(Item);
    for (int64_t i = 0; i < count; ++i) {
      const Item* top = rows + places.cell[row * whole + i] * stride;
      const Item* bottom = top + below[i];
      for (const Item* cell : {top, top + right[i], bottom, bottom + right[i]}) prefetch_bytes(cell, bytes);
    }
  }
};

// ---- forward ----

// Adds kVectors vectors of channels of a row's places [begin, end) to `sums`, where they are in the order of load_pair.
// The two rows of cells are added up by themselves, because an addition has to wait for the one before it.
template <int kVectors, class T, class C>
inline void gather(
    const T* value, const Geometry<C>& geometry, int64_t row, int64_t begin, int64_t end, C* sums) {
  const int64_t whole = geometry.whole;
  const Integer<C>* cells = &geometry.places.cell[row * whole];
  const C* corners = &geometry.places.corners[row * kCorners * whole];
  Vector<C> above[kVectors], under[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) above[v] = load(sums + v * kLanes<C>);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t right = geometry.right[i];
    const T* top = value + cells[i] * geometry.stride;
    const T* bottom = top + geometry.below[i];
    const C w0 = corners[kTopLeft * whole + i], w1 = corners[kTopRight * whole + i];
    const C w2 = corners[kBottomLeft * whole + i], w3 = corners[kBottomRight * whole + i];
    if constexpr (kVectors == 1) {
      above[0] += load(top) * w0;
      above[0] += load(top + right) * w1;
      under[0] += load(bottom) * w2;
      under[0] += load(bottom + right) * w3;
    }
    Vector<C> a, b;
    for (int v = 0; v + 1 < kVectors; v += 2) {
      const int64_t channel = v * kLanes<C>;
      load_pair(top + channel, &a, &b);
      above[v] += a * w0, above[v + 1] += b * w0;
      load_pair(bottom + channel, &a, &b);
      under[v] += a * w2, under[v + 1] += b * w2;
      load_pair(top + right + channel, &a, &b);
      above[v] += a * w1, above[v + 1] += b * w1;
      load_pair(bottom + right + channel, &a, &b);
      under[v] += a * w3, under[v + 1] += b * w3;
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes<C>, above[v] + under[v]);
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

// The rows of one thread. With copies in the order (picture, head, query): the cells of one head are copied next to
// each other, where the caches hold more of them. Without, (picture, query, head): the heads of a query look at the
// same region.
template <class T>
class Forward {
  using C = Compute<T>;
  static constexpr int64_t kMany = kVectors<C> * kLanes<C>;

 public:
  explicit Forward(const ForwardArguments& arguments)
      : arguments_(arguments),
        sizes_(arguments.sizes),
        cells_(end_of_level(sizes_.levels, sizes_.levels.count - 1)),
        stride_(sizes_.num_heads * sizes_.head_dim),
        whole_channels_(padded<C>(sizes_.head_dim)),
        geometry_(
            sizes_, arguments.points.reference_width, 0, sizes_.levels.count,
            arguments.copies ? whole_channels_ : stride_, false),
        sums_(kBlock * whole_channels_),
        copy_(arguments.copies ? cells_ * whole_channels_ : 0) {}

  void run(int64_t begin, int64_t end) {
    if (arguments_.copies) {
      run_by_level(begin, end);
    } else {
      run_row_by_row(begin, end);
    }
  }

 private:
  struct Row {
    int64_t batch, head, outer;  // outer: picture and query
    int64_t index;               // picture, query and head
  };

  Row locate(int64_t row) const {
    const int64_t heads = sizes_.num_heads, queries = sizes_.num_queries;
    const int64_t batch = row / (heads * queries);
    const int64_t head = arguments_.copies ? row / queries % heads : row % heads;
    const int64_t outer = arguments_.copies ? batch * queries + row % queries : row / heads;
    return {batch, head, outer, outer * heads + head};
  }

  // Blocks of rows of one head. What neighbours read on one level fits the innermost cache.
  void run_by_level(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t end_of_head = (begin / sizes_.num_queries + 1) * sizes_.num_queries;
      const int64_t last = std::min({begin + kBlock, end_of_head, end});
      copy_head(locate(begin));
      for (int64_t row = begin; row < last; ++row) set_references(locate(row), row - begin);
      for (int64_t row = begin; row < last; ++row) prepare(row, row - begin);
      for (int64_t level = 0; level < sizes_.levels.count; ++level) {
        const int64_t first = level * sizes_.num_points;
        for (int64_t row = begin; row < last; ++row) {
          read(copy_.get(), first, first + sizes_.num_points, row - begin);
        }
      }
      for (int64_t row = begin; row < last; ++row) write(locate(row), row - begin);
      begin = last;
    }
  }

  // The places of a row are found, and their cells asked for, while the row before it is read.
  void run_row_by_row(int64_t begin, int64_t end) {
    prepare_and_prefetch(begin);
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < end) prepare_and_prefetch(row + 1);
      read(value_of(locate(row)), 0, geometry_.count, row % 2);
      write(locate(row), row % 2);
    }
  }

  void prepare_and_prefetch(int64_t row) {
    set_references(locate(row), row % 2);
    prepare(row, row % 2);
    geometry_.prefetch_cells(value_of(locate(row)), sizes_.head_dim, row % 2);
  }

  const T* value_of(const Row& row) const {
    return static_cast<const T*>(arguments_.value) + row.batch * cells_ * stride_ + row.head * sizes_.head_dim;
  }

  void copy_head(const Row& row) {
    const int64_t of = row.batch * sizes_.num_heads + row.head;
    if (copied_ == of) return;
    copied_ = of;
    collect_rows(value_of(row), stride_, cells_, sizes_.head_dim, copy_.get(), whole_channels_);
  }

  void set_references(const Row& row, int64_t place) {
    if (arguments_.points.references == nullptr) return;
    const int64_t width = arguments_.points.reference_width;
    const C* references = static_cast<const C*>(arguments_.points.references);
    geometry_.set_references(references + row.outer * sizes_.levels.count * width, width, place);
  }

  void prepare(int64_t row, int64_t place) {
    const Points& points = arguments_.points;
    const int64_t index = locate(row).index * geometry_.count;
    C* weights = geometry_.read_weights(points, index, place);
    if (points.references != nullptr) {
      softmax(weights, geometry_.count);
      write_points(weights, geometry_.count, arguments_.softmax_weights, points.type, index);
    }
    geometry_.template place<false>(points, index, place);
    prefetch(row + kAhead);
    std::memset(static_cast<void*>(&sums_[place * whole_channels_]), 0, whole_channels_ * sizeof(C));
  }

  void prefetch(int64_t row) const {
    if (row >= sizes_.batch_size * sizes_.num_heads * sizes_.num_queries) return;
    geometry_.prefetch_points(arguments_.points, locate(row).index * geometry_.count);
  }

  void read(const T* value, int64_t begin, int64_t end, int64_t place) {
    C* sums = &sums_[place * whole_channels_];
    int64_t channel = 0;
    for (; channel + kMany <= whole_channels_; channel += kMany) {
      gather<kVectors<C>>(value + channel, geometry_, place, begin, end, sums + channel);
    }
    for (; channel < whole_channels_; channel += kLanes<C>) {
      gather<1>(value + channel, geometry_, place, begin, end, sums + channel);
    }
  }

  void write(const Row& row, int64_t place) {
    C* sums = &sums_[place * whole_channels_];
    for (int64_t end = kMany; end <= whole_channels_; end += kMany) {
      for (int v = 0; v + 1 < kVectors<C>; v += 2) {
        C* pair = sums + end - kMany + v * kLanes<C>;
        store_pair<T>(pair, load(pair), load(pair + kLanes<C>));
      }
    }
    write_channels(sums, sizes_.head_dim, static_cast<T*>(arguments_.output) + row.index * sizes_.head_dim);
  }

  const ForwardArguments& arguments_;
  const Sizes& sizes_;
  const int64_t cells_, stride_, whole_channels_;
  Geometry<C> geometry_;
  Buffer<C> sums_;
  Buffer<T> copy_;  // of the cells of one head
  int64_t copied_ = -1;
};

template <class T>
void forward(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  Forward<T>(arguments).run(begin, end);
}

// ---- backward ----

// For kVectors vectors of channels of a row's places [begin, end): adds each place's share of the output's gradient to
// the four cells around it, and to `products`, corner by corner, the products of that gradient with the four cells, to
// be summed over the lanes later.
template <int kVectors, class T, class C>
inline void scatter(
    const T* value, C* grad_value, const C* grad_output, const Geometry<C>& geometry, int64_t row, int64_t begin,
    int64_t end, Vector<C>* products) {
  const int64_t whole = geometry.whole;
  const Integer<C>* cells = &geometry.places.cell[row * whole];
  const C* corners = &geometry.places.corners[row * kCorners * whole];
  Vector<C> grad[kVectors];
  for (int v = 0; v < kVectors; ++v) grad[v] = load(grad_output + v * kLanes<C>);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t right = geometry.right[i];
    const int64_t top = cells[i] * geometry.stride, bottom = top + geometry.below[i];
    const int64_t offsets[kCorners] = {top, top + right, bottom, bottom + right};
    for (int corner = 0; corner < kCorners; ++corner) {
      const T* from = value + offsets[corner];
      C* to = grad_value + offsets[corner];
      const C weight = corners[corner * whole + i];
      Vector<C> product{};
      for (int v = 0; v < kVectors; ++v) {
        const int64_t channel = v * kLanes<C>;
        product += load(from + channel) * grad[v];
        store(to + channel, load(to + channel) + grad[v] * weight);
      }
      products[corner * (end - begin) + i - begin] += product;
    }
  }
}

// The gradients of a row's weights and positions, from the products of its places with the four cells around them.
template <class C>
void differentiate(
    const Geometry<C>& geometry, int64_t row, const C* products, C* grad_weights, C* grad_x, C* grad_y) {
  const int64_t whole = geometry.whole;
  for (int64_t i = 0; i < whole; i += kLanes<C>) {
    const Vector<C> top_left = load(products + kTopLeft * whole + i);
    const Vector<C> top_right = load(products + kTopRight * whole + i);
    const Vector<C> bottom_left = load(products + kBottomLeft * whole + i);
    const Vector<C> bottom_right = load(products + kBottomRight * whole + i);
    const C* bilinear = &geometry.places.bilinear[row * 8 * whole + i];
    const Vector<C> left = load(bilinear), right = load(bilinear + whole);
    const Vector<C> above = load(bilinear + 2 * whole), under = load(bilinear + 3 * whole);
    const Vector<C> left_slope = load(bilinear + 4 * whole), right_slope = load(bilinear + 5 * whole);
    const Vector<C> above_slope = load(bilinear + 6 * whole), under_slope = load(bilinear + 7 * whole);
    const Vector<C> top = left * top_left + right * top_right, bottom = left * bottom_left + right * bottom_right;
    const Vector<C> weight = load(&geometry.places.weights[row * whole + i]);
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
    const Geometry<C>& geometry, const C* xy, const C* grad_x, const C* grad_y, int64_t width, C* to) {
  for (int64_t level = geometry.first_level; level < geometry.last_level; ++level) {
    const int64_t begin = (level - geometry.first_level) * geometry.num_points;
    for (int axis = 0; axis < 2; ++axis) {
      const C* grad = axis == 0 ? grad_x : grad_y;
      const C size = geometry.sizes()[axis * geometry.whole + begin];
      C centre = 0, side = 0;
      for (int64_t i = begin; i < begin + geometry.num_points; ++i) {
        centre += grad[i];
        side += grad[i] * xy[2 * i + axis];
      }
      to[level * width + axis] = centre * size;
      if (width == 4) to[level * width + 2 + axis] = side * size * (C(0.5) / geometry.num_points);
    }
  }
}

// One picture, head and group of levels: all queries, block by block in copies, one by one in place.
template <class T>
class BackwardTask {
  using C = Compute<T>;

 public:
  // `value_copy` and `grad_copy` hold the cells of the levels, unless the task works in place.
  BackwardTask(
      const BackwardArguments& arguments, int64_t batch, int64_t head, int64_t first, int64_t last, T* value_copy,
      C* grad_copy)
      : arguments_(arguments),
        sizes_(arguments.sizes),
        batch_(batch),
        head_(head),
        cells_(end_of_level(sizes_.levels, last - 1) - sizes_.levels.start[first]),
        stride_(sizes_.num_heads * sizes_.head_dim),
        whole_channels_(padded<C>(sizes_.head_dim)),
        geometry_(
            sizes_, arguments.points.reference_width, first, last, arguments.in_place ? stride_ : whole_channels_, true),
        vector_products_(padded<C>(kCorners * geometry_.count)),
        sums_(padded<C>(kCorners * geometry_.count)),
        products_(kBlock * kCorners * geometry_.whole),
        grad_output_(kBlock * whole_channels_),
        grad_weights_(geometry_.whole),
        grad_x_(geometry_.whole),
        grad_y_(geometry_.whole),
        grad_xy_(2 * geometry_.whole),
        scratch_(2 * geometry_.whole),
        value_copy_(value_copy),
        grad_copy_(grad_copy) {
    const int64_t all_cells = end_of_level(sizes_.levels, sizes_.levels.count - 1);
    const int64_t cell = batch * all_cells + sizes_.levels.start[first];
    const int64_t start = (cell * sizes_.num_heads + head) * sizes_.head_dim;
    value_ = static_cast<const T*>(arguments.value) + start;
    grad_value_ = static_cast<T*>(arguments.grad_value) + start;
  }

  void run() {
    if (arguments_.in_place) {
      run_query_by_query();
      return;
    }
    collect_rows(value_, stride_, cells_, sizes_.head_dim, value_copy_, whole_channels_);
    std::memset(static_cast<void*>(grad_copy_), 0, cells_ * whole_channels_ * sizeof(C));
    run_by_level();
    for (int64_t cell = 0; cell < cells_; ++cell) {
      write_channels(grad_copy_ + cell * whole_channels_, sizes_.head_dim, grad_value_ + cell * stride_);
    }
  }

 private:
  void run_by_level() {
    for (int64_t begin = 0; begin < sizes_.num_queries; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, sizes_.num_queries);
      for (int64_t query = begin; query < end; ++query) set_references(query, query - begin);
      for (int64_t query = begin; query < end; ++query) prepare(query, query - begin);
      for (int64_t first = 0; first < geometry_.count; first += sizes_.num_points) {
        for (int64_t query = begin; query < end; ++query) {
          add(value_copy_, grad_copy_, first, first + sizes_.num_points, query - begin);
        }
      }
      for (int64_t query = begin; query < end; ++query) write(query, query - begin);
    }
  }

  void run_query_by_query() {
    C* grad_value = reinterpret_cast<C*>(grad_value_);  // C is T
    prepare_and_prefetch(0);
    for (int64_t query = 0; query < sizes_.num_queries; ++query) {
      if (query + 1 < sizes_.num_queries) prepare_and_prefetch(query + 1);
      add(value_, grad_value, 0, geometry_.count, query % 2);
      write(query, query % 2);
    }
  }

  void prepare_and_prefetch(int64_t query) {
    set_references(query, query % 2);
    prepare(query, query % 2);
    geometry_.prefetch_cells(value_, sizes_.head_dim, query % 2);
    geometry_.prefetch_cells(grad_value_, sizes_.head_dim, query % 2);
  }

  int64_t outer(int64_t query) const { return batch_ * sizes_.num_queries + query; }

  int64_t index(int64_t query) const {
    const int64_t row = outer(query) * sizes_.num_heads + head_;
    return (row * sizes_.levels.count + geometry_.first_level) * sizes_.num_points;
  }

  void set_references(int64_t query, int64_t place) {
    if (arguments_.points.references == nullptr) return;
    const int64_t width = arguments_.points.reference_width;
    const C* references = static_cast<const C*>(arguments_.points.references);
    geometry_.set_references(references + outer(query) * sizes_.levels.count * width, width, place);
  }

  void prepare(int64_t query, int64_t place) {
    const Points& points = arguments_.points;
    geometry_.read_weights(points, index(query), place);
    geometry_.template place<true>(points, index(query), place);
    const int64_t channels = sizes_.head_dim;
    const T* grad_output = static_cast<const T*>(arguments_.grad_output) + head_ * channels;
    read_channels(grad_output + outer(query) * stride_, channels, &grad_output_[place * whole_channels_]);
    if (query + kAhead < sizes_.num_queries) {
      geometry_.prefetch_points(points, index(query + kAhead));
      prefetch_bytes(grad_output + outer(query + kAhead) * stride_, channels * sizeof(T));
    }
  }

  void add(const T* value, C* grad_value, int64_t begin, int64_t end, int64_t place) {
    constexpr int64_t kMany = kVectors<C> * kLanes<C>;
    const C* grad_output = &grad_output_[place * whole_channels_];
    Vector<C>* products = vector_products_.get();
    const int64_t rows = kCorners * (end - begin), whole_rows = padded<C>(rows);
    for (int64_t i = 0; i < whole_rows; ++i) products[i] = Vector<C>{};
    int64_t channel = 0;
    for (; channel + kMany <= whole_channels_; channel += kMany) {
      scatter<kVectors<C>>(
          value + channel, grad_value + channel, grad_output + channel, geometry_, place, begin, end, products);
    }
    for (; channel < whole_channels_; channel += kLanes<C>) {
      scatter<1>(
          value + channel, grad_value + channel, grad_output + channel, geometry_, place, begin, end, products);
    }
    for (int64_t i = 0; i < whole_rows; i += kLanes<C>) store(&sums_[i], sum_of_each_row<C>(products + i));
    C* to = &products_[place * kCorners * geometry_.whole + begin];
    for (int corner = 0; corner < kCorners; ++corner) {
      copy_bytes(to + corner * geometry_.whole, &sums_[corner * (end - begin)], (end - begin) * sizeof(C));
    }
  }

  void write(int64_t query, int64_t place) {
    const Points& points = arguments_.points;
    const int64_t count = geometry_.count, whole = geometry_.whole;
    differentiate(
        geometry_, place, &products_[place * kCorners * whole], grad_weights_.get(), grad_x_.get(), grad_y_.get());
    copy_bytes(static_cast<C*>(arguments_.grad_weights) + index(query), grad_weights_.get(), count * sizeof(C));
    const C* scales = geometry_.scales(place);
    for (int64_t i = 0; i < count; ++i) {
      grad_xy_[2 * i] = grad_x_[i] * scales[i];
      grad_xy_[2 * i + 1] = grad_y_[i] * scales[whole + i];
    }
    write_points(grad_xy_.get(), 2 * count, arguments_.grad_points, points.type, 2 * index(query));
    if (points.references != nullptr) {
      const C* xy = read_points(points.points, points.type, 2 * index(query), 2 * count, 2 * count, scratch_.get());
      const int64_t row = head_ * sizes_.batch_size * sizes_.num_queries + outer(query);
      C* to = static_cast<C*>(arguments_.grad_references) + row * sizes_.levels.count * points.reference_width;
      write_reference_gradients(geometry_, xy, grad_x_.get(), grad_y_.get(), points.reference_width, to);
    }
  }

  const BackwardArguments& arguments_;
  const Sizes& sizes_;
  const int64_t batch_, head_, cells_, stride_, whole_channels_;
  Geometry<C> geometry_;
  Buffer<Vector<C>> vector_products_;
  Buffer<C> sums_, products_, grad_output_, grad_weights_, grad_x_, grad_y_, grad_xy_, scratch_;
  T* const value_copy_;
  C* const grad_copy_;
  const T* value_;
  T* grad_value_;
};

template <class T>
void backward(const BackwardArguments& arguments, int64_t level_groups, int64_t begin, int64_t end) {
  const Sizes& sizes = arguments.sizes;
  const auto first_of = [&](int64_t group) { return group * sizes.levels.count / level_groups; };
  int64_t cells = 0;  // of the largest group
  for (int64_t group = 0; group < level_groups; ++group) {
    const int64_t end_of_group = end_of_level(sizes.levels, first_of(group + 1) - 1);
    cells = std::max(cells, end_of_group - sizes.levels.start[first_of(group)]);
  }
  // copies of one head, which the caches hold better than a part of all, and where gradients have all their bits
  const int64_t numbers = arguments.in_place ? 0 : cells * padded<Compute<T>>(sizes.head_dim);
  Buffer<T> value_copy(numbers);
  Buffer<Compute<T>> grad_copy(numbers);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task % level_groups, head = task / level_groups % sizes.num_heads;
    const int64_t first = first_of(group), last = first_of(group + 1);
    const int64_t batch = task / level_groups / sizes.num_heads;
    BackwardTask<T>(arguments, batch, head, first, last, value_copy.get(), grad_copy.get()).run();
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
    HF_DINO_PROCESSOR_NAME, HF_DINO_VECTOR_BYTES, forward_entry, backward_entry, softmax_backward_entry,
};

}  // namespace
