"""Small PEFT models over bitsandbytes' layers, and the same in float64."""

import contextlib

import bitsandbytes as bnb
import torch
from nets import config
from peft import get_peft_model
from seeded import Pair
from torch import nn

import lora_kernels as lk
from lora_kernels.ops._quantized import quantized_linear
from lora_kernels.testing.numerics import rms

K, N = 128, 64  # bitsandbytes 0.50 unpacks blocks that lie in two rows wrongly on the CPU
BASES = ("nf4", "nf4 nested", "fp4", "int8")


def kernels():
    """The compiled kernels of ``quantized``, or the reference by force: unforced it would leave the base to itself."""
    return contextlib.nullcontext() if "cpu" in quantized_linear.backends() else lk.backend("reference")


def linear(base, in_features=K, out_features=N, bias=True, compute_dtype=None):
    """A layer of bitsandbytes, quantised."""
    weight = torch.randn(out_features, in_features) / in_features**0.5
    if base == "int8":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")
    kind, *nested = base.split()
    layer = bnb.nn.Linear4bit(in_features, out_features, bias, compute_dtype, bool(nested), kind)
    layer.weight = bnb.nn.Params4bit(weight, False, compress_statistics=bool(nested), quant_type=kind, module=layer)
    return layer.to("cpu")


class Net(nn.Module):
    def __init__(self, base, compute_dtype=None):
        super().__init__()
        self.up = linear(base, compute_dtype=compute_dtype)
        self.down = linear(base, N, K, bias=False, compute_dtype=compute_dtype)
        setattr(self, "is_loaded_in_8bit" if base == "int8" else "is_loaded_in_4bit", True)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def net(base, compute_dtype=None, masters=True, dtype=torch.float32, **kwargs):
    """A PEFT model in training mode whose adapter 'default' is anything but zero."""
    torch.manual_seed(4)
    model = get_peft_model(Net(base, compute_dtype), config(**kwargs), autocast_adapter_dtype=masters)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.float32 if masters else dtype)
        elif name.endswith("bias"):
            p.data = p.data.to(dtype)
    return model.train()


class PackedPair(Pair):
    """A patched model and its twin, which does not round its statistics in eval mode."""

    def __init__(self, model):
        super().__init__(model)
        for module in self.twin.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False


def dequantised(base):
    """The weight of a layer of bitsandbytes that was not repacked, float64."""
    if isinstance(base, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    SCB = base.weight.SCB if base.weight.SCB is not None else base.state.SCB
    return base.weight.data.double() * SCB.double()[:, None] / 127


def truth(layer, x, mask=None, adapter="default"):
    """(y, dx, dA, dB) in float64 for dy = ``slope``, and what float32 sums may be off each."""
    W = dequantised(layer.base_layer)
    tensors = [x, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    x64, A, B = (t.detach().double() for t in tensors)
    bias = None if layer.base_layer.bias is None else layer.base_layer.bias.detach().double()
    mask = torch.ones_like(x64) if mask is None else mask.double()
    dy, s = slope(x, len(W)).double(), layer.scaling[adapter]
    exact = _computed(x64, W, bias, A, B, s, mask, dy)
    squares = [None if t is None else t.square() for t in (x64, W, bias, A, B, torch.tensor(float(s)), mask, dy)]
    longest = max(*W.shape, x[..., 0].numel())
    return exact, [longest**0.5 * 2**-24 * rms(t.sqrt()) for t in _computed(*squares)]


def _computed(x, W, bias, A, B, s, mask, dy):
    x, A, B = (t.clone().requires_grad_() for t in (x, A, B))
    y = x @ W.T + s * ((x * mask) @ A.T) @ B.T
    y = y if bias is None else y + bias
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]


def slope(x, columns):
    """What the tests take as dy."""
    shape = torch.Size((*x.shape[:-1], columns))
    return torch.linspace(-1, 1, shape.numel()).view(shape).to(x.dtype)


def ran(layer, x, adapter="default", autocast=False):
    """(y, dx, dA, dB) as the layer gives them, for ``slope``; ``autocast``: of the forward, to bf16."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return [y.detach(), *torch.autograd.grad(y, (x, A, B), slope(x, y.shape[-1]).to(y.dtype))]
