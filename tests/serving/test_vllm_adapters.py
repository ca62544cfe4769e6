"""Adapters that cannot be served: the engine says why, and goes on with the others as if nothing had been asked."""

import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import faults
from faults import FAULTS, RIGHT

from lora_kernels.testing import threads

PROMPTS = [[3 + (7 * i + 11 * row) % 500 for i in range(12)] for row in range(3)]
NEW = 6
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
LORA = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": faults.MAX_RANK}


@pytest.fixture(autouse=True)
def poisoned():
    """vLLM sees torch as users do."""


class Engine:
    """An engine in this process, and what a client and its worker see of it."""

    def __init__(self, model, **options):
        from vllm import LLM

        settings = OPTIONS | {"enable_prefix_caching": False, "disable_log_stats": True}
        self.llm = LLM(model=str(model), **settings | options)
        self.model = model
        self.core = self.llm.llm_engine

    def close(self):
        self.core.engine_core.shutdown()

    def tokens(self, *requests):
        """Greedy tokens of each request's prompt; None is a request without an adapter."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[: len(requests)]]
        outputs = self.llm.generate(prompts, sampling, lora_request=list(requests), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @property
    def manager(self):
        return self.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._adapter_manager)[0]

    def state(self):
        """What is loaded and in which slot, and whether a request waits."""
        manager = self.manager
        return set(manager.list_adapters()), list(manager.lora_index_to_id), self.core.has_unfinished_requests()


@pytest.fixture(scope="module")
def vllm_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with threads(1):
            yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return faults.model(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM")


@pytest.fixture(scope="module")
def engine(llama, vllm_environment):
    with contextlib.closing(Engine(llama, **LORA)) as engine:
        yield engine


@pytest.fixture
def other(tmp_path, vllm_environment):
    """Starts another engine for the test."""
    with contextlib.ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(contextlib.closing(Engine(model, **options)))


def asked(id_, folder, name=None):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name or folder.name, id_, str(folder))


@pytest.fixture(scope="module")
def good(engine, tmp_path_factory):
    """Two adapters that are served in one batch, and what they answer."""
    folder = tmp_path_factory.mktemp("good")
    requests = [asked(i, faults.save(folder / str(i), faults.factors(seed=i))) for i in (1, 2)]
    answer = engine.tokens(*requests, None)
    tensors = [faults.factors(seed=1), faults.factors(seed=2), {}]
    assert answer == [merged(engine.model, t, {}, row) for row, t in enumerate(tensors)]
    return requests, answer


def with_adapter(net, tensors, config):
    """A model of transformers with an adapter's product added to its weights."""
    config = {"r": 8, "lora_alpha": 16} | config
    for name, a in tensors.items():
        module, found, tail = re.sub(r"^base_model\.model\.", "", name).partition(".lora_")
        if not found or "A" not in tail:
            continue
        last = module.rpartition(".")[2]
        r = config.get("rank_pattern", {}).get(last, config["r"])
        alpha = config.get("alpha_pattern", {}).get(last, config["lora_alpha"])
        product = tensors[re.sub(r"A(?=$|\.weight)", "B", name)] @ a
        weight = net.get_submodule(module).weight
        weight.data += (
            alpha / (math.sqrt(r) if config.get("use_rslora") else r) * (product.T if "embedding" in tail else product)
        )
    return net


