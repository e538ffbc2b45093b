// The backward pass: the loop of the forward pass, which also adds to the gradients of four cells per sampling point.
#pragma once

#include <algorithm>

#include "sampling.h"

namespace {

// For kUnroll vectors of channels of a row's points [begin, end): adds each point's share of the output's gradient to
// its four cells, and the products of that gradient with the cells to `dots`, (corners, points), whose lanes are summed
// later.
template <int kUnroll, class T, class C>
inline void scatter_points(
    const T* value, C* grad_value, const C* grad_output, const SampleGrid<C>& grid, const SamplePoints<C>& points,
    int64_t slot, int64_t begin, int64_t end, Vec<C>* dots) {
  const int64_t padded_count = grid.padded_count;
  const Int<C>* cells = points.cells(slot);
  const C* corner_weights = points.corner_weights(slot);
  Vec<C> grad[kUnroll];
  for (int v = 0; v < kUnroll; ++v) grad[v] = load(grad_output + v * kSimdLanes<C>);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t x1 = grid.x1_offset[i];
    const int64_t y0 = cells[i] * grid.cell_stride, y1 = y0 + grid.y1_offset[i];
    const int64_t offsets[kNumCorners] = {y0, y0 + x1, y1, y1 + x1};
    for (int corner = 0; corner < kNumCorners; ++corner) {
      const T* from = value + offsets[corner];
      C* to = grad_value + offsets[corner];
      const C weight = corner_weights[corner * padded_count + i];
      Vec<C> dot{};
      for (int v = 0; v < kUnroll; ++v) {
        const int64_t channel = v * kSimdLanes<C>;
        dot += load(from + channel) * grad[v];
        store(to + channel, load(to + channel) + grad[v] * weight);
      }
      dots[corner * (end - begin) + i - begin] += dot;
    }
  }
}

// The gradients of a row's attention weights and positions, from `dots`, (corners, points): the dot products of the
// output's gradient with the four cells of each point.
template <class C>
void compute_point_grads(
    const SampleGrid<C>& grid, const SamplePoints<C>& points, int64_t slot, const C* dots, C* grad_weights, C* grad_x,
    C* grad_y) {
  const int64_t padded_count = grid.padded_count;
  for (int64_t i = 0; i < padded_count; i += kSimdLanes<C>) {
    const Vec<C> dot_y0x0 = load(dots + kY0X0 * padded_count + i), dot_y0x1 = load(dots + kY0X1 * padded_count + i);
    const Vec<C> dot_y1x0 = load(dots + kY1X0 * padded_count + i), dot_y1x1 = load(dots + kY1X1 * padded_count + i);
    const C* linear_weights = points.linear_weights(slot) + i;
    const Vec<C> wx0 = load(linear_weights + kWx0 * padded_count), wx1 = load(linear_weights + kWx1 * padded_count);
    const Vec<C> wy0 = load(linear_weights + kWy0 * padded_count), wy1 = load(linear_weights + kWy1 * padded_count);
    const Vec<C> dwx0 = load(linear_weights + kDwx0 * padded_count), dwx1 = load(linear_weights + kDwx1 * padded_count);
    const Vec<C> dwy0 = load(linear_weights + kDwy0 * padded_count), dwy1 = load(linear_weights + kDwy1 * padded_count);
    const Vec<C> dot_y0 = wx0 * dot_y0x0 + wx1 * dot_y0x1, dot_y1 = wx0 * dot_y1x0 + wx1 * dot_y1x1;
    const Vec<C> weight = load(points.weights(slot) + i);
    store(grad_weights + i, wy0 * dot_y0 + wy1 * dot_y1);
    store(
        grad_x + i,
        weight * (wy0 * (dwx0 * dot_y0x0 + dwx1 * dot_y0x1) + wy1 * (dwx0 * dot_y1x0 + dwx1 * dot_y1x1)));
    store(grad_y + i, weight * (dwy0 * dot_y0 + dwy1 * dot_y1));
  }
}

