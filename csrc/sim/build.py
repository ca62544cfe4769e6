"""Builds lora_kernels/_sim: the CUDA kernels on the host executor, for tests.

    python csrc/sim/build.py

Only what changed is compiled. Objects are in build/ beside the sources, and every path in a command is relative to
there: a copy of both folders goes on where the original stood.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

CSRC = Path(__file__).resolve().parents[1]
CORE = ("bindings", "executor", "fiber", "memory", "report", "schedule", "tensors")
MODULE = "_sim" + sysconfig.get_config_var("EXT_SUFFIX")


def objects_folder(source=CSRC, sanitize=""):
    return source.parent / "build" / "-".join(["sim", *sanitize.split(",")] if sanitize else ["sim"])


def flags(source, sanitize):
    optimise = ["-O2", "-g1"]
    if sanitize:
        optimise = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", f"-fsanitize={sanitize}"]
    includes = ["-I", source.name, "-I", f"{source.name}/include"]
    for path in (sysconfig.get_path("include"), pybind11.get_include()):
        includes += ["-isystem", path]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    return ["-std=c++17", "-fPIC", "-fvisibility=hidden", *optimise, *warnings, *includes]


def build(source=CSRC, out=CSRC.parent / "lora_kernels", sanitize="", families=None):
    """Builds into ``out`` and returns the module's path. ``families``: only these, of the sources in ``source``."""
    source, out = Path(source).resolve(), Path(out).resolve()
    units = sorted(path.stem for path in (source / "sim").glob("*.cpp"))
    if families is not None:
        units = [name for name in units if name in CORE or name in families]
    objects = objects_folder(source, sanitize)
    objects.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    folder = objects.relative_to(source.parent)
    cxx = os.environ.get("CXX", "c++")
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link = [*shared, *([f"-fsanitize={sanitize}"] if sanitize else [])]
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {folder}",
        "rule compile",
        f"  command = {cxx} {shlex.join(flags(source, sanitize))} -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {cxx} {shlex.join(link)} $in -o $out",
        *(f"build {folder}/{name}.o: compile {source.name}/sim/{name}.cpp" for name in units),
        f"build {folder}/{MODULE}: link " + " ".join(f"{folder}/{name}.o" for name in units),
    ]
    rules = objects / "build.ninja"
    rules.write_text("\n".join([*lines, ""]))
    command = [sys.executable, "-m", "ninja", "--quiet", "-j", os.environ.get("MAX_JOBS", "2"), "-f", str(rules)]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return install(objects / MODULE, out / MODULE)


def install(built, module):
    """Replaces the module only if it is another one, and never in place: a process may have it loaded."""
    if not module.exists() or module.read_bytes() != built.read_bytes():
        fresh = module.with_suffix(".new")
        fresh.write_bytes(built.read_bytes())
        fresh.replace(module)
    return module


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=CSRC, help="another csrc folder")
    parser.add_argument("--out", type=Path, default=CSRC.parent / "lora_kernels")
    parser.add_argument("--sanitize", default="", help="for example address,undefined")
    parser.add_argument("--families", nargs="+", help="only these; by default all")
    options = parser.parse_args()
    try:
        build(**vars(options))
    except RuntimeError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
