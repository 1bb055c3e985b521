"""Config migration: YAML for alignment-handbook, SimPO, γ-PO, AMaPO or an older TRL becomes the package's own.

Pure functions from dict to dict that load nothing heavy. What is said of another project's code was read there:
huggingface/alignment-handbook, princeton-nlp/SimPO, sunjie279/gammaPO, junkangwu/alpha-DPO, Shiroha-Offical/AMaPO; for
objectives that are told by their `loss_type` or name, see `trainers/elsewhere.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from ..trainers.elsewhere import ELSEWHERE, elsewhere
from .config_file import Settings, check_known
from .dpo_forks import flattened, is_dpo_fork
from .other_keys import DROPPED, FOREIGN, OF_TRL, OLDER, ONE_BASE, RENAMED

_DATA_KEYS = ("dataset_name", "datasets", "dataset_mixer", "dataset_mixture")
# a file with one of these that names no method is another project's preference recipe
_RECIPE_KEYS = ("dataset_mixer", "dataset_mixture", "dataset_splits", "max_prompt_length", "preprocessing_num_workers")
_OWN_KEYS = ("method", "base", "weight", "margin", "reward")
# of an older transformers, that are not false
_OLD_DEFAULTS = {"half_precision_backend": "auto", "fp16_backend": "auto", "fp16_opt_level": "O1"}
OLD_KEYS = frozenset({*RENAMED, *DROPPED})
_TRL = {"cpo": "TRL's CPOTrainer", "dpo": "TRL's DPOTrainer"}
_OURS, _FLAGS = "this package", "the command line"  # whose the objective is
_SIMPO_KEYS = ("gamma_beta_ratio", "gamma", "sft_weight")
_AMAPO_KEYS = ("length_norm", "margin_norm", "mode_weight")
_CPO_LOSSES, _SHARED_LOSSES = ("simpo", "alphapo"), (None, "sigmoid", "hinge", "ipo")  # of CPO alone, of both bases
_GAMMA_PO_LOSSES = ("gm-simpo", "b-simpo", "gm-dpo", "b-dpo", "dpo", "cpo")
_ALPHA_DPO_LOSSES = ("alpha-dpo", "rDPO")
_SMOOTHED = ("sigmoid", "sigmoid_norm")  # on DPO, in an older TRL


def _own_base(method: Any) -> str:
    from ..registry import base_of  # it loads the terms

    try:
        return base_of(None if method == "none" else method or "gappo")
    except ValueError:  # an unknown method, of which train tells
        return "cpo"


# words of a name that count beside a `loss_type`: objectives whose own files say another's
_WORDS_BESIDE: Mapping[Any, frozenset[str]] = {"sigmoid": frozenset(("sppo", "wpo")), "rpo": frozenset(("sppo",))}
_OTHERS = {"cpo", "simpo", *(each.word for each in ELSEWHERE)} - {None}
_SFT_KEYS = ("max_seq_length", "packing", "dataset_text_field", "text_column", "assistant_only_loss")
_OF_ANOTHER_OBJECTIVE = frozenset({*_SFT_KEYS, *(key for each in ELSEWHERE for key in each.keys)})
# what a baseline is made of: with one on the command line, a file's own say nothing
_OBJECTIVE_KEYS = frozenset(
    ("loss_type", "loss_weights", "rpo_alpha", "cpo_alpha", "sft_weight", "use_weighting", "length_norm", "ln")
)
_WITHOUT_BETA = ("rrhf", "simper")  # where it would scale the loss, or nothing
_TARGETS = frozenset(("gamma_beta_ratio", "gamma", "simpo_gamma"))
_FORKS = ("γ-PO", "α-DPO")  # of SimPO's code, with several losses
_GREEK = "alpha|beta|gamma|delta|epsilon|eta|kappa|lambda|mu|nu|phi|psi|rho|sigma|tau|theta|omega|xi|zeta"
# names of objectives that end in a word of their own: beta-dpo, r-dpo, but not llama-7b-dpo
_KIND_OF_DPO = re.compile(
    rf"(?<![a-z0-9])(?:{_GREEK}|adaptive|cal|conservative|dr|focal|margin|robust|soft|token|weighted|[a-z])[-_]dpo"
    "(?![a-z])"
)

_DPO = {"method": "none", "base": "dpo"}
_SIMPO = {"method": "none", "base": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0}
# defaults of the configs of TRL's CPO, DPO and ORPO trainers
_TRL_DEFAULTS: Mapping[str, Any] = {
    "beta": 0.1,
    "max_length": 1024,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}
# and of SimPO's own config, with transformers' TrainingArguments under it
_SIMPO_DEFAULTS: Mapping[str, Any] = {
    **_TRL_DEFAULTS,
    "beta": 2.0,
    "max_length": 512,
    "learning_rate": 5e-5,
    "bf16": False,
}

Changed = tuple[Settings, str]  # today's settings, and a remark


@dataclass(frozen=True)
class Note:
    """What happened to one key: a line of the log, and a comment in the converted file."""

    key: str
    text: str
    fields: tuple[str, ...] = ()  # that it sets now
    warns: bool = False  # nothing in the file says so, or it is not quite what the file's own code does

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


@dataclass(frozen=True)
class Project:
    """Whose config a file is, and what that implies."""

    name: str = _OURS
    implied: Mapping[str, Any] = field(default_factory=dict)  # method, base, and the rest of the objective
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of its code
    is_guess: bool = False  # the file fits several objectives, or its name says another
    said: str = "its keys"  # what says so
    remark: str = ""  # in what the objective is another here
    code: str = ""  # that has the defaults, if it is not its own
    is_chosen: bool = False  # by --method
    owner: str = ""  # whose file it is, where --method has another objective


def migrate(
    written: Mapping[str, Any], method: str | None = None, base: str | None = None, has_default: bool = True
) -> tuple[Settings, list[Note]]:
    """Today's settings for a config file, and what changed. Settings of today are returned unchanged, without notes
    unless the name of the run has another objective than they have.

    Args:
        written: the YAML.
        method: `--method`, if given: it overrides the file's objective.
        base: `--base`, if given.
        has_default: whether a file without an objective trains the default method, and nothing else says one.

    Raises:
        ValueError: two keys that contradict each other, a value without a meaning, or an objective that the package
            does not have.
    """
    notes: list[Note] = []
    if is_dpo_fork(written):
        written, changes = flattened(written, method)
        notes = [
            Note(key, _line(value, fields, remark), tuple(fields), "--" in remark)
            for key, value, fields, remark in changes
        ]
    named = [key for key in _DATA_KEYS if written.get(key)]
    if len(named) > 1 and named != ["dataset_name", "datasets"]:  # TRL has an order for these two
        raise ValueError(f"{' and '.join(named)} both name the training data: remove one")
    check_known([key for key, value in written.items() if _is_foreign(key, value)], ())
    project = _project(written) if method is None else _chosen(written, method, base)
    implied = project.implied
    method = method or written.get("method") or implied.get("method")
    base = base or written.get("base") or implied.get("base") or _own_base(method)
    settings: Settings = {}
    set_by: dict[str, str] = {}
    for key, value in written.items():
        changed = _changed(key, value, written, project, method, base)
        if changed is not None:
            notes.append(Note(key, _line(value, *changed), tuple(changed[0])))
        for name, new in ({key: value} if changed is None else changed[0]).items():
            old = settings.get(name)
            if old is not None and new is not None and old != new:
                pair = " and ".join(f"{each}: {_short(written[each])}" for each in (set_by[name], key))
                raise ValueError(f"{pair} both set {name}, and differ: remove one")
            if old is None:
                settings[name], set_by[name] = new, key
    if implied:
        chosen = {name: value for name, value in implied.items() if name not in settings}
        settings = {**chosen, **settings}
        doubt = "; if it is for another objective, name that with --method" if project.is_guess else ""
        remark = f" ({project.remark})" if project.remark else ""
        how = "named" if project.is_chosen else "not named"
        text = f"{how}; {project.name} by {project.said} → {_said(chosen)}{remark}{doubt}"
        notes.insert(0, Note("method", text, tuple(chosen), project.is_guess or bool(remark)))
    elif has_default and method is None and (word := _another_objective(written)):
        text = f"not named: gappo, the default, though the name of the run has {word}. Name it (--method)"
        notes.insert(0, Note("method", text, tuple(settings)[:1], warns=True))
    elif notes and method is None:
        notes.insert(0, Note("method", "not named, and no sign of another project's objective: the default"))
    losses = settings.get("loss_type")
    if project.name == _TRL["cpo"] and losses == "simpo" and settings.get("cpo_alpha") is None:
        text = "not set → 1.0, TRL's default: CPO-SimPO, with an SFT loss; cpo_alpha: 0 is SimPO"
        notes.append(Note("cpo_alpha", text, ("loss_type",), warns=True))
    if implied and base == "dpo" and settings.get("label_smoothing") and _is_sigmoid(method):
        notes += _conservative(settings, project)
    for name, value in project.defaults.items():
        if name == "beta" and method in _WITHOUT_BETA:
            continue
        if settings.get(name) is None and not (name == "gamma_beta_ratio" and "simpo_gamma" in settings):
            settings[name] = value
            notes.append(
                Note(name, f"not set → {value}, the default of {project.code or project.name}'s code", (name,))
            )
    return settings, notes


def _is_sigmoid(method: str | None) -> bool:
    """Whether the loss of a method is DPO's, unless the file says another."""
    from ..registry import get_method

    return method == "none" or (method is not None and get_method(method).loss is None)


