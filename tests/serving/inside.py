"""What happens in the process of an engine; :class:`remote.Remote` asks for these functions by name."""

import contextlib
import os
import sys
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from unittest.mock import patch

import torch

OPS = ("add", "bgmv_shrink", "bgmv_expand")  # that the wrapper calls
OPS_OF_GPU_BUILDS = (
    "fused_add_rms_norm_static_fp8_quant",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm_static_fp8_quant",
    "silu_and_mul_quant",
    "silu_and_mul_nvfp4_quant",
    "fused_qk_norm_rope",
)

llm = None
_adapter_ids = {}  # by folder


def start(model, lora=True, **options):
    """An engine in place of the one before, whose steps are of few rows, so that prompts are cut up."""
    stop()
    from vllm import LLM

    global llm
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "disable_log_stats": True,
        "max_model_len": 128,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 16,
    }
    if lora:
        settings |= {"enable_lora": True, "max_lora_rank": 64}
    llm = LLM(model=str(model), **settings | options)


def start_compiled(model, **options):
    """An engine that traces, cuts up, compiles and caches its graph as vLLM does for GPUs.

    On the CPU vLLM switches that off for models with LoRA, and its passes name ops that only its GPU builds have.
    """
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    for op in OPS_OF_GPU_BUILDS:
        if not hasattr(torch.ops._C, op):
            torch.library.define(f"_C::{op}", "() -> ()")
    check = CpuPlatform.check_and_update_config

    def check_but_compile(cls, config):
        check.__func__(cls, config)
        compilation = config.compilation_config
        compilation.mode, compilation.backend, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, "inductor", []

    with patch.object(CpuPlatform, "check_and_update_config", classmethod(check_but_compile)):
        start(model, enforce_eager=False, **options)


def graphs():
    """How many graphs were compiled, and loaded, since the last time."""
    from vllm.compilation.counter import compilation_counter as counter

    counts = counter.num_aot_compiles, counter.num_aot_artifacts_loaded
    counter.num_aot_compiles = counter.num_aot_artifacts_loaded = 0
    return counts


def graph_key():
    """What vLLM's cache knows graphs with LoRA by."""
    from vllm.config import LoRAConfig

    return LoRAConfig(max_lora_rank=16).compute_hash()


def stop():
    """No engine."""
    global llm
    if llm is None:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    llm = None
    _adapter_ids.clear()
    cleanup_dist_env_and_memory()


