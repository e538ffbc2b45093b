// Where the points of a query and head lie: which four cells surround each, and how much each of them counts. All points
// at once, as many per vector as there are lanes. A place outside its map, or at no number, has four weights of zero and
// some cell that exists; so an infinite cell may spoil queries that do not use it.
#pragma once

#include "convert.h"

namespace {

inline int64_t end_of_level(const Levels& levels, int64_t level) {
  return levels.start[level] + int64_t{1} * levels.height[level] * levels.width[level];
}

// Along one axis of a map: a cell, and how much it (`near`) and the cell after it (`far`) count. These are the hat
// functions max(0, 1 - distance), so a neighbour beyond the border counts zero by itself once the cell is one that has
// a successor.
template <class C>
struct LinearWeights {
  Vec<C> offset;  // from the cell: -1 to 2, as beyond the borders it is not the cell next to the position
  Vec<C> w0, w1;
  IntVec<C> cell;

  LinearWeights(Vec<C> position, Vec<C> has_next, IntVec<C> last) {
    cell = __builtin_convertvector(position, IntVec<C>);
    cell += __builtin_convertvector(cell, Vec<C>) > position;  // true is -1: round down
    cell = mask_and(cell > 0, cell);
    cell = blend(cell < last, cell, last);
    offset = position - __builtin_convertvector(cell, Vec<C>);
    w0 = hat(offset);
    w1 = hat(offset - 1) * has_next;
  }

  static Vec<C> hat(Vec<C> distance) {
    const Vec<C> height = 1 - blend(distance < 0, -distance, distance);
    return mask_and(height > 0, height);
  }

  // Of `near` and `far` by the position. At a cell's centre the one to the right, as grid_sample has it.
  Vec<C> dw0() const {
    return blend(offset < 0, broadcast<C>(1), mask_and(offset < 1, broadcast<C>(-1)));
  }
  Vec<C> dw1(Vec<C> has_next) const {
    return mask_and(offset >= 0, blend(offset < 1, broadcast<C>(1), broadcast<C>(-1))) * has_next;
  }
};

enum Corner { kY0X0, kY0X1, kY1X0, kY1X1, kNumCorners };
// How much the cells to the left and right, above and below count, and how that changes with the place.
enum AxisWeight { kWx0, kWx1, kWy0, kWy1, kDwx0, kDwx1, kDwy0, kDwy1, kNumAxisWeights };

// Rows that are worked on together.
constexpr int64_t kRowsPerBlock = 32;
// So many rows ahead points are asked for.
constexpr int64_t kPrefetchRows = 4;

// Where the queries and heads of a block look, and how much each cell there counts; row by row.
template <class C>
struct SamplePoints {
  Buffer<Int<C>> cell;  // top left of the four; counted from the first one of the levels
  Buffer<C> weights;        // attention
  Buffer<C> corner_weights;        // attention times bilinear, corner by corner
  // only for gradients
  Buffer<C> axis_weights;  // by `Bilinear`
  Buffer<C> scales;    // by how much a place moves with its numbers: x of every place, then y of every place

  SamplePoints(int64_t padded_count, bool with_grad)
      : cell(kRowsPerBlock * padded_count),
        weights(kRowsPerBlock * padded_count),
        corner_weights(kRowsPerBlock * kNumCorners * padded_count),
        axis_weights(with_grad ? kRowsPerBlock * kNumAxisWeights * padded_count : 0),
        scales(with_grad ? kRowsPerBlock * 2 * padded_count : 0) {}
};

// What all queries and heads have in common on the levels [first_level, last_level), the reference points of a block of
// rows, and the places found with them.
template <class C>
class SampleGrid {
  using Ints = IntVec<C>;

 public:
  const int64_t first_level, last_level, num_points;
  const int64_t count, padded_count;  // places, and the same in whole vectors

 private:
  // position = centre * size - 0.5 + number * span * unit, with x of every place, then y of every place
  Buffer<C> centres_, spans_;  // row by row
  Buffer<C> sizes_, units_, has_next_;
  Buffer<Int<C>> last_, widths_, starts_;
  Buffer<int64_t> levels_;  // of every place, from the first one on
  Buffer<C> scratch_;

