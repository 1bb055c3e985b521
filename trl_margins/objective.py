"""Puts reward, link, weights and margins together: from `PairLogps` and the batch's columns to one loss per pair."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add, mul

import torch
from torch import Tensor

from .checks import NUMBERS, Number, names_a_column, unknown
from .links import LINKS, Link, LossInputs
from .pairs import SCORE_CHOSEN, PairLogps, PairView, this_rank
from .rewards import Reward
from .terms import Term

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectiveOutput:
    """The losses of a batch of B pairs and what they were computed from. Everything but `losses` is detached."""

    losses: Tensor  # [B] weight included
    chosen_reward: Tensor  # [B] β inside
    rejected_reward: Tensor  # [B]
    view: PairView
    weights: Mapping[str, Tensor]  # weight term → [B]
    margins: Mapping[str, Tensor]  # margin term → [B] reward units
    weight: Tensor | None  # [B] the product of the weights, 0 where a margin drops the pair; None: every pair weighs 1
    margin: Tensor | None  # [B] the sum of the margins and the shared target margin, None without a margin term
    gradient_scale: Tensor | None = None  # [B] −∂loss/∂(r_w − r_l), weight not included; in training


@dataclass(frozen=True)
class Objective:
    """loss_i = weight_i · link( (r_w,i − r_l,i) − margin_i ).

    Args:
        reward: from log-probabilities to the two scores of each pair.
        link: from the reward gap and the margin to a loss per pair; of several, link → its share of the sum.
        beta: β.
        gamma: target margin that all pairs share, in reward units; not used beside a margin term that holds it itself.
        weight: a weight term, or several, which multiply.
        margin: a margin term, or several, which add.
        label_smoothing: ε of the links that have one.
        discopop_tau: τ of DiscoPOP.
        link_options: further options of the links, by name; where one is not given it has the link's default.
        is_trls: reward and link are those that TRL's own trainer computes from the same config.

    Raises:
        TypeError: a term that is not a `Term`.
        ValueError: parts that do not go together, two terms of the same name, or a number that a link cannot take.
    """

    reward: Reward
    link: Link | Mapping[Link, float]
    beta: float
    gamma: float = 0.0
    weight: Term | Sequence[Term] | None = None
    margin: Term | Sequence[Term] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    link_options: Mapping[str, float] = field(default_factory=dict)
    is_trls: bool = field(default=False, repr=False, compare=False)

    @cached_property
    def links(self) -> Mapping[Link, float]:
        """Link → its share of the loss."""
        return {self.link: 1.0} if isinstance(self.link, Link) else self.link

    @property
    def losses(self) -> dict[str, float]:
        """Name of a link → its share of the loss."""
        return {link.name: share for link, share in self.links.items()}

    @cached_property
    def weights(self) -> tuple[Term, ...]:
        """The weight terms."""
        return _terms(self.weight)

    @cached_property
    def margins(self) -> tuple[Term, ...]:
        """The margin terms."""
        return _terms(self.margin)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Weights and margins."""
        return self.weights + self.margins

    @property
    def named_terms(self) -> tuple[tuple[str, Term], ...]:
        """("weight", term) and ("margin", term) of each."""
        return (*(("weight", term) for term in self.weights), *(("margin", term) for term in self.margins))

    @property
    def remembering(self) -> tuple[Term, ...]:
        """Terms with a state, which goes into the checkpoint."""
        return tuple(term for term in self.terms if type(term).state_dict is not Term.state_dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """Batch columns that the terms and the links read."""
        return tuple(dict.fromkeys(name for _, part in self.reading for name in part.columns))

    @property
    def reading(self) -> tuple[tuple[str, Term | Link], ...]:
        """What can read columns of the batch: `named_terms`, and ("loss_type", link) of each link."""
        return (*self.named_terms, *(("loss_type", link) for link in self.links))

    @cached_property
    def without_scores(self) -> Objective:
        """The objective without the terms and links that read scores, for evaluation sets that have none. Where no
        loss per pair is left, it is the sigmoid.
        """
        weight, margin = (
            [term for term in terms if SCORE_CHOSEN not in term.columns] for terms in (self.weights, self.margins)
        )
        links = {link: share for link, share in self.links.items() if SCORE_CHOSEN not in link.columns}
        if not any(share for link, share in links.items() if not link.of_batch):
            links[LINKS["dpo"]["sigmoid"]] = sum(self.links.values()) - sum(links.values())
        known = {name for link in links for name, _ in link.options}
        options = {name: value for name, value in self.link_options.items() if name in known}
        return replace(self, weight=weight, margin=margin, link=links, link_options=options)

    @property
    def needs_reference(self) -> bool:
        """Whether the reward or a term reads the reference model's log-probabilities."""
        return self.reward.needs_reference or any(term.needs_reference for term in self.terms)

    @property
    def shared_margin(self) -> float:
        """The target margin that is the same for all pairs."""
        return 0.0 if any(term.holds_target for term in self.margins) else self.gamma

    def __post_init__(self) -> None:
        _check_kinds(self)
        for kind, terms in {"weight": self.weights, "margin": self.margins}.items():
            _check_terms(kind, terms)
        names = [term.name for term in self.remembering]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"a weight and a margin are both called {twice[0]!r}: a checkpoint has one state per name"
            )
        of_batch = [link.name for link in self.links if link.of_batch]
        if len(of_batch) == len(self.links) and (self.terms or self.gamma):
            part = next((f"{kind} {term.name!r}" for kind, term in self.named_terms), f"margin of {self.gamma}")
            raise ValueError(
                f"{part} does not go with loss_type {of_batch[0]!r} alone, which has no loss per pair: add another"
            )
        for link in self.links:
            self._check_link(link)
        self._check_numbers()

    def _check_link(self, link: Link) -> None:
        tables = [table for table in LINKS.values() if table.get(link.name) is link] or list(LINKS.values())
        every = [each for table in tables for each in table.values()]  # of the base that has it
        if self.weights and not (link.per_pair or link.of_batch):
            raise ValueError(
                f"weight {self.weights[0].name!r} does not go with loss_type {link.name!r}, "
                "which has no loss per pair to weight"
            )
        if not (link.takes_margin or link.of_batch) and (self.margins or self.gamma):
            margin = repr(self.margins[0].name) if self.margins else f"of {self.gamma} (simpo_gamma)"
            able = sorted({each.name for each in every if each.takes_margin})
            raise ValueError(
                f"margin {margin} does not go with loss_type {link.name!r}: only {', '.join(able)} subtract a margin "
                "from the reward gap"
            )
        if link.needs_reference and not self.reward.needs_reference:
            able = sorted({each.name for each in every if not each.needs_reference})
            raise ValueError(
                f"loss_type {link.name!r} does not go with reward {self.reward.name!r}, which has no reference model; "
                f"these do: {', '.join(able)}"
            )
        if link.needs_its_reward and self.reward.name != link.reward:
            raise ValueError(
                f"loss_type {link.name!r} does not go with reward {self.reward.name!r}: it is a loss of "
                f"reward={link.reward!r}"
            )
        # of the log-ratio, α is that of a divergence
        alpha = getattr(self.reward, "alpha", 0.0) if self.reward.option_fields.get("alpha") == "alpha" else 0.0
        if link.needs_its_reward and alpha:
            raise ValueError(
                f"loss_type {link.name!r} does not go with alpha={alpha:g}: it is a loss of the log-probability "
                "itself, which is alpha=0"
            )
        if link.reads_sums and not self.reward.summed:
            raise ValueError(
                f"loss_type {link.name!r} does not go with reward {self.reward.name!r}: it computes with log-ratios "
                "summed over the tokens, which are reward='log-ratio'; loss_type 'sigmoid' goes with both"
            )

    def _check_numbers(self) -> None:
        Number(above=0).check("beta", self.beta)
        Number().check("simpo_gamma", self.gamma)
        Number(above=0).check("discopop_tau", self.discopop_tau)
        Number(least=0, most=0.5).check("label_smoothing", self.label_smoothing)
        known = [name for link in self.links for name, _ in link.options]
        for name, value in self.link_options.items():
            if name not in known:
                raise unknown("link option", name, known or ["none"])
            NUMBERS.get(name, Number()).check(name, value)
        names = [link.name for link in self.links]
        if "robust" in names:  # it divides by 1 − 2ε
            Number(least=0, below=0.5).check("label_smoothing of loss_type 'robust'", self.label_smoothing)
        if "exo_pair" in names:  # and this takes its logarithm
            Number(above=0, most=0.5).check("label_smoothing of loss_type 'exo_pair'", self.label_smoothing)
        for link, share in self.links.items():
            Number(least=0).check(f"the weight of loss_type {link.name!r} (loss_weights)", share)
        if not any(self.links.values()):
            raise ValueError(f"no loss to train on: loss_type is {names}, and all its loss_weights are 0")
        if self.label_smoothing and not any(link.reads_smoothing for link in self.links):
            logger.warning("label_smoothing=%g has no effect with loss_type %s", self.label_smoothing, names)

    def __call__(
        self,
        pairs: PairLogps,
        columns: Mapping[str, Tensor] | None = None,
        gather: Callable[[Tensor], Tensor] = this_rank,
        first: int = 0,
        training: bool = False,
        evaluation: bool = False,
    ) -> ObjectiveOutput:
        """The losses of B pairs.

        Args:
            pairs: their log-probabilities.
            columns: the batch's columns, name → [B].
            gather, first, training, evaluation: as in `PairView`.

        Raises:
            TypeError, ValueError: a reward, term or link that does not return tensors of shape [B], or a term's value
                that requires grad.
        """
        chosen, rejected = _scores(self.reward, pairs)
        scores, summed = (chosen, rejected), self.reward.summed
        view = PairView.of(pairs, scores, self.beta, columns, gather, first, training, evaluation, summed)
        weights = {term.name: _value("weight", term, view) for term in self.weights}
        margins = {term.name: _value("margin", term, view) for term in self.margins}
        factors = [*weights.values()]
        for term in self.margins:  # a weight is 0 itself where it drops a pair
            if (kept := kept_pairs("margin", term, view.columns)) is not None:
                factors.append(kept.to(chosen.dtype))
        weight = reduce(mul, factors) if factors else None
        margin = reduce(add, margins.values()) + self.shared_margin if margins else None
        inputs = LossInputs(
            pairs,
            chosen,
            rejected,
            beta=self.beta,
            margin=self.gamma if margin is None else margin,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
            options=self.link_options,
            view=view,
        )
        of_link = {link: share * _loss(link, inputs) for link, share in self.links.items()}
        losses, of_batch = (
            sum((loss for link, loss in of_link.items() if link.of_batch is shared), torch.zeros_like(chosen[:1]))
            for shared in (False, True)
        )
        if pairs.policy_weight is not None:
            losses, of_batch = pairs.policy_weight * losses, pairs.policy_weight * of_batch
        scale = self._gradient_scale(losses, chosen, rejected) if training and losses.requires_grad else None
        losses = (losses if weight is None else weight * losses) + of_batch
        rewards = self.beta * chosen.detach(), self.beta * rejected.detach()
        return ObjectiveOutput(losses, *rewards, view, weights, margins, weight, margin, scale)

    def _gradient_scale(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        """[B] −∂loss/∂(r_w − r_l); of a loss that is not a function of the gap, the mean over both sides."""
        sides = [(sign, score) for sign, score in ((-1, chosen), (1, rejected)) if score.requires_grad]
        gradients = torch.autograd.grad(
            losses.sum(), [score for _, score in sides], retain_graph=True, materialize_grads=True
        )
        scales = [sign * gradient for (sign, _), gradient in zip(sides, gradients, strict=True)]
        return reduce(add, scales) / (len(scales) * self.beta)


def _terms(given: Term | Sequence[Term] | None) -> tuple[Term, ...]:
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)


