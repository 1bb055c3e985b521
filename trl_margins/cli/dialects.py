"""YAML of alignment-handbook, SimPO, γ-PO, AMaPO and older TRL in today's words.

`ROWS` is the table: one row a key. Everything here is a pure function from dict to dict and loads nothing heavy.
What a row says of another project's code was read in that code: huggingface/alignment-handbook, princeton-nlp/SimPO,
sunjie279/gammaPO, Shiroha-Offical/AMaPO.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

Settings = dict[str, Any]

_DATA_KEYS = ("dataset_name", "datasets", "dataset_mixer", "dataset_mixture")
# Of preference recipes alone: a file with one of them that names no method is another project's
_RECIPE_KEYS = ("dataset_mixer", "dataset_mixture", "dataset_splits", "max_prompt_length", "preprocessing_num_workers")
_OWN_KEYS = ("method", "base", "weight", "margin", "reward")
_SIMPO_KEYS = ("gamma_beta_ratio", "gamma", "simpo_gamma", "sft_weight")
_AMAPO_KEYS = ("length_norm", "margin_norm", "mode_weight")
_DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
_GAMMA_PO_LOSSES = ("gm-simpo", "b-simpo", "gm-dpo", "b-dpo", "dpo", "r-dpo", "kto", "cpo", "orpo")


@dataclass(frozen=True)
class Note:
    """What became of one key: a line of the log, and a comment of the converted file."""

    key: str
    text: str
    fields: tuple[str, ...] = ()  # today's that say it

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


@dataclass(frozen=True)
class Dialect:
    """Whose words a file has, and what its silence means."""

    whose: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # method, base, and what else makes its loss
    unsaid: Mapping[str, Any] = field(default_factory=dict)  # what its code takes where the file has no word


# transformers' TrainingArguments and SimPO's config on top; where today's defaults, TRL's or a paper's, are others
_SIMPO_UNSAID: Mapping[str, Any] = {
    "beta": 2.0,
    "max_length": 512,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "bf16": False,
}
_SIMPO = {"method": "none", "base": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0}
_ORPO = "TRL does, in trl.experimental.orpo"
OURS = Dialect("this package")


@dataclass(frozen=True)
class File:
    """What a row may look at beside its own value."""

    written: Mapping[str, Any]
    dialect: Dialect
    method: str | None  # None: not named, neither in the file nor by a flag
    base: str

    @property
    def whose(self) -> str:
        return self.dialect.whose


Changed = tuple[Settings, str]  # today's fields, and why or what else; None: the key is today's already
Change = Callable[[Any, File], Changed | None]


@dataclass(frozen=True)
class Row:
    """One key of another project."""

    key: str
    becomes: str  # today's fields; "" where the key has no meaning any more
    change: Change

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.becomes.split(", ")) if self.becomes else ()


def translate(
    written: Mapping[str, Any], method: str | None = None, base: str | None = None
) -> tuple[Settings, list[Note]]:
    """A file's settings in today's words. Settings that are today's already come back as they are, without notes.

    Args:
        written: the YAML.
        method: what `--method` says, if anything: the file's own objective then does not count.
        base: what `--base` says.

    Raises:
        ValueError: two keys that say the same and differ, a value without a meaning, an objective that the package
            does not have.
    """
    _check_one_data_set(written)
    dialect = _dialect(written) if method is None else OURS
    file = File(
        written,
        dialect,
        method or written.get("method") or dialect.settings.get("method"),
        base or written.get("base") or dialect.settings.get("base") or "cpo",
    )
    settings: Settings = {}
    notes: list[Note] = []
    said_by: dict[str, str] = {}
    for key, value in written.items():
        changed = _changed(key, value, file)
        if changed is not None:
            notes.append(Note(key, _line(value, *changed), tuple(changed[0])))
        for name, new in ({key: value} if changed is None else changed[0]).items():
            _check_same(name, settings.get(name), new, said_by.get(name), key, written)
            if settings.get(name) is None:
                settings[name], said_by[name] = new, key
    if dialect.settings:
        chosen = {name: value for name, value in dialect.settings.items() if name not in settings}
        settings = {**chosen, **settings}
        notes.insert(0, Note("method", f"not named; {dialect.whose} by its keys → {_said(chosen)}", tuple(chosen)))
    elif notes and file.method is None:
        notes.insert(0, Note("method", "not named, and no other project's objective: the default"))
    return _with_unsaid(settings, notes, dialect)


def check_known(settings: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuses keys that neither a field nor the table has.

    Raises:
        ValueError: naming each, with the nearest known one.
    """
    known = set(known)
    candidates = [*known, *ROWS]
    unknown = [name for name in settings if name not in known]
    if not unknown:
        return
    complaints = []
    for name in unknown:
        nearest = difflib.get_close_matches(str(name), candidates, n=1)
        complaints.append(f"{name!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    raise ValueError(f"{where}: unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(complaints)}")


