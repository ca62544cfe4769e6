"""What a compiled kernel takes of its GPU, read from the machine code."""

import ast
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
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
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "--print-code", "--print-line-info", "--no-dataflow", file.name)
    number = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    place, bits, matrix, spills = None, {}, set(), 0
    for line in code.splitlines():
        if at := re.search(r'//## File "(.+)", line (\d+)', line):
            place = at[1], int(at[2])
        elif instruction := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?([A-Z]\w*)([.\w]*)", line):
            opcode, modifiers = instruction.groups()
            if opcode in ("LDG", "LDGSTS", "STG"):
                width = re.search(r"\.[US]?(8|16|64|128|256)(?![0-9A-Z])", modifiers)
                _narrow(bits, place, int(width[1]) if width else 32)
            elif opcode.endswith("MMA"):
                matrix.add(opcode)
            spills += opcode in ("LDL", "STL")
    return Resources(
        registers=int(number["REG"]),
        shared=kernel.metadata.shared,
        stack=int(number["STACK"]),
        spills=spills,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        matrix=" ".join(sorted(matrix)),
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


def _run(tool, *args):
    return subprocess.run([TOOLS / tool, *args], check=True, capture_output=True, text=True).stdout


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
