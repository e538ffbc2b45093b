// Sampling points to cells: which four cells surround each point, and the weight of each. All points of a row (one
// image, query and head) at once, one per lane of a vector.
//
// The cells are (y0, x0), (y0, x1), (y1, x0) and (y1, x1), where x1 = x0 + 1 and y1 = y0 + 1, all inside the map. There
// are no branches: a point outside its map, or at a NaN, has four weights of zero and some cell that exists. So an
// infinite cell may spoil queries that do not use it.
#pragma once

#include "convert.h"

namespace {

constexpr int64_t kRowsPerBlock = 32;  // rows that are worked on together, and how far ahead their points are prefetched

// The four cells of a point, in the order of their weights in memory.
enum Corner { kY0X0, kY0X1, kY1X0, kY1X1, kNumCorners };

// Weights along each axis, and their derivatives by the position.
enum LinearWeight { kWx0, kWx1, kWy0, kWy1, kDwx0, kDwx1, kDwy0, kDwy1, kNumLinearWeights };

// Linear interpolation along one axis. The weights are the hat function max(0, 1 - distance) of each cell, so that a
// cell beyond the border has weight zero by itself once (cell0, cell0 + 1) is moved inside the map.
template <class C>
struct LinearWeights {
  IntVec<C> cell0;
  Vec<C> distance;  // of the position from cell0: -1 to 2, since cell0 was moved inside the map
  Vec<C> w0, w1;

  // `has_next` is 0 for maps that are one cell long, else 1; `last_cell0` the last cell that has a next one.
  LinearWeights(Vec<C> position, Vec<C> has_next, IntVec<C> last_cell0) {
    cell0 = __builtin_convertvector(position, IntVec<C>);
    cell0 += __builtin_convertvector(cell0, Vec<C>) > position;  // true is -1: round down
    cell0 = mask_and(cell0 > 0, cell0);
    cell0 = blend(cell0 < last_cell0, cell0, last_cell0);
    distance = position - __builtin_convertvector(cell0, Vec<C>);
    w0 = hat(distance);
    w1 = hat(distance - 1) * has_next;
  }

  static Vec<C> hat(Vec<C> x) {
    const Vec<C> height = 1 - blend(x < 0, -x, x);
    return mask_and(height > 0, height);
  }

  // At the center of a cell the derivative from the right is taken, as grid_sample does.
  Vec<C> dw0() const { return blend(distance < 0, broadcast<C>(1), mask_and(distance < 1, broadcast<C>(-1))); }
  Vec<C> dw1(Vec<C> has_next) const {
    return mask_and(distance >= 0, blend(distance < 1, broadcast<C>(1), broadcast<C>(-1))) * has_next;
  }
};

// What all rows have in common on the levels [begin_level, end_level): one entry per point, padded to whole vectors.
// Buffers of 2 * padded_count have the x of every point, then the y of every point.
template <class C>
struct SampleGrid {
  const int64_t begin_level, end_level, num_points;
  const int64_t count, padded_count;  // points of a row
  const int64_t cell_stride;          // elements from a cell to the next one in memory

  Buffer<C> map_sizes, units, has_next;  // x and y; a coordinate counts in `units` cells
  Buffer<Int<C>> last_cell0;             // x and y
  Buffer<Int<C>> widths, starts;         // of the map, and its first cell, counted from the first level's
  Buffer<int64_t> levels;                // counted from begin_level
  Buffer<int64_t> x1_offset, y1_offset;  // elements from x0 to x1 and from y0 to y1; 0 where the map is one cell long

  SampleGrid(
      const AttentionShapes& shapes, int64_t reference_dim, int64_t begin, int64_t end, int64_t stride)
      : begin_level(begin),
        end_level(end),
        num_points(shapes.num_points),
        count((end - begin) * num_points),
        padded_count(padded<C>(count)),
        cell_stride(stride),
        map_sizes(2 * padded_count),
        units(2 * padded_count),
        has_next(2 * padded_count),
        last_cell0(2 * padded_count),
        widths(padded_count),
        starts(padded_count),
        levels(padded_count),
        x1_offset(padded_count),
        y1_offset(padded_count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t level = begin_level + i / num_points, x = i, y = padded_count + i;
      const int32_t width = shapes.levels.width[level], height = shapes.levels.height[level];
      map_sizes[x] = static_cast<C>(width), map_sizes[y] = static_cast<C>(height);
      has_next[x] = width > 1, has_next[y] = height > 1;
      last_cell0[x] = width > 1 ? width - 2 : 0, last_cell0[y] = height > 1 ? height - 2 : 0;
      x1_offset[i] = width > 1 ? cell_stride : 0, y1_offset[i] = height > 1 ? width * cell_stride : 0;
      widths[i] = width;
      levels[i] = level - begin_level;
      starts[i] = shapes.levels.start[level] - shapes.levels.start[begin_level];
    }
    // Offsets around a point are in cells, those around a box in parts of its sides; locations are fractions of a map.
    for (int64_t i = 0; i < 2 * padded_count; ++i) {
      units[i] = reference_dim == 2 ? 1 : reference_dim == 4 ? map_sizes[i] * box_unit() : map_sizes[i];
    }
  }

