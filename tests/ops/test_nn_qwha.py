"""QWHA's layer against its formula in float64."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import LoRALinear, QuantizedLinear, QWHALinear
from lora_kernels.testing import bitwise_equal, wht_oracle

K, N, COUNT = 64, 40, 90
ALPHA = 30.0


def make(fmt="nf4", alpha=ALPHA, dtype=torch.float32, seed=0, bias=True, **options):
    """A layer at random places with values that are not zero; over a linear layer where fmt is None."""
    base, more = nn.Linear(K, N, bias=bias).to(dtype), {}
    if fmt is not None:
        base, more = (
            lk.quantize(base.weight.detach(), fmt, group_size=None if fmt == "int8" else 32),
            {"bias": base.bias},
        )
    layer = QWHALinear(base, lk.SpectralPlan.random(COUNT, (N, K), seed), alpha, **more, **options)
    nn.init.normal_(layer.values)
    return layer


def dense(layer):
    """The base's weight and ΔW in float64."""
    weight = layer.base.weight
    W = weight.double() if isinstance(weight, torch.Tensor) else lk.dequantize(weight, torch.float32).double()
    S = torch.zeros(W.shape, dtype=torch.float64).index_put((layer.rows, layer.cols), layer.values.double(), True)
    H = wht_oracle(torch.eye(W.shape[1], dtype=torch.float64), layout=layer.layout).T
    return W, ALPHA / math.sqrt(W.numel()) * S @ H


def formula(x, layer):
    W, delta = dense(layer)
    y = x.double() @ (W + delta).T
    return y if layer.base.bias is None else y + layer.base.bias.double()


def close(actual, expected, rtol=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("fmt, bias", [(None, True), ("nf4", False), ("int4", True), ("int8", True)])
@pytest.mark.parametrize("shape", ((K,), (2, 3, K), (0, K)))
def test_formula(route, fmt, bias, shape):
    layer, x = make(fmt, bias=bias), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    close(y, formula(x, layer))
    leaves = (x, layer.values)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values"]
    for g, w in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, formula(x, layer))), strict=True):
        close(g, w, rtol=1e-4)
    close(layer.delta_weight(), dense(layer)[1])


def test_scale_and_start():
    linear = nn.Linear(K, N)
    layer = QWHALinear(linear, lk.SpectralPlan.random(COUNT, (N, K)))
    assert layer.scale == 4000 / math.sqrt(N * K)
    assert layer.base is linear
    assert not linear.weight.requires_grad
    x = torch.randn(3, K)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("values", (torch.float32, torch.bfloat16))
def test_bf16(route, values):
    linear = nn.Linear(K, N).bfloat16()
    layer = QWHALinear(linear, lk.SpectralPlan.random(COUNT, (N, K)), ALPHA, dtype=values)
    nn.init.normal_(layer.values)
    assert layer.values.dtype == values
    x = torch.randn(6, K).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, formula(x, layer), rtol=0.03)


@pytest.mark.parametrize("fmt", (None, "nf4"))
def test_autocast(fmt):
    layer, x = make(fmt), torch.randn(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, formula(x, layer), rtol=0.05)


@pytest.mark.parametrize("with_gram", (True, False))
def test_starts_close_to_what_was_quantised(with_gram):
    """By as much as its report says."""
    linear = nn.Linear(K, N)
    X = torch.randn(300, K) * torch.rand(K).mul(2).exp()
    gram = X.T @ X if with_gram else torch.eye(K)
    layer = QWHALinear.from_linear(linear, 600, ALPHA, fmt="int4", group_size=32, gram=gram if with_gram else None)
    packed = lk.quantize(linear.weight.detach(), "int4", group_size=32)
    assert bitwise_equal(lk.dequantize(layer.base.weight), lk.dequantize(packed))
    assert layer.base.bias is linear.bias
    W, delta = dense(layer)
    lost = linear.weight.detach().double() - W
    left = lost - delta.detach()
    share = ((left @ gram.double() * left).sum() / (lost @ gram.double() * lost).sum()).sqrt().item()
    assert share == pytest.approx(layer.report.after, rel=1e-2)
    assert share < 0.6
    x = X[:10]
    close(layer(x), formula(x, layer))
    again = QWHALinear.from_residual(packed, lost.float(), 600, ALPHA, gram=gram if with_gram else None)
    assert torch.equal(again.rows, layer.rows)
    close(again.values, layer.values, rtol=1e-4)


@pytest.mark.parametrize("fmt", (None, "nf4"))
def test_saves_and_copies(fmt, tmp_path):
    layer, x = make(fmt, seed=1), torch.randn(5, K)
    y, state = layer(x), layer.state_dict()
    base = ["base.weight"] if fmt is None else ["base.codes", "base.scales", "base.table"]
    assert sorted(state) == sorted(["values", "rows", "cols", "base.bias", *base])
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    for assign in (False, True):
        other = make(fmt, seed=2)
        assert not torch.equal(other(x), y)
        plan, rows = other.plan, other.plan.rows.clone()
        other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"), assign=assign)
        assert bitwise_equal(other(x), y)
        assert torch.equal(plan.rows, rows)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert bitwise_equal(other(x), y)
        other.load_state_dict(make(fmt, seed=3).state_dict())
        assert not torch.equal(other(x), y)
        assert bitwise_equal(layer(x), y)