def _changed(key: str, value: Any, file: File) -> Changed | None:
    row = ROWS.get(key)
    if row is None or (value is None and key in row.fields):
        return None
    if value is None and key != "torch_dtype":
        return {}, "nothing: as if not said"
    return row.change(value, file)


def _with_unsaid(settings: Settings, notes: list[Note], dialect: Dialect) -> tuple[Settings, list[Note]]:
    for name, value in dialect.unsaid.items():
        if settings.get(name) is None and not (name == "gamma_beta_ratio" and "simpo_gamma" in settings):
            settings[name] = value
            notes.append(Note(name, f"not said → {value}, the default of {dialect.whose}'s code", (name,)))
    return settings, notes


def _line(value: Any, fields: Settings, why: str) -> str:
    if not fields:
        return f"{_short(value)} → {why}"
    return f"{_short(value)} → {_said(fields)}" + (f" ({why})" if why else "")


def _said(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_short(value)}" for name, value in fields.items())


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _check_same(name: str, old: Any, new: Any, by: str | None, key: str, written: Mapping[str, Any]) -> None:
    if old is not None and new is not None and old != new:
        raise ValueError(
            f"{by}: {_short(written[by])} and {key}: {_short(written[key])} both set {name}, and differ: leave one out"
        )


def _check_one_data_set(written: Mapping[str, Any]) -> None:
    named = [key for key in _DATA_KEYS if written.get(key)]
    if len(named) > 1 and named != ["dataset_name", "datasets"]:  # of those TRL has its own order
        raise ValueError(f"{' and '.join(named)} both say what to train on: leave one out")


# Whose file it is ----------------------------------------------------------------------------------------------------


def _dialect(written: Mapping[str, Any]) -> Dialect:
    """A file that names no method tells by its other keys what it trains."""
    if any(written.get(key) is not None for key in _OWN_KEYS):
        return OURS
    loss = written.get("loss_type")
    recipe = any(key in written for key in _RECIPE_KEYS)
    if "trainer_type" in written or loss in _GAMMA_PO_LOSSES:
        return _gamma_po(written)
    if loss is None and recipe and _called_orpo(written):
        raise _no_such_method("an ORPO recipe, by its name", "ORPO", _ORPO)
    if loss == "simpo" or (recipe and any(key in written for key in _SIMPO_KEYS)):
        if loss not in (None, "simpo", "sigmoid"):
            raise _no_such_method(f"loss_type: {loss} beside SimPO's γ", f"SimPO with {loss}")
        return Dialect("SimPO", _SIMPO, {**_SIMPO_UNSAID, "gamma_beta_ratio": 0.25} if recipe else {})
    if any(key in written for key in _AMAPO_KEYS):
        return _amapo(written)
    if recipe or isinstance(loss, list) or loss in _DPO_LOSSES:  # of CPO's losses there is one
        return Dialect("a DPO recipe", {"method": "none", "base": "dpo"})
    return OURS


