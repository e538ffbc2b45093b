// For processors with AVX-512. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c on x86-64, and
// empty without them.
#include "arguments.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HF_DINO_VECTOR_BYTES 64
#define HF_DINO_PROCESSOR_NAME "AVX-512"
#include "kernel.h"
const hf_dino::Processor* const hf_dino::kAvx512 = &kThisProcessor;
#else
const hf_dino::Processor* const hf_dino::kAvx512 = nullptr;
#endif
