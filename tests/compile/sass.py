"""Machine code of NVIDIA's GPUs, read with NVIDIA's tools."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path


@functools.cache
def tool(name):
    """The path of cuobjdump or nvdisasm: Triton's wheel brings them, a toolkit has them in part; None without them."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join(map(str, folders)))


def _run(name, *args):
    return subprocess.run([tool(name), *args], check=True, capture_output=True, text=True).stdout


def usage(cubin):
    """{function: {"REG": registers, "STACK": bytes, "SHARED": bytes, ...}}."""
    found = re.findall(r"Function (\S+):\n(.+)", _run("cuobjdump", "--dump-resource-usage", cubin))
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def instructions(cubin):
    """Each instruction as (function, (file, line) or None, opcode, modifiers)."""
    function = place = None
    for line in _run("nvdisasm", "--print-code", "--print-line-info", "--no-dataflow", cubin).splitlines():
        if at := re.match(r"\s*\.section\s+\.text\.([\w$.]+)", line):
            function, place = at[1], None
        elif at := re.search(r'//## File "(.+)", line (\d+)', line):
            place = at[1], int(at[2])
        elif at := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?([A-Z]\w*)([.\w]*)", line):
            yield function, place, *at.groups()


def bits(modifiers):
    """How many a load or store with these modifiers moves."""
    width = re.search(r"\.[US]?(8|16|64|128|256)(?![0-9A-Z])", modifiers)
    return int(width[1]) if width else 32
