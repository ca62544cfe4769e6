"""The shipped CUDA sources, compiled as setup.py compiles them, and what their kernels take of a GPU."""

import functools
import hashlib
import os
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
HOME = SETUP["cuda_home"]()
KEPT = ROOT / "build/cuda-compile"
NO_KERNELS = ("architectures",)  # sources without any
RECORDED = r"[A-Z]*MMA|LDSM|STSM|ATOM[GS]?|REDG?|D(?:ADD|MUL|FMA)|UBLKCP|UTMA(?:LDG|STG)"
MOVES = ("LDG", "STG", "LDGSTS", "LDS", "STS")


@dataclass(frozen=True)
class Resources:
    """``registers`` and ``stack`` (bytes) a thread, ``spills``: accesses to local memory, ``shared``: static bytes.

    ``opcodes``: which matrix instructions, loads and stores (with their bits), atomics and fp64 arithmetic there are.
    """

    registers: int
    stack: int = 0
    spills: int = 0
    shared: int = 0
    opcodes: str = ""


@dataclass(frozen=True)
class Limit:
    """Of the kernels whose whole name fits the regular expression ``kernels``.

    ``registers``: the most a thread may take. ``needs``: words, an opcode each, or several of which one will do, with
    bars between. ``stack``: bytes that have to stand until the kernel is better.
    """

    kernels: str
    registers: int
    needs: str = ""
    stack: int = 0


def missing():
    """Why nothing can be compiled or read here, or None."""
    if HOME is None:
        return "needs nvcc: set CUDA_HOME"
    lacking = [name for name in ("cuobjdump", "nvdisasm") if not sass.tool(name)]
    return f"needs {' and '.join(lacking)}, of the CUDA toolkit or Triton's wheel" if lacking else None


def supported(architectures):
    """Those that the compiler here knows: nvcc before 12.8 knows no sm_100."""
    known = SETUP["nvcc"](HOME, "--list-gpu-code") if HOME else ""
    return tuple(name for name in architectures if name in known.split())


def families():
    return {path.stem for path in ROOT.glob("csrc/cuda/*.cu")} - {*NO_KERNELS}


@functools.cache
def compiler():
    return "nvcc " + re.search(r"release ([\d.]+)", SETUP["nvcc"](HOME, "--version"))[1]


@functools.cache
def compile_all(architectures):
    """{(family, architecture): the future of its cubin}, as many at a time as there are cores."""
    pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count())))
    return {
        (family, architecture): pool.submit(cubin, ROOT / f"csrc/cuda/{family}.cu", architecture)
        for architecture in architectures
        for family in families()
    }


def cubin(source, architecture, kept=KEPT):
    """The path of the cubin, compiled where what is kept is of another source, header, torch, nvcc or flag."""
    include = [f"-I{path}" for path in [*SETUP["INCLUDE"], *cpp_extension.include_paths()]]
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, *SETUP["NVCC_FLAGS"], *include, f"-arch={architecture}"]
    headers = [path for folder in ("include", "cuda") for path in sorted(ROOT.glob(f"csrc/{folder}/**/*.*h"))]
    parts = [torch.__version__, SETUP["nvcc"](HOME, "--version"), *flags]
    parts += [path.read_text() for path in [source, *headers]]
    out = kept / f"{source.stem}-{architecture}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.cubin"
    if not out.exists():
        kept.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [f"{HOME}/bin/nvcc", "-cubin", *flags, source, "-o", part], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{source.name} for {architecture}:\n{done.stdout}{done.stderr}")
        for old in kept.glob(f"{source.stem}-{architecture}-*.cubin"):
            old.unlink()
        part.replace(out)
    return out


def kernels(path):
    """{its name without namespaces: what it takes} for each kernel of a cubin."""
    opcodes, spills = {}, {}
    for function, _, opcode, modifiers in sass.instructions(path):
        here = opcodes.setdefault(function, set())
        if opcode in MOVES:
            here.add((opcode, sass.bits(modifiers)))
        elif re.fullmatch(RECORDED, opcode):
            here.add((opcode, 0))
        elif opcode in ("LDL", "STL"):
            spills[function] = spills.get(function, 0) + 1
    found = {}
    usage = sass.usage(path)
    for function, name in zip(usage, names(usage), strict=True):
        if name in found:
            raise ValueError(f"two kernels are called {name}")
        found[name] = Resources(
            registers=usage[function]["REG"],
            stack=usage[function]["STACK"],
            spills=spills.get(function, 0),
            shared=usage[function]["SHARED"],
            opcodes=" ".join(f"{op}.{bits}" if bits else op for op, bits in sorted(opcodes[function])),
        )
    return dict(sorted(found.items()))


def names(functions):
    """Mangled names as people write them, without return type, namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(functions), check=True, capture_output=True, text=True)
    for name in done.stdout.splitlines():
        name = name.replace("(anonymous namespace)::", "").replace("lora_kernels::", "").removeprefix("void ")
        name = name.replace("__nv_bfloat16", "bf16").replace("__half", "f16")
        depth = 0
        for at, char in enumerate(name):
            depth += (char == "<") - (char == ">")
            if char == "(" and depth == 0:
                name = name[:at]
                break
        yield name


def faults(found, limits):
    """What is wrong with ``found``, as of :func:`kernels`, in words."""
    wrong, used = [], set()
    for name, kernel in found.items():
        limit = next((limit for limit in limits if re.fullmatch(limit.kernels, name)), None)
        if limit is None:
            wrong.append(f"{name}: no limit is for it")
            continue
        used.add(limit)
        if kernel.stack > limit.stack or (kernel.spills and not limit.stack):
            wrong.append(f"{name}: spills ({kernel.stack} bytes of stack, {kernel.spills} accesses)")
        if kernel.registers > limit.registers:
            wrong.append(f"{name}: takes {kernel.registers} registers of {limit.registers}")
        for need in limit.needs.split():
            if not {*need.split("|")} & {*kernel.opcodes.split()}:
                wrong.append(f"{name}: has no {need}, only {kernel.opcodes or 'nothing'}")
    return wrong + [f"no kernel is called {limit.kernels}" for limit in limits if limit not in used]
