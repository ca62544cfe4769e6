"""What a process needs in which extensions built with AddressSanitizer and UndefinedBehaviorSanitizer are loaded."""

import os
import shutil
import subprocess
import sys

import pytest

CXX = os.environ.get("CXX", "c++")


def runtime(name):
    """The path of one of the compiler's runtime libraries."""
    if not sys.platform.startswith("linux") or shutil.which(CXX) is None:
        pytest.skip(f"needs Linux and a C++ compiler ({CXX})")
    path = subprocess.run([CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"{CXX} has no {name}")
    return path


def environment():
    """Variables to set: the runtimes come before Python, and the first error ends the process with 99."""
    return {
        "LD_PRELOAD": ":".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")),
        # Python itself leaks, and OpenMP's stacks are its own.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
    }