def _gamma_po(written: Mapping[str, Any]) -> Dialect:
    trainer, loss = str(written.get("trainer_type") or "simpo"), str(written.get("loss_type") or "dpo")
    normalized = written.get("length_norm", True)
    said = f"trainer_type: {trainer} with loss_type: {loss}"
    if loss == "orpo":
        raise _no_such_method(said, "ORPO", _ORPO)
    if loss in ("b-simpo", "b-dpo"):
        raise _no_such_method(said, f"β-DPO's plug-in on {'SimPO' if loss == 'b-simpo' else 'DPO'}")
    if (trainer, loss) == ("dpo", "gm-dpo") and normalized:
        raise _no_such_method(f"{said} and length_norm: true", "γ-PO on averaged log-ratios", "on summed ones it has")
    losses: dict[tuple[str, str], Mapping[str, Any]] = {
        ("simpo", "gm-simpo"): {"method": "gamma-po", "base": "cpo"},
        ("simpo", "simpo"): _SIMPO,
        ("dpo", "gm-dpo"): {"method": "gamma-po", "base": "dpo", "loss_type": "sigmoid", "reward": "log-ratio"},
        ("dpo", "dpo"): {"method": "none", "base": "dpo", "loss_type": "sigmoid_norm" if normalized else "sigmoid"},
    }
    if (trainer, loss) not in losses:
        raise _no_such_method(said, "such a loss")
    unsaid = dict(_SIMPO_UNSAID)
    if loss != "dpo":
        unsaid["gamma_beta_ratio"] = 0.25
    if loss.startswith("gm-"):
        unsaid["gamma_po_tau"] = 1.0
    return Dialect("γ-PO", losses[trainer, loss], unsaid)


def _amapo(written: Mapping[str, Any]) -> Dialect:
    if written.get("loss_type", "sigmoid") != "sigmoid":
        raise _no_such_method(f"loss_type: {written['loss_type']} beside AMaPO's keys", "such a loss")
    summed = {"loss_type": "sigmoid"} if written.get("length_norm") is False else {}
    return Dialect("AMaPO", {"method": "amapo", "base": "cpo", **summed}, _SIMPO_UNSAID)


def _called_orpo(written: Mapping[str, Any]) -> bool:
    """ORPO recipes differ from DPO's in no key."""
    names = (str(written.get(key, "")) for key in ("output_dir", "run_name", "hub_model_id"))
    return any(re.search(r"(?<![a-z])orpo(?![a-z])", name.lower()) for name in names)


def _no_such_method(said: str, what: str, instead: str = "") -> ValueError:
    from ..methods import METHODS

    return ValueError(
        f"{said}: this package does not have {what}{f' ({instead})' if instead else ''}. Its methods are "
        f"{', '.join(METHODS)}, and none for TRL's own CPO and DPO losses: --method NAME --base cpo (or dpo) trains "
        "this file's model on its data with one of them."
    )


# How values change ---------------------------------------------------------------------------------------------------


def _to(name: str, why: str = "") -> Change:
    return lambda value, file: ({name: value}, why)


def _gone(why: str) -> Change:
    return lambda value, file: ({}, f"nothing: {why}")


def _said_by(others: str) -> Change:
    return lambda value, file: ({}, f"said by {others}")


def _torch_dtype(value: Any, file: File) -> Changed:
    if value is None:
        return {"dtype": "float32"}, "what null was in transformers 4; in 5 it is the checkpoint's own"
    return {"dtype": str(value).removeprefix("torch.")}, ""


def _warmup_ratio(value: Any, file: File) -> Changed:
    if not (_is_number(value) and 0 <= value < 1):
        raise ValueError(f"warmup_ratio: {_short(value)} is no share of all steps: at least 0 and below 1")
    return {"warmup_steps": value}, "below 1 it is a share of all steps"


def _max_prompt_length(value: Any, file: File) -> Changed:
    return {}, (
        "nothing: TRL cuts no prompt any more, prompt and answer together lose their end at max_length; a pair whose "
        "prompt fills it is dropped"
    )


