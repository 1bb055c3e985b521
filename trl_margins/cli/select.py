"""`trl-margins select`: ranks a preference set by anchor gap, and writes its stable, unstable and random parts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.loading import load_splits, pick_split
from .options import DTYPES, LENGTH, OptionsParser, ScoredRowOptions, option
from .setup import check_writable, load_model, load_tokenizer, max_length_of


@dataclass(kw_only=True)
class SelectArguments(ScoredRowOptions):
    """Pairs, model and anchor."""

    model_name_or_path: str = option("Folder, Hub id, or bundled:smollm2-135m-instruct.")
    dataset_name: str = option("A file, a saved data set, a folder of files or a Hub id.")
    output_dir: str = option("Folder for stable.jsonl, unstable.jsonl, random.jsonl and all.jsonl.")
    dataset_split: str | None = option("Split; by default the only one there is.", None)
    fraction: float = option("Share of the pairs in each part.", 0.3)
    seed: int = option("Seed of the random part.", 0)
    anchor_radius: float = option("ρ: distance of the anchor from the model.", 0.05)
    anchor_batch_multiplier: int = option("Mini-batches that share a direction.", 8)
    batch_size: int = option("Pairs per device and mini-batch.", 4)
    anchor_estimator: str = option("How gaps are measured: difference, float32 or per-pair.", "difference")
    anchor_scope: list[str] | None = option(
        "Parameters that the anchor moves: lm-head, mlp, or regular expressions over parameter names.", None
    )
    max_length: int | None = option(LENGTH, None)
    dtype: str = option(f"Dtype of the weights: {', '.join(DTYPES)}.", "float32", choices=DTYPES)
    trust_remote_code: bool = option("Run the model's own code.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor_radius == 0:
            raise ValueError("anchor_radius must be above 0: at the model itself no gap falls, and nothing is ranked")


def main(argv: Sequence[str]) -> int:
    """Measures the anchor gap of every pair, writes the parts."""
    (args,) = OptionsParser("select", SelectArguments).parse(argv)
    import torch

    from ..pairs import ROW
    from ..probes.selection import dataset_anchor_gaps, subsets
    from ..trainers.configs import GeometricAnchorPOConfig
    from ..trainers.named import GeometricAnchorPOTrainer

    out = Path(args.output_dir)
    check_writable(out)
    rows = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    subsets(np.zeros(len(rows)), args.fraction)  # checks the fraction before measuring
    model, code = args.model_name_or_path, args.trust_remote_code
    with tempfile.TemporaryDirectory() as folder:
        config = GeometricAnchorPOConfig(
            output_dir=folder,
            anchor_radius=args.anchor_radius,
            anchor_batch_multiplier=args.anchor_batch_multiplier,
            anchor_estimator=args.anchor_estimator,
            anchor_scope=args.anchor_scope,
            anchor_keep_graphs=0,
            per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential",
            max_length=max_length_of(args.max_length, model),
            prompt_column=args.prompt_column,
            system_column=args.system_column,
            score_columns=args.score_columns,
            bf16=False,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),  # accelerate joins processes on CPUs only when told to
        )
        trainer: Any = GeometricAnchorPOTrainer(
            load_model(model, trainable=True, dtype=args.dtype, trust_remote_code=code, device_map=None),
            config,
            train_dataset=rows,
            processing_class=load_tokenizer(model, trust_remote_code=code),
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
