"""A wheel with CUDA where there is none: it loads, says what it holds, and runs on the CPU as the other one."""

import json
import re

import pytest

LOAD = """
import json, torch, lora_kernels as lk
from lora_kernels.ops._dispatch import Op, extension_error
assert extension_error is None, extension_error
y = [torch.zeros(3, 48) for _ in range(2)]
torch.manual_seed(0)
x, A, B = torch.randn(3, 64), torch.randn(2, 8, 64), torch.randn(2, 48, 8)
for out, name in zip(y, ("cpu", "reference")):
    with lk.backend(name):
        lk.bgmv(out, x, A, B, torch.tensor([0, 1, -1]))
torch.testing.assert_close(*y)
assert y[0].any()
print(json.dumps([lk.info().cuda_architectures, str(lk.info()), [op.name for op in Op.registry.values() if op.cuda]]))
"""


@pytest.fixture(scope="module")
def target(cuda_wheel, install, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    install("--target", folder, cuda_wheel)
    return folder


def test_it_loads_and_says_what_it_holds(root, target, bare_python, run):
    architectures, text, ops = json.loads(run(bare_python, LOAD, path=[target]))
    assert architectures == ["sm_90"]
    assert re.search(r"^CUDA kernels +sm_90$", text, re.MULTILINE)
    sources = "".join(path.read_text() for path in root.glob("csrc/cuda/*.cu"))
    blocks = "".join(re.findall(r"LIBRARY_IMPL\(lora_kernels_C, CUDA, m\) \{([^}]*)\}", sources))
    written = {*re.findall(r'm\.impl\("(\w+)"', blocks)}
    assert len(written) > 3
    assert {*ops} == written


def test_without_cuda_it_says_so(wheel, install, bare_python, run, tmp_path):
    install("--target", tmp_path / "target", wheel)
    assert json.loads(run(bare_python, LOAD, path=[tmp_path / "target"]))[0] == []
