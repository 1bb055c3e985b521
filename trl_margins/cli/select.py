"""`trl-margins select`: ranks a preference set by anchor gap, and writes its stable, unstable and random parts."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..checks import NUMBERS
from ..data.loading import load_splits, pick_split
from ..disk import check_writable, write, written
from ..printable import outlive_readers
from .options import DTYPES, LENGTH, OptionsParser, ScoredRowOptions, option
from .setup import MAX_LENGTH, check_files, load_model, load_tokenizer, of_training, run_of, trained_with

logger = logging.getLogger(__name__)

PARTS = ("stable", "unstable", "random")
EVERYTHING = "all.jsonl"
OF_THE_RUN = "By default that of the model's training run, else"


@dataclass(kw_only=True)
class AnchorOptions(ScoredRowOptions):
    """Pairs, and the anchor under which their gaps are measured."""

    dataset_name: str = option("A file, a saved data set, a folder of files or a Hub id.")
    dataset_split: str | None = option("Split; by default the only one there is.", None)
    anchor_radius: float | None = option(f"ρ: distance of the anchor from the model. {OF_THE_RUN} 0.05.", None)
    anchor_batch_multiplier: int | None = option(f"Mini-batches that share a direction. {OF_THE_RUN} 8.", None)
    anchor_direction: str | None = option(
        f"gradient of a group's mean gap, or every pair's own. {OF_THE_RUN} gradient.",
        None,
        choices=("gradient", "pair"),
    )
    batch_size: int = option("Pairs per device and mini-batch.", 4)
    anchor_estimator: str = option("How gaps are measured: difference, float32 or per-pair.", "difference")
    anchor_scope: list[str] | None = option(
        "Parameters that the anchor moves: lm-head, mlp, or regular expressions over parameter names. "
        f"{OF_THE_RUN} all that train.",
        None,
    )
    max_length: int | None = option(LENGTH, None)
    dtype: str = option(f"Dtype of the weights: {', '.join(DTYPES)}.", "float32", choices=DTYPES)
    trust_remote_code: bool = option("Run the model's own code.", False)

    # of what the training run may say
    defaults: ClassVar[Mapping[str, Any]] = {
        "anchor_radius": 0.05,
        "anchor_batch_multiplier": 8,
        "anchor_direction": "gradient",
        "anchor_scope": None,
        "max_length": MAX_LENGTH,
    }


@dataclass(kw_only=True)
class SelectArguments(AnchorOptions):
    """Model, and the parts to write."""

    model_name_or_path: str = option("Folder, Hub id, or bundled:smollm2-135m-instruct.")
    output_dir: str = option(
        "Folder for stable.jsonl, unstable.jsonl, random.jsonl and all.jsonl; of several fractions, for "
        "stable-30.jsonl and so on, with the percentage."
    )
    fraction: list[float] = option("Shares of the pairs in each part, one or more.", [0.3])
    seed: int = option("Seed of the random part.", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for fraction in self.fraction:
            NUMBERS["fraction"].check("fraction", fraction)
        if len({*self.fraction}) < len(self.fraction):
            raise ValueError(f"fraction has a share twice ({self.fraction}): name each once")


def main(argv: Sequence[str]) -> int:
    """Measures the anchor gap of every pair, writes the parts."""
    (args,) = OptionsParser("select", SelectArguments).parse(argv)
    args = as_in_training(args, [args.model_name_or_path])
    from ..data.saving import check_types, save
    from ..pairs import ROW
    from ..probes.selection import dataset_anchor_gaps, subsets
    from ..terms.anchor import ANCHOR_GAP

    out = Path(args.output_dir)
    files = _files(out, args.fraction)
    source = Path(args.dataset_name).expanduser().resolve()
    if lost := [each for each in files if each.exists() and each.resolve().is_relative_to(source)]:
        raise ValueError(f"{lost[0]} is read, and would be lost: name another output_dir")
    rows = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    check_types(rows.features, ".jsonl", args.output_dir)
    for fraction in args.fraction:
        subsets(np.zeros(len(rows)), fraction)  # checks it before measuring
    check_writable(out)
    check_files(each for each in files if not each.is_dir())
    outlive_readers()
    with anchor_trainer(args, args.model_name_or_path, rows) as trainer:
        measured = trainer.train_dataset[ROW][:]  # training drops pairs whose prompts fill max_length
        for fraction in args.fraction:
            subsets(np.zeros(len(measured)), fraction)
        gaps = dataset_anchor_gaps(trainer)
    if not trainer.is_world_process_zero():
        return 0
    say_dropped(len(rows) - len(measured), len(rows))
    others = {file.name for part in PARTS for file in out.glob(f"{part}*.jsonl")}
    with keeping(out / "measured.json", {ROW: measured, ANCHOR_GAP: gaps.tolist()}):
        ranked = rows.select(measured)
        if ANCHOR_GAP in ranked.column_names:
            logger.warning("%s has a column %s: what is measured now takes its place", args.dataset_name, ANCHOR_GAP)
            ranked = ranked.remove_columns(ANCHOR_GAP)
        ranked = ranked.add_column(ANCHOR_GAP, gaps.astype(float).tolist())
        with written(out / EVERYTHING) as everything:
            save(ranked, everything, ".jsonl")
        for fraction in args.fraction:
            for name, chosen in subsets(gaps, fraction, args.seed).items():
                file = _file(out, name, fraction, args.fraction)
                with written(file) as part:
                    save(ranked.select(chosen), part, ".jsonl")
                others.discard(file.name)
                print(f"{name:<9}{len(chosen):>7} pairs, mean anchor gap {gaps[chosen].mean():.4f}  {file}")
    if others:
        print(f"of an earlier call, and not of this one: {', '.join(sorted(others))}")
    return 0


def _file(out: Path, part: str, fraction: float, fractions: Sequence[float]) -> Path:
    share = f"-{100 * fraction:g}" if len(fractions) > 1 else ""
    return out / f"{part}{share}.jsonl"


def _files(out: Path, fractions: Sequence[float]) -> list[Path]:
    return [out / EVERYTHING, *(_file(out, part, fraction, fractions) for fraction in fractions for part in PARTS)]


@contextmanager
def keeping(file: Path, measured: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Within the block, an error does not take with it what has been measured: this file has it by then.

    Raises:
        RuntimeError: the block failed; with the reason, and the file.
    """
    write(file, json.dumps(measured))
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"the parts could not be written ({error}). What was measured is in {file}: "
            f"{' and '.join(map(repr, measured))} of each pair, in the data's order"
        ) from error
    file.unlink()


