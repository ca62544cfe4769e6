"""A frozen linear layer, packed or not, with LoCA's adapter: cosine coefficients at places that are learned.

Source: Du et al., LoCA (arXiv 2502.06820).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.location import spectral_linear_located
from ..quantization import QuantizedWeight
from ..spectral_plan import SpectralPlan
from ._over import SpectrumOver, as_result

if TYPE_CHECKING:
    from typing_extensions import Self

#: What a location is clamped to, so that the last place of an axis is left out as in LoCA's own code.
LARGEST = 0.999


class LoCASchedule:
    """Which of a model's LoCA layers' parameters are trained in an iteration; one object for all of them.

    In iterations 0 to 9, 30 to 39, ... the coefficients, in 10 to 29, 40 to 59, ... the locations, until iteration
    ``learn_location_iter``; from there on the coefficients alone. :meth:`step` goes on to the next iteration: call it
    once after each step of the optimiser, however many backward passes that step added up.

    Args:
        learn_location_iter: until when locations are learned; LoCA takes a tenth of all iterations. 0: never.
        coefficient_steps, location_steps: how many iterations of each in turn.

    Attributes:
        iteration: from 0.
        trains: "coefficients" or "locations". The other parameter gets no gradient: None, which optimisers skip.

    Raises:
        TypeError, ValueError: a number that is no int or out of range.
    """

    def __init__(self, learn_location_iter: int, *, coefficient_steps: int = 10, location_steps: int = 20):
        for name, value, least in (
            ("learn_location_iter", learn_location_iter, 0),
            ("coefficient_steps", coefficient_steps, 1),
            ("location_steps", location_steps, 0),
        ):
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.learn_location_iter = learn_location_iter
        self.coefficient_steps, self.location_steps = coefficient_steps, location_steps
        self._go_to(0)

    def step(self) -> None:
        """On to the next iteration."""
        self._go_to(self.iteration + 1)

    def state_dict(self) -> dict[str, int]:
        """The iteration and the settings, for a checkpoint."""
        names = ("iteration", "learn_location_iter", "coefficient_steps", "location_steps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where a schedule was, with its settings.

        Raises:
            TypeError, ValueError: a number is missing, too many or none; nothing is changed.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the state must have {', '.join(self.state_dict())}, got {', '.join(state)}")
        settings = {**state}
        iteration = settings.pop("iteration")
        if type(iteration) is not int or iteration < 0:
            raise ValueError(f"iteration must be an int of at least 0, got {iteration!r}")
        self.__init__(**settings)  # type: ignore[misc]
        self._go_to(iteration)

    def _go_to(self, iteration: int) -> None:
        turn = iteration % (self.coefficient_steps + self.location_steps)
        locations = iteration < self.learn_location_iter and turn >= self.coefficient_steps
        self.iteration, self.trains = iteration, "locations" if locations else "coefficients"

    def __repr__(self) -> str:
        return (
            f"LoCASchedule({self.learn_location_iter}, coefficient_steps={self.coefficient_steps}, "
            f"location_steps={self.location_steps}), at {self.iteration}: {self.trains}"
        )


class LoCALinear(SpectrumOver):
    """y = base(x) + x ΔWᵀ with ΔW = α C_Nᵀ S C_K, C the orthonormal DCT-II and S sparse; values and places are learned.

    Value i stands at (p, q) = round(clamp(λ_i, 0, 0.999) · (N - 1, K - 1)), and those at one place add up. The
    gradient goes straight through the rounding: that of p and q is :func:`lora_kernels.spectral_location_grad`, zero
    for a λ that is clamped. Values start at zero, λ uniform.

    The central difference is clamped to ±1 after the sum over the rows of one backward pass, here as in LoCA's own
    code. So λ's gradient of a batch in parts is not the whole batch's: not where backward passes accumulate, and not
    where processes each take a part and average (data parallel), unless no difference reaches 1. Values' is.

    Args:
        base: a linear layer, which is shared and frozen, or a packed weight, whose tensors are shared.
        n: how many coefficients.
        schedule: which of the two parameters is trained now; the same object for all layers of a model. A copied layer
            has a copied schedule.
        alpha: α.
        bias: [N], shared and frozen, or None; of a packed weight.
        dtype: of the values: float32 masters, or that of x.
        generator: draws λ; default torch's own.

    Attributes:
        base: the layer, or a :class:`lora_kernels.nn.QuantizedLinear`.
        values, locations: [n] and λ [2, n], the trainable parameters; λ stays float32 when the layer is moved to
            another dtype, in which places would run together.
        schedule, scale: as given, and α.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
    """

    _plan: SpectralPlan | None
    _plan_of: tuple[int, int] | None

    def __init__(
        self,
        base: nn.Linear | QuantizedWeight,
        n: int,
        schedule: LoCASchedule,
        alpha: float = 1.0,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        if not isinstance(schedule, LoCASchedule):
            raise TypeError(f"schedule must be a LoCASchedule, got {type(schedule).__name__}")
        if type(n) is not int or n < 1:
            raise ValueError(f"n must be an int >= 1, got {n!r}")
        super().__init__(base, n, "dct", bias=bias, dtype=dtype)
        self.schedule, self.scale = schedule, float(alpha)
        drawn = torch.rand(2, n, generator=generator, device=None if generator is None else generator.device)
        self.locations = nn.Parameter(drawn.to(self.values.device))
        self._forget_plan()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if self.schedule.trains == "coefficients" or not torch.is_grad_enabled():
            return super().forward(x)
        y = self.base(x)
        rows, cols = self._positions()
        given = as_result(x, y), self.values.detach(), rows, cols
        return spectral_linear_located(*given, self.plan, kind="dct", scale=self.scale, y=y)

    @property
    def plan(self) -> SpectralPlan:
        """Where the values stand now; made again when the locations were changed, but for a write through ``.data``."""
        return self._plan_now()

    @torch.compiler.disable  # which a traced call must not keep
    def _plan_now(self) -> SpectralPlan:
        now = self.locations.data_ptr(), self.locations._version
        if self._plan is None or self._plan_of != now:
            with torch.no_grad():
                rows, cols = (t.round().long() for t in self._positions())
            self._plan, self._plan_of = SpectralPlan(rows, cols, shape=self.shape), now
        return self._plan

    def _positions(self) -> tuple[Tensor, ...]:
        sizes = self.locations.new_tensor([[size - 1] for size in self.shape])
        return (self.locations.clamp(0, LARGEST) * sizes).unbind()

    def _forget_plan(self) -> None:
        self._plan = self._plan_of = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Parameters go where ``fn`` puts them, the locations in the dtype they have."""
        self._forget_plan()
        before, grad = self.locations.detach(), self.locations.grad
        grad = None if grad is None else grad.detach()
        super()._apply(fn, recurse)
        if self.locations.dtype != before.dtype:
            self.locations.grad = None
            self.locations.data = before.to(self.locations.device)
            self.locations.grad = None if grad is None else grad.to(self.locations.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_plan()
        super()._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plan()