def _truncation_mode(value: Any, file: File) -> Changed | None:
    if file.base == "dpo" and (value == "keep_start" or not file.dialect.settings):
        return None
    return {}, "nothing: it said which end of a prompt to keep, and TRL cuts no prompt any more"


def _max_target_length(value: Any, file: File) -> Changed:
    if file.base == "cpo":
        return {"max_completion_length": value}, "for encoder-decoder models"
    return {}, "nothing: the DPO base takes no encoder-decoder models"


def _strategy(name: str) -> Change:
    """YAML reads a bare `no` as false."""

    def change(value: Any, file: File) -> Changed | None:
        return None if value is not False else ({name: "no"}, "YAML reads a bare no as false")

    return change


def _evaluation_strategy(value: Any, file: File) -> Changed:
    return {"eval_strategy": "no" if value is False else value}, ""


def _length_norm(value: Any, file: File) -> Changed:
    """Whether a log-probability is the mean over an answer's tokens, or their sum."""
    if file.whose == "γ-PO" and file.base == "cpo":
        return {}, "nothing: its SimPO trainer never reads it, and takes means, as here"
    if "loss_type" in file.dialect.settings:
        return {}, "said by loss_type"
    if file.dialect.settings:
        return {}, "said by method, which takes means"
    if file.base == "dpo":
        return {"reward": "length-normalized" if value else "log-ratio"}, ""
    return {"loss_type": "simpo" if value else "sigmoid"}, "of CPO's losses, that of means" if value else "of sums"


def _gamma_beta_ratio(value: Any, file: File) -> Changed | None:
    if file.whose == "γ-PO" and file.method == "none" and file.base == "dpo":
        return {}, "nothing: DPO's loss never reads it"
    return None


def _tau(value: Any, file: File) -> Changed:
    if file.method == "gamma-po":
        return {"gamma_po_tau": value}, ""
    return {}, "nothing: only γ-PO's loss reads it"


def _sft_weight(value: Any, file: File) -> Changed:
    if file.whose == "AMaPO":
        return {}, "nothing: AMaPO's trainer returns its loss without it"
    if file.base == "dpo":
        return {}, "nothing: only SimPO's trainer reads it"
    return {"cpo_alpha": value}, "weight of the chosen answers' log-likelihood"


def _flip(value: Any, file: File) -> Changed:
    if value:
        raise ValueError(
            f"flip: {value} turns whole batches' losses around at random, which the package does not do: "
            f"noise: random:{value} flips that share of the pairs"
        )
    return {}, "nothing: no labels are flipped"


def _loss_type(value: Any, file: File) -> Changed | None:
    chosen = file.dialect.settings
    if value in _GAMMA_PO_LOSSES:
        return {}, "said by method" if chosen else "nothing: another method was chosen"
    if value == "sigmoid" and file.whose in ("SimPO", "AMaPO"):
        return {}, "said by method"
    return None


def _use_flash_attention_2(value: Any, file: File) -> Changed:
    return ({"attn_implementation": "flash_attention_2"}, "") if value else ({}, "nothing: the default")


def _ref_model_init_kwargs(value: Any, file: File) -> Changed:
    if value and value != file.written.get("model_init_kwargs"):
        raise ValueError(
            "ref_model_init_kwargs: the reference model is loaded as the policy is, with model_init_kwargs; leave it "
            "out"
        )
    return {}, "nothing: the reference model is loaded as the policy is"


def _group_by_length(value: Any, file: File) -> Changed:
    return ({"train_sampling_strategy": "group_by_length"}, "") if value else ({}, "nothing: the default")


