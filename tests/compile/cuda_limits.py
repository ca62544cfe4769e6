"""What the kernels of each CUDA source may take and must contain; the first limit that fits a kernel's name holds."""

from nvcc import Limit

LIMITS = {
    "low_rank": (
        # Two blocks of 128 threads at once, three.
        Limit("shrink_kernel<.*", 255, "HMMA LDG.128"),
        Limit("expand_kernel<.*", 168, "HMMA LDSM LDGSTS.128 LDG.128 STG.128"),
        Limit("add_kernel<.*", 255, "HMMA LDSM LDGSTS.128 LDG.128 STG.128"),
        Limit("plan_kernel<.*|sum_kernel<.*", 32),
    ),
    # One of 512, or two where values are few.
    "transforms": (
        Limit("hadamard_kernel<.*, 16>", 64),
        Limit("hadamard_kernel<.*", 128),
    ),
}
