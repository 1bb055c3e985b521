"""The settings of runs: those that decide what was trained, and the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .margin_figures import shared_target
from .markdown import one_line
from .ranking_figures import UNINTERESTING, differing
from .results import last_step
from .run_folder import TRAINING, Run

_WHERE_ON = ("label_smoothing", "cpo_alpha", "alpha", "sam_radius", "loss_weights")  # shown where they do something
# said by other rows, or no part of what is learned
_BESIDE = re.compile(
    r"^(reward|weight|margin|simpo_gamma|max_steps|num_train_epochs)$|^(eval|save|do)_|best|^greater_is_better$"
)
_PRIVATE = ("model_init_kwargs", "accelerator_config")  # may hold tokens, or are long


def read_fields(run: Run) -> list[str]:
    """The config fields that the run's method reads: of loss, reward, terms and training."""
    from ..methods import names_of
    from ..registry import find_link

    terms = [*run.info.get("term_options", []), *run.info.get("reward_options", [])]
    fields = ["beta", "loss_type"]
    options = []
    reads_target = True
    for name in names_of(run.config.get("loss_type")):
        try:
            link = find_link(run.info.get("base", "cpo"), name)
        except ValueError:  # of a plug-in that is not installed
            continue
        options += [option for option, _ in link.options]
        reads_target = link.takes_margin
    if reads_target and (run.info.get("margin") is None or shared_target(run) is not None):
        fields.append("gamma_beta_ratio")
    on = [name for name in _WHERE_ON if run.config.get(name)]
    steps = run.config.get("max_steps") or 0
    training = [name for name in TRAINING if name != ("num_train_epochs" if steps > 0 else "max_steps")]
    terms = [name for name in terms if name not in _WHERE_ON]
    return list(dict.fromkeys([*fields, *options, *terms, *on, *training]))


def settings(runs: Sequence[Run]) -> list[list[str]]:
    """A name and a value for each run; nothing that no run says, and no field that no run's method reads."""
    from ..registry import METHODS, OPTIONS, method_ids, term_class, term_names

    ids = [run.info.get("method") for run in runs]
    methods = [METHODS[each] if each in method_ids() else None for each in ids]
    papers = [method and method.paper for method in methods]
    info = {
        "trainer": "trainer",
        "model": "model",
        "reward": "reward",
        "weight term": "weight",
        "margin term": "margin",
    }
    reads = [read_fields(run) for run in runs]
    every = dict.fromkeys(name for of in reads for name in of)
    prefixes = tuple(
        term_class(kind, name).option_prefix for kind in ("weight", "margin") for name in term_names(kind)
    )
    differ = [
        name
        for name in differing(runs)
        if all(name in run.config for run in runs)  # else a field of the other base
        and not (name in every or name in OPTIONS or name in _PRIVATE)
        and not (name.startswith(prefixes) or _BESIDE.search(name))
    ]
    rows: dict[str, list[Any]] = {
        "method": [run.info.get("name") or run.info.get("method") for run in runs],
        "paper": [p and (f"{p.title} (arXiv {p.arxiv})" if p.arxiv else p.title) for p in papers],
        "objective, as in the paper": [method and method.formula for method in methods],
        **{label: [run.info.get(key) for run in runs] for label, key in info.items()},
        "training pairs": [run.info.get("train_rows") for run in runs],
        "pairs per step": [run.pairs_per_step for run in runs],
        "steps trained": [last_step(run) for run in runs],
        **{
            name: [run.config.get(name) if name in of else None for run, of in zip(runs, reads, strict=True)]
            for name in every
        },
        **{name: [run.config.get(name) for run in runs] for name in differ},
        "trl_margins": [run.info.get("version") for run in runs],
    }
    if "warmup_steps" in rows:
        rows["warmup_steps"] = [f"{v:g} of all steps" if v and 0 < v < 1 else v for v in rows["warmup_steps"]]
    return [[name, *map(one_line, row)] for name, row in rows.items() if any(value is not None for value in row)]


def other_settings(runs: Sequence[Run], shown: Sequence[Sequence[str]]) -> list[list[str]]:
    """The config fields that `settings` does not show."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    left = [n for n in names if n not in {row[0] for row in shown} | {*_PRIVATE} and not UNINTERESTING.search(n)]
    values: Mapping[str, list[Any]] = {name: [run.config.get(name) for run in runs] for name in left}
    return [[n, *map(one_line, row)] for n, row in values.items() if any(v not in (None, [], {}) for v in row)]
