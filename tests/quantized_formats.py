"""Weights in the formats of others, made and decoded bit by bit from the formats' descriptions."""

import numpy as np
import torch

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
VALUES = {"nf4": NF4, "fp4": FP4 + tuple(-v for v in FP4)}
#: Which of the eight columns of an AWQ word each of its half bytes is, from the lowest on.
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def bits(t):
    """(dtype, shape, bytes)"""
    return t.dtype, t.shape, t.detach().contiguous().flatten().view(torch.uint8).tolist()


def same_bits(a, b):
    """Two dicts of tensors with the same keys and bits."""
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def blocks_by_hand(data, absmax, fmt, shape, blocksize):
    """W fp32 of bitsandbytes' packed tensor and absmax."""
    data = data.detach().contiguous().flatten().view(torch.uint8).tolist()
    table, absmax = np.array(VALUES[fmt], np.float32), absmax.numpy()
    N, K = shape
    W = np.zeros((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            i = n * K + k
            code = data[i // 2] // 16 if i % 2 == 0 else data[i // 2] % 16
            W[n, k] = table[code] * absmax[i // blocksize]
    return torch.from_numpy(W)


def absmax_by_hand(state):
    """absmax fp32 of a QuantState."""
    if not state.nested:
        return state.absmax
    of, absmax, offset = state.state2.code.numpy(), state.state2.absmax.numpy(), np.float32(state.offset.item())
    return torch.tensor([of[c] * absmax[b // 256] + offset for b, c in enumerate(state.absmax.tolist())])


def _word(nibbles):
    word = sum(int(nibble) << 4 * i for i, nibble in enumerate(nibbles))
    return word - (1 << 32) if word >> 31 else word


def _nibble(word, i):
    return (int(word) >> 4 * i) & 15


def gptq(N, K, groups, *, g_idx=None, dtype=torch.float16, seed=0):
    """Random tensors of GPTQ's as a dict."""
    make = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (K, N), generator=make)
    z = torch.randint(0, 16, (groups, N), generator=make)
    qweight = [[_word(q[8 * i : 8 * i + 8, n]) for n in range(N)] for i in range(K // 8)]
    qzeros = [[_word(z[g, 8 * c : 8 * c + 8]) for c in range(N // 8)] for g in range(groups)]
    tensors = {
        "qweight": torch.tensor(qweight, dtype=torch.int32).view(K // 8, N),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32).view(groups, N // 8),
        "scales": torch.randn(groups, N, generator=make).to(dtype),
    }
    return tensors if g_idx is None else {**tensors, "g_idx": g_idx}


def gptq_by_hand(t, added):
    """W fp64; ``added`` to a stored zero: 1 in "gptq", 0 in "gptq_v2"."""
    K, N, G = 8 * t["qweight"].shape[0], *reversed(t["scales"].shape)
    g_idx = t["g_idx"].tolist() if "g_idx" in t else [k // (K // G) for k in range(K)]
    W = torch.zeros(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            g = g_idx[k] % G
            q = _nibble(t["qweight"][k // 8, n], k % 8)
            z = _nibble(t["qzeros"][g, n // 8], n % 8) + added
            W[n, k] = float(t["scales"][g, n]) * (q - z)
    return W


def awq(N, K, groups, *, dtype=torch.float16, seed=0):
    """Random tensors of AWQ's as a dict."""
    make = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (K, N), generator=make)
    z = torch.randint(0, 16, (groups, N), generator=make)

    def words(c):
        rows = [[_word([row[8 * w + i] for i in AWQ]) for w in range(N // 8)] for row in c]
        return torch.tensor(rows, dtype=torch.int32).view(len(c), N // 8)

    return {"qweight": words(q), "qzeros": words(z), "scales": torch.randn(groups, N, generator=make).to(dtype)}


def awq_by_hand(t):
    """W fp64."""
    K, (G, N) = t["qweight"].shape[0], t["scales"].shape
    W = torch.zeros(N, K, dtype=torch.float64)
    for n in range(N):
        i = AWQ.index(n % 8)
        for k in range(K):
            g = k // (K // G)
            q, z = (_nibble(t[name][row, n // 8], i) for name, row in (("qweight", k), ("qzeros", g)))
            W[n, k] = float(t["scales"][g, n]) * (q - z)
    return W
