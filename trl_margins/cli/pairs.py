"""`trl-margins pairs`: makes a preference set of scored lists."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.loading import chosen_splits
from ..data.pairing import STRATEGIES, lists_summary, make_pairs
from ..rows.form import COMPLETIONS
from ..rows.list_forms import list_form
from ..rows.lists import ScoredLists
from ..rows.messages import text_of
from ..tables import aligned
from .options import OptionsParser, ScoredRowOptions, data_first, option, warn_of_unread
from .score import FILES, check_output, check_place, write

if TYPE_CHECKING:
    from datasets import Dataset

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
    drop_truncated: bool = option("Leave out answers that were cut, by the column truncated of `generate`.", False)
    as_chat: bool = option("Make messages of text, for a model with a chat template.", False)
    seed: int = option("Seed of the draws.", 0)


def main(argv: Sequence[str]) -> int:
    """Makes the pairs, writes them, prints what they are."""
    parser = OptionsParser("pairs", PairsArguments, usage="trl-margins pairs LISTS --out FILE [options]")
    (args,) = parser.parse(data_first(argv))
    draws = args.strategy != "best-worst" or args.balance_length
    warn_of_unread([("seed", draws, "random draws, and best-worst makes none without balance_length")], args)
    splits = chosen_splits(args.dataset_name, args.dataset_config, args.dataset_split, decoded=None)
    check_output(args.out, splits, check_columns=False)
    check_place(args.out, args.dataset_name, len(splits))
    names = ("strategy", "k", "min_gap", "balance_length", "seed", "drop_truncated", "as_chat")
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
    print(aligned(rows, headers))
    print(f"written to {args.out}")
    return 0


def summaries_of_lists(splits: Mapping[str, Dataset], *options: Any) -> dict[str, dict[str, Any]]:
    """`lists_summary` of the splits that hold scored lists.

    Args:
        splits: name → rows.
        *options: `score_columns`, `prompt_column` and `system_column`.
    """
    return {
        name: lists_summary(ScoredLists.of(split, name, *options))
        for name, split in splits.items()
        if not {*COMPLETIONS} <= {*split.column_names} and list_form(split.column_names, *options[:2])
    }


def lists_text(lists: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the summaries, and what to do with the lists."""
    headers = ["scored lists", "rows", "lists", "answers", "a list", "scores", "all tied", "models"]
    rows = []
    for name, found in lists.items():
        spans = [
            f"{each['least']:g} – {each['most']:g}" if (each := found[key]) else "-" for key in ("answers", "scores")
        ]
        counts = [str(found[f"n_{key}"]) for key in ("rows", "lists", "answers")]
        rows.append([name, *counts, *spans, str(found["n_tied"]), str(found["n_models"])])
    end = "Lists cannot be trained on: make pairs of them with trl-margins pairs FILE --out pairs.jsonl.gz"
    return f"{aligned(rows, headers)}\n\n{end}"
