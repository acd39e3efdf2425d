"""How near the low-rank methods come to softmax attention, and that what they learn keeps its size at every length."""

import itertools
import math

import pytest
import torch
from support.lowrank_papers import NK, D, generator, make, relative_error

from efficient_attn.errors import InputError
from efficient_attn.functional import attention
from efficient_attn.methods import (
    iterative_pinv,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    parse,
    performer_attention,
    performer_features,
    performer_weights,
    random_projection,
    segment_means,
)

# --- approximation ---


def smooth(n=64, d=16, seed=0):
    """Queries, keys and values that vary slowly along the sequence, as activations do."""
    walk = torch.randn(3, 2, 2, n, d, generator=generator(seed), dtype=torch.float64).cumsum(3)
    walk = (walk - walk.mean(3, keepdim=True)) / walk.std(3, keepdim=True)
    return list(walk)


def test_linformer_with_identity_projections_is_exact():
    q, k, v = make(4, 2)
    eye = torch.eye(NK, dtype=torch.float64)
    torch.testing.assert_close(linformer_attention(q, k, v, eye, eye), attention(q, k, v))


def test_linformer_error_falls_with_rank():
    q, k, v = smooth()
    errors = []
    for rank in (4, 8, 16, 32, 64):
        pool = (torch.arange(64) * rank // 64 == torch.arange(rank)[:, None]).double()
        pool = pool / pool.sum(-1, keepdim=True)
        errors.append(relative_error(linformer_attention(q, k, v, pool, pool), attention(q, k, v)))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[3] and errors[-1] < 1e-12


def test_nystrom_error_falls_with_landmarks_to_none_at_n():
    q, k, v = smooth()
    exact = attention(q, k, v)
    errors = [
        relative_error(nystrom_attention(q, k, v, landmarks=m, pinv_iterations=24), exact) for m in (2, 8, 32, 64)
    ]
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.5 * errors[0]
    assert errors[-1] < 1e-6


def test_iterative_pinv_converges_to_the_pseudo_inverse():
    A = torch.softmax(4 * torch.randn(3, 8, 8, generator=generator(), dtype=torch.float64), -1)
    torch.testing.assert_close(iterative_pinv(A, 30), torch.linalg.pinv(A))
    A[:, 5:] = 0
    A[:, :, 6:] = 0
    Z = iterative_pinv(A, 30)
    assert (Z[:, 6:] == 0).all() and (Z[:, :, 5:] == 0).all() and iterative_pinv(A.half()).dtype == torch.float32
    assert (iterative_pinv(torch.zeros(2, 3, 3)) == 0).all()


def test_performer_error_falls_with_features_and_orthogonality():
    q, k, v = smooth()
    q, k = 0.4 * q, 0.4 * k
    exact = attention(q, k, v)

    def mean_error(m, orthogonal):
        draws = (
            random_projection(m, 16, orthogonal=orthogonal, generator=generator(s), dtype=q.dtype) for s in range(12)
        )
        return sum(relative_error(performer_attention(q, k, v, w), exact) for w in draws) / 12

    errors = [mean_error(m, True) for m in (8, 32, 128, 512)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))
    assert mean_error(16, True) < mean_error(16, False)


def test_performer_weights_estimate_softmax_without_bias():
    """The numerator and denominator estimate exp(scale q.k) and its row sum: many features come close to softmax."""
    q, k = (0.5 * t for t in make(1, 1)[:2])
    w = random_projection(60000, D, generator=generator(), dtype=torch.float64)
    P = torch.softmax(q @ k.mT / math.sqrt(D), -1)
    torch.testing.assert_close(performer_weights(q, k, w), P, rtol=0.15, atol=0.01)


@pytest.mark.parametrize("is_causal", [False, True])
def test_performer_is_stable_for_large_inputs(is_causal):
    q, k, v = (t.detach().float() for t in make(2, 2, 200, 200))
    w = random_projection(32, D, generator=generator())
    factor = 3.0 if is_causal else 30.0
    inputs = [(factor * q).requires_grad_(), (factor * k).requires_grad_(), v.requires_grad_()]
    a, b = performer_features(*inputs[:2], w, is_causal=is_causal)
    out, normaliser = linear_attention(a, b, v, is_causal=is_causal, return_normaliser=True)
    assert (normaliser > 0).all() and (is_causal or (normaliser >= 1).all())
    assert (out.abs() <= v.abs().max() * (1 + 1e-5)).all()  # an average of values
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert gradient.isfinite().all()


