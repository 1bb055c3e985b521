"""`trl-margins select`: ranks a preference set by anchor gap, and writes its stable, unstable and random parts."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..checks import Number
from ..data.loading import load_splits, pick_split
from .options import LENGTH, PROMPT_COLUMN, SCORE_COLUMNS, SYSTEM_COLUMN, OptionsParser, max_length_of
from .setup import DTYPES, check_writable, load_model, load_tokenizer, log_to_console

logger = logging.getLogger(__name__)


@dataclass
class SelectArguments:
    """Which pairs, at which model, and how the anchor lies."""

    model_name_or_path: str = field(metadata={"help": "Folder, Hub id, or bundled:smollm2-135m-instruct."})
    dataset_name: str = field(metadata={"help": "A file, a saved data set, a folder of files or a Hub id."})
    output_dir: str = field(metadata={"help": "Gets stable.jsonl, unstable.jsonl, random.jsonl and all.jsonl."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub set."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split; the only one there is, if not given."})
    fraction: float = field(default=0.3, metadata={"help": "Share of the pairs in each part."})
    seed: int = field(default=0, metadata={"help": "Seed of the random part."})
    radius: float = field(default=0.05, metadata={"help": "ρ: how far the anchor lies from the model."})
    batch_multiplier: int = field(default=8, metadata={"help": "Mini-batches that share a direction."})
    batch_size: int = field(default=4, metadata={"help": "Pairs per device and mini-batch."})
    estimator: str = field(
        default="difference", metadata={"help": "How gaps are measured: difference, float32, directional or per-pair."}
    )
    scope: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters that the anchor moves: lm-head, mlp or regular expressions over their names."},
    )
    max_length: int | None = field(default=None, metadata={"help": LENGTH})
    prompt_column: str | None = field(default=None, metadata={"help": PROMPT_COLUMN})
    system_column: str | None = field(default=None, metadata={"help": SYSTEM_COLUMN})
    score_columns: list[str] | None = field(default=None, metadata={"help": SCORE_COLUMNS})
    dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the weights: {', '.join(DTYPES)}.", "choices": DTYPES}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code."})

    def __post_init__(self) -> None:
        Number(above=0, most=1).check("fraction", self.fraction)
        Number(above=0).check("radius", self.radius)
        for name in ("batch_multiplier", "batch_size"):
            Number(least=1, whole=True).check(name, getattr(self, name))
        Number(least=1, whole=True, optional=True).check("max_length", self.max_length)


def main(argv: Sequence[str]) -> int:
    """Measures every pair's anchor gap, writes the parts."""
    log_to_console()
    (args,) = OptionsParser(SelectArguments, prog="trl-margins select").parse_args_and_config(list(argv))
    from ..pairs import ROW
    from ..probes.selection import dataset_anchor_gaps, subsets
    from ..trainers.configs import GeometricAnchorPOConfig
    from ..trainers.named import GeometricAnchorPOTrainer

    out = Path(args.output_dir)
    check_writable(out)
    rows = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    subsets(np.zeros(len(rows)), args.fraction)  # complains now instead of after the measuring
    with tempfile.TemporaryDirectory() as folder:
        config = GeometricAnchorPOConfig(
            output_dir=folder,
            anchor_radius=args.radius,
            anchor_batch_multiplier=args.batch_multiplier,
            anchor_estimator=args.estimator,
            anchor_scope=args.scope,
            anchor_keep_graphs=0,
            gradient_accumulation_steps=args.batch_multiplier,
            per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential",
            max_length=max_length_of(args.max_length, args.model_name_or_path),
            prompt_column=args.prompt_column,
            system_column=args.system_column,
            score_columns=args.score_columns,
            bf16=False,
            report_to="none",
        )
        trainer = GeometricAnchorPOTrainer(
            load_model(
                args.model_name_or_path,
                trainable=True,
                dtype=args.dtype,
                trust_remote_code=args.trust_remote_code,
                device_map=None,
            ),
            config,
            train_dataset=rows,
            processing_class=load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code),
        )
        measured = trainer.train_dataset[ROW][:]  # training drops pairs whose prompts fill max_length
        subsets(np.zeros(len(measured)), args.fraction)
        gaps = dataset_anchor_gaps(trainer)
    if not trainer.is_world_process_zero():
        return 0
    if dropped := len(rows) - len(measured):
        print(f"{dropped} of {len(rows)} pairs could not be measured, since training drops them: they are in no file")
    ranked = rows.select(measured).add_column("anchor_gap", gaps.astype(float).tolist())
    ranked.to_json(out / "all.jsonl")
    for name, chosen in subsets(gaps, args.fraction, args.seed).items():
        ranked.select(chosen).to_json(out / f"{name}.jsonl")
        print(f"{name:<9}{len(chosen):>7} pairs, mean anchor gap {gaps[chosen].mean():.4f}  {out / name}.jsonl")
    return 0
