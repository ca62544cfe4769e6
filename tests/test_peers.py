"""``benchmarks/peers.py`` with peers written here, in plain PyTorch, where the real ones' files would be."""

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SHRINK = """
import torch
from sglang.srt.environ import envs
from sglang.srt.lora.utils import LoRABatchInfo

def chunked_sgmv_lora_shrink_forward(x, weights, batch_info: LoRABatchInfo, num_slices):
    v = torch.zeros(len(x), weights.shape[1], dtype=x.dtype)
    for s, l in enumerate(batch_info.weight_indices.tolist()):
        rows = batch_info.permutation[batch_info.seg_indptr[s] : batch_info.seg_indptr[s + 1]].long()
        assert 0 < len(rows) <= batch_info.max_len
        n = num_slices * int(batch_info.lora_ranks[l])
        v[rows, :n] = x[rows] @ weights[l, :n].T
    return v
"""
EXPAND = """
def chunked_sgmv_lora_expand_forward(x, weights, batch_info, slice_offsets, max_slice_size, base_output, ends):
    assert slice_offsets.tolist() == ends.tolist() and ends.diff().max() == max_slice_size
    for s, l in enumerate(batch_info.weight_indices.tolist()):
        rows = batch_info.permutation[batch_info.seg_indptr[s] : batch_info.seg_indptr[s + 1]].long()
        r = int(batch_info.lora_ranks[l])
        for i, (start, stop) in enumerate(zip(ends, ends[1:])):
            v, b = x[rows, i * r : (i + 1) * r], weights[l, start:stop, :r]
            base_output[rows, start:stop] += batch_info.scalings[l].to(v.dtype) * v @ b.T
"""


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    """Our benchmarks are importable, and what a test imports is forgotten after it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("vllm", "sglang", "peers", "gpu_case", "gpu_low_rank", "compare", "roofs", "machine"):
            del sys.modules[name]


def folder(tmp_path, expand=EXPAND, vllm="import no_such_module"):
    for path, text in {
        "sglang/kernels/ops/lora/dense/__init__.py": "1 / 0  # not to be run",
        "sglang/kernels/ops/lora/dense/chunked_sgmv_shrink.py": SHRINK,
        "sglang/kernels/ops/lora/dense/chunked_sgmv_expand.py": expand,
        "vllm/lora/ops/triton_ops/lora_shrink_op.py": vllm,
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def measured(peers, *which):
    from gpu_case import Case
    from gpu_low_rank import measure

    return measure(Case(*which, "cpu", 2), math.nan, peers)


@pytest.mark.parametrize("rank", (8, "mixed"))
def test_a_peer_is_timed_beside_ours(tmp_path, rank):
    from peers import load

    found, _ = load(folder(tmp_path))
    row = measured(found, "gate_up", 40, 3, rank)
    assert {"lora_kernels", "SGLang csgmv"} <= row["providers"].keys()
    assert "failed" not in row
    assert "SGLang csgmv" not in measured(found, "qkv", 1, 1, rank)["providers"]


def test_a_peer_that_can_not_be_had_is_told_without_naming_the_machine(tmp_path):
    from peers import load

    found, missing = load(tmp_path)
    assert not found
    assert missing["vLLM"] == "FileNotFoundError: no vllm/lora/ops/triton_ops in the folder"
    found, missing = load(folder(tmp_path, vllm=f"raise OSError({str(tmp_path / 'file')!r})"))
    assert found.keys() == {"SGLang csgmv"}
    if "triton" in sys.modules:
        assert missing["vLLM"] == "OSError: the folder/file"


@pytest.mark.parametrize(
    "expand, why", [(EXPAND.replace("+= ", "+= 1.1 *"), "AssertionError: SGLang csgmv"), ("", "AttributeError")]
)
def test_a_peer_that_is_wrong_or_fails_is_not_timed_and_the_others_are(tmp_path, expand, why):
    from peers import load

    found, _ = load(folder(tmp_path, expand=expand))
    row = measured(found, "o", 8, 2, 16)
    assert row["failed"]["SGLang csgmv"].startswith(why)
    assert {"lora_kernels", "addmm loop"} <= row["providers"].keys()
    assert "SGLang csgmv" not in row["providers"]


def test_vllm_gets_padded_weights_and_forgets_the_addresses_of_other_cases(tmp_path):
    pytest.importorskip("triton")
    from peers import load

    root = folder(tmp_path, vllm=VLLM_SHRINK) / "vllm" / "lora" / "ops" / "triton_ops"
    (root / "lora_expand_op.py").write_text(VLLM_EXPAND)
    (root / "lora_kernel_metadata.py").write_text(VLLM_META)
    (root / "utils.py").write_text("_LORA_A_PTR_DICT, _LORA_B_PTR_DICT = {1: 2}, {3: 4}")
    found, missing = load(tmp_path)
    assert not missing
    row = measured(found, "qkv", 20, 3, "mixed")
    assert "vLLM" in row["providers"], row
    utils = sys.modules["vllm.lora.ops.triton_ops.utils"]
    assert not utils._LORA_A_PTR_DICT
    assert not utils._LORA_B_PTR_DICT


VLLM_SHRINK = """
from vllm import envs
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

def lora_shrink(x, A, v, ids, scale):
    for s, a in enumerate(A):
        v[s] = scale * (x[:, None].float() @ a[ids, 0].float().mT)[:, 0]
"""
VLLM_EXPAND = """
def lora_expand(v, B, y, ids, offset_start=0, add_inputs=False):
    column = offset_start
    for s, b in enumerate(B):
        y[:, column : column + b.shape[2]] += (v[s, :, None].to(b.dtype) @ b[ids, 0].mT)[:, 0]
        column += b.shape[2]
    assert add_inputs and column == y.shape[1]
"""
VLLM_META = """
class LoRAKernelMeta:
    @staticmethod
    def make(max_loras, max_num_tokens, device):
        return LoRAKernelMeta()

    def prepare_tensors(self, ids):
        self.ids = ids

    def meta_args(self, token_nums, specialize_active_lora):
        return (self.ids[:token_nums],)
"""