_OF_STATE = ("state_dict", "load_state_dict")


def _check_kinds(objective: Objective) -> None:
    """
    Raises:
        TypeError: a reward, link or link options of another kind.
    """
    reward, link, options = objective.reward, objective.link, objective.link_options
    links = [*link] if isinstance(link, Mapping) else [link]
    if not isinstance(reward, Reward):
        raise TypeError(f"the reward is {reward!r:.80}, and no Reward: give an instance, as LogRatioReward()")
    for each in links:
        if not isinstance(each, Link):
            raise TypeError(f"the link is {each!r:.80}, and no Link: CPO_LINKS['sigmoid'] is one")
    if not isinstance(options, Mapping):
        raise TypeError(f"link_options is {options!r:.80}: give a dict, from an option's name to its number")


def _check_terms(kind: str, terms: Sequence[Term]) -> None:
    for term in terms:
        _check_term(kind, term)
    names = [term.name for term in terms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two {kind} terms are called {twice[0]!r}: logs and checkpoints know a term by its name")
    with_target = [term.name for term in terms if kind == "margin" and term.takes_target()]
    if len(with_target) > 1:
        raise ValueError(
            f"margins {' and '.join(map(repr, with_target))} each hold the target margin γ, so that their sum would "
            "have it more than once: name one of them"
        )


def _check_term(kind: str, term: Term) -> None:
    fix = "From Python, give an instance of a term's class"
    if isinstance(term, str):
        raise TypeError(f"the {kind} is a name: {kind}={term!r} belongs in the config. {fix}")
    if isinstance(term, type) and issubclass(term, Term):
        raise TypeError(f"the {kind} is the class {term.__name__}. {fix}")
    if not isinstance(term, Term):
        raise TypeError(f"the {kind} {term!r:.80} is not a Term: let its class inherit from trl_margins.Term")
    if not isinstance(getattr(term, "name", None), str):
        raise TypeError(f"the {kind} {type(term).__name__} has no name: give its class one, as name = 'focus'")
    if not names_a_column(term.name) or "/" in term.name:
        raise ValueError(
            f"the {kind} is called {term.name!r}: logs and checkpoints need a name without commas, slashes, quotation "
            "marks and line breaks"
        )
    what = f"the {kind} {term.name!r}"
    for attribute in ("columns", "probes"):
        names = getattr(term, attribute)
        are_names = isinstance(names, Collection) and all(isinstance(name, str) for name in names)
        if isinstance(names, str) or not are_names:
            raise TypeError(f"{what} has {attribute}={names!r:.80}: give a tuple of names, as ('agreement',)")
    if term.column_minimum not in (None, -math.inf):
        Number().check(f"column_minimum of {what}", term.column_minimum)
    saves, loads = (getattr(type(term), name) is not getattr(Term, name) for name in _OF_STATE)
    if saves != loads:
        one, other = _OF_STATE if saves else reversed(_OF_STATE)
        raise TypeError(f"{what} has {one} and no {other}: a resumed run would begin with its first values")


def _value(kind: str, term: Term, view: PairView) -> Tensor:
    """[B] what a term returns. Inputs are detached: a gradient can only come from the term's own tensors."""
    before, what = view.versions, f"{kind} {term.name!r}"
    with of_part(what, term):
        found = term(view)
    value = _checked(what, found, view.reward_gap)
    if view.versions != before:
        raise ValueError(f"{kind} {term.name!r} changes what it is given in place: let it compute new tensors")
    if value.requires_grad:
        raise ValueError(f"{kind} {term.name!r} returned a tensor that requires grad; detach it")
    return value


def kept_pairs(kind: str, term: Term, columns: Mapping[str, Tensor]) -> Tensor | None:
    """[N] bool: the pairs that a term keeps; None: all."""
    what = f"keeps of {kind} {term.name!r}"
    with of_part(what, term):
        kept = term.keeps(columns)
    if kept is not None and _of_columns(what, kept, columns).dtype != torch.bool:
        raise TypeError(f"{what} returned {kept.dtype}, expected torch.bool")
    return kept


def averaged_values(term: Term, columns: Mapping[str, Tensor]) -> Tensor | None:
    """[B] what a term wants the mean of over the optimizer's batch; None: nothing."""
    what = f"averaged of term {term.name!r}"
    with of_part(what, term):
        found = term.averaged(columns)
    return None if found is None else _of_columns(what, found, columns)


def _of_columns(what: str, values: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    if not columns:
        raise ValueError(f"{what} returned values, and the term names no columns that they could be of")
    return _checked(what, values, next(iter(columns.values())))


def _scores(reward: Reward, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    what = f"reward {reward.name!r}"
    with of_part(what, reward):
        found = reward(pairs)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"{what} returned a {type(found).__name__}, expected two tensors: chosen and rejected")
    chosen, rejected = (_checked(what, each, pairs.chosen) for each in found)
    return chosen, rejected


def _loss(link: Link, inputs: LossInputs) -> Tensor:
    what = f"loss_type {link.name!r}"
    with of_part(what):
        found = link(inputs)
    return _checked(what, found, inputs.chosen)


@contextmanager
def of_part(what: str, part: object = None) -> Iterator[None]:
    """Names a part of the objective in the errors of its code. Ours say themselves what is wrong."""
    try:
        yield
    except Exception as error:
        is_ours = type(part).__module__.startswith(f"{__package__}.")
        if is_ours or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        kind = type(error) if type(error) in (TypeError, ValueError) else RuntimeError
        raise kind(f"{what} raises {type(error).__name__}: {error}") from error


def _checked(what: str, value: Tensor, like: Tensor) -> Tensor:
    expected = tuple(like.shape)
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} returned a {type(value).__name__}, expected a tensor of shape {expected}")
    if tuple(value.shape) != expected:
        raise ValueError(f"{what} returned shape {tuple(value.shape)}, expected {expected}")
    kinds = {
        "complex": value.is_complex(),
        "meta": value.is_meta,
        "sparse": value.layout != torch.strided,
        "inference-mode": value.is_inference() and torch.is_grad_enabled(),
    }
    if any(kinds.values()):
        kind = next(name for name, is_one in kinds.items() if is_one)
        raise TypeError(f"{what} returned {kind} values, expected a dense tensor of real numbers")
    return value


def refuse_reference(parts: Iterable[Reward | Term | type[Reward] | type[Term]]) -> None:
    """
    Raises:
        ValueError: a part reads a reference model, which CPOTrainer does not have.
    """
    for part in parts:
        if part.needs_reference:
            raise ValueError(
                f"{part.name!r} reads the log-probabilities of a reference model, which CPOTrainer does not have: "
                "take MarginDPOTrainer (--base dpo)"
            )
