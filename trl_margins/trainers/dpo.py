"""`DPOTrainer` with a weight and a margin per pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from ..forward.checkpointing import checkpointing_kwargs, without_checkpointing
from ..forward.precision import eval_mode
from ..forward.shared_prompt import shared_token_logps, why_not_shared
from ..forward.shared_rows import unpacked
from ..forward.standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps, pair_logps
from ..objective import Objective, ObjectiveOutput
from ..pairs import CACHED, CARRIED, SHARED, PairLogps
from ..rewards import LogRatioReward
from ..rows.raw import column_names
from ..rows.tokenized import DPO_COLUMNS, tokenized
from ..rows.tokens import PairTokenizer, dpo_columns
from .arguments import ReadOnce
from .collator import StandardRows
from .configs import MarginDPOConfig
from .fingerprints import of_reference
from .mixin import MarginMixin
from .model_checks import check_before_training
from .preparation import PreparedSets
from .reference_checks import check_reference

logger = logging.getLogger(__name__)

_NO_REFERENCE = object()
_REFERENCE = "reference_logps"  # in a batch that several forward passes read
_OURS = (CARRIED, SHARED, CACHED, _REFERENCE)  # in a batch, and not known to TRL
_OF_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # what TRL precomputes
_NOT_FOR_THE_MODEL = ("completion_mask", *_OF_REFERENCE, *_OURS)


class _Reference(ReadOnce):
    """DPOTrainer loads a reference model unless it is given one. A reward without reference gives it something that is
    none, and never lets it be set.
    """

    def __set__(self, trainer: Any, model: Any) -> None:
        super().__set__(trainer, None if model is _NO_REFERENCE else model)


class MarginDPOTrainer(MarginMixin, DPOTrainer):
    """TRL's `DPOTrainer`; with `weight` in its config (or `weight_term`, `margin_term`), each pair has its own.

    Without a term it is `DPOTrainer`: same defaults, same losses, same logged names. With
    `reward="length-normalized"` it trains SimPO's reward, and no reference model is loaded.
    """

    ref_model = _Reference()

    precomputed_by: str | None = None  # a digest of the reference model's weights, where it is gone after it was used
    _config_class = MarginDPOConfig
    _fused = True
    _takes_images = True
    _plain_head_will_do = False  # entropy and token accuracy, which TRL logs here, come with the fused head

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.ref_model is not None:
            self.ref_model.eval()  # one that the trainer is given may be as it was trained
        check_before_training(self)
        check_reference(self)

    def _check_reference(self, config: Any) -> None:
        if read := [name for name in _OF_REFERENCE if name in self.objective.columns]:
            raise ValueError(
                f"the objective reads {read}, by which DPOTrainer calls log-probabilities that it computes: give the "
                "column another name"
            )
        self._reference_free = not self.objective.needs_reference
        check_unread_options(config, self.objective)

    def _trl_arguments(self, given: Mapping[str, Any], sets: PreparedSets) -> dict[str, Any]:
        arguments = super()._trl_arguments(given, sets)
        self.loads_reference = given.get("ref_model") is None
        if not self._reference_free:
            _check_source(**arguments)
            return arguments
        if given.get("ref_model") is not None:
            raise ValueError(f"reward={self.objective.reward.name!r} uses no reference model: leave ref_model out")
        return {**arguments, "ref_model": _NO_REFERENCE}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's tokens, by its rule, many rows at a time."""
        opened, is_first = self._opened_set(dataset, dataset_name)
        tokenizer = PairTokenizer(opened.reader, processing_class, dpo_columns)
        if there := [name for name in _OF_REFERENCE if name in column_names(opened.dataset)]:
            logger.warning(
                "%s: the columns %s are left out: the reference model's log-probabilities are computed",
                *(opened.reader.split, " and ".join(there)),
            )
            opened = replace(opened, dataset=opened.dataset.remove_columns(there))
        found = tokenized(opened, tokenizer, args.dataset_num_proc)
        cut = args.max_length if args.truncation_mode == "keep_start" else None
        lengths = {"max_length": cut, "completion_cut": cut}
        return self._finish_tokens(found, opened, is_first, DPO_COLUMNS, processing_class, **lengths)

    def _with_tokens(self, dataset: Any, split: str) -> Any:
        if self._is_vision_dataset:
            return dataset
        if DPO_COLUMNS[1] not in column_names(dataset):
            dataset = self._prepare_dataset(dataset, self.processing_class, self.args, split)
        if not self.precompute_ref_logps or _OF_REFERENCE[0] in column_names(dataset):
            return dataset
        if self.ref_model is None and not is_peft_model(self.model) and self.state.global_step:
            raise ValueError(
                f"precompute_ref_log_probs=True keeps no reference model, and the {split} data set was not there "
                "before training: give it to the trainer as an eval_dataset, or pass ref_model"
            )
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(dataset, split, batch_size)

    def standard_rows(self) -> Callable[[Mapping[str, Any]], StandardRows | None]:
        return _rows_if_known

    def _compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool
    ) -> Tensor | tuple[Tensor, Any]:
        """What DPOTrainer calls for each batch: its own method where it will do, `pair_loss` otherwise."""
        mode = self._mode
        if mode == "train" and self.runs_trl:
            plain = {key: value for key, value in inputs.items() if key not in _OURS}
            found = super()._compute_loss(model, plain, return_outputs)
            self._finite.see_loss(found[0] if return_outputs else found)
            return found
        loss, metrics = self.pair_loss(model, inputs, mode)
        self.store_metrics(metrics, mode)
        if not return_outputs:
            return loss
        # `compute_metrics` gets whole logits, as from DPOTrainer: a second forward pass builds them
        with torch.no_grad():
            return loss, model(**_for_the_model(inputs), use_cache=False)

    @property
    def runs_trl(self) -> bool:
        return super().runs_trl and self._fused  # TRL's method goes through its fused head

    def pair_logps(self, model: nn.Module, batch: Mapping[str, Any], fused: bool = True) -> PairLogps:
        if CACHED in batch:
            return batch[CACHED]
        tokens = self.token_logps(model, batch, self._sharing(self, batch), fused)
        of_token = self.objective.reward.of_token
        pairs = pair_logps(tokens, self.ld_alpha, self.use_weighting, of_token)
        if self._reference_free:
            return pairs
        ref_chosen, ref_rejected = self._reference_logps(batch)
        return replace(pairs, ref_chosen=ref_chosen, ref_rejected=ref_rejected)

    def standard_logps(self, model: nn.Module, batch: Mapping[str, Any], fused: bool, **inputs: Any) -> TokenLogps:
        inputs, labels = {**_for_the_model(batch), **inputs}, _standard_rows(batch)[2]
        if fused:
            return fused_token_logps(model, inputs, labels)
        return logits_token_logps(model, inputs, labels, statistics=True)

    def is_plain_text(self, batch: Mapping[str, Any]) -> bool:
        return not _for_the_model(batch).keys() - {"input_ids", "attention_mask"}

    def _reference_logps(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if _REFERENCE in batch:
            return batch[_REFERENCE]
        if self.precompute_ref_logps:
            return batch[_OF_REFERENCE[0]], batch[_OF_REFERENCE[1]]
        # not `or`: torch.compile's wrapper has a length that it cannot give
        return self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, batch)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """TRL's, by the forward pass of the policy: equal models have a log-ratio of exactly 0."""
        shared = self._sharing(self, inputs) and not why_not_shared(model)
        adapters: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            # a new adapter is switched off; one that goes on training has its first state under the name "ref"
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapters = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = without_checkpointing(self.model, checkpointing_kwargs(self.args))
        with torch.no_grad(), checkpointing, adapters, self.accelerator.autocast():
            if shared:
                tokens = shared_token_logps(model, unpacked(inputs[SHARED]), fused=self._fused)
            elif self._fused:
                tokens = fused_token_logps(model, _for_the_model(inputs), _standard_rows(inputs)[2])
            else:
                tokens = logits_token_logps(model, _for_the_model(inputs), _standard_rows(inputs)[2])
            pairs = pair_logps(tokens, tail_weight=self.ld_alpha)
        return pairs.chosen, pairs.rejected

    def before_measuring(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        batch = super().before_measuring(batch)
        if self._reference_free:
            return batch
        # once for all forward passes over the mini-batch
        return {**batch, _REFERENCE: self._reference_logps(batch)}

    def same_completions(self, batch: Mapping[str, Any]) -> Tensor:
        chosen, rejected = _standard_rows(batch)[2].chunk(2)
        return (chosen == rejected).all(1)

    def n_pairs(self, batch: Mapping[str, Any]) -> int:
        return len(batch["input_ids"]) // 2

    @property
    def graphs_can_wait(self) -> bool:
        """TRL offloads the activations of a training step alone, and only until their first use."""
        return not self.args.activation_offloading and super().graphs_can_wait

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self._wrap_collator()
        reference = self.model if self.ref_model is None else self.ref_model
        if self.precomputed_by is None:  # before training, which a model without a reference model does not outlast
            self.precomputed_by = of_reference(self.model, None if is_peft_model(reference) else reference)
        with eval_mode(reference):  # TRL prepares it only for training
            return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def _extra_loss(self, pairs: PairLogps) -> Tensor | float:
        if not self.aux_loss_enabled or pairs.aux_loss is None:
            if self.aux_loss_enabled and self.args.router_aux_loss_coef:
                self._warn_once("no effect of router_aux_loss_coef: the model computes no auxiliary loss")
            return 0.0
        return self.router_aux_loss_coef * pairs.aux_loss

    def _batch_metrics(
        self, pairs: PairLogps, output: ObjectiveOutput, batch: Mapping[str, Any], train_eval: str
    ) -> dict[str, Tensor]:
        metrics = super()._batch_metrics(pairs, output, batch, train_eval)
        metrics |= {"logps/chosen": pairs.chosen, "logps/rejected": pairs.rejected}
        if self.aux_loss_enabled and pairs.aux_loss is not None:
            metrics["aux_loss"] = pairs.aux_loss
        if train_eval == "train":
            metrics["num_tokens"] = batch["attention_mask"].sum()
        return metrics

    def _drained_metrics(self) -> dict[str, float]:
        metrics = super()._drained_metrics()
        if metrics:
            self._total_train_tokens += int(metrics.get("num_tokens", 0)) // self._tp_size
            metrics["num_tokens" if self._mode == "train" else "eval_num_tokens"] = self._total_train_tokens
        return metrics


def _for_the_model(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}


def _check_source(model: Any, args: Any, ref_model: Any = None, peft_config: Any = None, **others: Any) -> None:
    """
    Raises:
        ValueError: DPOTrainer would load the reference model from where the model is from, and that is nowhere.
    """
    if ref_model is not None or peft_config is not None or args.precompute_ref_log_probs:
        return
    writes = hasattr(model, "generation_config")  # else it is refused for that
    if writes and not is_peft_model(model) and not getattr(model.config, "name_or_path", ""):
        raise ValueError(
            "the model was made in code, so there is no folder from which its reference model could be loaded: pass "
            "ref_model=copy.deepcopy(model), or set precompute_ref_log_probs=True"
        )


def _rows_if_known(batch: Mapping[str, Any]) -> StandardRows | None:
    """Someone's own collator may give another kind of batch."""
    return _standard_rows(batch) if "completion_mask" in batch else None


def check_unread_options(config: DPOConfig, objective: Objective) -> None:
    """
    Raises:
        ValueError: options of the log-ratio and of the reference model, where the objective does not read them.
    """
    reward = objective.reward.name
    of_log_ratio = {"f_divergence_type": "reverse_kl", "ld_alpha": None}
    of_reference = {"precompute_ref_log_probs": False, "sync_ref_model": False}
    unread: dict[str, Any] = {} if reward == LogRatioReward.name else of_log_ratio
    for name, off in (unread | ({} if objective.needs_reference else of_reference)).items():
        if (value := getattr(config, name)) != off:
            why = "does not read it" if objective.needs_reference else "has no reference model and whole completions"
            raise ValueError(
                f"{name}={value!r} does not go with reward={reward!r}, which {why}: set it to {off!r}, or use "
                "reward='log-ratio'"
            )


def _standard_rows(batch: Mapping[str, Any]) -> StandardRows:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
    return batch["input_ids"], batch["attention_mask"], labels
