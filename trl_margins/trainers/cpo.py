"""`CPOTrainer` with a weight and a margin per pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor, nn
from trl.experimental.cpo import CPOTrainer
from trl.trainer.utils import add_fused_lm_head

from ..forward.head import why_not_fused
from ..forward.standard import IGNORE, TokenLogps, fused_token_logps, logits_token_logps, pair_logps
from ..objective import ObjectiveOutput, refuse_reference
from ..pairs import CACHED, PairLogps
from ..rewards import LengthNormalizedReward, length_normalized
from ..rows.cpo_tokens import CPOTokenizer
from ..rows.raw import column_names
from ..rows.tokenized import CPO_COLUMNS, tokenized
from ..rows.tokens import PairTokenizer, RowTokens, cpo_columns
from .collator import StandardRows
from .configs import MarginCPOConfig
from .mixin import MarginMixin
from .model_checks import check_before_training
from .preparation import PreparedSets

logger = logging.getLogger(__name__)

_TOKENS = ("input_ids", "attention_mask", "labels", "decoder_input_ids")
_PAIR_COLUMNS = {"prompt", "chosen", "rejected"}
_PAIR_COLUMNS |= {f"{side}_{kind}" for side in _PAIR_COLUMNS for kind in _TOKENS}


# methods of CPOTrainer's that would be overridden in vain, and what to do instead
_OF_TOKENS = dict.fromkeys(
    ("tokenize_row", "build_tokenized_answer"),
    "rows become tokens elsewhere: change the rows with dataset.map, or the chat template",
)
_OF_THE_LOSS = dict.fromkeys(
    ("cpo_loss", "concatenated_forward", "concatenated_inputs", "get_batch_logps"),
    "the loss is the objective's: give loss_type, weight_term or margin_term, or override get_batch_loss_metrics. "
    "With no term and share_prompt='never', CPOTrainer's methods are called",
)


class MarginCPOTrainer(MarginMixin, CPOTrainer):
    """TRL's `CPOTrainer`; with `weight` in its config (or `weight_term`, `margin_term`), each pair has its own.

    Without a term it is `CPOTrainer`: same defaults, same losses, same logged names. What differs: tokens are those of
    the chat template (`tokenization="cpo"` gives CPOTrainer's), the logits are not built (`logits/*` are means over
    completion tokens), and pairs whose prompt fills `max_length` are dropped, as DPOTrainer drops them. With
    `share_prompt="never"` the loss and the logits are CPOTrainer's.
    """

    _config_class = MarginCPOConfig
    is_encoder_decoder: bool
    max_length: int | None  # type: ignore[assignment]  # TRL's is never None
    pad_token_id: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_overrides()
        if self.objective.weights and self.cpo_alpha:
            logger.warning(
                "cpo_alpha=%g: CPO's SFT term counts all pairs alike, whatever their weight; cpo_alpha=0 drops it",
                self.cpo_alpha,
            )
        if self.max_completion_length is not None and not self.is_encoder_decoder:
            logger.warning(
                "no effect of max_completion_length: it is for encoder-decoder models, and max_length cuts prompt and "
                "completion of this one together"
            )
        if self.args.max_length is None:
            self._cut_nothing()
        self._tokenize()
        self._fused = self._can_fuse()
        if self._fused:
            base = self.model.get_base_model() if is_peft_model(self.model) else self.model
            add_fused_lm_head(base, outputs=("log_probs", "mean_logits"))
            if self.args.use_liger_kernel:
                # Liger's own fused loss would replace the forward that was just given
                off = {"fused_linear_cross_entropy": False}
                self.args.liger_kernel_config = {**(self.args.liger_kernel_config or {}), **off}
        check_before_training(self)

    def _check_overrides(self) -> None:
        """
        Raises:
            TypeError: a subclass has a method of CPOTrainer's that nobody calls here.
        """
        unused = _OF_TOKENS if self.runs_trl else _OF_TOKENS | _OF_THE_LOSS
        for name, instead in unused.items():
            owner = next(each for each in type(self).__mro__ if name in vars(each))
            if not owner.__module__.startswith(("trl.", "trl_margins.")):
                raise TypeError(f"{owner.__name__}.{name} would not be called: {instead}")

    def _cut_nothing(self) -> None:
        """Where max_length is None, which CPOTrainer takes for 512."""
        if self._has_cpo_tokens:
            self.args.max_length = self._settings_read["max_length"] = self.max_length  # which evaluate reads
            return
        if self.generate_during_eval:
            raise ValueError("generate_during_eval=True needs max_length, at which generation ends")
        vars(self)["max_length"] = None  # it is read once
        logger.warning("max_length=None: no pair is cut; the 512 tokens of which CPOTrainer warns are not used here")

    @property
    def _has_cpo_tokens(self) -> bool:
        return self.is_encoder_decoder or getattr(self.args, "tokenization", "") == "cpo"

    def _tokenize(self) -> None:
        """Tokenizes the sets of which CPOTrainer was shown nothing."""
        for name, given in self._untokenized.items():
            if isinstance(given, DatasetDict):
                sets = {split: self._tokenized(dataset, split) for split, dataset in given.items()}
                setattr(self, name, DatasetDict(sets))
            else:
                setattr(self, name, self._tokenized(given, {"train_dataset": "train"}.get(name, "eval")))

    def _tokenized(self, dataset: Dataset | IterableDataset, split: str) -> Dataset | IterableDataset:
        opened, is_first = self._opened_set(dataset, split)
        tokenizer: CPOTokenizer | PairTokenizer
        if self._has_cpo_tokens:
            tokenizer = CPOTokenizer(
                opened.reader,
                self.processing_class,
                self.max_length,
                self.max_completion_length,
                self.is_encoder_decoder,
            )
        else:
            columns = partial(_token_columns, max_length=self.max_length, shown=self._shown)
            tokenizer = PairTokenizer(opened.reader, self.processing_class, columns)
        found = tokenized(opened, tokenizer, self.args.dataset_num_proc)
        if self.is_encoder_decoder:
            return found
        lengths = {
            "max_length": self.max_length,
            "cpo_max_length": None if self._has_cpo_tokens else self.max_length,
        }
        return self._finish_tokens(found, opened, is_first, CPO_COLUMNS, self.processing_class, **lengths)

    @property
    def _shown(self) -> Any:
        """The tokenizer that gives `generate_during_eval` the prompts as text."""
        return self.processing_class if self.generate_during_eval else None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's; a set that the trainer was not built with is tokenized first."""
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._with_tokens(eval_dataset, kwargs.get("metric_key_prefix", "eval"))
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _with_tokens(self, dataset: Any, split: str) -> Any:
        return dataset if CPO_COLUMNS[1] in column_names(dataset) else self._tokenized(dataset, split)

    def tokenize_row(self, feature: Any, model: Any = None) -> dict[str, Any]:
        """Nothing: CPOTrainer tokenizes row by row in its constructor; the sets get their tokens afterwards."""
        return {}

    def _check_reference(self, config: Any) -> None:
        refuse_reference([self.objective.reward, *self.objective.terms])

    def standard_rows(self) -> Callable[[Mapping[str, Any]], StandardRows | None]:
        return partial(_standard_rows, padding_value=self.pad_token_id)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Any, train_eval: Literal["train", "eval"] = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        """What CPOTrainer calls for each batch: its own method where it will do, `pair_loss` otherwise."""
        if train_eval == "train" and self.runs_trl:
            loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)
            self._finite.see_loss(loss)
            return loss, metrics
        return self.pair_loss(model, batch, train_eval)

    @property
    def runs_trl(self) -> bool:
        # a prompt-learning adapter adds tokens to each row, which CPOTrainer does not take
        adapters = getattr(self.model, "peft_config", {}).values()
        return super().runs_trl and not any(adapter.is_prompt_learning for adapter in adapters)

    def pair_logps(self, model: nn.Module, batch: Mapping[str, Any], fused: bool = True) -> PairLogps:
        if CACHED in batch:
            return batch[CACHED]
        tokens = self.token_logps(model, batch, self._sharing(self, batch), fused)
        return pair_logps(tokens, of_token=self.objective.reward.of_token)

    def standard_logps(self, model: nn.Module, batch: Mapping[str, Any], fused: bool, **inputs: Any) -> TokenLogps:
        rows = self.concatenated_inputs(
            dict(batch),
            is_encoder_decoder=self.is_encoder_decoder,
            padding_value=self.pad_token_id,
            device=self.accelerator.device,
        )
        labels = rows["concatenated_labels"]
        model_inputs = {
            "input_ids": rows["concatenated_input_ids"],
            "attention_mask": rows["concatenated_attention_mask"],
            **inputs,
        }
        if self.is_encoder_decoder:
            model_inputs["decoder_input_ids"] = self._shift_right(labels)
        if fused:
            return fused_token_logps(model, model_inputs, labels)
        return logits_token_logps(model, model_inputs, labels, shift=not self.is_encoder_decoder)

    def same_completions(self, batch: Mapping[str, Any]) -> Tensor:
        chosen, rejected = batch["chosen_labels"], batch["rejected_labels"]
        width = max(chosen.size(1), rejected.size(1))
        chosen, rejected = (F.pad(each, (0, width - each.size(1)), value=IGNORE) for each in (chosen, rejected))
        return (chosen == rejected).all(1)

    def n_pairs(self, batch: Mapping[str, Any]) -> int:
        return len(batch["chosen_labels"])

    def _extra_loss(self, pairs: PairLogps) -> Tensor | float:
        loss: Tensor | float = 0.0
        if self.cpo_alpha and pairs.sft_loss is not None:
            loss = self.cpo_alpha * pairs.sft_loss
        if self.aux_loss_enabled and pairs.aux_loss is not None:
            loss = loss + self.aux_loss_coef * pairs.aux_loss
        return loss

    def _batch_metrics(
        self, pairs: PairLogps, output: ObjectiveOutput, batch: Mapping[str, Any], train_eval: str
    ) -> dict[str, Tensor]:
        chosen, rejected = pairs.chosen, pairs.rejected
        if isinstance(self.objective.reward, LengthNormalizedReward):
            chosen = length_normalized(chosen, pairs.chosen_length)
            rejected = length_normalized(rejected, pairs.rejected_length)
        metrics = super()._batch_metrics(pairs, output, batch, train_eval)
        metrics |= {"logps/chosen": chosen, "logps/rejected": rejected}
        if pairs.sft_loss is not None:
            metrics["nll_loss"] = pairs.sft_loss if self.cpo_alpha else torch.zeros_like(pairs.sft_loss)
        return metrics

    def _set_signature_columns_if_needed(self) -> None:
        # transformers leaves a custom collator what the model's forward takes: of a pair, nothing
        self._own_columns |= _PAIR_COLUMNS
        super()._set_signature_columns_if_needed()

    def _trl_arguments(self, given: Mapping[str, Any], sets: PreparedSets) -> dict[str, Any]:
        """CPOTrainer's constructor reads and tokenizes row by row: in place of each set it gets an empty row."""
        arguments = super()._trl_arguments(given, sets)
        if given.get("data_collator") is None:
            given["args"].remove_unused_columns = False  # as CPOTrainer does, with a warning
        if isinstance(sets.eval, dict):  # over which CPOTrainer maps
            arguments["eval_dataset"] = DatasetDict(sets.eval)
        names = ("train_dataset", "eval_dataset")
        self._untokenized = {name: arguments[name] for name in names if arguments[name] is not None}
        stand_ins = {
            name: DatasetDict({key: _one_row() for key in given}) if isinstance(given, DatasetDict) else _one_row()
            for name, given in self._untokenized.items()
        }
        return arguments | stand_ins

    def _can_fuse(self) -> bool:
        """Whether TRL's fused LM head computes this model's log-probabilities; says why where it does not."""
        reason = why_not_fused(self.model)
        if reason is None and self.args.n_gpu > 1:
            reason = "nn.DataParallel, whose replicas do not carry the fused head; accelerate launch does better"
        if reason is None:
            return True
        logger.info("log-probabilities come from the whole logits: %s", reason)
        return False


class _OneRow(Dataset):
    """What CPOTrainer is shown of a set: it has nothing to extract and to tokenize, and draws no bars for it."""

    def map(self, *args: Any, **kwargs: Any) -> Dataset:
        return self


def _one_row() -> Dataset:
    return _OneRow.from_list([{"prompt": "", "chosen": "", "rejected": ""}])


def _token_columns(tokens: RowTokens, max_length: int | None, shown: Any) -> dict[str, Any]:
    made = cpo_columns(tokens, max_length)
    return made if shown is None else {**made, "prompt": shown.decode(tokens.prompt)}


def _standard_rows(batch: Mapping[str, Any], padding_value: int) -> StandardRows | None:
    if "chosen_labels" not in batch:  # a custom collator
        return None
    rows = CPOTrainer.concatenated_inputs(dict(batch), padding_value=padding_value)
    ids, mask, labels = (rows[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    return ids, mask, labels
