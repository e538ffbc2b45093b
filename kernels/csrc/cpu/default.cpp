// For every CPU: vectors of 16 bytes, which the compiler turns into SSE2, NEON or whatever the architecture has.
#define HF_DINO_VEC_BYTES 16
#define HF_DINO_CAPABILITY "default"
#include "kernels.h"
const hf_dino::CpuKernels* const hf_dino::kDefault = &kKernels;
