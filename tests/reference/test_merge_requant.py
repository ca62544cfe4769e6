"""Merged into a packed weight: what bitsandbytes would make of the sum, and a report of what is left."""

import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.quantization import merge
from lora_kernels.quantization.merge import MergeReport, MergeWarning
from lora_kernels.testing import bitwise_equal

N, K, R = 96, 256, 4


def exact(size, share=1.0):
    """A, B and s with s B A of few bits, so that W + s B A is the same however it is summed."""
    n, k = size
    A, B = (torch.randint(-2, 3, s).float() for s in ((R, k), (n, R)))
    return A, B, share * 2**-9


def dense(weight):
    return lk.dequantize(weight, torch.float32)


def merged(*args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergeWarning)
        return lk.merge_requant(*args)


def total(weight, A, B, s):
    return dense(weight) + s * (B @ A)


def same(one, other):
    """The same tensors in the same format, by its own keys."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert bitwise_equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "share, changed, cosine", [(0.005, 0.0, 0.04), (0.015, 0.0, 0.04), (0.05, 0.024, 0.36), (0.15, 0.36, 0.86)]
)
def test_what_is_left_of_a_small_adapter_in_nf4(share, changed, cosine):
    """As measured with bitsandbytes: PEFT's merge of a random adapter of so many times the norm of W."""
    weight = lk.quantize(0.02 * torch.randn(512, 1024), "nf4")
    A, B = torch.randn(16, 1024), torch.randn(512, 16)
    s = share * float(dense(weight).norm() / (B @ A).norm())
    with pytest.warns(MergeWarning, match="quantized_lora_linear, nothing is lost"):
        _, report = lk.merge_requant(weight, A, B, s)
    assert report.codes_changed == pytest.approx(changed, abs=0.01)
    assert report.cosine == pytest.approx(cosine, abs=0.015)
    assert report.lost > 0.5
    assert report.scales_changed > 0.99 * weight.scales.numel()


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("fmt", ("nf4", "fp4"))
@pytest.mark.parametrize("size, group", [((N, K), 64), ((N, K), 32), ((40, 24), 64), ((7, 9), 64), ((3, 600), 1024)])
def test_bitsandbytes_own_tensors_of_the_sum(fmt, nested, size, group):
    """Blocks that go over rows' ends too, bit for bit with what it stores."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = lk.quantize(torch.randn(size).bfloat16(), fmt, group_size=group, nested=nested)
    A, B, s = exact(size, 32.0)
    got, _ = merged(weight, A, B, s)
    data, state = functional.quantize_4bit(
        total(weight, A, B, s), blocksize=group, compress_statistics=nested, quant_type=fmt
    )
    state.dtype = torch.bfloat16
    same(got, lk.QuantizedWeight.from_bitsandbytes(data, state))
    assert got.dtype == weight.dtype


@pytest.mark.parametrize(
    "options",
    [
        {"fmt": "int8"},
        {"fmt": "int4", "group_size": 64},
        {"fmt": "int4", "group_size": 32, "symmetric": False},
    ],
)
def test_other_formats_of_the_sum(options):
    weight = lk.quantize(torch.randn(N, K).half(), **options)
    A, B, s = exact((N, K), 32.0)
    got, report = lk.merge_requant(weight, A, B, s)
    want = lk.quantize(total(weight, A, B, s), **options)
    assert (got.fmt, got.group_size, got.dtype) == (weight.fmt, weight.group_size, torch.float16)
    assert bitwise_equal(dense(got), dense(want))
    same(got, want)
    assert report.cosine > 0.9


@pytest.mark.parametrize("options", [{"fmt": "nf4"}, {"fmt": "int8"}, {"fmt": "int4", "symmetric": False}])
def test_the_report_says_what_changed(options):
    weight = lk.quantize(torch.randn(N, K), **options)
    A, B = torch.randn(R, K), torch.randn(N, R)
    got, report = merged(weight, A, B, 0.05)
    delta = 0.05 * (B.double() @ A.double())
    change = dense(got).double() - dense(weight).double()
    codes = [lk.reference.quantized.unpack_codes(one.codes, K) for one in (weight, got)]
    assert report.codes_changed == (codes[0] != codes[1]).double().mean()
    assert report.scales_changed == (weight.scales != got.scales).sum()
    assert report.cosine == pytest.approx(float((change * delta).sum() / change.norm() / delta.norm()), rel=1e-5)
    assert report.lost == pytest.approx(float((change - delta).norm() / delta.norm()), rel=1e-5)


def shuffled(checkpoint_format):
    """A weight with act-order: GPTQ's tensors of an int4 weight, its groups in another order."""
    tensors = lk.quantize(torch.randn(N, K), "int4", group_size=32, symmetric=False).state_dict()
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(K)]
    return lk.QuantizedWeight.from_gptq(**tensors, checkpoint_format=checkpoint_format)


@pytest.mark.parametrize("checkpoint_format", ("gptq", "gptq_v2"))
def test_gptq_comes_back_as_it_stores_zeros_and_order(checkpoint_format):
    weight = shuffled(checkpoint_format)
    assert weight.order is not None
    A, B, s = exact((N, K), 32.0)
    got, report = lk.merge_requant(weight, A, B, s)
    again = lk.QuantizedWeight.from_gptq(**got.state_dict(), checkpoint_format=checkpoint_format)
    assert bitwise_equal(dense(again), dense(got))
    assert report.cosine > 0.9
    order = weight.order
    want = lk.quantize(total(weight, A, B, s)[:, order], "int4", group_size=32, symmetric=False)
    assert bitwise_equal(dense(got)[:, order], dense(want))