_OF_GAPO = ("beta", "gamma_beta_ratio")  # other methods' mean something else


def _has_anchor(run: Mapping[str, Any]) -> bool:
    return "geometric-anchor" in (run.get("margin") or "")


def _is_gapo(run: Mapping[str, Any]) -> bool:
    return _has_anchor(run) and run.get("reward") == "length-normalized"


Arguments = TypeVar("Arguments", bound=AnchorOptions)


def as_in_training(args: Arguments, models: Sequence[str]) -> Arguments:
    """The arguments, with what the models' training run had where nothing is given: GAPO's, if there is one.

    Raises:
        ValueError: a radius of 0.
    """
    anchored = [model for model in models if _has_anchor(run_of(model))]
    of_gapo = [model for model in anchored if _is_gapo(run_of(model))][:1]
    if not of_gapo and any(map(run_of, models)) and "beta" in args.defaults:
        logger.warning(
            "no model is of a GAPO run with the length-normalized reward: the weight has β %g and γ/β %g",
            *(of_training(name, getattr(args, name), [], args.defaults[name]) for name in _OF_GAPO),
        )

    def runs_with(name: str) -> Sequence[str]:
        return of_gapo or ([] if name in _OF_GAPO else anchored if name.startswith("anchor_") else models)

    found = {
        name: of_training(name, getattr(args, name), runs_with(name), value) for name, value in args.defaults.items()
    }
    if found["anchor_direction"] == "momentum":
        logger.info("anchor_direction='gradient': a saved model has no momentum")
        found["anchor_direction"] = "gradient"
    if found["anchor_radius"] == 0:
        raise ValueError("anchor_radius must be above 0: at the model itself no gap falls, and nothing is ranked")
    return replace(args, **found)


@contextmanager
def anchor_trainer(args: AnchorOptions, model: str, rows: Any) -> Iterator[Any]:
    """A trainer that measures anchor gaps of these rows in their order, in groups of k mini-batches."""
    import torch

    from ..trainers.configs import GeometricAnchorPOConfig
    from ..trainers.named import GeometricAnchorPOTrainer

    code = args.trust_remote_code
    names = (*AnchorOptions.defaults, "anchor_estimator")
    columns = ("prompt_column", "system_column", "score_columns")
    given: dict[str, Any] = {name: getattr(args, name) for name in (*names, *columns)}
    with tempfile.TemporaryDirectory() as folder:
        config = GeometricAnchorPOConfig(
            **given,
            output_dir=folder,
            train_only=trained_with(model, "train_only"),
            anchor_keep_graphs=0,
            per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential",
            bf16=False,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),  # accelerate joins processes on CPUs only when told to
        )
        yield GeometricAnchorPOTrainer(
            load_model(model, trainable=True, dtype=args.dtype, trust_remote_code=code, device_map=None),
            config,
            train_dataset=rows,
            processing_class=load_tokenizer(model, trust_remote_code=code),
        )


def say_dropped(dropped: int, n_rows: int) -> None:
    if dropped:
        print(f"{dropped} of {n_rows} pairs could not be measured, since training drops them: they are in no file")