// Sums the gradients of a row's positions, in cells, to those of its references, in fractions of a map, level by level.
template <class C>
void store_reference_grads(
    const SampleGrid<C>& grid, const C* xy, const C* grad_x, const C* grad_y, int64_t reference_dim, C* to) {
  for (int64_t level = grid.begin_level; level < grid.end_level; ++level) {
    const int64_t begin = (level - grid.begin_level) * grid.num_points;
    for (int axis = 0; axis < 2; ++axis) {
      const C* grad = axis == 0 ? grad_x : grad_y;
      const C map_size = grid.map_sizes[axis * grid.padded_count + begin];
      C grad_center = 0, grad_side = 0;
      for (int64_t i = begin; i < begin + grid.num_points; ++i) {
        grad_center += grad[i];
        grad_side += grad[i] * xy[2 * i + axis];
      }
      to[level * reference_dim + axis] = grad_center * map_size;
      if (reference_dim == 4) to[level * reference_dim + 2 + axis] = grad_side * map_size * grid.box_unit();
    }
  }
}

// All queries of one image, head and group of levels. No other task adds to the cells of these levels and this head, so
// no locks are needed and the order of additions is always the same.
template <class T>
class BackwardTask {
  using C = compute_t<T>;

 public:
  // `value_copy` and `grad_copy` have room for the cells of the levels, unless the task works in place.
  BackwardTask(
      const BackwardArgs& args, int64_t image, int64_t head, int64_t begin_level, int64_t end_level, T* value_copy,
      C* grad_copy)
      : args_(args),
        shapes_(args.shapes),
        image_(image),
        head_(head),
        num_cells_(num_cells(shapes_.levels, begin_level, end_level)),
        value_stride_(shapes_.num_heads * shapes_.head_dim),
        padded_channels_(padded<C>(shapes_.head_dim)),
        grid_(
            shapes_, args.points.reference_dim, begin_level, end_level,
            args.in_place ? value_stride_ : padded_channels_),
        points_(grid_, kRowsPerBlock, true),
        vec_dots_(padded<C>(kNumCorners * grid_.count)),
        summed_dots_(padded<C>(kNumCorners * grid_.count)),
        dots_(kRowsPerBlock * kNumCorners * grid_.padded_count),
        grad_output_(kRowsPerBlock * padded_channels_),
        grad_weights_(grid_.padded_count),
        grad_x_(grid_.padded_count),
        grad_y_(grid_.padded_count),
        grad_xy_(2 * grid_.padded_count),
        scratch_(2 * grid_.padded_count),
        value_copy_(value_copy),
        grad_copy_(grad_copy) {
    const int64_t cell = image * shapes_.sequence_length + shapes_.levels.start[begin_level];
    const int64_t start = (cell * shapes_.num_heads + head) * shapes_.head_dim;
    value_ = static_cast<const T*>(args.value) + start;
    grad_value_ = static_cast<T*>(args.grad_value) + start;
  }

  static int64_t num_cells(const Levels& levels, int64_t begin_level, int64_t end_level) {
    const int64_t last = end_level - 1;
    return levels.start[last] + int64_t{1} * levels.height[last] * levels.width[last] - levels.start[begin_level];
  }

  void run() {
    if (args_.in_place) {
      run_query_by_query();
      return;
    }
    gather_rows(value_, value_stride_, num_cells_, shapes_.head_dim, value_copy_, padded_channels_);
    std::memset(static_cast<void*>(grad_copy_), 0, num_cells_ * padded_channels_ * sizeof(C));
    run_by_level();
    for (int64_t cell = 0; cell < num_cells_; ++cell) {
      const int64_t ahead = std::min(cell + kRowsPerBlock, num_cells_ - 1);
      prefetch_bytes(grad_value_ + ahead * value_stride_, shapes_.head_dim * sizeof(T));
      store_channels(grad_copy_ + cell * padded_channels_, shapes_.head_dim, grad_value_ + cell * value_stride_);
    }
  }