def _dataset_mixer(value: Any, file: File) -> Changed:
    """{name: fraction}: the first rows of each set's training splits, and its whole test split."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"dataset_mixer: {_short(value)} is no mapping from data sets to fractions")
    fractions = {name: _fraction(f"dataset_mixer: {name}", share) for name, share in value.items()}
    configs = file.written.get("dataset_configs") or [None] * len(fractions)
    if len(configs) != len(fractions):
        raise ValueError(f"dataset_configs has {len(configs)} names for {len(fractions)} sets in dataset_mixer")
    train, test = _mixer_splits(file.written.get("dataset_splits") or ["train", "test"])
    tested = {"dataset_test_split": test} if test else {}
    parts = [
        {"path": name, **({"name": config} if config else {}), "split": split}
        for name, config in zip(fractions, configs, strict=True)
        for split in train
    ]
    shares = [float(share) for share in fractions.values() for _ in train]
    unread = _unread_by_the_mixer(file)
    if len(parts) == 1 and shares == [1.0]:
        return {**_one_set(parts[0]), **tested}, unread
    weighted = {} if set(shares) == {1.0} else {"mixture_weights": shares}
    return {"datasets": parts, **weighted, **tested}, unread


def _mixer_splits(splits: Any) -> tuple[list[str], str | None]:
    splits = [splits] if isinstance(splits, str) else list(splits)
    train = [split for split in splits if "train" in split]
    test = [split for split in splits if "train" not in split and "test" in split]
    if strange := [split for split in splits if "train" not in split and "test" not in split]:
        raise ValueError(f"dataset_splits: {strange[0]!r} has neither train nor test in its name")
    if not train or len(test) > 1:
        raise ValueError(f"dataset_splits: {splits} must name at least one training split and at most one for tests")
    return train, test[0] if test else None


def _unread_by_the_mixer(file: File) -> str:
    """What the old scripts did to rows on their own account."""
    said = []
    if "auto_insert_empty_system_msg" not in file.written:
        said.append("rows as they are: the old script put an empty system message where the chat template knows one")
    model = str(file.written.get("model_name_or_path", ""))
    if file.whose in ("SimPO", "γ-PO", "AMaPO") and "mistral" in model.lower():
        said.append("and models called mistral keep their chat template, where it set one of its own")
    return ", ".join(said)


def _dataset_mixture(value: Any, file: File) -> Changed:
    """{datasets: [{id, config, split, columns, weight}], seed, test_split_size}: random rows of each set, mixed."""
    _check_keys(value, "dataset_mixture", ("datasets", "seed", "test_split_size"))
    if not isinstance(value.get("datasets"), list) or not value["datasets"]:
        raise ValueError("dataset_mixture: datasets is no list of data sets")
    parts, shares = [], []
    for number, entry in enumerate(value["datasets"], 1):
        where = f"dataset_mixture: set {number}"
        _check_keys(entry, where, ("id", "config", "split", "columns", "weight"))
        if not entry.get("id"):
            raise ValueError(f"{where} has no id")
        share = entry.get("weight")
        shares.append(float(_fraction(f"{where}, weight", 1.0 if share is None else share)))
        part = {"path": entry["id"], "name": entry.get("config"), "split": entry.get("split", "train")}
        parts.append({name: kept for name, kept in {**part, "columns": entry.get("columns")}.items() if kept})
    if len({frozenset(part["columns"]) for part in parts if "columns" in part}) > 1:
        raise ValueError("dataset_mixture: all sets must name the same columns")
    size = value.get("test_split_size")
    if len(parts) == 1 and shares == [1.0] and size is None and "columns" not in parts[0]:
        return _one_set(parts[0]), ""
    weighted = {} if set(shares) == {1.0} else {"mixture_weights": shares}
    split = {} if size is None else {"test_split_size": size}
    return {"datasets": parts, **weighted, "mixture_seed": value.get("seed") or 0, **split}, ""


def _one_set(part: Mapping[str, Any]) -> Settings:
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    return {today: part[name] for name, today in names.items() if name in part}


def _fraction(what: str, share: Any) -> float:
    if not (_is_number(share) and 0 <= share <= 1):
        raise ValueError(f"{what}: {_short(share)} is no fraction of its rows: at least 0 and at most 1")
    return share


def _check_keys(value: Any, where: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {_short(value)} is no mapping with {', '.join(known)}")
    check_known(value, known, where)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _with_mixer(value: Any, file: File) -> Changed:
    if "dataset_mixer" not in file.written:
        raise ValueError("dataset_splits and dataset_configs go with dataset_mixer, which is not there")
    return {}, "said by dataset_mixer"


_TABLE = (
    # model
    Row("torch_dtype", "dtype", _torch_dtype),
    Row("use_flash_attention_2", "attn_implementation", _use_flash_attention_2),
    Row("model_code_revision", "", _gone("transformers loads code and weights of one model_revision")),
    Row("base_model_revision", "", _gone("an adapter's base is loaded at its main revision")),
    Row("ref_model_init_kwargs", "", _ref_model_init_kwargs),
    # data
    Row(
        "dataset_mixer",
        "dataset_name, dataset_train_split, dataset_test_split, datasets, mixture_weights",
        _dataset_mixer,
    ),
    Row("dataset_splits", "dataset_train_split, dataset_test_split", _with_mixer),
    Row("dataset_configs", "dataset_config", _with_mixer),
    Row("dataset_mixture", "datasets, mixture_weights, mixture_seed, test_split_size, dataset_name", _dataset_mixture),
    Row("preprocessing_num_workers", "dataset_num_proc", _to("dataset_num_proc")),
    Row("auto_insert_empty_system_msg", "", _gone("rows are used as they are, without an empty system message")),
    Row("text_column", "", _gone("only pretraining on plain text read it")),
    Row("decontaminate", "", _gone("rows are used as they are: decontaminate the data set before")),
    Row("max_seq_length", "max_length", _to("max_length")),
    Row("max_prompt_length", "", _max_prompt_length),
    Row("max_target_length", "max_completion_length", _max_target_length),
    Row("truncation_mode", "", _truncation_mode),
    Row("truncation_side", "", _gone("prompt and answer lose their end at max_length")),
    Row("label_pad_token_id", "", _gone("TRL masks with -100")),
    Row("padding_value", "", _gone("TRL pads with the tokenizer's padding token")),
    # objective
    Row("trainer_type", "method, base", _said_by("method and base")),
    Row("loss_type", "method, base, loss_type", _loss_type),
    Row("length_norm", "loss_type, reward", _length_norm),
    Row("gamma_beta_ratio", "gamma_beta_ratio", _gamma_beta_ratio),
    Row("gamma", "simpo_gamma", _to("simpo_gamma", "SimPO's first form of γ, β in it")),
    Row("tau", "gamma_po_tau", _tau),
    Row("sft_weight", "cpo_alpha", _sft_weight),
    Row("margin_norm", "", _gone("AMaPO's trainer never reads it")),
    Row("mode_weight", "", _gone("AMaPO's trainer never reads it")),
    Row("flip", "noise", _flip),
    # training
    Row("warmup_ratio", "warmup_steps", _warmup_ratio),
    Row("evaluation_strategy", "eval_strategy", _evaluation_strategy),
    Row("eval_strategy", "eval_strategy", _strategy("eval_strategy")),
    Row("save_strategy", "save_strategy", _strategy("save_strategy")),
    Row("logging_strategy", "logging_strategy", _strategy("logging_strategy")),
    Row("group_by_length", "train_sampling_strategy", _group_by_length),
    Row("overwrite_output_dir", "", _gone("a run starts anew unless resume_from_checkpoint is set")),
    Row("save_safetensors", "", _gone("transformers saves nothing else")),
    Row("logging_dir", "", _gone("transformers 5 reads the environment variable TENSORBOARD_LOGGING_DIR")),
    Row("hub_model_revision", "hub_revision", _to("hub_revision")),
    Row("push_to_hub_revision", "push_to_hub", _to("push_to_hub")),
)
ROWS: Mapping[str, Row] = {row.key: row for row in _TABLE}