def generate(requests, new=8, logprobs=None):
    """Greedy tokens of each request: (prompt's tokens, adapter's folder or None[, how many new ones]).

    With ``logprobs`` a pair for each request: its tokens, and for each of them {token: logprob} of the likeliest.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts, wanted, adapters = [], [], []
    for prompt, adapter, *count in requests:
        prompts.append({"prompt_token_ids": prompt})
        wanted.append(
            SamplingParams(
                temperature=0, max_tokens=(*count, new)[0], ignore_eos=True, detokenize=False, logprobs=logprobs
            )
        )
        if adapter is not None:
            id_ = _adapter_ids.setdefault(str(adapter), len(_adapter_ids) + 1)
            adapter = LoRARequest(str(adapter), id_, str(adapter))
        adapters.append(adapter)
    outputs = llm.generate(prompts, wanted, lora_request=adapters if any(adapters) else None, use_tqdm=False)
    rows = [output.outputs[0] for output in outputs]
    tokens = [list(row.token_ids) for row in rows]
    if logprobs is None:
        return tokens
    likely = [[{token: p.logprob for token, p in step.items()} for step in row.logprobs] for row in rows]
    return list(zip(tokens, likely, strict=True))


def wrappers():
    """The class that computes LoRA, in each worker."""
    return llm.collective_rpc(_wrapper)


def _wrapper(worker):
    return type(_manager(worker).punica_wrapper_mapping["language_model"]).__name__


def _manager(worker):
    return worker.model_runner.lora_manager._adapter_manager


def watched(requests, new=8):
    """(tokens, a Counter for each step of the first worker's: calls of our ops, of BatchPlan.update_, rows)."""
    llm.collective_rpc(_watch)
    try:
        tokens = generate(requests, new)
    finally:
        steps = llm.collective_rpc(_unwatch)[0]
    return tokens, steps


_watching = contextlib.ExitStack()
_steps = []


def _watch(worker):
    from lora_kernels.integrations import _vllm_wrapper
    from lora_kernels.plan import BatchPlan

    def counting(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            _steps[-1][name] += 1
            return original(*args, **kwargs)

        _watching.enter_context(patch.object(owner, name, counted))

    runner, execute = worker.model_runner, worker.model_runner.execute_model

    def step(scheduled, *args, **kwargs):
        _steps.append(Counter(rows=scheduled.total_num_scheduled_tokens))
        return execute(scheduled, *args, **kwargs)

    _steps.clear()
    _watching.enter_context(patch.object(runner, "execute_model", step))
    for name in OPS:
        counting(_vllm_wrapper, name)
    counting(BatchPlan, "update_")


def _unwatch(worker):
    _watching.close()
    return [step for step in _steps if step["rows"]]


def ranks():
    """For each adapter's folder, for each module with LoRA: the live ranks of A and B, by slice (None: not kept)."""
    return llm.collective_rpc(_ranks, args=(_adapter_ids,))[0]


def _ranks(worker, adapter_ids):
    from lora_kernels.integrations._vllm_wrapper import stack_of

    manager = _manager(worker)
    slots = {id_: slot for slot, id_ in enumerate(manager.lora_index_to_id)}
    found = {}
    for folder, id_ in adapter_ids.items():
        if id_ not in slots:
            continue
        found[folder] = {}
        for name, layer in manager.modules.items():
            stacks = stack_of(layer.lora_a_stacked), stack_of(layer.lora_b_stacked)
            found[folder][name] = [stack and stack.ranks[:, slots[id_]].tolist() for stack in stacks]
    return found


def poison():
    """NaN in all factors past each slot's live rank; returns how many values."""
    return llm.collective_rpc(_fill, args=(float("nan"),))[0]


def heal():
    """Zero there again."""
    return llm.collective_rpc(_fill, args=(0.0,))[0]


def _fill(worker, value):
    from lora_kernels.integrations._vllm_wrapper import stack_of

    filled = 0
    for layer in _manager(worker).modules.values():
        for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
            stack = stack_of(stacked)
            if stack is None:
                continue
            for factors in (stack.factors, stack.fitted):  # the same tensors, views of them, or copies
                for factor, live in zip(factors, stack.ranks.tolist(), strict=True):
                    for slot, rank in enumerate(live):
                        past = factor[slot].narrow(stack.rank_dim, rank, factor.shape[1 + stack.rank_dim] - rank)
                        past.fill_(value)
                        filled += past.numel()
    return filled


def registrations():
    """After each of a few calls of register(): the wrapper that vLLM takes, what was patched, all warnings so far."""
    import logging

    import vllm
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.platforms import current_platform

    from lora_kernels.integrations import vllm as plugin

    warned, found, known = [], {}, vllm.__version__
    listener = logging.Handler()
    listener.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("lora_kernels").addHandler(listener)

    def note(what):
        plugin.register()
        platform = type(current_platform).__dict__["get_punica_wrapper"]
        parts = platform, BaseLayerWithLoRA.set_mapping, WorkerLoRAManager._load_adapter
        found[what] = current_platform.get_punica_wrapper().rsplit(".", 1)[1], [id(part) for part in parts], [*warned]

    os.environ["LORA_KERNELS_VLLM"] = "0"
    note("switched off")
    os.environ["LORA_KERNELS_VLLM"] = "1"
    vllm.__version__ = "1.7.0"
    note("unknown version")
    note("unknown version again")
    vllm.__version__ = known
    plugin.extension_error = "no such file"
    note("no kernels")
    plugin.extension_error = None
    note("on")
    note("on again")
    return found


def on_cuda():
    """What vLLM takes for a CUDA platform, before registration and after."""
    import types

    import vllm.lora.layers  # first: on import it asks more of a platform than there is here
    import vllm.platforms
    from vllm.utils.import_utils import resolve_obj_by_qualname

    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")  # in GPU builds only
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    from lora_kernels.integrations.vllm import register

    platform = NonNvmlCudaPlatform()
    with patch.dict(vars(vllm.platforms), current_platform=platform):
        before = platform.get_punica_wrapper()
        register()
        return [resolve_obj_by_qualname(name).__name__ for name in (before, platform.get_punica_wrapper())]


def _serve(pipe):
    while True:
        try:
            name, args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            answer = True, globals()[name](*args, **kwargs)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # the interpreter's own end takes seconds


if __name__ == "__main__":
    import inside  # so that workers find by name what they are sent

    inside._serve(Connection(int(sys.argv[1])))
