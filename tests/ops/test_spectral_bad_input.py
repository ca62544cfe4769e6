"""Bad input of `spectral`: the right exception, naming the argument, on every route; nothing is written."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import SPECTRAL_KINDS, bitwise_equal

M, K, N, COUNT = 6, 20, 24, 30
BF16, FP16, INT = torch.bfloat16, torch.float16, torch.int64
PLAN = lk.SpectralPlan.random(COUNT, (N, K))


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def good(function):
    g = torch.Generator().manual_seed(0)
    a = {"values": torch.randn(COUNT, generator=g), "plan": PLAN}
    if function == "spectral_delta_weight":
        return {**a, "kind": "dct"}
    a |= {"x": torch.randn(M, K, generator=g)}
    if function == "spectral_location_grad":
        return {**a, "dy": torch.randn(M, N, generator=g)}
    return {**a, "kind": "dct", "y": torch.randn(M, N, generator=g)}


LINEAR, WEIGHT, PLACES = ("spectral_linear",), ("spectral_delta_weight",), ("spectral_location_grad",)
OF_X, ALL = (*LINEAR, *PLACES), (*LINEAR, *PLACES, *WEIGHT)

# (functions, exception, message, changed arguments)
CASES = {
    "x: not a tensor": (OF_X, TypeError, "x must be a tensor, got list", {"x": [[1.0] * K] * M}),
    "x: none": (OF_X, TypeError, "x must be a tensor, got NoneType", {"x": None}),
    "x: integers": (OF_X, TypeError, "x must be float32, bfloat16 or float16.*int64", {"x": zeros(M, K, dtype=INT)}),
    "x: complex": (OF_X, TypeError, "x must be float32", {"x": zeros(M, K, dtype=torch.complex64)}),
    "x: a scalar": (OF_X, ValueError, r"x must be \[..., 20\].*got \[\]", {"x": torch.tensor(1.0)}),
    "x: K + 1": (OF_X, ValueError, r"x must be \[..., 20\].*got \[6, 21\]", {"x": zeros(M, K + 1)}),
    "x: N": (OF_X, ValueError, r"x must be \[..., 20\].*got \[6, 24\]", {"x": zeros(M, N)}),
    "x: one column": (OF_X, ValueError, r"x must be \[..., 20\].*got \[6, 1\]", {"x": zeros(M, 1)}),
    "x: on meta": (OF_X, ValueError, "values is on cpu, x on meta", {"x": meta(M, K)}),
    "x: other rows": (LINEAR, ValueError, r"y must be \[5, 24\], got \[6, 24\]", {"x": zeros(M - 1, K)}),
    "x: other rows of dy": (PLACES, ValueError, r"dy must be \[5, 24\], got \[6, 24\]", {"x": zeros(M - 1, K)}),
    "x: bf16 under fp16 values": (
        OF_X, TypeError, "values must be torch.bfloat16 or float32, got torch.float16",
        {"x": zeros(M, K, dtype=BF16), "values": zeros(COUNT, dtype=FP16)},
    ),
    "values: not a tensor": (ALL, TypeError, "values must be a tensor, got list", {"values": [1.0] * COUNT}),
    "values: none": (ALL, TypeError, "values must be a tensor, got NoneType", {"values": None}),
    "values: integers": (ALL, TypeError, "values must be float32.*int64", {"values": zeros(COUNT, dtype=INT)}),
    "values: half under fp32": (OF_X, TypeError, "values must be torch.float32", {"values": zeros(COUNT, dtype=BF16)}),
    "values: too few": (ALL, ValueError, r"values must be \[30\].*got \[29\]", {"values": zeros(COUNT - 1)}),
    "values: too many": (ALL, ValueError, r"values must be \[30\].*got \[31\]", {"values": zeros(COUNT + 1)}),
    "values: a matrix": (ALL, ValueError, r"values must be \[30\].*got \[1, 30\]", {"values": zeros(1, COUNT)}),
    "values: a scalar": (ALL, ValueError, r"values must be \[30\].*got \[\]", {"values": torch.tensor(1.0)}),
    "values: on meta": (ALL, ValueError, "the plan is on cpu, values on meta", {"values": meta(COUNT)}),
    "plan: none": (ALL, TypeError, "plan must be a SpectralPlan, got NoneType", {"plan": None}),
    "plan: places": (ALL, TypeError, "plan must be a SpectralPlan, got tuple", {"plan": (PLAN.rows, PLAN.cols)}),
    "plan: of a batch": (
        ALL, TypeError, "plan must be a SpectralPlan, got BatchPlan", {"plan": lk.BatchPlan.from_ids(PLAN.rows[:3], N)}
    ),
    "plan: on meta": (ALL, ValueError, "the plan is on meta, values on cpu", {"plan": PLAN.to("meta")}),
    "plan: of the transposed": (
        OF_X, ValueError, r"x must be \[..., 24\], the plan's columns, got \[6, 20\]",
        {"plan": lk.SpectralPlan.random(COUNT, (K, N))},
    ),
    "kind: unknown": ((*LINEAR, *WEIGHT), ValueError, "kind must be one of fourier, .*'dft'", {"kind": "dft"}),
    "kind: none": ((*LINEAR, *WEIGHT), ValueError, "kind must be one of .*None", {"kind": None}),
    "kind: a list": ((*LINEAR, *WEIGHT), ValueError, r"kind must be one of .*\['dct'\]", {"kind": ["dct"]}),
    "kind: without neighbours": (PLACES, ValueError, "kind must be 'dct', got 'fourier'", {"kind": "fourier"}),
    "kind: no Hadamard matrix": (
        (*LINEAR, *WEIGHT), ValueError, "no Hadamard matrix of order 21 is constructed here",
        {"kind": "wht", "plan": lk.SpectralPlan.random(COUNT, (N, 21)), "x": zeros(M, 21)},
    ),
    "kind: no matrix of QuaRot's": (
        (*LINEAR, *WEIGHT), ValueError, "QuaRot has no Hadamard matrix of order 44",
        {"kind": "wht", "x": zeros(M, 44),
         "plan": lk.SpectralPlan(PLAN.rows, PLAN.cols, shape=(N, 44), layout="quarot")},
    ),
    "scale: a string": (ALL, TypeError, "scale must be a float, got str", {"scale": "2"}),
    "scale: none": (ALL, TypeError, "scale must be a float, got NoneType", {"scale": None}),
    "scale: a tensor": (ALL, TypeError, "scale must be a float, got Tensor", {"scale": torch.ones(())}),
    "y: not a tensor": (LINEAR, TypeError, "y must be a tensor, got float", {"y": 0.0}),
    "y: integers": (LINEAR, TypeError, "y must be float32.*int64", {"y": zeros(M, N, dtype=INT)}),
    "y: half under fp32": (LINEAR, TypeError, "y must be torch.float32.*bfloat16", {"y": zeros(M, N, dtype=BF16)}),
    "y: too narrow": (LINEAR, ValueError, r"y must be \[6, 24\], got \[6, 23\]", {"y": zeros(M, N - 1)}),
    "y: one row": (LINEAR, ValueError, r"y must be \[6, 24\], got \[1, 24\]", {"y": zeros(1, N)}),
    "y: a vector": (LINEAR, ValueError, r"y must be \[6, 24\], got \[24\]", {"y": zeros(N)}),
    "y: more axes": (LINEAR, ValueError, r"y must be \[6, 24\], got \[1, 6, 24\]", {"y": zeros(1, M, N)}),
    "y: on meta": (LINEAR, ValueError, "y is on meta, x on cpu", {"y": meta(M, N)}),
    "dy: none": (PLACES, TypeError, "dy must be a tensor, got NoneType", {"dy": None}),
    "dy: integers": (PLACES, TypeError, "dy must be float32.*int64", {"dy": zeros(M, N, dtype=INT)}),
    "dy: another half": (PLACES, TypeError, "dy must be torch.float32.*float16", {"dy": zeros(M, N, dtype=FP16)}),
    "dy: too narrow": (PLACES, ValueError, r"dy must be \[6, 24\], got \[6, 20\]", {"dy": zeros(M, K)}),
    "dy: on meta": (PLACES, ValueError, "dy is on meta, x on cpu", {"dy": meta(M, N)}),
    "dtype: integers": (WEIGHT, TypeError, "dtype must be float32, .* got torch.int64", {"dtype": INT}),
    "dtype: a string": (WEIGHT, TypeError, "dtype must be float32", {"dtype": "bfloat16"}),
    "dtype: 8 bits": (WEIGHT, TypeError, "dtype must be float32", {"dtype": torch.float8_e4m3fn}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case, route):
    """With and without gradients; every tensor keeps its bits."""
    functions, error, message, changes = CASES[case]
    for function in functions:
        for grad in (True, False):
            a = {**good(function), **changes}
            if function in WEIGHT:
                a.pop("x", None)
            tensors = [t for t in a.values() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
            before = [t.clone() for t in tensors]
            if grad and isinstance(a["values"], torch.Tensor) and a["values"].is_floating_point():
                a["values"] = a["values"].detach().requires_grad_()
            with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
                getattr(lk, function)(**a)
            assert all(bitwise_equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("function", ALL)
def test_the_good_call_is_good(function, route):
    """What the cases change is all that is wrong with them."""
    for scale in (1, 2.0, True):
        result = getattr(lk, function)(**good(function), scale=scale)
        for t in result if isinstance(result, tuple) else (result,):
            assert t.isfinite().all()
            assert t.any()


@pytest.mark.parametrize("function", ALL)
def test_kinds_go_by_their_names(function, route):
    """Nothing is taken by position that could be mistaken for something else."""
    a = good(function)
    given = [a.pop(n) for n in ("dy", "x", "values", "plan") if n in a]
    with pytest.raises(TypeError, match="positional"):
        getattr(lk, function)(*given, "dct", 1.0)


def test_what_requires_grad(route):
    """The result requires grad where a differentiable argument does, and only in grad mode."""
    for kind in SPECTRAL_KINDS:
        for name in (None, "x", "values", "y"):
            a = {**good("spectral_linear"), "kind": kind}
            if name is not None:
                a[name].requires_grad_()
            assert lk.spectral_linear(**a).requires_grad == (name is not None)
            with torch.no_grad():
                assert not lk.spectral_linear(**a).requires_grad


PLACE = torch.zeros(3, dtype=INT)
#: (exception, message, rows, cols, options)
PLANS = {
    "rows: a list": (TypeError, "rows must be a tensor, got list", [0, 1], PLACE, {}),
    "cols: a list": (TypeError, "cols must be a tensor, got list", PLACE, [0, 1, 2], {}),
    "rows: int32": (TypeError, "rows must be int64, got torch.int32", PLACE.int(), PLACE, {}),
    "cols: floats": (TypeError, "cols must be int64, got torch.float32", PLACE, PLACE.float(), {}),
    "a matrix": (ValueError, r"must be \[n\] both, got \[1, 3\] and \[1, 3\]", PLACE[None], PLACE[None], {}),
    "a scalar": (ValueError, r"must be \[n\] both, got \[\] and \[3\]", PLACE[0], PLACE, {}),
    "other lengths": (ValueError, r"must be \[n\] both, got \[3\] and \[2\]", PLACE, PLACE[:2], {}),
    "rows: N": (IndexError, r"rows\[1\] is 5, out of range for shape \(5, 4\)", torch.tensor([4, 5, 9]), PLACE, {}),
    "rows: -1": (IndexError, r"rows\[2\] is -1, out of range", torch.tensor([0, 4, -1]), PLACE, {}),
    "cols: K": (IndexError, r"cols\[0\] is 4, out of range for shape \(5, 4\)", PLACE, PLACE + 4, {}),
    "cols: huge": (IndexError, r"cols\[2\] is 4294967296", PLACE, torch.tensor([0, 3, 2**32]), {}),
    "two devices": (ValueError, "rows is on cpu, cols on meta", PLACE, PLACE.to("meta"), {}),
    "shape: one number": (TypeError, "shape must be .*got 5", PLACE, PLACE, {"shape": 5}),
    "shape: none": (TypeError, "shape must be .*None", PLACE, PLACE, {"shape": None}),
    "shape: three": (TypeError, r"shape must be .*\(5, 4, 1\)", PLACE, PLACE, {"shape": (5, 4, 1)}),
    "shape: floats": (TypeError, r"shape must be .*\(5.0, 4\)", PLACE, PLACE, {"shape": (5.0, 4)}),
    "shape: negative": (TypeError, r"shape must be .*\(-5, 4\)", PLACE, PLACE, {"shape": (-5, 4)}),
    "shape: nothing": (IndexError, r"rows\[0\] is 0, out of range for shape \(0, 4\)", PLACE, PLACE, {"shape": (0, 4)}),
    "layout: unknown": (ValueError, "layout must be 'auto' or 'quarot', got 'dao'", PLACE, PLACE, {"layout": "dao"}),
    "layout: none": (ValueError, "layout must be 'auto' or 'quarot', got None", PLACE, PLACE, {"layout": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_plans_refused(case):
    error, message, rows, cols, options = PLANS[case]
    with pytest.raises(error, match=message):
        lk.SpectralPlan(rows, cols, **{"shape": (5, 4), **options})


@pytest.mark.parametrize(
    "error, message, args",
    (
        (ValueError, r"n must be from 1 to 12 for shape \(3, 4\), got 0", (0, (3, 4))),
        (ValueError, "n must be from 1 to 12 .*got 13", (13, (3, 4))),
        (ValueError, "n must be .*got 2.0", (2.0, (3, 4))),
        (ValueError, "n must be .*got 1", (1, (0, 4))),
        (TypeError, "shape must be .*got 5", (2, 5)),
        (TypeError, r"shape must be .*got \(3,\)", (2, (3,))),
        (TypeError, r"shape must be .*got \(-3, -4\)", (2, (-3, -4))),
        (TypeError, "seed must be an int, got None", (2, (3, 4), None)),
    ),
)
def test_random_refused(error, message, args):
    with pytest.raises(error, match=message):
        lk.SpectralPlan.random(*args)


def test_an_unknown_kind_of_entries():
    with pytest.raises(ValueError, match="kind must be one of"):
        PLAN.entries("dft")


def test_a_refused_kind_leaves_the_plan_as_it_was():
    plan = lk.SpectralPlan(PLAN.rows, PLAN.cols, shape=(N, 21))
    x, values = torch.randn(M, 21), torch.randn(COUNT)
    want = lk.spectral_linear(x, values, plan, kind="dct")
    for _ in range(2):
        with pytest.raises(ValueError, match="no Hadamard matrix of order 21"):
            lk.spectral_linear(x, values, plan, kind="wht")
    assert bitwise_equal(lk.spectral_linear(x, values, plan, kind="dct"), want)
