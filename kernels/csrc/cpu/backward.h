// The backward pass: the loop of the forward pass, which also adds to four rows of gradients per place.
#pragma once

#include <algorithm>

#include "sampling.h"

namespace {

// For kVectors vectors of channels of a row's places [begin, end): adds each place's share of the output's gradient to
// the four cells around it, and to `products`, corner by corner, the products of that gradient with the four cells, to
// be summed over the lanes later.
template <int kMaxUnroll, class T, class C>
inline void scatter_points(
    const T* value, C* grad_value, const C* grad_output, const SampleGrid<C>& grid, int64_t row, int64_t begin,
    int64_t end, Vec<C>* products) {
  const int64_t padded_count = grid.padded_count;
  const Int<C>* cells = &grid.samples.cell[row * padded_count];
  const C* corner_weights = &grid.samples.corner_weights[row * kNumCorners * padded_count];
  Vec<C> grad[kMaxUnroll];
  for (int v = 0; v < kMaxUnroll; ++v) grad[v] = load(grad_output + v * kSimdLanes<C>);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t x1_offset = grid.x1_offset[i];
    const int64_t top = cells[i] * grid.stride, bottom = top + grid.y1_offset[i];
    const int64_t offsets[kNumCorners] = {top, top + x1_offset, bottom, bottom + x1_offset};
    for (int corner = 0; corner < kNumCorners; ++corner) {
      const T* from = value + offsets[corner];
      C* to = grad_value + offsets[corner];
      const C weight = corner_weights[corner * padded_count + i];
      Vec<C> product{};
      for (int v = 0; v < kMaxUnroll; ++v) {
        const int64_t channel = v * kSimdLanes<C>;
        product += load(from + channel) * grad[v];
        store(to + channel, load(to + channel) + grad[v] * weight);
      }
      products[corner * (end - begin) + i - begin] += product;
    }
  }
}

// The gradients of a row's weights and positions, from the products of its places with the four cells around them.
template <class C>
void compute_point_grads(
    const SampleGrid<C>& grid, int64_t row, const C* products, C* grad_weights, C* grad_x, C* grad_y) {
  const int64_t padded_count = grid.padded_count;
  for (int64_t i = 0; i < padded_count; i += kSimdLanes<C>) {
    const Vec<C> top_left = load(products + kY0X0 * padded_count + i);
    const Vec<C> top_right = load(products + kY0X1 * padded_count + i);
    const Vec<C> bottom_left = load(products + kY1X0 * padded_count + i);
    const Vec<C> bottom_right = load(products + kY1X1 * padded_count + i);
    const C* axis_weights = &grid.samples.axis_weights[row * kNumAxisWeights * padded_count + i];
    const Vec<C> left = load(axis_weights + kWx0 * padded_count), x1_offset = load(axis_weights + kWx1 * padded_count);
    const Vec<C> above = load(axis_weights + kWy0 * padded_count), under = load(axis_weights + kWy1 * padded_count);
    const Vec<C> left_slope = load(axis_weights + kDwx0 * padded_count);
    const Vec<C> right_slope = load(axis_weights + kDwx1 * padded_count);
    const Vec<C> above_slope = load(axis_weights + kDwy0 * padded_count);
    const Vec<C> under_slope = load(axis_weights + kDwy1 * padded_count);
    const Vec<C> top = left * top_left + x1_offset * top_right, bottom = left * bottom_left + x1_offset * bottom_right;
    const Vec<C> weight = load(&grid.samples.weights[row * padded_count + i]);
    store(grad_weights + i, above * top + under * bottom);
    store(
        grad_x + i, weight * (above * (left_slope * top_left + right_slope * top_right) +
                              under * (left_slope * bottom_left + right_slope * bottom_right)));
    store(grad_y + i, weight * (above_slope * top + under_slope * bottom));
  }
}

// From gradients by position (`grad_x`, `grad_y`) to those of the references, level by level.
template <class C>
void store_reference_grads(
    const SampleGrid<C>& grid, const C* xy, const C* grad_x, const C* grad_y, int64_t width, C* to) {
  for (int64_t level = grid.first_level; level < grid.last_level; ++level) {
    const int64_t begin = (level - grid.first_level) * grid.num_points;
    for (int axis = 0; axis < 2; ++axis) {
      const C* grad = axis == 0 ? grad_x : grad_y;
      const C size = grid.sizes()[axis * grid.padded_count + begin];
      C center = 0, side = 0;
      for (int64_t i = begin; i < begin + grid.num_points; ++i) {
        center += grad[i];
        side += grad[i] * xy[2 * i + axis];
      }
      to[level * width + axis] = center * size;
      if (width == 4) to[level * width + 2 + axis] = side * size * grid.half_side_unit();
    }
  }
}