  // Around a box, an offset of num_points reaches from the center to the side.
  C box_unit() const { return C(0.5) / num_points; }
};

// The sampling points of `slots` rows, each with a slot of its own in each buffer; but references, which are needed for
// a short time only, have slots for one block.
template <class C>
class SamplePoints {
 public:
  SamplePoints(const SampleGrid<C>& grid, int64_t slots, bool with_grad)
      : grid_(grid),
        centers_(kRowsPerBlock * 2 * grid.padded_count),
        sides_(kRowsPerBlock * 2 * grid.padded_count),
        weights_(slots * grid.padded_count),
        cells_(slots * grid.padded_count),
        corner_weights_(slots * kNumCorners * grid.padded_count),
        linear_weights_(with_grad ? slots * kNumLinearWeights * grid.padded_count : 0),
        cells_per_unit_(with_grad ? slots * 2 * grid.padded_count : 0),
        scratch_(2 * grid.padded_count) {
    for (int64_t i = 0; i < kRowsPerBlock * 2 * grid.padded_count; ++i) sides_[i] = 1;
  }

  // The cell (y0, x0) of each point, counted from the first cell of the grid's levels.
  const Int<C>* cells(int64_t slot) const { return &cells_[slot * grid_.padded_count]; }
  // Attention weight times bilinear weight: (corners, points).
  const C* corner_weights(int64_t slot) const { return &corner_weights_[slot * kNumCorners * grid_.padded_count]; }
  const C* weights(int64_t slot) const { return &weights_[slot * grid_.padded_count]; }
  // (`LinearWeight`, points).
  const C* linear_weights(int64_t slot) const {
    return &linear_weights_[slot * kNumLinearWeights * grid_.padded_count];
  }
  // By how many cells a position moves with its coordinate: x of every point, then y.
  const C* cells_per_unit(int64_t slot) const { return &cells_per_unit_[slot * 2 * grid_.padded_count]; }

  // Spreads the references of a row over its points. This only copies: scalar arithmetic might be rounded otherwise
  // than vector arithmetic, and the result would depend on how the levels are divided among tasks.
  void set_references(const C* references, int64_t reference_dim, int64_t slot) {
    const int64_t padded_count = grid_.padded_count;
    references += grid_.begin_level * reference_dim;
    C* centers = &centers_[slot % kRowsPerBlock * 2 * padded_count];
    C* sides = &sides_[slot % kRowsPerBlock * 2 * padded_count];
    for (int64_t i = 0; i < grid_.count; ++i) {
      const C* reference = references + grid_.levels[i] * reference_dim;
      centers[i] = reference[0], centers[padded_count + i] = reference[1];
      if (reference_dim == 4) sides[i] = reference[2], sides[padded_count + i] = reference[3];
    }
  }

  // Loads the attention weights, or logits, at `index` of `points` and returns them; the softmax may overwrite them.
  C* load_weights(const PointArgs& points, int64_t index, int64_t slot) {
    C* weights = &weights_[slot * grid_.padded_count];
    const C* loaded = load_points(points.weights, points.dtype, index, grid_.count, grid_.padded_count, weights);
    if (loaded != weights) copy_bytes(weights, loaded, grid_.count * sizeof(C));
    return weights;
  }

