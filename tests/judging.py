"""The error rule where it can be measured, and what stands in for it where there is too little to measure."""

import torch

from lora_kernels.testing import assert_within_rule, rms

FEWEST = 256


def judge(got, oracle, plain, noise, what):
    """Assert the error rule; of fewer results in half precision, whose RMS is a matter of luck, each on its own."""
    if got.dtype in (torch.float32, torch.float64) or got.numel() >= FEWEST:
        assert_within_rule(got, oracle, plain, noise=noise, what=what)
        return
    assert got.shape == oracle.shape, what
    limit = 2 * torch.finfo(got.dtype).eps * (oracle.abs() + rms(oracle)) + 2 * rms(plain.double() - oracle)
    assert ((got.double() - oracle).abs() <= limit).all(), what
