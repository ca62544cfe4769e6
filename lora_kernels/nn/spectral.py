"""Frozen linear layers with an adapter that is a sparse spectrum.

Sources: Gao et al., FourierFT (arXiv 2405.03003); Bilican et al., WaveFT (arXiv 2505.12532). Places, scale and
initialisation are PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.spectral import Kind
from ..spectral_plan import SpectralPlan
from ._over import SpectralLayer
from .low_rank import _frozen

if TYPE_CHECKING:
    from typing_extensions import Self


class OneSpectrum(SpectralLayer):
    """The layer over the weight and bias of a linear one.

    The places of the values are no part of the state dict.

    Attributes:
        weight, bias: [N, K] and [N] or None, the base's.
        values: [n], the trainable parameter; zero.
        kind, scale: K, as :func:`lora_kernels.spectral_linear` takes it, and what K(S) is multiplied by.
    """

    def __init__(self, linear: nn.Linear, plan: SpectralPlan, kind: Kind, scale: float, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = _frozen(linear)
        if plan.shape != tuple(self.weight.shape):
            raise ValueError(f"the plan is of shape {plan.shape}, the weight {tuple(self.weight.shape)}")
        self.kind, self.scale = kind, float(scale)
        self._drawn = self._plan = plan
        self.values = nn.Parameter(torch.zeros(plan.n, dtype=dtype, device=self.weight.device))

    @property
    def plan(self) -> SpectralPlan:
        """Where the values stand, on their device."""
        if self._plan.device != self.values.device:
            self._plan = self._drawn.to(self.values.device)
        return self._plan

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._drawn.shape

    @property
    def weight_dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.weight.dtype

    def _based(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class FourierFTLinear(OneSpectrum):
    """y = x Wᵀ + bias + x ΔWᵀ with ΔW = scaling · Re(ifft2(S)), W frozen and S zero but for n values.

    The values start normal, as PEFT's do, and so the layer does not start as its base. They stand where PEFT's seed
    puts them; the places are drawn again from the seed where a layer is made, and are no part of the state dict, which
    fits a layer of the same shape, n and seed. A PEFT checkpoint's ``fourierft_spectrum`` is ``values``.

    Args:
        linear: the base; its weight and bias are shared, and frozen.
        n: how many values, from 1 to N K; PEFT's ``n_frequency``.
        scaling: what the transform, which divides by N K, is multiplied by.
        seed: of the places; PEFT's ``random_loc_seed``.
        dtype: of the values: float32 masters, or the weight's dtype.

    Attributes:
        weight, bias: [N, K] and [N] or None, the base's.
        values: [n], the trainable parameter.
        plan, kind, scale, seed: where the values stand, "fourier", scaling and seed.

    Raises:
        TypeError: linear is no ``torch.nn.Linear``.
        ValueError: n is not from 1 to N K.
    """

    def __init__(
        self,
        linear: nn.Linear,
        n: int = 1000,
        *,
        scaling: float = 150.0,
        seed: int = 777,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(linear, _places(linear, n, seed), "fourier", scaling, dtype)
        self.seed = seed
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        n: int = 1000,
        *,
        scaling: float = 150.0,
        seed: int = 777,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer over an existing linear."""
        return cls(linear, n, scaling=scaling, seed=seed, dtype=dtype)

    def reset_parameters(self) -> None:
        """Values of the standard normal distribution."""
        nn.init.normal_(self.values)


class WaveFTLinear(OneSpectrum):
    """y = x Wᵀ + bias + x ΔWᵀ with ΔW = scaling · idwt2(S), W frozen and S zero but for n values.

    idwt2 is one level of the inverse Haar transform of S's quadrants, PEFT's wavelet "db1". The values start zero, so
    that the layer starts as its base. They stand where PEFT's seed puts them; the places are drawn again from the seed
    where a layer is made, and are no part of the state dict, which fits a layer of the same shape, n, seed and
    ``idwt``. A PEFT checkpoint's ``waveft_spectrum`` is ``values``.

    Args:
        linear: the base; its weight and bias are shared, and frozen.
        n: how many values, from 1 to N K; PEFT's ``n_frequency``.
        scaling: what the transform is multiplied by.
        idwt: False: ΔW = scaling · S; PEFT's ``use_idwt``.
        seed: of the places; PEFT's ``random_loc_seed``.
        dtype: of the values: float32 masters, or the weight's dtype.

    Attributes:
        weight, bias: [N, K] and [N] or None, the base's.
        values: [n], the trainable parameter.
        plan, kind, scale, seed: where the values stand, "haar" or "identity", scaling and seed.

    Raises:
        TypeError: linear is no ``torch.nn.Linear``.
        ValueError: n is not from 1 to N K.
    """

    def __init__(
        self,
        linear: nn.Linear,
        n: int = 2592,
        *,
        scaling: float = 25.0,
        idwt: bool = True,
        seed: int = 777,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(linear, _places(linear, n, seed), "haar" if idwt else "identity", scaling, dtype)
        self.seed = seed

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        n: int = 2592,
        *,
        scaling: float = 25.0,
        idwt: bool = True,
        seed: int = 777,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer over an existing linear."""
        return cls(linear, n, scaling=scaling, idwt=idwt, seed=seed, dtype=dtype)

    def reset_parameters(self) -> None:
        """Values of zero."""
        nn.init.zeros_(self.values)


def _places(linear: nn.Linear, n: int, seed: int) -> SpectralPlan:
    weight = linear.weight if type(linear) is nn.Linear else _frozen(linear)[0]  # which raises
    N, K = weight.shape
    return SpectralPlan.random(n, (N, K), seed)
