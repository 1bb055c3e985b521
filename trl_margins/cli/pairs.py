"""`trl-margins pairs`: makes a preference set of scored lists."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.loading import load_splits, pick_split
from ..data.pairing import STRATEGIES, make_pairs
from ..rows.form import text_of
from ..tables import aligned
from .options import OptionsParser, ScoredRowOptions, data_first, option
from .score import FILES, check_output, write
from .setup import check_writable

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PairsArguments(ScoredRowOptions):
    """Which answers make a pair, and where to write it."""

    dataset_name: str = option(
        "Scored lists: a file, a saved data set, a folder of files or a Hub id. Needs no flag if it comes first, as "
        "LISTS."
    )
    dataset_split: str | None = option("Split; all by default.", None)
    out: str = option(f"A file ({', '.join(FILES)}) for one split, or a folder.")
    strategy: str = option(
        "The best answer with the worst or with a random other one, the two with the closest scores, or all pairs.",
        "best-worst",
        choices=tuple(STRATEGIES),
    )
    k: int | None = option("The most pairs of one prompt. Default: 1, of `all` all.", None)
    min_gap: float | None = option(
        "Smallest difference of two scores; 0 makes pairs of ties too. Default: any above 0.", None
    )
    balance_length: bool = option("Leave out random pairs until chosen answers are as often longer as shorter.", False)
    as_chat: bool = option("Make messages of text, for a model with a chat template.", False)
    seed: int = option("Seed of the draws.", 0)


def main(argv: Sequence[str]) -> int:
    """Makes the pairs, writes them, prints what they are."""
    parser = OptionsParser("pairs", PairsArguments, usage="trl-margins pairs LISTS --out FILE [options]")
    (args,) = parser.parse(data_first(argv))
    splits = load_splits(args.dataset_name, args.dataset_config, decoded=None)
    if args.dataset_split is not None or len(splits) == 1:
        name = args.dataset_split or next(iter(splits))
        splits = type(splits)({name: pick_split(splits, name, args.dataset_name)})
    check_output(args.out, splits, check_columns=False)
    check_writable(Path(args.out).parent)
    names = ("strategy", "k", "min_gap", "balance_length", "seed", "as_chat")
    options = {name: getattr(args, name) for name in (*names, "score_columns", "prompt_column", "system_column")}
    for name, split in splits.items():
        if len(splits) > 1:
            logger.info("split %s", name)
        splits[name] = make_pairs(split, **options)
    check_output(args.out, splits)
    write(args.out, splits)
    rows = []
    for name, split in splits.items():
        gaps = np.array(split["score_chosen"]) - np.array(split["score_rejected"])
        lengths = [[len(text_of(part)) for part in split[side]] for side in ("chosen", "rejected")]
        longer = np.mean([chosen > rejected for chosen, rejected in zip(*lengths, strict=True)])
        prompts = len({str(prompt) for prompt in split["prompt"]})
        numbers = (gaps.mean(), np.median(gaps), gaps.max())
        rows.append([name, str(len(split)), str(prompts), *(f"{number:.4g}" for number in numbers), f"{longer:.1%}"])
    headers = ["", "pairs", "prompts", "mean gap", "median", "max", "chosen longer"]
    print("\n".join(aligned(rows, (False, *[True] * 6), headers)))
    print(f"written to {args.out}")
    return 0
