"""Engines in processes of their own: one with lora_kernels, one as vLLM has it, asked the same at the same time."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 180  # seconds for one answer


class Remote:
    """A process that calls functions of ``inside.py`` for us, one at a time; it has at most one engine.

    Args:
        plugin: whether vLLM finds lora_kernels in it.
        environment: more variables.
    """

    def __init__(self, plugin=True, **environment):
        self._pipe, theirs = multiprocessing.Pipe()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "LORA_KERNELS_VLLM": str(int(plugin)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        }
        command = [sys.executable, str(HERE / "inside.py"), str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def send(self, function, *args, **kwargs):
        """Have it called; :meth:`receive` waits for what it returns."""
        self._pipe.send((function.__name__, args, kwargs))

    def receive(self):
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError(f"no answer in {PATIENCE} s")
        try:
            well, answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process ended with exit status {self._process.wait()}") from None
        if not well:
            raise RuntimeError(answer)
        return answer

    def __call__(self, function, *args, **kwargs):
        self.send(function, *args, **kwargs)
        return self.receive()

    def close(self):
        self._pipe.close()  # which ends it
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Pair:
    """A :class:`Remote` with lora_kernels, ``ours``, and one without, ``theirs``."""

    def __init__(self):
        self.ours, self.theirs = Remote(), Remote(plugin=False)

    def __call__(self, function, *args, **kwargs):
        """What ours and theirs return, working at the same time."""
        self.ours.send(function, *args, **kwargs)
        self.theirs.send(function, *args, **kwargs)
        try:
            ours = self.ours.receive()
        finally:
            theirs = self.theirs.receive()
        return [ours, theirs]

    def close(self):
        self.ours.close()
        self.theirs.close()
