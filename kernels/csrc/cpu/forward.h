// The forward pass: one loop without branches reads four rows of channels per place.
#pragma once

#include <algorithm>

#include "sampling.h"
#include "softmax.h"

namespace {

// Adds kVectors vectors of channels of a row's places [begin, end) to `sums`, where they are in the order of load_pair.
// The two rows of cells are added up by themselves, because an addition has to wait for the one before it.
template <int kMaxUnroll, class T, class C>
inline void gather_points(
    const T* value, const SampleGrid<C>& grid, int64_t row, int64_t begin, int64_t end, C* sums) {
  const int64_t padded_count = grid.padded_count;
  const Int<C>* cells = &grid.samples.cell[row * padded_count];
  const C* corner_weights = &grid.samples.corner_weights[row * kNumCorners * padded_count];
  Vec<C> above[kMaxUnroll], under[kMaxUnroll] = {};
  for (int v = 0; v < kMaxUnroll; ++v) above[v] = load(sums + v * kSimdLanes<C>);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t x1_offset = grid.x1_offset[i];
    const T* top = value + cells[i] * grid.stride;
    const T* bottom = top + grid.y1_offset[i];
    const C w0 = corner_weights[kY0X0 * padded_count + i], w1 = corner_weights[kY0X1 * padded_count + i];
    const C w2 = corner_weights[kY1X0 * padded_count + i], w3 = corner_weights[kY1X1 * padded_count + i];
    if constexpr (kMaxUnroll == 1) {
      above[0] += load(top) * w0;
      above[0] += load(top + x1_offset) * w1;
      under[0] += load(bottom) * w2;
      under[0] += load(bottom + x1_offset) * w3;
    }
    Vec<C> a, b;
    for (int v = 0; v + 1 < kMaxUnroll; v += 2) {
      const int64_t channel = v * kSimdLanes<C>;
      load_pair(top + channel, &a, &b);
      above[v] += a * w0, above[v + 1] += b * w0;
      load_pair(bottom + channel, &a, &b);
      under[v] += a * w2, under[v + 1] += b * w2;
      load_pair(top + x1_offset + channel, &a, &b);
      above[v] += a * w1, above[v + 1] += b * w1;
      load_pair(bottom + x1_offset + channel, &a, &b);
      under[v] += a * w3, under[v + 1] += b * w3;
    }
  }
  for (int v = 0; v < kMaxUnroll; ++v) store(sums + v * kSimdLanes<C>, above[v] + under[v]);
}

// The rows of one thread. With copies in the order (picture, head, query): the cells of one head are copied next to
// each other, where the caches hold more of them. Without, (picture, query, head): the heads of a query look at the
// same region.
template <class T>
class ForwardPass {
  using C = compute_t<T>;
  static constexpr int64_t kUnrolledChannels = kMaxUnroll<C> * kSimdLanes<C>;

 public:
  explicit ForwardPass(const ForwardArgs& args)
      : args_(args),
        sizes_(args.sizes),
        cells_(end_of_level(sizes_.levels, sizes_.levels.count - 1)),
        stride_(sizes_.num_heads * sizes_.head_dim),
        padded_channels_(pad_to_vec<C>(sizes_.head_dim)),
        grid_(
            sizes_, args.points.reference_dim, 0, sizes_.levels.count,
            args.copy_heads ? padded_channels_ : stride_, false),
        sums_(kRowsPerBlock * padded_channels_),
        head_copy_(args.copy_heads ? cells_ * padded_channels_ : 0) {}

  void run(int64_t begin, int64_t end) {
    if (args_.copy_heads) {
      run_by_level(begin, end);
    } else {
      run_row_by_row(begin, end);
    }
  }

 private:
  struct Row {
    int64_t batch, head, batch_query;  // outer: picture and query
    int64_t index;               // picture, query and head
  };

  Row locate(int64_t row) const {
    const int64_t heads = sizes_.num_heads, queries = sizes_.num_queries;
    const int64_t batch = row / (heads * queries);
    const int64_t head = args_.copy_heads ? row / queries % heads : row % heads;
    const int64_t batch_query = args_.copy_heads ? batch * queries + row % queries : row / heads;
    return {batch, head, batch_query, batch_query * heads + head};
  }

