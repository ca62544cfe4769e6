"""`lora_linear` forward and backward against the float64 oracle, and the mask of its dropout."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from judging import judge
from layouts import strided

import lora_kernels as lk
from lora_kernels.ops import _lora_linear as ops
from lora_kernels.ops.lora_linear import row_norms_sq
from lora_kernels.reference.dropout import dropout_mask, keep_scale
from lora_kernels.testing import (
    LORA_LINEAR_DTYPES,
    LORA_LINEAR_LEAVES,
    assert_within_rule,
    bitwise_equal,
    lora_linear_expected,
    lora_linear_gradients,
    lora_linear_oracle,
    lora_linear_samples,
    lora_linear_upstream,
    rms,
    threads,
)


@functools.cache
def named(name, dtypes="fp32"):
    (sample,) = (s for s in lora_linear_samples(*LORA_LINEAR_DTYPES[dtypes]) if s.name == name)
    return sample


def results(sample, count=1):
    a = sample.make(0)
    with threads(count):
        return lora_linear_gradients(lk.lora_linear, a, lora_linear_upstream(a))


def check(sample, count=1):
    """The value and every gradient of a sample within the rule, made with ``count`` threads."""
    a = sample.make(0)
    for name, got in results(sample, count).items():
        oracle, plain, noise = lora_linear_expected(sample)[name]
        what = f"{name} of {sample.name}"
        assert got.dtype == (a["x"] if name == "y" else a[name[1:]]).dtype, what
        judge(got, oracle, plain, noise, what)


@pytest.mark.parametrize("name", LORA_LINEAR_DTYPES)
def test_reference(name):
    with lk.backend("reference"):
        for sample in lora_linear_samples(*LORA_LINEAR_DTYPES[name]):
            check(sample)


@pytest.mark.parametrize("name", LORA_LINEAR_DTYPES)
def test_every_instruction_set(name, isa):
    for sample in lora_linear_samples(*LORA_LINEAR_DTYPES[name]):
        check(sample)


@pytest.mark.parametrize("name", ("fp32", "bf16-masters"))
def test_two_threads(name, cpu_backend):
    for sample in lora_linear_samples(*LORA_LINEAR_DTYPES[name]):
        check(sample, count=2)


@pytest.mark.parametrize("name", LORA_LINEAR_DTYPES)
def test_without_gradients_y_is_the_same(name, backend):
    """What needs no gradient takes another way through; a row of LoRA keeps its bits, DoRA its value."""
    for sample in lora_linear_samples(*LORA_LINEAR_DTYPES[name]):
        a, want = sample.make(0), results(sample)["y"]
        with torch.no_grad():
            got = lk.lora_linear(**a)
        assert not got.requires_grad
        if a["magnitude"] is None:
            assert_within_rule(got, *lora_linear_expected(sample)["y"][:2], noise=lora_linear_expected(sample)["y"][2])
        else:
            assert bitwise_equal(got, want), sample.name


DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", (0, 2**62 + 11, -1, -(2**63)))
def test_the_mask_is_the_references(dtype, seed, isa):
    """lora_dropout keeps the bits of what it keeps: every length of a row, many rows, threads, any strides."""
    seed = torch.tensor([seed])
    for K in (*range(1, 40), 63, 64, 65, 127, 130, 511, 520, 1025):
        for M in (0, 1, 3, 70):
            x = torch.randn(M, K).to(dtype)
            for p in (0.05, 0.5, 1.0):
                want = torch.where(dropout_mask(seed, M, K, p), x, 0)
                assert bitwise_equal(ops.lora_dropout(x, seed, p), want), (M, K, p)
    wide = torch.randn(300, 400).to(dtype)
    for x in (
        wide,
        wide[:, 3:300],
        wide[:, ::2],
        wide.T,
        wide[::2],
        wide.view(10, 30, 400)[:, 1:],
        wide[:1].expand(9, 400),
    ):
        want = torch.where(dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], 0.4).view(x.shape), x, 0)
        for count in (1, 2):
            with threads(count):
                assert bitwise_equal(ops.lora_dropout(x, seed, 0.4), want.contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K"), ((1, 1), (5, 7), (33, 100), (130, 260), (257, 33)))
def test_every_op_makes_the_same_mask(M, K, dtype, isa):
    """Through an identity the forward, dA and dx show exactly what was kept."""
    seed, p = torch.tensor([-77]), 0.4
    mask = dropout_mask(seed, M, K, p)
    x, ones = torch.randn(M, K).to(dtype), torch.ones(M, 1)
    kept = torch.where(mask, x, 0).float()
    for count in (1, 2):
        with threads(count):
            y = torch.zeros(M, 4, dtype=dtype)
            v = ops.lora_forward_(y, x, torch.eye(K), torch.randn(4, K), None, None, None, None, seed, p, 0.5)
            assert torch.equal(v, kept)
            assert torch.equal(ops.lora_down(x, torch.eye(K), seed, p), kept)
            dx = torch.zeros(M, K, dtype=dtype)
            empty = torch.empty(0, dtype=dtype)
            dA = ops.lora_in_grads_(empty, torch.eye(M), x, torch.ones(M, K), seed, p, 1.0)
            assert torch.equal(dA, kept)
            ops.lora_in_grads_(dx, ones, None, torch.ones(1, K), seed, p, 1.0)
            assert torch.equal(dx, mask.to(dtype))


def test_a_mask_longer_than_a_part_of_k(isa):
    """More columns than the shrink takes at a time, more rows than one block."""
    M, K, seed, p = 150, 3001, torch.tensor([5]), 0.3
    x, A, B = torch.randn(M, K), torch.randn(3, K), torch.randn(8, 3)
    want = torch.where(dropout_mask(seed, M, K, p), x, 0).double() @ A.double().T
    for count in (1, 2):
        with threads(count):
            v = ops.lora_forward_(torch.zeros(M, 8), x, A, B, None, None, None, None, seed, p, 1.0)
        torch.testing.assert_close(v.double(), want, rtol=1e-4, atol=1e-4)
        assert bitwise_equal(ops.lora_down(x, A, seed, p), v)


@pytest.mark.parametrize("p", (0.05, 0.5, 0.9))
def test_the_expectation_is_that_of_no_dropout(p, backend):
    """Over many rows the mean of the adapter's part is what it is without dropout."""
    K, M = 64, 20_000
    row, A, B = torch.rand(K) + 0.5, torch.rand(1, K), torch.ones(1, 1)
    y = lk.lora_linear(row.expand(M, K), torch.zeros(1, K), A, B, dropout=p, training=True, seed=3)
    want = float(row @ A[0])
    spread = float((row * A[0]).square().sum().sqrt()) * (p / (1 - p)) ** 0.5
    assert abs(float(y.mean()) - want) < 5 * spread / M**0.5
    assert 0.8 * spread < float(y.std()) < 1.2 * spread


