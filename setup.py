"""Build script: csrc/README.md explains its environment variables."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INCLUDE = [str(ROOT / "csrc/include"), str(ROOT / "csrc")]
MODE = os.environ.get("LORA_KERNELS_BUILD", "auto")
SANITIZE = os.environ.get("LORA_KERNELS_SANITIZE", "")
COMMON = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020A000000000000"]  # the oldest torch the binary loads in: 2.10
NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden", "-Xfatbin=-compress-all", *COMMON]
GPUS = ("8.0", "8.6", "8.9", "9.0", "10.0")  # compiled for where there is no GPU to ask
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


def nvcc(home, option):
    return subprocess.run([f"{home}/bin/nvcc", option], check=True, capture_output=True, text=True).stdout


def architectures(home):
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, which is by default of the GPUs here, else of all that this nvcc knows."""
    import torch
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        known = nvcc(home, "--list-gpu-code").split()
        known = [gpu for gpu in GPUS if f"sm_{gpu.replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known) + "+PTX"
    flags = cpp_extension._get_cuda_arch_flags()
    names = sorted(re.findall(r",code=(\w+)", " ".join(flags)), key=lambda name: (name[0] == "c", len(name), name))
    return [*flags, f"-DLORA_KERNELS_ARCHITECTURES={':'.join(names)}"]


def extension(home):
    """The extension, with its CUDA sources if ``home``, the CUDA toolkit's folder, is given."""
    from torch.utils import cpp_extension

    optimise = ["-O3", "-g0"]
    link = []
    if SANITIZE:
        link = [f"-fsanitize={SANITIZE}"]
        optimise = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", *link]
    limited = ["-DPy_LIMITED_API=0x030A0000"] if ABI3 else []
    cxx = [*optimise, "-fvisibility=hidden", *COMMON, *limited, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    # CppExtension for .cu sources too: the stable ABI needs none of torch's CUDA libraries.
    return cpp_extension.CppExtension(
        "lora_kernels._C",
        [*glob("csrc/python/*.cpp"), *glob("csrc/cpu/*.cpp"), *(glob("csrc/cuda/*.cu") if home else [])],
        include_dirs=[*INCLUDE],
        library_dirs=[f"{home}/lib64", f"{home}/lib"] if home else [],
        libraries=["cudart_static", "rt", "dl", "pthread"] if home else [],
        depends=[*glob("csrc/**/*.h"), *glob("csrc/**/*.cuh"), "setup.py"],
        extra_compile_args={"cxx": cxx, "nvcc": [*NVCC_FLAGS, "--threads", os.environ.get("NVCC_THREADS", "2")]},
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
    except (ImportError, OSError) as error:  # OSError: of torch's own libraries
        if MODE != "auto":
            raise
        warn(f"built without the C++ extension, for torch does not import: {error}")
        return {}

    home = cuda_home() if MODE == "cuda" or (MODE == "auto" and torch.version.cuda) else None
    if MODE == "cuda" and not home:
        raise SystemExit("LORA_KERNELS_BUILD=cuda needs nvcc: set CUDA_HOME")

    class Build(cpp_extension.BuildExtension):
        """In auto mode a failed build falls back: from CUDA to C++, from C++ to none."""

        def build_extensions(self):
            (ext,) = self.extensions
            cuda = any(source.endswith(".cu") for source in ext.sources)
            vars(ext).update(
                vars(extension(home if cuda else None))
            )  # torch adds flags each time, and pip builds twice
            try:
                if cuda:
                    # Torch finds no CUDA if it has none, takes no other than its own, of which nothing is used here,
                    # and tracks headers only with one.
                    cpp_extension.CUDA_HOME = home
                    torch.version.cuda = re.search(r"release ([\d.]+)", nvcc(home, "--version"))[1]
                    ext.extra_compile_args["nvcc"] += architectures(home)
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                if cuda:
                    warn(f"built without CUDA, for its build failed: {error}")
                    ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
                    self.build_extensions()
                else:
                    warn(f"built without the C++ extension, for its build failed: {error}")
                    Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
                    self.extensions.clear()
                    self.distribution.ext_modules = []
                    # A wheel without machine code must not claim a platform.
                    self.get_finalized_command("bdist_wheel").root_is_pure = True

    return {
        "ext_modules": [extension(home)],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
    }


if __name__ == "__main__":  # the tests read how things are compiled
    device_packages = find_packages("kernels")

    setup(
        # kernels/<name> imports as lora_kernels.kernels.<name>: see lora_kernels/kernels/__init__.py.
        packages=find_packages(include=["lora_kernels", "lora_kernels.*"])
        + [f"lora_kernels.kernels.{name}" for name in device_packages],
        package_dir={f"lora_kernels.kernels.{name}": "kernels/" + name.replace(".", "/") for name in device_packages},
        package_data={
            "lora_kernels": ["py.typed", "integrations/README.md"],
            "lora_kernels.kernels.configs": ["*.json"],
        },
        **build(),
    )
