"""What the settings of a run come to, as YAML that `trl-margins train --config` takes."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from trl import ModelConfig
    from trl.scripts.utils import DatasetMixtureConfig

    from .train import TrainArguments

# said elsewhere, no setting, a secret, or transformers' copy of `gradient_checkpointing…`
_LEFT_OUT = frozenset(
    {"method", "base", "recipe", "dry_run", "hub_token", "activation_checkpointing", "activation_checkpointing_kwargs"}
)


def resolved(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> str:
    """Method, base, model, data, and every other field that is not by default what it is: TRL's, or the method's."""
    from ..trainers.configs import config_class

    defaults = [kind(use_cpu=config.use_cpu) for kind in (config_class(None, script.base), type(config))]
    for plain in defaults:
        plain.bf16 = None  # depends on the machine
    parts = {
        f"The objective: {type(config).__name__}": {"method": script.method, "base": script.base},
        "Model": _changed(model_args, type(model_args)()),
        "Data": {**_changed(script, type(script)()), **_changed(mixture, type(mixture)())},
        f"What else differs from the defaults of TRL's {script.base.upper()}Trainer, or the method's": _changed(
            config, *defaults
        ),
    }
    return "\n".join(f"# {title}\n{as_yaml(part)}" for title, part in parts.items() if part)


def as_yaml(settings: dict[str, Any]) -> str:
    """Keys in their order."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)


def _changed(values: Any, *defaults: Any) -> dict[str, Any]:
    """The fields that `values` has otherwise than one of the defaults."""
    names = [item.name for item in fields(defaults[0]) if item.init and item.name not in _LEFT_OUT]
    found = {name: _plain(getattr(values, name)) for name in names}
    return {name: value for name, value in found.items() if any(value != _plain(getattr(d, name)) for d in defaults)}


def _plain(value: Any) -> Any:
    """As YAML can say it."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(kept) for name, kept in asdict(value).items() if kept is not None}
    if isinstance(value, dict):
        return {name: _plain(kept) for name, kept in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(kept) for kept in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