NAMED = ("m17", "m65", "every-scale", "core", "dora-bias", "m129-dora-dropout", "dora-zero", "x-transposed")


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtypes", ("fp32", "bf16", "bf16-masters"))
def test_any_subset_may_be_frozen(name, dtypes, backend):
    """What does not require grad gets none, and the others' gradients keep their bits."""
    sample = named(name, dtypes)
    full = results(sample)
    leaves = [n for n in LORA_LINEAR_LEAVES if sample.make(0)[n] is not None]
    for size in (1, 2):
        for wanted in itertools.combinations(leaves, size):
            a = sample.make(0)
            for n in wanted:
                a[n].requires_grad_()
            lk.lora_linear(**a).backward(lora_linear_upstream(a))
            for n in leaves:
                if n in wanted:
                    assert bitwise_equal(a[n].grad, full[f"d{n}"]), f"{n} of {wanted}"
                else:
                    assert a[n].grad is None
            assert a["weight"].grad is None


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtypes", ("fp32", "bf16-masters"))
def test_twice_the_same_bits_and_inputs_untouched(name, dtypes, backend):
    sample = named(name, dtypes)
    for count in (1, 2):
        with threads(count):
            a = sample.make(0)
            tensors = {n: t for n, t in a.items() if isinstance(t, torch.Tensor)}
            before = {n: t.clone() for n, t in tensors.items()}
            versions = {n: t._version for n, t in tensors.items()}
            leaves = [t.requires_grad_() for n, t in tensors.items() if n != "weight"]
            y, dy = lk.lora_linear(**a), lora_linear_upstream(a)
            first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            second = torch.autograd.grad(y, leaves, dy)
            again = lora_linear_gradients(lk.lora_linear, sample.make(0), dy)
        assert bitwise_equal(again["y"], y)
        for n, p, q in zip((n for n in tensors if n != "weight"), first, second, strict=True):
            assert bitwise_equal(p, q), n
            assert bitwise_equal(p, again[f"d{n}"]), n
        for n, t in tensors.items():
            assert bitwise_equal(t, before[n])
            assert t._version == versions[n]


