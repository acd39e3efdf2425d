"""Methods by their definitions: dense, in float64, differentiable, one formula each, for `tests/contract/test_fuzz.py`.

With the package they share `Pattern.visible` (which tests/patterns proves), random features and rotations, and nothing
that a method computes with. Slow and clear, but batched where it can be, so that a hundred thousand are affordable.
Letters: B batch, H query heads, N queries, M keys. Keys and values come repeated to H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficient_attn.methods import Hybrid, Linear, Linformer, Method, Nystrom, Performer, Sparse
from efficient_attn.patterns import LSH, BucketPattern, Combined, Pattern, PerHead, TopKBlocks, TopPBlocks
from efficient_attn.patterns.buckets import _rotations


@dataclass(frozen=True)
class Pairs:
    """What a call shows.

    allowed: bool (B, H, N, M), by all routes. keys: bool (B, M), those that anybody sees. offset: where query 0 stands,
    if that is said. bias: as given. within: what causality and masks of pairs allow, without padding.
    """

    allowed: Tensor
    keys: Tensor
    offset: int | None
    scale: float
    bias: Tensor | None = None
    within: Tensor | None = None

    @property
    def queries(self) -> Tensor | None:
        """Which queries shape what is made of all of them, (B, N): in self-attention those that are no padding."""
        return self.keys if self.allowed.shape[2] == self.allowed.shape[3] else None


def definition(method: Method, query: Tensor, key: Tensor, value: Tensor, state: Any, pairs: Pairs) -> Tensor:
    """The output (B, H, N, Dv) of a method."""
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if isinstance(method, Sparse):
        pattern = method.pattern
        if getattr(pattern, "shared_qk", False):
            k = query / query.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        seen = visible(pattern, query, k, pairs) & pairs.allowed
        if getattr(pattern, "shared_qk", False):
            eye = torch.eye(seen.shape[2], dtype=torch.bool)
            seen = seen & ~eye
            seen = seen | (eye & pairs.allowed & ~seen.any(-1, keepdim=True))
        return softmax(query @ k.mT * pairs.scale, seen, pairs.bias) @ v
    hidden = ~pairs.keys[:, None, :, None]
    k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    if isinstance(method, Linformer):
        E, F = (p.double()[..., : k.shape[2]] for p in (state.key_projection, state.value()))
        E, F = (p.repeat_interleave(groups, 0) if p.dim() == 3 else p for p in (E, F))
        size = state.key_projection.shape[-1] / pairs.keys.sum(1).clamp(min=1).double()[:, None, None, None]
        of_key, of_value = state.length_powers.double()
        return torch.softmax(query @ (E @ k * size**of_key).mT * pairs.scale, -1) @ (F @ v * size**of_value)
    if isinstance(method, Nystrom):
        return nystrom(method, query, k, v, state, pairs, groups)
    if isinstance(method, Hybrid):
        return hybrid(method, query, k, v, state, pairs)
    phi_q, phi_k = features(method, query, k, state, pairs.scale)
    return normalised(phi_q @ phi_k.mT * pairs.allowed, v)


# --- which pairs a pattern shows ---


def visible(pattern: Pattern, q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    """bool (B, H, N, M): what the pattern shows, where the call allows it."""
    B, H, N = q.shape[:3]
    M = k.shape[2]
    if isinstance(pattern, PerHead):
        every = [visible(part, q, k, pairs) for part in pattern.parts]
        return torch.stack([every[h % len(every)][:, h] for h in range(H)], 1)
    if isinstance(pattern, Combined) and pattern.by_content:
        if pattern.operator == "or":
            return torch.stack([visible(part, q, k, pairs) for part in pattern.parts]).any(0)
        fixed = [visible(part, q, k, pairs) for part in pattern.parts if not part.by_content]
        shown = torch.stack([pairs.allowed, *fixed]).all(0)
        within = Pairs(shown, pairs.keys & shown.any(2).any(1), pairs.offset, pairs.scale)
        chosen = [visible(part, q, k, within) for part in pattern.parts if part.by_content]
        return torch.stack([*fixed, *chosen]).all(0)
    if isinstance(pattern, TopKBlocks | TopPBlocks):
        return chosen_blocks(pattern, q.detach(), k.detach(), pairs)
    if isinstance(pattern, BucketPattern):
        return together(pattern, q.detach(), k.detach(), pairs)
    i, j = torch.arange(N)[:, None], torch.arange(M)
    heads = [pattern.visible(i, j, N, M, h).expand(N, M) for h in range(H if pattern._heads_differ else 1)]
    return torch.stack(heads).expand(B, H, N, M)


def softmax(scores: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """Weights, 0 for a row that sees nothing."""
    scores = scores if bias is None else scores + bias.masked_fill(bias == -math.inf, 0.0)
    some = seen.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~seen & some, -math.inf), -1) * seen


def chosen_blocks(pattern: Any, q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    """Blocks of keys by their estimated scores, block of queries by block of queries."""
    (B, H, N, D), M, b = q.shape, k.shape[2], pattern.block
    shown = torch.zeros(B, H, N, M, dtype=torch.bool)
    queries = torch.ones(B, N, dtype=torch.bool) if pairs.queries is None else pairs.queries
    for batch in range(B):
        there = pairs.keys[batch]
        cols = [slice(c, min(c + b, M)) for c in range(0, M, b)]
        counts = [int(there[col].sum()) for col in cols]
        ended = [c for c, col in enumerate(cols) if col.start + b <= M and there[col.start + b - 1]]
        for head in range(H):
            allowed = pairs.allowed[batch, head]
            for r in range(0, N, b):
                row = slice(r, min(r + b, N))
                own = q[batch, head, row][queries[batch, row]]
                x = torch.zeros(D, dtype=q.dtype)
                if len(own):
                    x = own[0] if pattern.queries == "first" else own.mean(0)
                seen = [c for c, col in enumerate(cols) if counts[c] and allowed[row, col].any()]
                whole = [c for c in seen if allowed[row, cols[c]][:, there[cols[c]]].all()]
                forced = [c for c in seen if c < pattern.sink or _near(pattern, r, c, b, pairs, N, M)]
                estimate = {}
                for c in whole:
                    keys = k[batch, head, cols[c]][there[cols[c]]]
                    if pattern.summary == "mean":
                        estimate[c] = float(x @ keys.mean(0)) * pairs.scale
                    else:
                        estimate[c] = float(torch.maximum(x * keys.amin(0), x * keys.amax(0)).sum()) * pairs.scale
                # A block that is cut holds what some of the queries must not know: its keys decide nothing.
                last = max(whole, default=-1)
                cut = sorted(set(seen) - set(whole) - set(forced), reverse=True)
                free = sorted(set(whole) - set(forced), key=lambda c: -estimate[c])
                free = [c for c in cut if c > last] + free + [c for c in cut if c < last]
                if isinstance(pattern, TopKBlocks):
                    wanted = pattern.blocks
                    if pattern.fraction is not None:
                        wanted = math.ceil(pattern.fraction * len(seen) - 1e-9)
                    keep = forced + free[: max(wanted - len(forced), 0)]
                else:
                    mass = {c: math.exp(estimate[c]) * counts[c] if c in estimate and c in ended else 0.0 for c in seen}
                    total, keep = sum(mass.values()), list(forced)
                    for c in free:
                        if total and sum(mass[x] for x in keep) / total >= pattern.mass:
                            break
                        keep.append(c)
                for c in keep:
                    shown[batch, head, row, cols[c]] = True
    return shown


def _near(pattern: Any, r: int, c: int, b: int, pairs: Pairs, N: int, M: int) -> bool:
    """Whether key block c is nearer than `local` blocks to where the queries from r on stand."""
    offset = pairs.offset
    if offset is None:
        if pattern.alignment is None and N != M:
            return False
        offset = M - N if pattern.alignment == "bottom_right" else 0
    top = r + offset
    return top // b - pattern.local < c < (top + b - 1) // b + pattern.local


def together(pattern: Any, q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    """Pairs in one bucket in any round."""
    N, M = q.shape[2], k.shape[2]
    kept = pairs.keys[:, None].expand(-1, q.shape[1], -1)  # (B, H, M)
    found = torch.zeros(*q.shape[:3], M, dtype=torch.bool)
    for r in range(pattern.rounds):
        if isinstance(pattern, LSH):
            R = _rotations(q.shape[-1], pattern.rounds, pattern.n_buckets // 2, pattern.seed)[:, r].double()
            of_q, of_k = (torch.cat([x @ R, -(x @ R)], -1).argmax(-1) for x in (q, k))
            same = of_q[..., None] == of_k[..., None, :]
            if pattern.chunk:
                bucket = torch.where(kept, of_q, -1)
                place = (bucket * N + torch.arange(N)).argsort(-1).argsort(-1) // pattern.chunk
                ahead = place[..., None] - place[..., None, :]
                same &= (ahead >= 0) & (ahead <= 1)
        else:
            u = _rotations(q.shape[-1], pattern.rounds, 1, pattern.seed)[:, r, 0].double()
            n = -(-M // pattern.size)
            of_q = _place(q @ u, None if pairs.queries is None else kept, n)
            same = of_q[..., None] == _place(k @ u, kept, n)[..., None, :]
        found |= same & kept[:, :, None]
    return found


def _place(along: Tensor, kept: Tensor | None, n: int) -> Tensor:
    """The piece of n in which a token's rank among those that count lies."""
    kept = torch.ones_like(along, dtype=torch.bool) if kept is None else kept
    rank = along.masked_fill(~kept, math.inf).argsort(dim=-1, stable=True).argsort(-1)
    return (rank * n // kept.sum(-1, keepdim=True).clamp(min=1)).clamp(max=n - 1)


# --- low rank ---


def features(method: Any, q: Tensor, k: Tensor, state: Any, scale: float) -> tuple[Tensor, Tensor]:
    """phi(q), phi(k) of linear attention and of Performer."""
    if isinstance(method, Linear):
        return torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    assert isinstance(method, Performer)
    W = state.projection.double()
    q, k = q * scale**0.5, k * scale**0.5
    if method.feature == "relu":
        phi = tuple(torch.relu(x @ W.mT) * len(W) ** -0.5 + 1e-3 for x in (q, k))
    else:
        phi = tuple(torch.exp(x @ W.mT - x.square().sum(-1, keepdim=True) / 2) * len(W) ** -0.5 for x in (q, k))
    return phi[0], phi[1]


def normalised(weights: Tensor, v: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / total.masked_fill(total == 0, 1.0)


def landmarks(x: Tensor, m: int, kept: Tensor | None) -> Tensor:
    """Means of consecutive segments of the rows (n, D) that count, at most m."""
    x = x if kept is None else x[kept]
    s = min(m, len(x))
    group = torch.arange(len(x)) * s // max(len(x), 1)
    member = (group == torch.arange(s)[:, None]).to(x.dtype)
    return member @ x / member.sum(1, keepdim=True)


def pinv(A: Tensor, iterations: int) -> Tensor:
    Z = A.mT / (A.abs().sum(0).max() * A.abs().sum(1).max())
    one = torch.eye(len(A), dtype=A.dtype)
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * one - AZ @ (15 * one - AZ @ (7 * one - AZ))) / 4
    return Z


def nystrom(method: Nystrom, q: Tensor, k: Tensor, v: Tensor, state: Any, pairs: Pairs, groups: int) -> Tensor:
    m, out = min(method.landmarks, q.shape[2], k.shape[2]), []
    for b in range(q.shape[0]):
        kept, queries = pairs.keys[b], None if pairs.queries is None else pairs.queries[b]
        for h in range(q.shape[1]):
            ql, kl = landmarks(q[b, h], m, queries), landmarks(k[b, h], m, kept)
            if not len(ql) or not len(kl):
                row = v.new_zeros(q.shape[2], v.shape[3]) + 0 * (q[b, h].sum() + k[b, h].sum() + v[b, h].sum())
            else:
                Z = pinv(torch.softmax(ql @ kl.mT * pairs.scale, -1), method.pinv_iterations)
                inner = torch.softmax(ql @ k[b, h][kept].mT * pairs.scale, -1) @ v[b, h][kept]
                row = torch.softmax(q[b, h] @ kl.mT * pairs.scale, -1) @ (Z @ inner)
            if method.conv:
                taps = state.conv_weight.double()[h // groups]
                reach = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] + len(taps) // 2
                inside = (reach >= 0) & (reach < len(taps))
                row = row + torch.where(inside, taps[reach.clamp(0, len(taps) - 1)], 0.0) @ v[b, h]
            out.append(row)
    return torch.stack(out).unflatten(0, q.shape[:2])


# --- hybrids ---


def hybrid(method: Hybrid, q: Tensor, k: Tensor, v: Tensor, state: Any, pairs: Pairs) -> Tensor:
    """Exact pairs and the tail's estimates of all others, under one denominator."""
    b = method.tail.block
    assert pairs.within is not None
    pattern = visible(method.sparse.pattern, q, k, pairs) & pairs.within
    some, inside = _blocks(pairs.within, b), _blocks(torch.ones_like(pairs.within), b)
    whole = some == inside  # padding cuts no block
    exact = (_blocks(pattern, b) > 0) | ((some > 0) & ~whole)
    grow = lambda t: t.repeat_interleave(b, 2).repeat_interleave(b, 3)[:, :, : q.shape[2], : k.shape[2]]  # noqa: E731
    near = torch.exp(q @ k.mT * pairs.scale) * (grow(exact) & pairs.allowed)
    far = tail_kernel(method.tail, q, k, state, pairs) * (grow(whole & ~exact) & pairs.keys[:, None, None])
    far = far * (far.sum(-1, keepdim=True) > 0)  # of a signed estimate nothing may be left
    return normalised(near + far, v)


def _blocks(pairs: Tensor, b: int) -> Tensor:
    """How many pairs of each block: (B, H, query blocks, key blocks)."""
    N, M = pairs.shape[2:]
    padded = torch.nn.functional.pad(pairs.int(), (0, -M % b, 0, -N % b))
    return padded.unflatten(3, (-1, b)).unflatten(2, (-1, b)).sum((3, 5))


def tail_kernel(tail: Any, q: Tensor, k: Tensor, state: Any, pairs: Pairs) -> Tensor:
    """The estimate of e^(scale q_i . k_j), (B, H, N, M)."""
    if tail.name == "performer":
        phi_q, phi_k = features(Performer(tail.features), q, k, state, pairs.scale)
        return phi_q @ phi_k.mT
    B, H, N, M = *q.shape[:3], k.shape[2]
    out = []
    for b in range(B):
        kept = pairs.keys[b]
        for h in range(H):
            x, y = q[b, h], k[b, h]
            if not kept.any():
                out.append(torch.zeros(N, M, dtype=q.dtype))
            elif tail.name == "nystrom":
                m = min(tail.landmarks, N, M)
                near = landmarks(x, m, None if pairs.queries is None else pairs.queries[b])
                far = landmarks(y, m, kept)
                U = torch.exp(near @ far.T * pairs.scale)
                sums = U.sum(1, keepdim=True)
                Z = pinv(U / sums, tail.pinv_iterations)
                right = torch.exp(near @ y.T * pairs.scale) / sums
                out.append(torch.exp(x @ far.T * pairs.scale) @ (Z @ right))
            else:
                blocks = [centroid(tail, x, y[c : c + tail.block], kept[c : c + tail.block], pairs.scale)
                          for c in range(0, M, tail.block)]  # fmt: skip
                out.append(torch.cat(blocks, 1))
    return torch.stack(out).unflatten(0, (B, H))


def centroid(tail: Any, x: Tensor, y: Tensor, kept: Tensor, scale: float) -> Tensor:
    """The estimate of one block, the same for all of its keys: (N, keys)."""
    if not kept.any():
        return torch.zeros(len(x), len(y), dtype=x.dtype)
    mean = y[kept].mean(0)
    exponent = scale * x @ mean
    if tail.second_order != "none":
        away = y[kept] - mean
        covariance = away.T @ away / len(away)
        if tail.second_order == "diagonal":
            covariance = torch.diag(torch.diag(covariance))
        exponent = exponent + scale**2 / 2 * ((x @ covariance) * x).sum(1)
    return torch.exp(exponent)[:, None].expand(-1, len(y))
