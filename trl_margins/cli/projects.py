"""Whose config a file is: its project and its objective, by its keys, its loss and its name.

What is said of another project's code was read there: princeton-nlp/SimPO, sunjie279/gammaPO, junkangwu/alpha-DPO,
Shiroha-Offical/AMaPO; for objectives that are told by their `loss_type` or name, see `trainers/elsewhere.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..trainers.elsewhere import ELSEWHERE
from .config_file import short
from .other_keys import OF_TRL

# a file with one of these that names no method is another project's preference recipe
RECIPE_KEYS = ("dataset_mixer", "dataset_mixture", "dataset_splits", "max_prompt_length", "preprocessing_num_workers")
_OWN_KEYS = ("method", "base", "weight", "margin", "reward")
TRL = {"cpo": "TRL's CPOTrainer", "dpo": "TRL's DPOTrainer"}
OURS, FLAGS = "this package", "the command line"  # whose the objective is
_SIMPO_KEYS = ("gamma_beta_ratio", "gamma", "sft_weight")
_AMAPO_KEYS = ("length_norm", "margin_norm", "mode_weight")
_CPO_LOSSES, _SHARED_LOSSES = ("simpo", "alphapo"), (None, "sigmoid", "hinge", "ipo")  # of CPO alone, of both bases
GAMMA_PO_LOSSES = ("gm-simpo", "b-simpo", "gm-dpo", "b-dpo", "dpo", "cpo")
_ALPHA_DPO_LOSSES = ("alpha-dpo", "rDPO")
# words of a name that count beside a `loss_type`: objectives whose own files say another's
_WORDS_BESIDE: Mapping[Any, frozenset[str]] = {"sigmoid": frozenset(("sppo", "wpo")), "rpo": frozenset(("sppo",))}
_OTHERS = {"cpo", "simpo", *(each.word for each in ELSEWHERE)} - {None}
SFT_KEYS = ("max_seq_length", "packing", "dataset_text_field", "text_column", "assistant_only_loss")
FORKS = ("γ-PO", "α-DPO")  # of SimPO's code, with several losses
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


@dataclass(frozen=True)
class Project:
    """Whose config a file is, and what that implies."""

    name: str = OURS
    implied: Mapping[str, Any] = field(default_factory=dict)  # method, base, and the rest of the objective
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of its code
    is_guess: bool = False  # the file fits several objectives, or its name says another
    said: str = "its keys"  # what says so
    remark: str = ""  # in what the objective is another here
    code: str = ""  # that has the defaults, if it is not its own
    is_chosen: bool = False  # by --method
    owner: str = ""  # whose file it is, where --method has another objective


def project_of(written: Mapping[str, Any]) -> Project:
    """The project that a file without a method is for."""
    if any(written.get(key) is not None for key in _OWN_KEYS):
        return Project()
    project = _recognised(written)
    if not written.get("alpha") or is_alphapos(written) or project.name in FORKS:
        return project
    is_simpo = project.name == "SimPO" and "dpo" not in _words_of_the_run(written)
    if not (is_simpo or own_alpha(project.implied.get("method"))):
        named = "".join(f" but the name of the run ({kind})" for kind in _kinds_of_dpo(written)[:1])
        raise ValueError(
            f"alpha: {short(written['alpha'])}: several objectives have an α, and nothing{named} says which is "
            "meant. Set loss_type to alphapo, r-dpo, odpo, alpha-dpo or beta-dpo, name one of these with --method, or "
            "remove alpha"
        )
    return project


def is_alphapos(written: Mapping[str, Any]) -> bool:
    return written.get("loss_type") in _CPO_LOSSES or "cpo_alpha" in written


def own_alpha(method: str | None) -> str | None:
    """The config field of a method's α, if that is not AlphaPO's."""
    from ..registry import MARGINS, get_method, names_of, own_alpha

    if method in (None, "none"):
        return None
    return own_alpha(MARGINS[name] for name in names_of(get_method(str(method)).margin))


def _recognised(written: Mapping[str, Any]) -> Project:
    """By its loss, then by keys that one project alone has, and for a recipe without either by its name."""

    def has(keys: Collection[str]) -> bool:
        return any(key in written for key in keys)

    loss, is_recipe, words = written.get("loss_type"), has(RECIPE_KEYS), _words_of_the_run(written)
    of_keys = next((base for base, keys in OF_TRL.items() if has(keys)), None)
    if has(("trainer_type", "ln")) or loss in (*GAMMA_PO_LOSSES, *_ALPHA_DPO_LOSSES):
        return _fork(written)
    telling = words if loss is None else words & _WORDS_BESIDE.get(str(loss), frozenset())
    # the name first: it says more than a loss_type that counts beside it
    for each in sorted(ELSEWHERE, key=lambda each: each.word not in telling):
        if said := each.said_by(written, telling if is_recipe and not of_keys else ()):
            if not each.here or len(listed(loss)) > 1:
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
    return Project(TRL[base], {"method": "none", "base": base}, is_guess=is_guess, said=said)


def project_chosen(written: Mapping[str, Any], method: str, base: str | None) -> Project:
    """The file's own project where `--method` names its objective; otherwise its objective says nothing."""
    try:
        project = project_of(written)
    except ValueError:
        return Project(FLAGS)
    if method == "none" or project.implied.get("method") != method or base not in (None, project.implied.get("base")):
        return Project(FLAGS, owner=project.name)
    return replace(project, defaults={}, is_guess=False, is_chosen=True)


def _is_gamma_po(has: Callable[[Collection[str]], bool], is_recipe: bool) -> bool:
    """Whether `loss_type: simpo` is γ-PO's: by keys that neither TRL nor SimPO's code has beside it."""
    return has(("tau", "length_norm", "sft_weight", "gamma")) or (is_recipe and has(("gamma_beta_ratio",)))


def _words_of_the_run(written: Mapping[str, Any]) -> set[str]:
    """Of its names; one with dpo is for DPO, whatever its other words say."""
    parts = [re.findall(r"[a-z]+", name) for name in _names_of_the_run(written)]
    return {word for words in parts for word in (["dpo"] if "dpo" in words else words)}


def another_objective(written: Mapping[str, Any]) -> str | None:
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
    if any(isinstance(each, Mapping) and "messages" in str(each.get("columns")) for each in listed(sets)):
        return "columns: messages"
    if named := [split for split in listed(splits) if str(split).endswith("_sft")]:
        return f"dataset_splits: {named[0]}"
    return next((f"{key}: {short(written[key])}" for key in SFT_KEYS if key in written), None)


def listed(value: Any) -> list[Any]:
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


def _number(written: Mapping[str, Any], key: str, default: float) -> float:
    value = written.get(key)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {short(value)} is not a number") from None
