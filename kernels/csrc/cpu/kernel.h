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
void for_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat:
      return function(float{});
    case Type::kDouble:
      return function(double{});
    case Type::kHalf:
      return function(Half{});
    case Type::kBFloat16:
      return function(BFloat16{});
  }
}

void forward_entry(const ForwardArguments& arguments, int64_t begin, int64_t end) {
  for_type(arguments.type, [&](auto number) { forward<decltype(number)>(arguments, begin, end); });
}

void backward_entry(const BackwardArguments& arguments, int64_t level_groups, int64_t begin, int64_t end) {
  for_type(arguments.type, [&](auto number) { backward<decltype(number)>(arguments, level_groups, begin, end); });
}

void softmax_backward_entry(
    const BackwardArguments& arguments, const void* grad_softmax_weights, void* grad_logits, int64_t begin,
    int64_t end) {
  for_type(arguments.type, [&](auto number) {
    softmax_backward<decltype(number)>(arguments, grad_softmax_weights, grad_logits, begin, end);
  });
}

const hf_dino::Processor kThisProcessor = {
    HF_DINO_PROCESSOR_NAME, HF_DINO_VECTOR_BYTES, forward_entry, backward_entry, softmax_backward_entry,
};

}  // namespace
