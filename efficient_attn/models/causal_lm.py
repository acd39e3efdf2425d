"""`CausalLM`: the GPT-2 family: a decoder that predicts each next token, and generation with it.

Letters: B batch, N tokens, E features, V vocabulary, T new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, InputTypeError
from .base import Model
from .cache import Cache
from .embeddings import Embeddings, as_padding, check_ids, count_positions
from .generation import Sampling, stop_at
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
        x, padding, positions = self._embed(either("input_ids", ids, input_ids), attention_mask, cache, positions)
        logits = self._logits(self.decoder(x, key_padding_mask=padding, cache=cache, positions=positions))
        loss = None if labels is None else token_loss(logits[:, :-1], labels[:, 1:])
        by_name = input_ids is not None or labels is not None
        return answer(LMOutput(loss, logits), logits, by_name=by_name, return_dict=return_dict)

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

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue texts. Arguments and errors as in `stream`.

        Returns:
            int64 (B, N + T), the prompts and what follows; T <= max_new_tokens, less when all texts have ended.
        """
        steps = self.stream(
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            use_cache=use_cache,
        )
        return torch.cat([input_ids, *(tokens[:, None] for tokens in steps)], 1)

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Continue texts, token by token: an iterator over int64 (B), the next token of each text.

        Args:
            input_ids: int64 (B, N), prompts of one length, or padded on the left.
            attention_mask: bool or int (B, N), 1 = a token, 0 = padding; None: no padding.
            max_new_tokens: T at most.
            temperature, top_k, top_p, seed: see `Sampling`; temperature 0 is greedy.
            eos_token_id, pad_token_id: default: the config's. A text that has ended goes on with padding; the iterator
                stops when all have.
            use_cache: keep keys and values of earlier tokens, else run the whole text again for each token.

        Raises:
            InputTypeError, InputError: ids of another type, shape or range, prompts padded on the right or too long,
                options out of range.
            UnsupportedError: a method that cannot go on from a cache (a hybrid): use_cache=False.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_ids("input_ids", input_ids, self._config.vocab_size)
        mask = check_prompts(input_ids, attention_mask)
        if self.embeddings.positions is not None:
            longest = input_ids.shape[1] if mask is None else int(mask.sum(-1).max())
            check_length(longest + max_new_tokens, self._config.max_len)
        eos = self._config.eos_token_id if eos_token_id is None else eos_token_id
        pad = self._config.pad_token_id if pad_token_id is None else pad_token_id
        return self._stream(input_ids, mask, max_new_tokens, sampling, eos, pad, use_cache)

    @torch.no_grad()
    def _stream(
        self,
        ids: Tensor,
        mask: Tensor | None,
        max_new_tokens: int,
        sampling: Sampling,
        eos: int | None,
        pad: int | None,
        use_cache: bool,
    ) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        try:
            B, N = ids.shape
            cache = self.decoder.make_cache(capacity=N + max_new_tokens) if use_cache else None
            generator = sampling.generator(ids.device)
            done = torch.zeros(B, dtype=torch.bool, device=ids.device)
            for step in range(max_new_tokens):
                logits = self._last_logits(ids if cache is None or step == 0 else ids[:, -1:], mask, cache)
                tokens, done = stop_at(sampling.choose(logits, generator), done, eos, pad)
                yield tokens
                if bool(done.all()):
                    return
                ids = torch.cat([ids, tokens[:, None]], 1)
                mask = None if mask is None else torch.cat([mask, mask.new_ones(B, 1)], 1)
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


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of logits (B, N, V) for labels int64 (B, N), in float32; -100 is ignored.

    Raises:
        InputTypeError, InputError: labels of another type or shape.
    """
    if labels.dtype != torch.int64:
        raise InputTypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != logits.shape[:2]:
        raise InputError(
            f"labels must be of the ids' shape; {tuple(labels.shape)} for {tuple(logits.shape[:2])} logits"
        )
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
