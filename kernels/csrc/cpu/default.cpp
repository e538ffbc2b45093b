// For every processor: vectors of 16 bytes, which the compiler turns into SSE2, NEON or whatever there is.
#define HF_DINO_VEC_BYTES 16
#define HF_DINO_CAPABILITY "portable"
#include "kernels.h"
const hf_dino::CpuKernels* const hf_dino::kDefault = &kKernels;
