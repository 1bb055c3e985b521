"""The model card: TRL's, with method, data, settings, results and pictures of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..evaluation.tables import MEANING, report_tables
from ..methods import METHODS, Method, names_of
from ..printable import printable, shown
from ..tables import markdown_table
from . import markdown
from .card_results import Evaluation, EvaluationReport, eval_results
from .markdown import code, inline, one_line

TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
MADE_BY_A_RUN = "generated_from_trainer"  # the tag of such cards, also of other trainers

REWARDS: Mapping[str, str] = {
    "length-normalized": "r = β · log π(y) / |y| (SimPO's: the mean log-probability per token; no reference model)",
    "sum": "r = β · log π(y) (CPO's: the summed log-probability; no reference model)",
    "log-ratio": "r = β · log(π(y) / π_ref(y)) (DPO's: the log-ratio to the reference model)",
    "mean-log-ratio": "r = β · log(π(y) / π_ref(y)) / |y| (γ-DPO's: the log-ratio to the reference model per token)",
    "alphapo-token": "r = β · mean_t (1 − π(y_t)^−α) / α (AlphaPO's shape of each token; no reference model)",
    "log-odds": "r = β · log(p / (1 − p)), p = exp(log π(y) / |y|) (ORPO's log-odds; no reference model)",
}
_MANY = 0.01  # of an evaluation's pairs, trained on: its numbers are no measure of the model
_LOGISTIC = {"simpo", "sigmoid"}  # loss types whose link is −log σ

# the headings of TRL's card whose sections are taken over; PEFT looks for them too
_PROCEDURE, _VERSIONS = "\n## Training procedure\n", "\n### Framework versions\n"


def _counted(label: str, meaning: str = "", default: Any = None) -> Any:
    return field(default=default, metadata={"label": label, "meaning": meaning})


@dataclass(frozen=True)
class SetFacts:
    """What was counted in a data set. Metadata: the column in the card, and its meaning."""

    name: str  # train, eval, or one of several evaluation sets
    pairs: int | None = _counted("pairs")
    score_columns: tuple[str, ...] = _counted("scores from", default=())
    ties: int | None = _counted("ties", "both completions have the same score")
    reversed: int | None = _counted("reversed", "the rejected completion has the higher score")
    flipped: int | None = _counted("flipped", "the label was swapped on purpose")
    factor: str | None = _counted("evaluation factor", "the similarity of the two completions, by this metric")
    floored: int | None = _counted("at the floor", "so different that the factor's floor replaces it")
    filtered: int | None = _counted("filtered", "the score gap is below the hard filter's threshold: not used")
    dropped: int | None = _counted("dropped", "the prompt alone fills the length limit, so the pair was not used")
    clear: int | None = None  # with a score gap of at least `eval_min_score_gap`; not in the card
    shared_pairs: int | None = None  # with the training set; not in the card
    shared_prompts: int | None = None  # the same

    @property
    def trained_on(self) -> float:
        """The share of its pairs that the training set has, too."""
        return (self.shared_pairs or 0) / (self.pairs or 1)


@dataclass(frozen=True)
class Image:
    """A picture beside the card."""

    file: str  # relative to the card
    title: str
    caption: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond TRL's. Names are unescaped: the template escapes them."""

    model_name: str
    model_id: str  # loads the model
    base_model: str | None
    dataset_name: str | None
    trained_with: str  # name of the method or of the trainer
    version: str  # of trl_margins
    reward: str  # of `REWARDS`, or another name
    losses: Mapping[str, float]  # loss type → its share
    method: Method | None = None
    weights: tuple[str, ...] = ()  # names of the terms; several multiply
    margins: tuple[str, ...] = ()  # several add
    gamma: float = 0.0  # the target margin of all pairs, in reward units
    settings: Sequence[tuple[str, Any]] = ()  # field, or words, and value
    sets: Sequence[SetFacts] = ()
    evaluations: Sequence[Evaluation] = ()
    trained_on: Mapping[str, float] = field(default_factory=dict)  # their shares of pairs that were trained on
    reports: Sequence[EvaluationReport] = ()
    min_score_gap: float = 2.0
    last_step: int = 0
    best_step: int | None = None  # of the checkpoint that was loaded at the end
    best_by: str | None = None
    eval_dataset_name: str | None = None
    eval_split: str | None = None
    images: Sequence[Image] = ()
    reproduce: str = ""
    reproduce_language: str = "bash"
    license: Mapping[str, str] = field(default_factory=dict)  # of the base model, in the Hub's words; {} if unknown
    adapter: str | None = None  # its kind, such as LoRA
    task: str | None = "text-generation"  # transformers' pipeline that loads the model; None if there is none
    chat: bool = False  # whether the tokenizer has a chat template

    @property
    def is_as_published(self) -> bool:
        """Whether the formula of the method holds."""
        if self.method is None:
            return False
        own = {*names_of(self.method.loss or self.method.defaults.get("loss_type", ())), "sft"}
        if not self.losses.keys() <= _LOGISTIC | own:
            return False
        return (self.weights, self.margins) == (names_of(self.method.weight), names_of(self.method.margin))

    @property
    def formula(self) -> str:
        """The method's, or the combination where no paper has it."""
        if self.method and self.is_as_published:
            return self.method.formula
        weight = "weight_i · " if self.weights else ""
        margin = " − margin_i" if self.margins else " − γ" if self.gamma else ""
        losses = [
            ("" if share == 1 else f"{share:g} · ")
            + ("−log σ" if name in _LOGISTIC else name)
            + f"(r_w − r_l{margin})"
            for name, share in self.losses.items()
        ]
        whole = " + ".join(losses)
        return f"loss = (1/B) Σ {weight}{f'[{whole}]' if weight and len(losses) > 1 else whole}"


