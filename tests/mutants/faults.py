"""Deliberate faults, one a line or two: each must be found by the tests named beside it, which are part of the default
ones. `make mutants` applies them one by one in a copy and prints what was found; tests/project/test_mutants.py sees
to it that the list keeps fitting the code. The faults of the CUDA kernels are in tests/kernels/cuda/emulator/faults.py.

    (name, file, right, wrong, tests): `right` occurs once in the file; tests are arguments of pytest
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault; `build` names the extension that has to be compiled again for it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    build: str = ""


MASKS = "tests/masks"
TOKENS = "tests/patterns/test_patterns.py"
CONTENT = "tests/patterns/test_patterns_content.py"
IMAGES = "tests/patterns/test_patterns_images.py"
DEEPSPEED = "tests/patterns/test_patterns_deepspeed.py"
FUZZ = "tests/contract/test_fuzz.py"
CONTRACT = "tests/contract/test_contract.py"
HIDDEN = "tests/methods/test_hidden_keys.py"
LOWRANK = "tests/methods/test_lowrank.py tests/methods/test_lowrank_contract.py tests/methods/test_lowrank_error.py"
HYBRID = "tests/methods/test_hybrid.py"
METHODS = "tests/methods/test_methods.py"
LINEAR = "tests/methods/test_linear_attention.py"
MODULE = "tests/module/test_multihead.py"
TRITON_EDGES = "tests/kernels/triton/test_triton.py -k promise and edges"
TRITON_ORDERS = "tests/kernels/triton/test_triton.py -k promise and orders"

lists, algebra, block_mask, rules = (
    f"efficient_attn/masks/{name}.py" for name in ("lists", "algebra", "block_mask", "rules")
)
tokens, bigbird, images, deepspeed, content, buckets, sorted_tokens, combined = (
    f"efficient_attn/patterns/{name}.py"
    for name in ("tokens", "bigbird", "images", "deepspeed", "content", "buckets", "sorted_tokens", "combined")
)
functional, inputs, defaults = (f"efficient_attn/{name}.py" for name in ("functional", "inputs", "defaults"))
module_masks, module_nested, module_projections = (
    f"efficient_attn/multihead/{name}.py" for name in ("masks", "nested", "projections")
)
methods = "efficient_attn/methods"
reference = "efficient_attn/backends/reference"
models = "efficient_attn/models"
integrations = "efficient_attn/integrations"

FAULTS = [
    # --- masks ---
    Fault("a bit further", lists, "* 0x0102040810204080) >> 56", "* 0x0102040810204080) >> 55", MASKS),
    Fault("the last block of queries forgotten", lists, "return -(-self.q_len // self.block_q)",
          "return self.q_len // self.block_q", MASKS),
    Fault("ragged blocks of the wrong side", lists, "return 2 * below.long() +", "return below.long() +", MASKS),
    Fault("pairs beyond the keys are counted", lists, "(self.kv_len - cols * self.block_k).clamp(max=self.block_k)",
          "self.block_k", MASKS),
    Fault("one pair too few is full", lists, "torch.where(seen == pairs, FULL, classes)",
          "torch.where(seen >= pairs - 1, FULL, classes)", MASKS),
    Fault("transposed blocks out of order", lists, "return indptr, i_block[order],", "return indptr, i_block,", MASKS),
    Fault("a swapped mask with the old tiles", lists, "unpack_bits(lists.tiles[first : first + step]).mT)",
          "unpack_bits(lists.tiles[first : first + step]))", MASKS),
    Fault("bits are counted wrongly", lists, "torch.bitwise_right_shift(counts, 4, out=half)",
          "torch.bitwise_right_shift(counts, 5, out=half)", MASKS),
    Fault("the wider of two windows", algebra, "max(lows, default=None), min(highs, default=None)",
          "min(lows, default=None), min(highs, default=None)", MASKS),
    Fault("a gap between windows is closed", algebra, "first[1] + 1 < second[0]", "first[1] + 2 < second[0]", MASKS),
    Fault("a window one short", algebra, "offset - low, -1", "offset - low - 1, -1", MASKS),
    Fault("a window's last key forgotten", algebra, "(i + high + 1).clamp", "(i + high).clamp", MASKS),
    Fault("a length is one key too long", algebra, "seen & (k < width)", "seen & (k <= width)", MASKS),
    Fault("a window cuts no block on its left", algebra, ", cuts | (j_first - i_last < low)", ", cuts", MASKS),
    Fault("a window drawn the wrong way round", algebra, "seen = in_interval(j - i, window) & (j <",
          "seen = in_interval(i - j, window) & (j <", MASKS),
    Fault("a key too many is said to be seen", algebra, "(j - high < grid.q_len)", "(j - high <= grid.q_len)",
          f"{HIDDEN} {MASKS} {FUZZ}"),
    Fault("a block too few within reach", algebra, "// grid.block_k - first // grid.block_k + 1, 0)",
          "// grid.block_k - first // grid.block_k, 0)", MASKS),
    Fault("the longer of two lengths", block_mask, "torch.minimum(a.kv_lengths, b.kv_lengths)",
          "torch.maximum(a.kv_lengths, b.kv_lengths)", MASKS),
    Fault("the window's left side to the right", block_mask, "self.window_offset - left", "self.window_offset + left",
          MASKS),
    Fault("an index one beyond is let through", rules, "(indices >= grid.n_k)", "(indices > grid.n_k)", MASKS),
    Fault("a block may be listed twice", rules, "((step == 0) & same_row[1:nnz]).any()", "(step == 99).any()", MASKS),
    Fault("lengths may be negative", rules, "(kv_lengths < 0) | (kv_lengths > kv_len)", "(kv_lengths > kv_len)", MASKS),
    # --- patterns ---
    Fault("a window one key short", tokens, "(away >= -self.left)", "(away > -self.left)", TOKENS),
    Fault("a window's sides exchanged", tokens, "window=(self.left, self.right), window_offset=start",
          "window=(self.right, self.left), window_offset=start", TOKENS),
    Fault("the alignment is forgotten", tokens, "window_offset=start", "window_offset=0", TOKENS),
    Fault("one sees the next token", tokens, "return SlidingWindow(-1, 0, self.alignment)",
          "return SlidingWindow(-1, 1, self.alignment)", TOKENS),
    Fault("nothing is dilated", tokens, "return reach & (away % self.dilation == 0)", "return reach", TOKENS),
    Fault("a stride one short", tokens, "(away.abs() <= self.stride)", "(away.abs() < self.stride)", TOKENS),
    Fault("each head summarises the same", tokens, "self.stride - self.summary * self.shift",
          "self.stride - self.shift", TOKENS),
    Fault("blocks of different places share a tile", tokens,
          "far = self.stride + max(grid.block_q, grid.block_k)\n        shift = (top - left).clamp(-far, far)",
          "far = 1\n        shift = (top - left).clamp(-far, far)", TOKENS),
    Fault("global tokens do not see everything", tokens, " | self._is_global(i) | self._is_global(j)",
          " | self._is_global(j)", TOKENS),
    Fault("the prefix is one longer", tokens, "(j < self.prefix)", "(j <= self.prefix)", TOKENS),
    Fault("documents run into each other", tokens, "torch.arange(q_len) // self.lengths[0]",
          "(torch.arange(q_len) + 1) // self.lengths[0]", TOKENS),
    Fault("half a window of blocks", bigbird, "row + half + 1, torch.full_like(row, n_k)], 1)",
          "row + half, torch.full_like(row, n_k)], 1)", TOKENS),
    Fault("global blocks at the wrong end", bigbird, "-(-self.global_blocks // 2), self.global_blocks // 2",
          "self.global_blocks // 2, -(-self.global_blocks // 2)", TOKENS),
    Fault("a random block drawn twice", bigbird, "rank = rank + (rank >= earlier)", "rank = rank + (rank > earlier)",
          TOKENS),
    Fault("a neighbourhood off its centre", images, "(leader - self.kernel // 2).clamp(min=0), count",
          "(leader - self.kernel // 2 + 1).clamp(min=0), count", IMAGES),
    Fault("a neighbourhood cut at the border", images, "(leader - self.kernel // 2).clamp(min=0), count - self.kernel)",
          "(leader - self.kernel // 2).clamp(min=0), count)", IMAGES),
    Fault("the last stride group has no leader", images, "self.stride * self.stride + within, count - 1)",
          "self.stride * self.stride + within, count)", IMAGES),
    Fault("a causal stride group led by its middle", images, "self.stride - 1 if self.causal else self.stride // 2",
          "self.stride // 2", IMAGES),
    Fault("additional keys seen by prefix tokens alone", images, "(j < self.prefix) | (j >= mask.q_len)",
          "(j < self.prefix)", IMAGES),
    Fault("the columns of another image", images, "x % width == y % width", "x % width == y % (width + 1)", IMAGES),
    Fault("blocks above the diagonal stay", deepspeed, "(seen.tril() if self._lower else seen)", "seen", DEEPSPEED),
    Fault("every head has the first one's blocks", deepspeed, "head = head if self._heads_differ else 0", "head = 0",
          DEEPSPEED),
    Fault("a block that is not full yet has a share", content, "whole & self._ended(key_mask, Nk, key.device)", "whole",
          f"{CONTENT} -k how_many_tokens"),
    Fault("one block fewer around the diagonal", content, "column > top // self.block - self.local",
          "column >= top // self.block", CONTENT),
    Fault("the wrong corner of the box", content, "mean.clamp(min=0) @ high + mean.clamp(max=0) @ low",
          "mean.clamp(min=0) @ low + mean.clamp(max=0) @ high", CONTENT),
    Fault("the mass includes the block itself", content, "before = mass.cumsum(-1) - mass", "before = mass.cumsum(-1)",
          CONTENT),
    Fault("forced blocks are dropped", content, "wanted = torch.maximum(wanted, forced.sum(-1))", "wanted = wanted",
          CONTENT),
    Fault("a block that is cut has a share of the mass", content,
          "torch.where(whole & self._ended(key_mask, Nk, key.device), counts, 0)",
          "counts.expand_as(seen)", CONTENT),
    Fault("a block that is cut counts as whole", content, "whole = some & (count(bottom, top)",
          "whole = some & (count(top, bottom)", f"{CONTENT} {FUZZ}"),
    Fault("padding is no part of what a mask shows", content, "mask, key_mask = mask & BlockMask.from_dense(pairs, "
          "block_size=block), None", "key_mask = None", f"{FUZZ} {CONTENT}"),
    Fault("a chunk too many behind", buckets, "(ahead >= 0) & (ahead <= 1)", "(ahead >= 0) & (ahead <= 2)", CONTENT),
    Fault("the last block of sorted tokens forgotten", sorted_tokens, "-(-stop // BLOCK) - first",
          "stop // BLOCK - first", CONTENT),
    Fault("pairs of two rounds are counted twice", sorted_tokens, "for e in range(before)]", "for e in range(0)]",
          CONTENT),
    Fault("a chunk too many behind in the order", sorted_tokens, "_search(chunk, own - 1", "_search(chunk, own - 2",
          CONTENT),
    Fault("a round before joins chunks of later keys", sorted_tokens, "self.chunks.of(line, cols, own - 1)",
          "self.chunks.of(line, cols, own + 1)", CONTENT),
    Fault("a token sees itself beside others", buckets, "return seen & (i != j) if self.shared_qk else seen",
          "return seen", CONTENT),
    Fault("buckets of unequal size", buckets, "place * n // count.clamp(min=1)", "place * n // (count + 1)", CONTENT),
    Fault("neighbouring heads share a pattern", combined, "self.parts[head % len(self.parts)].visible",
          "self.parts[head // len(self.parts) % len(self.parts)].visible", TOKENS),
    Fault("one head's blocks for all", combined, "% num_heads % len(masks) == first",
          "% num_heads % len(masks) == 0", TOKENS),
    # --- the operator and its definition ---
    Fault("the diagonal at the other corner", defaults, 'kv_len - q_len if alignment == "bottom_right" else 0',
          'kv_len - q_len if alignment == "top_left" else 0', f"{CONTRACT} {TOKENS}"),
    Fault("no scale", defaults, "return float(head_dim**-0.5)", "return 1.0", CONTRACT),
    Fault("masked keys keep their numbers", inputs,
          "t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in tensors", "t for t in tensors",
          f"{HIDDEN} -k nobody_sees"),
    Fault("a masked pair is only unlikely", inputs, "torch.where(visible, bias, -torch.inf)",
          "torch.where(visible, bias, -1e4)", f"{CONTRACT} -k padding"),
    Fault("padding of one row for all", functional, "if bool((lengths == key_mask.shape[1]).all()):",
          "if bool((lengths == key_mask.shape[1]).any()):", f"{HIDDEN} -k nobody_sees"),
    Fault("what a bias hides has a say in a choice", inputs, "    return None if bool(shown.all()) else "
          "as_block_mask(shown, query, key)", "    return None", f"{HIDDEN} -k does_not_see"),
    Fault("parts are joined without their weights", functional, "shares = torch.exp(stacked - top)",
          "shares = torch.ones_like(stacked)", CONTRACT),
    Fault("the joined lse is its maximum", functional, "(torch.log(total.masked_fill(empty, 1.0)) + top)", "(top + 0)",
          CONTRACT),
    Fault("an lse's gradient with the wrong sign", f"{reference}/attention.py", "delta = delta - grad_lse.to(dtype)",
          "delta = delta + grad_lse.to(dtype)", "tests/contract/test_conformance.py -k grad_lse"),
    Fault("a dropped weight is not made up for", f"{reference}/attention.py",
          "torch.where(kept, tensor / (1.0 - dropout_p), 0.0)", "torch.where(kept, tensor, 0.0)",
          "tests/contract/test_conformance.py -k dropout"),
    Fault("a bias's gradient with the scale", f"{reference}/attention.py", "grad_scores.sum_to_size(bias.shape)",
          "(grad_scores * scale).sum_to_size(bias.shape)", "tests/contract/test_conformance.py -k bias"),
    Fault("heads of another group", f"{reference}/attention.py",
          "tensor.repeat_interleave(heads // max(tensor.shape[1], 1), dim=1)",
          "tensor.repeat(1, heads // max(tensor.shape[1], 1), 1, 1)", "tests/contract/test_conformance.py -k grouped"),
    Fault("pieces of a second derivative all begin at row 0", "efficient_attn/ops/second_derivative.py",
          "i = torch.arange(Nq, device=device)[place.rows]",
          "i = torch.arange(place.rows.stop - place.rows.start, device=device)", f"{CONTRACT} -k double_backward"),
    Fault("one key too few of the past", f"{reference}/linear_attention.py", "masked_fill(j > i + offset, 0.0)",
          "masked_fill(j >= i + offset, 0.0)", LINEAR),
    Fault("a gradient of the wrong half", "efficient_attn/backends/features.py",
          "dq = da if a_slope is None else da * a_slope", "dq = da", LINEAR),
    Fault("elu without its one", "efficient_attn/backends/features.py",
          "k.clamp(min=0.0) + 1.0", "k.clamp(min=0.0) + 0.5", LOWRANK),
    # --- methods ---
    Fault("weights are not made up for dropped keys", f"{methods}/lowrank.py", "value / (1.0 - dropout_p)", "value",
          LOWRANK),
    Fault("the last columns of a projection", f"{methods}/linformer.py", "return projection[..., :length]",
          "return projection[..., -length:]", LOWRANK),
    Fault("few keys are small", f"{methods}/linformer.py", '(0.0, 1.0) if self.method.init == "pool"',
          '(0.0, 0.0) if self.method.init == "pool"', f"{LOWRANK} -k linformer"),
    Fault("padding counts as keys", f"{methods}/linformer.py", " if key_mask is None else key_mask.sum(1)", "",
          f"{LOWRANK} -k linformer"),
    Fault("an older checkpoint is scaled too", f"{methods}/linformer.py",
          'torch.zeros_like(self.length_powers, device="cpu")', "self.length_powers.detach().clone()",
          f"{LOWRANK} -k linformer"),
    Fault("sums for means", f"{methods}/linformer.py", "initial = segment / segment.sum(-1, keepdim=True)",
          "initial = segment.double()", LOWRANK),
    Fault("another pseudo-inverse", f"{methods}/nystrom.py", "beta=3.25, alpha=-0.25", "beta=3.0, alpha=-0.25",
          LOWRANK),
    Fault("segments one token further", f"{methods}/nystrom.py", "(mask.cumsum(-1) - 1) * used_count",
          "mask.cumsum(-1) * used_count", LOWRANK),
    Fault("padded queries shape the landmarks", f"{methods}/nystrom.py",
          '"query_mask": key_mask if query.shape[2] == key.shape[2] else None', '"query_mask": None',
          f"{HIDDEN} -k padded_queries"),
    Fault("every draw is the first", f"{methods}/performer.py", "self.method.seed + number * 0x9E3779B97F4A7C15",
          "self.method.seed + 0 * number", LOWRANK + " " + METHODS),
    Fault("no new features when they are due", f"{methods}/performer.py", "if int(self.calls) >= interval:",
          "if int(self.calls) > interval:", LOWRANK + " " + METHODS),
    Fault("a lone token sees nothing", f"{methods}/buckets.py", "out = torch.where(alone[..., None], value, out)",
          "out = out", CONTENT),
    Fault("a tail counts exact blocks again", f"{methods}/hybrid/split.py", "tail = whole & ~exact", "tail = whole",
          HYBRID),
    Fault("a block that is cut is left out", f"{methods}/hybrid/split.py", "in_pattern | (in_allowed & ~whole)",
          "in_pattern", HYBRID),
    Fault("a tail's mass without its scale", f"{methods}/hybrid/tail.py", "(mass.log() + log_scale).masked_fill",
          "mass.log().masked_fill", HYBRID),
    Fault("a block counts once, not for each key", f"{methods}/hybrid/centroid.py", "bias = count.to(dtype).log()",
          "bias = count.to(dtype).log().clamp(max=0)", HYBRID),
    Fault("twice the variance", f"{methods}/hybrid/centroid.py", "query.square() * (0.5 * call.scale)",
          "query.square() * call.scale", HYBRID),
    Fault("landmarks without their row sums", f"{methods}/hybrid/nystrom.py",
          "lift = top.squeeze(-1) - torch.logsumexp(middle, -1)", "lift = top.squeeze(-1)", HYBRID),
    Fault("a sum over features, not a mean", f"{methods}/hybrid/performer.py", " - math.log(projection.shape[0])", "",
          HYBRID),
    Fault("a NaN that others see is everybody's", f"{methods}/hybrid/performer.py",
          "finite = b.detach().masked_fill(~b.isfinite(), -torch.inf)",
          "finite = b.detach()", f"{HIDDEN} -k does_not_see"),
    Fault("a continued sequence begins anew", f"{methods}/continuation.py", "(i + first - pad)", "(i - pad)",
          "tests/integrations/test_huggingface.py tests/models/test_models_text.py"),
    Fault("a step inside a block chooses for itself", content, 'self.queries == "first" and first % self.block == 0',
          'self.queries == "first"', "tests/models/test_models_generation.py -k by_content"),
    # --- the module ---
    Fault("keys projected as queries", module_projections,
          "k = F.linear(key, weight[E : 2 * E], None if bias is None else bias[E : 2 * E])\n    return q, k, F.linear",
          "k = F.linear(key, weight[:E], None if bias is None else bias[:E])\n    return q, k, F.linear", MODULE),
    Fault("True is attend", module_masks, "key_mask = F.pad(~key_padding_mask,", "key_mask = F.pad(key_padding_mask,",
          MODULE),
    Fault("a mask of pairs is its opposite", module_masks, "mask = F.pad(~attn_mask,", "mask = F.pad(attn_mask,",
          MODULE),
    Fault("appended keys are hidden", module_masks, "F.pad(~key_padding_mask, (0, extra), value=True)",
          "F.pad(~key_padding_mask, (0, extra), value=False)", MODULE),
    Fault("nested sequences see each other's padding", module_nested,
          "padding = positions >= torch.tensor(k_lengths, device=query.device)[:, None]",
          "padding = positions > torch.tensor(k_lengths, device=query.device)[:, None]", f"{MODULE} -k nested"),
    Fault("weights of the first head", f"{methods}/base.py", "return out, weights.mean(1) if",
          "return out, weights[:, 0] if",
          "tests/methods/test_returned_weights.py"),
    # --- integrations ---
    Fault("padding turned the wrong way", f"{methods}/left_padding.py",
          "(places + pads) % length, (places - pads)",
          "(places - pads) % length, (places + pads)", "tests/integrations/test_left_padding.py"),
    Fault("transformers' own scale is lost", f"{integrations}/huggingface.py",
          "scale=None if scaling is None or math.isclose(scaling, query.shape[-1] ** -0.5) else scaling", "scale=None",
          "tests/integrations/test_huggingface.py tests/integrations/test_fidelity.py"),
    Fault("a layer that is not causal is", f"{integrations}/huggingface.py",
          '(_says_causal(module) if is_causal is None else is_causal) and Nq > 1', "Nq > 1",
          "tests/integrations/test_huggingface.py tests/integrations/test_fidelity.py"),
    Fault("a relative position without the mask", f"{integrations}/huggingface.py",
          "(position_bias if bias is None else position_bias + bias)", "position_bias",
          "tests/integrations/test_huggingface_layers.py -k t5"),
    Fault("a call of another shape is taken", f"{integrations}/torch_sdpa.py",
          "if Hq != Hkv and (not enable_gqa or Hq % Hkv):", "if Hq % Hkv:", "tests/integrations/test_torch_sdpa.py"),
    # --- models ---
    Fault("positions turn the other way", f"{models}/positions.py", "torch.cat([-second, first], -1)",
          "torch.cat([second, -first], -1)", "tests/models/test_models_core.py tests/models/test_models_text.py"),
    Fault("positions one further", f"{models}/positions.py", "torch.arange(max_len, dtype=torch.float64)[:, None]",
          "torch.arange(1, max_len + 1, dtype=torch.float64)[:, None]", "tests/models/test_models_core.py"),
    Fault("one patch too many is shown", f"{models}/masking.py", "argsort(dim=1) >= keep", "argsort(dim=1) > keep",
          "tests/models/test_models_vision.py tests/models/test_models_patches.py"),
    Fault("the loss of all patches", f"{models}/masking.py", "torch.where(masked, error, 0).sum()", "error.sum()",
          "tests/models/test_models_vision.py tests/models/test_models_patches.py"),
    Fault("a token less than probable enough", f"{models}/generation.py", "before >= self.top_p)",
          "before + ordered.softmax(-1) >= self.top_p)", "tests/models/test_models_text.py"),
    Fault("beams of another input", f"{models}/generation.py", "parents + offsets * K", "parents + offsets",
          "tests/models/test_models_text.py"),
    Fault("a cache loses what it held", "efficient_attn/cache/contiguous.py", "kept[:, :, :used] = before[:, :, :used]",
          "pass", "tests/cache"),
    Fault("a window drops one key too many", "efficient_attn/cache/contiguous.py", "max(0, rows - (self.window - 1))",
          "max(0, rows - (self.window - 2))", "tests/cache"),
    Fault("a fork writes on a page of both", "efficient_attn/cache/paged.py",
          "if self._users[old] == 1:  # who", "if self._users[old] >= 1:  # who", "tests/cache"),
    Fault("packed sequences from their beginning", "efficient_attn/masks/packed.py",
          "(starts_k - starts_q)[1:] if bottom_right", "(starts_k - starts_q)[:-1] if bottom_right",
          "tests/contract/test_varlen.py"),
    # --- measuring ---
    Fault("seconds for milliseconds", "efficient_attn/measuring/clock.py",
          '"ms": _rounded((low if used is calm else median) * 1e3)',
          '"ms": _rounded(low if used is calm else median)', "tests/measuring/test_benchmarks.py"),
    Fault("the time of all repeats", "efficient_attn/measuring/clock.py", "Sample(wall / count, cpu / count,",
          "Sample(wall, cpu / count,", "tests/measuring/test_benchmarks.py"),
    Fault("every metric should be low", "benchmarks/compare.py",
          "for pattern, sign in ((HIGHER, 1), (LOWER, -1)):", "for pattern, sign in ((HIGHER, -1), (LOWER, -1)):",
          "tests/measuring/test_compare.py"),
    Fault("NaN is no change", "benchmarks/compare.py",
          'verdict = "same" if not math.isfinite(before) and not math.isfinite(after) else "regression"',
          'verdict = "same"', "tests/measuring/test_compare.py"),
    Fault("growth from the wrong length", "efficient_attn/measuring/fit.py", "(length / self.longest) ** self.exponent",
          "(length / self.longest)", "tests/measuring/test_recommend.py tests/measuring/test_profiling_counts.py"),
    # --- Triton ---
    Fault("Triton: weights from an lse without digits", "efficient_attn/ops/attention.py", "COARSE_LSE = 2.0**10",
          "COARSE_LSE = float(\"inf\")", TRITON_EDGES),
    Fault("Triton: the least number hides", "kernels/tiles.py", "(b_size > LARGEST_BIAS)", "(b_size < 0)",
          TRITON_EDGES),
    Fault("Triton: a key too many by the window", "kernels/walk.py",
          "any_end = tl.minimum(i_last + mask.high + 1, keys)",
          "any_end = tl.minimum(i_last + mask.high, keys)", TRITON_EDGES),
    Fault("Triton: a tile full that a length cuts", "kernels/walk.py",
          "lower_bound(mask.indices, begin, begin + clean, keys // SIZE)",
          "lower_bound(mask.indices, begin, begin + clean, tl.cdiv(keys, SIZE))", TRITON_EDGES),
    Fault("Triton: lists of the first head", "kernels/walk.py", "mask.heads == 1, 0, i_h)) * mask.blocks + i_block",
          "mask.heads == 1, 0, 0 * i_h)) * mask.blocks + i_block", TRITON_EDGES),
    Fault("Triton: the sum is not faded", "kernels/attention.py", "select_dot(b_p, m_visible, b_v, b_acc * b_alpha[:, "
          "None], C)", "select_dot(b_p, m_visible, b_v, b_acc, C)", TRITON_EDGES),
    Fault("Triton: dropped weights are not made up for", "kernels/attention.py",
          "b_out = state.acc * (x.dropout.keep_scale / b_sum)[:, None]", "b_out = state.acc * (1.0 / b_sum)[:, None]",
          TRITON_EDGES),
    Fault("Triton: keys of another head", "kernels/attention.py", "i_hk = own.i_h // C.GROUP\n    p_k, p_v",
          "i_hk = own.i_h % 1\n    p_k, p_v", TRITON_EDGES),
    Fault("Triton: dropout by places in an order", "kernels/tiles.py", "kept_tokens(dropout, i_b, i_h, rows.token, "
          "columns.token, KEY_AXIS)", "kept_tokens(dropout, i_b, i_h, rows.o, columns.o, KEY_AXIS)", TRITON_ORDERS),
    Fault("Triton: tiles unmasked that a length cuts", "kernels/attention_backward.py",
          "MASKED: tl.constexpr = C.SAFE or x.mask.token_lengths is not None\n    i_tile, i_b, i_h = locate(i_program, "
          "x.mask, grid, x.sizes.Nk", "MASKED: tl.constexpr = C.SAFE\n    i_tile, i_b, i_h = locate(i_program, "
          "x.mask, grid, x.sizes.Nk", TRITON_ORDERS),
]  # fmt: skip
