"""An evaluation: the pairs in their order, and pairwise accuracy and Spearman over the whole set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from ..checks import unknown
from ..distributed import check_lockstep
from ..evaluation.ranking import ranking_metrics
from ..pairs import SCORES, PairLogps
from ..recording.metrics import MetricBuffer
from ..rows.raw import column_names
from ..rows.scores import ScoreColumns, find_score_columns
from .arguments import OwnMetrics, check_settings
from .best import BestMixin
from .finite import FiniteSteps
from .model_checks import naming_dtypes
from .preparation import as_taken, eval_split, share_trained_on

logger = logging.getLogger(__name__)


class EvaluationMixin(BestMixin):
    """Measures an evaluation set, whatever the training's reward is: so runs of different methods compare."""

    _finite: FiniteSteps
    _evaluated: list[Tensor]
    _said: Set[str] = frozenset()  # warnings
    _prefix: str  # of the metrics of the set that is evaluated
    _settings_read: dict[str, Any]  # of the config, when the trainer had been built
    _mark: str = ""  # the column of pairs that were trained on
    _shares: Mapping[str, float] = MappingProxyType({})  # of pairs trained on, by what a set's metrics are called

    def trained_on(self, name: str) -> float:
        """The share of pairs that were trained on, of those whose numbers were logged under this name."""
        if (share := self._shares.get(name)) is not None:
            return share
        split = eval_split(name) if name else "eval"
        return self.set_facts[split].trained_on if split in self.set_facts else 0.0

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """TRL's.

        Raises:
            ValueError: the name of a set that is not there.
            TypeError: not a data set.
        """
        if isinstance(eval_dataset, str):
            if not isinstance(self.eval_dataset, dict):
                raise ValueError(
                    f"evaluate({eval_dataset!r}): the trainer has no evaluation sets by name. Leave the name out, or "
                    "give eval_dataset as a dict when the trainer is made"
                )
            if eval_dataset not in self.eval_dataset:
                raise unknown("evaluation set", eval_dataset, self.eval_dataset)
        elif eval_dataset is not None and not isinstance(eval_dataset, Dataset | IterableDataset):
            as_taken(eval_dataset, "evaluation", self.args)
        dataloader = super().get_eval_dataloader(eval_dataset)
        check_lockstep(self.accelerator, dataloader, "evaluation")
        self._warn_of_rows(dataloader)
        return dataloader

    def _warn_of_rows(self, dataloader: DataLoader) -> None:
        """Of rows that count nowhere, and of those that count again."""
        ranks = 1 if self.args.accelerator_config.split_batches else self.accelerator.num_processes
        rows, at_once = dataloader.dataset, self.args.eval_batch_size * ranks
        if isinstance(rows, Dataset) and self.args.dataloader_drop_last and (left_out := len(rows) % at_once):
            self._warn_once(
                "dataloader_drop_last=True leaves out the last batch of an evaluation, too, if it is not full: "
                f"{left_out} of {len(rows)} pairs count nowhere"
            )
        is_stream = isinstance(rows, torch.utils.data.IterableDataset)
        if is_stream and self.accelerator.num_processes > 1 and at_once > 1:
            self._warn_once(
                "the evaluation set is a stream: its first rows are read again behind its last, up to "
                f"{at_once - 1} in all, to be as long on all ranks, and count again. Load it instead of streaming it"
            )

    def _warn_once(self, text: str) -> None:
        if self.is_world_process_zero() and text not in self._said:
            logger.warning(text)
            self._said = {*self._said, text}

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In order: transformers would group evaluation sets, too, draw their order, and not find their lengths."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's loop, then `pwa`, `pwa_all`, `spearman` and the numbers of pairs behind them."""
        check_settings(self.args, self._settings_read)
        self._finite.check_weights()
        self._evaluated, self._prefix = [], metric_key_prefix
        if metric_key_prefix.startswith("eval"):  # and not `predict`
            name = metric_key_prefix.removeprefix("eval").removeprefix("_")
            self._shares = {**self._shares, name: share_trained_on(dataloader.dataset, self._mark)}
        self._buffers["eval"] = MetricBuffer()  # what `predict`, or an evaluation that was cut off, has left
        if self.compute_metrics is not None and not isinstance(self.compute_metrics, OwnMetrics):
            self.compute_metrics = OwnMetrics(self.compute_metrics)
        with naming_dtypes(self.model):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        values, self._evaluated = torch.cat(self._evaluated).cpu() if self._evaluated else None, []
        metrics = output.metrics
        if values is None or metrics is None:
            return output
        losses, rewards = values[:, 0], values[:, 1:]
        if self.options.filters_evaluation and losses.isfinite().any():
            # as transformers does with `logging_nan_inf_filter`, which also reads every training loss from the device
            losses = losses[losses.isfinite()]
        # transformers counts a batch as long as most are: the last one of a stream, and those of `split_batches`, too
        metrics[f"{metric_key_prefix}_loss"] = losses.mean().item()
        ranking = self._ranking(rewards, dataloader.dataset)
        self._without_clear_pairs(metric_key_prefix, ranking)
        for name, value in ranking.items():
            if value is None:
                logger.warning("%s_%s is undefined on this data set (%s)", metric_key_prefix, name, ranking)
            else:
                metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _remember(self, pairs: PairLogps, columns: Mapping[str, Tensor], loss: Tensor, same: Tensor) -> None:
        """Caches what the metrics over a whole set are computed from: [pairs, loss, mean log-probabilities, scores].

        Whatever the training's reward is: so runs of different methods compare.
        """
        scores = [columns[name] for name in SCORES if name in columns]
        chosen, rejected = pairs.mean_logps
        # the same completion twice is not a win, whatever the rounding
        rejected = torch.where(same, chosen, rejected)
        rows = [loss.detach().float().expand_as(chosen), chosen.float(), rejected.float(), *scores]
        self._evaluated.append(self.accelerator.gather_for_metrics(torch.stack(rows, dim=1)))

    def _ranking(self, values: Tensor, dataset: Any) -> dict[str, float | int | None]:
        scores = self._score_columns(dataset)
        usable = values[:, :2].isfinite().all(dim=1)
        if not usable.all():
            logger.warning(
                "%d of %d pairs are left out of the evaluation: their log-probabilities are NaN or infinite",
                len(usable) - int(usable.sum()),
                len(usable),
            )
        return ranking_metrics(
            *values[usable].numpy().T,
            min_score_gap=self.options.eval_min_score_gap,
            gap_only=scores is not None and scores.is_gap(values[:, 3]),
        )

    def _score_columns(self, dataset: Any) -> ScoreColumns | None:
        """Where an evaluation set has its scores; not in a column that a term reads."""
        names, given = column_names(dataset), self.options.score_columns
        if given is None:
            names = [name for name in names if name not in self.objective.columns or name in SCORES]
        return find_score_columns(names, given, strict=False)
