"""What a kernel compiled by Triton takes of its GPU, read from the machine code."""

import ast
import functools
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import sass

TENSOR_MEMORY = 512  # columns of a block
KEPT = 8  # bytes of stack: ptxas itself leaves a loop's constant in memory where that lets one more block in


@dataclass(frozen=True)
class Resources:
    """``registers`` and ``stack`` (bytes) a thread, ``shared`` bytes and ``tensor_memory`` columns a block.

    ``spills``: accesses to local memory. ``matrix``: the matrix instructions. ``bits``: the narrowest access of each
    load and store of global memory, by the name of what is loaded, or of what is stored to.
    """

    registers: int
    shared: int
    stack: int = 0
    spills: int = 0
    tensor_memory: int = 0
    matrix: str = ""
    bits: dict[str, int] = field(default_factory=dict)


def resources(kernel):
    """The resources of what ``JITFunction.warmup`` returns."""
    return _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel)


def faults(kernel, found, target, wide=()):
    """What is wrong with a kernel that takes ``found``, in words; ``wide``: the accesses that must be wide."""
    wrong = []
    if found.shared > target.gpu.shared:
        wrong.append(f"takes {found.shared} bytes of shared memory, where a block may have {target.gpu.shared}")
    if found.tensor_memory > TENSOR_MEMORY:
        wrong.append(f"takes {found.tensor_memory} columns of tensor memory, where there are {TENSOR_MEMORY}")
    if found.stack > KEPT:
        wrong.append(f"spills ({found.stack} bytes of stack, {found.spills} accesses, {found.registers} registers)")
    if "tt.dot" in kernel.asm["ttir"] and not found.matrix:
        wrong.append("multiplies without matrix instructions")
    for name in wide:
        if name not in found.bits:
            wrong.append(f"has no load or store called {name}; there are {', '.join(found.bits)}")
        elif found.bits[name] < target.wide:
            wrong.append(f"accesses {name} by {found.bits[name]} bits, not {target.wide}")
    return wrong


def _nvidia(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        (usage,) = sass.usage(file.name).values()
        code = list(sass.instructions(file.name))
    bits = {}
    for _, place, opcode, modifiers in code:
        if opcode in ("LDG", "LDGSTS", "STG"):
            _narrow(bits, place, sass.bits(modifiers))
    return Resources(
        registers=usage["REG"],
        shared=kernel.metadata.shared,
        stack=usage["STACK"],
        spills=sum(opcode in ("LDL", "STL") for _, _, opcode, _ in code),
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        matrix=" ".join(sorted({opcode for _, _, opcode, _ in code if opcode.endswith("MMA")})),
        bits=dict(sorted(bits.items())),
    )


def _amd(kernel):
    code = kernel.asm["amdgcn"]
    number = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    files = {n: str(Path(folder, name)) for n, folder, name in re.findall(r'\.file\s+(\d+) "(.+?)" "(.+?)"', code)}
    place, bits = None, {}
    for line in code.splitlines():
        if at := re.match(r"\s+\.loc\s+(\d+) (\d+)", line):
            place = files[at[1]], int(at[2])
        elif access := re.match(
            r"\s+(?:global|buffer|flat)_(?:load|store)_(dword|[us]?short|[us]?byte)(?:x(\d))?", line
        ):
            _narrow(bits, place, {"d": 32, "s": 16, "b": 8}[access[1].lstrip("u")[0]] * int(access[2] or 1))
    return Resources(
        registers=number["vgpr_count"],
        shared=kernel.metadata.shared,
        stack=number["private_segment_fixed_size"],
        spills=number["vgpr_spill_count"] + number["sgpr_spill_count"],
        matrix=" ".join(sorted(set(re.findall(r"v_mfma_\w+", code)))),
        bits=dict(sorted(bits.items())),
    )


def _narrow(bits, place, width):
    name = _accesses(place[0]).get(place[1], f"line {place[1]}")
    bits[name] = min(bits.get(name, width), width)


@functools.cache
def _accesses(file):
    """{line: name} of the statements of ``file`` that load or store: of the variable loaded, the pointer stored to."""
    names = {}
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Assign | ast.AugAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        elif isinstance(node, ast.Return):
            name = "what is returned"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args:
            name = f"*{ast.unparse(node.value.args[0])}"
        else:
            continue
        names.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1), name))
    return names
