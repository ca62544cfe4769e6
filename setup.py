"""Build script: csrc/README.md explains its environment variables."""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("LORA_KERNELS_BUILD", "auto")
SANITIZE = os.environ.get("LORA_KERNELS_SANITIZE", "")
TORCH_TARGET = "0x020A000000000000"  # the oldest torch the binary loads in: 2.10
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded CPython has no limited API


def glob(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def warn(message):
    print(f"lora_kernels: {message}", file=sys.stderr)


def cuda_home():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").exists():
            return home
    nvcc = shutil.which("nvcc")
    return str(Path(nvcc).resolve().parents[1]) if nvcc else None


def extension(home):
    """The extension, with its CUDA sources if ``home``, the CUDA toolkit's folder, is given."""
    from torch.utils import cpp_extension

    optimise = ["-O3", "-g0"]
    link = []
    if SANITIZE:
        link = [f"-fsanitize={SANITIZE}"]
        optimise = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *link]
    common = ["-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    limited = ["-DPy_LIMITED_API=0x030A0000"] if ABI3 else []
    cxx = [*optimise, "-fvisibility=hidden", *common, *limited, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    nvcc = ["-O3", "-lineinfo", "--threads", os.environ.get("NVCC_THREADS", "2"), *common]
    # CppExtension for .cu sources too: the stable ABI needs none of torch's CUDA libraries.
    return cpp_extension.CppExtension(
        "lora_kernels._C",
        [*glob("csrc/python/*.cpp"), *glob("csrc/cpu/*.cpp"), *(glob("csrc/cuda/*.cu") if home else [])],
        include_dirs=[str(ROOT / "csrc/include"), str(ROOT / "csrc"), *([f"{home}/include"] if home else [])],
        library_dirs=[f"{home}/lib64"] if home else [],
        libraries=["cudart_static", "rt", "dl", "pthread"] if home else [],
        depends=[*glob("csrc/**/*.h"), *glob("csrc/**/*.cuh"), "setup.py"],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=ABI3,
    )


def build():
    """The arguments of setup() that say what is compiled."""
    if MODE not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"LORA_KERNELS_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
    if MODE == "none":
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        if MODE != "auto":
            raise
        warn(f"built without the C++ extension, for torch does not import: {error}")
        return {}

    home = cuda_home() if MODE == "cuda" or (MODE == "auto" and torch.version.cuda) else None
    if MODE == "cuda" and not home:
        raise SystemExit("LORA_KERNELS_BUILD=cuda needs nvcc: set CUDA_HOME")
    if home:
        cpp_extension.CUDA_HOME = home  # torch leaves it None on a CPU-only build
        if not torch.cuda.is_available():  # no GPU to read an architecture from
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")

    class Build(cpp_extension.BuildExtension):
        """In auto mode a failed build falls back: from CUDA to C++, from C++ to none."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                (ext,) = self.extensions
                if any(source.endswith(".cu") for source in ext.sources):
                    warn(f"built without CUDA, for its build failed: {error}")
                    vars(ext).update(vars(extension(home=None)))
                    self.build_extensions()
                else:
                    warn(f"built without the C++ extension, for its build failed: {error}")
                    self.extensions.clear()
                    self.distribution.ext_modules = []
                    # A wheel without machine code must not claim a platform.
                    self.get_finalized_command("bdist_wheel").root_is_pure = True

    return {
        "ext_modules": [extension(home)],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
    }


device_packages = find_packages("kernels")

setup(
    # kernels/<name> imports as lora_kernels.kernels.<name>: see lora_kernels/kernels/__init__.py.
    packages=find_packages(include=["lora_kernels", "lora_kernels.*"])
    + [f"lora_kernels.kernels.{name}" for name in device_packages],
    package_dir={f"lora_kernels.kernels.{name}": "kernels/" + name.replace(".", "/") for name in device_packages},
    package_data={"lora_kernels": ["py.typed"], "lora_kernels.kernels.configs": ["*.json"]},
    **build(),
)
