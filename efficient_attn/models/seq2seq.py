"""`Seq2Seq`: the Marian and BART families: an encoder reads a text, a decoder writes another, as in translation.

Letters: B batch, M source tokens, N target tokens, E features, V vocabulary of the target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import Model
from .cache import Cache
from .causal_lm import token_loss
from .embeddings import Embeddings, as_padding
from .generation import beam_search, padded, repeating, stop_at
from .outputs import LMOutput, answer, either
from .positions import check_length
from .transformer import Outputs, Transformer, TransformerConfig


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and kinds of a `Seq2Seq`.

    Fields:
        vocab_size: of the source, and of the target unless target_vocab_size says otherwise.
        max_len: the longest source and the longest target.
        encoder, decoder: the layers; the decoder causal, with cross_attention.
        shared: source and target tokens have one embedding.
        tied: the output layer has the weights of the target's embedding.
        logits_bias: a number added to each logit.
        positions: "learned", "sinusoidal", "sinusoidal_halves" (Marian), or "none".
        position_offset: unused rows before those of learned positions (2 in BART).
        scaled: token vectors are multiplied by sqrt(E).
        embedding_norm: a LayerNorm on embeddings, as in BART.
        dropout: of embeddings.
        pad_token_id, eos_token_id, start_token_id: fills up, ends, and begins a target.
        forced_bos_token_id, forced_eos_token_id: what generation writes first, and at the greatest length.
        banned_token_ids: what generation never writes.
        min_length: tokens, the start token among them, before generation may end a target.
        no_repeat_ngram: the length of runs of tokens that generation never repeats; 0: it may repeat any.
        renormalize: beam search renormalises probabilities after banning.
        num_beams, length_penalty, early_stopping, max_new_tokens: defaults of `generate`; the last None: max_len - 1.
    """

    vocab_size: int = 32000
    max_len: int = 512
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=lambda: TransformerConfig(causal=True, cross_attention=True))
    target_vocab_size: int | None = None
    shared: bool = True
    tied: bool = True
    logits_bias: bool = False
    positions: str = "sinusoidal"
    position_offset: int = 0
    scaled: bool = True
    embedding_norm: bool = False
    dropout: float = 0.0
    pad_token_id: int = 0
    eos_token_id: int = 1
    start_token_id: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    banned_token_ids: tuple[int, ...] = ()
    min_length: int = 0
    no_repeat_ngram: int = 0
    renormalize: bool = True
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.encoder.causal or self.encoder.cross_attention:
            raise InputError("the encoder of a Seq2Seq is not causal and has no cross_attention")
        if not self.decoder.causal or not self.decoder.cross_attention:
            raise InputError("the decoder of a Seq2Seq needs causal=True and cross_attention=True")
        if self.encoder.hidden_dim != self.decoder.hidden_dim:
            raise InputError("encoder and decoder of a Seq2Seq have the same hidden_dim")
        if self.shared and self.target_vocab_size not in (None, self.vocab_size):
            raise InputError("a shared embedding has one vocabulary; leave target_vocab_size out, or shared=False")

    @property
    def target_tokens(self) -> int:
        """V."""
        return self.vocab_size if self.target_vocab_size is None else self.target_vocab_size


