// What the operators, which see tensors, pass to the kernels, which see pointers: their arguments, and one table of
// functions per CPU capability. All tensors are contiguous.
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

// The sampling points. Without references, `coords` are locations and `weights` are attention weights; with references,
// they are offsets and, in the forward pass, logits.
struct PointArgs {
  const void* coords;      // (batch, queries, heads, levels, points, 2)
  const void* weights;     // (batch, queries, heads, levels, points)
  DType dtype;             // of both
  const void* references;  // (batch, queries, levels, reference_dim), in the dtype computed with; or null
  int64_t reference_dim;
};

struct ForwardArgs {
  AttentionShapes shapes;
  DType dtype;        // of value and output
  const void* value;  // (batch, sequence, heads, channels)
  bool copy_heads;    // read copies of one head at a time, padded to whole vectors, rather than `value`
  PointArgs points;
  void* output;           // (batch, queries, heads, channels)
  void* softmax_weights;  // with references, like points.weights
};

struct BackwardArgs {
  AttentionShapes shapes;
  DType dtype;              // of value, grad_output and grad_value
  const void* value;        // (batch, sequence, heads, channels)
  const void* grad_output;  // (batch, queries, heads, channels)
  PointArgs points;
  void* grad_value;       // like value; zero at first if `in_place`
  bool in_place;          // work on value and grad_value themselves, rather than on copies of one head at a time
  void* grad_coords;      // like points.coords
  void* grad_weights;     // like points.weights, but in the dtype computed with
  void* grad_references;  // (heads, batch, queries, levels, reference_dim), in the dtype computed with; or null
};

// The kernels for one CPU capability. Each call computes a range of rows or tasks, so that threads can share the work.
struct CpuKernels {
  const char* capability;
  int64_t vec_bytes;
  // A row is one (image, query, head); `copy_heads` and the vectors' width decide the order of the rows.
  void (*forward)(const ForwardArgs&, int64_t begin, int64_t end);
  // Tasks are (image, head, group of levels), in this order; none touches what another writes.
  void (*backward)(const BackwardArgs&, int64_t level_groups, int64_t begin, int64_t end);
  // From the gradient of the attention weights to that of the logits; rows are (image, query, head), in this order.
  void (*softmax_backward)(
      const BackwardArgs&, const void* grad_from_weights, void* grad_logits, int64_t begin, int64_t end);
};

// Null where the compiler or the architecture does not have it.
extern const CpuKernels* const kAvx512;
extern const CpuKernels* const kAvx2;
extern const CpuKernels* const kDefault;

}  // namespace hf_dino
