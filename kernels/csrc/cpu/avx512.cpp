// For CPUs with AVX-512. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c on x86-64, and empty
// without them.
#include "kernel_args.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HF_DINO_VEC_BYTES 64
#define HF_DINO_CAPABILITY "avx512"
#include "kernels.h"
const hf_dino::CpuKernels* const hf_dino::kAvx512 = &kKernels;
#else
const hf_dino::CpuKernels* const hf_dino::kAvx512 = nullptr;
#endif
