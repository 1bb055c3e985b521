"""Configs of β-DPO's, Dr. DPO's and ODPO's code, forks of DPO's own: its nested keys as flat ones of today.

Read in junkangwu/beta-DPO, junkangwu/Dr_DPO and rycolab/odpo: config/ and trainers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Changed = tuple[str, Any, dict[str, Any], str]  # key, value, what it sets today, a remark

_OBJECTIVE = ("name", "mode_loss", "mode_weight", "a", "alpha", "ratio", "k", "label_smoothing", "reference_free")
_RENAMED = {
    "lr": "learning_rate",
    "n_epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "exp_name": "run_name",
    "activation_checkpointing": "gradient_checkpointing",
    "do_first_eval": "eval_on_start",
    "model.name_or_path": "model_name_or_path",
    "model.tokenizer_name_or_path": "tokenizer_name_or_path",
    "model.policy_dtype": "dtype",
}
_UNREAD = frozenset(
    (
        "debug",
        "fsdp_port",
        "local_dirs",
        "local_run_dir",
        "sample_during_eval",
        "n_eval_model_samples",
        "trainer",
        "n_eval_examples",
        "minimum_log_interval_secs",
        "max_prompt_length",
        "defaults",
        "function",
        "temperature",
        "topp",
        "model.name",
        "model.block_name",
        "model.reference_dtype",
    )
)
_OPTIMIZERS = {"RMSprop": "rmsprop", "AdamW": "adamw_torch", "Adam": "adamw_torch"}  # of torch; no weight decay here
_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 5e-7,
    "num_train_epochs": 1,
    "max_length": 512,
    "warmup_steps": 150,
    "max_grad_norm": 10.0,
    "optim": "rmsprop",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant_with_warmup",  # in code, not in its config
}


def is_dpo_fork(written: Mapping[str, Any]) -> bool:
    """Whether a config is for one of the forks. DPO's own code and HALOs have other keys in `loss`."""
    loss = written.get("loss")
    return "mode_loss" in written or (
        isinstance(loss, Mapping) and ("mode_loss" in loss or loss.get("name") == "odpo")
    )


def flattened(written: Mapping[str, Any], method: str | None) -> tuple[dict[str, Any], list[Changed]]:
    """The config with keys of today, and what became of each other.

    Args:
        method: `--method`: the file's objective counts only if it is this one.

    Raises:
        ValueError: what the package does not train.
    """
    flat: dict[str, Any] = {}
    for key, value in written.items():
        if isinstance(value, Mapping) and key in ("loss", "model"):
            prefix = "" if key == "loss" else "model."
            flat |= {prefix + inner: each for inner, each in value.items()}
        else:
            flat[key] = value
    loss = {key: flat.pop(key) for key in _OBJECTIVE if key in flat}
    said = ", ".join(f"{key} {value}" for key, value in loss.items())
    objective = _objective(loss, said)
    if method is None and not objective:
        raise ValueError(f"{said}: the package does not have this objective; choose another with --method")
    if method not in (None, objective.get("method")):
        changed: list[Changed] = [("loss", said, {}, "dropped: the objective is that of its flag")]
    else:
        changed = [("loss", said, objective, "")]
    batch, accumulated = (
        int(_above_zero(flat, key, default))
        for key, default in (("batch_size", 4), ("gradient_accumulation_steps", 1))
    )
    settings: dict[str, Any] = dict(changed[0][2])
    for key, value in flat.items():
        fields, remark = _setting(key, value, batch, accumulated)
        if fields != {key: value}:
            changed.append((key, value, fields, remark))
        for name, new in fields.items():
            if settings.setdefault(name, new) != new:
                raise ValueError(f"two keys set {name}, to {settings[name]} and {new}: remove one")
    missing = {
        key: value for key, value in _DEFAULTS.items() if key not in settings and "warmup_ratio" not in settings
    }
    changed += [(key, "not set", {key: value}, "as in its code") for key, value in missing.items()]
    return settings | missing, changed


def _objective(loss: Mapping[str, Any], said: str) -> dict[str, Any]:
    """The settings that train it; none where the package does not have it."""
    name, mode, smoothing = loss.get("name", "dpo"), loss.get("mode_loss", "mean"), loss.get("label_smoothing")
    if loss.get("reference_free"):
        return {}
    if name == "odpo" and not loss.get("ratio"):
        return {"method": "odpo", "odpo_alpha": loss.get("alpha", 1.0)}
    match name, mode:
        case "dpo", "beta_DPO":
            kept = 1 - _above_zero(loss, "mode_weight", 0.2) if loss.get("mode_weight") != 0 else 1.0
            return {"method": "beta-dpo", "beta_dpo_a": loss.get("a", 0.0), "beta_dpo_keep": kept}
        case "dpo", "DrDPO" if not smoothing:
            return {"method": "dr-dpo", "dr_dpo_beta_prime": loss.get("mode_weight", 1.0)}
        case "dpo", "mean" if smoothing and "a" not in loss:  # β-DPO's fork, which has `a`, never reads it
            return {"method": "cdpo", "label_smoothing": smoothing}
        case "dpo", "mean":
            return {"method": "dpo"}
        case "ipo", "mean":
            return {"method": "ipo-sum"}
    return {}


def _setting(key: str, value: Any, batch: int, accumulated: int) -> tuple[dict[str, Any], str]:
    if key in _RENAMED and value is not None:
        return {_RENAMED[key]: value}, ""
    if key in _UNREAD or (value is None and (key in _RENAMED or key in ("n_examples", "model.archive"))):
        return {}, "dropped: nothing reads it here" if value is not None else "dropped: null, the default"
    match key:
        case "batch_size":
            return {"per_device_train_batch_size": batch // accumulated}, "on one device; on N, divide it by N"
        case "eval_every":
            steps = int(_above_zero({key: value}, key, batch)) // batch
            return {"eval_strategy": "steps", "eval_steps": max(steps, 1)}, f"steps of {batch} examples"
        case "n_examples":
            return {"max_steps": int(_above_zero({key: value}, key, batch)) // batch}, f"steps of {batch} examples"
        case "optimizer" if value in _OPTIMIZERS:
            return {"optim": _OPTIMIZERS[value]}, ""
        case "wandb":
            on = isinstance(value, Mapping) and value.get("enabled")
            return {"report_to": "wandb" if on else "none"}, ""
        case "noise_rate":
            return ({"noise": f"random:{value}"}, "") if value else ({}, "dropped: no labels are flipped")
        case "datasets" if value == ["hh"]:
            return {"dataset_name": "Anthropic/hh-rlhf"}, ""
        case "datasets" if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return {}, "dropped: its own code makes these pairs; give --dataset_name"
        case "model.fsdp_policy_mp":
            return {"bf16": value == "bfloat16"}, ""
        case "model.archive":
            raise ValueError(
                f"model.archive: {value} is a state dict: save the model with save_pretrained, name its folder as "
                "model.name_or_path, and remove model.archive"
            )
    return {key: value}, ""


def _above_zero(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{key} must be a number above 0; it is {value!r}")
    return value
