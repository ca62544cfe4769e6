import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.testing import ratio

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
COMMITTED = sorted(BENCHMARKS.glob("results/*/*.json"))
README = """# Title
<!-- benchmarks:low_rank -->
stale
<!-- /benchmarks:low_rank -->
between
<!-- benchmarks:peft -->
<!-- /benchmarks:peft -->
<!-- benchmarks:training -->
<!-- /benchmarks:training -->
<!-- benchmarks:gpu -->
<!-- /benchmarks:gpu -->
end
"""


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def report():
    import report

    return report


def entries(group, times, **info):
    """What the benchmarks write for one case; ``times`` are seconds by provider."""
    return [
        {
            "group": group,
            "extra_info": {
                **info,
                "provider": name,
                "ratios": {other: ratio([own] * 31, [time] * 31) for other, time in times.items() if other != name},
            },
            "stats": {"median": own, "rounds": 31},
        }
        for name, own in times.items()
    ]


@pytest.fixture
def found():
    op = {"K": 4096, "N": 4096, "R": 16, "L": 8, "dtype": "bfloat16", "adapter_bytes": 2e6, "bound": 2e-4}
    op["rates"] = {"read": 10e9}
    step = {"rows": 8, "tokens": 64, "model": "a model", "R": 16, "L": 8}
    steps = {"base model": 0.1, "PEFT": 0.4, "addmm": 0.2, "lora_kernels": 0.11}
    return {
        "machine_info": {
            "device": "cpu-x-amx-2threads",
            "cpu": "X",
            "instruction_set": "amx",
            "threads": 2,
            "torch": "2.13.0",
            "triton": None,
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [
            *entries("bgmv, 8 rows", {"lora_kernels": 250e-6, "addmm loop": 1e-3, "gather + einsum": 2e-3}, **op),
            *entries("sgmv, 8 segments × 128 rows", {"lora_kernels": 4e-3, "addmm loop": 6e-3}, **op),
            *entries("call overhead", {"bgmv": 4.25e-6, "torch.addmm": 2e-6}),
            *entries("roofs", {"read": 0.01, "float32": 0.1}, amounts={"read": 1e8, "float32": 1e10}),
            *entries("step, mixed", steps, **step, mixed=True, adapters="bf16"),
            *entries("step, one", {**steps, "lora_kernels": 0.104}, **step, mixed=False, adapters="fp32 masters"),
        ],
    }


@pytest.fixture
def saved(found, tmp_path):
    path = tmp_path / "results" / "low_rank.json"
    path.parent.mkdir()
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    return path


def cells(text, first):
    """The cells of the markdown row that begins with ``first``."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_tables_say_what_the_results_say(report, found, tmp_path):
    text = report.insert(README, [report.Result(found)], tmp_path)
    assert cells(text, "bgmv, 8 rows") == ["250", "8.0", "80%", "80%", "4.0× [4.0, 4.0]", "8.0× [8.0, 8.0]"]
    assert cells(text, "sgmv, 8 segments × 128 rows") == ["4000", "0.5", "5%", "5%", "1.5× [1.5, 1.5]", ""]
    assert cells(text, "one call") == ["4.2", "2.0"]
    assert cells(text, "roof") == ["10", "100"]
    both = ["100.0 ms", "4.00× [4.00, 4.00]", "2.00× [2.00, 2.00]"]
    assert cells(text, "8 × 64, mixed") == ["bf16", *both, "1.10× [1.10, 1.10]"]
    assert cells(text, "8 × 64, one adapter") == ["fp32 masters", *both, "1.04× [1.04, 1.04]"]
    assert "X, amx, 2 threads; torch 2.13.0; medians of 31 rounds" in text
    assert "2026-01-02, 012345678" in text


def test_each_table_is_whole(report, found, tmp_path):
    text = report.insert(README, [report.Result(found)], tmp_path)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_only_what_is_marked_changes(report, found, tmp_path):
    text = report.insert(README, [report.Result(found)], tmp_path)
    assert "stale" not in text
    assert report.MARKED.sub(r"\1\4", text) == report.MARKED.sub(r"\1\4", README)
    assert report.insert(text, [report.Result(found)], tmp_path) == text


def test_what_has_no_result_is_not_yet_measured(report, found, tmp_path):
    text = report.insert(README, [], tmp_path)
    assert text.count("CPU: not yet measured.") == text.count("GPU: not yet measured.") == 3
    text = report.insert(README, [report.Result(found)], tmp_path)
    assert text.count("CPU: not yet measured.") == 1  # of training
    assert text.count("GPU: not yet measured.") == 3
    text = report.insert(README, [report.Result(found), report.Result(on_gpu())], tmp_path)
    assert text.count("GPU: not yet measured.") == 2  # of the patched model, and in training


def in_training(found):
    step = {"rows": 8, "tokens": 64, "model": "a model", "R": 16, "kind": "LoRA", "target": 1.12}
    layer = {"M": 512, "K": 2048, "N": 1024, "R": 16, "kind": "LoRA", "target": 1.1}
    layer["kept"] = {"PEFT": 4 * 2**20, "lora_kernels": 32 * 2**10}
    layer["errors"] = {"0.2": {"PEFT": 2.32e-3, "lora_kernels": 1.66e-3}}
    dora = {**layer, "kind": "DoRA, dropout", "target": None, "errors": {}}
    times = {"base": 0.02, "PEFT": 0.03, "lora_kernels": 0.022}
    # PEFT was timed in a case of its own, beside the base.
    seldom = [*entries("", {"base": 0.1, "lora_kernels": 0.11}), *entries("", {"base": 0.2, "PEFT": 0.8})]
    kept = [seldom[0], seldom[3], seldom[1]]
    for entry in kept:
        entry["group"] = "training step, LoRA"
        entry["extra_info"] |= step
    others = [*entries("training layer, LoRA", times, **layer), *entries("training layer, DoRA", times, **dora)]
    return {**found, "benchmarks": [*kept, *others]}


def test_training_tables_say_what_the_results_say(report, found, tmp_path):
    text = report.insert(README, [report.Result(in_training(found))], tmp_path)
    steps, layers = text[: text.index("A linear layer")], text[text.index("A linear layer") :]
    assert "A step of a model, 8 × 64 tokens" in steps
    assert cells(steps, "LoRA") == ["100.0 ms", "4.00× [4.00, 4.00]", "1.10× [1.10, 1.10]", "1.12×"]
    assert "2048 × 1024, on 512 rows" in layers
    times, kept = layers.split("KiB:")
    both = ["20.0 ms", "1.50× [1.50, 1.50]", "1.10× [1.10, 1.10]"]
    assert cells(times, "LoRA") == [*both, "1.10×"]
    assert cells(times, "DoRA, dropout") == [*both, ""]
    assert cells(kept, "LoRA") == cells(kept, "DoRA, dropout") == ["4096", "32"]
    assert cells(kept, "0.2") == ["2.32e-03", "1.66e-03"]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def in_4_bits(found):
    layer = {"M": 8, "K": 4096, "N": 2048, "R": 16, "bound": 5e-4}
    forward = {**layer, "targets": {"bitsandbytes": 1.2}}
    memory = {"lora_kernels": [4e6, 9e6, None], "PEFT": [34e6, 36e6, 42e6]}
    trained = {**layer, "M": 64, "targets": {"PEFT": 0.2}, "memory": memory, "freed_memory_kept": True}
    step = {"rows": 8, "tokens": 64, "model": "a model", "R": 16, "targets": {"PEFT": 1 / 1.8}}
    both = {"PEFT": 0.02, "lora_kernels": 0.005}
    others = [
        *entries("quantized forward, 8 rows", {"lora_kernels": 1e-3, "bitsandbytes": 8e-4, "PEFT": 0.02}, **forward),
        *entries("quantized training, 64 rows", both, **trained),
        *entries("quantized training, 64 rows, returned", both, **{**trained, "freed_memory_kept": False}),
        *entries("quantized adapters", {"one": 1e-3, "several": 1.1e-3}, **layer, share=1.19),
        *entries("quantized formats, 8 rows", {"bf16": 2e-3, "nf4": 1e-3, "int8": 1.5e-3}, **layer),
        *entries("quantized step", {"PEFT": 2.0, "lora_kernels": 1.0}, **step, freed_memory_kept=True),
    ]
    return {**found, "benchmarks": others}


def test_tables_of_packed_weights_say_what_the_results_say(report, found, tmp_path):
    marked = "<!-- benchmarks:quantized -->\n<!-- /benchmarks:quantized -->\n"
    text = report.insert(marked, [report.Result(in_4_bits(found))], tmp_path)
    forward, trained, memory, adapters, formats, step = (f"|{table}" for table in text.split(":\n\n|")[1:])
    assert "An NF4 layer, 4096 × 2048, with an adapter of rank 16, forward:" in text
    close = ["1.00 ms", "50%", "1.25× [1.25, 1.25], target 1.20×", "0.050× [0.050, 0.050]"]
    assert cells(forward, "8") == close
    both = ["5.00 ms", "10%", "0.25× [0.25, 0.25], target 0.20×"]
    assert cells(trained, "64") == cells(trained, "64, memory returned") == both
    assert cells(memory, "64") == ["4 / 9 /", "34 / 36 / 42"]
    assert "returned" not in memory
    assert cells(adapters, "8") == ["1.00 ms", "1.10× [1.10, 1.10]", "1.19×"]
    assert cells(formats, "8") == ["2.00 ms", "0.50× [0.50, 0.50]", "0.75× [0.75, 0.75]"]
    assert cells(step, "step") == ["1000.00 ms", "0.50× [0.50, 0.50], target 0.56×"]
    assert report.insert(marked, [], tmp_path).count("not yet measured") == 2
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def spectral(found):
    case = {"method": "FourierFT", "formula": "s · Re(ifft2(S))", "paper": "arXiv 2405.03003", "n": 1000, "K": 2048}
    case |= {
        "N": 2048,
        "bound": 2e-4,
        "memory": {name: [4e6, 9e6, None] for name in ("lora_kernels", "PEFT", "the layer alone")},
    }
    times = {"lora_kernels": 1e-3, "PEFT": 0.09, "the layer alone": 0.02}
    others = [
        *entries("spectral FourierFT, 2048, 1 rows", times, **case, M=1),
        *entries("spectral FourierFT, 2048, 64 rows", {**times, "PEFT": 0.1}, **case, M=64),
        *entries("spectral WaveFT, 2048, 64 rows", times, **{**case, "method": "WaveFT", "formula": "idwt2"}, M=64),
    ]
    return {**found, "benchmarks": others}


def test_tables_of_spectral_adapters_say_what_the_results_say(report, found, tmp_path):
    marked = "<!-- benchmarks:spectral -->\n<!-- /benchmarks:spectral -->\n"
    text = report.insert(marked, [report.Result(spectral(found))], tmp_path)
    methods, times, memory = (f"|{table}" for table in text.split(":\n\n|")[1:])
    assert (
        "What the adapter adds to a frozen layer's forward and backward pass, fp32, 1000 values: PEFT's time over ours"
        in text
    )
    layer = "FourierFT, 2048 × 2048"
    said = ["`s · Re(ifft2(S))`", "arXiv 2405.03003"]
    assert cells(methods, "method") == ["ΔW", "paper", "1 row", "64 rows"]
    assert cells(methods, layer) == [*said, "90× [90, 90]", "100× [100, 100]"]
    assert cells(methods, "WaveFT, 2048 × 2048") == ["`idwt2`", said[1], "", "90× [90, 90]"]
    assert cells(times, f"{layer}, 64") == ["20.00 ms", "1.000 ms", "20%", "100.0 ms"]
    assert cells(memory, f"{layer}, 1") == ["4 / 9 /"] * 3
    assert report.insert(marked, [], tmp_path).count("not yet measured") == 2
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def of_transforms(found):
    info = {"M": 256, "N": 4096, "dtype": "fp32", "threads": 2, "bound": 5e-4, "peers": {"scipy": "1.2.3"}}
    times = {"lora_kernels": 1e-3, "a copy": 8e-4, "plain PyTorch": 0.02}
    others = [
        *entries("transforms wht-256-4096-fp32", times, **info),
        *entries("transforms dct-256-4096-fp32-alone", {**times, "scipy": 4e-3}, **{**info, "threads": 1}),
        *entries("transforms dct-256-4096-fp32", times, **info),
    ]
    return {**found, "benchmarks": others}


def test_tables_of_transforms_say_what_the_results_say(report, found, tmp_path):
    marked = "<!-- benchmarks:transforms -->\n<!-- /benchmarks:transforms -->\n"
    text = report.insert(marked, [report.Result(of_transforms(found))], tmp_path)
    hadamard, cosine = text.split("The cosine transform, `dct`:")
    assert "The Walsh-Hadamard transform, `wht`:" in hadamard
    both = ["1.00 ms", "80% [80%, 80%]", "50%", "20.0× [20.0, 20.0]"]
    assert cells(hadamard, "256 × 4096, fp32") == both
    assert cells(cosine, "rows × length")[-1] == "scipy 1.2.3 takes"
    assert cells(cosine, "256 × 4096, fp32, one thread") == [*both, "4.0× [4.0, 4.0]"]
    assert cells(cosine, "256 × 4096, fp32") == [*both, ""]
    assert report.insert(marked, [], tmp_path).count("not yet measured") == 2
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def on_gpu():
    times = {"lora_kernels": {"alone_us": 4.0, "exposed_us": 3.0}, "addmm loop": {"alone_us": 20.0, "exposed_us": 21.0}}
    case = {"site": "o", "rows": 8, "adapters": 2, "rank": 16, "floor_us": 2.0, "base_us": 17.0, "providers": times}
    only_ours = {**case, "rows": 64, "providers": {"lora_kernels": times["lora_kernels"]}}
    machine = {"device": "gpu-y", "gpu": "Y", "torch": "2.11.0", "triton": "3.6.0"}
    roofs = {"read": 3e12, "copy": 2e12, "bf16": 8e14}
    return {
        "machine_info": machine,
        "datetime": "2026-01-02",
        "replays": 20,
        "roofs": roofs,
        "cases": [case, only_ours],
    }


def test_a_gpu_table_says_what_the_result_says(report, tmp_path):
    text = report.insert(README, [report.Result(on_gpu())], tmp_path)
    assert cells(text, "o, 8 × 2") == ["17.0", "2.0", "4.0", "3.0", "50%", "5.0×"]
    assert cells(text, "o, 64 × 2") == ["17.0", "2.0", "4.0", "3.0", "50%", ""]
    assert cells(text, "roof") == ["3.00", "2.00", "800"]
    assert "Y; torch 2.11.0, triton 3.6.0; medians of 20 replays" in text


def test_a_gpu_result_of_all_ranks_shows_them_its_peers_plans_and_training(report, tmp_path):
    found = on_gpu()
    peer = {"vLLM": {"alone_us": 10.0, "exposed_us": 11.0}}
    case = {**found["cases"][0], "rows": 64, "adapters": 64}
    case["providers"] = case["providers"] | peer
    found["cases"].append({**case, "rows": 256})
    found["cases"] += [{**case, "rank": rank} for rank in (8, 128, "mixed")]
    found["cases"] += [{**case, "rank": 8, "rows": 8}, {**case, "site": "Qwen down"}]
    found["plans"] = [{"rows": 64, "adapters": 8, "us": 5.25}, {"rows": 256, "adapters": 64, "us": 6.5}]
    found["training"] = [{"site": "o", "rows": 2048, "adapters": 8, "rank": 16,
                          "us": {"lora_kernels": 200.0, "torch loop": 900.0}}]  # fmt: skip
    text = report.insert(README, [report.Result(found)], tmp_path)
    assert cells(text, "o, 8 × 2") == ["17.0", "2.0", "4.0", "3.0", "50%", "5.0×", ""]
    assert cells(text, "o, 256 × 64") == ["17.0", "2.0", "4.0", "3.0", "50%", "5.0×", "2.5×"]
    for row in ("o, 64 × 64, 8", "o, 64 × 64, 128", "o, 64 × 64, mixed", "Qwen down, 64 × 64, 16"):
        assert cells(text, row) == ["17.0", "2.0", "4.0", "3.0", "50%", "5.0×", "2.5×"]
    assert "o, 8 × 64, 8" not in text
    assert text.count("vLLM takes") == 2
    assert cells(text, "rows × adapters") == ["64 × 8", "256 × 64"]
    assert cells(text, "one plan") == ["5.2", "6.5"]
    assert cells(text, "o, 2048 × 8") == ["200", "4.5×"]
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing", "no marker"),
        ("<!-- benchmarks:other -->\n<!-- /benchmarks:other -->\n", "unknown marker other"),
        ("<!-- benchmarks:peft -->\n", "has no <!-- /benchmarks:NAME -->"),
    ],
)
def test_bad_markers_are_errors(report, readme, saved, capsys, text, message):
    readme.write_text(text)
    with pytest.raises(SystemExit):
        report.main([str(saved), "--readme", str(readme)])
    assert message in capsys.readouterr().err
    assert readme.read_text() == text


def test_check_fails_until_the_readme_is_written(report, readme, saved, capsys):
    command = [str(saved), "--readme", str(readme)]
    assert report.main([*command, "--check"]) == 1
    assert "is not what the results say" in capsys.readouterr().out
    assert readme.read_text() == README
    assert report.main(command) == 0
    assert report.main([*command, "--check"]) == 0


def test_print_shows_every_row(report, saved, capsys):
    assert report.main([str(saved), "--print"]) == 0
    out = capsys.readouterr().out
    for text in ("bgmv, 8 rows", "4.0× [4.0, 4.0]", "8 × 64, mixed", "1.10× [1.10, 1.10]"):
        assert text in out


def test_the_picture_is_small_the_same_twice_and_in_the_readme(report, saved, readme):
    pytest.importorskip("matplotlib")
    picture = saved.with_suffix(".svg")
    for _ in range(2):
        assert report.main([str(saved), "--picture"]) == 0
        first = picture.read_bytes()
    report.main([str(saved), "--picture", "--readme", str(readme)])
    assert picture.read_bytes() == first
    assert 1000 < len(first) < 100_000
    assert "(results/low_rank.svg)" in readme.read_text()


def test_committed_results_name_no_machine():
    for path in COMMITTED:
        text = path.read_text()
        assert path.parent.name == json.loads(text)["machine_info"]["device"]
        assert not re.search(r'"node"|"/\w|/home/', text), path


@pytest.mark.skipif(not COMMITTED, reason="no committed result")
def test_the_readme_has_the_committed_results(report, monkeypatch):
    standing = {match[3]: match[0] for match in report.MARKED.finditer((ROOT / "README.md").read_text())}
    inner = standing["patch"].split("\n", 1)[1].rsplit("\n", 1)[0]
    monkeypatch.setitem(report.GENERATED, "patch", lambda: inner)
    assert report.main(["--readme", str(ROOT / "README.md"), "--check"]) == 0


def test_the_readme_says_what_patch_makes_fast(report):
    """As the layers themselves say, of the PEFT that it names."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    text = (ROOT / "README.md").read_text()
    if f"PEFT {peft.__version__}, LoRA:" not in text:
        pytest.skip("the README is of another PEFT")
    made = report.patch()
    assert f"<!-- generated:patch -->\n{made}\n<!-- /generated:patch -->" in text
    for row in ("| DoRA, with dropout | fast |", "| VeRA | `λ_b∘(B (λ_d∘A x))` | fast |", "IA3, "):
        assert row in made


def test_what_patch_makes_fast_follows_the_code(report, monkeypatch):
    """A tuner that is taken out of the table, and a variant that is refused, are not called fast."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from lora_kernels.integrations import _peft_reason, _peft_relatives

    monkeypatch.setattr(_peft_reason, "KASA", None)
    vera = next(cls for cls, tuner in _peft_relatives.CLASSES.items() if tuner.tuner == "VeRA")
    monkeypatch.delitem(_peft_relatives.CLASSES, vera)
    made = report.patch()
    assert "| KaSA | PEFT's own forward: Kasa variant |" in made
    assert "| VeRA |" not in made
    assert ", VERA | " in made


@pytest.mark.parametrize(
    "cpu, device",
    [
        ("Intel(R) Xeon(R) Processor", "cpu-xeon-amx-2threads"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "cpu-core-i7-8700k-amx-2threads"),
        ("AMD EPYC 7763 64-Core Processor", "cpu-epyc-7763-amx-2threads"),
        ("", "cpu-amx-2threads"),
    ],
)
def test_a_device_has_a_name(monkeypatch, cpu, device):
    import machine

    monkeypatch.setattr(machine, "cpu_name", lambda: cpu)
    monkeypatch.setattr(machine, "instruction_set", lambda: "amx")
    monkeypatch.setattr(machine.torch, "get_num_threads", lambda: 2)
    assert machine.slug() == device


def test_what_computes_something_else_is_not_timed():
    import compare

    oracle = torch.randn(64, 64, dtype=torch.float64)
    plain = oracle.bfloat16()
    compare.check({compare.OURS: plain, "other": plain}, oracle, plain)
    for name in (compare.OURS, "other"):
        with pytest.raises(AssertionError, match=name):
            compare.check({name: plain + 0.1}, oracle, plain)
        with pytest.raises(AssertionError, match=name):
            compare.check({name: torch.full_like(plain, torch.nan)}, oracle, plain)


def test_a_bound_is_flops_and_bytes_over_what_was_measured():
    import roofs

    work = roofs.Work(flops=3 * 10**9, bytes=2 * 10**9)
    assert roofs.bound(work, {"read": 10e9, "bfloat16": 30e9}) == pytest.approx(0.3)
    assert roofs.bound(work, {"read": 10e9, "copy": 20e9, "bfloat16": 30e9}) == pytest.approx(0.2)
