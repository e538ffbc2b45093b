// The forward pass: one loop without branches reads four rows of channels per place.
#pragma once

#include <algorithm>

#include "places.h"
#include "softmax.h"

namespace {

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

}  // namespace