 private:
  void run_by_level() {
    for (int64_t begin = 0; begin < shapes_.num_queries; begin += kRowsPerBlock) {
      const int64_t end = std::min(begin + kRowsPerBlock, shapes_.num_queries);
      for (int64_t query = begin; query < end; ++query) set_references(query, query - begin);
      for (int64_t query = begin; query < end; ++query) load_row(query, query - begin);
      for (int64_t first = 0; first < grid_.count; first += shapes_.num_points) {
        for (int64_t query = begin; query < end; ++query) {
          scatter_row(value_copy_, grad_copy_, first, first + shapes_.num_points, query - begin);
        }
      }
      for (int64_t query = begin; query < end; ++query) store_row(query, query - begin);
    }
  }

  // Two slots in turn, as in the forward pass.
  void run_query_by_query() {
    C* grad_value = reinterpret_cast<C*>(grad_value_);  // C is T
    load_and_prefetch_row(0);
    for (int64_t query = 0; query < shapes_.num_queries; ++query) {
      if (query + 1 < shapes_.num_queries) load_and_prefetch_row(query + 1);
      scatter_row(value_, grad_value, 0, grid_.count, query % 2);
      store_row(query, query % 2);
    }
  }

  void load_and_prefetch_row(int64_t query) {
    set_references(query, query % 2);
    load_row(query, query % 2);
    points_.prefetch_cells(value_, shapes_.head_dim, query % 2, 0, grid_.count);
    points_.prefetch_cells(grad_value_, shapes_.head_dim, query % 2, 0, grid_.count);
  }

  int64_t batch_query(int64_t query) const { return image_ * shapes_.num_queries + query; }

  // Of the row's first point on these levels.
  int64_t point_index(int64_t query) const {
    const int64_t row = batch_query(query) * shapes_.num_heads + head_;
    return (row * shapes_.levels.count + grid_.begin_level) * shapes_.num_points;
  }

  void set_references(int64_t query, int64_t slot) {
    if (args_.points.references == nullptr) return;
    const int64_t reference_dim = args_.points.reference_dim;
    const C* references = static_cast<const C*>(args_.points.references);
    points_.set_references(
        references + batch_query(query) * shapes_.levels.count * reference_dim, reference_dim, slot);
  }

  void load_row(int64_t query, int64_t slot) {
    const PointArgs& points = args_.points;
    points_.load_weights(points, point_index(query), slot);
    points_.template compute_corners<true>(points, point_index(query), slot);
    const int64_t channels = shapes_.head_dim;
    const T* grad_output = static_cast<const T*>(args_.grad_output) + head_ * channels;
    load_channels(grad_output + batch_query(query) * value_stride_, channels, &grad_output_[slot * padded_channels_]);
    if (const int64_t ahead = query + kRowsPerBlock; ahead < shapes_.num_queries) {
      points_.prefetch_points(points.weights, points.coords, points.dtype, point_index(ahead));
      points_.prefetch_points(args_.grad_weights, args_.grad_coords, points.dtype, point_index(ahead));
      prefetch_bytes(grad_output + batch_query(ahead) * value_stride_, channels * sizeof(T));
    }
  }

  void scatter_row(const T* value, C* grad_value, int64_t begin, int64_t end, int64_t slot) {
    constexpr int64_t kUnrolledChannels = kMaxUnroll<C> * kSimdLanes<C>;
    const C* grad_output = &grad_output_[slot * padded_channels_];
    Vec<C>* dots = vec_dots_.get();
    const int64_t rows = kNumCorners * (end - begin), padded_rows = padded<C>(rows);
    for (int64_t i = 0; i < padded_rows; ++i) dots[i] = Vec<C>{};
    int64_t channel = 0;
    for (; channel + kUnrolledChannels <= padded_channels_; channel += kUnrolledChannels) {
      scatter_points<kMaxUnroll<C>>(
          value + channel, grad_value + channel, grad_output + channel, grid_, points_, slot, begin, end, dots);
    }
    for (; channel < padded_channels_; channel += kSimdLanes<C>) {
      scatter_points<1>(
          value + channel, grad_value + channel, grad_output + channel, grid_, points_, slot, begin, end, dots);
    }
    for (int64_t i = 0; i < padded_rows; i += kSimdLanes<C>) store(&summed_dots_[i], transposed_sum<C>(dots + i));
    C* to = &dots_[slot * kNumCorners * grid_.padded_count + begin];
    for (int corner = 0; corner < kNumCorners; ++corner) {
      copy_bytes(to + corner * grid_.padded_count, &summed_dots_[corner * (end - begin)], (end - begin) * sizeof(C));
    }
  }

