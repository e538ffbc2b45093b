// The forward pass: for every sampling point, a loop without branches reads the channels of four cells.
#pragma once

#include <algorithm>

#include "sampling.h"
#include "softmax.h"

namespace {

// Adds kUnroll vectors of channels of a row's points [begin, end) to `sums`, which are in the order of load_pair.
// Cells at y0 and at y1 have accumulators of their own, because an addition has to wait for the one before it.
template <int kUnroll, class T, class C>
inline void gather_points(
    const T* value, const SampleGrid<C>& grid, const SamplePoints<C>& points, int64_t slot, int64_t begin, int64_t end,
    C* sums) {
  const int64_t padded_count = grid.padded_count;
  const Int<C>* cells = points.cells(slot);
  const C* corner_weights = points.corner_weights(slot);
  Vec<C> sum_y0[kUnroll], sum_y1[kUnroll] = {};
  for (int v = 0; v < kUnroll; ++v) sum_y0[v] = load(sums + v * kSimdLanes<C>);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t x1 = grid.x1_offset[i];
    const T* y0 = value + cells[i] * grid.cell_stride;
    const T* y1 = y0 + grid.y1_offset[i];
    const C w_y0x0 = corner_weights[kY0X0 * padded_count + i], w_y0x1 = corner_weights[kY0X1 * padded_count + i];
    const C w_y1x0 = corner_weights[kY1X0 * padded_count + i], w_y1x1 = corner_weights[kY1X1 * padded_count + i];
    if constexpr (kUnroll == 1) {
      sum_y0[0] += load(y0) * w_y0x0;
      sum_y0[0] += load(y0 + x1) * w_y0x1;
      sum_y1[0] += load(y1) * w_y1x0;
      sum_y1[0] += load(y1 + x1) * w_y1x1;
    }
    Vec<C> a, b;
    for (int v = 0; v + 1 < kUnroll; v += 2) {
      const int64_t channel = v * kSimdLanes<C>;
      load_pair(y0 + channel, &a, &b);
      sum_y0[v] += a * w_y0x0, sum_y0[v + 1] += b * w_y0x0;
      load_pair(y1 + channel, &a, &b);
      sum_y1[v] += a * w_y1x0, sum_y1[v + 1] += b * w_y1x0;
      load_pair(y0 + x1 + channel, &a, &b);
      sum_y0[v] += a * w_y0x1, sum_y0[v + 1] += b * w_y0x1;
      load_pair(y1 + x1 + channel, &a, &b);
      sum_y1[v] += a * w_y1x1, sum_y1[v + 1] += b * w_y1x1;
    }
  }
  for (int v = 0; v < kUnroll; ++v) store(sums + v * kSimdLanes<C>, sum_y0[v] + sum_y1[v]);
}

// The rows [begin, end) of one thread. With copies, in the order (image, head, query): the cells of one head are copied
// next to each other, so that the caches hold more of them. Without, the queries of a decoder look anywhere. Vectors of
// 64 bytes wait for memory most of the time: the order is the same and all queries read one part of the levels, since
// one head of all but the first (0.7 MB with 4 levels of 800 x 1333 pixels) fits the second cache. With shorter ones instructions count, and the rows are read one
// after another in the order (image, query, head): the heads of a query look at the same region.
template <class T>
class ForwardPass {
  using C = compute_t<T>;
  static constexpr int64_t kUnrolledChannels = kMaxUnroll<C> * kSimdLanes<C>;
  static constexpr int64_t kMostSlots = 1024;
  static constexpr int64_t kCellsAhead = 4;  // rows whose cells are prefetched

 public:
  ForwardPass(const ForwardArgs& args, int64_t num_rows)
      : args_(args),
        shapes_(args.shapes),
        value_stride_(shapes_.num_heads * shapes_.head_dim),
        padded_channels_(padded<C>(shapes_.head_dim)),
        grid_(
            shapes_, args.points.reference_dim, 0, shapes_.levels.count,
            args.copy_heads ? padded_channels_ : value_stride_),
        by_level_(args.copy_heads || HF_DINO_VEC_BYTES == 64),
        num_slots_(
            args.copy_heads || !by_level_ ? kRowsPerBlock : std::min({num_rows, shapes_.num_queries, kMostSlots})),
        points_(grid_, num_slots_, false),
        sums_(num_slots_ * padded_channels_),
        head_copy_(args.copy_heads ? shapes_.sequence_length * padded_channels_ : 0) {}

  void run(int64_t begin, int64_t end) {
    if (by_level_) {
      run_by_level(begin, end);
    } else {
      run_row_by_row(begin, end);
    }
  }

 private:
  struct Row {
    int64_t image, head;
    int64_t batch_query;  // of (image, query)
    int64_t index;        // of (image, query, head)
  };

  Row locate(int64_t row) const {
    const int64_t heads = shapes_.num_heads, queries = shapes_.num_queries;
    const int64_t image = row / (heads * queries);
    const int64_t head = by_level_ ? row / queries % heads : row % heads;
    const int64_t batch_query = by_level_ ? image * queries + row % queries : row / heads;
    return {image, head, batch_query, batch_query * heads + head};
  }

