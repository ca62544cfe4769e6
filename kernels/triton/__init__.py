"""Triton kernels, one module a family; ``_device`` is what they ask of the GPU."""