def test_gradients_of_strided_and_expanded_dy(backend):
    """dy comes in any layout: of a sum it is one number expanded."""
    for name in ("m17", "m65", "dora-bias", "m129-dora-dropout", "3d"):
        sample = named(name)
        dy = lora_linear_upstream(sample.make(0))
        want = lora_linear_gradients(lk.lora_linear, sample.make(0), dy)
        strided = torch.empty(*dy.shape[:-1], 2 * dy.shape[-1])[..., ::2].copy_(dy)
        swapped = dy.transpose(0, 1).contiguous().transpose(0, 1)
        for other in (strided, swapped):
            for n, t in lora_linear_gradients(lk.lora_linear, sample.make(0), other).items():
                torch.testing.assert_close(t, want[n], rtol=1e-5, atol=1e-5)
        whole = lora_linear_gradients(lk.lora_linear, sample.make(0), torch.ones_like(dy))
        for n, t in lora_linear_gradients(lk.lora_linear, sample.make(0), torch.ones(()).expand(dy.shape)).items():
            torch.testing.assert_close(t, whole[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dropout", (0.0, 0.5))
@pytest.mark.parametrize("magnitude", (False, True))
def test_not_a_number_stays_in_its_row(dtype, dropout, magnitude, backend):
    M, K, N, R = 70, 40, 33, 4
    x, W, A, B = (torch.randn(s).to(dtype) for s in ((M, K), (N, K), (R, K), (N, R)))
    m = torch.rand(N).to(dtype) + 1 if magnitude else None
    options = {"dropout": dropout, "training": True, "seed": 3, "magnitude": m}
    clean, clean_x = x, lk.lora_linear(x, W, A, B, **options)
    x = clean.clone()
    x[5, 7], x[64, 0] = float("nan"), float("inf")
    x.requires_grad_()
    y = lk.lora_linear(x, W, A, B, **options)
    others = [i for i in range(M) if i not in (5, 64)]
    assert y[5].isnan().all()
    assert not y[64].isfinite().any()
    assert bitwise_equal(y[others], clean_x[others])
    dy = torch.randn(M, N).to(dtype)
    dy[9] = float("nan")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[9].isnan().all()
    assert dx[[i for i in range(M) if i != 9]].isfinite().all()


@pytest.mark.parametrize("rows", ((), (0,), (1,), (0, 3), (2, 0)))
def test_shapes(rows, backend):
    x, W, A, B = torch.randn(*rows, 12), torch.randn(7, 12), torch.randn(3, 12), torch.randn(7, 3)
    for options in ({}, {"dropout": 0.5, "training": True}, {"magnitude": torch.ones(7)}):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        y = lk.lora_linear(leaves[0], W, *leaves[1:], **options)
        assert y.shape == (*rows, 7)
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape
            assert x.numel() or not grad.any()


@pytest.mark.parametrize("sizes", ((4, 0, 5, 2), (4, 6, 0, 2), (4, 6, 5, 0), (0, 0, 0, 0)))
@pytest.mark.parametrize("magnitude", (False, True))
def test_sizes_of_zero(sizes, magnitude, backend):
    M, K, N, R = sizes
    x, W, A, B, m = (torch.randn(s) for s in ((M, K), (N, K), (R, K), (N, R), (N,)))
    for dropout in (0.0, 0.5):
        leaves = [t.clone().requires_grad_() for t in (x, A, B)]
        extra = {"magnitude": m} if magnitude else {}
        y = lk.lora_linear(leaves[0], W, *leaves[1:], dropout=dropout, training=True, **extra)
        if not magnitude:
            torch.testing.assert_close(y.detach(), F.linear(x, W))
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape


@pytest.mark.parametrize("magnitude", (False, True))
@pytest.mark.parametrize("ratio", (0.02, 0.2, 0.8))
def test_error_at_every_strength_of_the_adapter(ratio, magnitude, backend):
    """fp32 masters over bf16, the adapter's part so much of the base's: at most 1.001 times PEFT's error."""
    M, K, N, R = 256, 256, 256, 16
    x, W = torch.randn(M, K).bfloat16(), (torch.randn(N, K) / K**0.5).bfloat16()
    A, B = torch.randn(R, K) / K**0.5, ratio * torch.randn(N, R) / R**0.5
    m = (1 + ratio**2) ** 0.5 * (1 + 0.1 * torch.randn(N)) if magnitude else None
    oracle = lora_linear_oracle(**arguments(x, W, A, B, magnitude=m))
    y = lk.lora_linear(x, W, A, B, magnitude=m)
    base, delta = F.linear(x, W), F.linear(F.linear(x.float(), A), B)
    assert 0.9 * ratio < rms(delta) / rms(base) < 1.1 * ratio
    plain = base + delta
    if magnitude:
        c = m / (W.float() + B @ A).norm(dim=1)
        plain = base + (c - 1) * base + c * delta
    assert rms(y - oracle) <= 1.001 * rms(plain.bfloat16() - oracle)


def arguments(x, W, A, B, **changes):
    names = ("bias", "core", "in_scale", "delta_in_scale", "delta_scale", "out_scale", "magnitude")
    rest = {"scaling": 1.0, "dropout": 0.0, "training": False, "seed": 0, **dict.fromkeys(names)}
    return {"x": x, "weight": W, "A": A, "B": B, **rest, **changes}


@pytest.mark.parametrize("ratio", (1.0, 0.1, 0.01, 1e-3))
@pytest.mark.parametrize("transposed", (False, True))
def test_norms_where_the_adapter_nearly_cancels_the_weight(ratio, transposed, backend):
    """‖W + s B A‖ with W ≈ -s B A in half of the rows: relative to the norm, no worse than ‖·‖ of the sum in fp32."""
    K, N, R, s = 300, 40, 8, 0.7
    A, B, rest = torch.randn(R, K), torch.randn(N, R), torch.randn(N, K)
    W = ratio * rest - s * B @ A
    W[: N // 2] = rest[: N // 2]
    W = W.T.contiguous().T if transposed else W
    exact = (W.double() + s * B.double() @ A.double()).norm(dim=1)
    plain = (W + s * B @ A).norm(dim=1)
    got = ops.lora_weight_norm(W, A, B, row_norms_sq(W), s)
    assert got.dtype == torch.float32
    error, yardstick = ((t.double() - exact).abs() / exact for t in (got, plain))
    assert error.max() < 1e-5 + 2 * yardstick.max()
    assert error[: N // 2].max() < 1e-6


@pytest.mark.parametrize("name", LORA_LINEAR_DTYPES)
@pytest.mark.parametrize("N, K, R", ((1, 1, 1), (5, 40, 0), (300, 17, 3), (33, 2100, 40), (700, 600, 16), (0, 8, 2)))
def test_norms(name, N, K, R, backend):
    """Of weights and factors in every layout."""
    dtype, of_factors = LORA_LINEAR_DTYPES[name].x, LORA_LINEAR_DTYPES[name].factors
    W, A, B = torch.randn(N, K).to(dtype), torch.randn(R, K).to(of_factors), torch.randn(N, R).to(of_factors)
    A, B = A / K**0.5, B / max(R, 1) ** 0.5
    want = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    for turn in (lambda t: t, lambda t: t.T.contiguous().T, strided):
        got = ops.lora_weight_norm(turn(W), turn(A), turn(B), row_norms_sq(W), 0.7)
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
    rounded = ops.lora_weight_norm(W, A, B, row_norms_sq(W).to(dtype), 0.7)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), want, rtol=1e-2, atol=0)
    if N > 1:
        W[1, 0] = float("nan")
        got = ops.lora_weight_norm(W, A, B, row_norms_sq(W), 0.7)
        assert got.isnan().nonzero().tolist() == [[1]]


def test_given_norms_are_used(backend):
    sample = named("dora")
    a = sample.make(0)
    want = lk.lora_linear(**a)
    assert bitwise_equal(lk.lora_linear(**a, weight_norm_sq=row_norms_sq(a["weight"])), want)
    assert not torch.equal(lk.lora_linear(**a, weight_norm_sq=4 * row_norms_sq(a["weight"])), want)


@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_the_magnitude_at_the_norms_is_lora(dropout, backend):
    """With m = ‖W + s B A‖ DoRA is LoRA."""
    sample = named("dora-dropout" if dropout else "dora")
    a = sample.make(0)
    a["magnitude"] = ops.lora_weight_norm(a["weight"], a["A"], a["B"], row_norms_sq(a["weight"]), a["scaling"])
    torch.testing.assert_close(lk.lora_linear(**a), lk.lora_linear(**{**a, "magnitude": None}))


def test_peft(backend):
    """LoRA and DoRA, with dropout off: PEFT's own layers, value and gradients."""
    peft = pytest.importorskip("peft")
    for use_dora in (False, True):
        net = torch.nn.Sequential(torch.nn.Linear(24, 40))
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=use_dora, init_lora_weights=False)
        layer = peft.get_peft_model(net, config).base_model.model[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        m = layer.lora_magnitude_vector["default"].weight if use_dora else None
        leaves = [A, B, *([] if m is None else [m])]
        x = torch.randn(5, 24, requires_grad=True)
        base = layer.base_layer
        got = lk.lora_linear(x, base.weight, A, B, scaling=1.5, bias=base.bias, magnitude=m)
        want, dy = layer(x), torch.randn(5, 40)
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(got, [x, *leaves], dy), torch.autograd.grad(want, [x, *leaves], dy), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    """In float64, which only the reference takes: LoRA with a bias and dropout."""
    torch.manual_seed(1)
    x, W, A, B, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, 12), (9, 12), (3, 12), (9, 3), (9,)))
    leaves = [t.requires_grad_() for t in (x, A, B, bias)]
    with lk.backend("reference"):
        for p in (0.0, 0.4, 1.0):

            def call(x, A, B, bias, p=p):
                return lk.lora_linear(x, W, A, B, bias=bias, scaling=0.7, dropout=p, training=True, seed=2)

            assert torch.autograd.gradcheck(call, leaves)


def test_evaluation_and_a_p_of_nothing_drop_nothing(backend):
    x, W, A, B = torch.randn(6, 32), torch.randn(24, 32), torch.randn(4, 32), torch.randn(24, 4)
    want = lk.lora_linear(x, W, A, B)
    for dropout, training in ((0.5, False), (1.0, False), (0.0, True), (2**-18, True)):
        assert bitwise_equal(lk.lora_linear(x, W, A, B, dropout=dropout, training=training, seed=1), want)
    dropped = lk.lora_linear(x, W, A, B, dropout=0.5, training=True, seed=1)
    mask = dropout_mask(torch.tensor([1]), 6, 32, 0.5)
    torch.testing.assert_close(dropped, F.linear(x, W) + (x * mask * keep_scale(0.5)) @ A.T @ B.T)
    everything = lk.lora_linear(x, W, A, B, dropout=1.0, training=True, seed=1)
    assert bitwise_equal(everything, F.linear(x, W))
