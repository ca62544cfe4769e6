import os
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root():
    return ROOT


def new_venv(folder):
    """A Python that sees what is installed here, torch above all, but no editable install."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return python


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    return new_venv(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def fresh_python(tmp_path):
    return new_venv(tmp_path / "fresh")


@pytest.fixture
def run(tmp_path):
    """Runs Python code outside the checkout and returns what it printed, both streams."""

    def run(python, code, *, path=(), **env):
        cwd = tmp_path / "cwd"
        cwd.mkdir(exist_ok=True)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1", **env}
        done = subprocess.run([python, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def pip(*arguments, build="none", python=sys.executable, **env):
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    env = {**os.environ, "LORA_KERNELS_BUILD": build, **env}
    done = subprocess.run([*command, "--no-deps", "--no-index"], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def install():
    """pip install of a wheel or, with --editable, of the checkout."""

    def install(*arguments, **options):
        pip("install", "--no-build-isolation", *arguments, **options)

    return install


@pytest.fixture(scope="session")
def build_wheel(tmp_path_factory):
    """Builds a source into a wheel; the checkout's own objects are used again, its build/lib is not."""

    def build_wheel(source, build, **env):
        out, staging = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("staging")
        pip(
            *("wheel", "--no-build-isolation", "--wheel-dir", out, source),
            f"--config-settings=--global-option=build --build-lib='{staging}'",
            build=build,
            **env,
        )
        (wheel,) = out.glob("*.whl")
        return wheel

    return build_wheel


@pytest.fixture(scope="session")
def wheel(build_wheel):
    return build_wheel(ROOT, "cpu")


@pytest.fixture(scope="session")
def cuda_wheel(build_wheel):
    """For one architecture, since each takes its time."""
    if runpy.run_path(str(ROOT / "setup.py"))["cuda_home"]() is None:
        pytest.skip("needs nvcc: set CUDA_HOME")
    return build_wheel(ROOT, "cuda", TORCH_CUDA_ARCH_LIST="9.0")


@pytest.fixture(scope="session", params=["wheel", "cuda_wheel"])
def binary_wheel(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def pure_wheel(build_wheel):
    return build_wheel(ROOT, "none")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    env = {**os.environ, "LORA_KERNELS_BUILD": "none"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def checkout_files():
    """The checkout's files that git tracks or would, as paths under its root."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
