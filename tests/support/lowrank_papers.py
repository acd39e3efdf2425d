"""The papers' formulas of the low-rank methods, written out in float64, and the inputs that tests give them.

The transcriptions work on one head and plain (N, D) matrices. A masked key is simply not in them.
"""

import functools
import math

import torch

from efficient_attn.methods import (
    elu_attention,
    elu_weights,
    linformer_attention,
    linformer_weights,
    nystrom_attention,
    nystrom_weights,
    performer_attention,
    performer_weights,
    random_projection,
)

B, NQ, NK, D, DV = 2, 11, 11, 6, 5
HEADS = [(2, 2), (4, 2), (3, 1)]


def softmax(scores):
    e = torch.exp(scores - scores.max(1, keepdim=True).values)
    return e / e.sum(1, keepdim=True)


def linformer_paper(q, k, v, kept, h, E, F):
    E, F = E[:, : len(k)][:, kept], F[:, : len(k)][:, kept]
    return softmax(q @ (E @ k[kept]).T / math.sqrt(D)) @ (F @ v[kept])


def nystrom_paper(q, k, v, kept, h, m, conv=None, queries_too=True):
    def landmarks(x):
        s = min(m, len(x))
        rows = [[i for i in range(len(x)) if i * s // len(x) == segment] for segment in range(s)]
        return torch.stack([x[r].mean(0) for r in rows])

    ql, kl = landmarks(q[kept] if queries_too else q), landmarks(k[kept])
    A = softmax(ql @ kl.T / math.sqrt(D))
    Z = A.T / (A.abs().sum(0).max() * A.abs().sum(1).max())
    one = torch.eye(len(A), dtype=A.dtype)
    for _ in range(6):
        Z = 0.25 * Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z)))
    out = softmax(q @ kl.T / math.sqrt(D)) @ Z @ softmax(ql @ k[kept].T / math.sqrt(D)) @ v[kept]
    if conv is not None:
        filter_ = conv[h]
        for i in range(len(q)):
            near = [(j - i + len(filter_) // 2, j) for j in range(len(k)) if kept[j]]
            for t, j in near:
                if 0 <= t < len(filter_):
                    out = out + torch.eye(len(q), dtype=q.dtype)[i][:, None] * filter_[t] * v[j]
    return out


def kernel_paper(phi, q, k, v, kept, h, offset=None):
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if kept[j] and (offset is None or j <= i + offset)]
        w = [phi(q[i]) @ phi(k[j]) for j in seen]
        rows.append(sum(a * v[j] for a, j in zip(w, seen, strict=True)) / sum(w) if seen else torch.zeros_like(v[0]))
    return torch.stack(rows)


def favor(x, W):
    x = x / D**0.25
    return torch.exp(W @ x - x @ x / 2) / math.sqrt(len(W))


def favor_relu(x, W):
    return torch.relu(W @ x / D**0.25) / math.sqrt(len(W)) + 1e-3


def elu_plus_one(x):
    return torch.nn.functional.elu(x) + 1


def make(hq, hkv, nq=NQ, nk=NK, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, hq, nq, D), (B, hkv, nk, D), (B, hkv, nk, DV))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


E2 = torch.randn(4, 16, generator=generator(), dtype=torch.float64)
F2 = torch.randn(4, 16, generator=generator(2), dtype=torch.float64)
W = random_projection(7, D, generator=generator(3), dtype=torch.float64)
CONV = torch.randn(3, generator=generator(4), dtype=torch.float64).expand(3, 3)

#  name -> (function, weights, paper on one head); each takes the same keywords where it accepts them
CASES = {
    "linformer": (
        functools.partial(linformer_attention, key_projection=E2, value_projection=F2),
        functools.partial(linformer_weights, key_projection=E2, value_projection=F2),
        functools.partial(linformer_paper, E=E2, F=F2),
    ),
    "nystrom": (
        functools.partial(nystrom_attention, landmarks=4),
        functools.partial(nystrom_weights, landmarks=4),
        functools.partial(nystrom_paper, m=4),
    ),
    "nystrom+conv": (
        functools.partial(nystrom_attention, landmarks=3, conv_weight=CONV[0]),
        functools.partial(nystrom_weights, landmarks=3, conv_weight=CONV[0]),
        functools.partial(nystrom_paper, m=3, conv=CONV),
    ),
    "performer": (
        functools.partial(performer_attention, projection=W),
        functools.partial(performer_weights, projection=W),
        functools.partial(kernel_paper, lambda x: favor(x, W)),
    ),
    "performer-relu": (
        functools.partial(performer_attention, projection=W, feature="relu"),
        functools.partial(performer_weights, projection=W, feature="relu"),
        functools.partial(kernel_paper, lambda x: favor_relu(x, W)),
    ),
    "linear": (elu_attention, elu_weights, functools.partial(kernel_paper, elu_plus_one)),
}
KERNELS = ("performer", "performer-relu", "linear")


def paddings(name):
    tail = torch.arange(NK) < torch.tensor([[8], [NK]])
    holes = torch.rand(B, NK, generator=generator(5)) < 0.7
    few = torch.arange(NK) == torch.tensor([[2], [9]])
    return {"none": None, "tail": tail, "holes": holes, "one": few}[name]


def by_head(paper, q, k, v, key_mask, **keywords):
    kept = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    group = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    paper(q[b, h], k[b, h // group], v[b, h // group], kept[b], h // group, **keywords)
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )


def masks_of(name, key_mask):
    return {"key_mask": key_mask, **({"query_mask": key_mask} if name.startswith("nystrom") else {})}


def relative_error(out, exact):
    return ((out - exact).norm() / exact.norm()).item()
