import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import LoRALinear, QuantizedLoRALinear
from lora_kernels.reference.dropout import dropout_mask, keep_scale
from lora_kernels.testing import bitwise_equal

K, N = 64, 40
FORMATS = (
    {"fmt": "nf4"},
    {"fmt": "nf4", "group_size": 32, "nested": True},
    {"fmt": "fp4"},
    {"fmt": "int4", "group_size": 32},
    {"fmt": "int4", "group_size": 32, "symmetric": False},
    {"fmt": "int8"},
)


def make(rank=4, alpha=3.0, bias=True, fmt="nf4", dtype=torch.float32, **options):
    """A layer whose B is not zero."""
    layer = QuantizedLoRALinear.from_linear(nn.Linear(K, N, bias=bias).to(dtype), rank, alpha, fmt=fmt, **options)
    nn.init.normal_(layer.B, std=0.1)
    return layer


def formula(x, layer, mask=1.0):
    """In float64, of the numbers that the packed weight holds."""
    x, W = x.double(), lk.dequantize(layer.weight, torch.float32).double()
    y = x @ W.T + layer.scaling * ((x * mask) @ layer.A.double().T) @ layer.B.double().T
    return y if layer.bias is None else y + layer.bias.double()


def close(actual, expected, rtol=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


def act_order():
    """A GPTQ weight whose columns are in another order."""
    tensors = lk.quantize(torch.randn(N, K), "int4", group_size=32, symmetric=False).state_dict()
    return lk.QuantizedWeight.from_gptq(**{**tensors, "g_idx": tensors["g_idx"][torch.randperm(K)]})


@pytest.mark.parametrize("options", FORMATS)
def test_starts_as_its_base_with_pefts_initialisation(options):
    linear = nn.Linear(K, N)
    layer = QuantizedLoRALinear.from_linear(linear, 4, 8, **options)
    want = lk.quantize(linear.weight, **options)
    assert bitwise_equal(lk.dequantize(layer.weight), lk.dequantize(want))
    x = torch.randn(3, K)
    assert torch.equal(layer(x), lk.quantized_linear(x, want, linear.bias))
    assert layer.scaling == 2.0
    assert not layer.B.any()
    assert 0.5 / math.sqrt(K) < layer.A.abs().max() <= 1 / math.sqrt(K)  # of kaiming_uniform_(a=√5)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((K,), (6, K), (2, 3, K), (0, K)))
def test_formula(route, bias, shape):
    layer = make(5, bias=bias)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    close(y, formula(x, layer))


@pytest.mark.parametrize("options", FORMATS)
def test_only_the_factors_are_trained(route, options):
    layer = make(**options)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
    x = torch.randn(6, K, requires_grad=True)
    leaves = (x, layer.A, layer.B)
    got, want = (torch.autograd.grad(y.square().sum(), leaves) for y in (layer(x), formula(x, layer)))
    for g, w in zip(got, want, strict=True):
        close(g, w, rtol=1e-4)


def test_over_a_packed_weight_with_an_order(route):
    weight, bias = act_order(), torch.randn(N)
    layer = QuantizedLoRALinear(weight, 4, bias=bias)
    nn.init.normal_(layer.B)
    assert layer.codes is weight.codes
    assert layer.bias.data_ptr() == bias.data_ptr()
    assert not layer.bias.requires_grad
    x = torch.randn(6, K)
    close(layer(x), formula(x, layer))
    close(lk.dequantize(layer.weight), lk.dequantize(weight), rtol=0)


def test_the_bias_is_shared_and_frozen():
    linear = nn.Linear(K, N)
    layer = QuantizedLoRALinear.from_linear(linear, 4)
    assert layer.bias is linear.bias
    assert not linear.bias.requires_grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bf16(route, dtype):
    linear = nn.Linear(K, N).bfloat16()
    layer = QuantizedLoRALinear.from_linear(linear, 4, dtype=dtype)
    nn.init.normal_(layer.B, std=0.1)
    assert layer.A.dtype == layer.B.dtype == dtype
    x = torch.randn(6, K).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, formula(x, layer), rtol=0.02)


def test_rank_stabilised_scaling():
    weight = lk.quantize(torch.randn(N, K), "nf4")
    assert QuantizedLoRALinear(weight, 16, 8.0, rslora=True).scaling == 2.0
    assert QuantizedLoRALinear.from_linear(nn.Linear(K, N), 16, rslora=True).scaling == 4.0
    assert QuantizedLoRALinear(weight, 16).scaling == 1.0


def test_dropout(route):
    """In training mode, by a seed from torch's generator; gradients too."""
    layer = make(dropout=0.4)
    x = torch.randn(6, K, requires_grad=True)
    close(layer.eval()(x), formula(x, layer))
    torch.manual_seed(2)
    y = layer.train()(x)
    torch.manual_seed(2)
    mask = dropout_mask(torch.randint(2**63 - 1, (1,)), 6, K, 0.4) * keep_scale(0.4)
    want = formula(x, layer, mask)
    close(y, want)
    assert not torch.equal(layer(x), y)
    leaves = (x, layer.A, layer.B)
    for g, w in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, want)), strict=True):
        close(g, w, rtol=1e-4)


