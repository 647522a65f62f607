// The ladder and the shipped kernels in the CPU emulation; linked with count_traffic.cpp (run.py has the commands).
//
// Compiled with -fsanitize=thread for its hooks, with -O1 and without scalar replacement: if the compiler took a load
// of 16 bytes apart, or split or unrolled a loop, what is one request on a GPU would be counted as several.
#undef __SANITIZE_THREAD__  // or the shim calls the race detector, which is not linked
#include "simt_shim.h"
#include "element_host.h"

namespace naive {
#include "naive.cu"
}
namespace warp {
#include "warp.cu"
}
namespace block {
#include "block.cu"
}
namespace registers {
#include "registers.cu"
}
using block::ladder_block;
using naive::ladder_naive;
using registers::ladder_registers;
using warp::ladder_warp;
SIMT_KERNEL(ladder_naive)
SIMT_KERNEL(ladder_warp)
SIMT_KERNEL(ladder_block)
SIMT_KERNEL(ladder_registers)

#ifndef LADDER_ONLY
#include "weighted_cross_entropy.cu"
SIMT_KERNEL(wce_row_bf16_512x8)
SIMT_KERNEL(wce_stream_bf16)
SIMT_KERNEL(wce_row_fp32_1024x8)
SIMT_KERNEL(wce_stream_fp32)
#endif

extern "C" UNTRACED void ladder_where(unsigned* block, unsigned* thread)
{
    *block = blockIdx.x;
    *thread = threadIdx.x;
}
