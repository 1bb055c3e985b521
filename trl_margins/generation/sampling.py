"""How answers are sampled, so that each depends on its prompt, its number and the seed, and not on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_MOST = np.float32(1 - 2**-22)  # below 1 also where it is multiplied by a sum of probabilities
_GREEDY = 1e-5  # a lower temperature takes the most probable token, as in vLLM
_HEAD = 256  # tokens among which a nucleus is looked for first

_NOT_FINITE = "the model's logits are NaN or infinite: try another precision (--dtype float32), or another model"


class Prompt(NamedTuple):
    """What an engine answers."""

    ids: list[int]
    room: int  # tokens that an answer may have


@dataclass(frozen=True)
class Sampling:
    """The n answers to each prompt.

    Attributes:
        n: answers per prompt.
        temperature: 0, or less than 1e-5, takes the most probable token.
        top_p: share of the probability from which tokens are drawn.
        top_k: number of tokens from which they are drawn; 0 for all.
        max_new_tokens: longest answer.
        seed: of all draws.
    """

    n: int = 5
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n > 1 and self.temperature < _GREEDY:
            raise ValueError(
                f"temperature {self.temperature:g} gives the same answer {self.n} times: set n to 1, or raise "
                "temperature"
            )

    @property
    def draws_tokens(self) -> bool:
        """Whether answers are drawn, and not the most probable ones."""
        return self.temperature >= _GREEDY

    def seed_of(self, ids: Sequence[int], index: int) -> int:
        """63 bits for one answer to a prompt."""
        digest = blake2b(np.asarray([self.seed, index, *ids], dtype="<i8").tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def draws(self, ids: Sequence[int], index: int, n: int) -> np.ndarray:
        """[n] numbers in [0, 1), one for each token of an answer."""
        seed = self.seed_of(ids, index)
        # the stream of this generator is the same in all versions of NumPy
        numbers = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).random_sample(n)
        return np.minimum(numbers.astype(np.float32), _MOST)

    def pick(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The tokens that these draws fall on.

        Args:
            logits: [B, V] in float32.
            draws: [B] in [0, 1).

        Returns:
            [B] token ids.

        Raises:
            ValueError: logits that are NaN or infinite.
        """
        finite = logits.amax(dim=-1).isfinite().all()
        if logits.is_cuda:
            torch._assert_async(finite, _NOT_FINITE)  # no wait for the device, which may be recording a graph
        elif not finite:
            raise ValueError(_NOT_FINITE)
        if self.temperature < _GREEDY:
            return logits.argmax(dim=-1)
        probabilities = (logits / self.temperature).softmax(dim=-1)
        if self.top_p == 1 and not self.top_k:
            return _inverse(probabilities, draws)
        size = probabilities.shape[-1]
        if self.top_k:
            return self._nucleus(*torch.topk(probabilities, min(self.top_k, size)), draws)
        if probabilities.device.type != "cpu" or size <= _HEAD:
            return self._nucleus(*torch.sort(probabilities, dim=-1, descending=True), draws)
        # on a CPU, sorting the vocabulary takes as long as the model, and few rows need it
        head, ids = torch.topk(probabilities, _HEAD)
        tokens = self._nucleus(head, ids, draws)
        rest = (head.sum(dim=-1) < self.top_p).nonzero()[:, 0]
        tokens[rest] = self._nucleus(*torch.sort(probabilities[rest], dim=-1, descending=True), draws[rest])
        return tokens

    def _nucleus(self, likely: Tensor, ids: Tensor, draws: Tensor) -> Tensor:
        """The picked tokens among the most probable ones [B, K], which come in this order."""
        if self.top_k:
            likely = likely / likely.sum(dim=-1, keepdim=True)
        before = likely.cumsum(dim=-1) - likely
        place = _inverse(likely.masked_fill(before >= self.top_p, 0.0), draws)
        return ids.gather(1, place[:, None])[:, 0]


def _inverse(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The place of each draw in the cumulated probabilities [B, V], which need not sum to 1."""
    sums = probabilities.cumsum(dim=-1)
    return torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0]


def only(tokens: Tensor, logits: Tensor) -> Any:
    """Logits [B, V] that leave one token [B] per row."""
    return torch.full_like(logits, -torch.inf).scatter(1, tokens[:, None], 0.0)
