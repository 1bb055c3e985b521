"""`DPOTrainer` with a weight and a margin per pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from ..forward.shareable import why_not_shared
from ..forward.shared_prompt import shared_token_logps
from ..forward.shared_rows import unpacked
from ..forward.standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps, pair_logps
from ..links import DPO_LOSSES, REFERENCE_FREE_LOSSES
from ..objective import LengthNormalizedReward, LogRatioReward, Objective, ObjectiveOutput
from ..pairs import CARRIED, SHARED, PairLogps
from ..rows.tokenized import DPO_COLUMNS, finish_tokenized, tokenized
from ..rows.tokens import PairTokenizer, dpo_columns
from ..terms import Term
from .collator import StandardRows
from .configs import MarginDPOConfig
from .mixin import MarginMixin
from .model_checks import check_before_training
from .preparation import TRAIN

_NO_REFERENCE = object()
_REFERENCE = "reference_logps"  # of a batch that several passes look at
_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", SHARED, _REFERENCE)


class MarginDPOTrainer(MarginMixin, DPOTrainer):
    """TRL's `DPOTrainer`; with `weight` in its config (or `weight_term`, `margin_term`), each pair has its own.

    Without a term it is `DPOTrainer`: same defaults, same losses, same logged names. With
    `reward="length-normalized"` it trains SimPO's reward, and no reference model is loaded.
    """

    _config_class = MarginDPOConfig
    _fused = True
    _takes_images = True
    _plain_head_will_do = False  # entropy and token accuracy, which TRL logs here, come with the fused head

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_before_training(self)

    def _build_objective(self, config: Any, weight: Term | None, margin: Term | None) -> Objective:
        self._reference_free = getattr(config, "reward", "log-ratio") == "length-normalized"
        if self._reference_free:
            _refuse_reference_options(config)
        losses: dict[str, float] = {}
        for name, share in zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True):
            losses[name] = losses.get(name, 0.0) + share
        return Objective(
            reward=LengthNormalizedReward()
            if self._reference_free
            else LogRatioReward(config.f_divergence_type, config.f_alpha_divergence_coef),
            losses=losses,
            table=REFERENCE_FREE_LOSSES if self._reference_free else DPO_LOSSES,
            beta=config.beta,
            gamma=getattr(config, "simpo_gamma", None) or 0.0,
            weight=weight,
            margin=margin,
            label_smoothing=config.label_smoothing,
            discopop_tau=config.discopop_tau,
        )

    # DPOTrainer loads a reference model unless it is given one. A reward without reference gives it something that is
    # none, and never lets it be set.

    @property
    def ref_model(self) -> nn.Module | None:
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: nn.Module | None) -> None:
        self._ref_model = None if model is _NO_REFERENCE else model

    def _adapt_call(self, call: dict[str, Any]) -> None:
        super()._adapt_call(call)
        if self._reference_free:
            if call.get("ref_model") is not None:
                raise ValueError("reward='length-normalized' uses no reference model: leave ref_model out")
            call["ref_model"] = _NO_REFERENCE

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokens, by its rule, many rows at a time."""
        opened, is_first = self._opened_set(dataset, dataset_name)
        split = opened.reader.split
        tokenizer = PairTokenizer(opened.reader, processing_class, dpo_columns)
        found = tokenized(opened, tokenizer, args.dataset_num_proc)
        keeps_start = args.truncation_mode == "keep_start"
        cut = args.max_length if keeps_start else None
        found, dropped = finish_tokenized(
            found,
            opened,
            DPO_COLUMNS,
            max_length=cut,
            completion_cut=cut,
            processing_class=processing_class if is_first and split == TRAIN else None,
        )
        if is_first and dropped is not None:
            self.set_facts[split] = replace(self.set_facts[split], dropped=dropped)
        return found

    def standard_rows(self) -> Callable[[Mapping[str, Any]], StandardRows | None]:
        return _rows_if_known

    def token_logps(self, model: nn.Module, batch: Mapping[str, Any], shared: bool) -> TokenLogps:
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        if shared:
            return self.shared_logps(model, batch, **router)
        inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
        _, _, labels = _standard_rows(batch)
        if self._head_is_fused:
            return fused_token_logps(model, {**inputs, **router}, labels)
        return logits_token_logps(model, {**inputs, **router}, labels, statistics=True)

    def is_plain_text(self, batch: Mapping[str, Any]) -> bool:
        return not batch.keys() - {"input_ids", "attention_mask", CARRIED, *_NOT_FOR_THE_MODEL}

    def concatenated_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> PairLogps:
        tokens = self.token_logps(model, batch, self._sharing(self, batch))
        pairs = pair_logps(tokens, tail_weight=self.ld_alpha, policy_weight=self.use_weighting)
        if self._reference_free:
            return pairs
        ref_chosen, ref_rejected = self._reference_logps(batch)
        return replace(pairs, ref_chosen=ref_chosen, ref_rejected=ref_rejected)

    def _reference_logps(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if _REFERENCE in batch:
            return batch[_REFERENCE]
        if self.precompute_ref_logps:
            return batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        # not `or`: torch.compile's wrapper has a length that it cannot give
        return self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, batch)

    def before_measuring(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        batch = super().before_measuring(batch)
        if self._reference_free:
            return batch
        # once for all passes over the mini-batch
        return {**batch, _REFERENCE: self._reference_logps(batch)}

    def same_completions(self, batch: Mapping[str, Any]) -> Tensor:
        chosen, rejected = _standard_rows(batch)[2].chunk(2)
        return (chosen == rejected).all(1)

    def n_pairs(self, batch: Mapping[str, Any]) -> int:
        return len(batch["input_ids"]) // 2

    def graphs_can_wait(self, n_mini_batches: int) -> bool:
        """TRL offloads the activations of a training step alone, and only until their first use."""
        return not self.args.activation_offloading and super().graphs_can_wait(n_mini_batches)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's, with the prompt computed once where the model can, and without the fused head where it is wrong."""
        plain = {k: v for k, v in inputs.items() if k not in (CARRIED, SHARED)}
        shares = self._sharing(self, inputs) and not why_not_shared(model)
        if self._fused and not shares:
            return super().compute_ref_log_probs(model, plain)
        found: list[PairLogps] = []

        def instead(labels: Tensor, use_cache: bool, fused_lm_head: bool, **kwargs: Any) -> Any:
            """What TRL calls as the model, in its own contexts (adapters, autocast); its sums are then not used."""
            if shares:
                tokens = shared_token_logps(model, unpacked(inputs[SHARED]), fused=self._fused)
            else:
                tokens = logits_token_logps(model, kwargs, labels)
            # summed as the policy's are, in the same order: equal models have a log-ratio of exactly 0
            found.append(pair_logps(tokens, tail_weight=self.ld_alpha))
            return SimpleNamespace(log_probs=tokens.logps.new_zeros(labels[:, 1:].shape))

        super().compute_ref_log_probs(instead, plain)
        return found[0].chosen, found[0].rejected

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self._wrap_collator()
        return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        # around the mixin's: TRL's own names the option to change where `max_length` cut an image in two
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool
    ) -> Tensor | tuple[Tensor, Any]:
        loss = super().compute_loss(model, inputs)
        if not return_outputs:
            return loss
        # `compute_metrics` gets whole logits, as from DPOTrainer: a second pass builds them
        with torch.no_grad():
            plain = {k: v for k, v in inputs.items() if k not in (*_NOT_FOR_THE_MODEL, CARRIED)}
            return loss, model(**plain, use_cache=False)

    def _extra_loss(self, pairs: PairLogps) -> Tensor | float:
        return self.router_aux_loss_coef * pairs.aux_loss if self.aux_loss_enabled else 0.0

    def _batch_metrics(self, pairs: PairLogps, output: ObjectiveOutput, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        metrics = super()._batch_metrics(pairs, output, batch)
        metrics |= {"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected}
        if self.aux_loss_enabled:
            metrics["aux_loss"] = pairs.aux_loss
        if self._mode == "train":
            metrics["num_tokens"] = batch["attention_mask"].sum()
        return metrics

    def _drained_metrics(self) -> dict[str, float]:
        metrics = super()._drained_metrics()
        if metrics:
            self._total_train_tokens += int(metrics.get("num_tokens", 0)) // self._tp_size
            metrics["num_tokens" if self._mode == "train" else "eval_num_tokens"] = self._total_train_tokens
        return metrics


def _rows_if_known(batch: Mapping[str, Any]) -> StandardRows | None:
    """Someone's own collator may give another kind of batch."""
    return _standard_rows(batch) if "completion_mask" in batch else None


def _refuse_reference_options(config: MarginDPOConfig) -> None:
    """Options that mean nothing without a reference model."""
    for name, off in {
        "f_divergence_type": "reverse_kl",
        "precompute_ref_log_probs": False,
        "sync_ref_model": False,
        "ld_alpha": None,
    }.items():
        if (value := getattr(config, name)) != off:
            raise ValueError(
                f"{name}={value!r} does not go with reward='length-normalized', which has no reference model and "
                f"whole answers: set it to {off!r}, or use reward='log-ratio'"
            )


def _standard_rows(batch: Mapping[str, Any]) -> StandardRows:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
    return batch["input_ids"], batch["attention_mask"], labels
