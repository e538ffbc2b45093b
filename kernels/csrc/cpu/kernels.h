// The kernels for vectors of the width that the including file chose, as one table of functions:
//
//   vec.h        vectors: load, store, blend, shuffle, reduce
//   convert.h    buffers, and loading and storing rows of every dtype
//   softmax.h    logits to attention weights
//   sampling.h   sampling points to cells and their weights
//   forward.h, backward.h
#include "backward.h"
#include "forward.h"

namespace {

// Calls `function` with a number of the dtype.
template <class Function>
void dispatch_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat:
      return function(float{});
    case DType::kDouble:
      return function(double{});
    case DType::kHalf:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
  }
}

void forward_any(const ForwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto number) { forward<decltype(number)>(args, begin, end); });
}

void backward_any(const BackwardArgs& args, int64_t level_groups, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto number) { backward<decltype(number)>(args, level_groups, begin, end); });
}

void softmax_backward_any(
    const BackwardArgs& args, const void* grad_from_weights, void* grad_logits, int64_t begin, int64_t end) {
  dispatch_dtype(args.dtype, [&](auto number) {
    softmax_backward<decltype(number)>(args, grad_from_weights, grad_logits, begin, end);
  });
}

const hf_dino::CpuKernels kKernels = {
    HF_DINO_CAPABILITY, HF_DINO_VEC_BYTES, forward_any, backward_any, softmax_backward_any,
};

}  // namespace