  void store_row(int64_t query, int64_t slot) {
    const PointArgs& points = args_.points;
    const int64_t count = grid_.count, padded_count = grid_.padded_count, index = point_index(query);
    compute_point_grads(
        grid_, points_, slot, &dots_[slot * kNumCorners * padded_count], grad_weights_.get(), grad_x_.get(),
        grad_y_.get());
    copy_bytes(static_cast<C*>(args_.grad_weights) + index, grad_weights_.get(), count * sizeof(C));
    const C* cells_per_unit = points_.cells_per_unit(slot);
    for (int64_t i = 0; i < count; ++i) {
      grad_xy_[2 * i] = grad_x_[i] * cells_per_unit[i];
      grad_xy_[2 * i + 1] = grad_y_[i] * cells_per_unit[padded_count + i];
    }
    store_points(grad_xy_.get(), 2 * count, args_.grad_coords, points.dtype, 2 * index);
    if (points.references != nullptr) {
      const C* xy = load_points(points.coords, points.dtype, 2 * index, 2 * count, 2 * count, scratch_.get());
      const int64_t row = head_ * shapes_.batch_size * shapes_.num_queries + batch_query(query);
      C* to = static_cast<C*>(args_.grad_references) + row * shapes_.levels.count * points.reference_dim;
      store_reference_grads(grid_, xy, grad_x_.get(), grad_y_.get(), points.reference_dim, to);
    }
  }

  const BackwardArgs& args_;
  const AttentionShapes& shapes_;
  const int64_t image_, head_, num_cells_, value_stride_, padded_channels_;
  const SampleGrid<C> grid_;
  SamplePoints<C> points_;
  Buffer<Vec<C>> vec_dots_;  // of one row: one vector per corner and point
  Buffer<C> summed_dots_;    // the same, each vector summed
  Buffer<C> dots_;           // (slots, corners, points)
  Buffer<C> grad_output_;    // (slots, padded_channels)
  Buffer<C> grad_weights_, grad_x_, grad_y_, grad_xy_, scratch_;
  T* const value_copy_;
  C* const grad_copy_;
  const T* value_;  // this head at the first cell of these levels
  T* grad_value_;
};

template <class T>
void backward(const BackwardArgs& args, int64_t level_groups, int64_t begin, int64_t end) {
  const AttentionShapes& shapes = args.shapes;
  const auto begin_level = [&](int64_t group) { return group * shapes.levels.count / level_groups; };
  int64_t most_cells = 0;
  for (int64_t group = 0; group < level_groups; ++group) {
    const int64_t cells = BackwardTask<T>::num_cells(shapes.levels, begin_level(group), begin_level(group + 1));
    most_cells = std::max(most_cells, cells);
  }
  // The caches hold the cells of one head better than a part of all heads, and 16-bit gradients are summed in 32 bits.
  const int64_t copied = args.in_place ? 0 : most_cells * padded<compute_t<T>>(shapes.head_dim);
  Buffer<T> value_copy(copied);
  Buffer<compute_t<T>> grad_copy(copied);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task % level_groups, head = task / level_groups % shapes.num_heads;
    const int64_t image = task / level_groups / shapes.num_heads;
    BackwardTask<T>(
        args, image, head, begin_level(group), begin_level(group + 1), value_copy.get(), grad_copy.get())
        .run();
  }
}

}  // namespace
