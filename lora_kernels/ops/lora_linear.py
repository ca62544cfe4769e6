"""``lora_linear``: a frozen linear layer with one adapter of the LoRA family, forward and backward.

Sources: Hu et al., LoRA (arXiv 2106.09685); Liu et al., DoRA (arXiv 2402.09353), whose dropout is PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import linear

from ..reference.dropout import keep_scale, threshold
from . import _check
from ._autograd import applied, note_backend, once_differentiable
from ._dispatch import extension, forced_backend
from ._lora_linear import lora_dropout, lora_forward_, lora_in_grads_, lora_out_grads, lora_weight_norm
from ._low_rank import lora_add_
from .low_rank import _call, _needs_grad, _scaling


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    core: Tensor | None = None,
    in_scale: Tensor | None = None,
    delta_in_scale: Tensor | None = None,
    delta_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    magnitude: Tensor | None = None,
    weight_norm_sq: Tensor | None = None,
) -> Tensor:
    """y = out_scale∘((x∘in_scale) Wᵀ + bias) + delta_scale∘(s · ((x̃ Aᵀ) core) Bᵀ), x̃ = dropout(x∘delta_in_scale).

    A frozen linear layer with one adapter: LoRA as it stands, and its relatives by a core or scales. Differentiable in
    all but the weight. Kept for the backward pass are x itself, x̃ Aᵀ and a seed, and only what a gradient asks for.

    With ``magnitude`` m it is DoRA as PEFT computes it: y = c∘(x Wᵀ + s (x Aᵀ) Bᵀ) + bias with c = m / ‖W + s B A‖, the
    norm of each row, taken as a constant by the gradients. Under dropout y = x Wᵀ + bias + (c - 1)∘(x̃ Wᵀ) +
    c∘(s (x̃ Aᵀ) Bᵀ), with a second base product. The gradient of m is read off y, which must not be overwritten before
    the backward pass; under dropout, or over a bias in 16 bits, the base product is made again instead. On a GPU that
    gradient is zero where m is.

    Under autocast x and the weight are cast as for torch's own linear, and factors in fp32 stay as they are.

    Args:
        x: [..., K] fp32, bf16 or fp16.
        weight: [N, K] x's dtype, not requiring grad, any strides.
        A, B: [R, K] and [N, R], x's dtype or fp32 (masters, used at full precision), any strides.
        scaling: s, a float.
        bias: [N] x's dtype or fp32.
        dropout: the probability p that an element of x∘delta_in_scale is dropped where ``training``; the others are
            scaled by 1 / (1 - p). A multiple of 2⁻¹⁶ is taken. The mask is made from a seed whenever it is needed.
        seed: of the mask, an int or an int64 tensor of one element on x's device; by default drawn from torch's
            generator of that device, which checkpointing restores. ``reference.dropout`` makes the same mask.
        core: [R], a diagonal, or [R, R].
        in_scale, delta_in_scale: [K], of x for the base and for the adapter.
        delta_scale, out_scale: [N], of the adapter's part and of the base's.
        magnitude: [N], x's dtype or fp32; with neither in_scale nor out_scale.
        weight_norm_sq: fp32 [N], the squared norms of the weight's rows; computed where not given.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or two that exclude each other.
    """
    if _any_autocast() and isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = (_cast(t, dtype, _check.FLOATS) for t in (x, weight))
        A, B, bias, core, magnitude, weight_norm_sq, in_scale, delta_in_scale, delta_scale, out_scale = (
            _cast(t, dtype, _check.FLOATS[1:])
            for t in (A, B, bias, core, magnitude, weight_norm_sq, in_scale, delta_in_scale, delta_scale, out_scale)
        )
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(
                x, weight, A, B, scaling=scaling, bias=bias, dropout=dropout, training=training, seed=seed, core=core,
                in_scale=in_scale, delta_in_scale=delta_in_scale, delta_scale=delta_scale, out_scale=out_scale,
                magnitude=magnitude, weight_norm_sq=weight_norm_sq,
            )  # fmt: skip
    scale, per_adapter = _scaling(scaling)
    if per_adapter is not None:
        raise TypeError("lora_linear takes one adapter: scaling must be a float")
    p = dropout if training else 0.0
    bare = core is in_scale is delta_in_scale is delta_scale is out_scale is magnitude is weight_norm_sq is None
    if (
        bare
        and not p
        and bias is seed is None
        and type(dropout) is float
        and 0 <= dropout <= 1
        and not is_compiling()
        and not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and isinstance(A, Tensor)
        and isinstance(B, Tensor)
        and weight.dim() == A.dim() == B.dim() == 2
        and x.is_cpu
        and weight.is_cpu
        and weight.dtype is x.dtype
    ):
        # Of what is left to refuse, torch and the kernels refuse all; the check then words it.
        try:
            if extension is not None and forced_backend() is None:
                y = extension.lora_linear(x, weight, None, (A,), (B,), scale)
                if y is not None:
                    return y
            return _add_one(linear(x, weight), x, A, B, scale)
        except (RuntimeError, TypeError, ValueError):
            _check_linear(x, weight, A, B, bias)
            raise
    _check_linear(x, weight, A, B, bias)
    if not bare:
        _check_extras(x, A, B, core, in_scale, delta_in_scale, delta_scale, out_scale, magnitude, weight_norm_sq)
        A, B = _folded(A, B, core, delta_in_scale, delta_scale)
    p, seed = _dropout(dropout, training, seed, x)
    if magnitude is not None:
        return dora(x, weight, bias, scale, A, B, magnitude, weight_norm_sq, seed, p)
    if in_scale is None and out_scale is None:
        return lora(x, weight, bias, None, scale, A, B, seed, p)
    base = linear(x if in_scale is None else (x * in_scale).to(x.dtype), weight, _as(bias, x))
    base = (base if out_scale is None else base * out_scale).to(x.dtype)
    return lora(x, None, None, base, scale, A, B, seed, p)


def lora(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    scale: float,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None = None,
    p: float = 0.0,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ, or y + s (x̃ Aᵀ) Bᵀ, written into y, where there is no weight. Arguments are right.

    ``delta_bias``, fp32 [N], is the adapter's own and not rounded before the sum is.
    """
    if _needs_grad(x, bias, y, A, B, delta_bias):
        return apply_lora(x, weight, bias, y, scale, A, B, seed, p, delta_bias)
    if y is None:
        y = linear(x, weight, _as(bias, x))  # type: ignore[arg-type]
    if seed is None and delta_bias is None:
        return _add_one(y, x, A, B, scale)
    lora_forward_(y, x, A, B, None, None, None, delta_bias, seed, p, scale * keep_scale(p))
    return y


def dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    weight_norm_sq: Tensor | None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """``lora_linear`` with a magnitude. Arguments are right."""
    return _apply_dora(x, weight, bias, scale, A, B, magnitude, weight_norm_sq, seed, p)


def row_norms_sq(weight: Tensor) -> Tensor:
    """‖W‖² of each row, fp32 [N]."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32).square_()


def draw_seed(x: Tensor) -> Tensor:
    """A seed of dropout, int64 [1], from torch's generator of x's device."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _dropout(p: float, training: bool, seed: int | Tensor | None, x: Tensor) -> tuple[float, Tensor | None]:
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"dropout must be a probability from 0 to 1, got {p!r}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise ValueError(f"seed must be an int64 tensor of one element on {x.device}, got {seed!r}")
    elif seed is not None and (not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise TypeError(f"seed must be an int of 64 bits or a tensor, got {seed!r}")
    if not training or not threshold(p):
        return 0.0, None
    if seed is None:
        return p, draw_seed(x)
    return p, seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=x.device)


def _folded(
    A: Tensor, B: Tensor, core: Tensor | None, delta_in_scale: Tensor | None, delta_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors that hold the core and the scales, in fp32, by operations that autograd knows."""
    A, B = A.float(), B.float()
    if core is not None:
        B = B * core.float() if core.dim() == 1 else B @ core.float().T
    if delta_scale is not None:
        B = B * delta_scale.float()[:, None]
    return A if delta_in_scale is None else A * delta_in_scale.float(), B


def _any_autocast() -> bool:
    return is_compiling() or torch._C._is_any_autocast_enabled()


def _cast(t: Any, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> Any:
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in dtypes else t


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _add_one(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    _call(lora_add_, _check.add, y, (y, x, (A,), (B,), None, None, None, None, None, None, scale))
    return y


def _check_linear(x: Any, weight: Any, A: Any, B: Any, bias: Any) -> None:
    _check.floating("x", x)
    _check.tensor("weight", weight)
    _check.same_device("weight", weight, x)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        K = x.shape[-1] if x.dim() else "K"
        raise ValueError(f"weight must be [N, {K}] for x {_check.shape(x)}, got {_check.shape(weight)}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x, got {weight.dtype}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires grad, but lora_linear takes it as frozen: weight.requires_grad_(False)")
    _check_pair(x, A, B, *weight.shape)
    if bias is not None:
        _vector("bias", bias, weight.shape[0], x)


def _check_pair(x: Tensor, A: Any, B: Any, N: int, K: int) -> None:
    """The factors of one adapter of a layer of shape (N, K)."""
    for name, factor in (("A", A), ("B", B)):
        _check.tensor(name, factor)
        _check.same_device(name, factor, x)
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(f"A must be [R, K] and B [N, R], got {_check.shape(A)} and {_check.shape(B)}")
    for name, factor, size in (("A", A, (A.shape[0], K)), ("B", B, (N, A.shape[0]))):
        if factor.shape != size:
            raise ValueError(f"{name} must be {list(size)} for the weight and A, got {_check.shape(factor)}")
        if factor.dtype not in (x.dtype, torch.float32) or factor.dtype != A.dtype:
            raise TypeError(f"A and B must both be {x.dtype} as x or float32, got {A.dtype} and {B.dtype}")
    if A.shape[0] > _check.MAX_RANK:
        raise ValueError(f"the rank must be at most {_check.MAX_RANK}, got {A.shape[0]}")


def _check_extras(x, A, B, core, in_scale, delta_in_scale, delta_scale, out_scale, magnitude, weight_norm_sq) -> None:
    (R, K), N = A.shape, B.shape[0]
    vectors = (
        ("in_scale", in_scale, K), ("delta_in_scale", delta_in_scale, K), ("delta_scale", delta_scale, N),
        ("out_scale", out_scale, N), ("magnitude", magnitude, N), ("weight_norm_sq", weight_norm_sq, N),
    )  # fmt: skip
    for name, value, size in vectors:
        if value is not None:
            _vector(name, value, size, x)
    if core is not None:
        _check.tensor("core", core)
        _check.same_device("core", core, x)
        if tuple(core.shape) not in ((R,), (R, R)):
            raise ValueError(f"core must be [{R}] or [{R}, {R}], got {_check.shape(core)}")
        if core.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"core must be {x.dtype} as x or float32, got {core.dtype}")
    if magnitude is not None and not in_scale is out_scale is None:
        raise ValueError("magnitude excludes in_scale and out_scale")
    if magnitude is None and weight_norm_sq is not None:
        raise ValueError("weight_norm_sq belongs to a magnitude, and there is none")


def _vector(name: str, value: Any, size: int, x: Tensor) -> None:
    _check.tensor(name, value)
    _check.same_device(name, value, x)
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{name} must be {x.dtype} as x or float32, got {value.dtype}")
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name} must be [{size}], got {_check.shape(value)}")


class _LoRA(torch.autograd.Function):
    """x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ with W frozen, or y + s (x̃ Aᵀ) Bᵀ."""

    @staticmethod
    def forward(ctx, x, weight, bias, y, scale, A, B, seed, p, delta_bias):
        if y is None:
            y = linear(x, weight, _as(bias, x))
        elif is_compiling() or y._is_view():
            y = y.clone()
        else:
            ctx.mark_dirty(y)
        scale *= keep_scale(p)
        v = lora_forward_(y, x, A, B, None, None, None, delta_bias, seed, p, scale)
        need_x, _, _, _, _, need_A, need_B, _, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_A else None,
            weight if need_x else None,
            v if need_B else None,
            A if need_x or need_A else None,
            B if need_x or need_A or need_B else None,
            seed,
        )
        ctx.scale, ctx.p, ctx.rank = scale, p, v.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        note_backend(ctx)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, v, A, B, seed = ctx.saved_tensors
        need_x, _, need_bias, need_y, _, need_A, need_B, _, _, need_delta_bias = ctx.needs_input_grad
        dx = dA = dB = sums = None
        if need_x:
            dx = dy.new_zeros(*dy.shape[:-1], A.shape[1]) if weight is None else torch.matmul(dy, weight)
        if need_x or need_A or need_B:
            if v is None:
                v = dy.new_empty(dy.shape[:-1].numel(), ctx.rank, dtype=torch.float32)
            dA, dB = _add_grads(dx, dy, v, x, A, B, seed, ctx.p, ctx.scale, need_B)
        if need_bias or need_delta_bias:
            sums = _column_sums(dy)
        dbias = sums.to(ctx.bias_dtype) if need_bias else None
        return dx, None, dbias, dy if need_y else None, None, dA, dB, None, None, sums if need_delta_bias else None


def _add_grads(dx, dy, v, x, A, B, seed, p, scale, need_B):
    """(dA, dB) of y += s (x̃ Aᵀ) Bᵀ, dA without x and dB where not needed None; dx gets its part."""
    step = dy.new_empty(0) if dx is None else dx
    grads = None
    if _native_grads is not None and dy.is_cpu and not is_compiling() and forced_backend() is None:
        grads = _native_grads(step, dy, v, x, A, B, seed, p, scale, need_B, _new_grads)
    if grads is None:
        need_v = not (dx is x is None)
        dv, dB, _, _ = lora_out_grads(dy, v, B, None, None, None, scale, need_v, need_B)
        grads = lora_in_grads_(step, dv, x, A, seed, p, scale) if need_v else None, dB
    dA, dB = grads
    return None if x is None else dA.to(A.dtype), dB.to(B.dtype) if need_B else None


def _new_grads(dx, dy, v, x, A, B, seed, p, scale, need_B):
    return v.new_empty(0 if x is None else A.shape), v.new_empty(B.shape if need_B else 0)


#: Both ops in one call, and without the dispatcher: of their arguments; None where the ops must be called.
_native_grads = getattr(extension, "lora_linear_grads", None)


class _Dropout(torch.autograd.Function):
    """mask∘x, not scaled; keeps the seed alone."""

    @staticmethod
    def forward(ctx, x, seed, p):
        ctx.save_for_backward(seed)
        ctx.p = p
        note_backend(ctx)
        return lora_dropout(x, seed, p)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return lora_dropout(dy, *ctx.saved_tensors, ctx.p), None, None


class _DoRA(torch.autograd.Function):
    """c∘(x Wᵀ + s (x Aᵀ) Bᵀ) + bias, and PEFT's form under dropout, with W and the norms as constants."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, A, B, magnitude, weight_norm_sq, seed, p):
        need_x, _, _, _, need_A, need_B, need_m, _, _, _ = ctx.needs_input_grad
        if weight_norm_sq is None:
            weight_norm_sq = row_norms_sq(weight)
        norm = lora_weight_norm(weight, A, B, weight_norm_sq, scale)
        c = magnitude.float() / norm
        scaled = c[:, None] * B.float()
        wide = A.float()
        scale *= keep_scale(p)
        y = None
        if seed is None:
            out = linear(x, weight)
            v = lora_forward_(out, x, wide, scaled, c, None, None, bias, None, 0.0, scale)
            if need_m and _tells_of_magnitude(out, bias, magnitude):
                y = out
        else:
            kept, of_kept = lora_dropout(x, seed, p), (c - 1) * keep_scale(p)
            out = linear(x, weight, _as(bias, x))
            v = lora_forward_(out, kept, wide, scaled, None, linear(kept, weight), of_kept, None, None, 0.0, scale)
        again = need_m and y is None  # the base product is made again
        ctx.save_for_backward(
            x if need_A or again else None,
            weight if need_x or again else None,
            v if need_B or need_m else None,
            A if need_x or need_A else None,
            B if need_x or need_A or need_B or need_m else None,
            magnitude, norm, bias if y is not None else None, y, seed,
        )  # fmt: skip
        ctx.scale, ctx.p, ctx.rank = scale, p, v.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        note_backend(ctx)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, v, A, B, magnitude, norm, bias, y, seed = ctx.saved_tensors
        need_x, _, need_bias, _, need_A, need_B, need_m, _, _, _ = ctx.needs_input_grad
        keep, c = keep_scale(ctx.p), magnitude.float() / norm
        dx = dA = dB = dm = dbias = None
        if need_x or need_A or need_B or need_m:
            of_base, other = c, y
            if seed is not None:
                of_base = (c - 1) * keep
                x = None if x is None else lora_dropout(x, seed, ctx.p)
            if need_m and y is None:
                other = linear(x, weight)
            tall = B.float()
            if v is None:
                v = dy.new_empty(dy.shape[:-1].numel(), ctx.rank, dtype=torch.float32)
            dv, sums, dz, t = lora_out_grads(
                dy, v, c[:, None] * tall, other if need_m else None, bias if y is not None else None,
                of_base if need_x else None, ctx.scale, need_x or need_A, need_B or (need_m and y is None),
            )  # fmt: skip
            if need_B:
                dB = (c[:, None] * sums).to(B.dtype)
            if need_m:
                # Σ dy∘(x̃ Wᵀ + s v Bᵀ) / ‖·‖, the sum of y's own columns where y is c times that.
                dm = t / magnitude.float() if y is not None else (keep * t + (tall * sums).sum(1)) / norm
                if y is not None and not dm.is_cpu:
                    dm = torch.where(magnitude == 0, 0, dm)
                dm = dm.to(magnitude.dtype)
        if need_x:
            dx = torch.matmul(dz, weight)
        if need_x or need_A:
            step = dy.new_empty(0) if dx is None else dx
            dA = lora_in_grads_(step, dv, x if need_A else None, A.float(), None, 0.0, ctx.scale)
            dA = dA.to(A.dtype) if need_A else None
        if need_x and seed is not None:
            dx = lora_dropout(dx, seed, ctx.p).add_(torch.matmul(dy, weight))
        if need_bias:
            dbias = _column_sums(dy).to(ctx.bias_dtype)
        return dx, None, dbias, None, dA, dB, dm, None, None, None


apply_lora, _apply_dora = applied(_LoRA), applied(_DoRA)


def _tells_of_magnitude(y: Tensor, bias: Tensor | None, magnitude: Tensor) -> bool:
    """Whether (y - bias) / m is what m scales: not where m is zero, nor where 16 bits of y went to a large bias."""
    if bias is not None and y.dtype != torch.float32:
        return False
    return not _check.readable(magnitude) or bool(magnitude.all())


def _column_sums(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
