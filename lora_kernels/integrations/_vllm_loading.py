"""When vLLM reads an adapter, and what becomes of one that it cannot serve.

vLLM reads a request's adapter in the step that first runs it. What is wrong with it ends the engine there, or, where
the engine is in the caller's process, leaves a request behind that stops every later one. Here the adapter is read when
a request first asks for it, so that this request is refused and nothing else is touched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ._vllm_adapters import check_adapter

logger = logging.getLogger("lora_kernels")

REFUSED = "cannot be served: "


def install() -> None:
    """Have vLLM check adapters, undo what it did with one that failed, and read them before their requests."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    WorkerLoRAManager._load_adapter = _checked(WorkerLoRAManager._load_adapter)
    LoRAModelManager.activate_adapter = _whole_or_gone(LoRAModelManager.activate_adapter)
    Executor.add_lora = _add_lora
    LLMEngine.add_request = _read_first(LLMEngine.add_request)
    AsyncLLM.add_request = _read_first_async(AsyncLLM.add_request)
    for engine in (LLMEngine, AsyncLLM):
        engine.remove_lora = _forgotten(engine.remove_lora)
    OpenAIServingModels.load_lora_adapter = _client_error(OpenAIServingModels.load_lora_adapter)


def _checked(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_adapter)
    def load(worker: Any, request: Any) -> Any:
        adapter = load_adapter(worker, request)
        check_adapter(adapter, worker._adapter_manager)
        return adapter

    return load


def _whole_or_gone(activate_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(activate_adapter)
    def activate(manager: Any, adapter_id: int) -> bool:
        try:
            return activate_adapter(manager, adapter_id)
        except BaseException:
            manager.remove_adapter(adapter_id)  # or it would count as loaded, with some of its modules
            raise

    return activate


def _add_lora(executor: Any, request: Any) -> bool:
    """Load an adapter in every worker, or in none."""
    from vllm.exceptions import LoRAAdapterNotFoundError

    answers = executor.collective_rpc(_add_in_worker, args=(request,))
    refusals = [answer for answer in answers if not isinstance(answer, bool)]
    if not refusals:
        return all(answers)
    if len(refusals) < len(answers):
        executor.remove_lora(request.lora_int_id)
    if refusals[0] is None:
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    raise ValueError(refusals[0])


def _add_in_worker(worker: Any, request: Any) -> bool | str | None:
    """Whether an adapter was added, or why not; None: there is none.

    It must not raise: vLLM leaves unread what other workers answer then, and takes it for the answer to its next call.
    """
    from vllm.exceptions import LoRAAdapterNotFoundError

    try:
        return bool(worker.add_lora(request))
    except LoRAAdapterNotFoundError:
        return None
    except Exception as e:
        logger.debug("refused", exc_info=True)
        return f"LoRA adapter {request.lora_name!r} ({request.lora_path}) {REFUSED}{str(e) or type(e).__name__}"


def _to_read(engine: Any, request: Any) -> bool:
    """Whether a request's adapter is one that this engine has not read."""
    if request is None or engine.vllm_config.lora_config is None:
        return False
    return _read_by(engine).get(request.lora_int_id) != (request.lora_name, request.lora_path)


def _has_read(engine: Any, request: Any) -> None:
    _read_by(engine)[request.lora_int_id] = request.lora_name, request.lora_path


def _read_by(engine: Any) -> dict[int, tuple[str, str]]:
    return engine.__dict__.setdefault("_adapters_read", {})


def _read_first(add_request: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_request)
    def add(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if _to_read(engine, request := kwargs.get("lora_request")):
            engine.add_lora(request)
            _has_read(engine, request)
        return add_request(engine, *args, **kwargs)

    return add


def _read_first_async(add_request: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.exceptions import VLLMValidationError

    @functools.wraps(add_request)
    async def add(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if _to_read(engine, request := kwargs.get("lora_request")):
            try:
                await engine.add_lora(request)
            except Exception as e:
                if REFUSED in str(e):
                    raise VLLMValidationError(str(e)) from e
                raise
            _has_read(engine, request)
        return await add_request(engine, *args, **kwargs)

    return add


def _forgotten(remove_lora: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(remove_lora)
    def remove(engine: Any, adapter_id: int) -> Any:
        _read_by(engine).pop(adapter_id, None)
        return remove_lora(engine, adapter_id)

    return remove


def _client_error(load_lora_adapter: Callable[..., Any]) -> Callable[..., Any]:
    """What vLLM takes for an error of the server's is the adapter's."""
    from vllm.entrypoints.serve import create_error_response

    @functools.wraps(load_lora_adapter)
    async def load(models: Any, *args: Any, **kwargs: Any) -> Any:
        result = await load_lora_adapter(models, *args, **kwargs)
        error = getattr(result, "error", None)
        return create_error_response(error.message) if error and REFUSED in error.message else result

    return load
