"""Small models with PEFT's tuners that are LoRA with another core or scale."""

import peft
import pytest
import torch
from nets import Net
from peft import get_peft_model

TARGETS = ["up", "down"]
R = 4

#: A tuner's name -> its configuration's class, how its rank and its dropout are called, and the rest.
KINDS = {
    "vera": ("VeraConfig", "r", "vera_dropout", {}),
    "adalora": ("AdaLoraConfig", "init_r", "lora_dropout", {"lora_alpha": 6, "total_step": 9, "target_r": 2}),
    "delora": ("DeloraConfig", "r", "module_dropout", {"init_weights": False}),
    "tinylora": ("TinyLoraConfig", "r", "tinylora_dropout", {"u": 6}),
    "psoft": ("PsoftConfig", "r", "psoft_dropout", {"psoft_alpha": 6, "init_weights": False}),
    "miss": ("MissConfig", "r", "miss_dropout", {}),
    "hra": ("HRAConfig", "r", None, {"init_weights": False}),
}


def config(kind, dropout=0.0, r=R, targets=TARGETS, **kwargs):
    cls, rank, dropped, own = KINDS[kind]
    if dropped is not None:
        own = {dropped: dropout, **own}
    elif dropout:
        pytest.skip(f"PEFT's {kind} has no dropout")
    return getattr(peft, cls)(target_modules=list(targets), **{rank: r, **own, **kwargs})


def stir(model):
    """All trainable parameters and AdaLoRA's singular values anything but what they start as."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "base_layer" not in name and "ranknum" not in name:
            p.data += (0.5 * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return model


def net(kind, dropout=0.0, bias=True, dtype=torch.float32, masters=True, base=None, **kwargs):
    """A small PEFT model in training mode whose adapter 'default' is anything but zero."""
    torch.manual_seed(3)
    base = Net(bias) if base is None else base
    return stir(get_peft_model(base.to(dtype), config(kind, dropout, **kwargs), autocast_adapter_dtype=masters)).train()
