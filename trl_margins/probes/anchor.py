"""GAPO's look at the model before each optimizer step: where a nearby, worse policy is, and how far each pair's gap
falls there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor, nn

from ..distributed import fsdp_dtype, is_sharded
from ..forward.precision import ieee_float32, narrow_dtype, rounds_products, widened, without_dropout
from ..pairs import KEPT, with_columns
from ..rewards import LengthNormalizedReward
from ..terms.anchor import ANCHOR_GAP, ANCHOR_SCORE_GAP
from .diagnostics import AnchorDiagnostics
from .direction import Direction, momentum_direction, over_ranks, own_gradients
from .pair_gradients import KeptGradients
from .perturbation import cannot_displace, displaced, fused_head_moves, in_float32, perturbed
from .probe import Batch, Probe, ProbedTrainer, ProbeOptions
from .scope import parameters_in_scope

logger = logging.getLogger(__name__)


class GeometricAnchor(Probe):
    """Measures the anchor gaps of an accumulation window's mini-batches under one perturbation."""

    columns = (ANCHOR_SCORE_GAP, ANCHOR_GAP)

    def __init__(self, trainer: ProbedTrainer, options: ProbeOptions) -> None:
        super().__init__(trainer, options)
        self._warned = False
        if options.anchor_estimator == "per-pair":
            check_gap_only(trainer)
            if options.sam_radius:
                raise ValueError(
                    "anchor_estimator='per-pair' makes the update at the policy, sam_radius elsewhere: one of them"
                )
        self.narrow_dtype = narrow_dtype(trainer.model, trainer.accelerator.mixed_precision)
        self._check_sharded(parameters_in_scope(trainer.model, options.anchor_scope))
        logger.info(
            "anchor: radius %g over %d parameters (scope %s), direction from %s, gaps by %s",
            options.anchor_radius,
            self.n_parameters,
            options.anchor_scope or "all that trains",
            f"the gradient over {options.anchor_batch_multiplier} mini-batches"
            if options.anchor_direction == "gradient"
            else "the optimizer's momentum",
            options.anchor_estimator,
        )

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same mini-batches, each with `anchor_score_gap` or `anchor_gap` among its columns."""
        batches = self.prepared(batches)
        self._check_sharded(self.parameters)
        if self.options.anchor_estimator == "per-pair":
            batches, direction, measured = self._per_pair(batches)
        else:
            direction, batches = self._direction(batches)
            measured = self.measure(batches, direction)
        batches = [with_columns(batch, columns) for batch, columns in zip(batches, measured, strict=True)]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, AnchorDiagnostics) and callback.is_due(self.trainer.state.global_step):
                callback.record(self.trainer, batches, direction, self.parameters, self.options.anchor_radius)
        return batches

    # The direction

    def _direction(self, batches: list[Batch]) -> tuple[Direction, list[Batch]]:
        if self.options.anchor_direction == "momentum":
            direction = momentum_direction(self.trainer.optimizer, self.parameters)
            if direction is not None:
                return direction, batches
        keep = self._may_keep(batches)
        used = batches[: self.options.anchor_batch_multiplier]
        kept: list[Batch] = []
        n_pairs = torch.zeros((), device=self.trainer.accelerator.device)
        with own_gradients(self.trainer.accelerator, self.trainer.model, self.parameters) as gradients:
            for batch in used:
                pairs = self.trainer.forward_pairs(batch, self.trainer.model_wrapped if keep else None)
                gap = self.trainer.score_gap(pairs)
                gradients.add(gap.sum(), retain_graph=keep)
                n_pairs += gap.numel()
                kept.append({**batch, KEPT: pairs} if keep else batch)
            summed = gradients.take()
        return self._directed(summed, n_pairs), kept + batches[len(used) :]

    def _directed(self, summed: dict[str, Tensor], n_pairs: Tensor) -> Direction:
        n_pairs = self.trainer.accelerator.reduce(n_pairs, "sum")
        direction = Direction.along(summed)
        if self.trainer.accelerator.scaler is not None:  # in fp16 a gradient that overflows is nothing out of the way
            direction = direction.finite()
        self.trainer.store_metrics(
            {
                "anchor/gradient_norm": direction.norm / n_pairs,
                "anchor/no_direction": (direction.per_unit == 0).float(),
            }
        )
        return direction

    def _may_keep(self, batches: list[Batch]) -> bool:
        """Whether the forward passes behind the direction also serve the update."""
        n, wanted = len(batches), self.options.anchor_keep_graphs
        if n > min(wanted, self.options.anchor_batch_multiplier) or self.options.anchor_direction == "momentum":
            return False
        if self.options.sam_radius:  # SAM's update is made elsewhere
            return False
        return self.trainer.graphs_can_wait(n)

    # The gaps

    def measure(self, batches: Sequence[Batch], direction: Direction) -> list[dict[str, Tensor]]:
        """What each mini-batch gets as columns."""
        with torch.no_grad():
            return self._estimator(batches, direction)

    def _check_sharded(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Whether the estimator can measure sharded parameters. Asked at once, of what accelerate is going to shard
        too, and before a window's first pass, when all of them are.

        Raises:
            ValueError: it cannot.
        """
        if not (self.trainer.accelerator.is_fsdp2 or any(map(is_sharded, parameters.values()))):
            return
        name = self.options.anchor_estimator
        dtype = self.narrow_dtype or fsdp_dtype(self.trainer.model) or torch.float32
        if name != "per-pair" and (name != "difference" or dtype.itemsize < 4):
            raise ValueError(
                "on sharded parameters (FSDP2) the anchor is measured by anchor_estimator='difference' in float32 "
                f"alone; this run has {name!r} in {dtype}. DDP takes all of them"
            )

    @cached_property
    def _estimator(self) -> Callable[[Sequence[Batch], Direction], list[dict[str, Tensor]]]:
        name = self.options.anchor_estimator
        if name == "difference" and self.narrow_dtype is not None:
            reason = cannot_displace(self.trainer.model, self.parameters)
            if reason is not None:
                logger.warning("anchor gaps are measured in float32, which is slower: %s", reason)
                name = "float32"
        return {"difference": self._difference, "float32": self._float32}[name]

    def _difference(self, batches: Sequence[Batch], direction: Direction) -> list[dict[str, Tensor]]:
        step = -self.options.anchor_radius * direction.per_unit
        if self.narrow_dtype is None:
            anchor, fused = perturbed(self.trainer.model, direction.vectors, step), True
        else:
            anchor, fused = self._displaced(direction.vectors, step)
        # the update's own forward pass gives the other end of the difference, where it is computed like this one
        alike = self.narrow_dtype is not None or not rounds_products()
        if alike and self.trainer.args.disable_dropout and not self.trainer.args.neftune_noise_alpha:
            with ieee_float32():
                return [{ANCHOR_SCORE_GAP: gap} for gap in self._there(batches, anchor, fused)]
        with without_dropout(self.trainer.model):
            return self._fall(batches, anchor, fused)

    def _displaced(self, vectors: Mapping[str, Tensor], step: Tensor) -> tuple[AbstractContextManager, bool]:
        """The anchor in 16 bits, and whether TRL's fused head may be used there."""
        fused = fused_head_moves(self.trainer.model, vectors)
        anchor = displaced(self.trainer.model, vectors, step, self.narrow_dtype, fused and self.trainer.fuses_head)
        return anchor, fused

    def _float32(self, batches: Sequence[Batch], direction: Direction) -> list[dict[str, Tensor]]:
        step = -self.options.anchor_radius * direction.per_unit
        with in_float32(self.trainer.model), without_dropout(self.trainer.model):
            return self._fall(batches, perturbed(self.trainer.model, direction.vectors, step))

    def _fall(
        self, batches: Sequence[Batch], anchor: AbstractContextManager, fused: bool = True
    ) -> list[dict[str, Tensor]]:
        """Both ends of the difference, passed forward alike."""
        with ieee_float32():
            here = self._gaps(batches)
            return [
                {ANCHOR_GAP: h - there} for h, there in zip(here, self._there(batches, anchor, fused), strict=True)
            ]

    def _there(self, batches: Sequence[Batch], anchor: AbstractContextManager, fused: bool) -> list[Tensor]:
        with anchor as products:
            gaps = self._gaps(batches, fused)
        unused = [name for name, product in (products or {}).items() if not product.called]
        if unused and not self._warned:
            self._warned = True
            logger.warning(
                "%d of %d linear layers were not called at the anchor (%s is one): the anchor gaps leave their step "
                "out. If a kernel reads these weights itself, set anchor_estimator='float32'",
                len(unused),
                len(products),
                unused[0],
            )
        return gaps

    def _gaps(self, batches: Sequence[Batch], fused: bool = True) -> list[Tensor]:
        return [widened(self.trainer.score_gap(self.trainer.forward_pairs(batch, fused=fused))) for batch in batches]

    # Everything from the pairs' own gradients

    def _per_pair(self, batches: list[Batch]) -> tuple[list[Batch], Direction, list[dict[str, Tensor]]]:
        kept = [KeptGradients.of(self.trainer, batch, self.parameters) for batch in batches]
        used = kept[: self.options.anchor_batch_multiplier]
        summed = {name: sum(each.summed()[name] for each in used) for name in self.parameters}
        n_pairs = torch.tensor(float(sum(each.gap.numel() for each in used)), device=self.trainer.accelerator.device)
        direction = self._directed(over_ranks(self.trainer.accelerator, summed, "sum"), n_pairs)
        scale = self.options.anchor_radius * direction.per_unit
        measured = [{ANCHOR_GAP: scale * each.along(direction.vectors)} for each in kept]
        ready = [
            {**batch, KEPT: each.for_the_update(self.parameters, self._mean_over_ranks)}
            for batch, each in zip(batches, kept, strict=True)
        ]
        return ready, direction, measured

    def _mean_over_ranks(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        # DDP reduces what its own forward pass has announced; these gradients come from none
        return over_ranks(self.trainer.accelerator, gradients, "mean")


def check_gap_only(trainer: ProbedTrainer) -> None:
    """Checks that the loss reads only the length-normalized gap of each pair.

    Raises:
        ValueError: it reads more.
    """
    reward, links = trainer.objective.reward, trainer.objective.links
    plain = isinstance(reward, LengthNormalizedReward) and reward.alpha == 0
    plain = plain and all(link.takes_margin for link in links)
    if not plain or getattr(trainer.args, "cpo_alpha", 0) or trainer.has_aux_loss:
        raise ValueError(
            "anchor_estimator='per-pair' makes the update from the gradients of the length-normalized gaps: it takes "
            "a loss of the reward gap (simpo, sigmoid, hinge) without cpo_alpha, alpha and auxiliary loss; take "
            "anchor_estimator='difference'"
        )
