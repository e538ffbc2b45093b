// For processors with AVX2 and FMA. Compiled with -mavx2 -mfma -mf16c on x86-64, and empty without them.
#include "arguments.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HF_DINO_VECTOR_BYTES 32
#define HF_DINO_PROCESSOR_NAME "AVX2"
#include "kernel.h"
const hf_dino::Processor* const hf_dino::kAvx2 = &kThisProcessor;
#else
const hf_dino::Processor* const hf_dino::kAvx2 = nullptr;
#endif
