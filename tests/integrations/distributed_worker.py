"""One of several processes that train a patched model: ``python distributed_worker.py RANK WORLD STORE OUT``.

Each scenario trains the patched model and its unpatched twin, wrapped alike, on this process's share of the data. What
came out goes to OUT as JSON: a scenario's name -> how far the two differ, what ran fast, and the report.
"""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

from counting import count
from nets import K, N, Net, config, up_of
from peft import get_peft_model
from seeded import seed_dropout

import lora_kernels as lk


def make(**kwargs):
    torch.manual_seed(1)
    base = Net()
    base.down = nn.Linear(N, K)
    return get_peft_model(base, config(**kwargs)).train()


def ddp(model, mesh):
    return DistributedDataParallel(model)


def whole(model, mesh):
    return fully_shard(model, mesh=mesh)


def by_layer(model, mesh):
    for layer in (up_of(model), model.base_model.model.down):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def factors(model, mesh):
    """The factors of one layer by themselves, as PEFT's FSDP policy wraps them."""
    fully_shard(up_of(model).lora_A.default, mesh=mesh)
    fully_shard(up_of(model).lora_B.default, mesh=mesh)
    return model


def bases(model, mesh):
    """The frozen layers by themselves, the adapters on each process as in DDP."""
    for layer in (up_of(model), model.base_model.model.down):
        fully_shard(layer.base_layer, mesh=mesh)
    return model


def flat(model, mesh):
    """FSDP1, which keeps the parameters as views of a flat one."""
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = (ddp, whole, by_layer, factors, bases, flat)
EVERYTHING = (ddp, by_layer)
CONFIGURED = {
    "plain": {},
    "dropout": dict(lora_dropout=0.4),
    "bias": dict(lora_bias=True),
    "DoRA": dict(use_dora=True),
}


def trained(model, inner, rank):
    """(losses, gradients) of a few steps on this process's data; dropout draws other numbers in each process."""
    torch.manual_seed(10 + rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        x = torch.randn(6, K)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    grads = {}
    for name, p in inner.named_parameters():
        if p.grad is not None:
            grads[name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
    return losses, grads


def scenario(wrap, when, kwargs, mesh, rank, calls):
    model = make(**kwargs)
    twin = copy.deepcopy(model)
    if when == "before":
        handle = lk.patch(model)
    wrapped = wrap(model, mesh)
    if when == "after":
        handle = lk.patch(model)
    calls.take()
    losses, grads = trained(wrapped, model, rank)
    counts, layers = calls.take(), handle.report().layers
    ran = set(layers) if not counts[1] else {"base_model.model.down"} if wrap is factors and counts[0] else ()
    seed_dropout(twin, ran)  # a report of shards at rest is not one of the call
    wanted_losses, wanted = trained(wrap(twin, mesh), twin, rank)
    assert grads.keys() == wanted.keys(), grads.keys() ^ wanted.keys()
    return {
        "losses": max(abs(a - b) for a, b in zip(losses, wanted_losses, strict=True)),
        "loss": losses[-1],
        "gradients": max(float((g - wanted[n]).abs().max()) for n, g in grads.items() if g.numel()),
        "size": max(float(g.abs().max()) for g in wanted.values() if g.numel()),
        "count": len(grads),
        "counts": counts,
        "layers": layers,
        "classes": [type(up_of(model)).__name__, type(up_of(twin)).__name__],
    }


def main(rank, world, store, out):
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    mesh, found = init_device_mesh("cpu", (world,)), {}
    with pytest.MonkeyPatch.context() as patch:
        calls = count(patch)
        for configured, kwargs in CONFIGURED.items():
            for wrap in WRAPPERS:
                for when in ("before", "after"):
                    if wrap not in EVERYTHING and configured not in ("plain", "dropout"):
                        continue
                    name = f"{wrap.__name__} {when} {configured}"
                    try:
                        found[name] = scenario(wrap, when, kwargs, mesh, rank, calls)
                    except Exception as error:
                        found[name] = {"error": f"{type(error).__name__}: {error}"[:600]}
    Path(out).write_text(json.dumps(found))
    dist.barrier()  # neither leaves while the other still speaks
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    sys.stdout.flush()
    os._exit(0)  # threads that gloo still runs now and then abort an interpreter that takes itself apart
