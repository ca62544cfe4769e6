"""The layers on a GPU, forward and backward, against themselves on the CPU's reference."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk

DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))


def results(layer, x, *routing):
    """The output and every gradient by name, in fp32 on the CPU."""
    x = x.clone().requires_grad_()
    y = layer(x, *routing)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).to(y.device))
    with torch.no_grad():
        found = {"y": y, "y without gradients": layer(x, *routing), "x": x.grad, "A": layer.A.grad, "B": layer.B.grad}
    return {name: value.detach().float().cpu() for name, value in found.items()}


def compare(layer, x, *routing):
    nn.init.normal_(layer.B)
    on_gpu = copy.deepcopy(layer).to(DEVICE)
    with lk.backend("reference"):
        want = results(layer, x, *routing)
    tolerance = 1e-4 if x.dtype == torch.float32 else 2e-2
    for given in (routing, [lk.BatchPlan.from_ids(ids.to(DEVICE), 3) for ids in routing]):
        got = results(
            on_gpu, x.to(DEVICE), *(one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in given)
        )
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * value.abs().max(), msg=name)
        on_gpu.zero_grad()


@DTYPES
@pytest.mark.parametrize("bias", (True, False))
def test_lora_linear(dtype, bias):
    compare(lk.nn.LoRALinear(nn.Linear(48, 40, bias=bias, dtype=dtype), 5, 8), torch.randn(3, 7, 48, dtype=dtype))


@DTYPES
def test_multi_lora_linear(dtype):
    layer = lk.nn.MultiLoRALinear(nn.Linear(48, 40, dtype=dtype), 3, 5, 8)
    layer.scaling.copy_(torch.tensor([0.5, 1.0, 2.0]))
    compare(layer, torch.randn(60, 48, dtype=dtype), torch.randint(-1, 3, (60,)))
