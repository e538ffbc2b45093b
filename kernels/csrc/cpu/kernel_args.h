// What the code for one kind of processor is called with. It knows no tensors, only pointers and strides.
#pragma once

#include <cstdint>

#include "../shapes.h"

namespace hf_dino {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

struct Sizes {
  int64_t batch_size, num_heads, head_dim, num_queries, num_points;  // points per level
  Levels levels;
};

// The points to look at. Without references `points` are locations and `weights` are attention weights; with references
// they are offsets and, forward, logits.
struct PointArgs {
  const void* points;   // (batch, queries, heads, levels, points, 2)
  const void* weights;  // (batch, queries, heads, levels, points)
  DType type;            // of both
  const void* references;  // (batch, queries, levels, reference_width), in the type computed with; or null
  int64_t reference_dim;
};

struct ForwardArgs {
  Sizes sizes;
  DType type;  // of value and output
  const void* value;  // (batch, cells, heads, channels)
  bool copy_heads;        // read copies of one head at a time, padded to whole vectors, rather than `value`
  PointArgs points;
  void* output;           // (batch, queries, heads, channels)
  void* softmax_weights;  // with references, like points.weights
};

struct BackwardArgs {
  Sizes sizes;
  DType type;               // of value, grad_output and grad_value
  const void* value;       // (batch, cells, heads, channels)
  const void* grad_output; // (batch, queries, heads, channels)
  PointArgs points;
  void* grad_value;        // like value. Zero at first if `in_place`
  bool in_place;           // read and add where value and grad_value are, rather than in copies of one head at a time
  void* grad_points;       // like points.points
  void* grad_weights;      // like points.weights, but in the type computed with
  void* grad_references;   // (heads, batch, queries, levels, reference_width), in the type computed with; or null
};

// The code for one kind of processor. Each function does a part of the work, so that threads can share it.
struct CpuKernels {
  const char* name;
  int64_t vec_bytes;
  // Rows are those of a picture, query and head, in an order that `copies` decides.
  void (*forward)(const ForwardArgs&, int64_t begin, int64_t end);
  // Tasks are (batch, head, group of levels) in this order; none touches what another writes.
  void (*backward)(const BackwardArgs&, int64_t level_groups, int64_t begin, int64_t end);
  // Rows are (batch, query, head): from the gradient of the weights to that of the logits.
  void (*softmax_backward)(
      const BackwardArgs&, const void* grad_from_weights, void* grad_logits, int64_t begin, int64_t end);
};

// Null where the compiler or the architecture has no such thing.
extern const CpuKernels* const kAvx512;
extern const CpuKernels* const kAvx2;
extern const CpuKernels* const kDefault;

}  // namespace hf_dino
