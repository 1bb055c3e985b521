"""`trl-margins anchors`: the same pairs at several checkpoints: do flipped labels weigh less in GAPO as it trains?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ..checks import check_names
from ..data.loading import load_splits, pick_split
from ..data.noise import flip_labels, parse_noise
from ..disk import check_writable, write, written
from ..pairs import IS_FLIPPED, ROW
from ..report.summaries import flips_of_parts
from ..tables import markdown_table
from .options import OptionsParser, option, warn_of_unread
from .select import OF_THE_RUN, AnchorOptions, anchor_trainer, as_in_training, say_dropped
from .setup import find_model

PAIRS, NUMBERS, PICTURE = "anchors.csv", "anchors.json", "anchors.png"
HEADS = {  # of the table, by the names in the JSON file
    "weight_clean": "weight, clean",
    "weight_flipped": "weight, flipped",
    "flip_rate_low": "flipped, lowest",
    "flip_rate_mid": "flipped, middle",
    "flip_rate_high": "flipped, highest",
}


@dataclass(kw_only=True)
class AnchorsArguments(AnchorOptions):
    """Checkpoints and labels."""

    checkpoints: list[str] = option(
        "One or more: a run's folder, for all its checkpoints in the order of their steps, or a model as for `select`."
    )
    output_dir: str = option(f"Folder for {PAIRS}, {NUMBERS} and {PICTURE}.")
    noise: str | None = option(
        "The training's: KIND:RATE flips the same labels. Without it, the data set says which are flipped, in the "
        f"column {IS_FLIPPED}.",
        None,
    )
    noise_seed: int = option("The training's.", 0)
    max_pairs: int | None = option("Measures so many pairs, drawn at random after the flips; by default all.", None)
    seed: int = option("Seed of that draw.", 0)
    beta: float | None = option(f"β of the weight. {OF_THE_RUN} 2.5.", None)
    gamma_beta_ratio: float | None = option(f"γ of the weight, over β. {OF_THE_RUN} 0.1.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("checkpoints", self.checkpoints)
        if self.noise:
            parse_noise(self.noise)
        unread = (("noise_seed", self.noise, "noise"), ("seed", self.max_pairs is not None, "max_pairs"))
        warn_of_unread(unread, self)

    defaults: ClassVar[Mapping[str, Any]] = {**AnchorOptions.defaults, "beta": 2.5, "gamma_beta_ratio": 0.1}


def main(argv: Sequence[str]) -> int:
    """Measures the anchor gaps at each checkpoint, prints the table, writes the files."""
    (args,) = OptionsParser("anchors", AnchorsArguments).parse(argv)
    from accelerate.utils.memory import clear_device_cache
    from torch import from_numpy

    from ..probes.selection import dataset_anchor_gaps
    from ..terms.anchor import anchor_weight

    out, models = Path(args.output_dir), models_of(args.checkpoints)
    check_writable(out)
    args = as_in_training(args, models)
    rows, numbers = labelled(args)
    gaps: list[np.ndarray] = []
    measured: list[int] = []
    for model in models:
        with anchor_trainer(args, model, rows) as trainer:
            if gaps and measured != trainer.train_dataset[ROW][:]:
                raise ValueError(f"{model} tokenizes the pairs otherwise than {models[0]}, and training drops others")
            measured = trainer.train_dataset[ROW][:]
            flipped = np.array(rows[IS_FLIPPED], bool)[measured]
            if flipped.all() or not flipped.any():
                raise ValueError(
                    f"{'all' if flipped.any() else 'none'} of the {len(flipped)} pairs are flipped: there is nothing "
                    "to compare"
                )
            gaps.append(dataset_anchor_gaps(trainer))
        is_main, trainer = trainer.is_world_process_zero(), None
        clear_device_cache(garbage_collection=True)
    if not is_main:
        return 0
    say_dropped(len(rows) - len(measured), len(rows))
    weights = [anchor_weight(from_numpy(each), args.beta, args.gamma_beta_ratio * args.beta).numpy() for each in gaps]
    found = flips_of_parts((float(i), weight, flipped) for i, weight in enumerate(weights))
    columns = dict(zip(HEADS, (found.clean, found.flipped, *found.by_tier), strict=True))
    at: list[dict[str, Any]] = [
        {"model": model, **{name: column[i].tolist() for name, column in columns.items()}}
        for i, model in enumerate(models)
    ]
    write(out / NUMBERS, json.dumps({**asdict(args), "at": at}, indent=2) + "\n")
    by_pair = {
        "model": np.repeat(models, len(measured)),
        ROW: np.tile(numbers[measured], len(models)),
        IS_FLIPPED: np.tile(flipped.astype(int), len(models)),
        "anchor_gap": np.concatenate(gaps),
        "anchor_weight": np.concatenate(weights),
    }
    with written(out / PAIRS) as file:
        Dataset.from_dict(by_pair).to_csv(file)
    lasts = [Path(model).name for model in models]
    names = lasts if len({*lasts}) == len(models) else models
    cells = (
        [name, *(f"{value:.3f} ({low:.3f}–{high:.3f})" for value, low, high in (row[head] for head in HEADS))]
        for name, row in zip(names, at, strict=True)
    )
    print(
        f"{markdown_table(['', *HEADS.values()], cells)}\n\nMean anchor weights, and the share of flipped pairs in "
        f"each third by weight ({found.overall:.3f} of all). In brackets: 95 % intervals over the pairs."
    )
    try:
        from ..report.figures import flips_at
    except ImportError:
        print(f"no {PICTURE}, which needs matplotlib: pip install 'trl-margins[report]'")
    else:
        with written(out / PICTURE) as file:
            flips_at(names, found).savefig(file)
    return 0


def models_of(given: Sequence[str]) -> list[str]:
    """The models that `checkpoints` names.

    Raises:
        ValueError: one that does not exist.
    """
    from ..trainers.folder import whole_checkpoints

    found = []
    for name in given:
        of_run = list(whole_checkpoints(Path(name).expanduser()))[::-1]
        found += of_run or [name]
    for name in found:
        find_model(name)
    return found


def labelled(args: AnchorsArguments) -> tuple[Any, np.ndarray]:
    """The pairs with their flips, and the row of the data set that each one is.

    Raises:
        ValueError: nothing says which labels are flipped.
    """
    name = args.dataset_name
    rows = pick_split(load_splits(name, args.dataset_config), args.dataset_split, name)
    if args.noise:
        kind, rate = parse_noise(args.noise)
        columns = {"prompt_column": args.prompt_column, "system_column": args.system_column}
        rows = flip_labels(rows, rate, kind, args.noise_seed, args.score_columns, **columns)
    elif IS_FLIPPED not in rows.column_names:
        raise ValueError(
            f"{name} has no column {IS_FLIPPED!r}: give --noise and --noise_seed as in the training, or add a column "
            "of true and false"
        )
    numbers = np.arange(len(rows))
    if args.max_pairs is not None and args.max_pairs < len(rows):
        # label noise draws from [seed]: the same numbers would draw the flipped pairs
        numbers = np.sort(np.random.default_rng([args.seed, 2]).permutation(len(rows))[: args.max_pairs])
    return rows.select(numbers), numbers
