// For every processor: vectors of 16 bytes, which the compiler turns into SSE2, NEON or whatever there is.
#define HF_DINO_VECTOR_BYTES 16
#define HF_DINO_PROCESSOR_NAME "portable"
#include "kernel.h"
const hf_dino::Processor* const hf_dino::kPortable = &kThisProcessor;
