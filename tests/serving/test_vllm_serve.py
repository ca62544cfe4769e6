"""The example over HTTP: vLLM's own server with our wrapper inside, held against PEFT in fp32."""

import importlib.util
import re
import signal
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version")
pytest.importorskip("peft")

import openai
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_kernels.ops import _dispatch
from lora_kernels.testing import threads

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_vllm.py"
START = 120  # seconds after which a server that does not start is a failure
WORDS = 400
RANKS = {"a": 4, "b": 8, "c": 13, "later": 16}  # 13 is none that vLLM can be set to
STATIC = ["a", "b", "c"]  # as many as there are slots: a fourth takes another's place
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUESTIONS = ["w5 w6 w7", "w300 w2", " ".join(f"w{7 * i % WORDS}" for i in range(50))]


def load_example():
    spec = importlib.util.spec_from_file_location("serve_vllm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve_vllm = load_example()
BASE = serve_vllm.BASE


def write_model(folder):
    """A random Llama that speaks in words w0, w1, ..., a token each."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=WORDS - 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{WORDS - 1}")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


def write_adapter(model, folder, rank):
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model's folder, and the adapters' by name."""
    folder = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    write_model(folder / "model")
    for name, rank in RANKS.items():
        write_adapter(folder / "model", folder / name, rank)
    return folder / "model", {name: folder / name for name in RANKS}


@pytest.fixture(scope="module")
def expected(files):
    """What PEFT answers, by adapter and question."""
    path, adapters = files
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapters["a"], adapter_name="a")
    for name in list(adapters)[1:]:
        model.load_adapter(adapters[name], adapter_name=name)

    def answer(question):
        inputs = tokenizer(question, return_tensors="pt")
        with torch.no_grad(), threads(1):
            tokens = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=WORDS - 1)
        return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()

    answers = {}
    for name in adapters:
        model.set_adapter(name)
        answers |= {(name, question): answer(question) for question in QUESTIONS}
    with model.disable_adapter():
        answers |= {(BASE, question): answer(question) for question in QUESTIONS}
    assert len({tuple(answer) for answer in answers.values()}) == len(answers), (
        "equal answers tell no adapter from another"
    )
    return answers


@pytest.fixture(scope="module")
def server(files, expected):
    """A client and the log of a server with three of the four adapters; ``expected`` first, while cores are free."""
    if _dispatch.extension_error is not None and not torch.cuda.is_available():
        pytest.skip(f"needs the compiled extension lora_kernels._C: {_dispatch.extension_error}")
    path, adapters = files
    options = ["--dtype", "float32", "--max-model-len", "128", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager"]

    def too_late(*_):
        raise TimeoutError(f"vLLM did not start within {START} s")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        for name in ("LORA_KERNELS_VLLM", "VLLM_PLUGINS", "VLLM_LOGGING_LEVEL"):
            patch.delenv(name, raising=False)
        signal.signal(signal.SIGALRM, too_late)
        signal.alarm(START)
        with serve_vllm.serving(path, {name: adapters[name] for name in STATIC}, options) as (process, client, log):
            signal.alarm(0)
            yield client, log
    assert process.returncode is not None


def words(client, pair):
    """The answer to an (adapter, question) pair."""
    return serve_vllm.ask(client, *pair).split()


def together(client, pairs):
    """The answers to pairs that are all asked at once."""
    with ThreadPoolExecutor(len(pairs)) as pool:
        return list(pool.map(partial(words, client), pairs))


def served(client):
    return {model.id for model in client.models.list()}


def test_the_engine_says_that_it_uses_our_wrapper(server):
    _, log = server
    assert re.findall(r"Using (\w*LoRA\w*|\w*Punica\w*)\.", log.read_text()) in (["LoRAKernelsCPU"], ["LoRAKernelsGPU"])


def test_all_are_served(server):
    client, _ = server
    assert served(client) == {BASE, *STATIC}


def test_alone_and_together_each_answers_as_in_peft(server, expected):
    client, _ = server
    pairs = [(name, question) for question in QUESTIONS for name in [BASE, *STATIC]]
    for pair in pairs:
        assert words(client, pair) == expected[pair], pair
    for pair, answer in zip(pairs * 2, together(client, pairs * 2), strict=True):
        assert answer == expected[pair], pair


def test_nobody_is_not_served(server):
    client, _ = server
    with pytest.raises(openai.NotFoundError, match="nobody"):
        serve_vllm.ask(client, "nobody", QUESTIONS[0])


def test_an_adapter_comes_and_goes_at_run_time(server, files, expected):
    client, _ = server
    _, adapters = files
    body = {"lora_name": "later", "lora_path": str(adapters["later"])}
    assert client.post("/load_lora_adapter", body=body, cast_to=str).startswith("Success")
    assert served(client) == {BASE, *STATIC, "later"}
    pairs = [(name, question) for name in ["later", *STATIC, BASE] for question in QUESTIONS]
    for pair, answer in zip(pairs, together(client, pairs), strict=True):
        assert answer == expected[pair], pair
    assert client.post("/unload_lora_adapter", body=body, cast_to=str).startswith("Success")
    assert served(client) == {BASE, *STATIC}
    with pytest.raises(openai.NotFoundError, match="later"):
        serve_vllm.ask(client, "later", QUESTIONS[0])
    pair = ("a", QUESTIONS[1])
    assert words(client, pair) == expected[pair]


def test_ranks_are_those_that_vllm_can_be_set_to():
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == serve_vllm.RANKS


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "somewhere"], "--adapters NAME=DIR"),
        (["--model", "somewhere", "--adapters", "nameless"], "--adapters NAME=DIR"),
        (["--model", "somewhere", "--adapters", "a=nowhere"], "nowhere/adapter_config.json"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    done = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_dies_leaves_its_last_words(files, tmp_path):
    _, adapters = files
    with pytest.raises(RuntimeError, match=f"(?s)ended with status 1.*{tmp_path.name}"):  # noqa: SIM117
        with serve_vllm.serving(tmp_path, {"a": adapters["a"]}):
            pass
