"""The C library's allocator as training wants it: what a step frees is there for the next one."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

#: malloc.h: parameters of mallopt, and what they are by default.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
DEFAULTS = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65536}


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[bool]:
    """As MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 do it; whether it is so, which takes glibc.

    Otherwise glibc returns large blocks to the system, and the next step takes a page fault for each of their pages: of
    SmolLM2-135M's logits and activations some hundred thousand, which cost both sides of a comparison more than what
    is compared, and another time on every machine and in every minute.
    """
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in {TRIM_THRESHOLD: 2**31 - 1, MMAP_MAX: 0}.items():
        mallopt(parameter, value)
    try:
        yield True
    finally:
        for parameter, value in DEFAULTS.items():
            mallopt(parameter, value)
