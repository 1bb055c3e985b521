"""The model card: what TRL writes, with method, data, settings, results and pictures of the run put into it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..evaluation.tables import listwise_table, markdown_table, pair_table, rm_bench_table
from ..methods import METHODS, Method, names_of
from .card_results import Evaluation, EvaluationReport, eval_results
from .markdown import code, fenced, inline, one_line, python_text

HUB = "https://huggingface.co"

REWARDS: Mapping[str, str] = {
    "length-normalized": "r = β · log π(y) / |y| (SimPO's: the mean log-probability per token; no reference model)",
    "sum": "r = β · log π(y) (CPO's: the summed log-probability; no reference model)",
    "log-ratio": "r = β · log(π(y) / π_ref(y)) (DPO's: the log-ratio to the reference model)",
}
_LOGISTIC = ("simpo", "sigmoid")  # loss types whose link is −log σ

_TOKEN = re.compile(r"(--hub[_-]token[= ])\S+")  # of a command: a card is for everyone

# TRL's headings, between which ours are put; PEFT looks for them too
_PROCEDURE, _VERSIONS = "\n## Training procedure\n", "\n### Framework versions\n"


@dataclass(frozen=True)
class SetFacts:
    """A data set, as far as it was counted."""

    name: str  # train, eval, or its own among several evaluation sets
    pairs: int | None = None  # None of a stream
    score_columns: tuple[str, ...] = ()
    ties: int | None = None
    reversed: int | None = None
    flipped: int | None = None  # None where the data does not say
    factor: str | None = None  # the metric behind the evaluation factors, where a term reads them
    floored: int | None = None
    dropped: int | None = None


@dataclass(frozen=True)
class Image:
    """A picture beside the card."""

    file: str  # relative to the card
    title: str
    caption: str


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says beyond what TRL writes. Names are as they came: `completed` makes them harmless."""

    model_name: str
    model_id: str  # what loads it
    base_model: str | None
    dataset_name: str | None
    trained_with: str  # the method's name, or the trainer's
    version: str  # of trl_margins
    reward: str  # of `REWARDS`, or the name of another one
    losses: Mapping[str, float]  # loss type → its share
    method: Method | None = None
    weights: tuple[str, ...] = ()  # terms, by name; several multiply
    margins: tuple[str, ...] = ()  # several add
    gamma: float = 0.0  # the target margin of all pairs, in reward units
    settings: Sequence[tuple[str, Any]] = ()  # field or words → value
    sets: Sequence[SetFacts] = ()
    evaluations: Sequence[Evaluation] = ()
    reports: Sequence[EvaluationReport] = ()
    min_score_gap: float = 2.0
    last_step: int = 0
    best_step: int | None = None  # whose checkpoint is kept instead of the last step's
    best_by: str | None = None
    eval_dataset_name: str | None = None
    eval_split: str | None = None
    images: Sequence[Image] = ()
    reproduce: str = ""
    reproduce_language: str = "bash"
    adapter: str | None = None  # its kind: LoRA, …
    encoder_decoder: bool = False
    chat: bool = False  # whether the tokenizer has a chat template


def hub_id(name: str | None) -> str | None:
    """The name, if the Hub could know it by that."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or Path(name).exists() else name


def completed(written: ModelCard, facts: CardFacts) -> ModelCard:
    """TRL's card with all that the facts add.

    TRL's own sections stay (badges, versions, citations). The lines into which it puts names as they come are written
    anew.
    """
    before, heading, rest = written.text.rpartition(_PROCEDURE)
    procedure, versions_heading, versions = rest.partition(_VERSIONS)
    parts = [
        _head(facts),
        _quick_start(facts),
        _evaluation(facts),
        (heading if before else "").strip("\n"),
        "\n".join(line.rstrip() for line in procedure.splitlines() if line.strip()),
        _method(facts),
        _data(facts),
        _settings(facts),
        _pictures(facts),
        _reproduction(facts),
        versions_heading.strip("\n"),
        f"- trl-margins: {facts.version}\n{versions.strip()}",
        _further_citations(facts),
    ]
    card = ModelCard(written.content)
    card.text = f"\n{_joined(parts)}\n"
    card.data.model_name = facts.model_name
    card.data.base_model = hub_id(facts.base_model)
    card.data.datasets = hub_id(facts.dataset_name)
    card.data.tags = list(dict.fromkeys(["generated_from_trainer", *sorted(written.data.tags or [])]))
    card.data.eval_results = _results(facts) or None
    return card


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _results(facts: CardFacts) -> list[EvalResult]:
    name = facts.eval_dataset_name or facts.dataset_name
    return eval_results(
        facts.evaluations,
        facts.reports,
        facts.min_score_gap,
        facts.last_step if facts.best_step is None else facts.best_step,
        hub_id=hub_id(name),
        name=name and display_name(name),
        split=facts.eval_split,
    )


# What it is, and how to use it


def display_name(name: str) -> str:
    """A Hub id whole, of a path its last part: whose machine it was is nobody's business."""
    path = Path(name).expanduser()
    local = path.is_absolute() or name.startswith(".") or path.exists()
    return one_line(path.resolve().name if local and not hub_id(name) else name)


