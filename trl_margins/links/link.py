"""What a link is: a function from the reward gap and its margin to a loss per pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor

from ..checks import names_a_column
from ..pairs import PairLogps, PairView, mean_logps, this_rank


def margin_loss(
    reward_gap: Tensor,
    margin: Tensor | float = 0.0,
    weight: Tensor | float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The package's equation: :math:`w_i \cdot -\log\sigma(m_i - \gamma_i)`.

    With label smoothing ε: :math:`w_i \cdot [-(1-\varepsilon)\log\sigma(z_i) - \varepsilon\log\sigma(-z_i)]`,
    z = m − γ.

    Args:
        reward_gap: [B] m = r_w − r_l, β inside.
        margin: [B] or a number, γ in reward units.
        weight: [B] or a number.
        label_smoothing: ε, the share of labels taken to be flipped, in [0, 0.5].

    Returns:
        [B] losses.

    Source: SimPO (arXiv 2405.14734), eq. 6; GapPO, eq. 8.
    """
    z = reward_gap - margin
    loss = -F.logsigmoid(z)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-z)
    return weight * loss


@dataclass(frozen=True)
class LossInputs:
    """What a link sees of B pairs. Scores are rewards before β."""

    pairs: PairLogps
    chosen: Tensor  # [B] score of y_w
    rejected: Tensor  # [B] score of y_l
    beta: float
    margin: Tensor | float = 0.0  # [B] or a number, reward units
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    options: Mapping[str, float] = field(default_factory=dict)  # of the link; the others have its defaults
    view: PairView | None = None  # the batch's columns and the other ranks; None: there is neither

    @property
    def reward_gap(self) -> Tensor:
        """[B] m = β (score_w − score_l)."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def z(self) -> Tensor:
        """[B] m − γ."""
        return self.reward_gap - self.margin

    def batch_mean(self, values: Tensor) -> Tensor:
        """[] mean of [B] values over the pairs of all ranks, without gradient."""
        return (this_rank if self.view is None else self.view.gather)(values.detach()).mean()

    @property
    def per_token_gap(self) -> Tensor:
        """[B] (score_w / |y_w|) − (score_l / |y_l|), without β."""
        return mean_logps(self.chosen, self.pairs.chosen_length) - mean_logps(
            self.rejected, self.pairs.rejected_length
        )


@dataclass(frozen=True)
class Link:
    """A loss per pair under the name that a config's `loss_type` gives it.

    Args:
        name: of the loss.
        function: from `LossInputs` to [B] losses.
        takes_margin: it is a function of m − γ.
        per_pair: row i is the loss of pair i alone; only such a loss can be weighted.
        needs_reference: it means something for log-ratios to a reference model alone.
        reads_smoothing: it has a label smoothing ε.
        reads_sums: it computes with log-ratios summed over the tokens; another reward would not be what it trains on.
        of_batch: it is one number, the same in every row, that no pair's weight scales.
        compares_pairs: a pair's loss is relative to the others of its mini-batch.
        columns: of the batch, which it reads from `LossInputs.view`.
        reward: the reward that it is a loss of; on CPOTrainer's base the one that it has where none is named.
        needs_its_reward: with another, or with AlphaPO's shape of it, it means nothing.
        options: the config fields that it reads as `LossInputs.options`, each with its default.
    """

    name: str
    function: Callable[[LossInputs], Tensor]
    takes_margin: bool = False
    per_pair: bool = True
    needs_reference: bool = False
    reads_smoothing: bool = False
    reads_sums: bool = False
    of_batch: bool = False
    compares_pairs: bool = False
    columns: tuple[str, ...] = ()
    reward: str | None = None
    needs_its_reward: bool = False
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """
        Raises:
            TypeError: a name, a function, columns or options of another kind.
        """
        if not isinstance(self.name, str) or not names_a_column(self.name):
            raise TypeError(
                f"a link is called {self.name!r}: give it a name, for loss_type, without commas, quotation marks and "
                "line breaks"
            )
        if not callable(self.function):
            raise TypeError(f"the function of the link {self.name!r} is {self.function!r:.80}: give one of LossInputs")
        if not isinstance(self.columns, tuple | list) or not all(isinstance(name, str) for name in self.columns):
            raise TypeError(f"the link {self.name!r} has columns={self.columns!r}: give a tuple of names")
        are_pairs = all(isinstance(each, tuple) and len(each) == 2 for each in self.options)
        if not isinstance(self.options, tuple) or not are_pairs:
            raise TypeError(
                f"the link {self.name!r} has the options {self.options!r}: give a tuple of names with their "
                "defaults, as (('tilt', 0.5),)"
            )

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.function(replace(inputs, options={**dict(self.options), **inputs.options}))
