import os
from pathlib import Path

import pytest

WHERE = """
import lora_kernels, lora_kernels.kernels.configs, lora_kernels.kernels.triton
print(lora_kernels.__file__, lora_kernels.kernels.triton.__file__, sep="\\n")
"""
LOAD = "import torch, lora_kernels._C"

# What an import must not bring along.
OPTIONAL = """accelerate bitsandbytes gguf huggingface_hub hypothesis matplotlib peft pytest rich safetensors scipy
sglang torchao transformers triton vllm"""

IMPORT = f"""
import logging, sys, warnings
import torch
for name in ("_lazy_init", "current_device", "device_count", "get_device_capability", "get_device_name",
             "get_device_properties", "is_available"):
    setattr(torch.cuda, name, lambda *args, name=name: sys.exit(f"the import calls torch.cuda.{{name}}"))
warnings.simplefilter("error")
before = set(sys.modules)
import lora_kernels
lora_kernels.bgmv
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & set({OPTIONAL.split()}), new
assert not logging.getLogger("lora_kernels").handlers + logging.getLogger().handlers
"""


def locations(printed):
    return [Path(line) for line in printed.splitlines()]


def test_installed_wheel(wheel, install, bare_python, run, tmp_path):
    target = tmp_path / "target"
    install("--target", target, wheel)
    package, triton = locations(run(bare_python, WHERE, path=[target]))
    assert package == target / "lora_kernels/__init__.py"
    assert triton == target / "lora_kernels/kernels/triton/__init__.py"
    run(bare_python, LOAD, path=[target])


def test_bare_checkout(root, bare_python, run):
    package, triton = locations(run(bare_python, WHERE, path=[root]))
    assert package == root / "lora_kernels/__init__.py"
    assert triton == root / "kernels/triton/__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install(mode, root, fresh_python, install, run):
    install("--editable", root, f"--config-settings=editable_mode={mode}", python=fresh_python)
    found = [path.resolve() for path in locations(run(fresh_python, WHERE))]
    assert found == [root / "lora_kernels/__init__.py", root / "kernels/triton/__init__.py"]


def test_checkout_does_not_shadow_kernels(root, bare_python, run, tmp_path):
    other = tmp_path / "site/kernels/__init__.py"
    other.parent.mkdir(parents=True)
    other.touch()
    printed = run(bare_python, "import kernels; print(kernels.__file__)", path=[root, other.parents[1]])
    assert locations(printed) == [other]


def test_import_has_no_side_effects(root, bare_python, run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    folders = {name: str(home) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    assert run(bare_python, IMPORT, path=[root], **folders) == ""
    assert os.listdir(home) == os.listdir(tmp_path / "cwd") == []