class Seq2Seq(Model):
    """Reads a source (B, M) with `encoder`, writes a target (B, N) with `decoder`: logits (B, N, V)."""

    config_class = Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        dim = config.encoder.hidden_dim

        def embeddings(vocab_size: int, eps: float, own_table: bool) -> Embeddings:
            return Embeddings(
                vocab_size,
                dim,
                config.max_len,
                positions=config.positions,
                offset=config.position_offset,
                norm_eps=eps if config.embedding_norm else None,
                scaled=config.scaled,
                dropout=config.dropout,
                own_table=own_table,
            )

        self.source = embeddings(config.vocab_size, config.encoder.norm_eps, True)
        self.target = embeddings(config.target_tokens, config.decoder.norm_eps, not config.shared)
        self.encoder = Transformer(config.encoder)
        self.decoder = Transformer(config.decoder)
        self.head = None if config.tied else nn.Linear(dim, config.target_tokens, bias=False)
        self.logits_bias = nn.Parameter(torch.zeros(config.target_tokens)) if config.logits_bias else None
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=dim**-0.5)

    def forward(
        self,
        ids: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Predict each next token of the target.

        Args:
            ids: int64 (B, M), the source. input_ids: the same.
            decoder_ids: int64 (B, N), the target behind the start token, default `shift_right(labels)`.
                decoder_input_ids: the same.
            attention_mask, decoder_attention_mask: bool or int, (B, M) and (B, N), 1 = a token, 0 = padding.
            labels: int64 (B, N), the target; -100 is ignored, as padding must be. With them there is a loss: the mean
                cross entropy.
            return_dict: see `outputs`.

        Returns:
            logits (B, N, V); with input_ids by name or labels an `LMOutput`.

        Raises:
            InputError, InputTypeError: ids and masks that do not fit.
        """
        if labels is not None and decoder_ids is None and decoder_input_ids is None:
            decoder_ids = self.shift_right(labels)
        memory = self.encode(either("input_ids", ids, input_ids), attention_mask)
        written = either("decoder_input_ids", decoder_ids, decoder_input_ids)
        logits = self.decode(written, memory, attention_mask, decoder_attention_mask)
        loss = None if labels is None else token_loss(logits, labels)
        by_name = input_ids is not None or labels is not None
        return answer(LMOutput(loss, logits), logits, by_name=by_name, return_dict=return_dict)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The encoder's output (B, M, E)."""
        found: Tensor = self._read(input_ids, attention_mask)
        return found

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor | None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """logits (B, N, V) of a target, given what `encode` returned.

        Args:
            memory: (B, M, E); None in calls after the first with a cache.
            attention_mask: that of the source.
            decoder_attention_mask: (B, cache.length + N).
            cache: of the target's tokens before (`model.decoder.make_cache()`).
        """
        hidden = self._write(decoder_input_ids, memory, attention_mask, decoder_attention_mask, cache=cache)
        weight = self._target_table() if self.head is None else self.head.weight
        return F.linear(hidden, weight, self.logits_bias)

    def inspect(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        need_weights: bool = True,
    ) -> tuple[Outputs, Outputs]:
        """The outputs of all layers of encoder and decoder, and what each attends to. Arguments as in `forward`.

        The decoder's memory_weights (B, H, N, M) align target and source.
        """
        options: dict[str, Any] = {"return_hidden": True, "need_weights": need_weights}
        source: Outputs = self._read(input_ids, attention_mask, **options)
        target = self._write(decoder_input_ids, source.last, attention_mask, decoder_attention_mask, **options)
        return source, target

    def _read(self, ids: Tensor, mask: Tensor | None, **options: Any) -> Any:
        positions = torch.arange(ids.shape[-1], device=ids.device)
        padding = as_padding("attention_mask", mask, ids)
        return self.encoder(self.source(ids, positions), key_padding_mask=padding, **options)

    def _write(
        self,
        ids: Tensor,
        memory: Tensor | None,
        mask: Tensor | None,
        target_mask: Tensor | None,
        *,
        cache: Cache | None = None,
        **options: Any,
    ) -> Any:
        past, N = 0 if cache is None else cache.length, ids.shape[-1]
        if self.target.positions is not None:
            check_length(past + N, self._config.max_len)
        positions = torch.arange(past, past + N, device=ids.device)
        return self.decoder(
            self.target(ids, positions, table=self._target_table()),
            key_padding_mask=as_padding("decoder_attention_mask", target_mask, ids, past),
            memory=memory,
            memory_padding_mask=None if mask is None else mask == 0,
            cache=cache,
            positions=positions,
            **options,
        )

    def shift_right(self, target: Tensor) -> Tensor:
        """The decoder's input for a target (B, N) that it shall learn: the start token, then the target but its last.

        -100, which cross_entropy ignores, becomes padding.
        """
        start = target.new_full((target.shape[0], 1), self._config.start_token_id)
        shifted = torch.cat([start, target[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, self._config.pad_token_id)

    def _target_table(self) -> Tensor:
        tokens = self.source.tokens if self.target.tokens is None else self.target.tokens
        assert tokens is not None
        return tokens.weight

    # --- generation ---

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Write targets: greedy with one beam, else by beam search.

        Args:
            input_ids: int64 (B, M).
            attention_mask: bool or int (B, M), 1 = a token, 0 = padding.
            max_new_tokens: T at most; or max_length, which counts the start token too.
            num_beams, length_penalty, early_stopping: see `generation.beam_search`. These default to the config's.
            use_cache: keep keys and values of earlier tokens, else run the whole target again for each token.

        Returns:
            int64 (B, 1 + T): the start token, the target with its end token, and padding.

        Raises:
            InputError, InputTypeError: ids and masks that do not fit, options out of range.
            UnsupportedError: a method that cannot go on from a cache (a hybrid): use_cache=False.
        """
        config = self._config
        beams = config.num_beams if num_beams is None else num_beams
        if max_new_tokens is None and max_length is not None:
            max_new_tokens = max_length - 1
        if max_new_tokens is None:
            max_new_tokens = config.max_len - 1 if config.max_new_tokens is None else config.max_new_tokens
        if beams < 1 or max_new_tokens < 1:
            raise InputError(f"num_beams and max_new_tokens must be at least 1, got {beams} and {max_new_tokens}")
        if self.target.positions is not None:
            check_length(max_new_tokens, config.max_len)
        was_training = self.training
        self.eval()
        try:
            memory = self.encode(input_ids, attention_mask)
            writer = _Writer(self, memory, attention_mask, max_new_tokens, use_cache)
            if beams == 1:
                return self._greedy(writer, input_ids)
            sequences = beam_search(
                writer.step,
                input_ids.shape[0],
                beams,
                start=config.start_token_id,
                eos=config.eos_token_id,
                max_new_tokens=max_new_tokens,
                length_penalty=config.length_penalty if length_penalty is None else length_penalty,
                early_stopping=config.early_stopping if early_stopping is None else early_stopping,
                device=input_ids.device,
            )
            whole = [[config.start_token_id, *sequence] for sequence in sequences]
            return padded(whole, config.pad_token_id, input_ids.device)
        finally:
            self.train(was_training)

    def _greedy(self, writer: _Writer, ids: Tensor) -> Tensor:
        config = self._config
        tokens = ids.new_full((ids.shape[0], 1), config.start_token_id)
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        found = [tokens]
        for _ in range(writer.max_new_tokens):
            chosen = writer.step(tokens, None).argmax(-1)
            chosen, done = stop_at(chosen, done, config.eos_token_id, config.pad_token_id)
            tokens = chosen[:, None]
            found.append(tokens)
            if bool(done.all()):
                break
        return torch.cat(found, 1)


class _Writer:
    """The state of one generation: what was written so far, and the cache."""

    def __init__(
        self, model: Seq2Seq, memory: Tensor, source_mask: Tensor | None, max_new_tokens: int, use_cache: bool
    ) -> None:
        self.model, self.config = model, model._config
        self.memory, self.source_mask, self.max_new_tokens = memory, source_mask, max_new_tokens
        self.cache = model.decoder.make_cache(capacity=max_new_tokens) if use_cache else None
        self.written: Tensor | None = None
        self.banned = torch.zeros(self.config.target_tokens, dtype=torch.bool, device=memory.device)
        self.banned[list(self.config.banned_token_ids)] = True
        self.end = torch.tensor([self.config.eos_token_id], device=memory.device)

    def step(self, tokens: Tensor, rows: Tensor | None) -> Tensor:
        """Log-probabilities (R, V) after `tokens` (R, 1), where row r continues what row rows[r] was."""
        if rows is not None:
            self._reorder(rows)
        self.written = tokens if self.written is None else torch.cat([self.written, tokens], 1)
        length = self.written.shape[1]
        logits = self.model.decode(
            self.written if self.cache is None else tokens, self.memory, self.source_mask, cache=self.cache
        )[:, -1]
        return self._adjusted(logits.float().log_softmax(-1), length)

    def _adjusted(self, log_probs: Tensor, length: int) -> Tensor:
        """Banned and forced tokens, for the token at place `length`."""
        config = self.config
        if config.banned_token_ids:
            log_probs = log_probs.masked_fill(self.banned, -torch.inf)
        if config.no_repeat_ngram and self.written is not None:
            log_probs = log_probs.masked_fill(
                repeating(self.written, config.no_repeat_ngram, log_probs.shape[1]), -torch.inf
            )
        if length < config.min_length:
            log_probs = log_probs.index_fill(1, self.end, -torch.inf)
        forced = config.forced_bos_token_id if length == 1 else None
        if length == self.max_new_tokens and config.forced_eos_token_id is not None:
            forced = config.forced_eos_token_id
        if forced is not None:
            log_probs = torch.full_like(log_probs, -torch.inf)
            log_probs[:, forced] = 0.0
        return log_probs.log_softmax(-1) if config.renormalize else log_probs

    def _reorder(self, rows: Tensor) -> None:
        """Beams change places, those of one source among themselves; at first each source becomes its beams."""
        assert self.written is not None
        begins = rows.shape[0] != self.memory.shape[0]
        self.written = self.written[rows]
        if begins:
            self.memory = self.memory[rows]
            self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        if self.cache is not None:
            self.cache.select(rows, memory=begins)
