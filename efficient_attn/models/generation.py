"""How a next token is chosen: greedy, sampled, or by beam search. Letters: B batch, K beams, V vocabulary, T steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

LEAST_TEMPERATURE = 1e-6
NO_CHANCE = -1e9  # below the score of any sequence, and still a number


@dataclass(frozen=True)
class Sampling:
    """How to draw a token from logits.

    Fields:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens (Fan et al. 2018).
        top_p: only the fewest most probable tokens that together have at least this probability (Holtzman et al. 2020).
        seed: of the draws; None: PyTorch's generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or LEAST_TEMPERATURE <= self.temperature < float("inf")):
            raise InputError(
                f"temperature must be 0, which takes the most probable token, or from {LEAST_TEMPERATURE:g} up, below "
                f"which logits over it leave float32; got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("top_k and top_p are for sampling; give a temperature above 0, such as temperature=1.0")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new generator of the seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """logits (B, V) -> tokens (B)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        probabilities = self.restrict(logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def restrict(self, logits: Tensor) -> Tensor:
        """logits (B, V) in float32 over the temperature, -inf where top_k and top_p exclude a token."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1.0:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of the tokens that are more probable
            excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(excluded, -torch.inf)
        return logits


@dataclass(frozen=True)
class Plan:
    """How a text goes on.

    Fields:
        max_new_tokens, min_new_tokens: at most, and at least before the end token may come.
        sampling: how a token is drawn.
        eos, pad: the token that ends a text, and what fills it up then; None: it goes on to max_new_tokens.
        use_cache: keep keys and values of earlier tokens.
        repetition_penalty: scores of tokens that the text has already are divided by it, or multiplied where they are
            negative; 1: they are not (Keskar et al. 2019).
        no_repeat_ngram_size: the length of runs of tokens that are never repeated; 0: any may be.
        stop_strings: a text ends when what was written holds one of them; needs the tokenizer, whose `decode` says so.

    Raises:
        InputError: values out of range.
    """

    max_new_tokens: int = 20
    sampling: Sampling = field(default_factory=Sampling)
    eos: int | None = None
    pad: int | None = None
    use_cache: bool = True
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(f"min_new_tokens must be from 0 to max_new_tokens, got {self.min_new_tokens}")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty must be above 0, such as 1.2; got {self.repetition_penalty}")
        if self.no_repeat_ngram_size < 0:
            raise InputError(f"no_repeat_ngram_size must be at least 0, got {self.no_repeat_ngram_size}")
        if self.stop_strings and not hasattr(self.tokenizer, "decode"):
            raise InputError(
                "stop_strings are looked for in the text; give the tokenizer that decodes it, tokenizer=..."
            )
        if "" in self.stop_strings:
            raise InputError("a stop string must have at least one character")

    def adjusted(self, logits: Tensor, written: Tensor, mask: Tensor | None, step: int) -> Tensor:
        """logits (B, V) of token number `step` from 0, as the penalties have it.

        Args:
            written: (B, N) the prompt and what follows. mask: bool (B, N), False = padding, which is no repetition.
        """
        B, V = logits.shape
        if self.repetition_penalty != 1.0:
            there = torch.zeros(B, V, dtype=torch.int64, device=logits.device)
            tokens = torch.ones_like(written) if mask is None else mask.long()
            there = there.scatter_add(1, written, tokens) > 0
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(there, penalised, logits)
        if self.no_repeat_ngram_size:
            logits = logits.masked_fill(repeating(written, self.no_repeat_ngram_size, V, mask), -torch.inf)
        if self.eos is not None and step < self.min_new_tokens:
            logits = logits.index_fill(1, torch.tensor([self.eos], device=logits.device), -torch.inf)
        return logits

    def stopped(self, new: Tensor) -> Tensor:
        """Bool (B): which texts hold a stop string in what was written, new (B, T)."""
        if not self.stop_strings:
            return torch.zeros(new.shape[0], dtype=torch.bool, device=new.device)
        texts = [self.tokenizer.decode(row) for row in new.tolist()]
        found = [any(stop in text for stop in self.stop_strings) for text in texts]
        return torch.tensor(found, device=new.device)


def stop_at(tokens: Tensor, done: Tensor, eos: int | None, pad: int | None) -> tuple[Tensor, Tensor]:
    """Tokens (B) of one step with `pad` in rows that are done (B), and which rows are done after it."""
    if eos is None:
        return (tokens if pad is None else torch.where(done, pad, tokens)), done
    tokens = torch.where(done, eos if pad is None else pad, tokens)
    return tokens, done | (tokens == eos)


def repeating(written: Tensor, size: int, vocab_size: int, mask: Tensor | None = None) -> Tensor:
    """Bool (B, V): tokens that would complete a run of `size` tokens which is in written (B, N) already.

    mask: bool (B, N), False = padding, whose runs do not count.
    """
    B, N = written.shape
    counts = torch.zeros(B, vocab_size, dtype=torch.int64, device=written.device)
    if size > N:
        return counts > 0
    runs = written.unfold(1, size, 1)  # [B, N - size + 1, size]
    end = written[:, N - size + 1 :]  # [B, size - 1]
    same = (runs[..., :-1] == end[:, None]).all(-1)
    if mask is not None:
        same = same & mask.unfold(1, size, 1).all(-1)
    return counts.scatter_add(1, runs[..., -1], same.long()) > 0


Step = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass
class Finished:
    """The best finished sequences of one input: at most K, best first."""

    limit: int
    scores: list[float]
    sequences: list[list[int]]

    def add(self, score: float, sequence: list[int]) -> None:
        place = sum(1 for other in self.scores if other >= score)
        self.scores.insert(place, score)
        self.sequences.insert(place, sequence)
        del self.scores[self.limit :], self.sequences[self.limit :]

    @property
    def full(self) -> bool:
        return len(self.scores) == self.limit


def beam_search(
    step: Step,
    batch: int,
    num_beams: int,
    *,
    start: int,
    eos: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    device: torch.device,
) -> list[list[int]]:
    """The most probable sequences that beam search finds, by log-probability / length^length_penalty (Wu et al. 2016).

    It decides as transformers' generate() does: 2 K candidates a step, of which the first K may finish; a search ends
    when its best open beam, at its present length, is worse than the worst of K finished sequences. early_stopping:
    True ends it as soon as there are K; with "never", and a length_penalty above 0, the open beam counts as if it had
    the greatest length.

    Args:
        step: (tokens, rows) -> log-probabilities of the next token. At first tokens is (B, 1) and rows None; then they
            are (B K, 1), where row r continues what row rows[r] was.
        start, eos: the first token, and the one that ends a sequence.

    Returns:
        For each input the tokens after `start`, with eos unless max_new_tokens ended the sequence.
    """
    if early_stopping not in (True, False, "never"):
        raise InputError(f"early_stopping must be true, false or 'never'; got {early_stopping!r}")
    B, K = batch, num_beams
    first = torch.full((B, 1), start, device=device)
    log_probs = step(first, None)  # [B, V]
    V = log_probs.shape[-1]
    sequences: list[list[list[int]]] = [[[]] * K for _ in range(B)]
    finished = [Finished(K, [], []) for _ in range(B)]
    open_searches = [True] * B
    # All beams start equal, so only the first counts in the first step.
    totals = torch.cat([log_probs[:, None], log_probs.new_full((B, K - 1, V), NO_CHANCE)], 1)
    offsets = torch.arange(B, device=device)[:, None]
    for length in range(1, max_new_tokens + 1):
        best, index = totals.flatten(1).topk(min(2 * K, K * V), dim=-1)  # [B, 2 K]
        beams, tokens = index // V, index % V
        last = length == max_new_tokens
        ends = (tokens == eos) | last
        tables = zip(best.tolist(), beams.tolist(), tokens.tolist(), ends.tolist(), strict=True)
        grown: list[list[list[int]]] = []
        for b, (scores, parents, chosen, ending) in enumerate(tables):
            grown.append([[*sequences[b][parent], token] for parent, token in zip(parents, chosen, strict=True)])
            if not open_searches[b] or (early_stopping is True and finished[b].full):
                continue
            for place in range(K):
                if ending[place]:
                    finished[b].add(scores[place] / length**length_penalty, grown[b][place])
        if last:
            break
        scores, kept = (best + ends * NO_CHANCE).topk(K, dim=-1)  # [B, K]
        sequences = [[grown[b][place] for place in places] for b, places in enumerate(kept.tolist())]
        for b, score in enumerate(scores[:, 0].tolist()):
            reached = max_new_tokens if early_stopping == "never" and length_penalty > 0.0 else length
            possible = score / reached**length_penalty
            open_searches[b] &= not finished[b].full or possible > finished[b].scores[-1]
        if not any(open_searches) or (early_stopping is True and all(each.full for each in finished)):
            break
        parents = beams.gather(1, kept)
        rows = (parents + offsets * K if length > 1 else offsets.expand(B, K)).flatten()
        log_probs = step(tokens.gather(1, kept).view(B * K, 1), rows)
        totals = log_probs.view(B, K, V) + scores[..., None]
    return [each.sequences[0] for each in finished]


def padded(sequences: list[list[int]], pad: int, device: torch.device) -> Tensor:
    """Sequences as one tensor (B, T), filled with `pad` on the right."""
    width = max((len(sequence) for sequence in sequences), default=0)
    found = torch.full((len(sequences), width), pad, device=device)
    for row, sequence in zip(found, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, device=device)
    return found
