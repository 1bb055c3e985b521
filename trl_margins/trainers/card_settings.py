"""The settings of a training that are worth telling: of its loss, its terms, what trains, and the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from ..registry import OPTIONS, option_fields
from ..report.markdown import python_text
from ..terms import Term

if TYPE_CHECKING:
    from .mixin import MarginMixin

# what is said of every training, beside the fields of its terms
DATA = ("score_columns", "eval_min_score_gap")
_LOSS = ("loss_type", "loss_weights", "label_smoothing", "cpo_alpha", "alpha", "f_divergence_type")
TRAINING = (
    "train_only",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_completion_length",
    "bf16",
    "fp16",
    "seed",
)
_ALWAYS_OF_PEFT = ("r", "lora_alpha", "lora_dropout", "target_modules")
_NEVER_OF_PEFT = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version")


def reward_kind(trainer: MarginMixin) -> str:
    return trainer.objective.reward.name


def adapter_kind(model: Any) -> str | None:
    if not is_peft_model(model):
        return None
    kind = str(_plain(model.active_peft_config.peft_type))
    return {"LORA": "LoRA"}.get(kind, kind)


def settings(trainer: MarginMixin) -> list[tuple[str, Any]]:
    """Config field, or words, and value."""
    config, objective = trainer.args, trainer.objective
    base = DPOTrainer if isinstance(trainer, DPOTrainer) else CPOTrainer
    rows: list[tuple[str, Any]] = [
        ("trainer", f"{type(trainer).__name__}, on TRL's {base.__name__}"),
        ("reward", reward_kind(trainer)),
        ("beta", objective.beta),
    ]
    uses_target = any(term.takes_target() for term in objective.margins) or objective.shared_margin
    if uses_target or (not objective.margins and getattr(config, "gamma_beta_ratio", None) is not None):
        rows.append(("simpo_gamma", f"{objective.gamma:g} (in reward units, β inside)"))
        rows.append(("gamma_beta_ratio", f"{objective.gamma / objective.beta:g} (the same, divided by β)"))
    of_reward = option_fields(type(objective.reward), "reward").values()
    rows += [
        (name, getattr(config, name))
        for name in of_reward
        if name in OPTIONS and "objective" not in trainer.from_python
    ]
    for kind, terms in (("weight", objective.weights), ("margin", objective.margins)):
        rows += _term_settings(trainer, kind, terms)
    if trainer.options.sam_radius:
        rows += [("sam_radius", trainer.options.sam_radius), ("anchor_scope", trainer.options.anchor_scope)]
    trained, total = _parameters(trainer.model)
    rows += [
        *changed(config, _LOSS, always=("loss_type",)),
        ("trained parameters", f"{trained:,} of {total:,} ({100 * trained / max(total, 1):.3g} %)"),
    ]
    if is_peft_model(trainer.model):
        options = ", ".join(f"{name}={python_source(value)}" for name, value in adapter_options(trainer.model).items())
        rows.append((f"{adapter_kind(trainer.model)} adapter", options))
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})
    precision = trainer.accelerator.mixed_precision
    rows += [(name, _told(name, getattr(config, name))) for name in TRAINING if _worth_a_row(config, name)]
    rows += [
        ("pairs an optimizer step", _batch(trainer)),
        ("optimizer steps", trainer.state.global_step),
        ("weights kept in", dtypes if precision == "no" else f"{', '.join(dtypes)}; computed in {precision}"),
    ]
    return [(name, value) for name, value in dict(rows).items() if value is not None]


def _term_settings(trainer: MarginMixin, kind: str, terms: Sequence[Term]) -> list[tuple[str, Any]]:
    """The terms, and the fields that describe them; of terms from Python, their own attributes."""
    if not terms:
        return []
    if f"{kind}_term" in trainer.from_python or "objective" in trainer.from_python:
        rows = [(kind, ", ".join(f"{type(term).__name__} from Python" for term in terms))]
        for term in terms:
            where = kind if len(terms) == 1 else f"{kind} {term.name}"
            own = {name: value for name, value in getattr(term, "__dict__", {}).items() if _is_plain(value)}
            rows += [(f"{where}: {name}", value) for name, value in own.items() if not name.startswith("_")]
        return rows
    options = [(name, getattr(trainer.args, name)) for name in trainer.options.term_options(kind)]
    return [(kind, ", ".join(term.name for term in terms)), *options]


def _parameters(model: Any) -> tuple[int, int]:
    """(trained, all); of DeepSpeed's shards what they are shards of."""
    if is_peft_model(model):
        return model.get_nb_trainable_parameters()
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def _batch(trainer: MarginMixin) -> str:
    config = trainer.args
    total = trainer.get_total_train_batch_size(config)
    size, windows = config.per_device_train_batch_size, config.gradient_accumulation_steps
    devices, rest = divmod(total, size * windows)
    if rest or not devices:  # the size was found by trying
        return str(total)
    return f"{total} ({size} a device × {windows} accumulated × {devices} device{'s' * (devices != 1)})"


def _told(name: str, value: Any) -> Any:
    return f"{value:g} of all steps" if name == "warmup_steps" and 0 < value < 1 else value


def _worth_a_row(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    if value is None or name in ("bf16", "fp16"):
        return False
    if name == "max_steps":
        return value > 0
    return name != "num_train_epochs" or config.max_steps <= 0


def changed(config: Any, names: Sequence[str], always: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Those of the fields that differ from their defaults."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    return [
        (name, value)
        for name in dict.fromkeys(names)
        if name in defaults
        and _is_plain(value := getattr(config, name))
        and (name in always or _plain(value) != _plain(defaults[name]))
    ]


def adapter_options(model: Any) -> Mapping[str, Any]:
    """What was chosen for an adapter."""
    config = model.active_peft_config
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if field.init
        and field.name not in _NEVER_OF_PEFT
        and _is_plain(value := _plain(getattr(config, field.name)))
        and (field.name in _ALWAYS_OF_PEFT or value not in (_plain(_default(field)), None))
    }


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    """As it is written in Python or JSON."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else value


def _is_plain(value: Any) -> bool:
    value = _plain(value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def python_source(value: Any) -> str:
    """As Python code."""
    value = _plain(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(python_source, value))}]"
    return python_text(value) if isinstance(value, str) else repr(value)