def test_awq_comes_back_as_awq():
    origin = lk.quantize(torch.randn(N, K), "int4", group_size=32, symmetric=False).state_dict()
    weight = lk.QuantizedWeight.from_awq(
        torch.randint(-(2**31), 2**31, (K, N // 8), dtype=torch.int32),
        torch.randint(-(2**31), 2**31, (K // 32, N // 8), dtype=torch.int32),
        origin["scales"],
    )
    A, B, s = exact((N, K), 32.0)
    got, _ = merged(weight, A, B, s)
    assert got.state_dict().keys() == weight.state_dict().keys()
    again = lk.QuantizedWeight.from_awq(**got.state_dict())
    assert bitwise_equal(dense(again), dense(got))
    assert bitwise_equal(dense(got), dense(lk.quantize(total(weight, A, B, s), "int4", group_size=32, symmetric=False)))


def test_the_way_bitsandbytes_stores_it_is_kept():
    """FSDP's storage in another dtype."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    data, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(N, K), quant_type="nf4", quant_storage=torch.bfloat16
    )
    weight = lk.QuantizedWeight.from_bitsandbytes(data, state)
    got, _ = merged(weight, *exact((N, K), 32.0))
    stored = got.state_dict()["weight"]
    assert (stored.dtype, stored.shape) == (data.dtype, data.shape)


def test_a_weight_without_origin():
    """As a module holds it."""
    weight = lk.quantize(torch.randn(N, K), "nf4")
    factors = exact((N, K), 32.0)
    want, report = merged(weight, *factors)
    weight.origin = None
    got, again = merged(weight, *factors)
    assert bitwise_equal(dense(got), dense(want))
    assert again == report


class Largest(TorchDispatchMode):
    """The largest tensor of floats that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.numel = max(self.numel, t.numel())
        return result


@pytest.mark.parametrize("options", [{"fmt": "nf4"}, {"fmt": "int8"}, {"fmt": "int4"}])
def test_some_rows_at_a_time(monkeypatch, options):
    """The same, and never a copy of the whole weight in floats."""
    weight = lk.quantize(torch.randn(N, K), **options)
    factors = exact((N, K), 8.0)
    want = merged(weight, *factors)
    for module in (merge, lk.quantization.quantisers):
        monkeypatch.setattr(module, "PANEL", 8 * K)
    with Largest() as made:
        got = merged(weight, *factors)
    assert made.numel <= max(8 * K, weight.scales.numel(), N * R)
    assert bitwise_equal(dense(got[0]), dense(want[0]))
    assert got[1].codes_changed == want[1].codes_changed
    assert got[1].cosine == pytest.approx(want[1].cosine, rel=1e-12)


def test_a_large_adapter_is_merged_without_a_word():
    weight = lk.quantize(torch.randn(N, K), "nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = lk.merge_requant(weight, torch.randn(R, K), torch.randn(N, R), 0.5)
    assert report.cosine > 0.95


@pytest.mark.parametrize("options", [{"fmt": "nf4", "nested": True}, {"fmt": "int4"}])
def test_nothing_merged_is_nothing_changed(options):
    weight = lk.quantize(torch.randn(N, K), **options)
    A, B = torch.randn(R, K), torch.randn(N, R)
    for factors in ((A, torch.zeros_like(B), 1.0), (A, B, 0.0)):
        got, report = lk.merge_requant(weight, *factors)
        assert bitwise_equal(dense(got), dense(weight))
        assert report == MergeReport(codes_changed=0.0, scales_changed=0, cosine=1.0, lost=0.0)


def test_the_weight_is_left_as_it_is():
    weight = lk.quantize(torch.randn(N, K), "nf4")
    before = {name: t.clone() for name, t in weight.state_dict().items()}
    A = torch.nn.Parameter(torch.randn(R, K))
    got, _ = merged(weight, A.bfloat16(), torch.randn(N, R).bfloat16(), 1.0)
    assert not dense(got).requires_grad
    for name, tensor in weight.state_dict().items():
        assert bitwise_equal(tensor, before[name])


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"weight": torch.randn(N, K)}, TypeError, "weight must be a QuantizedWeight, got Tensor"),
        ({"A": torch.randn(R, K + 1)}, ValueError, rf"A must be \[R, {K}\]"),
        ({"A": torch.randn(K)}, ValueError, "A must be"),
        ({"B": torch.randn(N, R + 1)}, ValueError, rf"B must be \[{N}, {R}\]"),
        ({"B": [1.0]}, TypeError, "B must be a tensor"),
        ({"B": torch.full((N, R), math.inf)}, ValueError, "B .* must be finite"),
        ({"A": torch.ones(R, K, dtype=torch.int32)}, TypeError, "A must be"),
        ({"A": torch.randn(R, K, device="meta")}, ValueError, "A is on meta, weight on cpu"),
        ({"scaling": torch.ones(2)}, TypeError, "scaling must be a float"),
    ],
)
def test_bad_input(change, error, match):
    weight = lk.quantize(torch.randn(N, K), "nf4")
    arguments = {"weight": weight, "A": torch.randn(R, K), "B": torch.randn(N, R), "scaling": 1.0}
    with pytest.raises(error, match=match):
        lk.merge_requant(**{**arguments, **change})