@pytest.mark.parametrize("options", FORMATS)
def test_copies_and_saves(options, tmp_path):
    layer, x = make(**options), torch.randn(6, K)
    y, state = layer(x), layer.state_dict()
    offsets = ["offsets"] if options["fmt"] == "int4" else []
    table = [] if options["fmt"] == "int8" else ["table"]
    assert sorted(state) == sorted(["codes", "scales", *offsets, *table, "bias", "A", "B"])
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    for assign in (False, True):
        other = make(**options)
        assert not torch.equal(other(x), y)
        other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"), assign=assign)
        assert bitwise_equal(other(x), y)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert bitwise_equal(other(x), y)
        other.codes.zero_()
        assert not torch.equal(other(x), y)
        assert bitwise_equal(layer(x), y)


@pytest.mark.parametrize(
    "one, other, match",
    [
        ({"fmt": "nf4"}, {"fmt": "fp4"}, "table is not that of fp4"),
        ({"fmt": "nf4"}, {"fmt": "nf4", "group_size": 32}, "size mismatch for 0.scales"),
        ({"fmt": "nf4"}, {"fmt": "int8"}, "Unexpected key.*table"),
        ({"fmt": "int4", "group_size": 64}, {"fmt": "nf4"}, "table is not that of nf4"),
    ],
)
def test_another_formats_state_is_refused(one, other, match):
    """And the layer is what it was."""
    layer, x = make(**other), torch.randn(3, K)
    y = layer(x)
    with pytest.raises(RuntimeError, match=match):
        nn.Sequential(layer).load_state_dict(nn.Sequential(make(**one)).state_dict())
    if match.startswith("table"):  # torch itself has loaded what does fit
        assert bitwise_equal(layer(x), y)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_in_another_dtype_the_weight_stays_what_it_is(dtype):
    layer = make(fmt="int4", group_size=32, symmetric=False)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    nn.Sequential(layer).to(dtype)
    assert layer.A.dtype == layer.bias.dtype == dtype
    for name, t in layer.named_buffers():
        assert bitwise_equal(t, before[name]), name
    x = torch.randn(6, K).to(dtype)
    close(layer(x), formula(x, layer), rtol=0.02)
    for name, t in layer.double().named_buffers():
        assert bitwise_equal(t, before[name]), name


def test_moves_to_another_device():
    layer = make().to("meta")
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer.weight.device.type == "meta"
    layer.to_empty(device="cpu")
    other = make()
    layer.load_state_dict({**other.state_dict(), "table": other.table}, assign=True)
    x = torch.randn(6, K)
    assert bitwise_equal(layer(x), other(x))


def test_one_step_of_training():
    """The loss falls, and only the adapter moves."""
    torch.manual_seed(1)
    layer = make(dropout=0.1)
    before = {name: t.clone() for name, t in layer.named_buffers()}
    x, target = torch.randn(64, K), torch.randn(64, N)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, t in layer.named_buffers():
        assert bitwise_equal(t, before[name])


@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_compiled(dropout):
    torch._dynamo.reset()
    layer, x = make(dropout=dropout), torch.randn(6, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, layer):
        torch.manual_seed(3)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (layer.A, layer.B))))
    for g, w in zip(*results, strict=True):
        close(g, w, rtol=1e-4)


def test_merges():
    """What the layer holds can be merged, and the result put into a layer again."""
    layer, x = make(alpha=400.0), torch.randn(6, K)
    merged, report = lk.merge_requant(layer.weight, layer.A, layer.B, layer.scaling)
    assert report.cosine > 0.95
    assert bitwise_equal(QuantizedLoRALinear(merged, 4, bias=layer.bias)(x), lk.quantized_linear(x, merged, layer.bias))


def test_repr():
    text = "QuantizedLoRALinear(in_features=64, out_features=40, rank=4, scaling=2, fmt=nf4, group_size=64)"
    assert repr(QuantizedLoRALinear.from_linear(nn.Linear(K, N), 4, 8)) == text
    assert "scaling=1, dropout=0.5, fmt=int8" in repr(
        QuantizedLoRALinear.from_linear(nn.Linear(K, N), 4, fmt="int8", dropout=0.5)
    )


@pytest.mark.parametrize(
    "given, options, error, match",
    [
        (nn.Linear(K, N), {}, TypeError, "weight must be a QuantizedWeight, got Linear"),
        (None, {"rank": 0}, ValueError, "rank must be an int >= 1, got 0"),
        (None, {"dropout": 1.5}, ValueError, "dropout must be a probability"),
        (None, {"bias": torch.zeros(K)}, ValueError, rf"bias must be \[{N}\], got \[{K}\]"),
    ],
)
def test_bad_input(given, options, error, match):
    weight = lk.quantize(torch.randn(N, K), "nf4") if given is None else given
    with pytest.raises(error, match=match):
        QuantizedLoRALinear(weight, **{"rank": 4, **options})


def test_only_a_plain_linear_is_quantised():
    with pytest.raises(TypeError, match=r"linear must be a torch.nn.Linear, got LoRALinear"):
        QuantizedLoRALinear.from_linear(LoRALinear(nn.Linear(K, N), 4), 4)
