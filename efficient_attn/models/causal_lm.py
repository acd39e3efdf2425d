"""`CausalLM`: the GPT-2 family: a decoder that predicts each next token, and generation with it.

Letters: B batch, N tokens, E features, V vocabulary, T new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import Model
from .cache import Cache
from .embeddings import Embeddings, as_padding, check_ids, count_positions
from .generation import Plan, Sampling, beam_search, padded, stop_at
from .labels import check_labels
from .outputs import LMOutput, answer, either
from .positions import check_length
from .transformer import Outputs, Transformer, TransformerConfig


@dataclass(frozen=True)
class CausalLMConfig:
    """Sizes and kinds of a `CausalLM`.

    Fields:
        vocab_size, max_len: V, and the longest sequence, prompt and answer together.
        decoder: the layers, causal.
        positions: "learned", "sinusoidal", or "none" (with decoder.rotary, say).
        dropout: of embeddings.
        tied: the output layer has the weights of the token embedding.
        eos_token_id: ends a sequence; pad_token_id: fills it up afterwards, None: eos_token_id does.
    """

    vocab_size: int = 50257
    max_len: int = 1024
    decoder: TransformerConfig = field(default_factory=lambda: TransformerConfig(causal=True, activation="gelu_tanh"))
    positions: str = "learned"
    dropout: float = 0.0
    tied: bool = True
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if not self.decoder.causal or self.decoder.cross_attention:
            raise InputError("a CausalLM needs a decoder with causal=True and no cross_attention")


class CausalLM(Model):
    """Predicts the next token: ids (B, N) -> embeddings -> `decoder` -> logits (B, N, V)."""

    config_class = CausalLMConfig

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__(config)
        dim = config.decoder.hidden_dim
        self.embeddings = Embeddings(
            config.vocab_size, dim, config.max_len, positions=config.positions, dropout=config.dropout
        )
        self.decoder = Transformer(config.decoder)
        self.head = None if config.tied else nn.Linear(dim, config.vocab_size, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self,
        ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Predict.

        Args:
            ids: int64 (B, N). input_ids: the same.
            labels: int64 (B, N), the ids themselves, which are compared with the predictions one place earlier; -100 is
                ignored, as padding must be. With them there is a loss: the mean cross entropy.
            attention_mask: bool or int (B, cache.length + N), 1 = a token, 0 = padding, on either side.
            cache: of the tokens before (`model.decoder.make_cache()`), which these are added to.
            positions: int64 (N) or (B, N); default: tokens that are not padding, counted from 0.
            return_dict: see `outputs`.

        Returns:
            logits (B, N, V): those at n predict token n + 1; with input_ids by name or labels an `LMOutput`.

        Raises:
            InputError, InputTypeError: ids, masks and positions that do not fit.
        """
        given = either("input_ids", ids, input_ids)
        order = None if cache is not None or positions is not None else self._turned(given, attention_mask)
        if order is not None and attention_mask is not None:
            given, attention_mask = given.gather(1, order), attention_mask.gather(1, order)
        x, padding, positions = self._embed(given, attention_mask, cache, positions)
        hidden = self.decoder(x, key_padding_mask=padding, cache=cache, positions=positions)
        if order is not None:
            hidden = torch.empty_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        logits = self._logits(hidden)
        loss = None if labels is None else token_loss(logits[:, :-1], labels[:, 1:])
        by_name = input_ids is not None or labels is not None
        return answer(LMOutput(loss, logits), logits, by_name=by_name, return_dict=return_dict)

    def _turned(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The order (B, N) that puts padding on the left behind each text, where the attention counts positions: its
        first token would not be the pattern's first one otherwise. None if there is no such padding."""
        if attention_mask is None or attention_mask.shape != ids.shape or not self._counts_positions():
            return None
        first = (attention_mask != 0).int().argmax(1, keepdim=True)
        if not torch.compiler.is_compiling() and not bool(first.any()):
            return None
        return (torch.arange(ids.shape[1], device=ids.device) + first) % ids.shape[1]

    def inspect(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, need_weights: bool = True) -> Outputs:
        """The outputs of all layers, and what each attends to. Arguments as in `forward`."""
        x, padding, positions = self._embed(input_ids, attention_mask, None, None)
        found: Outputs = self.decoder(
            x, key_padding_mask=padding, positions=positions, return_hidden=True, need_weights=need_weights
        )
        return found

    def _embed(
        self, ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        past, N = 0 if cache is None else cache.length, ids.shape[-1]
        padding = as_padding("attention_mask", attention_mask, ids, past)
        if self.embeddings.positions is not None and attention_mask is None:
            check_length(past + N, self._config.max_len)
        if positions is None:
            if attention_mask is None:
                positions = torch.arange(past, past + N, device=ids.device)
            else:
                positions = count_positions(attention_mask != 0)[:, past:]
        return self.embeddings(ids, positions), padding, positions

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.embeddings.tokens if self.head is None else self.head
        assert head is not None
        return F.linear(hidden, head.weight)

    # --- generation ---

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        **options: Any,
    ) -> Tensor:
        """Continue texts: greedy, sampled, or by beam search.

        Args:
            input_ids, attention_mask, options: as in `stream`.
            num_beams: more than 1 for `generation.beam_search`, which length_penalty and early_stopping are of.

        Returns:
            int64 (B, N + T), the prompts and what follows; T <= max_new_tokens, less when all texts have ended.

        Raises:
            InputTypeError, InputError, UnsupportedError: as `stream`; sampling or stop strings with beams.
        """
        if num_beams < 1:
            raise InputError(f"num_beams must be at least 1, got {num_beams}")
        if num_beams == 1:
            steps = self.stream(input_ids, attention_mask, **options)
            return torch.cat([input_ids, *(tokens[:, None] for tokens in steps)], 1)
        mask, plan = self._plan(input_ids, attention_mask, **options)
        if plan.sampling.temperature or plan.stop_strings:
            raise InputError("beam search takes the most probable texts; leave temperature and stop_strings out")
        was_training = self.training
        self.eval()
        try:
            found: list[list[int]] = [[] for _ in range(input_ids.shape[0])]
            for rows, ids, own in self._groups(input_ids, mask):
                writer = _Writer(self, ids, own, plan)
                sequences = beam_search(
                    writer.step,
                    ids.shape[0],
                    num_beams,
                    start=0,  # the writer begins with the prompts instead
                    eos=-1 if plan.eos is None else plan.eos,
                    max_new_tokens=plan.max_new_tokens,
                    length_penalty=length_penalty,
                    early_stopping=early_stopping,
                    device=ids.device,
                )
                for row, sequence in zip(rows.tolist(), sequences, strict=True):
                    found[row] = sequence
        finally:
            self.train(was_training)
        fill = next((token for token in (plan.pad, plan.eos) if token is not None), 0)
        return torch.cat([input_ids, padded(found, fill, input_ids.device)], 1)

    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """Continue texts, token by token: an iterator over int64 (B), the next token of each text.

        A text of a batch goes on as it would alone: prompts of several lengths are run in groups of one length where
        the attention counts positions (`Method.counts_positions`).

        Args:
            input_ids: int64 (B, N), prompts of one length, or padded on the left.
            attention_mask: bool or int (B, N), 1 = a token, 0 = padding; None: no padding.
            options: max_new_tokens: T at most, default 20; or max_length, and min_length, which count the prompt too.
                temperature (0 is greedy, the default; do_sample=True alone makes it 1), top_k, top_p, seed: see
                `Sampling`. min_new_tokens, repetition_penalty, no_repeat_ngram_size, stop_strings with tokenizer: see
                `Plan`. eos_token_id, pad_token_id: default: the config's; a text that has ended goes on with padding,
                and the iterator stops when all have. use_cache: keep keys and values of earlier tokens, the default,
                else run the whole text again for each token.

        Raises:
            InputTypeError, InputError: ids of another type, shape or range, prompts padded on the right or too long,
                options that do not exist or are out of range.
            UnsupportedError: a method that cannot go on from a cache (a hybrid): use_cache=False.
        """
        mask, plan = self._plan(input_ids, attention_mask, **options)
        groups = self._groups(input_ids, mask)
        if len(groups) == 1:
            return self._stream(groups[0][1], groups[0][2], plan)
        return self._together(groups, plan)

    def _plan(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float | None = None,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        min_new_tokens: int = 0,
        min_length: int = 0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        stop_strings: str | Sequence[str] = (),
        tokenizer: Any = None,
        **unknown: Any,
    ) -> tuple[Tensor | None, Plan]:
        """The mask, None without padding, and what was asked for: both checked."""
        if unknown:
            known = [name for name in inspect.signature(self._plan).parameters if name not in ("ids", "unknown")]
            raise InputError(f"generate has no option {', '.join(unknown)}; it has {', '.join(known)}")
        check_ids("input_ids", ids, self._config.vocab_size)
        if max_new_tokens is None:
            max_new_tokens = 20 if max_length is None else max_length - ids.shape[1]
            if max_new_tokens < 1:
                raise InputError(f"max_length {max_length} counts the prompt too, which has {ids.shape[1]} tokens")
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        elif do_sample is not None and do_sample != (temperature > 0):
            raise InputError(f"do_sample={do_sample} and temperature={temperature} contradict each other; give one")
        plan = Plan(
            max_new_tokens,
            Sampling(temperature, top_k, top_p, seed),
            self._config.eos_token_id if eos_token_id is None else eos_token_id,
            self._config.pad_token_id if pad_token_id is None else pad_token_id,
            use_cache,
            max(min_new_tokens, min_length - ids.shape[1]),
            repetition_penalty,
            no_repeat_ngram_size,
            (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
            tokenizer,
        )
        mask = check_prompts(ids, attention_mask)
        if self.embeddings.positions is not None:
            longest = ids.shape[1] if mask is None else int(mask.sum(-1).max())
            check_length(longest + max_new_tokens, self._config.max_len)
        return mask, plan

    def _groups(self, ids: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows that can be run together, their ids and mask: all, or those of one length without their padding."""
        rows = torch.arange(ids.shape[0], device=ids.device)
        if mask is None or not self._counts_positions():
            return [(rows, ids, mask)]
        lengths = mask.sum(-1)
        return [
            (rows[lengths == length], ids[lengths == length, ids.shape[1] - length :], None)
            for length in sorted(set(lengths.tolist()))
        ]

    def _counts_positions(self) -> bool:
        return any(attention.counts_positions for attention in self.decoder._attentions(cross=False))

    def _together(self, groups: list[tuple[Tensor, Tensor, Tensor | None]], plan: Plan) -> Iterator[Tensor]:
        """The next token of all groups at once; a group that has ended goes on with padding."""
        fill = next((token for token in (plan.pad, plan.eos) if token is not None), 0)
        streams = [self._stream(ids, mask, plan) for _, ids, mask in groups]
        total = sum(len(rows) for rows, *_ in groups)
        while True:
            parts = [next(stream, None) for stream in streams]
            if all(part is None for part in parts):
                return
            tokens = groups[0][1].new_full((total,), fill)
            for (rows, *_), part in zip(groups, parts, strict=True):
                if part is not None:
                    tokens[rows] = part
            yield tokens

    @torch.no_grad()
    def _stream(self, ids: Tensor, mask: Tensor | None, plan: Plan) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        try:
            writer = _Writer(self, ids, mask, plan)
            generator = plan.sampling.generator(ids.device)
            done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
            fill = plan.pad if plan.pad is not None or not plan.stop_strings else (0 if plan.eos is None else plan.eos)
            tokens = ids
            for _ in range(plan.max_new_tokens):
                logits = writer.logits(tokens)
                chosen, done = stop_at(plan.sampling.choose(logits, generator), done, plan.eos, fill)
                yield chosen
                tokens = chosen[:, None]
                if plan.stop_strings:
                    done = done | plan.stopped(torch.cat([writer.written[:, ids.shape[1] :], tokens], 1))
                if bool(done.all()):
                    return
        finally:
            self.train(was_training)

    def _last_logits(self, ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """The logits of the last token alone, (B, V)."""
        past = 0 if cache is None else cache.length
        positions = None if mask is None else count_positions(mask)[:, past:]
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)
        x = self.embeddings(ids, positions)
        padding = None if mask is None else ~mask
        return self._logits(self.decoder(x, key_padding_mask=padding, cache=cache, positions=positions)[:, -1])


class _Writer:
    """The state of one generation: what is written, its mask, and the cache."""

    def __init__(self, model: CausalLM, ids: Tensor, mask: Tensor | None, plan: Plan) -> None:
        self.model, self.plan, self.prompts, self.mask = model, plan, ids, mask
        self.written = ids[:, :0]
        capacity = ids.shape[1] + plan.max_new_tokens
        self.cache = model.decoder.make_cache(capacity=capacity) if plan.use_cache else None

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V), penalised, after `tokens` (B, n): the prompts at first, and one each then."""
        return self._penalised(self._next(tokens))

    def step(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        """Log-probabilities for `generation.beam_search`, penalised as transformers does: after they are normalised."""
        if rows is None:
            tokens = self.prompts
        else:
            self.written = self.written[rows]
            self.mask = None if self.mask is None else self.mask[rows]
            if self.cache is not None:
                self.cache.select(rows)
        return self._penalised(self._next(tokens).float().log_softmax(-1))

    def _next(self, tokens: Tensor) -> Tensor:
        if self.mask is not None and self.written.shape[1]:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.written = torch.cat([self.written, tokens], 1)
        return self.model._last_logits(self.written if self.cache is None else tokens, self.mask, self.cache)

    def _penalised(self, scores: Tensor) -> Tensor:
        return self.plan.adjusted(scores, self.written, self.mask, self.written.shape[1] - self.prompts.shape[1])


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of logits (B, N, V) for labels int64 (B, N), in float32; -100 is ignored.

    Raises:
        InputTypeError, InputError: labels of another type, shape or range.
    """
    if labels.shape != logits.shape[:2]:
        raise InputError(
            f"labels must be of the ids' shape; {tuple(labels.shape)} for {tuple(logits.shape[:2])} logits"
        )
    check_labels(labels.flatten(), labels.numel(), logits.shape[-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def check_prompts(ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool, True = a token, None if there is no padding.

    Raises:
        InputError: padding on the right, where generation would go on from.
    """
    padding = as_padding("attention_mask", attention_mask, ids)
    if padding is None or not bool(padding.any()):
        return None
    if bool(padding[:, -1].any()):
        raise InputError("prompts end with padding; pad them on the left, so that each ends with its last token")
    return ~padding
