"""What a rank or a window loses: the SVD oracle, and curves of every method on activations of a trained model."""

import itertools

import pytest
import torch

from efficient_attn import SlidingWindow, attention, attention_weights, truncated_svd_attention
from efficient_attn.errors import InputError, InputTypeError
from efficient_attn.methods import linformer_weights, nystrom_weights, performer_weights, random_projection
from efficient_attn.methods.hybrid import plan

pytest.importorskip("sklearn")
from efficient_attn.benchmarks import approximation, figures, suites, view


@pytest.fixture(scope="module")
def trained():
    """Queries, keys and values of a digits transformer after some seconds of training."""
    query, key, value, accuracy = approximation.activations(side=8, steps=100, images=4)
    assert accuracy > 0.8  # trained: guessing gives 0.1
    return query, key, value


@pytest.fixture(scope="module")
def curves(trained):
    return {name: approximation.curve(name, *trained) for name in approximation.CURVES}


@pytest.mark.parametrize("name", approximation.CURVES)
def test_error_falls_as_rank_and_density_rise(name, curves):
    points = curves[name]
    assert len(points) >= 3
    errors = [point.error for point in points]
    assert all(later <= earlier * 1.02 + 1e-12 for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.5 * errors[0], errors
    assert all(later.scores >= earlier.scores for earlier, later in itertools.pairwise(points))


@pytest.mark.parametrize("tail", ["Nystrom", "Performer"])
def test_a_tail_beats_dropping_the_rest(tail, trained, curves):
    """The same exact part without a tail, which is the pattern widened to blocks of 16, loses more."""
    query, key, value = trained
    exact = attention(query, key, value)
    joined = {point.spec.partition("+")[0]: point.error for point in curves[f"window + {tail}"]}
    for side in (0, 15, 31):
        near = plan(SlidingWindow(left=side, right=side), query, key, 16).exact
        alone = (attention(query, key, value, mask=near) - exact).norm() / exact.norm()
        assert joined[f"sliding_window:left={side},right={side}"] < alone


def test_svd_equals_its_definition_and_is_the_best(trained):
    query, key, value = (t[:1] for t in trained)
    weights = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1)
    left, values, right = torch.linalg.svd(weights)
    for rank in (1, 4, 16):
        found = truncated_svd_attention(query, key, value, rank)
        best = left[..., :rank] @ torch.diag_embed(values[..., :rank]) @ right[..., :rank, :]
        torch.testing.assert_close(found.out, best @ value)
        torch.testing.assert_close(found.error, (weights - best).norm(dim=(-2, -1)) / weights.norm(dim=(-2, -1)))
        E = torch.randn(rank, 64, dtype=query.dtype, generator=torch.Generator().manual_seed(0)) / 8
        W = random_projection(rank, 16, generator=torch.Generator().manual_seed(0), dtype=query.dtype)
        for other in (
            linformer_weights(query, key, E, E),
            nystrom_weights(query, key, landmarks=rank),
            performer_weights(query, key, W),
        ):
            assert torch.linalg.matrix_rank(other, rtol=1e-9).max() <= rank
            error = (weights - other).norm(dim=(-2, -1)) / weights.norm(dim=(-2, -1))
            assert (error >= found.error).all()
    whole = truncated_svd_attention(query, key, value, 64)
    torch.testing.assert_close(whole.out, attention(query, key, value))
    assert (whole.error == 0).all()


def test_svd_takes_every_mask():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, n, 8, generator=g) for h, n in ((4, 9), (2, 12), (2, 12)))
    key_mask = torch.rand(2, 12, generator=g) < 0.7
    key_mask[1] = False
    hidden = ~key_mask[:, None, :, None]
    keywords = {
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "bias": torch.randn(9, 12, generator=g),
        "scale": 0.3,
    }
    poisoned = [t.masked_fill(hidden, torch.nan) for t in (key, value)]
    found = truncated_svd_attention(query, *poisoned, 12, key_mask=key_mask, **keywords)
    expected = attention(query, key, value, mask=key_mask[:, None, None, :], **keywords)
    torch.testing.assert_close(found.out, expected, rtol=1e-4, atol=1e-5)
    assert (found.error[1] == 0).all() and (found.out[1] == 0).all()
    found = truncated_svd_attention(query, key, value, 2, key_mask=key_mask, **keywords)
    weights = attention_weights(query, key, mask=key_mask[:, None, None, :], **keywords)
    lost = torch.linalg.svdvals(weights)[..., 2:].norm(dim=-1) / weights.norm(dim=(-2, -1)).clamp(min=1e-30)
    torch.testing.assert_close(found.error, lost, rtol=1e-4, atol=1e-6)
    for rank, error in ((0, InputError), (2.0, InputTypeError), (True, InputTypeError)):
        with pytest.raises(error, match="rank must be"):
            truncated_svd_attention(query, key, value, rank)


def test_the_picture_has_every_family(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {"type": "cell", "suite": "fidelity", "status": "ok", "config": {"family": name, "source": "digits", "size": k},
         "error": 1 / k, "scores": k}
        for name in approximation.CURVES
        for k in (4, 8)
    ]  # fmt: skip
    rows = view.rows(records)
    drawn = figures.panels(suites.get("fidelity"), rows)
    assert [panel.title for panel in drawn] == ["Error of low-rank and hybrid methods", "Error of sparse methods"]
    assert {row["series"] for panel in drawn for row in panel.rows} == set(approximation.CURVES)
    assert figures.overview(rows, tmp_path / "curve.png") and (tmp_path / "curve.png").stat().st_size > 10_000
