"""Bad input of `lora_linear`: the right exception, naming the argument, before anything is written."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import bitwise_equal

M, K, N, R = 6, 32, 24, 4
BF16, FP16, INT = torch.bfloat16, torch.float16, torch.int64


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def good():
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (M, K), "weight": (N, K), "A": (R, K), "B": (N, R)}
    return {name: torch.randn(size, generator=g) for name, size in sizes.items()}


def vectors(name, size):
    """What a vector of N or K may not be."""
    return {
        f"{name}: a number": (TypeError, f"{name} must be a tensor, got float", {name: 1.0}),
        f"{name}: a list": (TypeError, f"{name} must be a tensor, got list", {name: [1.0] * size}),
        f"{name}: too short": (ValueError, rf"{name} must be \[{size}\], got \[{size - 1}\]", {name: zeros(size - 1)}),
        f"{name}: a matrix": (ValueError, rf"{name} must be \[{size}\], got \[1, {size}\]", {name: zeros(1, size)}),
        f"{name}: a scalar": (ValueError, rf"{name} must be \[{size}\], got \[\]", {name: torch.tensor(1.0)}),
        f"{name}: integers": (TypeError, f"{name} must be.*int64", {name: zeros(size, dtype=INT)}),
        f"{name}: half": (TypeError, f"{name} must be torch.float32 as x.*float16", {name: zeros(size, dtype=FP16)}),
        f"{name}: double": (TypeError, f"{name} must be.*float64", {name: zeros(size, dtype=torch.float64)}),
        f"{name}: on meta": (ValueError, f"{name} is on meta, x on cpu", {name: meta(size)}),
    }  # fmt: skip


def with_magnitude(cases):
    """weight_norm_sq belongs to a magnitude."""
    return {name: (error, message, {"magnitude": torch.ones(N), **c}) for name, (error, message, c) in cases.items()}


HALVES = {"x": zeros(M, K, dtype=BF16), "weight": zeros(N, K, dtype=BF16)}
CASES = {
    "x: not a tensor": (TypeError, "x must be a tensor, got list", {"x": [[1.0] * K] * M}),
    "x: none": (TypeError, "x must be a tensor, got NoneType", {"x": None}),
    "x: integers": (TypeError, "x must be float32, bfloat16 or float16, got.*int64", {"x": zeros(M, K, dtype=INT)}),
    "x: complex": (TypeError, "x must be", {"x": zeros(M, K, dtype=torch.complex64)}),
    "x: a scalar": (ValueError, r"x must be \[..., K\]|weight must be", {"x": torch.tensor(1.0)}),
    "x: wrong K": (ValueError, r"weight must be \[N, 33\] for x \[6, 33\], got \[24, 32\]", {"x": zeros(M, K + 1)}),
    "x: on meta": (ValueError, "(weight|x) is on", {"x": meta(M, K)}),
    "x: half under an fp32 weight": (TypeError, "weight must be torch.bfloat16 as x", {"x": zeros(M, K, dtype=BF16)}),
    "weight: not a tensor": (TypeError, "weight must be a tensor, got list", {"weight": [1.0]}),
    "weight: a vector": (ValueError, r"weight must be \[N, 32\].*got \[32\]", {"weight": zeros(K)}),
    "weight: stacked": (ValueError, r"weight must be \[N, 32\]", {"weight": zeros(1, N, K)}),
    "weight: the other way round": (ValueError, r"weight must be \[N, 32\].*got \[32, 24\]", {"weight": zeros(K, N)}),
    "weight: half": (TypeError, "weight must be torch.float32 as x", {"weight": zeros(N, K, dtype=FP16)}),
    "weight: on meta": (ValueError, "weight is on meta", {"weight": meta(N, K)}),
    "A: not a tensor": (TypeError, "A must be a tensor, got NoneType", {"A": None}),
    "A: a list": (TypeError, "A must be a tensor, got list", {"A": [zeros(R, K)]}),
    "A: a vector": (ValueError, r"A must be \[R, K\]", {"A": zeros(K)}),
    "A: stacked": (ValueError, r"A must be \[R, K\]", {"A": zeros(1, R, K)}),
    "A: wrong K": (ValueError, r"A must be \[4, 32\].*got \[4, 31\]", {"A": zeros(R, K - 1)}),
    "A: half": (TypeError, "A and B must both be torch.float32", {"A": zeros(R, K, dtype=FP16)}),
    "A: integers": (TypeError, "A and B must both be", {"A": zeros(R, K, dtype=INT)}),
    "A: on meta": (ValueError, "A is on meta", {"A": meta(R, K)}),
    "A and B: rank 513": (ValueError, "rank must be at most 512, got 513", {"A": zeros(513, K), "B": zeros(N, 513)}),
    "A and B: fp16 under bf16": (
        TypeError, "A and B must both be torch.bfloat16",
        {**HALVES, "A": zeros(R, K, dtype=FP16), "B": zeros(N, R, dtype=FP16)},
    ),
    "A and B: of two dtypes": (TypeError, "A and B must both be", {**HALVES, "A": zeros(R, K, dtype=BF16)}),
    "B: not a tensor": (TypeError, "B must be a tensor, got str", {"B": "B"}),
    "B: wrong N": (ValueError, r"B must be \[24, 4\].*got \[25, 4\]", {"B": zeros(N + 1, R)}),
    "B: wrong R": (ValueError, r"B must be \[24, 4\].*got \[24, 5\]", {"B": zeros(N, R + 1)}),
    "B: the other way round": (ValueError, r"B must be \[24, 4\].*got \[4, 24\]", {"B": zeros(R, N)}),
    "B: on meta": (ValueError, "B is on meta", {"B": meta(N, R)}),
    "scaling: a string": (TypeError, "scaling must be", {"scaling": "1"}),
    "scaling: a tensor": (TypeError, "scaling must be a float", {"scaling": torch.ones(1)}),
    "scaling: a list": (TypeError, "scaling must be", {"scaling": [1.0]}),
    "dropout: below zero": (ValueError, "dropout must be a probability from 0 to 1, got -0.1", {"dropout": -0.1}),
    "dropout: above one": (ValueError, "dropout must be a probability from 0 to 1, got 1.5", {"dropout": 1.5}),
    "dropout: NaN": (ValueError, "dropout must be a probability", {"dropout": float("nan")}),
    "dropout: a string": ((TypeError, ValueError), "dropout must be a probability.*'0.5'", {"dropout": "0.5"}),
    "dropout: none": ((TypeError, ValueError), "dropout must be a probability", {"dropout": None}),
    "dropout: a tensor": ((TypeError, ValueError), "dropout must be a probability", {"dropout": torch.tensor(0.5)}),
    "seed: a float": (TypeError, "seed must be an int.*got 1.5", {"seed": 1.5, "dropout": 0.5}),
    "seed: a string": (TypeError, "seed must be", {"seed": "1", "dropout": 0.5}),
    "seed: past 64 bits": ((TypeError, ValueError), "seed must be an int of 64 bits", {"seed": 2**63, "dropout": 0.5}),
    "seed: below": ((TypeError, ValueError), "seed must be an int of 64 bits", {"seed": -(2**63) - 1, "dropout": 0.5}),
    "seed: int32": (
        (TypeError, ValueError), "seed must be an int64 tensor", {"seed": zeros(1, dtype=torch.int32), "dropout": 0.5}
    ),
    "seed: floats": ((TypeError, ValueError), "seed must be an int64 tensor", {"seed": zeros(1), "dropout": 0.5}),
    "seed: two": (ValueError, "seed must be.*one element", {"seed": zeros(2, dtype=INT), "dropout": 0.5}),
    "seed: none in it": (ValueError, "seed must be.*one element", {"seed": zeros(0, dtype=INT), "dropout": 0.5}),
    "seed: on meta": (ValueError, "seed must be.*on cpu", {"seed": meta(1, dtype=INT), "dropout": 0.5}),
    "core: a number": (TypeError, "core must be a tensor, got float", {"core": 1.0}),
    "core: wrong R": (ValueError, r"core must be \[4\] or \[4, 4\], got \[5\]", {"core": zeros(R + 1)}),
    "core: not square": (ValueError, r"core must be \[4\] or \[4, 4\], got \[4, 5\]", {"core": zeros(R, R + 1)}),
    "core: a scalar": (ValueError, r"core must be \[4\] or \[4, 4\], got \[\]", {"core": torch.tensor(1.0)}),
    "core: half": (TypeError, "core must be torch.float32 as x", {"core": zeros(R, dtype=FP16)}),
    "core: on meta": (ValueError, "core is on meta", {"core": meta(R)}),
    "magnitude and in_scale": (
        ValueError, "magnitude excludes in_scale and out_scale", {"magnitude": zeros(N), "in_scale": zeros(K)}
    ),
    "magnitude and out_scale": (
        ValueError, "magnitude excludes in_scale and out_scale", {"magnitude": zeros(N), "out_scale": zeros(N)}
    ),
    "norms without a magnitude": (
        ValueError, "weight_norm_sq belongs to a magnitude", {"weight_norm_sq": zeros(N)}
    ),
    **vectors("bias", N),
    **vectors("in_scale", K),
    **vectors("delta_in_scale", K),
    **vectors("delta_scale", N),
    **vectors("out_scale", N),
    **vectors("magnitude", N),
    **with_magnitude(vectors("weight_norm_sq", N)),
}  # fmt: skip


def refused(error, message, changes):
    """The call raises, in training and not, and every tensor keeps its bits."""
    for training in (True, False):
        for grad in (True, False):
            a = {**good(), "dropout": 0.0, "training": training, **changes}
            tensors = {n: t for n, t in a.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
            before = {n: t.clone() for n, t in tensors.items()}
            state = torch.get_rng_state()
            if grad and isinstance(a["A"], torch.Tensor) and a["A"].is_floating_point():
                a["A"] = a["A"].detach().requires_grad_()
            with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
                lk.lora_linear(**a)
            assert all(bitwise_equal(t, before[n]) for n, t in tensors.items())
            assert torch.equal(torch.get_rng_state(), state), "a seed was drawn before the call was refused"


@pytest.mark.parametrize("case", CASES)
def test_refused(case, route):
    refused(*CASES[case])


def test_the_good_call_is_good(route):
    """What the cases change is all that is wrong with them."""
    size = {"bias": N, "delta_in_scale": K, "delta_scale": N, "magnitude": N, "weight_norm_sq": N}
    rest = {name: torch.ones(n) for name, n in size.items()}
    others = {"seed": 1, "dropout": 0.5, "scaling": 2, "core": torch.ones(R, R)}
    for training in (True, False):
        assert lk.lora_linear(**good(), **rest, **others, training=training).isfinite().all()
        scales = {"in_scale": torch.ones(K), "out_scale": torch.ones(N)}
        assert lk.lora_linear(**good(), **scales, **others, training=training).isfinite().all()


def test_a_weight_that_is_trained(route):
    a = good()
    a["weight"].requires_grad_()
    with pytest.raises(ValueError, match="weight requires grad"):
        lk.lora_linear(**a)
    with pytest.raises(ValueError, match="weight requires grad"):
        lk.lora_linear(**a, dropout=0.5, training=True)
    with torch.no_grad():
        assert lk.lora_linear(**a, dropout=0.5, training=True).isfinite().all()


def test_a_rank_of_512(route):
    a = {**good(), "A": torch.ones(512, K), "B": torch.ones(N, 512)}
    for options in ({}, {"dropout": 0.5, "training": True}, {"magnitude": torch.ones(N)}):
        assert lk.lora_linear(**a, **options).isfinite().all()


def test_of_the_compiled_kernels(cpu_backend):
    """The ops refuse, before they write, what does not fit: nothing is read or written outside a tensor."""
    ops = torch.ops.lora_kernels
    x, y, A, B, v = torch.ones(M, K), torch.ones(M, N), torch.ones(R, K), torch.ones(N, R), torch.ones(M, R)
    none, seed, c = (None,) * 4, torch.tensor([1]), torch.ones(N)
    for args in (
        (y, x, A[:, 1:], B, *none, None, 0.0, 1.0), (y, x, A, B[1:], *none, None, 0.0, 1.0),
        (y, x, A, B[:, 1:], *none, None, 0.0, 1.0), (y[1:], x, A, B, *none, None, 0.0, 1.0),
        (y, x, A.half(), B.half(), *none, None, 0.0, 1.0), (y.half(), x, A, B, *none, None, 0.0, 1.0),
        (y, x, A, B, c[1:], None, None, None, None, 0.0, 1.0), (y, x, A, B, None, y[1:], None, None, None, 0.0, 1.0),
        (y, x, A, B, None, y.half(), None, None, None, 0.0, 1.0), (y, x, A, B, None, y, c[1:], None, None, 0.0, 1.0),
        (y, x, A, B, None, None, None, c[1:], None, 0.0, 1.0), (y, x, A, B, *none, seed.int(), 0.5, 1.0),
        (y, x, A, B, *none, seed.repeat(2), 0.5, 1.0), (y, x, A, B, *none, seed, 1.5, 1.0),
        (y, x, A, B, *none, seed, -0.5, 1.0), (y, x.double(), A, B, *none, seed, 0.5, 1.0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.lora_forward_(*args)
    for args in (
        (x, A[:, 1:], None, 0.0), (x, A.half(), None, 0.0), (x, A, seed.int(), 0.5), (x, A, seed, 1.5),
        (x.double(), A, seed, 0.5),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.lora_down(*args)
    for args in (
        (y, v[1:], B, *none[:3], 1.0, True, True), (y, v[:, 1:], B, *none[:3], 1.0, True, True),
        (y, v, B[1:], *none[:3], 1.0, True, True), (y, v, B, y[1:], None, None, 1.0, True, True),
        (y, v, B, y, c[1:], None, 1.0, True, True), (y, v, B, y, None, c[1:], 1.0, True, True),
        (y, v.half(), B, *none[:3], 1.0, True, True), (y, v, B, y.half(), None, None, 1.0, True, True),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.lora_out_grads(*args)
    for args in (
        (x[1:], v, x, A, None, 0.0, 1.0), (x[:, 1:], v, x, A, None, 0.0, 1.0), (x, v[1:], x, A, None, 0.0, 1.0),
        (x, v[:, 1:], x, A, None, 0.0, 1.0), (x, v, x[1:], A, None, 0.0, 1.0), (x, v, x[:, 1:], A, None, 0.0, 1.0),
        (x, v.half(), x, A, None, 0.0, 1.0), (x, v, x, A, seed.int(), 0.5, 1.0), (x, v, x, A, seed, 2.0, 1.0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.lora_in_grads_(*args)
    for args in ((x, seed.int(), 0.5), (x, seed[:0], 0.5), (x, seed, 1.5), (x.double(), seed, 0.5)):
        with pytest.raises(RuntimeError):
            ops.lora_dropout(*args)
    W = torch.ones(N, K)
    for args in (
        (W[1:], A, B, c, 1.0), (W[:, 1:], A, B, c, 1.0), (W, A[1:], B, c, 1.0), (W, A[:, 1:], B, c, 1.0),
        (W, A, B[1:], c, 1.0), (W, A, B[:, 1:], c, 1.0), (W, A, B, c[1:], 1.0), (W.double(), A, B, c, 1.0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.lora_weight_norm(*args)
    for t in (x, y, A, B, v, c, W):
        assert (t == 1).all()