  // Computes cells and weights of the points at `index` of `points`, for a row whose attention weights and references
  // are loaded: position = center * map size - 0.5 + coordinate * side * unit, in cells.
  template <bool kWithGrad>
  void compute_corners(const PointArgs& points, int64_t index, int64_t slot) {
    const int64_t padded_count = grid_.padded_count;
    const C* xy =
        load_points(points.coords, points.dtype, 2 * index, 2 * grid_.count, 2 * padded_count, scratch_.get());
    const C* centers = &centers_[slot % kRowsPerBlock * 2 * padded_count];
    const C* sides = &sides_[slot % kRowsPerBlock * 2 * padded_count];
    for (int64_t i = 0; i < padded_count; i += kSimdLanes<C>) {
      const int64_t ix = i, iy = padded_count + i;
      const Vec<C> first = load(xy + 2 * i), second = load(xy + 2 * i + kSimdLanes<C>);
      const Vec<C> xs = deinterleave<C, kSimdLanes<C>, 1, 0>(first, second);
      const Vec<C> ys = deinterleave<C, kSimdLanes<C>, 1, 1>(first, second);
      const Vec<C> x_unit = load(sides + ix) * load(&grid_.units[ix]);
      const Vec<C> y_unit = load(sides + iy) * load(&grid_.units[iy]);
      const Vec<C> x = load(centers + ix) * load(&grid_.map_sizes[ix]) - C(0.5) + xs * x_unit;
      const Vec<C> y = load(centers + iy) * load(&grid_.map_sizes[iy]) - C(0.5) + ys * y_unit;
      // false for NaN
      const IntVec<C> inside =
          (x >= -1) & (x < load(&grid_.map_sizes[ix])) & (y >= -1) & (y < load(&grid_.map_sizes[iy]));
      const Vec<C> has_x1 = load(&grid_.has_next[ix]), has_y1 = load(&grid_.has_next[iy]);
      const LinearWeights<C> wx(mask_and(inside, x), has_x1, load(&grid_.last_cell0[ix]));
      const LinearWeights<C> wy(mask_and(inside, y), has_y1, load(&grid_.last_cell0[iy]));
      const IntVec<C> cell = wy.cell0 * load(&grid_.widths[i]) + wx.cell0 + load(&grid_.starts[i]);
      store(&cells_[slot * padded_count + i], cell);

      const Vec<C> weight = load(&weights_[slot * padded_count + i]);
      const Vec<C> wy0 = mask_and(inside, wy.w0) * weight, wy1 = mask_and(inside, wy.w1) * weight;
      C* corner_weights = &corner_weights_[slot * kNumCorners * padded_count + i];
      store(corner_weights + kY0X0 * padded_count, wy0 * wx.w0);
      store(corner_weights + kY0X1 * padded_count, wy0 * wx.w1);
      store(corner_weights + kY1X0 * padded_count, wy1 * wx.w0);
      store(corner_weights + kY1X1 * padded_count, wy1 * wx.w1);
      if constexpr (kWithGrad) {
        store(&cells_per_unit_[slot * 2 * padded_count + ix], x_unit);
        store(&cells_per_unit_[slot * 2 * padded_count + iy], y_unit);
        C* linear_weights = &linear_weights_[slot * kNumLinearWeights * padded_count + i];
        store(linear_weights + kWx0 * padded_count, mask_and(inside, wx.w0));
        store(linear_weights + kWx1 * padded_count, mask_and(inside, wx.w1));
        store(linear_weights + kWy0 * padded_count, mask_and(inside, wy.w0));
        store(linear_weights + kWy1 * padded_count, mask_and(inside, wy.w1));
        store(linear_weights + kDwx0 * padded_count, mask_and(inside, wx.dw0()));
        store(linear_weights + kDwx1 * padded_count, mask_and(inside, wx.dw1(has_x1)));
        store(linear_weights + kDwy0 * padded_count, mask_and(inside, wy.dw0()));
        store(linear_weights + kDwy1 * padded_count, mask_and(inside, wy.dw1(has_y1)));
      }
    }
  }

  // Prefetches one number and two numbers of every point at `index`, such as weights and coordinates, or what becomes
  // their gradients: the rows of one head lie too far apart for the hardware to prefetch them by itself.
  void prefetch_points(const void* single, const void* pairs, DType dtype, int64_t index) const {
    const int64_t bytes = dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
    prefetch_bytes(static_cast<const char*>(single) + index * bytes, grid_.count * bytes);
    prefetch_bytes(static_cast<const char*>(pairs) + 2 * index * bytes, 2 * grid_.count * bytes);
  }

  // Prefetches the four cells of the points [begin, end), given the first cell of the grid's levels.
  template <class Item>
  void prefetch_cells(const Item* first_cell, int64_t channels, int64_t slot, int64_t begin, int64_t end) const {
    const int64_t bytes = channels * sizeof(Item);
    for (int64_t i = begin; i < end; ++i) {
      const Item* y0 = first_cell + cells_[slot * grid_.padded_count + i] * grid_.cell_stride;
      const Item* y1 = y0 + grid_.y1_offset[i];
      const int64_t x1_offset = grid_.x1_offset[i];
      for (const Item* cell : {y0, y0 + x1_offset, y1, y1 + x1_offset}) prefetch_bytes(cell, bytes);
    }
  }

 private:
  const SampleGrid<C>& grid_;
  Buffer<C> centers_, sides_;  // of the reference boxes: x of every point, then y; sides are 1 without boxes
  Buffer<C> weights_;          // attention weights
  Buffer<Int<C>> cells_;
  Buffer<C> corner_weights_;
  Buffer<C> linear_weights_, cells_per_unit_;  // only for gradients
  Buffer<C> scratch_;
};

}  // namespace
