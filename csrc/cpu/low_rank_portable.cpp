// `low_rank` on any machine: four lanes, which compilers map to SSE2, NEON or plain scalars.
#define LK_ISA portable
#define LK_WIDTH 4
#include "lora_linear_kernels.h"
#include "quantized_kernels.h"

namespace lora_kernels::portable {
extern const TransformKernels transforms;
extern const LowRankKernels low_rank{
    "portable", shrink_vectors, expand_vectors, expand_kept, outer_vectors,      drop,
    combine,    column_grads,   transpose,      nullptr,     &quantized_vectors, &portable::transforms};
}  // namespace lora_kernels::portable