// One picture, head and group of levels: all queries, block by block in copies, one by one in place.
template <class T>
class BackwardTask {
  using C = compute_t<T>;

 public:
  // `value_copy` and `grad_copy` hold the cells of the levels, unless the task works in place.
  BackwardTask(
      const BackwardArgs& args, int64_t batch, int64_t head, int64_t first, int64_t last, T* value_copy,
      C* grad_copy)
      : args_(args),
        sizes_(args.sizes),
        batch_(batch),
        head_(head),
        cells_(end_of_level(sizes_.levels, last - 1) - sizes_.levels.start[first]),
        stride_(sizes_.num_heads * sizes_.head_dim),
        padded_channels_(pad_to_vec<C>(sizes_.head_dim)),
        grid_(
            sizes_, args.points.reference_dim, first, last, args.in_place ? stride_ : padded_channels_, true),
        vector_products_(pad_to_vec<C>(kNumCorners * grid_.count)),
        sums_(pad_to_vec<C>(kNumCorners * grid_.count)),
        products_(kRowsPerBlock * kNumCorners * grid_.padded_count),
        grad_output_(kRowsPerBlock * padded_channels_),
        grad_weights_(grid_.padded_count),
        grad_x_(grid_.padded_count),
        grad_y_(grid_.padded_count),
        grad_xy_(2 * grid_.padded_count),
        scratch_(2 * grid_.padded_count),
        value_copy_(value_copy),
        grad_copy_(grad_copy) {
    const int64_t all_cells = end_of_level(sizes_.levels, sizes_.levels.count - 1);
    const int64_t cell = batch * all_cells + sizes_.levels.start[first];
    const int64_t start = (cell * sizes_.num_heads + head) * sizes_.head_dim;
    value_ = static_cast<const T*>(args.value) + start;
    grad_value_ = static_cast<T*>(args.grad_value) + start;
  }

  void run() {
    if (args_.in_place) {
      run_query_by_query();
      return;
    }
    gather_rows(value_, stride_, cells_, sizes_.head_dim, value_copy_, padded_channels_);
    std::memset(static_cast<void*>(grad_copy_), 0, cells_ * padded_channels_ * sizeof(C));
    run_by_level();
    for (int64_t cell = 0; cell < cells_; ++cell) {
      store_channels(grad_copy_ + cell * padded_channels_, sizes_.head_dim, grad_value_ + cell * stride_);
    }
  }

 private:
  void run_by_level() {
    for (int64_t begin = 0; begin < sizes_.num_queries; begin += kRowsPerBlock) {
      const int64_t end = std::min(begin + kRowsPerBlock, sizes_.num_queries);
      for (int64_t query = begin; query < end; ++query) set_references(query, query - begin);
      for (int64_t query = begin; query < end; ++query) load_row(query, query - begin);
      for (int64_t first = 0; first < grid_.count; first += sizes_.num_points) {
        for (int64_t query = begin; query < end; ++query) {
          scatter_row(value_copy_, grad_copy_, first, first + sizes_.num_points, query - begin);
        }
      }
      for (int64_t query = begin; query < end; ++query) write(query, query - begin);
    }
  }

  void run_query_by_query() {
    C* grad_value = reinterpret_cast<C*>(grad_value_);  // C is T
    load_and_prefetch_row(0);
    for (int64_t query = 0; query < sizes_.num_queries; ++query) {
      if (query + 1 < sizes_.num_queries) load_and_prefetch_row(query + 1);
      scatter_row(value_, grad_value, 0, grid_.count, query % 2);
      write(query, query % 2);
    }
  }

  void load_and_prefetch_row(int64_t query) {
    set_references(query, query % 2);
    load_row(query, query % 2);
    grid_.prefetch_cells(value_, sizes_.head_dim, query % 2);
    grid_.prefetch_cells(grad_value_, sizes_.head_dim, query % 2);
  }

  int64_t batch_query(int64_t query) const { return batch_ * sizes_.num_queries + query; }

  int64_t index(int64_t query) const {
    const int64_t row = batch_query(query) * sizes_.num_heads + head_;
    return (row * sizes_.levels.count + grid_.first_level) * sizes_.num_points;
  }

  void set_references(int64_t query, int64_t slot) {
    if (args_.points.references == nullptr) return;
    const int64_t width = args_.points.reference_dim;
    const C* references = static_cast<const C*>(args_.points.references);
    grid_.set_references(references + batch_query(query) * sizes_.levels.count * width, width, slot);
  }

  void load_row(int64_t query, int64_t slot) {
    const PointArgs& points = args_.points;
    grid_.read_weights(points, index(query), slot);
    grid_.template slot<true>(points, index(query), slot);
    const int64_t channels = sizes_.head_dim;
    const T* grad_output = static_cast<const T*>(args_.grad_output) + head_ * channels;
    load_channels(grad_output + batch_query(query) * stride_, channels, &grad_output_[slot * padded_channels_]);
    if (query + kPrefetchRows < sizes_.num_queries) {
      grid_.prefetch_points(points, index(query + kPrefetchRows));
      prefetch_bytes(grad_output + batch_query(query + kPrefetchRows) * stride_, channels * sizeof(T));
    }
  }