  // Rows of one head, level by level, or the first level, which is the largest, and then all others. With copies, what a block of
  // neighboring queries reads on one level fits the innermost cache.
  void run_by_level(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t end_of_head = (begin / shapes_.num_queries + 1) * shapes_.num_queries;
      const int64_t last = std::min({begin + num_slots_, end_of_head, end});
      const T* value = args_.copy_heads ? copy_head(locate(begin)) : head_value(locate(begin));
      for (int64_t first = begin; first < last; first += kRowsPerBlock) {
        const int64_t stop = std::min(first + kRowsPerBlock, last);
        for (int64_t row = first; row < stop; ++row) set_references(locate(row), row - begin);
        for (int64_t row = first; row < stop; ++row) load_row(row, row - begin);
      }
      for (int64_t level = 0; level < shapes_.levels.count;) {
        const int64_t next = args_.copy_heads || level == 0 ? level + 1 : shapes_.levels.count;
        gather_levels(value, level * shapes_.num_points, next * shapes_.num_points, last - begin);
        level = next;
      }
      for (int64_t row = begin; row < last; ++row) store_row(locate(row), row - begin);
      begin = last;
    }
  }

  // The points [begin, end) of all rows.
  void gather_levels(const T* value, int64_t begin, int64_t end, int64_t used_slots) {
    for (int64_t slot = 0; slot < used_slots; ++slot) {
      const int64_t ahead = slot + kCellsAhead;
      if (!args_.copy_heads && ahead < used_slots) {
        points_.prefetch_cells(value, shapes_.head_dim, ahead, begin, end);
      }
      gather_row(value, begin, end, slot);
    }
  }

  // Two slots in turn: the next row is loaded, and its cells prefetched, before the current one is read.
  void run_row_by_row(int64_t begin, int64_t end) {
    load_and_prefetch_row(begin);
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < end) load_and_prefetch_row(row + 1);
      gather_row(head_value(locate(row)), 0, grid_.count, row % 2);
      store_row(locate(row), row % 2);
    }
  }

  void load_and_prefetch_row(int64_t row) {
    set_references(locate(row), row % 2);
    load_row(row, row % 2);
    points_.prefetch_cells(head_value(locate(row)), shapes_.head_dim, row % 2, 0, grid_.count);
  }

  // The row's head at the first cell of its image.
  const T* head_value(const Row& row) const {
    return static_cast<const T*>(args_.value) + row.image * shapes_.sequence_length * value_stride_ +
           row.head * shapes_.head_dim;
  }

  const T* copy_head(const Row& row) {
    const int64_t head = row.image * shapes_.num_heads + row.head;
    if (copied_head_ != head) {
      gather_rows(
          head_value(row), value_stride_, shapes_.sequence_length, shapes_.head_dim, head_copy_.get(),
          padded_channels_);
    }
    copied_head_ = head;
    return head_copy_.get();
  }

  void set_references(const Row& row, int64_t slot) {
    if (args_.points.references == nullptr) return;
    const int64_t reference_dim = args_.points.reference_dim;
    const C* references = static_cast<const C*>(args_.points.references);
    points_.set_references(
        references + row.batch_query * shapes_.levels.count * reference_dim, reference_dim, slot);
  }

  void load_row(int64_t row, int64_t slot) {
    const PointArgs& points = args_.points;
    const int64_t index = locate(row).index * grid_.count;
    C* weights = points_.load_weights(points, index, slot);
    if (points.references != nullptr) {
      softmax(weights, grid_.count);
      store_points(weights, grid_.count, args_.softmax_weights, points.dtype, index);
    }
    points_.template compute_corners<false>(points, index, slot);
    prefetch_row(row + kRowsPerBlock);
    std::memset(static_cast<void*>(&sums_[slot * padded_channels_]), 0, padded_channels_ * sizeof(C));
  }

  void prefetch_row(int64_t row) const {
    if (row >= shapes_.num_rows()) return;
    const PointArgs& points = args_.points;
    points_.prefetch_points(points.weights, points.coords, points.dtype, locate(row).index * grid_.count);
  }

  void gather_row(const T* value, int64_t begin, int64_t end, int64_t slot) {
    C* sums = &sums_[slot * padded_channels_];
    int64_t channel = 0;
    for (; channel + kUnrolledChannels <= padded_channels_; channel += kUnrolledChannels) {
      gather_points<kMaxUnroll<C>>(value + channel, grid_, points_, slot, begin, end, sums + channel);
    }
    for (; channel < padded_channels_; channel += kSimdLanes<C>) {
      gather_points<1>(value + channel, grid_, points_, slot, begin, end, sums + channel);
    }
  }

  void store_row(const Row& row, int64_t slot) {
    C* sums = &sums_[slot * padded_channels_];
    for (int64_t end = kUnrolledChannels; end <= padded_channels_; end += kUnrolledChannels) {
      for (int v = 0; v + 1 < kMaxUnroll<C>; v += 2) {
        C* pair = sums + end - kUnrolledChannels + v * kSimdLanes<C>;
        store_pair<T>(pair, load(pair), load(pair + kSimdLanes<C>));
      }
    }
    store_channels(sums, shapes_.head_dim, static_cast<T*>(args_.output) + row.index * shapes_.head_dim);
  }

  const ForwardArgs& args_;
  const AttentionShapes& shapes_;
  const int64_t value_stride_, padded_channels_;  // elements from a cell to the next one, in value and in copies
  const SampleGrid<C> grid_;
  const bool by_level_;
  const int64_t num_slots_;
  SamplePoints<C> points_;
  Buffer<C> sums_;       // (slots, padded_channels)
  Buffer<T> head_copy_;  // (sequence, padded_channels): the cells of one head
  int64_t copied_head_ = -1;
};

template <class T>
void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  ForwardPass<T>(args, end - begin).run(begin, end);
}

}  // namespace
