"""The command line: in a process of its own where that is what is tested, else through ``main``."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels import __main__ as cli
from lora_kernels import check as checks
from lora_kernels.check import low_rank, quantized
from lora_kernels.ops import _dispatch
from lora_kernels.testing import LOW_RANK_DTYPES, assert_within_rule, low_rank_samples, quantized_samples

ROOT = Path(lk.__file__).parents[1]


def run(*args, path=(), **environment):
    search = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "lora_kernels", *args],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": search, **environment},
    )


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(low_rank, "QUICK", ("one-row", "odd", "mixture-of-1"))


def one_line(text):
    assert text.startswith("lora-kernels")
    assert text.count("\n") == 1
    return text


def test_version_is_said_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = run("--version", path=[tmp_path])
    assert (result.returncode, result.stdout) == (0, f"lora_kernels {lk.__version__}\n")


@pytest.mark.parametrize(
    "args, says",
    [
        (["nonsense"], "'nonsense'"),
        ([], "COMMAND"),
        (["info", "--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_command_line_is_one_line(args, says, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in one_line(err)


@pytest.mark.parametrize(
    "args, says",
    [
        (["check", "--family", "nonsense"], "low_rank"),
        (["check", "--dtype", "fp12"], "fp12"),
        (["bench", "nonsense"], "nonsense"),
        (["demo", "--max-new-tokens", "0"], ""),
    ],
)
def test_a_users_error_is_one_line(args, says, capsys, tmp_path, monkeypatch):
    benchmarks(tmp_path, monkeypatch)
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in one_line(err)
    with pytest.raises((ValueError, ImportError)):
        cli.main(["--traceback", *args])


@pytest.mark.parametrize("command", ("demo", "info", "check", "bench", "collect-env"))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert f"lora-kernels {command}" in capsys.readouterr().out


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text == f"{lk.info()}\n"
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(lk.info().to_dict()))


def test_check(capsys, few_samples):
    torch_ops = torch.ops.lora_kernels_C if _dispatch.extension_error is None else None
    before = torch_ops and torch_ops.get_isa()
    assert cli.main(["check", "--dtype", "fp32", "--dtype", "bf16", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "samples" in err
    found = json.loads(out)
    assert found["passed"]
    assert {cell["op"] for cell in found["cells"]} == set(checks.FAMILIES["low_rank"].ops)
    assert {cell["dtype"] for cell in found["cells"]} == {"fp32", "bf16"}
    assert {cell["isa"] for cell in found["cells"]} == {None, *(torch_ops.isas() if torch_ops else ())}
    assert all(0 < cell["worst"] <= 1 and cell["calls"] for cell in found["cells"] if cell["op"] == "bgmv")
    assert before == (torch_ops and torch_ops.get_isa())


def test_check_takes_every_backend_of_a_gpu(monkeypatch):
    monkeypatch.setattr(checks, "devices", lambda: {"cuda": "a GPU"})
    monkeypatch.setattr(_dispatch.Op, "backends", lambda op: frozenset({"reference", "cpu", "triton"}))
    assert list(map(str, checks.targets("low_rank"))) == ["cuda:reference", "cuda:triton"]


def test_check_finds_a_broken_backend(capsys, few_samples, monkeypatch):
    """Only the backend that is broken fails, only in the ops that use what is broken."""
    op = _dispatch.Op.registry["lora_add_"]
    works = op.reference

    def broken(y, *rest):
        works(y, *rest)
        y.mul_(1.001)

    monkeypatch.setattr(op, "reference", broken)
    assert cli.main(["check", "--dtype", "fp32", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    failed = {(cell["op"], cell["backend"]) for cell in found["cells"] if not cell["passed"]}
    assert failed == {(name, "reference") for name in ("bgmv", "sgmv", "multi_lora", "lora_linear")}
    assert all(cell["worst"] > 1 and cell["failures"] for cell in found["cells"] if not cell["passed"])


def test_check_goes_on_after_an_exception(capsys, few_samples, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(lk, "bgmv_shrink", broken)
    assert cli.main(["check", "--dtype", "fp32"]) == 1
    out = capsys.readouterr().out
    assert "FAIL bgmv_shrink fp32 on reference: one-row: RuntimeError: out of order (and 1 more)" in out
    count = len(checks.targets("low_rank"))
    assert f"{count} of {count * len(checks.FAMILIES['low_rank'].ops)} FAILED" in out


def test_the_quick_samples_exist():
    names = {sample.name for sample in low_rank_samples(*LOW_RANK_DTYPES["fp32"])}
    assert set(low_rank.QUICK) <= names
    assert set(quantized.QUICK) <= {sample.name for sample in quantized_samples()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("noise", (0.0, 0.5))
def test_the_share_of_the_allowed_error_agrees_with_the_rule(dtype, noise):
    oracle = torch.randn(64, dtype=torch.float64)
    plain = (oracle + 0.1 * torch.randn(64)).to(torch.float64)
    outcomes = set()
    for size in (0.0, 0.05, 0.09, 0.11, 0.14, 0.17, 0.3, 0.6, 1.0):
        result = (oracle + size * torch.randn(64)).to(dtype)
        share = checks.used(result, oracle, plain, noise)
        try:
            assert_within_rule(result, oracle, plain, noise=noise)
        except AssertionError:
            assert share > 1
        else:
            assert share <= 1
        outcomes.add(share > 1)
    assert outcomes == {False, True}
    assert checks.used(torch.full_like(oracle, torch.nan), oracle, plain, noise) == float("inf")
    assert checks.used(oracle[:3], oracle, plain, noise) == float("inf")


def benchmarks(tmp_path, monkeypatch, body="assert True"):
    """A checkout whose one benchmark runs ``body``."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/bench_toy.py").write_text(f"def test_toy(benchmark):\n    benchmark(int)\n    {body}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lora_kernels/__main__.py"))


