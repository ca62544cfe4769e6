"""What the vLLM plug-in asks of a GPU: its factors in captured graphs, and vLLM itself where it is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import bitwise_equal

SLOTS, RANK, ROWS = 4, 16, 32


def test_one_graph_serves_steps_of_padded_rows_and_swapped_adapters():
    """As an engine captures a step: padded rows, slots whose adapters change, steps without any."""
    torch.manual_seed(0)
    K, widths = 256, (256, 64, 64)
    stacks = [
        tuple(torch.zeros(SLOTS, 1, *shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        for shapes in ([(RANK, K)] * 3, [(width, RANK) for width in widths])
    ]
    A, B = (tuple(t.squeeze(1) for t in stack) for stack in stacks)
    ranks = torch.zeros(3, SLOTS, dtype=torch.int32, device="cuda")
    x = torch.randn(ROWS, K, device="cuda").bfloat16()
    y = torch.empty(ROWS, sum(widths), dtype=torch.bfloat16, device="cuda")
    plan = lk.BatchPlan.empty(2 * ROWS, SLOTS, "cuda")

    def step():
        y.zero_()
        lk.bgmv(y, x, A, B, plan, ranks=ranks)

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, live_rows in enumerate((ROWS, 5, 0, 17)):
        for s in range(3):
            A[s][seed % SLOTS, : seed + 3] = torch.randn(seed + 3, K, device="cuda").bfloat16() / 16
            B[s][seed % SLOTS, :, : seed + 3] = torch.randn(widths[s], seed + 3, device="cuda").bfloat16()
        ranks[:, seed % SLOTS] = seed + 3
        ids = torch.randint(-1, SLOTS, (live_rows,), device="cuda")
        plan.update_(ids)
        graph.replay()
        padded = torch.cat([ids, ids.new_full((ROWS - live_rows,), -1)])
        with lk.backend("reference"):
            want = lk.bgmv(torch.zeros_like(y), x, A, B, padded)
        torch.testing.assert_close(y, want)
        assert bitwise_equal(y[padded < 0], torch.zeros_like(y[padded < 0]))


ENGINE = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, eager = Path(sys.argv[1]), sys.argv[2] == "eager"
if not folder.joinpath("model").exists():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )).bfloat16()
    model.save_pretrained(folder / "model")
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
llm = LLM(str(folder / "model"), skip_tokenizer_init=True, enable_lora=True, max_loras=2, max_lora_rank=32,
          enforce_eager=eager, gpu_memory_utilization=0.2, max_model_len=256, dtype="bfloat16")
one = LoRARequest("one", 1, str(folder / "adapter"))
prompts = [{"prompt_token_ids": [5 + i, 6, 7]} for i in range(4)]
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
for requests in ([one, None, one, None], None):
    print([list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, lora_request=requests)])
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("mode", ("eager", "graphs"))
def test_an_engine_gives_its_own_tokens(mode, tmp_path):
    """The plug-in's tokens are those of vLLM's kernels, and adapters make a difference."""
    answers = {}
    for plugin in "01":
        run = subprocess.run(
            [sys.executable, "-c", ENGINE, str(tmp_path), mode],
            env={**os.environ, "LORA_KERNELS_VLLM": plugin}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        assert ("LoRAKernelsGPU" in run.stdout + run.stderr) == (plugin == "1")
        answers[plugin] = [line for line in run.stdout.splitlines() if line.startswith("[[")]
    assert answers["1"] == answers["0"]
    with_adapter, without = answers["1"]
    assert with_adapter != without
