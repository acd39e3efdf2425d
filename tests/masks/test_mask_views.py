"""BlockMask as others see it: FlexAttention's masks, and pictures."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from support.mask_cases import SIZES, assert_canonical, assert_valid, random_bits, variants
from torch.nn.attention import flex_attention

from efficient_attn import BlockMask, MaskError

# --- FlexAttention ---


@pytest.mark.parametrize("q_len, kv_len, block_size", [s for s in SIZES if s[0] * s[1]])
def test_flex_round_trip(q_len, kv_len, block_size):
    for mask, bits in variants(q_len, kv_len, block_size):
        theirs = mask.to_flex()
        assert mask.block_size == theirs.BLOCK_SIZE and theirs.seq_lengths == (q_len, kv_len)
        again = BlockMask.from_flex(theirs)
        assert again.equivalent(mask)
        asked = flex_attention.create_mask(theirs.mask_mod, 2, 3, q_len, kv_len, device="cpu")
        assert torch.equal(asked, bits.expand(2, 3, -1, -1))


@pytest.mark.parametrize("block_size", [(128, 128), (32, 64), (512, 512), (48, 16), (20, 128), (8, 8)])
def test_from_flex_is_exact_for_any_block_size(block_size):
    documents = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0)).sort().values

    def mods():
        yield lambda b, h, q, k: q >= k
        yield lambda b, h, q, k: (documents[q] == documents[k.clamp(max=299)]) & (h + b < 3)
        yield lambda b, h, q, k: torch.where(b == 0, q - k < 20, k % 3 == h)

    for mod in mods():
        theirs = flex_attention.create_block_mask(mod, 2, 3, 300, 400, device="cpu", BLOCK_SIZE=block_size)
        mask = BlockMask.from_flex(theirs)
        assert torch.equal(mask.to_dense(), flex_attention.create_mask(mod, 2, 3, 300, 400, device="cpu"))
        assert_valid(mask)
        assert_canonical(mask)


def test_from_flex_takes_full_blocks_as_they_are():
    counts, columns = torch.tensor([[[0, 1, 0]]], dtype=torch.int32), torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    full_counts = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    full = torch.tensor([[[[0, 2, 9], [0, 0, 0], [1, 0, 0]]]], dtype=torch.int32)  # past the count: undefined
    theirs = flex_attention.BlockMask.from_kv_blocks(
        counts,
        columns,
        full_counts,
        full,
        BLOCK_SIZE=16,
        mask_mod=lambda b, h, q, k: k > q + 1000,
        compute_q_blocks=False,
    )
    expected = torch.zeros(48, 48, dtype=torch.bool)
    expected[:16, :16] = expected[:16, 32:] = expected[32:, 16:32] = True
    assert torch.equal(BlockMask.from_flex(theirs).to_dense()[0, 0], expected)
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        BlockMask.from_flex(theirs[0])  # has lost the mask_mod that decides the partial block
    theirs.kv_num_blocks.zero_()
    assert torch.equal(BlockMask.from_flex(theirs[0]).to_dense()[0, 0], expected)


def test_from_flex_checks_what_it_reads():
    with pytest.raises(MaskError, match="flex_attention"):
        BlockMask.from_flex(torch.ones(3))
    counts, columns = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[[7]]]], dtype=torch.int32)
    theirs = flex_attention.BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=16, compute_q_blocks=False)
    with pytest.raises(MaskError, match="outside"):
        BlockMask.from_flex(theirs)


def test_flex_attention_runs_under_our_mask():
    bits = random_bits(70, 90)
    bits[..., 0] = True
    mask = BlockMask.from_dense(bits, block_size=32).with_lengths([60, 90])
    q, k, v = (torch.randn(2, 3, n, 8) for n in (70, 90, 90))
    out = flex_attention.flex_attention(q, k, v, block_mask=mask.to_flex())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
    torch.testing.assert_close(out, expected)


# --- pictures ---


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_terminal_can_print_a_mask(encoding, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    print(BlockMask(64, 64).with_causal(), flush=True)
    picture = terminal.buffer.getvalue().decode(encoding).splitlines()[1:]
    assert len(picture) == 18 and len(set(map(len, picture))) == 1
    assert ("█" in picture[-2]) == (encoding == "utf-8") and ("#" in picture[-2]) == (encoding != "utf-8")


def test_repr_draws_a_small_picture():
    for mask, _ in variants(300, 130, (48, 112)):
        lines = repr(mask).splitlines()
        assert lines[0].startswith("BlockMask(shape=") and "density=" in lines[0]
        assert len(lines) <= 19 and all(len(line) <= 34 for line in lines[1:])
    picture = repr(BlockMask(64, 64).with_causal()).splitlines()[2:-1]
    assert picture[0][1] in "▒▓█" and picture[0][32] == " " and picture[-1][1] == "█"
    assert len(repr(BlockMask(0, 5)).splitlines()) == 1


def test_a_single_visible_pair_shows():
    bits = torch.zeros(3000, 3000, dtype=torch.bool)
    bits[1500, 2999] = True
    assert "░" in repr(BlockMask.from_dense(bits))
    assert "░" in repr(BlockMask(2**20, 2**20).with_window((0, 0)))


def test_large_pictures_agree_with_small_ones():
    from efficient_attn.masks import picture

    bits = random_bits(1024, 768, batch=1, heads=1)
    for mask in (
        BlockMask.from_dense(bits, block_size=32),
        BlockMask(1024, 768).with_window((200, 30), alignment="top_left"),
    ):
        exact = picture.coverage(*mask.parts, 16, 24)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(picture, "EXACT_PAIRS", 0)
            coarse = picture.coverage(*mask.parts, 16, 24)
        assert (exact - coarse).abs().max() < (1e-9 if mask.indptr is not None else 0.05)


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    mask = BlockMask.from_dense(random_bits(67, 90), block_size=16)
    axes = mask.plot(batch=1, head=2)
    drawn = torch.from_numpy(axes.images[0].get_array().data.copy())
    assert torch.equal(drawn.bool(), random_bits(67, 90)[1, 2])
    assert mask.plot(ax=axes) is axes
    pyplot.close("all")
    with pytest.raises(MaskError, match="nothing to plot"):
        BlockMask(0, 3).plot()