def _linked(name: str, kind: str = "") -> str:
    known = hub_id(name)
    return f"[{inline(name)}]({HUB}/{kind}{quote(known)})" if known else code(display_name(name))


def _head(facts: CardFacts) -> str:
    kind = "This model is a fine-tuned version of"
    if facts.adapter:
        kind = f"This is a {inline(facts.adapter)} adapter for"
    base = _linked(facts.base_model) if facts.base_model else "a model without a name"
    data = f", trained on the {_linked(facts.dataset_name, 'datasets/')} dataset" if facts.dataset_name else ""
    return (
        f"# Model Card for {inline(facts.model_name)}\n\n{kind} {base}{data}.\n"
        f"It has been trained with {inline(facts.trained_with)}, using "
        "[TRL](https://github.com/huggingface/trl) and trl-margins."
    )


def _quick_start(facts: CardFacts) -> str:
    model = python_text(one_line(facts.model_id))
    if facts.encoder_decoder:
        lines = [
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({model})",
            f"model = AutoModelForSeq2SeqLM.from_pretrained({model})",
            'inputs = tokenizer("What makes a good answer?", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0], skip_special_tokens=True))",
        ]
    else:
        question = '[{"role": "user", "content": "What makes a good answer?"}]'
        lines = [
            "from transformers import pipeline",
            "",
            f'generator = pipeline("text-generation", model={model}, device_map="auto")',
            f"question = {question}" if facts.chat else 'question = "What makes a good answer?"',
            'print(generator(question, max_new_tokens=128, return_full_text=False)[0]["generated_text"])',
        ]
    return "## Quick start\n\n" + fenced("\n".join(lines), "python")


# Results


def _evaluation(facts: CardFacts) -> str:
    parts = [_logged(facts), *map(_shown, _ranking(facts)), *map(_report, facts.reports)]
    return _joined(["## Evaluation", *parts]) if any(parts) else ""


def _ranking(facts: CardFacts) -> list[Image]:
    return [image for image in facts.images if Path(image.file).stem == "ranking"]


def _logged(facts: CardFacts) -> str:
    if not facts.evaluations:
        return ""
    labels = {
        "pwa": f"PWA, score gap ≥ {facts.min_score_gap:g}",
        "pwa_all": "PWA, all pairs",
        "spearman": "Spearman ρ",
        "n_pairs_gap": f"pairs with score gap ≥ {facts.min_score_gap:g}",
        "n_pairs": "pairs",
    }
    names = [name for name in labels if any(name in of.numbers for of in facts.evaluations)]
    rows = [
        [inline(of.name or "held-out pairs"), *(_number(of.numbers.get(name)) for name in names), str(of.step)]
        for of in facts.evaluations
    ]
    table = markdown_table(["evaluation set", *(labels[name] for name in names), "step"], rows)
    notes = []
    if not _ranking(facts):  # whose caption says it
        notes.append(
            "PWA is the share of pairs whose chosen answer has the higher reward; Spearman's ρ compares the rewards "
            "and the annotation scores of all answers in one pool."
        )
    if facts.best_step is not None:
        best_by = code(facts.best_by)
        notes.append(f"The model is that of step {facts.best_step} of {facts.last_step}, the best by {best_by}.")
    elif facts.last_step > max(of.step for of in facts.evaluations):
        notes.append(f"The model is that of step {facts.last_step}.")
    return _joined([table, " ".join(notes)])


def _report(report: EvaluationReport) -> str:
    sets = {inline(name): numbers for name, numbers in report.sets.items()}
    of_kind = {
        kind: {name: numbers for name, numbers in sets.items() if numbers["kind"] == kind}
        for kind in ("pairs", "listwise")
    }
    unit = "nats per token" if report.reward == "length-normalized" else "nats"
    parts = [f"With `trl-margins evaluate`, reward {code(report.reward)}; 95 % intervals in brackets:"]
    if of_kind["pairs"]:
        parts.append(pair_table(of_kind["pairs"], report.min_score_gap, unit))
    if of_kind["listwise"]:
        parts.append(listwise_table(of_kind["listwise"]))
    parts += [rm_bench_table(numbers) for numbers in sets.values() if numbers["kind"] == "rm-bench"]
    return _joined(parts)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


# How it was trained