def test_the_given_plan_stays_what_it_was():
    plan = lk.SpectralPlan.random(COUNT, (N, K), 1)
    rows = plan.rows.clone()
    layer = QWHALinear(nn.Linear(K, N), plan)
    layer.load_state_dict(make(None, seed=2).state_dict())
    assert torch.equal(plan.rows, rows)
    assert not torch.equal(layer.plan.rows, rows)


@pytest.mark.parametrize("name, place", [("rows", N), ("cols", K), ("cols", -1)])
def test_a_state_with_places_outside_is_refused(name, place):
    layer, x = make(), torch.randn(3, K)
    before, state = {key: t.clone() for key, t in layer.state_dict().items()}, make(seed=1).state_dict()
    state[name] = state[name].clone()
    state[name][3] = place
    with pytest.raises(RuntimeError, match=rf"0.{name} has places outside of the weight \[40, 64\]"):
        nn.Sequential(layer).load_state_dict({f"0.{key}": t for key, t in state.items()})
    for key in ("values", "rows", "cols"):
        assert torch.equal(layer.state_dict()[key], before[key])
    assert layer(x).isfinite().all()


def test_a_state_with_another_number_of_values_is_refused():
    other = QWHALinear(nn.Linear(K, N), lk.SpectralPlan.random(COUNT + 1, (N, K)))
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        make(None).load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_moves(dtype):
    layer = make()
    plan, rows = layer.plan, layer.rows.clone()
    nn.Sequential(layer).to(dtype)
    assert layer.values.dtype == dtype
    assert layer.plan is not plan
    assert bitwise_equal(layer.rows, rows)
    assert layer.base.scales.dtype == torch.float32
    x = torch.randn(4, K).to(dtype)
    close(layer(x), formula(x, layer), rtol=0.03)
    assert layer.to("meta").plan.device.type == "meta"


def test_compiled():
    torch._dynamo.reset()
    layer, x = make(), torch.randn(6, K, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.values))))
    for g, w in zip(*results, strict=True):
        close(g, w, rtol=1e-4)


def test_training_lowers_the_loss_and_moves_values_alone():
    layer, x, target = make(), torch.randn(64, K), torch.randn(64, N)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    optimizer, losses = torch.optim.Adam([layer.values], lr=0.1), []
    for _ in range(10):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]) == (name != "values"), name


def test_merges_into_the_weight():
    layer, x = make(), torch.randn(5, K)
    W = lk.dequantize(layer.base.weight, torch.float32) + layer.delta_weight()
    close(torch.nn.functional.linear(x, W, layer.base.bias), layer(x))


def test_quantized_linear():
    weight, bias, x = lk.quantize(torch.randn(N, K), "nf4"), torch.randn(N), torch.randn(3, K, requires_grad=True)
    layer = QuantizedLinear(weight, bias=bias)
    assert not [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    assert bitwise_equal(y, lk.quantized_linear(x, weight, bias))
    close(torch.autograd.grad(y.sum(), x)[0], lk.dequantize(weight).sum(0).expand(3, K))
    other = QuantizedLinear(lk.quantize(torch.randn(N, K), "nf4"), bias=torch.zeros(N))
    other.load_state_dict(layer.state_dict())
    assert bitwise_equal(other(x), y)
    assert repr(layer) == "QuantizedLinear(in_features=64, out_features=40, fmt=nf4, group_size=64)"
    with pytest.raises(TypeError, match="weight must be a QuantizedWeight, got Tensor"):
        QuantizedLinear(torch.randn(N, K))


def test_repr():
    assert "in_features=64, out_features=40, n=90, kind=wht, scale=0.592927, layout=auto" in repr(make())


PLAN = lk.SpectralPlan(torch.arange(4), torch.arange(4), shape=(N, K))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: QWHALinear(LoRALinear(nn.Linear(K, N), 2), PLAN), TypeError, "base must be a torch.nn.Linear or a"),
        (lambda: QWHALinear(torch.randn(N, K), PLAN), TypeError, "QuantizedWeight, got Tensor"),
        (lambda: QWHALinear(nn.Linear(K, N), torch.arange(4)), TypeError, "plan must be a SpectralPlan, got Tensor"),
        (lambda: QWHALinear(nn.Linear(N, K), PLAN), ValueError, r"plan is of shape \(40, 64\), the base \(64, 40\)"),
        (lambda: QWHALinear(nn.Linear(K, N), PLAN, bias=torch.zeros(N)), ValueError, "bias is for a packed weight"),
        (
            lambda: QWHALinear(nn.Linear(6, 4), lk.SpectralPlan.random(3, (4, 6))),
            ValueError,
            "no Hadamard matrix of order 6",
        ),
        (
            lambda: QWHALinear.from_residual(nn.Linear(K, N), torch.ones(N, 32), 5),
            ValueError,
            r"residual must be \[40, 64\] as the base, got \[40, 32\]",
        ),
        (lambda: QWHALinear.from_linear(nn.Linear(K, N), N * K + 1), ValueError, "n must be from 1 to 2560"),
        (lambda: QWHALinear.from_linear(lk.nn.QuantizedLinear(lk.quantize(torch.ones(8, 64), "nf4")), 5), TypeError,
         "linear must be a torch.nn.Linear"),
    ],
)  # fmt: skip
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
