"""lora_kernels.info()."""

import importlib
import json

import pytest

import lora_kernels as lk
from lora_kernels import _info
from lora_kernels.ops import _dispatch
from lora_kernels.select import BACKENDS


class Compiled:
    """The extension's ops, built without CUDA."""

    def isas(self):
        return ["portable"]

    def get_isa(self):
        return "portable"


def test_the_function_is_no_module():
    importlib.import_module("lora_kernels._info")
    assert callable(lk.info)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lora_kernels.info")


def test_every_op_and_every_backend_has_a_reason():
    found = lk.info()
    names = {op.op for op in found.ops if op.device == "cpu"}
    assert names == set(_dispatch.Op.registry)
    assert {op.family for op in found.ops} == {"low_rank", "lora_linear", "quantized", "transforms", "spectral"}
    for op in found.ops:
        assert {op.backend, *op.others} == set(BACKENDS)
        assert op.reason
        assert all(op.others.values())
    assert found.forced is None
    assert json.loads(json.dumps(found.to_dict()))["version"] == lk.__version__


def test_it_says_what_runs():
    """What is said to run an op is what the dispatcher holds for it."""
    for op in lk.info().ops:
        if op.device == "cpu":
            assert op.backend == ("cpu" if _dispatch.extension_error is None else "reference")
    assert "lora_add_" in str(lk.info())


def test_forced():
    with lk.backend("reference"):
        found = lk.info()
    assert found.forced == "reference"
    assert {op.backend for op in found.ops} == {"reference"}
    with lk.backend("triton"):
        text = str(lk.info())
    assert "nothing" in text
    assert "backend 'triton' does not run on cpu tensors" in text


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_info, "extension_error", "no such file")
    monkeypatch.setattr(_dispatch.Op, "backends", lambda op: frozenset({"reference"}))
    found = lk.info()
    assert found.instruction_set is None
    assert found.cuda_architectures == ()
    assert {op.backend for op in found.ops} == {"reference"}
    assert "cpu: the compiled kernels are missing: no such file" in str(found)


def test_cuda_architectures(monkeypatch):
    monkeypatch.setattr(_info, "extension_error", None)
    monkeypatch.setattr(_info.torch.ops, "lora_kernels_C", Compiled())
    assert "CUDA kernels    none: built without CUDA" in str(lk.info())
    monkeypatch.setattr(Compiled, "cuda_architectures", lambda self: ["sm_90", "compute_100"], raising=False)
    assert lk.info().cuda_architectures == ("sm_90", "compute_100")
    assert "CUDA kernels    sm_90, compute_100" in str(lk.info())
