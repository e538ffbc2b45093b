// The backward pass: the loop of the forward pass, which also adds to four rows of gradients per place.
#pragma once

#include <algorithm>

#include "places.h"

namespace {

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
    const C* bilinear = &geometry.places.bilinear[row * kBilinear * whole + i];
    const Vector<C> left = load(bilinear + kLeft * whole), right = load(bilinear + kRight * whole);
    const Vector<C> above = load(bilinear + kAbove * whole), under = load(bilinear + kUnder * whole);
    const Vector<C> left_slope = load(bilinear + kLeftSlope * whole);
    const Vector<C> right_slope = load(bilinear + kRightSlope * whole);
    const Vector<C> above_slope = load(bilinear + kAboveSlope * whole);
    const Vector<C> under_slope = load(bilinear + kUnderSlope * whole);
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
      if (width == 4) to[level * width + 2 + axis] = side * size * geometry.half_side_unit();
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

}  // namespace
