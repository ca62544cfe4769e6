"""Device kernels: Triton sources and tuned configurations.

A wheel carries them here; in a checkout they live in the repository's top-level ``kernels/``.
That folder is no package of its own, so ``import kernels`` always means Hugging Face's.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "triton").is_dir():
    __path__.append(str(_here.parents[1] / "kernels"))