def test_random_projection():
    w = random_projection(40, 16, generator=generator())
    blocks = [w[:16], w[16:32], w[32:]]
    for block in blocks:
        direction = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(direction @ direction.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    many = random_projection(4000, 16, num_heads=2, generator=generator())
    assert many.shape == (2, 4000, 16) and many.dtype == torch.float32
    torch.testing.assert_close(many.square().sum(-1).mean(), torch.tensor(16.0), rtol=0.03, atol=0)  # chi-squared, mean
    torch.testing.assert_close(many.square().sum(-1).var(), torch.tensor(32.0), rtol=0.1, atol=0)  # and variance 2 D
    torch.testing.assert_close(
        many.mean((0, 1)), torch.zeros(16), rtol=0, atol=0.05
    )  # uniform directions, no sign kept
    assert torch.equal(w, random_projection(40, 16, generator=generator()))
    assert not torch.equal(w, random_projection(40, 16, generator=generator(9)))
    plain = random_projection(3, 16, orthogonal=False, generator=generator())
    assert (plain @ plain.T).fill_diagonal_(0).abs().max() > 0.1
    with pytest.raises(InputError, match="must be >= 1"):
        random_projection(0, 16)


def test_segment_means_are_balanced():
    x = torch.arange(10.0)[None, None, :, None]
    means, used = segment_means(x, 3)
    assert used is None
    torch.testing.assert_close(means.flatten(), torch.tensor([1.5, 5.0, 8.0]))  # 0..3, 4..6, 7..9
    means, used = segment_means(x, 4, torch.tensor([[True, False, True] + [False] * 6 + [True]]))
    assert used.tolist() == [[True, True, True, False]]
    torch.testing.assert_close(means.flatten(), torch.tensor([0.0, 2.0, 9.0, 0.0]))


def test_elu_features_keep_small_numbers():
    """Of a query beside one key whose feature is 1, the normaliser is the feature."""
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 2.0], requires_grad=True)
    one = torch.zeros(1, 1, 1, 1)
    _, n = linear_attention(x[None, None, :, None], one, one, feature_map="elu", return_normaliser=True)
    out = n.flatten()
    torch.testing.assert_close(
        out, torch.tensor([math.exp(-80), math.exp(-20), math.exp(-1), 1.0, 3.0]), rtol=1e-6, atol=0
    )
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(
        gradient, torch.tensor([math.exp(-80), math.exp(-20), math.exp(-1), 1.0, 1.0]), rtol=1e-6, atol=0
    )


def test_linformer_starts_as_means_of_neighbours() -> None:
    state = parse("linformer:rank=4,max_len=10").build(8, 2, 4)
    projection = state.key_projection.detach()
    torch.testing.assert_close(projection.sum(-1), torch.ones(4))
    assert ((projection > 0).sum(0) == 1).all()


@pytest.mark.parametrize("init", ["pool", "normal"])
@pytest.mark.parametrize("share", ["headwise", "kv", "none"])
def test_linformer_keeps_its_size_at_every_length(init: str, share: str) -> None:
    """What is built for 512 keys and gets few of them is as large as what is built for these few."""
    torch.manual_seed(0)
    size = {}
    for max_len, length in itertools.product((512, 0), (32, 100, 512)):
        method = parse(f"linformer:rank=32,max_len={max_len or length},init={init},share={share}")
        q, k, v = torch.randn(3, 2, 2, length, 16)
        size[max_len, length] = float(method.attend(q, k, v, state=method.build(32, 2, 16))[0].norm())
    for length in (32, 100, 512):
        assert 0.6 < size[512, length] / size[0, length] < 1.4, size


def test_linformer_of_an_older_checkpoint_is_as_it_was() -> None:
    """A checkpoint without the powers of the length computes what it was trained for, strictly loaded."""
    method = parse("linformer:rank=4,max_len=64")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 16, 4)
    kept, state, assigned = method.build(8, 2, 4), method.build(8, 2, 4), method.build(8, 2, 4)
    old = {name: tensor for name, tensor in kept.state_dict().items() if name != "length_powers"}
    state.load_state_dict(old, strict=True)
    assigned.load_state_dict(old, strict=True, assign=True)
    expected = linformer_attention(q, k, v, kept.key_projection, kept.value())
    for loaded in (state, assigned):
        torch.testing.assert_close(method.attend(q, k, v, state=loaded)[0], expected)
        again = method.build(8, 2, 4)
        again.load_state_dict(loaded.state_dict())
        torch.testing.assert_close(method.attend(q, k, v, state=again)[0], expected)
    torch.testing.assert_close(method.attend(q, k, v, state=kept)[0], 4 * expected)


def test_linformer_weights_are_those_of_the_scaled_output() -> None:
    method = parse("linformer:rank=4,max_len=64,init=normal")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 4)
    key_mask = torch.arange(16) < torch.tensor([[16], [5]])
    state = method.build(8, 2, 4)
    out, weights = method.attend(q, k, v, state=state, key_mask=key_mask, need_weights=True)
    torch.testing.assert_close(weights @ v, out)
    alone = method.attend(q[1:], k[1:, :, :5], v[1:, :, :5], state=state)[0]
    torch.testing.assert_close(out[1:], alone)
