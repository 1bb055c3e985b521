"""GAPO's measurement before each optimizer step: a nearby, worse policy, and how far each pair's gap falls there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import fsdp_dtype, is_sharded, reduce_tensors
from ..forward.precision import (
    AUTOCAST,
    eval_mode,
    has_dropout,
    ieee_float32,
    in_float32,
    narrow_dtype,
    rounds_products,
)
from ..objective import Objective
from ..pairs import CACHED, upcast, with_columns
from ..rewards import LengthNormalizedReward
from ..terms.anchor import ANCHOR_GAP, ANCHOR_SCORE_GAP
from ..zero3 import zero3_settings
from .diagnostics import anchors_log, gap_parts, measures_anchor
from .direction import Direction, gradient_direction, momentum_direction, own_gradients
from .pair_gradients import CachedGradients, pair_gradients
from .perturbation import Product, cannot_displace, cast_by_autocast, displaced, fused_head_moves, perturbed
from .probe import Batch, Probe, ProbedTrainer, ProbeOptions, Window
from .scope import parameters_in_scope

logger = logging.getLogger(__name__)

_DIRECTIONS = {
    "gradient": "the gradient over each group of {k} mini-batches",
    "momentum": "the optimizer's momentum",
    "pair": "each pair's own gradient",
}

Anchor = AbstractContextManager[Mapping[str, Product] | None]  # within it the model computes at the anchor


class GeometricAnchor(Probe):
    """Measures the anchor gaps of an accumulation window, in groups of k mini-batches that share a perturbation."""

    columns = (ANCHOR_SCORE_GAP, ANCHOR_GAP)

    def __init__(self, trainer: ProbedTrainer, options: ProbeOptions) -> None:
        super().__init__(trainer, options)
        self._warned = False
        self.log = anchors_log(trainer) if options.anchor_diagnostics else None
        check_estimator(trainer.objective, options, trainer.has_aux_loss)
        mixed_precision = trainer.accelerator.mixed_precision  # now: accelerate's is that of the latest trainer
        self.autocast_dtype = AUTOCAST.get(mixed_precision)
        self.narrow_dtype = narrow_dtype(trainer.model, mixed_precision)
        self._check_sharded(parameters_in_scope(trainer.model, options.anchor_scope))
        logger.info(
            "anchor: radius %g over %d parameters (scope %s), direction from %s, gaps by %s",
            options.anchor_radius,
            self.n_parameters,
            options.anchor_scope or "all that trains",
            _DIRECTIONS[options.anchor_direction].format(k=options.anchor_batch_multiplier),
            options.anchor_estimator,
        )

    def __call__(self, batches: Window) -> Window:
        """The same mini-batches, each with `anchor_score_gap` or `anchor_gap` among its columns."""
        batches, options = self.prepared(batches), self.options
        self._check_sharded(self.parameters)
        momentum = None
        if options.anchor_direction == "momentum":
            momentum = momentum_direction(self.trainer.optimizer, self.parameters)
        k = len(batches) if momentum is not None else options.anchor_batch_multiplier
        groups = list(in_groups(batches, k))
        keeps = {len(group): momentum is None and self._keeps_graphs(len(group)) for group in groups}
        measured = (self._measured(group, momentum, keeps[len(group)], group is groups[-1]) for group in groups)
        if any(keeps.values()) and len(groups) > 1:  # a group's graphs make room before the next one's
            return OneByOne(itertools.chain.from_iterable(measured), len(batches))
        return list(itertools.chain.from_iterable(measured))

    def _measured(self, group: list[Batch], momentum: Direction | None, keeps: bool, is_last: bool) -> list[Batch]:
        """The mini-batches of a group, measured along its direction."""
        options = self.options
        if options.anchor_direction == "pair":
            ready, measured, direction = self._alone(group)
        elif options.anchor_estimator == "per-pair":
            ready, measured, direction = self._per_pair(group, momentum)
        else:
            direction, ready = (momentum, group) if momentum is not None else self._direction(group, keeps, is_last)
            measured = self.measure(ready, direction)
        ready = [with_columns(batch, columns) for batch, columns in zip(ready, measured, strict=True)]
        self._record(ready, direction)
        return ready

    def _record(self, batches: Sequence[Batch], direction: Direction | None) -> None:
        """Adds the parts of these pairs' anchor gaps to the log, in every `anchor_diagnostics`-th step from the first.

        Args:
            direction: the one that they were measured under; None for each pair's own.
        """
        step = self.trainer.state.global_step
        if self.log is None or step % self.options.anchor_diagnostics:
            return
        # dropout would draw random numbers, which the update would then lack
        with nullcontext() if self._computes_alike else eval_mode(self.trainer.model):
            for batch in batches:
                parts = gap_parts(self.trainer, batch, direction, self.parameters, self.options.anchor_radius)
                self.log.add(step + 1, parts)

    def _check_sharded(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Checks that the estimator works on sharded parameters: at once if accelerate is going to shard them, and
        again before the first forward pass, when they are what they will be.

        Raises:
            ValueError: it does not.
        """
        accelerator = self.trainer.accelerator
        under_zero3 = zero3_settings(accelerator) is not None
        if not (accelerator.is_fsdp2 or under_zero3 or any(map(is_sharded, parameters.values()))):
            return
        kind = "ZeRO-3" if under_zero3 else "FSDP2"
        if self.options.anchor_estimator == "per-pair":
            raise ValueError(
                f"anchor_estimator='per-pair' takes every pair's own gradient, and {kind} gives each rank a part of "
                "it, summed over all ranks: use anchor_estimator='difference', DDP, or adapters on a model that "
                "transformers has sharded (distributed_config)"
            )
        if self.options.anchor_estimator == "float32":
            raise ValueError(
                f"anchor_estimator='float32' computes in float32 with weights of its own, and {kind} casts the "
                "weights itself: use anchor_estimator='difference', or DDP"
            )
        if torch.float16 in (self.narrow_dtype, fsdp_dtype(self.trainer.model)):
            raise ValueError(
                f"on sharded parameters ({kind}) anchor gaps are not measured in float16, whose gradients are scaled: "
                "set fp16 to false and bf16 to true, or use DDP"
            )

    # The direction

    def _direction(
        self, group: list[Batch], keeps: bool = False, is_last: bool = False
    ) -> tuple[Direction, list[Batch]]:
        """The direction, and the mini-batches, with their forward passes where the update can use them."""
        trainer, n_pairs, ready = self.trainer, 0, []
        with own_gradients(trainer.accelerator, trainer.model, self.parameters) as gradients:
            for number, batch in enumerate(group, start=1):
                # the window's last is the one whose backward pass DDP reduces: its wrapper makes the forward pass,
                # and takes no other backward pass before that one
                reduced = is_last and number == len(group)
                kept = keeps and not (reduced and len(group) > 1 and trainer.reduces_in_backward)
                pairs = trainer.forward_pairs(batch, trainer.model_wrapped if kept and reduced else None)
                gap = trainer.score_gap(pairs)
                gradients.add(gap.sum(), retain_graph=kept)
                n_pairs += gap.numel()
                ready.append({**batch, CACHED: pairs} if kept else batch)
            gradient = gradients.take()
        return self._directed(gradient, n_pairs), ready

    def _directed(self, gradient: dict[str, Tensor], n_pairs: int) -> Direction:
        """The direction of Σ ∇Δ over all ranks, of which `n_pairs` are this rank's."""
        accelerator = self.trainer.accelerator
        total = accelerator.reduce(torch.full((), float(n_pairs), device=accelerator.device), "sum")
        direction = gradient_direction(accelerator, gradient)
        self.trainer.store_metrics(
            {
                "anchor/gradient_norm": direction.norm / total,
                "anchor/no_direction": (direction.per_unit == 0).float(),
            }
        )
        return direction

    def _keeps_graphs(self, n_mini_batches: int) -> bool:
        """Whether a group's forward passes, made for its direction, also serve the update."""
        options = self.options
        plain = options.anchor_direction == "gradient" and options.anchor_estimator != "per-pair"
        if not plain or options.sam_radius or n_mini_batches > options.anchor_keep_graphs:  # SAM's update is elsewhere
            return False
        return self.trainer.graphs_can_wait

    # The gaps

    @torch.no_grad()
    def measure(self, batches: Sequence[Batch], direction: Direction) -> list[dict[str, Tensor]]:
        """Each mini-batch's columns: its gaps at the anchor, or how far they fall from the policy to there."""
        model = self.trainer.model
        vectors, step = direction.vectors, -self.options.anchor_radius * direction.per_unit
        if not self._sharded and self._upcasts:
            with in_float32(model), eval_mode(model):
                return self._fall(batches, perturbed(model, vectors, step))
        anchor: Anchor
        if self.narrow_dtype is None or self._sharded:
            anchor, fused = perturbed(model, vectors, step, self._computed_in(vectors)), True
        else:
            fused = fused_head_moves(model, vectors)
            anchor = displaced(model, vectors, step, self.narrow_dtype, fused and self.trainer.fuses_head)
        # the update's own forward pass gives the gaps at the policy, if it is there and computes as this one does
        alike = self.narrow_dtype is not None or not rounds_products()
        if alike and self._computes_alike and not self.options.sam_radius:
            with ieee_float32():
                return [{ANCHOR_SCORE_GAP: gap} for gap in self._gaps_at(anchor, batches, fused)]
        with eval_mode(model):
            return self._fall(batches, anchor, fused)

    @cached_property
    def _computes_alike(self) -> bool:
        """Whether two forward passes of a training model give the same: there is no dropout and no noise."""
        return not (self.trainer.args.neftune_noise_alpha or has_dropout(self.trainer.model))

    @cached_property
    def _sharded(self) -> bool:
        return any(map(is_sharded, self.parameters.values()))

    def _computed_in(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """What these parameters are cast to by the forward pass: FSDP2's mixed precision casts all of them, autocast
        those that are multiplied with.
        """
        model = self.trainer.model
        if (cast := fsdp_dtype(model)) is not None:
            return dict.fromkeys(names, cast)
        if (cast := self.autocast_dtype) is not None:
            return dict.fromkeys(cast_by_autocast(model, names), cast)
        return {}

    @cached_property
    def _upcasts(self) -> bool:
        """Whether the model is upcast to float32 for the measurement."""
        if self.options.anchor_estimator == "float32":
            return True
        reason = None if self.narrow_dtype is None else cannot_displace(self.trainer.model, self.parameters)
        if reason is not None:
            logger.warning("anchor gaps are measured in float32, which is slower: %s", reason)
        return reason is not None

    def _fall(self, batches: Sequence[Batch], anchor: Anchor, fused: bool = True) -> list[dict[str, Tensor]]:
        """Both ends of the difference, in forward passes that compute alike."""
        with ieee_float32():
            here = self._gaps(batches)
            there = self._gaps_at(anchor, batches, fused)
        return [{ANCHOR_GAP: before - after} for before, after in zip(here, there, strict=True)]

    def _gaps_at(self, anchor: Anchor, batches: Sequence[Batch], fused: bool) -> list[Tensor]:
        with anchor as products:
            gaps = self._gaps(batches, fused)
        unused = [name for name, product in (products or {}).items() if not product.called]
        if unused and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d linear layers were not called at the anchor (for example %s): the anchor gaps leave their "
                "step out. If a kernel reads these weights itself, set anchor_estimator='float32'",
                len(unused),
                len(products or {}),
                unused[0],
            )
        return gaps

    def _gaps(self, batches: Sequence[Batch], fused: bool = True) -> list[Tensor]:
        return [upcast(self.trainer.score_gap(self.trainer.forward_pairs(batch, fused=fused))) for batch in batches]

    # Everything from the pairs' own gradients

    def _per_pair(
        self, group: list[Batch], momentum: Direction | None
    ) -> tuple[list[Batch], list[dict[str, Tensor]], Direction]:
        """The mini-batches, ready for the update; their gaps to first order; the direction."""
        cached, ready = self._cached(group)
        if momentum is not None:
            direction = momentum
        else:
            of_each = [each.summed(self.parameters) for each in cached]
            summed = {
                name: sum((gradient[name] for gradient in of_each), torch.zeros_like(parameter))
                for name, parameter in self.parameters.items()
            }
            gradient = reduce_tensors(self.trainer.accelerator, summed, "sum")
            direction = self._directed(gradient, sum(each.gap.numel() for each in cached))
        scale = self.options.anchor_radius * direction.per_unit
        return ready, [{ANCHOR_GAP: scale * each.along(direction.vectors)} for each in cached], direction

    def _cached(self, group: list[Batch]) -> tuple[list[CachedGradients], list[Batch]]:
        trained = parameters_in_scope(self.trainer.model, None)  # the scope is what the anchor moves
        cached = [CachedGradients.of(self.trainer, batch, trained) for batch in group]
        # DDP reduces what its own forward pass has announced; these gradients come from none
        reduce = partial(reduce_tensors, self.trainer.accelerator, how="mean")
        ready: list[Batch] = [
            {**batch, CACHED: each.for_the_update(trained, reduce)} for batch, each in zip(group, cached, strict=True)
        ]
        return cached, ready

    # Each pair's own direction

    def _alone(self, group: list[Batch]) -> tuple[list[Batch], list[dict[str, Tensor]], None]:
        """Every pair falls along its own gradient: to first order by ρ times that gradient's norm."""
        if self.options.anchor_estimator == "per-pair":
            cached, ready = self._cached(group)
            norms = [each.norms(self.parameters) for each in cached]
            measured = [{ANCHOR_GAP: self.options.anchor_radius * norm} for norm in norms]
        else:
            ready, found = group, [self._each_alone(batch) for batch in group]
            measured, norms = [columns for columns, _ in found], [norm for _, norm in found]
        self.trainer.store_metrics({"anchor/gradient_norm": torch.cat(norms)})
        return ready, measured, None

    def _each_alone(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """A mini-batch's columns, and [B] the norms of its pairs' gradients."""
        columns, norms = [], []
        for pair in pair_gradients(self.trainer, batch, self.parameters):
            direction = gradient_direction(self.trainer.accelerator, pair.gradient)
            measured = self.measure([pair.batch], direction)
            if pair.own:
                columns += measured
                norms.append(direction.norm)
        return {name: torch.cat([each[name] for each in columns]) for name in columns[0]}, torch.stack(norms)


class OneByOne(Window):
    """A window's mini-batches, each made when it is asked for, once and in order."""

    def __init__(self, batches: Iterator[Batch], n: int) -> None:
        self._batches, self._n = batches, n

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        return self._batches


def in_groups(batches: Iterable[Batch], k: int) -> Iterator[list[Batch]]:
    """Groups of k consecutive mini-batches. A rest joins the last group; fewer than k are one group."""
    group: list[Batch] = []
    rest: list[Batch] = []
    for batch in batches:
        rest.append(batch)
        if len(rest) == k:
            if group:
                yield group
            group, rest = rest, []
    if group or rest:
        yield group + rest


def check_estimator(objective: Objective, options: Any, has_aux_loss: bool = False) -> None:
    """Per-pair gradients make the update from the length-normalized gap of each pair.

    Args:
        options: the config.

    Raises:
        ValueError: they are asked for, and the loss reads more, or SAM makes the update.
    """
    if options.anchor_estimator != "per-pair" or not measures_anchor(objective):
        return
    reward = objective.reward
    plain = isinstance(reward, LengthNormalizedReward) and reward.alpha == 0
    reads_more = getattr(options, "cpo_alpha", None) or has_aux_loss
    if not plain or reads_more or not all(link.takes_margin for link in objective.links):
        raise ValueError(
            "anchor_estimator='per-pair' makes the update from the gradients of the length-normalized gaps: it takes "
            "a loss of the reward gap (simpo, sigmoid, hinge) without cpo_alpha, alpha and auxiliary loss; use "
            "anchor_estimator='difference'"
        )
    if options.sam_radius:
        raise ValueError(
            "anchor_estimator='per-pair' makes the update at the policy, and sam_radius makes it elsewhere: "
            "set only one of them"
        )
