// `transforms` and `spectral` on any machine: four lanes, which compilers map to SSE2, NEON or plain scalars.
#define LK_ISA portable
#define LK_WIDTH 4
#include "transforms_kernels.h"