  // Blocks of rows of one head. What neighbours read on one level fits the innermost cache.
  void run_by_level(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t end_of_head = (begin / sizes_.num_queries + 1) * sizes_.num_queries;
      const int64_t last = std::min({begin + kRowsPerBlock, end_of_head, end});
      copy_head(locate(begin));
      for (int64_t row = begin; row < last; ++row) set_references(locate(row), row - begin);
      for (int64_t row = begin; row < last; ++row) load_row(row, row - begin);
      for (int64_t level = 0; level < sizes_.levels.count; ++level) {
        const int64_t first = level * sizes_.num_points;
        for (int64_t row = begin; row < last; ++row) {
          read(head_copy_.get(), first, first + sizes_.num_points, row - begin);
        }
      }
      for (int64_t row = begin; row < last; ++row) write(locate(row), row - begin);
      begin = last;
    }
  }

  // The places of a row are found, and their cells asked for, while the row before it is read.
  void run_row_by_row(int64_t begin, int64_t end) {
    load_and_prefetch_row(begin);
    for (int64_t row = begin; row < end; ++row) {
      if (row + 1 < end) load_and_prefetch_row(row + 1);
      read(head_value(locate(row)), 0, grid_.count, row % 2);
      write(locate(row), row % 2);
    }
  }

  void load_and_prefetch_row(int64_t row) {
    set_references(locate(row), row % 2);
    load_row(row, row % 2);
    grid_.prefetch_cells(head_value(locate(row)), sizes_.head_dim, row % 2);
  }

  const T* head_value(const Row& row) const {
    return static_cast<const T*>(args_.value) + row.batch * cells_ * stride_ + row.head * sizes_.head_dim;
  }

  void copy_head(const Row& row) {
    const int64_t of = row.batch * sizes_.num_heads + row.head;
    if (copied_head_ == of) return;
    copied_head_ = of;
    gather_rows(head_value(row), stride_, cells_, sizes_.head_dim, head_copy_.get(), padded_channels_);
  }

  void set_references(const Row& row, int64_t slot) {
    if (args_.points.references == nullptr) return;
    const int64_t width = args_.points.reference_dim;
    const C* references = static_cast<const C*>(args_.points.references);
    grid_.set_references(references + row.batch_query * sizes_.levels.count * width, width, slot);
  }

  void load_row(int64_t row, int64_t slot) {
    const PointArgs& points = args_.points;
    const int64_t index = locate(row).index * grid_.count;
    C* weights = grid_.read_weights(points, index, slot);
    if (points.references != nullptr) {
      softmax(weights, grid_.count);
      store_points(weights, grid_.count, args_.softmax_weights, points.type, index);
    }
    grid_.template slot<false>(points, index, slot);
    prefetch(row + kPrefetchRows);
    std::memset(static_cast<void*>(&sums_[slot * padded_channels_]), 0, padded_channels_ * sizeof(C));
  }

  void prefetch(int64_t row) const {
    if (row >= sizes_.batch_size * sizes_.num_heads * sizes_.num_queries) return;
    grid_.prefetch_points(args_.points, locate(row).index * grid_.count);
  }

  void read(const T* value, int64_t begin, int64_t end, int64_t slot) {
    C* sums = &sums_[slot * padded_channels_];
    int64_t channel = 0;
    for (; channel + kUnrolledChannels <= padded_channels_; channel += kUnrolledChannels) {
      gather_points<kMaxUnroll<C>>(value + channel, grid_, slot, begin, end, sums + channel);
    }
    for (; channel < padded_channels_; channel += kSimdLanes<C>) {
      gather_points<1>(value + channel, grid_, slot, begin, end, sums + channel);
    }
  }

  void write(const Row& row, int64_t slot) {
    C* sums = &sums_[slot * padded_channels_];
    for (int64_t end = kUnrolledChannels; end <= padded_channels_; end += kUnrolledChannels) {
      for (int v = 0; v + 1 < kMaxUnroll<C>; v += 2) {
        C* pair = sums + end - kUnrolledChannels + v * kSimdLanes<C>;
        store_pair<T>(pair, load(pair), load(pair + kSimdLanes<C>));
      }
    }
    store_channels(sums, sizes_.head_dim, static_cast<T*>(args_.output) + row.index * sizes_.head_dim);
  }

  const ForwardArgs& args_;
  const Sizes& sizes_;
  const int64_t cells_, stride_, padded_channels_;
  SampleGrid<C> grid_;
  Buffer<C> sums_;
  Buffer<T> head_copy_;  // of the cells of one head
  int64_t copied_head_ = -1;
};

template <class T>
void forward(const ForwardArgs& args, int64_t begin, int64_t end) {
  ForwardPass<T>(args).run(begin, end);
}

}  // namespace
