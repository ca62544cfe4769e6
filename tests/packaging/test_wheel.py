import re
import tarfile
import zipfile
from email.parser import Parser

import pytest


def module_files(wheel):
    """The wheel's files under lora_kernels/."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lora_kernels/")}


def expected_modules(checkout_files):
    kernels = {f"lora_kernels/{name}" for name in checkout_files if name.startswith("kernels/")}
    return kernels | {name for name in checkout_files if name.startswith("lora_kernels/")}


def test_wheel_is_the_package_and_one_binary(binary_wheel, checkout_files):
    binaries = {name for name in module_files(binary_wheel) if name.startswith("lora_kernels/_C.")}
    assert len(binaries) == 1
    assert module_files(binary_wheel) - binaries == expected_modules(checkout_files)


def test_wheel_without_binary_is_the_package(pure_wheel, checkout_files):
    assert module_files(pure_wheel) == expected_modules(checkout_files)


def test_sdist_has_every_source(sdist, checkout_files):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc/", "kernels/", "lora_kernels/", "tests/", "benchmarks/", "examples/")
    at_root = {name for name in checkout_files if "/" not in name and not name.startswith(".")}
    assert at_root | {name for name in checkout_files if name.startswith(folders)} <= names


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(sdist, build_wheel, wheel):
    again = build_wheel(sdist, "cpu")
    assert again.name == wheel.name
    assert module_files(again) == module_files(wheel)


def test_tags(binary_wheel, pure_wheel):
    assert re.search(r"-cp310-abi3-(?!any)\w+\.whl$", binary_wheel.name)
    assert pure_wheel.name.endswith("-py3-none-any.whl")


def test_metadata(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        version = re.search('"(.+)"', archive.read("lora_kernels/_version.py").decode())[1]
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == version
    assert [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need] == ["torch>=2.11"]
    assert "lora-kernels = lora_kernels.__main__:main" in scripts
