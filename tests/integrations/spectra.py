"""Small models with PEFT's tuners whose ΔW is a transform of a sparse spectrum, and what they compute in float64."""

import peft
import torch
from nets import Net
from peft import get_peft_model

COUNT = 60
TARGETS = ("up", "down")

#: A kind of spectrum -> the configuration's class, the layer's attributes with values and places, and the rest.
KINDS = {
    "fourier": ("FourierFTConfig", "fourierft_spectrum", "indices", {"scaling": 150.0}),
    "haar": ("WaveFTConfig", "waveft_spectrum", "waveft_indices", {"scaling": 2.0}),
    "identity": ("WaveFTConfig", "waveft_spectrum", "waveft_indices", {"scaling": 2.0, "use_idwt": False}),
}


def config(kind, n=COUNT, targets=TARGETS, **kwargs):
    cls, _, _, own = KINDS[kind]
    return getattr(peft, cls)(n_frequency=n, target_modules=list(targets), **{**own, **kwargs})


def values_of(layer, kind, name="default"):
    return getattr(layer, KINDS[kind][1])[name]


def places_of(layer, kind):
    return getattr(layer, KINDS[kind][2])


def stir(model):
    """Every spectrum anything but what it starts as."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "spectrum" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p)
    return model


def net(kind, bias=True, dtype=torch.float32, masters=True, base=None, **kwargs):
    """A small PEFT model in training mode whose adapter 'default' is anything but zero."""
    torch.manual_seed(3)
    base = Net(bias) if base is None else base
    return stir(get_peft_model(base.to(dtype), config(kind, **kwargs), autocast_adapter_dtype=masters)).train()


def delta_weight(values, places, shape, kind, scale):
    """ΔW in float64, differentiable in the values."""
    even = [size + size % 2 if kind == "haar" else size for size in shape]
    S = torch.zeros(even, dtype=torch.float64).index_put(tuple(places), values.double())
    if kind == "fourier":
        return scale * torch.fft.ifft2(S).real
    if kind == "identity":
        return scale * S
    (TL, TR), (BL, BR) = (half.chunk(2, dim=1) for half in S.chunk(2))
    pairs = [(TL + a * TR, BL + a * BR) for a in (1, -1)]  # of the even rows, of the odd ones
    blocks = torch.stack([torch.stack([mean + b * detail for b in (1, -1)], -1) for mean, detail in pairs], 1)
    return scale / 2 * blocks.reshape(even)[: shape[0], : shape[1]]