 public:
  const int64_t stride;  // numbers from a cell to the next one
  // numbers from a place's cell to the one to its right and to the one below; zero where the map is one cell wide
  Buffer<int64_t> x1_offset, y1_offset;

  SampleGrid(
      const Sizes& sizes, int64_t reference_dim, int64_t first_level, int64_t last_level, int64_t stride, bool with_grad)
      : first_level(first_level),
        last_level(last_level),
        num_points(sizes.num_points),
        count((last_level - first_level) * num_points),
        padded_count(pad_to_vec<C>(count)),
        centres_(kRowsPerBlock * 2 * padded_count),
        spans_(kRowsPerBlock * 2 * padded_count),
        sizes_(2 * padded_count),
        units_(2 * padded_count),
        has_next_(2 * padded_count),
        last_(2 * padded_count),
        widths_(padded_count),
        starts_(padded_count),
        levels_(padded_count),
        scratch_(2 * padded_count),
        stride(stride),
        x1_offset(padded_count),
        y1_offset(padded_count),
        samples(padded_count, with_grad) {
    const Levels& levels = sizes.levels;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = first_level + i / num_points;
      const int32_t width = levels.width[level], height = levels.height[level];
      sizes_[i] = static_cast<C>(width), sizes_[padded_count + i] = static_cast<C>(height);
      has_next_[i] = width > 1, has_next_[padded_count + i] = height > 1;
      last_[i] = width > 1 ? width - 2 : 0, last_[padded_count + i] = height > 1 ? height - 2 : 0;
      x1_offset[i] = width > 1 ? stride : 0, y1_offset[i] = height > 1 ? width * stride : 0;
      widths_[i] = width;
      levels_[i] = level - first_level;
      starts_[i] = levels.start[level] - levels.start[first_level];
    }
    // locations are fractions of a map; offsets are in cells around a point, or around the centre of a box in
    // 1 / num_points half-sides
    for (int64_t i = 0; i < 2 * padded_count; ++i) {
      units_[i] = reference_dim == 2 ? 1 : reference_dim == 4 ? sizes_[i] * half_side_unit() : sizes_[i];
    }
    for (int64_t i = 0; i < kRowsPerBlock * 2 * padded_count; ++i) spans_[i] = 1;
  }

  SamplePoints<C> samples;

  // Offsets around a box count in these parts of its sides.
  C half_side_unit() const { return C(0.5) / num_points; }

  const C* scales(int64_t row) const { return &samples.scales[row * 2 * padded_count]; }
  const C* sizes() const { return sizes_.get(); }

  // Only copies: arithmetic on single numbers might be rounded otherwise than on vectors of them, and so depend on how
  // the levels are divided.
  void set_references(const C* references, int64_t width, int64_t row) {
    references += first_level * width;
    C* centers = centres_.get() + row * 2 * padded_count;
    C* spans = spans_.get() + row * 2 * padded_count;
    for (int64_t i = 0; i < count; ++i) {
      const C* reference = references + levels_[i] * width;
      centers[i] = reference[0], centers[padded_count + i] = reference[1];
      if (width == 4) spans[i] = reference[2], spans[padded_count + i] = reference[3];
    }
  }

  // Reads the weights, or logits, at `index` of `points`.
  C* read_weights(const PointArgs& points, int64_t index, int64_t row) {
    C* weights = &samples.weights[row * padded_count];
    const C* numbers = load_points(points.weights, points.type, index, count, padded_count, weights);
    if (numbers != weights) copy_bytes(weights, numbers, count * sizeof(C));
    return weights;
  }