def merged(model, tensors, config, row=0):
    """Greedy tokens of a model with an adapter, as transformers finds them."""
    from transformers import AutoModelForCausalLM

    net = with_adapter(AutoModelForCausalLM.from_pretrained(model), tensors, config)
    ids = torch.tensor([PROMPTS[row]])
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat((ids, net(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, -NEW:].tolist()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_else_changes(engine, good, tmp_path, fault):
    requests, answer = good
    tensors, config, says = FAULTS[fault]
    bad = asked(7, faults.save(tmp_path / "bad", tensors, **config))
    refused = rf"LoRA adapter 'bad' \({re.escape(str(tmp_path))}/bad\) cannot be served: .*{says}"
    assert engine.tokens(*requests, None) == answer
    before = engine.state()

    with pytest.raises(ValueError, match=refused):
        engine.core.add_lora(bad)
    assert engine.state() == before
    with pytest.raises(ValueError, match=refused):
        engine.tokens(requests[0], bad)
    assert engine.state() == before
    assert engine.tokens(*requests, None) == answer

    faults.save(tmp_path / "bad", faults.factors(seed=3))
    assert engine.core.add_lora(bad)
    assert engine.tokens(bad) == [merged(engine.model, faults.factors(seed=3), {})]
    assert engine.core.remove_lora(7)


@pytest.mark.parametrize("kind", RIGHT)
def test_what_can_be_served_is(engine, tmp_path, kind):
    tensors, config = RIGHT[kind]
    request = asked(8, faults.save(tmp_path / "right", tensors, **config))
    answer = engine.tokens(request)
    assert engine.core.remove_lora(8)
    assert answer == [merged(engine.model, tensors, config)]
    assert answer != engine.tokens(None)


def test_an_activation_that_fails_leaves_nothing(engine, good, tmp_path, monkeypatch):
    requests, answer = good
    request = asked(7, faults.save(tmp_path / "late", faults.factors(seed=3)))
    before = engine.state()
    module = engine.manager.modules[faults.DOWN2]

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "set_lora", fail)
        with pytest.raises(ValueError, match=r"adapter 'late' .* cannot be served: out of memory"):
            engine.core.add_lora(request)
    assert engine.state()[0] == before[0] - {7}
    assert 7 not in engine.state()[1]
    assert engine.tokens(*requests, None) == answer
    assert engine.tokens(request) == [merged(engine.model, faults.factors(seed=3), {})]
    assert engine.core.remove_lora(7)


def test_what_replaces_an_adapter_has_to_be_right(engine, good, tmp_path):
    from vllm.lora.request import LoRARequest

    requests, answer = good
    assert engine.tokens(*requests, None) == answer
    before = engine.state()
    folder = faults.save(tmp_path / "new", FAULTS["nan"][0])
    with pytest.raises(ValueError, match="lora_A has values that are not finite"):
        engine.core.add_lora(LoRARequest(requests[0].lora_name, 1, str(folder), load_inplace=True))
    assert engine.state() == before
    assert engine.tokens(*requests, None) == answer


def test_an_adapter_is_read_again_once_it_was_removed(engine, tmp_path):
    folder = faults.save(tmp_path / "changing", faults.factors(seed=3))
    request = asked(7, folder)
    assert engine.tokens(request) == [merged(engine.model, faults.factors(seed=3), {})]
    assert engine.core.remove_lora(7)
    faults.save(folder, FAULTS["no B"][0])
    with pytest.raises(ValueError, match="lora_B is missing"):
        engine.tokens(request)
    assert not engine.core.has_unfinished_requests()


def test_a_missing_folder_is_vllms_error(engine, tmp_path):
    from vllm.exceptions import LoRAAdapterNotFoundError

    with pytest.raises(LoRAAdapterNotFoundError):
        engine.tokens(asked(7, tmp_path / "nowhere"))
    assert not engine.core.has_unfinished_requests()


def test_without_lora_an_adapter_is_vllms_error(other, llama, tmp_path):
    from vllm.exceptions import VLLMValidationError

    engine = other(llama)
    with pytest.raises(VLLMValidationError, match="LoRA is not enabled"):
        engine.tokens(asked(1, tmp_path))
    assert engine.tokens(None) == [merged(llama, {}, {})]


def test_modules_that_are_fused_in_checkpoints_too(other, tmp_path):
    phi = faults.model(tmp_path / "phi", "Phi3ForCausalLM")
    engine = other(phi, **LORA)
    tensors = faults.factors(faults.FUSED)
    assert engine.tokens(asked(1, faults.save(tmp_path / "right", tensors))) == [merged(phi, tensors, {})]
    name = "model.layers.0.self_attn.qkv_proj"
    tensors[faults.key(name, "B")] = tensors[faults.key(name, "B")][: faults.HIDDEN]
    with pytest.raises(ValueError, match=rf"{name}: lora_B is \[{faults.HIDDEN}, 8\], not \[256, rank\]"):
        engine.tokens(asked(2, faults.save(tmp_path / "wrong", tensors)))


def test_modules_that_have_no_lora_in_a_deployment(other, llama, tmp_path):
    engine = other(llama, **LORA, lora_target_modules=["o_proj", "k_proj"])
    attention = {name: faults.LINEARS[name] for name in ("self_attn.k_proj", "self_attn.o_proj")}
    request = asked(1, faults.save(tmp_path / "all", faults.factors(faults.DOWN) | faults.factors(attention)))
    assert engine.tokens(request) == [merged(llama, faults.factors(attention), {})]
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj: the model has no such module"):
        engine.tokens(asked(2, faults.save(tmp_path / "deeper", faults.factors(faults.DOWN, [3]))))


@pytest.mark.parametrize("path", ("model.layers", "layers"))
def test_names_in_a_classifier(other, tmp_path, path):
    """Their first part may be missing, as in an adapter of the model without its head."""
    from transformers import AutoModelForSequenceClassification

    model = faults.model(tmp_path / "model", "LlamaForSequenceClassification", num_labels=3)
    engine = other(model, runner="pooling", **LORA)

    def labels(request):
        (output,) = engine.llm.classify([{"prompt_token_ids": PROMPTS[0]}], lora_request=request, use_tqdm=False)
        return output.outputs.probs

    tensors = faults.factors()
    net = with_adapter(AutoModelForSequenceClassification.from_pretrained(model), tensors, {})
    with torch.no_grad():
        expected = net(torch.tensor(PROMPTS[:1])).logits.softmax(-1)[0].tolist()
    request = asked(1, faults.save(tmp_path / "right", faults.factors(path=path)))
    assert labels(request) == pytest.approx(expected, rel=1e-3)
    tensors = {name: t[:, :-1] if "q_proj.lora_A" in name else t for name, t in faults.factors(path=path).items()}
    with pytest.raises(ValueError, match=rf"{path}.0.self_attn.q_proj: lora_A is \[8, 127\], not \[rank, 128\]"):
        labels(asked(2, faults.save(tmp_path / "wrong", tensors)))


class Server:
    """vLLM's server of two workers, in processes of its own, and what is asked of it."""

    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = OPTIONS | LORA | {"model": model, "served_model_name": "base", "port": port, "host": "127.0.0.1"}
        options |= {"tensor_parallel_size": 2, "disable_log_stats": True}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        for name, value in options.items():
            flag = name.replace("_", "-")
            command += [f"--{'no-' if value is False else ''}{flag}"] + (
                [str(value)] if type(value) is not bool else []
            )
        path = os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        self.log = log
        self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.wait()

    def wait(self):
        until = time.monotonic() + 180
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(f"{self.url}/health"):
                return
            time.sleep(0.2)
        self.close()
        self.log.seek(0)
        raise RuntimeError(f"no server: {self.log.read()[-4000:]}")

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def post(self, path, **body):
        """The status and the text of an answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def load(self, name, folder, **more):
        return self.post("load_lora_adapter", lora_name=name, lora_path=str(folder), **more)

    def complete(self, name, row=0):
        return self.post(
            "completions", model=name, prompt=PROMPTS[row], max_tokens=NEW, temperature=0, ignore_eos=True,
            return_token_ids=True,
        )  # fmt: skip

    def tokens(self, name, row=0):
        status, text = self.complete(name, row)
        assert status == 200, text
        return json.loads(text)["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w+") as file, contextlib.closing(Server(llama, file)) as server:
        yield server


def test_a_server_goes_on_after_every_fault(server, llama, tmp_path):
    tensors = {name: faults.factors(seed=seed) for name, seed in (("one", 1), ("two", 2))}
    expected = {name: merged(llama, t, {}) for name, t in tensors.items()} | {"base": merged(llama, {}, {})}
    for name, t in tensors.items():
        assert server.load(name, faults.save(tmp_path / name, t))[0] == 200
    for fault, (t, config, says) in FAULTS.items():
        status, text = server.load("bad", faults.save(tmp_path / fault, t, **config))
        assert (fault, status) == (fault, 400)
        assert re.search(f"LoRA adapter 'bad' .*cannot be served: .*{says}", json.loads(text)["error"]["message"])
        assert server.complete("bad")[0] == 404
        assert {name: server.tokens(name) for name in expected} == expected
    assert server.load("bad", tmp_path / "nowhere")[0] == 404
    assert server.load("bad", faults.save(tmp_path / "nan", faults.factors(seed=3)))[0] == 200
    assert server.tokens("bad") == merged(llama, faults.factors(seed=3), {})


def test_a_request_whose_adapter_has_gone_bad_is_refused(server, llama, tmp_path):
    """vLLM drops what was not used for long, and reads it again when it is asked for."""
    folders = [faults.save(tmp_path / f"r{i}", faults.factors(seed=i)) for i in range(1 + LORA["max_cpu_loras"])]
    for folder in folders:
        assert server.load(folder.name, folder)[0] == 200
    faults.save(folders[0], FAULTS["smaller model"][0])
    status, text = server.complete("r0")
    assert status == 400
    assert "LoRA adapter 'r0' (<path>) cannot be served" in text
    assert server.tokens("r3") == merged(llama, faults.factors(seed=3), {})
    faults.save(folders[0], faults.factors(seed=5))
    assert server.tokens("r0") == merged(llama, faults.factors(seed=5), {})
