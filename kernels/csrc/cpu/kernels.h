// The computation on the CPU, for vectors of the width that the including file chose, as one table of functions:
//
//   memory.h     buffers, and numbers of every dtype
//   softmax.h    logits to attention weights
//   places.h     points to cells and how much they count
//   forward.h, backward.h
#include "backward.h"
#include "forward.h"

namespace {

// Calls `function` with a number of the type.
template <class Function>
void dispatch_dtype(DType type, Function function) {
  switch (type) {
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

void forward_entry(const ForwardArgs& args, int64_t begin, int64_t end) {
  dispatch_dtype(args.type, [&](auto number) { forward<decltype(number)>(args, begin, end); });
}

void backward_entry(const BackwardArgs& args, int64_t level_groups, int64_t begin, int64_t end) {
  dispatch_dtype(args.type, [&](auto number) { backward<decltype(number)>(args, level_groups, begin, end); });
}

void softmax_backward_entry(
    const BackwardArgs& args, const void* grad_from_weights, void* grad_logits, int64_t begin,
    int64_t end) {
  dispatch_dtype(args.type, [&](auto number) {
    softmax_backward<decltype(number)>(args, grad_from_weights, grad_logits, begin, end);
  });
}

const hf_dino::CpuKernels kKernels = {
    HF_DINO_CAPABILITY, HF_DINO_VEC_BYTES, forward_entry, backward_entry, softmax_backward_entry,
};

}  // namespace
