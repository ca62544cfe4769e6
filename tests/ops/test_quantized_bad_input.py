"""Bad input of `quantized`: the right exception, naming the argument, on every route; NaN; nothing at all."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops._quantized import dequantize_
from lora_kernels.testing import bitwise_equal, dequantize_oracle, quantized_weight

M, K, N, R, L = 6, 32, 24, 4, 3
BF16, FP16, INT = torch.bfloat16, torch.float16, torch.int64
NAN, INF = float("nan"), float("inf")
IDS = torch.tensor([0, 2, -1, 1, 1, 0])


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def good(function):
    g = torch.Generator().manual_seed(0)
    a = {"x": torch.randn(M, K, generator=g), "weight": quantized_weight(N, K, "nf4", 8, generator=g)}
    A, B = torch.randn(L, R, K, generator=g), torch.randn(L, N, R, generator=g)
    if function == "quantized_lora_linear":
        return {**a, "A": A[0], "B": B[0]}
    return {**a, "A": A, "B": B, "adapter_ids": IDS.clone()} if function == "quantized_multi_lora_linear" else a


LORA, MULTI = ("quantized_lora_linear",), ("quantized_multi_lora_linear",)
ALL = ("quantized_linear", *LORA, *MULTI)
HALVES = {"A": zeros(R, K, dtype=FP16), "B": zeros(N, R, dtype=FP16)}

# (functions, exception, message, changed arguments)
CASES = {
    "x: not a tensor": (ALL, TypeError, "x must be a tensor, got list", {"x": [[1.0] * K] * M}),
    "x: none": (ALL, TypeError, "x must be a tensor, got NoneType", {"x": None}),
    "x: integers": (ALL, TypeError, "x must be float32, bfloat16 or float16.*int64", {"x": zeros(M, K, dtype=INT)}),
    "x: complex": (ALL, TypeError, "x must be float32", {"x": zeros(M, K, dtype=torch.complex64)}),
    "x: a scalar": (ALL, ValueError, r"x must be \[..., 32\].*got \[\]", {"x": torch.tensor(1.0)}),
    "x: wrong K": (
        ALL, ValueError, r"x must be \[..., 32\] for a weight of shape \(24, 32\), got \[6, 33\]",
        {"x": zeros(M, K + 1)},
    ),
    "x: K - 1": (ALL, ValueError, r"x must be \[..., 32\].*got \[6, 31\]", {"x": zeros(M, K - 1)}),
    "x: one column": (ALL, ValueError, r"x must be \[..., 32\].*got \[6, 1\]", {"x": zeros(M, 1)}),
    "x: on meta": (ALL, ValueError, "weight is on cpu, x on meta", {"x": meta(M, K)}),
    "x: other rows": (MULTI, ValueError, "adapter_ids has 6 entries, x has 5 rows", {"x": zeros(M - 1, K)}),
    "weight: a tensor": (ALL, TypeError, "weight must be a QuantizedWeight, got Tensor", {"weight": zeros(N, K)}),
    "weight: none": (ALL, TypeError, "weight must be a QuantizedWeight, got NoneType", {"weight": None}),
    "weight: on meta": (
        ALL, ValueError, "weight is on meta, x on cpu", {"weight": quantized_weight(N, K).to("meta")}
    ),
    "bias: a number": (ALL, TypeError, "bias must be a tensor, got float", {"bias": 1.0}),
    "bias: too short": (ALL, ValueError, r"bias must be \[24\], got \[23\]", {"bias": zeros(N - 1)}),
    "bias: one": (ALL, ValueError, r"bias must be \[24\], got \[1\]", {"bias": zeros(1)}),
    "bias: a matrix": (ALL, ValueError, r"bias must be \[24\], got \[1, 24\]", {"bias": zeros(1, N)}),
    "bias: half": (ALL, TypeError, "bias must be torch.float32 as x.*float16", {"bias": zeros(N, dtype=FP16)}),
    "bias: integers": (ALL, TypeError, "bias must be.*int64", {"bias": zeros(N, dtype=INT)}),
    "bias: on meta": (ALL, ValueError, "bias is on meta, x on cpu", {"bias": meta(N)}),
    "A: none": (LORA, TypeError, "A must be a tensor, got NoneType", {"A": None}),
    "A: a list": (LORA, TypeError, "A must be a tensor, got list", {"A": [zeros(R, K)]}),
    "A: stacked": (LORA, ValueError, r"A must be \[R, K\]", {"A": zeros(1, R, K)}),
    "A and B: stacked": (LORA, ValueError, r"A must be \[R, K\]", {"A": zeros(1, R, K), "B": zeros(1, N, R)}),
    "A: wrong K": (LORA, ValueError, r"A must be \[4, 32\].*got \[4, 31\]", {"A": zeros(R, K - 1)}),
    "A: half": (LORA, TypeError, "A and B must both be", {"A": zeros(R, K, dtype=FP16)}),
    "A and B: half under fp32": (LORA, TypeError, "A and B must both be torch.float32 as x", HALVES),
    "A and B: fp16 under bf16": (
        LORA, TypeError, "A and B must both be torch.bfloat16 as x or float32", {**HALVES, "x": zeros(M, K, dtype=BF16)}
    ),
    "A: integers": (LORA, TypeError, "A and B must both be", {"A": zeros(R, K, dtype=INT)}),
    "A: on meta": (LORA, ValueError, "A is on meta", {"A": meta(R, K)}),
    "B: wrong N": (LORA, ValueError, r"B must be \[24, 4\].*got \[25, 4\]", {"B": zeros(N + 1, R)}),
    "B: wrong R": (LORA, ValueError, r"B must be \[24, 4\].*got \[24, 5\]", {"B": zeros(N, R + 1)}),
    "B: a vector": (LORA, ValueError, r"B \[N, R\]", {"B": zeros(N)}),
    "B: on meta": (LORA, ValueError, "B is on meta", {"B": meta(N, R)}),
    "the rank": (LORA, ValueError, "at most 512, got 513", {"A": zeros(513, K), "B": zeros(N, 513)}),
    "scaling: a tensor": (LORA, TypeError, "scaling must be a float", {"scaling": torch.ones(1)}),
    "scaling: a string": ((*LORA, *MULTI), TypeError, "scaling must be", {"scaling": "2"}),
    "scaling: none of a list": ((*LORA, *MULTI), TypeError, "scaling must be", {"scaling": [1.0]}),
    "dropout: above 1": (LORA, ValueError, "dropout must be a probability.*got 1.5", {"dropout": 1.5}),
    "dropout: below 0": (LORA, ValueError, "dropout must be a probability.*got -0.1", {"dropout": -0.1}),
    "dropout: nan": (LORA, ValueError, "dropout must be a probability.*nan", {"dropout": NAN}),
    "dropout: none": (LORA, ValueError, "dropout must be a probability.*None", {"dropout": None}),
    "dropout: a tensor": (LORA, ValueError, "dropout must be a probability", {"dropout": torch.tensor(0.5)}),
    "seed: a float": (LORA, TypeError, "seed must be an int of 64 bits or a tensor, got 1.0", {"seed": 1.0}),
    "seed: too large": (LORA, TypeError, "seed must be an int of 64 bits", {"seed": 2**63}),
    "seed: int32": (LORA, ValueError, "seed must be an int64 tensor of one element", {"seed": int32(1)}),
    "seed: two": (LORA, ValueError, "seed must be an int64 tensor of one element", {"seed": torch.tensor([1, 2])}),
    "seed: on meta": (LORA, ValueError, "seed must be an int64 tensor.*on cpu", {"seed": meta(1, dtype=INT)}),
    "factors A: none": (MULTI, TypeError, "A must be a tensor or a tuple", {"A": None}),
    "factors A: an empty list": (MULTI, ValueError, "A must be", {"A": []}),
    "factors A: numbers": (MULTI, TypeError, r"A\[0\] must be a tensor, got float", {"A": [1.0, 2.0]}),
    "factors A: a vector": (MULTI, ValueError, r"A must be.*got \[32\]", {"A": zeros(K)}),
    "factors A: wrong K": (MULTI, ValueError, r"A must be \[3, 4, 32\].*got \[3, 4, 31\]", {"A": zeros(L, R, K - 1)}),
    "factors A: half": (MULTI, TypeError, "(A|B) must be", {"A": zeros(L, R, K, dtype=FP16)}),
    "factors A: on meta": (MULTI, ValueError, "A is on meta", {"A": meta(L, R, K)}),
    "factors A: rank of 513": (
        MULTI, ValueError, "A has rank 513", {"A": zeros(L, 513, K), "B": zeros(L, N, 513)}
    ),
    "factors B: wrong N": (
        MULTI, ValueError, "B must have 24 out features as the weight, got 25", {"B": zeros(L, N + 1, R)}
    ),
    "factors B: half of N": (
        MULTI, ValueError, "B must have 24 out features as the weight, got 12", {"B": zeros(L, N // 2, R)}
    ),
    "factors B: wrong R": (MULTI, ValueError, r"B must be \[3, N, 4\].*got \[3, 24, 5\]", {"B": zeros(L, N, R + 1)}),
    "factors B: wrong L": (MULTI, ValueError, r"B must be \[3, N, 4\].*got \[2, 24, 4\]", {"B": zeros(L - 1, N, R)}),
    "factors B: another dtype": (MULTI, TypeError, "B must be", {"B": zeros(L, N, R, dtype=BF16)}),
    "factors B: another form": (MULTI, ValueError, "B", {"B": [zeros(N, R)] * L}),
    "factors B: more slices": (MULTI, ValueError, "A must be", {"B": (zeros(L, N // 2, R),) * 2}),
    "ids: a list": (MULTI, TypeError, "adapter_ids must be a tensor or a BatchPlan", {"adapter_ids": [0] * M}),
    "ids: none": (MULTI, TypeError, "adapter_ids must be a tensor.*got NoneType", {"adapter_ids": None}),
    "ids: floats": (MULTI, TypeError, "adapter_ids must be int32 or int64", {"adapter_ids": zeros(M)}),
    "ids: too few": (MULTI, ValueError, "adapter_ids has 5 entries", {"adapter_ids": IDS[:5]}),
    "ids: too many": (MULTI, ValueError, "adapter_ids has 12 entries", {"adapter_ids": IDS.repeat(2)}),
    "ids: L": (MULTI, IndexError, r"adapter_ids\[3\] is 3", {"adapter_ids": torch.tensor([0, 2, -1, 3, 9, 0])}),
    "ids: -2": (MULTI, IndexError, r"adapter_ids\[4\] is -2", {"adapter_ids": int32(0, 2, -1, 1, -2, 7)}),
    "ids: huge": (MULTI, IndexError, r"adapter_ids\[0\]", {"adapter_ids": IDS + 2**32}),
    "ids: on meta": (MULTI, ValueError, "adapter_ids", {"adapter_ids": meta(M, dtype=INT)}),
    "ids: a mixture without weights": (MULTI, ValueError, "weights", {"adapter_ids": IDS[:, None].repeat(1, 2)}),
    "plan: of more rows": (
        MULTI, ValueError, "plan is of 12 rows, x has 6", {"adapter_ids": lk.BatchPlan.from_ids(IDS.repeat(2), L)}
    ),
    "plan: of more adapters": (MULTI, ValueError, "plan is of 5 adap", {"adapter_ids": lk.BatchPlan.from_ids(IDS, 5)}),
    "ranks: int64": (MULTI, TypeError, "ranks must be int32", {"ranks": torch.tensor([4, 4, 4])}),
    "ranks: too few": (MULTI, ValueError, "ranks must be", {"ranks": int32(4, 4)}),
    "ranks: past R": (MULTI, ValueError, "ranks must lie in 0..4, got 5", {"ranks": int32(4, 5, 1)}),
    "ranks: negative": (MULTI, ValueError, "ranks must lie in 0..4, got -1", {"ranks": int32(4, 2, -1)}),
    "scaling: half": (MULTI, TypeError, "scaling must be float32", {"scaling": torch.ones(L, dtype=BF16)}),
    "scaling: too few": (MULTI, ValueError, "scaling must be", {"scaling": torch.ones(L - 1)}),
    "weights: no mixture": (MULTI, ValueError, "weights must be", {"weights": torch.ones(M, 2)}),
    "weights: too few": (
        MULTI, ValueError, "weights must be", {"adapter_ids": IDS[:, None].repeat(1, 2), "weights": torch.ones(M, 3)}
    ),
    "weights: half": (
        MULTI, TypeError, "weights must be float32",
        {"adapter_ids": IDS[:, None].repeat(1, 2), "weights": torch.ones(M, 2, dtype=BF16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case, route):
    """With and without gradients, in training and not; every tensor keeps its bits and no seed is drawn."""
    functions, error, message, changes = CASES[case]
    for function in functions:
        for grad in (True, False):
            a = {**good(function), **changes}
            if function in LORA:
                a = {"dropout": 0.5, "training": grad, **a}
            tensors = [t for t in a.values() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
            before, state = [t.clone() for t in tensors], torch.get_rng_state()
            if grad and isinstance(a.get("B"), torch.Tensor) and a["B"].is_floating_point():
                a["B"] = a["B"].detach().requires_grad_()
            with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
                getattr(lk, function)(**a)
            assert all(bitwise_equal(t, b) for t, b in zip(tensors, before, strict=True))
            assert torch.equal(torch.get_rng_state(), state), "a seed was drawn before the call was refused"


@pytest.mark.parametrize("function", ALL)
def test_the_good_call_is_good(function, route):
    """What the cases change is all that is wrong with them."""
    a = {**good(function), "bias": torch.ones(N)}
    if function in LORA:
        a |= {"seed": 1, "dropout": 0.5, "training": True, "scaling": 2}
    if function in MULTI:
        a |= {"ranks": int32(4, 0, 2), "scaling": torch.ones(1, L)}
    assert getattr(lk, function)(**a).isfinite().all()


def test_dequantize_refuses(route):
    weight = quantized_weight(N, K)
    for args, message in (
        ((zeros(N, K),), "weight must be a QuantizedWeight, got Tensor"), ((None,), "got NoneType"),
        ((weight, INT), "dtype must be float32, bfloat16 or float16, got torch.int64"),
        ((weight, torch.float64), "got torch.float64"), ((weight, "bfloat16"), "dtype must be"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            lk.dequantize(*args)


@pytest.mark.parametrize("function", ALL)
def test_what_requires_grad(function, route):
    """The result requires grad where a differentiable argument does, and only in grad mode."""
    for name in (None, *[n for n in ("x", "A", "B", "bias") if n in {**good(function), "bias": None}]):
        a = {**good(function), "bias": torch.ones(N)}
        if name is not None:
            a[name].requires_grad_()
        assert getattr(lk, function)(**a).requires_grad == (name is not None)
        with torch.no_grad():
            assert not getattr(lk, function)(**a).requires_grad


KINDS = (("nf4", 64), ("int4", 32), ("int8", 0), ("fp4", 8))
DTYPES = (torch.float32, torch.bfloat16)


def layer(fmt, group, dtype, rows, N=40, K=70):
    generator = torch.Generator().manual_seed(1)
    weight = quantized_weight(N, K, fmt, group, offsets=fmt == "int4", generator=generator)
    weight.scales.abs_().clamp_(min=0.01)
    x, A, B = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, K), (R, K), (N, R)))
    return x, weight, A, B


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (3, 7, 20, 70))
def test_not_a_number_stays_in_its_row(rows, dtype, kind, route):
    """In x, forward; in dy, backward."""
    x, weight, A, B = layer(*kind, dtype, rows)
    ids = torch.arange(rows) % 2 - 1
    calls = (
        lambda x: lk.quantized_linear(x, weight),
        lambda x: lk.quantized_lora_linear(x, weight, A, B),
        lambda x: lk.quantized_multi_lora_linear(x, weight, A[None], B[None], ids),
    )
    for call in calls:
        spoilt = x.clone()
        spoilt[1, 5], spoilt[2, 69] = NAN, INF
        others = [i for i in range(rows) if i not in (1, 2)]
        y = call(spoilt)
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert bitwise_equal(y[others], call(x)[others])
        leaf, dy = x.clone().requires_grad_(), torch.randn(rows, 40).to(dtype)
        dy[2, 3] = NAN
        (dx,) = torch.autograd.grad(call(leaf), leaf, dy)
        assert dx[2].isnan().all()
        assert dx[[i for i in range(rows) if i != 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", (1, 3, 7, 20, 70))
def test_a_scale_that_is_no_number_stays_in_its_column(rows, dtype, kind, route):
    x, weight, _, _ = layer(*kind, dtype, rows)
    for name in ("scales", "offsets"):
        if (values := getattr(weight, name)) is None:
            continue
        want = lk.quantized_linear(x, weight)
        for value in (NAN, INF):
            kept = values.clone()
            values[5, -1] = values[39, 0] = value
            y = lk.quantized_linear(x, weight)
            assert not y[:, [5, 39]].isfinite().any()
            others = [n for n in range(40) if n not in (5, 39)]
            assert bitwise_equal(y[:, others], want[:, others])
            W = lk.dequantize(weight, dtype)
            assert torch.equal(W.isfinite(), dequantize_oracle(weight, dtype).isfinite())
            values.copy_(kept)


@pytest.mark.parametrize("rows", (1, 3, 7, 20))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_that_is_no_number_stays_in_its_column(rows, dtype, route):
    x, weight, A, B = layer("nf4", 64, dtype, rows)
    want = lk.quantized_lora_linear(x, weight, A, B)
    B = B.clone()
    B[5, 1] = NAN
    y = lk.quantized_lora_linear(x, weight, A, B)
    assert y[:, 5].isnan().all()
    others = [n for n in range(40) if n != 5]
    assert bitwise_equal(y[:, others], want[:, others])


@pytest.mark.parametrize("value", (INF, -INF, NAN))
@pytest.mark.parametrize("rows", (1, 7, 70))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_is_no_number(rows, dtype, value, route):
    """Nor is its column of y, which is what the bias is: an infinite one of either dtype is not lost in a NaN."""
    x, weight, _, _ = layer("nf4", 64, dtype, rows)
    for wide in (torch.float32, dtype):
        bias = zeros(40, dtype=wide)
        bias[7] = value
        y = lk.quantized_linear(x, weight, bias)
        torch.testing.assert_close(y[:, 7], torch.full((rows,), value, dtype=dtype), equal_nan=True)
        assert y[:, [n for n in range(40) if n != 7]].isfinite().all()


@pytest.mark.parametrize("shape", ((), (0,), (1,), (0, 3), (2, 0), (2, 3, 1)))
@pytest.mark.parametrize("order", (False, True))
def test_shapes(shape, order, route):
    """Any leading axes, also none and of no rows; gradients have their shapes."""
    weight = quantized_weight(7, 12, "int4", 5, order=order)
    x, A, B = torch.randn(*shape, 12), torch.randn(3, 12), torch.randn(7, 3)
    ids = torch.zeros(x.numel() // 12, dtype=INT)
    for call in (
        lambda x, A, B: lk.quantized_linear(x, weight),
        lambda x, A, B: lk.quantized_lora_linear(x, weight, A, B),
        lambda x, A, B: lk.quantized_lora_linear(x, weight, A, B, dropout=0.5, training=True),
        lambda x, A, B: lk.quantized_multi_lora_linear(x, weight, A[None], B[None], ids),
    ):
        assert call(x, A, B).shape == (*shape, 7)
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        y = call(*leaves)
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves, materialize_grads=True), strict=True):
            assert grad.shape == leaf.shape
            assert x.numel() or not grad.any()


@pytest.mark.parametrize(
    "sizes", ((4, 0, 5, 2), (4, 6, 0, 2), (4, 6, 5, 0), (0, 0, 0, 0), (20, 0, 5, 2), (20, 6, 0, 2))
)
@pytest.mark.parametrize("fmt", ("nf4", "int8"))
def test_sizes_of_zero(sizes, fmt, route):
    """A sum over nothing is 0."""
    m, k, n, r = sizes
    weight = quantized_weight(n, k, fmt, 4)
    x, A, B, bias = (torch.randn(size) for size in ((m, k), (r, k), (n, r), (n,)))
    W = dequantize_oracle(weight, torch.float32)
    assert bitwise_equal(lk.dequantize(weight, torch.float32), W)
    torch.testing.assert_close(lk.quantized_linear(x, weight, bias), x @ W.T + bias)
    leaves = [t.clone().requires_grad_() for t in (x, A, B)]
    y = lk.quantized_lora_linear(leaves[0], weight, *leaves[1:])
    torch.testing.assert_close(y.detach(), x @ W.T + x @ A.T @ B.T)
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
    with torch.no_grad():
        torch.testing.assert_close(lk.quantized_lora_linear(x, weight, A, B), x @ W.T + x @ A.T @ B.T)


def test_no_adapters_at_all(route):
    weight, x = quantized_weight(N, K, "nf4", 8), torch.randn(4, K)
    A, B, ids = zeros(0, R, K), zeros(0, N, R), torch.full((4,), -1)
    want = lk.quantized_linear(x, weight)
    assert bitwise_equal(lk.quantized_multi_lora_linear(x, weight, A, B, ids), want)
    assert bitwise_equal(lk.quantized_multi_lora_linear(x.requires_grad_(), weight, A, B, ids).detach(), want)
    with pytest.raises(IndexError, match=r"adapter_ids\[0\] is 0"):
        lk.quantized_multi_lora_linear(x.detach(), weight, A, B, ids + 1)


def test_a_rank_of_512(route):
    a = {**good("quantized_lora_linear"), "A": torch.ones(512, K), "B": torch.ones(N, 512)}
    for options in ({}, {"dropout": 0.5, "training": True}):
        assert lk.quantized_lora_linear(**a, **options).isfinite().all()


def refused(op, *args):
    with pytest.raises(RuntimeError):
        op(*args)


@pytest.mark.parametrize("rows", (0, 3, 40))
@pytest.mark.parametrize("fmt", ("int4", "int8"))
def test_of_the_compiled_kernels(fmt, rows, cpu_backend):
    """The ops refuse, before they write, what does not fit: nothing is read or written outside a tensor."""
    linear, grad = torch.ops.lora_kernels.quantized_linear, torch.ops.lora_kernels.quantized_linear_grad
    weight = quantized_weight(N, K, fmt, 8, offsets=True)
    codes, scales, offsets, table, g = good_one = weight.packed
    packed = [
        (codes[1:], scales, offsets, table, g), (codes[:, 1:], scales, offsets, table, g),
        (codes[0], scales, offsets, table, g), (codes.short(), scales, offsets, table, g),
        (codes, scales[1:], offsets, table, g), (codes, scales[:, 1:], offsets, table, g),
        (codes, scales.half(), offsets, table, g), (codes, scales.double(), offsets, table, g),
        (codes, scales[0], offsets, table, g), (codes, scales, offsets[1:], table, g),
        (codes, scales, offsets[:, 1:], table, g), (codes, scales, offsets.half(), table, g),
        (codes, scales, offsets, torch.ones(16) if table is None else None, g),
        (codes, scales, offsets, table, 0), (codes, scales, offsets, table, -8),
        (codes, scales, offsets, table, 7),
    ]  # fmt: skip
    if table is not None:
        packed += [(codes, scales, offsets, t, g) for t in (table[1:], table.half(), table.repeat(2))]
    x, dy, out = torch.ones(rows, K), torch.ones(rows, N), torch.full((N, K), 7.0)
    nothing = None, None, [], *[None] * 6, 1.0
    v, A, B, bias = torch.ones(1, rows, R), torch.ones(R, K), torch.ones(N, R), torch.ones(N)
    linear(x, *good_one, bias, v, [B], *[None] * 6, 1.0)
    grad(dy, *good_one, K, v[0], A, 1.0)
    for bad in packed:
        refused(linear, x, *bad, *nothing)
        refused(grad, dy, *bad, K, None, None, 1.0)
    refused(linear, x, codes, scales, offsets, table, 16, *nothing)
    for a, b in ((x, bias[1:]), (x[:, 2:], bias), (x.double(), bias), (x.long(), bias)):
        refused(linear, a, *good_one, b, *nothing[1:])
    others = (
        ((v.half(), B), (v, B.long()), (v, B[:, 1:])) if rows == 3 else ()
    )  # torch's products of many rows take them
    for w, b in (
        (v[:, :, 1:], B), (v.repeat(2, 1, 1), B), (v[0], B), (v, B[1:]), (torch.ones(1, rows + 1, R), B),
        *others,
    ):  # fmt: skip
        refused(linear, x, *good_one, None, w, [b], *[None] * 6, 1.0)
    for d, k, w, a in (
        (dy, K + 9, None, None), (dy.double(), K, None, None), (dy, K, torch.ones(rows + 1, R), A),
        (dy, K, v[0, :, 1:], A), (dy, K, v[0], A[:, 1:]), (dy, K, v[0], A[1:]), (dy, -1, None, None),
    ):  # fmt: skip
        refused(grad, d, *good_one, k, w, a, 1.0)
    for o, row, column in (
        (out, 1, 0), (out, 0, 1), (out, -1, 0), (out, 0, -1), (out[0], 0, 0), (out.long(), 0, 0), (out[:1], N, 0),
        (out[:, :1], 0, K + 1), (out.double(), 0, 0), (out[:1].expand(N, K), 0, 0),
    ):  # fmt: skip
        refused(dequantize_, o, *good_one, row, column)
    for bad in packed[2:4] + packed[6:10] + packed[11:15]:
        refused(dequantize_, out, *bad, 0, 0)
    assert (out == 7).all()
