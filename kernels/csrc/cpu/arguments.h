// What the code for one kind of processor is called with. It knows no tensors, only pointers and strides.
#pragma once

#include <cstdint>

#include "../levels.h"

namespace hf_dino {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

struct Sizes {
  int64_t batch_size, num_heads, head_dim, num_queries, num_points;  // points per level
  Levels levels;
};

// The points to look at. Without references `points` are locations and `weights` are attention weights; with references
// they are offsets and, forward, logits.
struct Points {
  const void* points;   // (batch, queries, heads, levels, points, 2)
  const void* weights;  // (batch, queries, heads, levels, points)
  Type type;            // of both
  const void* references;  // (batch, queries, levels, reference_width), in the type computed with; or null
  int64_t reference_width;
};

struct ForwardArguments {
  Sizes sizes;
  Type type;  // of value and output
  const void* value;  // (batch, cells, heads, channels)
  bool copies;        // read copies of one head at a time, padded to whole vectors, rather than `value`
  Points points;
  void* output;           // (batch, queries, heads, channels)
  void* softmax_weights;  // with references, like points.weights
};

struct BackwardArguments {
  Sizes sizes;
  Type type;               // of value, grad_output and grad_value
  const void* value;       // (batch, cells, heads, channels)
  const void* grad_output; // (batch, queries, heads, channels)
  Points points;
  void* grad_value;        // like value. Zero at first if `in_place`
  bool in_place;           // read and add where value and grad_value are, rather than in copies of one head at a time
  void* grad_points;       // like points.points
  void* grad_weights;      // like points.weights, but in the type computed with
  void* grad_references;   // (heads, batch, queries, levels, reference_width), in the type computed with; or null
};

// The code for one kind of processor. Each function does a part of the work, so that threads can share it.
struct Processor {
  const char* name;
  int64_t vector_bytes;
  // Rows are those of a picture, query and head, in an order that `copies` decides.
  void (*forward)(const ForwardArguments&, int64_t begin, int64_t end);
  // Tasks are (batch, head, group of levels) in this order; none touches what another writes.
  void (*backward)(const BackwardArguments&, int64_t level_groups, int64_t begin, int64_t end);
  // Rows are (batch, query, head): from the gradient of the weights to that of the logits.
  void (*softmax_backward)(
      const BackwardArguments&, const void* grad_softmax_weights, void* grad_logits, int64_t begin, int64_t end);
};

// Null where the compiler or the architecture has no such thing.
extern const Processor* const kAvx512;
extern const Processor* const kAvx2;
extern const Processor* const kPortable;

}  // namespace hf_dino
