"""The checks of ``benchmarks/bench_training.py`` notice what they are there for."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
K, N, R, M = 256, 192, 8, 300


@pytest.fixture(autouse=True)
def poisoned():
    """Layers are built and run as users do it."""


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def gradients():
    import gradients

    return gradients


def layer(dropout=0.0, **kwargs):
    from peft import LoraConfig

    base = torch.nn.Linear(K, N, bias=False).bfloat16().requires_grad_(False)
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, init_lora_weights=False, **kwargs)
    made = Linear(base, "default", config=config, r=R, lora_alpha=2 * R).train()
    for name, weight in made.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    return made


def sample():
    return torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()


class Mistaken(torch.autograd.Function):
    """s·(x̃ Aᵀ) Bᵀ whose masks, scale or dB can be wrong."""

    @staticmethod
    def forward(ctx, x, A, B, s, p, mistake):
        def dropped(mask):
            return x * mask / (1 if mistake == "scale" else 1 - p)

        masks = [(torch.rand(x.shape) >= p).float() for _ in range(3)]
        in_x, in_a = masks[1] if mistake == "x" else masks[0], masks[2] if mistake == "A" else masks[0]
        v = dropped(masks[0]) @ A.T
        ctx.s, ctx.scale, ctx.mistake = s, 1 - p, mistake
        ctx.save_for_backward(dropped(in_a), A, B, v, in_x)
        return s * v @ B.T * (math.nan if mistake == "nan" else 1)

    @staticmethod
    def backward(ctx, dy):
        x, A, B, v, mask = ctx.saved_tensors
        dv = ctx.s * dy @ B
        dB = (ctx.s * dy.T @ v) * (1.001 if ctx.mistake == "B" else 1)
        return dv @ A * mask / ctx.scale, dv.T @ x, dB, None, None, None


def mistaken(right, p, mistake):
    """A twin of PEFT's layer that runs the function above."""
    ours = copy.deepcopy(right, {id(weight): weight for weight in right.parameters()})
    A, B = ours.lora_A["default"].weight, ours.lora_B["default"].weight
    s = ours.scaling["default"]
    ours.forward = lambda x: (ours.base_layer(x) + Mistaken.apply(x.float(), A, B, s, p, mistake)).bfloat16()
    return ours


def test_right_results_are_timed(gradients):
    for dropout in (0.0, 0.05):
        for dora in (False, True):
            right = layer(dropout, use_dora=dora)
            gradients.check_layer(copy.deepcopy(right, {id(w): w for w in right.parameters()}), right, *sample(), "it")
    right = layer()
    gradients.check_layer(mistaken(right, 0.0, None), right, *sample(), "it")
    right = layer(0.05)
    gradients.check_layer(mistaken(right, 0.05, None), right, *sample(), "it")


def test_wrong_gradients_are_not(gradients):
    right = layer()
    with pytest.raises(AssertionError, match=r"lora_B.default.weight: relative RMS error"):
        gradients.check_layer(mistaken(right, 0.0, "B"), right, *sample(), "it")


@pytest.mark.parametrize(
    "p, mistake, match",
    [
        (0.0, None, r"dropout changes y 0\.\d+ times as much"),
        (0.2, None, r"dropout changes y \d\.\d+ times as much"),
        (0.05, "scale", r"dropout changes y .* by -0\.05"),
        (0.05, "nan", "dropout changes y nan times"),
        (0.05, "x", "the mask of x's gradient is not that of y"),
        (0.05, "A", "the mask of A's gradient is not that of y"),
    ],
)
def test_wrong_dropout_is_not_timed(gradients, p, mistake, match):
    right = layer(0.05)
    with pytest.raises(AssertionError, match=match):
        gradients.check_layer(mistaken(right, p, mistake), right, *sample(), "it")


def in_4_bits():
    """(ours, PEFT's, what the base holds): twins over one packed weight."""
    functional = pytest.importorskip("bitsandbytes").functional
    from lora_kernels import QuantizedWeight, dequantize
    from lora_kernels.nn import QuantizedLoRALinear

    data, state = functional.quantize_4bit(torch.randn(N, K).bfloat16(), quant_type="nf4")
    weight = QuantizedWeight.from_bitsandbytes(data, state)
    right = layer()
    right.base_layer.weight.data = dequantize(weight)
    ours = QuantizedLoRALinear(weight, R, 2 * R)
    with torch.no_grad():
        ours.A.copy_(right.lora_A["default"].weight)
        ours.B.copy_(right.lora_B["default"].weight)
    return ours, right, dequantize(weight, torch.float32)


def test_only_right_results_over_a_packed_weight_are_timed(gradients):
    ours, right, weight = in_4_bits()
    gradients.check_quantized(ours, right, weight, *sample(), "it")
    for mistake in (ours.A, ours.B):
        before = mistake.detach().clone()
        with torch.no_grad():
            mistake.mul_(1.2)
        with pytest.raises(AssertionError, match=r"lora_kernels it: [yx]: relative RMS error"):
            gradients.check_quantized(ours, right, weight, *sample(), "it")
        with torch.no_grad():
            mistake.copy_(before)
    ours.codes[0].zero_()
    with pytest.raises(AssertionError, match="lora_kernels it: y"):
        gradients.check_quantized(ours, right, weight, *sample(), "it")


def test_blocks_are_counted_and_the_most_at_a_time():
    import memory

    def run():
        first = torch.empty(3 << 20, dtype=torch.uint8)
        second = torch.empty(2 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 20, dtype=torch.uint8)
        del second, third

    assert memory.allocations(run) == (3 << 20, 5 << 20)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_the_process_is_what_is_written():
    import memory

    kept = torch.ones(1 << 24)
    assert memory.resident(lambda: torch.ones(1 << 25).sum()) == pytest.approx(4 << 25, rel=0.3)
    assert memory.resident(lambda: torch.empty(1 << 25)) < 1 << 25
    assert kept.all()


def test_what_is_kept_is_counted_once(gradients):
    class Keeps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(N, K))

        def forward(self, x):
            half = x.sin()
            return (half @ self.weight.T).exp() + half.exp().sum() + (half * half).sum()

    # sin(x) twice, exp(sin(x)), and exp(..) [M, N] that is not y; x and the weight are known.
    assert gradients.kept(Keeps(), torch.randn(M, K)) == 4 * (2 * M * K + M * N)


def test_errors_are_at_the_share_and_b_is_as_before(gradients):
    right = layer()
    B = right.lora_B["default"].weight.detach().clone()
    x = sample()[0]
    mine = mistaken(right, 0.0, None)
    seen = []
    mine.register_forward_hook(lambda m, args, y: seen.append(y - m.base_layer(args[0])))
    for share in (0.1, 0.8):
        found = gradients.errors({"PEFT": right, "lora_kernels": mine}, x, share)
        base = right.base_layer(x).double()
        assert seen[-1].double().square().mean().sqrt() / base.square().mean().sqrt() == pytest.approx(share, rel=0.1)
        assert all(1e-3 < error < 3e-3 for error in found.values())
    assert torch.equal(right.lora_B["default"].weight, B)