def _method(facts: CardFacts) -> str:
    method, as_published = facts.method, _as_published(facts)
    parts = ["### Method"]
    if method and not method.paper.arxiv:  # TRL names papers that have an id
        parts.append(f"{inline(method.name)} is from *{inline(method.paper.title)}*.")
    parts.append(fenced(method.formula if as_published else _formula(facts), "text"))
    notes = [
        "w marks the chosen answer of a pair and l the rejected one; s is an annotation score, r a reward, "
        "σ the logistic function, B the pairs of a batch."
    ]
    notes += [f"The reward of an answer is {REWARDS.get(facts.reward, code(facts.reward))}."]
    if as_published and facts.reward != method.reward:
        notes.append("The formula is the paper's, with its own reward; here the gaps are those of this one.")
    if not as_published:
        notes += [
            f"Its {kind} is {f' {sign} '.join(_term(kind, name) for name in names)}."
            for kind, sign, names in (("weight_i", "·", facts.weights), ("margin_i", "+", facts.margins))
            if names
        ]
        if not facts.margins and facts.gamma:
            notes.append(f"γ = {facts.gamma:g} is the same for all pairs.")
    return _joined([*parts, " ".join(notes)])


def _as_published(facts: CardFacts) -> bool:
    method = facts.method
    if method is None or not set(facts.losses) <= set(_LOGISTIC):
        return False
    return (facts.weights, facts.margins) == (names_of(method.weight), names_of(method.margin))


def _formula(facts: CardFacts) -> str:
    """What is trained where no paper has the whole of it."""
    weight = "weight_i · " if facts.weights else ""
    margin = " − margin_i" if facts.margins else " − γ" if facts.gamma else ""
    losses = [
        f"{'' if share == 1 else f'{share:g} · '}"
        + (f"−log σ(r_w − r_l{margin})" if name in _LOGISTIC else f"{name}(r_w − r_l{margin})")
        for name, share in facts.losses.items()
    ]
    whole = " + ".join(losses)
    return f"loss = (1/B) Σ {weight}{f'[{whole}]' if weight and len(losses) > 1 else whole}"


def _owner(kind: str, name: str) -> Method | None:
    """Whose term it is."""
    return next((row for row in METHODS.values() if name in names_of(getattr(row, kind.removesuffix("_i")))), None)


def _term(kind: str, name: str) -> str:
    owner = _owner(kind, name)
    return f"{code(name)}, {inline(owner.name)}'s" if owner else code(name)


def _data(facts: CardFacts) -> str:
    columns = {
        "pairs": ("pairs", ""),
        "score_columns": ("scores from", ""),
        "ties": ("ties", "both answers have the same score"),
        "reversed": ("reversed", "the rejected answer has the higher score"),
        "flipped": ("flipped", "the label was swapped on purpose"),
        "factor": ("evaluation factor", "the likeness of the two answers, by this metric"),
        "floored": ("at the floor", "so unlike that the factor's floor stands for it"),
        "dropped": ("dropped", "the prompt alone fills the length limit, so the pair was not used"),
    }
    shown = [name for name in columns if any(getattr(of, name) not in (None, ()) for of in facts.sets)]
    if not shown:
        return ""
    rows = [[inline(of.name), *(_count(getattr(of, name)) for name in shown)] for of in facts.sets]
    table = markdown_table(["set", *(columns[name][0] for name in shown)], rows)
    legend = "; ".join(f"*{label}*: {meaning}" for label, meaning in (columns[name] for name in shown) if meaning)
    return _joined(["### Data", table, legend and f"Numbers are of pairs. {legend}."])


def _count(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(code, value)) or "–"
    return code(value) if isinstance(value, str) else "–" if value is None else f"{value:,}"


def _settings(facts: CardFacts) -> str:
    rows = [[code(name) if name.isidentifier() else inline(name), inline(value)] for name, value in facts.settings]
    table = markdown_table(["setting", "value"], rows).replace("-:|", "--|", 1)  # words read from the left
    return _joined(["### Hyperparameters", table]) if rows else ""


def _pictures(facts: CardFacts) -> str:
    images = [image for image in facts.images if image not in _ranking(facts)]
    return _joined(["### Pictures of the run", *map(_shown, images)]) if images else ""


def _shown(image: Image) -> str:
    return f"![{inline(image.title)}]({quote(image.file)})\n\n{inline(image.caption)}"


def _reproduction(facts: CardFacts) -> str:
    if not facts.reproduce:
        return ""
    told = _TOKEN.sub(r"\1…", facts.reproduce)
    return _joined(["### Reproduce", fenced(told, facts.reproduce_language)])


def _further_citations(facts: CardFacts) -> str:
    """The papers of terms that are not the method's: TRL cites one."""
    cited = {facts.method.paper.title} if facts.method else set()
    parts = []
    named = [*(("weight", name) for name in facts.weights), *(("margin", name) for name in facts.margins)]
    for kind, name in named:
        owner = _owner(kind, name)
        if owner and owner.paper.title not in cited:
            cited.add(owner.paper.title)
            parts.append(f"Cite {kind} {code(name)} as:\n\n{fenced(owner.paper.citation, 'bibtex')}")
    return _joined(parts)
