"""Config migration: YAML for alignment-handbook, SimPO, γ-PO, AMaPO or an older TRL becomes the package's own.

Functions from dict to dict that load nothing heavy. `projects.py` knows whose file it is, and what that implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..trainers.elsewhere import ELSEWHERE, elsewhere
from .config_file import Settings, check_known, is_number, short
from .dpo_forks import flattened, is_dpo_fork
from .mixers import Changed, of_mixer, of_mixture
from .other_keys import DROPPED, FOREIGN, OLDER, ONE_BASE, RENAMED
from .projects import (
    FLAGS,
    FORKS,
    GAMMA_PO_LOSSES,
    OURS,
    RECIPE_KEYS,
    SFT_KEYS,
    TRL,
    Project,
    another_objective,
    is_alphapos,
    listed,
    own_alpha,
    project_chosen,
    project_of,
)

_DATA_KEYS = ("dataset_name", "datasets", "dataset_mixer", "dataset_mixture")
# of an older transformers, that are not false
_OLD_DEFAULTS = {"half_precision_backend": "auto", "fp16_backend": "auto", "fp16_opt_level": "O1"}
OLD_KEYS = frozenset({*RENAMED, *DROPPED})
_SMOOTHED = ("sigmoid", "sigmoid_norm")  # on DPO, in an older TRL
_OF_ANOTHER_OBJECTIVE = frozenset({*SFT_KEYS, *(key for each in ELSEWHERE for key in each.keys)})
# what a baseline is made of: with one on the command line, a file's own say nothing
_OBJECTIVE_KEYS = frozenset(
    ("loss_type", "loss_weights", "rpo_alpha", "cpo_alpha", "sft_weight", "use_weighting", "length_norm", "ln")
)
_WITHOUT_BETA = ("rrhf", "simper")  # where it would scale the loss, or nothing
_TARGETS = frozenset(("gamma_beta_ratio", "gamma", "simpo_gamma"))


@dataclass(frozen=True)
class Note:
    """What happened to one key: a line of the log, and a comment in the converted file."""

    key: str
    text: str
    fields: tuple[str, ...] = ()  # that it sets now
    warns: bool = False  # nothing in the file says so, or it is not quite what the file's own code does

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


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
    project = project_of(written) if method is None else project_chosen(written, method, base)
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
                pair = " and ".join(f"{each}: {short(written[each])}" for each in (set_by[name], key))
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
    elif has_default and method is None and (word := another_objective(written)):
        text = f"not named: gappo, the default, though the name of the run has {word}. Name it (--method)"
        notes.insert(0, Note("method", text, tuple(settings)[:1], warns=True))
    elif notes and method is None:
        notes.insert(0, Note("method", "not named, and no sign of another project's objective: the default"))
    losses = settings.get("loss_type")
    if project.name == TRL["cpo"] and losses == "simpo" and settings.get("cpo_alpha") is None:
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


def _own_base(method: Any) -> str:
    from ..registry import base_of  # it loads the terms

    try:
        return base_of(None if method == "none" else method or "gappo")
    except ValueError:  # an unknown method, of which train tells
        return "cpo"


def _is_sigmoid(method: str | None) -> bool:
    """Whether the loss of a method is DPO's, unless the file says another."""
    from ..registry import get_method

    return method == "none" or (method is not None and get_method(method).loss is None)


def _conservative(settings: Settings, project: Project) -> list[Note]:
    """Makes DPO with label smoothing conservative DPO, as an older TRL and its forks had it."""
    losses = listed(settings.get("loss_type", "sigmoid"))
    if not set(losses) & set(_SMOOTHED):
        return []
    if losses == ["sigmoid_norm"]:
        settings["reward"] = "mean-log-ratio"
    settings["loss_type"] = ["conservative" if loss in _SMOOTHED else loss for loss in losses]
    is_trls = project.name in TRL.values()
    doubt = "; TRL's DPOTrainer of today does not read it: remove it for plain DPO" if is_trls else ""
    text = f"{short(settings['label_smoothing'])} → loss_type: conservative (cDPO, as in an older TRL{doubt})"
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
        return f"{short(value)} → {remark}"
    return f"{short(value)} → {_said(fields)}" + (f" ({remark})" if remark else "")


def _said(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {short(value)}" for name, value in fields.items())


def _changed(
    key: str, value: Any, written: Mapping[str, Any], project: Project, method: str | None, base: str
) -> Changed | None:
    """What one key sets today, with a remark; None for a key of today."""
    words = value.split() if key == "attn_implementation" and isinstance(value, str) else []
    if len(words) > 1:  # as in AMaPO's llama-3-8b-base
        return {key: words[0]}, "what follows is a comment without its #"
    if project.name == FLAGS and key in _OF_ANOTHER_OBJECTIVE:
        return {}, "dropped: a key of another objective"
    row = _baseline(method) if project.name != OURS else None
    if row is not None and key in _TARGETS and "gamma_beta_ratio" not in row.defaults:
        return {}, f"dropped: {row.name} has no target margin of its own"
    if row is not None and project.name == FLAGS and key in _OBJECTIVE_KEYS:
        return {}, "dropped: the objective is that of --method"
    if key in ("alpha", "a") and value is not None:
        return _alpha(key, value, written, project, method)
    if key == "beta" and project.name != OURS and method in _WITHOUT_BETA:
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
            return of_mixer(value, written, whose)
        case "dataset_splits" | "dataset_configs":
            if "dataset_mixer" not in written:
                raise ValueError("dataset_splits and dataset_configs need dataset_mixer, which is missing")
            return {}, "set by dataset_mixer"
        case "dataset_mixture":
            return of_mixture(value)
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
            losses = listed(written.get("loss_type") or "sigmoid")
            if "sft" in losses or written.get("loss_weights"):
                raise ValueError(f"rpo_alpha: {short(value)} beside loss_weights or loss_type sft: remove one")
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
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"warmup_ratio: {short(value)} is not a share of all steps: at least 0 and below 1")
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
    own, row = own_alpha(method), _baseline(method)
    if key == "a":
        return ({"beta_dpo_a": value}, "") if own == "beta_dpo_a" else None
    if project.name == OURS or written.get("method") == method:
        return None
    if (project.owner or project.name) in FORKS:
        return ({own: value}, "") if method == "alpha-dpo" and own else ({}, "dropped: only α-DPO's loss reads it")
    if own and own not in written and not is_alphapos(written):
        return {own: value}, ""
    is_recipe = any(each in written for each in RECIPE_KEYS)
    if project.name == FLAGS and ("alpha" not in row.defaults if row else is_recipe and not is_alphapos(written)):
        return {}, "dropped: of another objective"
    return None


def _loss_type(value: Any, written: Mapping[str, Any], whose: str, method: str | None) -> Changed | None:
    if written.get("rpo_alpha") and whose in TRL.values():
        return {}, "set with rpo_alpha"
    if "aot_pair" in (losses := listed(value)):
        today = ["aot_unpaired" if loss == "aot_pair" else loss for loss in losses]
        return {"loss_type": today if isinstance(value, list) else today[0]}, "TRL's name for it today"
    if whose == FLAGS:
        others = any(elsewhere(loss) for loss in listed(value))
        return ({}, "dropped: the objective is that of --method") if others or value in GAMMA_PO_LOSSES else None
    if whose == OURS:  # a method is named: what is no loss of it is refused with the other values
        return ({}, "set by method") if method == "gamma-po" and value in ("gm-simpo", "gm-dpo") else None
    return None if whose in TRL.values() else ({}, "set by method")