def _conservative(settings: Settings, project: Project) -> list[Note]:
    """Makes DPO with label smoothing conservative DPO, as an older TRL and its forks had it."""
    losses = _listed(settings.get("loss_type", "sigmoid"))
    if not set(losses) & set(_SMOOTHED):
        return []
    if losses == ["sigmoid_norm"]:
        settings["reward"] = "mean-log-ratio"
    settings["loss_type"] = ["conservative" if loss in _SMOOTHED else loss for loss in losses]
    is_trls = project.name in _TRL.values()
    doubt = "; TRL's DPOTrainer of today does not read it: remove it for plain DPO" if is_trls else ""
    text = f"{_short(settings['label_smoothing'])} → loss_type: conservative (cDPO, as in an older TRL{doubt})"
    return [Note("label_smoothing", text, ("loss_type",), is_trls)]


def _is_foreign(key: Any, value: Any) -> bool:
    """Whether it is a key that makes the whole file another project's."""
    projects = [project for project, table in FOREIGN.items() if key in table]
    return (
        bool(projects)
        and key not in ONE_BASE
        and key not in RENAMED
        and not (projects == [OLDER] and _is_old_default(key, value))
    )


def _is_old_default(key: str, value: Any) -> bool:
    return not value or value == _OLD_DEFAULTS.get(key)


