"""A language model of integers: KV is a hash chain, attention is a sum, the next token is a function of both.

    cell[p]  = hash(attention over cells < p, token p)        what the executor stores in a page
    total[p] = cell[0] + ... + cell[p]                         what attention reads at position p
    next     = function(total[p], seed, position)

One cell that is wrong, stale, missing or read twice changes every total after it, and so the tokens; and the right
tokens follow from the prompt alone (`ChainModel.continuation`), without pages, batches, chunks or caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moonlang.core.request import Finish
from moonlang.core.sampling import SamplingParams

_PRIME = (1 << 61) - 1
_MULTIPLIER = 0x1B873593CC9E2D51
_PER_MILLE = 1000


def cell(total: int, token: int) -> int:
    """The KV of `token` when attention over everything before it sums up to `total`."""
    return (total * _MULTIPLIER + token + 1) % _PRIME


def attend(total: int, tokens: Sequence[int]) -> int:
    """The total after `tokens` more."""
    for token in tokens:
        total += cell(total, token)
    return total


def _noise(total: int, seed: int, position: int) -> int:
    mixed = (total + seed * 0x2545F4914F6CDD1D + position * 0x369DEA0F31A53F85) % _PRIME
    mixed = (mixed ^ (mixed >> 31)) * _MULTIPLIER % _PRIME
    return mixed ^ (mixed >> 29)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainModel:
    """vocab_size: ids are below it. eos_per_mille: how often in a thousand draws the sequence wants to end."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    eos_per_mille: int

    def sample(self, total: int, position: int, output_len: int, sampling: SamplingParams) -> int:
        """The token at `position` of a sequence that has `output_len` output tokens so far.

        Stop tokens are masked until `min_new_tokens` are there, as a sampler does it.
        """
        noise = _noise(total, sampling.seed, position)
        masked = output_len < sampling.min_new_tokens
        if noise % _PER_MILLE < self.eos_per_mille and not masked:
            return self.eos_token_ids[noise // _PER_MILLE % len(self.eos_token_ids)]
        token = noise // _PER_MILLE % self.vocab_size
        while masked and (token in self.eos_token_ids or token in sampling.stop_token_ids):
            token = (token + 1) % self.vocab_size
        return token

    def continuation(self, prompt: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Every token after `prompt`, without end: the oracle."""
        total = attend(0, prompt)
        output_len = 0
        while True:
            token = self.sample(total, len(prompt) + output_len, output_len, sampling)
            yield token
            total += cell(total, token)
            output_len += 1

    def answer(self, prompt: Sequence[int], sampling: SamplingParams, most: int) -> tuple[list[int], Finish]:
        """The full output of a request that may have at most `most` tokens, and how it ends."""
        output: list[int] = []
        if most == 0:
            return output, Finish(kind="length")
        for token in self.continuation(prompt, sampling):
            output.append(token)
            finish = self._finish(output, sampling, most)
            if finish is not None:
                return output, finish
        raise AssertionError("a continuation has no end")

    def _finish(self, output: list[int], sampling: SamplingParams, most: int) -> Finish | None:
        token = output[-1]
        eos, stop = token in self.eos_token_ids, token in sampling.stop_token_ids
        if stop or (eos and not sampling.ignore_eos):
            return Finish(kind="stop", matched=token, length=len(output))
        if grammar_ends(sampling, len(output)):
            return Finish(kind="stop", matched=token if eos else None, length=len(output))
        if len(output) >= most:
            return Finish(kind="length", length=len(output))
        return None


def grammar_ends(sampling: SamplingParams, output_len: int) -> bool:
    """The simulator's grammars are numbers: the sequence is complete after that many output tokens."""
    return sampling.grammar is not None and output_len >= int(sampling.grammar.source)
