"""`trl-margins train --dry_run`: the settings of a run, as YAML that `--config` takes."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from .config_file import as_yaml

if TYPE_CHECKING:
    from trl import ModelConfig
    from trl.scripts.utils import DatasetMixtureConfig

# printed elsewhere, not a setting, a secret, or transformers' copy of `gradient_checkpointing…`
_HIDDEN = frozenset(
    {"method", "base", "recipe", "dry_run", "hub_token", "activation_checkpointing", "activation_checkpointing_kwargs"}
)


def resolved(script: Any, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> str:
    """Method, base, model, data, and every field that differs from TRL's default or from the method's."""
    from ..trainers.configs import config_class

    plain_config: Any = config_class(None, script.base)
    defaults: list[Any] = [kind(use_cpu=True, bf16=False) for kind in (plain_config, type(config))]
    for plain in defaults:  # what depends on the machine
        plain.bf16, plain.use_cpu, plain.dataloader_pin_memory = None, False, True
    parts = {
        f"The objective: {type(config).__name__}": {"method": script.method, "base": script.base},
        "Model": _changed(model_args, type(model_args)()),
        "Data": {**_changed(script, type(script)()), **_changed(mixture, type(mixture)())},
        f"Other settings that differ from the defaults of TRL's {script.base.upper()}Trainer or of the method": (
            _changed(config, *defaults)
        ),
    }
    *_, others = parts.values()
    if config.max_steps > 0 and config.num_train_epochs == defaults[-1].num_train_epochs:
        others.pop("num_train_epochs", None)  # the method's, which is not read
    model = parts["Model"]
    if any(name.startswith(("lora_", "load_in_")) for name in model):  # which without a word of use_peft are refused
        model["use_peft"] = model_args.use_peft
    return "\n".join(f"# {title}\n{as_yaml(part)}" for title, part in parts.items() if part)


def _changed(values: Any, *defaults: Any) -> dict[str, Any]:
    """The fields of `values` that differ from one of the defaults."""
    names = [item.name for item in fields(defaults[0]) if item.init and item.name not in _HIDDEN]
    found = {name: plain(getattr(values, name)) for name in names}
    return {name: value for name, value in found.items() if any(value != plain(getattr(d, name)) for d in defaults)}


def plain(value: Any) -> Any:
    """As YAML can write it."""
    match value:
        case Enum():
            return value.value
        case dict():
            return {name: plain(each) for name, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case None | str() | int() | float():
            return value
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(each) for name, each in asdict(value).items() if each is not None}
    return str(value)