@pytest.mark.parametrize("body, status", [("assert True", 0), ("assert False", 1)])
def test_bench_runs_the_benchmarks_of_a_checkout(body, status, tmp_path, monkeypatch, capfd):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("rich")
    benchmarks(tmp_path, monkeypatch, body)
    assert cli.main(["bench", "toy", "-k", "toy"]) == status
    assert "bench_toy.py" in capfd.readouterr().out


def test_bench_without_a_checkout_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lora_kernels/__main__.py"))
    assert cli.main(["bench"]) == 2
    assert "checkout" in one_line(capsys.readouterr().err)


def test_the_progress_bar_is_on_stderr(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with cli._progress() as progress:
        progress(1, 2, "a sample")
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/2" in err


def test_collect_env():
    result = run("collect-env", "--json", LORA_KERNELS_CACHE="/somewhere/private")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["lora_kernels"]["version"] == lk.__version__
    assert found["torch"]["version"] == torch.__version__
    assert found["extension"]["loaded"] == (_dispatch.extension_error is None)
    if found["extension"]["loaded"]:
        assert found["extension"]["instruction sets"] == torch.ops.lora_kernels_C.isas()
        assert found["extension"]["cuda architectures"] == [*_dispatch.cuda_architectures()]
    assert found["environment"]["LORA_KERNELS_CACHE"] == "<a path>"
    assert found["packages"]["sglang"] is None or isinstance(found["packages"]["sglang"], str)
    for private in (platform.node(), str(Path.home()), str(ROOT)):
        assert len(private) < 4 or private not in result.stdout


def test_collect_env_names_what_vllm_loads(tmp_path):
    installed = tmp_path / "some_plugin-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[vllm.general_plugins]\nsome_plugin = some.module:register\n")
    found = json.loads(run("collect-env", "--json", path=[tmp_path], VLLM_PLUGINS="some_plugin").stdout)
    assert "some_plugin" in found["vllm plug-ins"]
    assert found["environment"]["VLLM_PLUGINS"] == "some_plugin"


@pytest.mark.parametrize(
    "torch_py, says",
    [
        ("raise ImportError('no torch on this machine')", "no torch on this machine"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_collect_env_without_a_working_torch(torch_py, says, tmp_path):
    (tmp_path / "torch.py").write_text(torch_py)
    result = run("collect-env", path=[tmp_path])
    assert result.returncode == 0, result.stderr
    assert says in result.stdout
    assert "extension: loaded" in result.stdout


def test_collect_env_with_an_extension_that_refuses():
    if _dispatch.extension_error is not None:
        pytest.skip("needs the compiled extension")
    found = json.loads(run("collect-env", "--json", LORA_KERNELS_ISA="abacus").stdout)
    assert not found["extension"]["loaded"]
    assert "abacus" in found["extension"]["error"]
    assert found["environment"] == {**found["environment"], "LORA_KERNELS_ISA": "abacus"}
    assert found["torch"]["version"] == torch.__version__