  // Finds the places at `index` of `points` for a row that has its weights and references already.
  template <bool kWithGrad>
  void slot(const PointArgs& points, int64_t index, int64_t row) {
    const C* xy = load_points(points.points, points.type, 2 * index, 2 * count, 2 * padded_count, scratch_.get());
    const C* centers = centres_.get() + row * 2 * padded_count;
    const C* spans = spans_.get() + row * 2 * padded_count;
    for (int64_t i = 0; i < padded_count; i += kSimdLanes<C>) {
      const Vec<C> first = load(xy + 2 * i), second = load(xy + 2 * i + kSimdLanes<C>);
      const Vec<C> xs = deinterleave<C, kSimdLanes<C>, 1, 0>(first, second);
      const Vec<C> ys = deinterleave<C, kSimdLanes<C>, 1, 1>(first, second);
      const Vec<C> x_scale = load(spans + i) * load(&units_[i]);
      const Vec<C> y_scale = load(spans + padded_count + i) * load(&units_[padded_count + i]);
      const Vec<C> x = load(centers + i) * load(&sizes_[i]) - C(0.5) + xs * x_scale;
      const Vec<C> y = load(centers + padded_count + i) * load(&sizes_[padded_count + i]) - C(0.5) + ys * y_scale;
      // false for what is no number
      const Ints inside = (x >= -1) & (x < load(&sizes_[i])) & (y >= -1) & (y < load(&sizes_[padded_count + i]));
      const Vec<C> has_x1 = load(&has_next_[i]), has_y1 = load(&has_next_[padded_count + i]);
      const LinearWeights<C> x_axis(mask_and(inside, x), has_x1, load(&last_[i]));
      const LinearWeights<C> y_axis(mask_and(inside, y), has_y1, load(&last_[padded_count + i]));
      store(&samples.cell[row * padded_count + i], y_axis.cell * load(&widths_[i]) + x_axis.cell + load(&starts_[i]));

      const Vec<C> weight = load(&samples.weights[row * padded_count + i]);
      const Vec<C> above = mask_and(inside, y_axis.w0) * weight, under = mask_and(inside, y_axis.w1) * weight;
      C* corner_weights = &samples.corner_weights[row * kNumCorners * padded_count + i];
      store(corner_weights + kY0X0 * padded_count, above * x_axis.w0);
      store(corner_weights + kY0X1 * padded_count, above * x_axis.w1);
      store(corner_weights + kY1X0 * padded_count, under * x_axis.w0);
      store(corner_weights + kY1X1 * padded_count, under * x_axis.w1);
      if constexpr (kWithGrad) {
        store(&samples.scales[row * 2 * padded_count + i], x_scale);
        store(&samples.scales[row * 2 * padded_count + padded_count + i], y_scale);
        C* axis_weights = &samples.axis_weights[row * kNumAxisWeights * padded_count + i];
        store(axis_weights + kWx0 * padded_count, mask_and(inside, x_axis.w0));
        store(axis_weights + kWx1 * padded_count, mask_and(inside, x_axis.w1));
        store(axis_weights + kWy0 * padded_count, mask_and(inside, y_axis.w0));
        store(axis_weights + kWy1 * padded_count, mask_and(inside, y_axis.w1));
        store(axis_weights + kDwx0 * padded_count, mask_and(inside, x_axis.dw0()));
        store(axis_weights + kDwx1 * padded_count, mask_and(inside, x_axis.dw1(has_x1)));
        store(axis_weights + kDwy0 * padded_count, mask_and(inside, y_axis.dw0()));
        store(axis_weights + kDwy1 * padded_count, mask_and(inside, y_axis.dw1(has_y1)));
      }
    }
  }

  // Asks for the points at `index`.
  void prefetch_points(const PointArgs& points, int64_t index) const {
    const int64_t bytes = points.type == DType::kDouble ? 8 : points.type == DType::kFloat ? 4 : 2;
    prefetch_bytes(static_cast<const char*>(points.weights) + index * bytes, count * bytes);
    prefetch_bytes(static_cast<const char*>(points.points) + 2 * index * bytes, 2 * count * bytes);
  }

  // Asks for the rows of the places' cells.
  template <class Item>
  void prefetch_cells(const Item* rows, int64_t channels, int64_t row) const {
    const int64_t bytes = channels * sizeof(Item);
    for (int64_t i = 0; i < count; ++i) {
      const Item* top = rows + samples.cell[row * padded_count + i] * stride;
      const Item* bottom = top + y1_offset[i];
      for (const Item* cell : {top, top + x1_offset[i], bottom, bottom + x1_offset[i]}) prefetch_bytes(cell, bytes);
    }
  }
};

}  // namespace
