// Where the points of a query and head lie: which four cells surround each, and how much each of them counts. All points
// at once, as many per vector as there are lanes. A place outside its map, or at no number, has four weights of zero and
// some cell that exists; so an infinite cell may spoil queries that do not use it.
#pragma once

#include "memory.h"

namespace {

inline int64_t end_of_level(const Levels& levels, int64_t level) {
  return levels.start[level] + int64_t{1} * levels.height[level] * levels.width[level];
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
// How much the cells to the left and right, above and below count, and how that changes with the place.
enum Bilinear { kLeft, kRight, kAbove, kUnder, kLeftSlope, kRightSlope, kAboveSlope, kUnderSlope, kBilinear };

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
  Buffer<C> bilinear;  // by `Bilinear`
  Buffer<C> scales;    // by how much a place moves with its numbers: x of every place, then y of every place

  Places(int64_t whole, bool slopes)
      : cell(kBlock * whole),
        weights(kBlock * whole),
        corners(kBlock * kCorners * whole),
        bilinear(slopes ? kBlock * kBilinear * whole : 0),
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
      units_[i] = reference_width == 2 ? 1 : reference_width == 4 ? sizes_[i] * half_side_unit() : sizes_[i];
    }
    for (int64_t i = 0; i < kBlock * 2 * whole; ++i) spans_[i] = 1;
  }

  Places<C> places;

  // Offsets around a box count in these parts of its sides.
  C half_side_unit() const { return C(0.5) / num_points; }

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
        C* bilinear = &places.bilinear[row * kBilinear * whole + i];
        store(bilinear + kLeft * whole, only_where(inside, across.near));
        store(bilinear + kRight * whole, only_where(inside, across.far));
        store(bilinear + kAbove * whole, only_where(inside, down.near));
        store(bilinear + kUnder * whole, only_where(inside, down.far));
        store(bilinear + kLeftSlope * whole, only_where(inside, across.near_slope()));
        store(bilinear + kRightSlope * whole, only_where(inside, across.far_slope(right_exists)));
        store(bilinear + kAboveSlope * whole, only_where(inside, down.near_slope()));
        store(bilinear + kUnderSlope * whole, only_where(inside, down.far_slope(below_exists)));
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

}  // namespace