  void scatter_row(const T* value, C* grad_value, int64_t begin, int64_t end, int64_t slot) {
    constexpr int64_t kUnrolledChannels = kMaxUnroll<C> * kSimdLanes<C>;
    const C* grad_output = &grad_output_[slot * padded_channels_];
    Vec<C>* products = vector_products_.get();
    const int64_t rows = kNumCorners * (end - begin), padded_rows = pad_to_vec<C>(rows);
    for (int64_t i = 0; i < padded_rows; ++i) products[i] = Vec<C>{};
    int64_t channel = 0;
    for (; channel + kUnrolledChannels <= padded_channels_; channel += kUnrolledChannels) {
      scatter_points<kMaxUnroll<C>>(
          value + channel, grad_value + channel, grad_output + channel, grid_, slot, begin, end, products);
    }
    for (; channel < padded_channels_; channel += kSimdLanes<C>) {
      scatter_points<1>(
          value + channel, grad_value + channel, grad_output + channel, grid_, slot, begin, end, products);
    }
    for (int64_t i = 0; i < padded_rows; i += kSimdLanes<C>) store(&sums_[i], transposed_sum<C>(products + i));
    C* to = &products_[slot * kNumCorners * grid_.padded_count + begin];
    for (int corner = 0; corner < kNumCorners; ++corner) {
      copy_bytes(to + corner * grid_.padded_count, &sums_[corner * (end - begin)], (end - begin) * sizeof(C));
    }
  }

  void write(int64_t query, int64_t slot) {
    const PointArgs& points = args_.points;
    const int64_t count = grid_.count, padded_count = grid_.padded_count;
    compute_point_grads(
        grid_, slot, &products_[slot * kNumCorners * padded_count], grad_weights_.get(), grad_x_.get(), grad_y_.get());
    copy_bytes(static_cast<C*>(args_.grad_weights) + index(query), grad_weights_.get(), count * sizeof(C));
    const C* scales = grid_.scales(slot);
    for (int64_t i = 0; i < count; ++i) {
      grad_xy_[2 * i] = grad_x_[i] * scales[i];
      grad_xy_[2 * i + 1] = grad_y_[i] * scales[padded_count + i];
    }
    store_points(grad_xy_.get(), 2 * count, args_.grad_points, points.type, 2 * index(query));
    if (points.references != nullptr) {
      const C* xy = load_points(points.points, points.type, 2 * index(query), 2 * count, 2 * count, scratch_.get());
      const int64_t row = head_ * sizes_.batch_size * sizes_.num_queries + batch_query(query);
      C* to = static_cast<C*>(args_.grad_references) + row * sizes_.levels.count * points.reference_dim;
      store_reference_grads(grid_, xy, grad_x_.get(), grad_y_.get(), points.reference_dim, to);
    }
  }

  const BackwardArgs& args_;
  const Sizes& sizes_;
  const int64_t batch_, head_, cells_, stride_, padded_channels_;
  SampleGrid<C> grid_;
  Buffer<Vec<C>> vector_products_;
  Buffer<C> sums_, products_, grad_output_, grad_weights_, grad_x_, grad_y_, grad_xy_, scratch_;
  T* const value_copy_;
  C* const grad_copy_;
  const T* value_;
  T* grad_value_;
};

template <class T>
void backward(const BackwardArgs& args, int64_t level_groups, int64_t begin, int64_t end) {
  const Sizes& sizes = args.sizes;
  const auto first_of = [&](int64_t group) { return group * sizes.levels.count / level_groups; };
  int64_t cells = 0;  // of the largest group
  for (int64_t group = 0; group < level_groups; ++group) {
    const int64_t end_of_group = end_of_level(sizes.levels, first_of(group + 1) - 1);
    cells = std::max(cells, end_of_group - sizes.levels.start[first_of(group)]);
  }
  // copies of one head, which the caches hold better than a part of all, and where gradients have all their bits
  const int64_t numbers = args.in_place ? 0 : cells * pad_to_vec<compute_t<T>>(sizes.head_dim);
  Buffer<T> value_copy(numbers);
  Buffer<compute_t<T>> grad_copy(numbers);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task % level_groups, head = task / level_groups % sizes.num_heads;
    const int64_t first = first_of(group), last = first_of(group + 1);
    const int64_t batch = task / level_groups / sizes.num_heads;
    BackwardTask<T>(args, batch, head, first, last, value_copy.get(), grad_copy.get()).run();
  }
}

}  // namespace