def _line(value: Any, fields: Settings, remark: str) -> str:
    if not fields:
        return f"{_short(value)} → {remark}"
    return f"{_short(value)} → {_said(fields)}" + (f" ({remark})" if remark else "")


def _said(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {_short(value)}" for name, value in fields.items())


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


# Whose file it is ----------------------------------------------------------------------------------------------------


def _project(written: Mapping[str, Any]) -> Project:
    """The project that a file without a method is for."""
    if any(written.get(key) is not None for key in _OWN_KEYS):
        return Project()
    project = _recognised(written)
    if not written.get("alpha") or _is_alphapos(written) or project.name in _FORKS:
        return project
    is_simpo = project.name == "SimPO" and "dpo" not in _words_of_the_run(written)
    if not (is_simpo or _own_alpha(project.implied.get("method"))):
        named = "".join(f" but the name of the run ({kind})" for kind in _kinds_of_dpo(written)[:1])
        raise ValueError(
            f"alpha: {_short(written['alpha'])}: several objectives have an α, and nothing{named} says which is "
            "meant. Set loss_type to alphapo, r-dpo, odpo, alpha-dpo or beta-dpo, name one of these with --method, or "
            "remove alpha"
        )
    return project


def _is_alphapos(written: Mapping[str, Any]) -> bool:
    return written.get("loss_type") in _CPO_LOSSES or "cpo_alpha" in written


def _own_alpha(method: str | None) -> str | None:
    """The config field of a method's α, if that is not AlphaPO's."""
    from ..registry import MARGINS, get_method, names_of, own_alpha

    if method in (None, "none"):
        return None
    return own_alpha(MARGINS[name] for name in names_of(get_method(str(method)).margin))


def _recognised(written: Mapping[str, Any]) -> Project:
    """By its loss, then by keys that one project alone has, and for a recipe without either by its name."""

    def has(keys: Collection[str]) -> bool:
        return any(key in written for key in keys)

    loss, is_recipe, words = written.get("loss_type"), has(_RECIPE_KEYS), _words_of_the_run(written)
    of_keys = next((base for base, keys in OF_TRL.items() if has(keys)), None)
    if has(("trainer_type", "ln")) or loss in (*_GAMMA_PO_LOSSES, *_ALPHA_DPO_LOSSES):
        return _fork(written)
    telling = words if loss is None else words & _WORDS_BESIDE.get(str(loss), frozenset())
    # the name first: it says more than a loss_type that counts beside it
    for each in sorted(ELSEWHERE, key=lambda each: each.word not in telling):
        if said := each.said_by(written, telling if is_recipe and not of_keys else ()):
            if not each.here or len(_listed(loss)) > 1:
                raise _unsupported(said, "" if each.here else each.instead)
            defaults = _SIMPO_DEFAULTS if each.code == "SimPO" else _TRL_DEFAULTS
            return Project(each.name, each.here, defaults, each.word in telling, said, each.remark, each.code)
    if of_keys != "cpo" and (is_recipe or "dataset_name" in written) and (said := _supervised(written)):
        raise _unsupported(f"supervised fine-tuning, by {said}", "SFT is in trl.SFTTrainer.")
    if loss == "simpo" and _is_gamma_po(has, is_recipe):
        return _fork(written)
    if has(_AMAPO_KEYS) and not has(("gamma", "gamma_beta_ratio")):
        if loss not in (None, "sigmoid"):
            raise _unsupported(f"loss_type: {loss} beside AMaPO's keys")
        summed = {"loss_type": "sigmoid"} if written.get("length_norm") is False else {}
        # their statistics are those of the batch, without gaps from before
        implied = {"method": "amapo", "base": "cpo", "amapo_estimation_size": 1, **summed}
        return Project("AMaPO", implied, _SIMPO_DEFAULTS)
    # `gamma_beta_ratio` is ours too
    if loss not in _CPO_LOSSES and has(_SIMPO_KEYS if is_recipe or loss is not None else ("gamma", "sft_weight")):
        if loss not in (None, "sigmoid"):
            raise _unsupported(f"loss_type: {loss} beside SimPO's keys")
        defaults = {**_SIMPO_DEFAULTS, "gamma_beta_ratio": 0.25}
        is_guess = bool(words & _OTHERS - {"simpo"}) or (loss is None and "simpo" not in words)
        remark = "alpha is AlphaPO's" if written.get("alpha") else ""
        return Project("SimPO", _SIMPO, defaults, is_guess, remark=remark)
    of_loss = None if loss in _SHARED_LOSSES else "cpo" if loss in _CPO_LOSSES else "dpo"
    if not (loss or of_keys or is_recipe):
        return Project()
    if not (loss or of_keys) and "simpo" in words:
        raise ValueError(
            "simpo in the name of the run, and neither loss_type nor gamma_beta_ratio. Add gamma_beta_ratio: 0.25 for "
            "the default of SimPO's code, loss_type: simpo for TRL's CPOTrainer, or loss_type: sigmoid for DPO"
        )
    base = of_loss or of_keys or ("cpo" if not loss and "cpo" in words else "dpo")
    is_guess = not (of_loss or of_keys) and (bool(words & _OTHERS) if loss else base not in words)
    keys = [key for key in OF_TRL[base] if key in written]
    said = f"{keys[0]}, a key of its config alone" if keys and not of_loss else "its keys"
    if loss in (None, "sigmoid") and (kinds := _kinds_of_dpo(written)):
        is_guess, said = True, f"{said}, though its name has {kinds[0]}"
    return Project(_TRL[base], {"method": "none", "base": base}, is_guess=is_guess, said=said)


def _chosen(written: Mapping[str, Any], method: str, base: str | None) -> Project:
    """The file's own project where `--method` names its objective; otherwise its objective says nothing."""
    try:
        project = _project(written)
    except ValueError:
        return Project(_FLAGS)
    if method == "none" or project.implied.get("method") != method or base not in (None, project.implied.get("base")):
        return Project(_FLAGS, owner=project.name)
    return replace(project, defaults={}, is_guess=False, is_chosen=True)


def _is_gamma_po(has: Callable[[Collection[str]], bool], is_recipe: bool) -> bool:
    """Whether `loss_type: simpo` is γ-PO's: by keys that neither TRL nor SimPO's code has beside it."""
    return has(("tau", "length_norm", "sft_weight", "gamma")) or (is_recipe and has(("gamma_beta_ratio",)))


def _words_of_the_run(written: Mapping[str, Any]) -> set[str]:
    """Of its names; one with dpo is for DPO, whatever its other words say."""
    parts = [re.findall(r"[a-z]+", name) for name in _names_of_the_run(written)]
    return {word for words in parts for word in (["dpo"] if "dpo" in words else words)}


def _another_objective(written: Mapping[str, Any]) -> str | None:
    """The word for it in the name of a run whose file has no key for an objective."""
    from ..registry import method_ids

    if any(written.get(key) is not None for key in _OWN_KEYS) or any(
        str(key).startswith("score_gap_") for key in written
    ):
        return None
    names = " ".join(_names_of_the_run(written)).replace("_", "-")
    known = sorted({"dpo", *filter(None, _OTHERS), *method_ids()})
    found = [each for each in known if re.search(rf"(?<![a-z]){each}(?![a-z])", names)]
    return None if not found or "gappo" in found else max(found, key=len)


def _names_of_the_run(written: Mapping[str, Any]) -> list[str]:
    """The last part of each."""
    names = [str(written.get(key) or "").rstrip("/") for key in ("output_dir", "run_name", "hub_model_id")]
    return [name.rpartition("/")[2].lower() for name in names]


def _kinds_of_dpo(written: Mapping[str, Any]) -> list[str]:
    """What its names have of the kind of beta-dpo, which is another objective than DPO."""
    return [kind for name in _names_of_the_run(written) for kind in _KIND_OF_DPO.findall(name)]


def _supervised(written: Mapping[str, Any]) -> str | None:
    """What makes it a recipe for supervised fine-tuning."""
    if any(key in written for key in ("beta", "loss_type", "max_prompt_length", *_SIMPO_KEYS, *_AMAPO_KEYS)):
        return None
    mixture, splits = written.get("dataset_mixture"), written.get("dataset_splits")
    sets = mixture.get("datasets") if isinstance(mixture, Mapping) else None
    if any(isinstance(each, Mapping) and "messages" in str(each.get("columns")) for each in _listed(sets)):
        return "columns: messages"
    if named := [split for split in _listed(splits) if str(split).endswith("_sft")]:
        return f"dataset_splits: {named[0]}"
    return next((f"{key}: {_short(written[key])}" for key in _SFT_KEYS if key in written), None)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _fork(written: Mapping[str, Any]) -> Project:
    """γ-PO's code and α-DPO's: one script for two trainers, and several losses."""
    is_alpha = "ln" in written or written.get("loss_type") in _ALPHA_DPO_LOSSES
    own = ("α-DPO", "dpo", "sigmoid", "ln") if is_alpha else ("γ-PO", "simpo", "dpo", "length_norm")
    name, trainer, loss = own[0], str(written.get("trainer_type") or own[1]), str(written.get("loss_type") or own[2])
    means = bool(written.get(own[3], True))
    ratio = {"reward": "mean-log-ratio" if means else "log-ratio"}
    defaults, remark = {**_SIMPO_DEFAULTS, "gamma_beta_ratio": 0.25}, ""
    # its reward gaps have β in them
    beta_dpo = {"beta_dpo_a": _number(written, "tau", 1.0) * _number(written, "beta", 2.0), "beta_dpo_keep": 1.0}
    sampled = "no pair is left out, as in its code; there β is from 80 % of the gaps, before they are learned"
    implied: Mapping[str, Any]
    match trainer, loss:
        case "simpo", "simpo" if written.get("label_smoothing"):
            implied = {"method": "rsimpo", "base": "cpo"}
        case ("simpo", "simpo") | ("dpo", "simpo") if means or trainer == "simpo":
            implied = _SIMPO
        case "simpo", "gm-simpo":
            implied, defaults["gamma_po_tau"] = {"method": "gamma-po", "base": "cpo"}, 1.0
        case "simpo", "b-simpo":
            implied = {"method": "beta-simpo", "base": "cpo", **beta_dpo}
            remark = f"{sampled}, and scales γ too"
        case "dpo", "gm-dpo":
            implied = {"method": "gamma-po", "base": "dpo", "loss_type": "sigmoid", **ratio}
            defaults["gamma_po_tau"] = 1.0
        case "dpo", "b-dpo":
            implied = {"method": "beta-dpo", "base": "dpo", **beta_dpo, **ratio}
            remark = sampled
        case "dpo", "alpha-dpo":
            reward = "length-normalized" if means else "sum"
            implied, defaults["alpha_dpo_alpha"] = {"method": "alpha-dpo", "base": "dpo", "reward": reward}, 0.0
        case "dpo", "dpo" | "sigmoid" | "r-dpo" | "rDPO":
            implied = {**_DPO, "loss_type": "sigmoid_norm" if means else "sigmoid"}
            if loss in ("r-dpo", "rDPO"):
                remark = "its code takes the batch size for both lengths, so its margin is 0; R-DPO is --method r-dpo"
        case "dpo", "ipo":
            # γ-PO's code has the temperature in another key
            beta = {} if is_alpha else {"beta": written.get("gamma_beta_ratio", 0.25)}
            implied = {**_DPO, "loss_type": "ipo" if means else "ipo_sum", **beta}
        case "dpo", "kto":
            implied = {"method": "kto-pair", "base": "dpo", **ratio}
            remark = "the loss of a pair is the sum over its completions, in its code their mean"
        case _:
            pair = {"trainer_type": trainer, "loss_type": loss}
            said = " with ".join(
                f"{key}: {value}" + ("" if written.get(key) else f" ({name}'s default)") for key, value in pair.items()
            )
            per_token = "Its NLL is a mean per completion: --method orpo or cpo has one per token."
            raise _unsupported(said, per_token if loss in ("orpo", "cpo") else "")
    if trainer == "dpo" and loss not in ("gm-dpo", "alpha-dpo", "simpo"):
        del defaults["gamma_beta_ratio"]
    return Project(name, implied, defaults, remark=remark)


def _unsupported(said: str, instead: str = "") -> ValueError:
    from ..registry import method_ids

    return ValueError(
        f"{said}: the package does not have this objective. {instead}{' ' * bool(instead)}"
        f"The package's methods are {', '.join(method_ids())}, and none for TRL's own CPO and DPO losses: --method "
        "NAME --base cpo (or dpo) trains this file's model on its data with one of them."
    )


# How values change ---------------------------------------------------------------------------------------------------


def _changed(
    key: str, value: Any, written: Mapping[str, Any], project: Project, method: str | None, base: str
) -> Changed | None:
    """What one key sets today, with a remark; None for a key of today."""
    words = value.split() if key == "attn_implementation" and isinstance(value, str) else []
    if len(words) > 1:  # as in AMaPO's llama-3-8b-base
        return {key: words[0]}, "what follows is a comment without its #"
    if project.name == _FLAGS and key in _OF_ANOTHER_OBJECTIVE:
        return {}, "dropped: a key of another objective"
    row = _baseline(method) if project.name != _OURS else None
    if row is not None and key in _TARGETS and "gamma_beta_ratio" not in row.defaults:
        return {}, f"dropped: {row.name} has no target margin of its own"
    if row is not None and project.name == _FLAGS and key in _OBJECTIVE_KEYS:
        return {}, "dropped: the objective is that of --method"
    if key in ("alpha", "a") and value is not None:
        return _alpha(key, value, written, project, method)
    if key == "beta" and project.name != _OURS and method in _WITHOUT_BETA:
        return {}, "dropped: the objective has no β"
    if key == "beta" and "beta" in project.implied:
        return {}, "dropped: its IPO has gamma_beta_ratio in its place"
    if key == "label_smoothing" and method in ("gamma-po", "beta-simpo") and base == "cpo" and project.name == "γ-PO":
        return {}, "dropped: its loss never reads it"
    if key == "max_completion_length" and base == "dpo":
        return {}, "dropped: max_length cuts the end of prompt and completion together"
    if key in FOREIGN[OLDER] and _is_old_default(key, value) and ONE_BASE.get(key) != base:
        return {}, "dropped: the default"
    if key not in OLD_KEYS or (value is None and key in RENAMED.get(key, "").split(", ")):
        return None
    if value is None and key != "torch_dtype":
        return {}, "dropped: null, the default"
    whose, implied = project.name, project.implied
    match key:
        case "torch_dtype":
            if value is None:
                return {"dtype": "float32"}, "the meaning of null in transformers 4; in 5 it is the checkpoint's dtype"
            return {"dtype": str(value).removeprefix("torch.")}, ""
        case "use_flash_attention_2" | "group_by_length" | "use_liger_loss":
            named = {"use_flash_attention_2": "flash_attention_2", "use_liger_loss": value}.get(key, key)
            return ({RENAMED[key]: named}, "") if value else ({}, "dropped: the default")
        case "ref_model_init_kwargs" if value and value != written.get("model_init_kwargs"):
            raise ValueError(f"ref_model_init_kwargs: {DROPPED[key]}, with model_init_kwargs; remove it")
        case "dataset_mixer":
            return _dataset_mixer(value, written, whose)
        case "dataset_splits" | "dataset_configs":
            if "dataset_mixer" not in written:
                raise ValueError("dataset_splits and dataset_configs need dataset_mixer, which is missing")
            return {}, "set by dataset_mixer"
        case "dataset_mixture":
            return _dataset_mixture(value)
        case "max_target_length":
            if base == "dpo":
                return {}, "dropped: the DPO base takes no encoder-decoder models"
            return {"max_completion_length": value}, "for encoder-decoder models"
        case "truncation_mode" if base == "dpo" and (value == "keep_start" or not implied):
            return None
        case "trainer_type":
            return {}, "set by method and base"
        case "loss_type":
            return _loss_type(value, written, whose, method)
        case "length_norm":  # whether a log-probability is the mean over a completion's tokens, or their sum
            if whose == "γ-PO" and base == "cpo":
                return {}, "dropped: its SimPO trainer never reads it, and takes means, as here"
            if implied:
                return {}, "set by loss_type" if "loss_type" in implied else "set by method, which takes means"
            if base == "dpo":
                return {"reward": "length-normalized" if value else "log-ratio"}, ""
            return {"loss_type": "simpo" if value else "sigmoid"}, "the CPO loss on means" if value else "on sums"
        case "ln":
            return {}, "set by reward" if "reward" in implied else "set by loss_type"
        case "rpo_alpha" if base == "cpo":
            return {"cpo_alpha": value}, "weight of the chosen completions' log-likelihood"
        case "rpo_alpha":
            losses = _listed(written.get("loss_type") or "sigmoid")
            if "sft" in losses or written.get("loss_weights"):
                raise ValueError(f"rpo_alpha: {_short(value)} beside loss_weights or loss_type sft: remove one")
            weights = [*[1.0] * len(losses), value]
            older = "" if value == 1 else "; TRL before August 2024 multiplied the DPO loss by it instead"
            return {"loss_type": [*losses, "sft"], "loss_weights": weights}, f"weight of the SFT loss{older}"
        case "gamma_beta_ratio":
            if "beta" in implied:
                return {"beta": value}, "the temperature of its IPO"
            unread = whose in ("γ-PO", "α-DPO") and method == "none" and base == "dpo"
            return ({}, "dropped: its loss never reads it") if unread else None
        case "gamma":
            return {"simpo_gamma": value}, "SimPO's first form of γ, with β in it"
        case "tau" if "beta_dpo_a" in implied:
            return {}, "set by beta_dpo_a, with β in it"
        case "tau" if method != "gamma-po":
            return {}, "dropped: only γ-PO's loss reads it"
        case "sft_weight" if whose in ("AMaPO", "α-DPO") or (whose == "γ-PO" and base == "dpo"):
            return {}, f"dropped: {whose}'s loss never adds it"
        case "sft_weight" if base == "dpo" and value:
            raise ValueError(f"sft_weight: on base dpo, loss_type: [sigmoid, sft] with loss_weights: [1.0, {value}]")
        case "sft_weight":
            told = "weight of the chosen completions' log-likelihood"
            return ({}, "dropped: no SFT loss") if base == "dpo" else ({"cpo_alpha": value}, told)
        case "flip":
            if value:
                raise ValueError(
                    f"flip: {value} inverts the losses of whole batches at random, which the package does not do; "
                    f"noise: random:{value} flips that share of the pairs"
                )
            return {}, "dropped: no labels are flipped"
        case "warmup_ratio":
            if not (_is_number(value) and 0 <= value < 1):
                raise ValueError(f"warmup_ratio: {_short(value)} is not a share of all steps: at least 0 and below 1")
            return {"warmup_steps": value}, "below 1 it is a share of all steps"
        case "evaluation_strategy" | "eval_strategy" | "save_strategy" | "logging_strategy":
            if value is False:
                return {RENAMED[key]: "no"}, "YAML reads a bare no as false"
            return None if key == RENAMED[key] else ({RENAMED[key]: value}, "")
    return ({}, f"dropped: {DROPPED[key]}") if key in DROPPED else ({RENAMED[key]: value}, "")


def _baseline(method: str | None) -> Any:
    from ..registry import get_method

    row = None if method in (None, "none") else get_method(str(method))
    return row if row is not None and row.baseline else None


def _alpha(key: str, value: Any, written: Mapping[str, Any], project: Project, method: str | None) -> Changed | None:
    """AlphaPO's α, or that of the objective, which in other code has the same name; `a` is β-DPO's alone."""
    own, row = _own_alpha(method), _baseline(method)
    if key == "a":
        return ({"beta_dpo_a": value}, "") if own == "beta_dpo_a" else None
    if project.name == _OURS or written.get("method") == method:
        return None
    if (project.owner or project.name) in _FORKS:
        return ({own: value}, "") if method == "alpha-dpo" and own else ({}, "dropped: only α-DPO's loss reads it")
    if own and own not in written and not _is_alphapos(written):
        return {own: value}, ""
    is_recipe = any(each in written for each in _RECIPE_KEYS)
    if project.name == _FLAGS and ("alpha" not in row.defaults if row else is_recipe and not _is_alphapos(written)):
        return {}, "dropped: of another objective"
    return None


def _loss_type(value: Any, written: Mapping[str, Any], whose: str, method: str | None) -> Changed | None:
    if written.get("rpo_alpha") and whose in _TRL.values():
        return {}, "set with rpo_alpha"
    if "aot_pair" in (losses := _listed(value)):
        today = ["aot_unpaired" if loss == "aot_pair" else loss for loss in losses]
        return {"loss_type": today if isinstance(value, list) else today[0]}, "TRL's name for it today"
    if whose == _FLAGS:
        others = any(elsewhere(loss) for loss in _listed(value))
        return ({}, "dropped: the objective is that of --method") if others or value in _GAMMA_PO_LOSSES else None
    if whose == _OURS:  # a method is named: what is no loss of it is refused with the other values
        return ({}, "set by method") if method == "gamma-po" and value in ("gm-simpo", "gm-dpo") else None
    return None if whose in _TRL.values() else ({}, "set by method")


def _dataset_mixer(value: Any, written: Mapping[str, Any], whose: str) -> Changed:
    """{name: fraction}: the first rows of each set's training splits, and its whole test split."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"dataset_mixer: {_short(value)} is not a mapping from data sets to fractions")
    fractions = {name: _fraction(f"dataset_mixer: {name}", share) for name, share in value.items()}
    configs = written.get("dataset_configs") or [None] * len(fractions)
    if len(configs) != len(fractions):
        raise ValueError(f"dataset_configs has {len(configs)} names for {len(fractions)} sets in dataset_mixer")
    train, test = _mixer_splits(written.get("dataset_splits") or ["train", "test"])
    parts = [
        {"path": name, "name": config, "split": split}
        for name, config in zip(fractions, configs, strict=True)
        for split in train
    ]
    shares = [share for share in fractions.values() for _ in train]
    remarks = []  # about what the old scripts did to rows unasked
    if "auto_insert_empty_system_msg" not in written:
        remarks.append("rows are used as they are: the old script inserted an empty system message for some templates")
    model = str(written.get("model_name_or_path", "")).lower()
    if whose in ("SimPO", "γ-PO", "AMaPO", "α-DPO", "SimPER") and "mistral" in model:
        remarks.append("and a Mistral model keeps its chat template, which it replaced")
    return {**_mixed(parts, shares), **({"dataset_test_split": test} if test else {})}, ", ".join(remarks)


def _mixer_splits(splits: Any) -> tuple[list[str], str | None]:
    splits = [splits] if isinstance(splits, str) else list(splits)
    train = [split for split in splits if "train" in split]
    test = [split for split in splits if "train" not in split and "test" in split]
    if strange := [split for split in splits if split not in (*train, *test)]:
        raise ValueError(f"dataset_splits: {strange[0]!r} has neither train nor test in its name")
    if not train or len(test) > 1:
        raise ValueError(f"dataset_splits: {splits} must name at least one training split and at most one for tests")
    return train, test[0] if test else None


def _dataset_mixture(value: Any) -> Changed:
    """{datasets: [{id, config, split, columns, weight}], seed, test_split_size}: random rows of each set, mixed."""
    _check_mapping(value, "dataset_mixture", ("datasets", "seed", "test_split_size"))
    if not isinstance(value.get("datasets"), list) or not value["datasets"]:
        raise ValueError("dataset_mixture: datasets is not a list of data sets")
    parts, shares = [], []
    for number, entry in enumerate(value["datasets"], 1):
        where = f"dataset_mixture: set {number}"
        _check_mapping(entry, where, ("id", "config", "split", "columns", "weight"))
        if not entry.get("id"):
            raise ValueError(f"{where} has no id")
        share = entry.get("weight")
        shares.append(_fraction(f"{where}, weight", 1.0 if share is None else share))
        part = {"path": entry["id"], "name": entry.get("config"), "split": entry.get("split", "train")}
        parts.append({**part, "columns": entry.get("columns")})
    if len({frozenset(part["columns"]) for part in parts if part["columns"]}) > 1:
        raise ValueError("dataset_mixture: all sets must name the same columns")
    size = value.get("test_split_size")
    mixed = _mixed(parts, shares, always=size is not None)
    if "datasets" in mixed:
        mixed |= {"mixture_seed": value.get("seed") or 0, **({} if size is None else {"test_split_size": size})}
    return mixed, ""


def _mixed(parts: list[dict[str, Any]], shares: list[float], always: bool = False) -> Settings:
    """The mixture of these sets; one whole set is a mixture only if `always`."""
    parts = [{name: said for name, said in part.items() if said} for part in parts]
    if shares == [1.0] and "columns" not in parts[0] and not always:
        names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
        return {today: parts[0][name] for name, today in names.items() if name in parts[0]}
    return {"datasets": parts, **({} if set(shares) == {1.0} else {"mixture_weights": shares})}


def _fraction(what: str, share: Any) -> float:
    if not (_is_number(share) and 0 <= share <= 1):
        raise ValueError(f"{what}: {_short(share)} is not a fraction of its rows: a number, at least 0 and at most 1")
    return float(share)


def _check_mapping(value: Any, where: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {_short(value)} is not a mapping with {', '.join(known)}")
    check_known(value, known, where)


def _number(written: Mapping[str, Any], key: str, default: float) -> float:
    value = written.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {_short(value)} is not a number") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
