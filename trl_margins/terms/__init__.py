"""Weight and margin terms: one file per paper. A term maps a batch of pairs to [B] values without gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from ..checks import option_prefix
from ..pairs import PairView


class Term(ABC):
    """A weight or a margin per pair. A subclass has a `name` and is callable; the rest is optional.

    Each argument of `__init__` is a config field of the term: `option_prefix` and the argument's name. The arguments
    `beta`, `gamma` and `gamma0` of a margin are the config's β and target margin in reward units instead.
    """

    name: ClassVar[str]
    option_prefix: ClassVar[str]  # the name with underscores, unless a class has its own
    further_options: ClassVar[tuple[str, ...]] = ()  # config fields beside those that begin with the prefix
    columns: tuple[str, ...] = ()  # of the batch: score_chosen, score_rejected, evaluation_factor, or the data's own
    column_minimum: ClassVar[float | None] = None  # smaller values in a column of the data's own are refused
    probes: ClassVar[tuple[str, ...]] = ()  # values that the trainer measures before the optimizer's step
    needs_reference: ClassVar[bool] = False  # reads the reference model's log-probabilities
    holds_target: ClassVar[bool] = False  # a margin that is the whole target: the objective adds no γ to it
    compares_pairs: ClassVar[bool] = False  # a pair's value is relative to the others of its mini-batch
    keeps_only: str = ""  # in words, the pairs that `keeps` is true of

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "name", ""), str | None):
            raise TypeError(f"the name of the term {cls.__name__} is {cls.name!r}: give it a text")
        if isinstance(vars(cls).get("name"), str) and "option_prefix" not in vars(cls):
            cls.option_prefix = option_prefix(cls.name)

    @classmethod
    def takes_target(cls) -> bool:
        """Whether the target margin γ is an argument of `__init__`."""
        return not signature(cls).parameters.keys().isdisjoint({"gamma", "gamma0"})

    @abstractmethod
    def __call__(self, view: PairView) -> Tensor:
        """[B] weights, or margins in reward units, without gradient."""

    def fit(self, columns: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Called once before training, with the training set's `columns`: name → [N] float32.

        A term with a `fit` of its own cannot train on a stream.
        """

    def keeps(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """[N] bool: the pairs that this term leaves a loss; None means all.

        A training set without such a pair is refused. A weight gives the others 0; a margin's have no loss at all.

        Args:
            columns: the term's `columns`, name → [N].
        """
        return None

    def averaged(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """[B] values of the term's `columns` whose mean over the optimizer's batch it needs: `batch_mean`."""
        return None

    def batch_mean(self, view: PairView, values: Tensor) -> Tensor:
        """The mean of what `averaged` gives: in training over the optimizer's batch, which is the whole accumulation
        window of all ranks; in evaluation, and outside of a trainer, over this batch of all ranks.

        Args:
            view: the pairs.
            values: [B] what `averaged` gives for them.
        """
        measured = view.columns.get(self.mean_column)
        return view.gather(values).mean() if measured is None else measured

    @property
    def mean_column(self) -> str:
        """The batch's column with the mean over the optimizer's batch."""
        return f"mean of {type(self).__qualname__}"

    def observed(self, view: PairView, value: Tensor) -> dict[str, Tensor]:
        """[B] further values to log in training, by name. `value` is what the term returned for this view."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors; and numbers, strings, None, lists and dicts of these."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Takes back what `state_dict` gave."""