def hub_id(name: str | None) -> str | None:
    """The name, if it can be an id on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or Path(name).exists() else name


def display_name(name: str) -> str:
    """A Hub id as a whole, and the last part of a path: the folders of a machine are private."""
    path = Path(name).expanduser()
    local = path.is_absolute() or name.startswith(".") or path.exists()
    return one_line(path.resolve().name if local and not hub_id(name) else name)


def completed(written: ModelCard, facts: CardFacts) -> ModelCard:
    """TRL's card with the facts added.

    TRL's badges, versions and citations stay. Its lines with unescaped names are written anew.
    """
    procedure, _, versions = written.text.rpartition(_PROCEDURE)[2].partition(_VERSIONS)
    name = facts.eval_dataset_name or facts.dataset_name
    step = facts.last_step if facts.best_step is None else facts.best_step
    on_the_hub = hub_id(name), name and display_name(name), facts.eval_split
    metadata = written.data.to_dict()
    metadata.pop("licence", None)  # TRL's placeholder, which the Hub does not know
    of_license = {key: printable(value) for key, value in facts.license.items()}  # of another's card
    data = ModelCardData(**{**metadata, **of_license})
    data.pipeline_tag = facts.task
    tags = sorted(data.tags or [])
    data.model_name, data.base_model, data.datasets = (
        printable(facts.model_name),
        hub_id(facts.base_model),
        hub_id(facts.dataset_name),
    )
    data.tags = list(dict.fromkeys([MADE_BY_A_RUN, *tags]))
    evaluations = [each for each in facts.evaluations if facts.trained_on.get(each.name, 0) < _MANY]
    data.eval_results = eval_results(evaluations, facts.reports, facts.min_score_gap, step, *on_the_hub) or None
    counts = [
        f for f in fields(SetFacts) if f.metadata and any(getattr(of, f.name) not in (None, ()) for of in facts.sets)
    ]
    ranking = [image for image in facts.images if Path(image.file).stem == "ranking"]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        meaning=MEANING,
        procedure="\n".join(line.rstrip() for line in procedure.splitlines() if line.strip()),
        versions=versions.strip(),
        ranking=ranking,
        pictures=[image for image in facts.images if image not in ranking],
        logged=_logged(facts),
        tables=[
            report_tables({inline(k): v for k, v in each.sets.items()}, each.min_score_gap, each.reward, bins=False)
            for each in facts.reports
        ],
        reward=REWARDS.get(facts.reward, code(facts.reward)),
        terms=[
            {"kind": kind, "name": name, "owner": _owner(kind, name)}
            for kind, names in (("weight", facts.weights), ("margin", facts.margins))
            for name in names
        ],
        counts=[f.metadata for f in counts],
        count_table=markdown_table(
            ["set", *(f.metadata["label"] for f in counts)],
            [[inline(of.name), *(_cell(getattr(of, f.name)) for f in counts)] for of in facts.sets],
        ),
        reproduce=facts.reproduce,
        linked=_linked,
        quote=quote,
        **{name: getattr(markdown, name) for name in ("code", "fenced", "inline", "one_line", "python_text")},
    )
    return ModelCard(shown(card.content))  # a card is public


def _linked(name: str, kind: str = "") -> str:
    known = hub_id(name)
    return f"[{inline(name)}](https://huggingface.co/{kind}{quote(known)})" if known else code(display_name(name))


def _owner(kind: str, name: str) -> Method | None:
    """The method that a term is from."""
    return next((row for row in METHODS.values() if name in names_of(getattr(row, kind))), None)


def _logged(facts: CardFacts) -> str:
    """The table of logged evaluations."""
    labels = {
        "pwa": f"PWA, score gap ≥ {facts.min_score_gap:g}",
        "pwa_all": "PWA, all pairs",
        "spearman": "Spearman ρ",
        "n_pairs_gap": f"pairs with score gap ≥ {facts.min_score_gap:g}",
        "n_pairs": "pairs",
    }
    names = [name for name in labels if any(name in of.numbers for of in facts.evaluations)]
    rows = [
        [
            inline(of.name or "evaluation pairs") + _trained_on(facts.trained_on.get(of.name, 0)),
            *(_cell(of.numbers.get(name)) for name in names),
            str(of.step),
        ]
        for of in facts.evaluations
    ]
    return markdown_table(["evaluation set", *(labels[name] for name in names), "step"], rows)


def _trained_on(share: float) -> str:
    if not share:
        return ""
    return ", trained on" if share == 1 else f", {min(100 * share, 99.9):.3g} % trained on"


def _cell(value: Any) -> str:
    if value in (None, ()):
        return "–"
    if isinstance(value, str | tuple):
        return ", ".join(map(code, value)) if isinstance(value, tuple) else code(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
