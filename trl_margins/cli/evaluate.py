"""`trl-margins evaluate`: PWA and Spearman of a model on scored pairs, as a table and as JSON."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from trl import TrlParser

from ..data.loading import load_splits, pick_split
from .setup import load_model, load_tokenizer, log_to_console

ROWS = {
    "pwa": "pairwise accuracy, score gap ≥ {gap:g}",
    "pwa_all": "pairwise accuracy, all pairs",
    "spearman": "Spearman ρ, all answers",
    "reward_gap": "mean reward gap (nats per token)",
}
NUMBERS = {
    "pwa": "eval_pwa",
    "pwa_all": "eval_pwa_all",
    "spearman": "eval_spearman",
    "n_pairs": "eval_n_pairs",
    "n_pairs_gap": "eval_n_pairs_gap",
    "reward_gap": "eval_rewards/margins",
}
COUNTS = {"pwa": "n_pairs_gap", "pwa_all": "n_pairs"}


@dataclass
class EvaluateArguments:
    """What to evaluate on what."""

    model_name_or_path: str = field(metadata={"help": "Folder, Hub id, or bundled:smollm2-135m-instruct."})
    dataset_name: str = field(metadata={"help": "A file, a saved data set, a folder of files or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub set."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; the only one there is, if not given."})
    json: str | None = field(default=None, metadata={"help": "File that gets the numbers as JSON."})
    score_columns: list[str] | None = field(default=None, metadata={"help": "Score columns, if not the usual names."})
    eval_min_score_gap: float = field(default=2.0, metadata={"help": "Least score gap of the pairs behind `pwa`."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt and answer, in tokens."})
    batch_size: int = field(default=8, metadata={"help": "Pairs a device and step. Does not change the numbers."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32, bfloat16, float16, auto."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code."})


def main(argv: Sequence[str]) -> int:
    """Evaluates, prints the table, writes the JSON."""
    log_to_console()
    (args,) = TrlParser(EvaluateArguments, prog="trl-margins evaluate").parse_args_and_config(list(argv))
    dataset = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    numbers = evaluate_model(
        load_model(
            args.model_name_or_path, dtype=args.dtype, trust_remote_code=args.trust_remote_code, device_map=None
        ),
        load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code),
        dataset,
        score_columns=args.score_columns,
        eval_min_score_gap=args.eval_min_score_gap,
        max_length=args.max_length,
        batch_size=args.batch_size,
    )
    if numbers is None:  # not the first process
        return 0
    print(table({"": numbers}, args.eval_min_score_gap))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


def evaluate_model(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    score_columns: list[str] | None = None,
    eval_min_score_gap: float = 2.0,
    max_length: int = 1024,
    batch_size: int = 8,
) -> dict[str, float | int | None] | None:
    """What `GapPOTrainer.evaluate()` would say of the model: the same code does it.

    Returns:
        `pwa`, `pwa_all`, `spearman`, `reward_gap` (mean Δ), `n_pairs`, `n_pairs_gap`; None for what is undefined. On
        other processes than the first, None.
    """
    from ..trainers.configs import MarginCPOConfig
    from ..trainers.cpo import MarginCPOTrainer

    # pairs of like length side by side: less padding; the longest first, so that memory runs out at once or never
    sizes = [-max(len(str(row["chosen"])), len(str(row["rejected"]))) for row in dataset]
    dataset = dataset.select(np.argsort(sizes, kind="stable"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = MarginCPOTrainer(
            model,
            args=MarginCPOConfig(
                output_dir=folder,
                loss_type="simpo",
                cpo_alpha=0.0,
                beta=1.0,
                score_columns=score_columns,
                eval_min_score_gap=eval_min_score_gap,
                max_length=max_length,
                max_completion_length=max_length if model.config.is_encoder_decoder else None,
                per_device_eval_batch_size=batch_size,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
            ),
            train_dataset=dataset.select(range(1)),  # CPOTrainer insists on one
            eval_dataset=dataset,
            processing_class=tokenizer,
        )
        metrics = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return None
    return numbers_of(metrics)


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """What the table and the JSON show of `trainer.evaluate()`; None for what is undefined."""
    return {name: metrics.get(key) for name, key in NUMBERS.items()}


def table(columns: Mapping[str, Mapping[str, Any]], gap: float) -> str:
    """One row a metric, one column a model; the last column is the number of pairs."""
    first = next(iter(columns.values()))
    label_width = max(len(label.format(gap=gap)) for label in ROWS.values())
    lines = []
    if any(columns):
        lines.append(" " * label_width + "".join(f"{name:>10}" for name in columns) + f"{'pairs':>9}")
    for name, label in ROWS.items():
        cells = "".join(f"{'-' if c.get(name) is None else format(c[name], '.4f'):>10}" for c in columns.values())
        count = first.get(COUNTS.get(name, "n_pairs"))
        lines.append(f"{label.format(gap=gap):<{label_width}}{cells}{'-' if count is None else count:>9}")
    return "\n".join(lines)
