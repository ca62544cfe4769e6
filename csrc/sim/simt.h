// What device code sees on the host in place of CUDA's headers. csrc/README.md tells what is checked and what is not.
#pragma once

#include "executor.h"
#include "functions.h"
#include "memory.h"
#include "numbers.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (simt::current->index)
#define blockIdx (simt::launched.block_index)
#define blockDim (simt::launched.block)
#define gridDim (simt::launched.grid)
#define warpSize 32

#define LORA_KERNELS_SHARED(name) unsigned char* name = simt::shared_memory()
