// For CPUs with AVX2 and FMA. Compiled with -mavx2 -mfma -mf16c on x86-64, and empty without them.
#include "kernel_args.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HF_DINO_VEC_BYTES 32
#define HF_DINO_CAPABILITY "avx2"
#include "kernels.h"
const hf_dino::CpuKernels* const hf_dino::kAvx2 = &kKernels;
#else
const hf_dino::CpuKernels* const hf_dino::kAvx2 = nullptr;
#endif
