"""What the extension asks of the machine it is loaded on, without CUDA and with it."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LINUX = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("nm") and shutil.which("readelf")), reason="needs Linux and binutils"
)


@pytest.fixture
def binary(binary_wheel, tmp_path):
    return zipfile.ZipFile(binary_wheel).extract("lora_kernels/_C.abi3.so", tmp_path)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@LINUX
def test_it_needs_only_stable_symbols(binary):
    lines = [line.split() for line in run("nm", "-D", "--undefined-only", binary).splitlines()]
    symbols = [name for _, name in lines]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)
    stable = re.compile(
        r"aoti_torch_\w+|torch_\w+"  # libtorch's stable C interface
        r"|Py\w+|_Py\w+"
        r"|\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
        r"|_Z(NK?)?St\w+"  # libtorch exports some of libstdc++ without a version, and the linker meets it first
        r"|__gmon_start__|_ITM_\w+"  # the C runtime's optional hooks
    )
    assert [name for name in symbols if not stable.fullmatch(name)] == []
    # What a torch without CUDA lacks is asked for weakly; it has the number of the type of device.
    cuda = {name: kind for kind, name in lines if "cuda" in name.lower()}
    assert {name for name, kind in cuda.items() if kind != "w"} <= {"aoti_torch_device_type_cuda"}


@LINUX
def test_it_needs_only_torch_and_what_every_linux_has(binary):
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", binary))
    common = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux.*"
    assert [name for name in libraries if not re.fullmatch(common, name)] == ["libc10.so", "libtorch_cpu.so"]


@LINUX
def test_it_shows_only_its_entry(binary):
    """Nothing of CUDA's runtime above all, which another library in the process may have in another version."""
    names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", binary).splitlines()]
    foreign = re.compile(r"PyInit__C|_Z(NK?|T[ISV]|ZNK?)?St\w+|_edata|_end|__bss_start|_init|_fini")
    assert [name for name in names if not foreign.fullmatch(name)] == []


@pytest.mark.parametrize("tool", ["torch-abi-audit", "abi3audit"])
def test_audit(tool, binary_wheel, binary):
    """The ABIs of torch and of Python 3.10, which the wheel's name gives, by the lists that others keep of them."""
    script = shutil.which(tool, path=Path(sys.executable).parent)
    if script is None:
        pytest.skip(f"needs {tool}")
    if tool == "abi3audit":
        run(script, "--strict", binary_wheel)
    else:
        assert re.search(r"Min torch: +2\.10\.0", run(script, "--check", "both", "--verbose", binary))
