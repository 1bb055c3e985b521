"""A training as the Python that starts it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model

from ..report.card import CardFacts, display_name, hub_id
from ..report.markdown import python_text
from .card_settings import DATA, TRAINING, adapter_options, changed, python_source
from .configs import config_class, origin_of

if TYPE_CHECKING:
    from .mixin import MarginMixin

PACKAGE = __name__.partition(".")[0]


def python_lines(trainer: MarginMixin, facts: CardFacts) -> str:
    """The training as a script, with every setting of the card that is not its config's default."""
    config = trainer.args
    arguments = [
        ("output_dir", facts.model_name),
        *changed(config, [*(name for name, _ in facts.settings), *TRAINING, *DATA]),
    ]
    ratio, usual = getattr(config, "gamma_beta_ratio", None), getattr(config, "_default_gamma_beta_ratio", None)
    arguments = [(name, value) for name, value in arguments if name not in ("simpo_gamma", "gamma_beta_ratio")]
    if ratio is not None and ratio != usual:
        arguments.append(("gamma_beta_ratio", float(f"{ratio:.6g}")))
    origin = origin_of(type(config))
    named_class = "config_class" if isinstance(origin, tuple) else origin.__name__
    made = f"{named_class}({', '.join(map(python_source, origin))})" if isinstance(origin, tuple) else named_class
    classes = [config_class if isinstance(origin, tuple) else origin, type(trainer)]
    named = {
        "model": python_text(display_name(facts.base_model or "model")),
        "args": "config",
        "train_dataset": _loaded(facts.dataset_name, "train_dataset"),
    }
    if trainer.eval_dataset is not None:
        named["eval_dataset"] = "eval_dataset"
    if is_peft_model(trainer.model):
        peft_config = trainer.model.active_peft_config
        classes.append(type(peft_config))
        options = ", ".join(f"{name}={python_source(value)}" for name, value in adapter_options(trainer.model).items())
        named["peft_config"] = f"{type(peft_config).__name__}({options})"
    named |= {name: name for name in trainer.from_python}
    names: dict[str, list[str]] = {"datasets": ["load_dataset"]} if hub_id(facts.dataset_name) else {}
    for cls in classes:
        names.setdefault(_home(cls), []).append(cls.__name__)
    return "\n".join(
        [
            *(f"from {home} import {', '.join(sorted(of_home))}" for home, of_home in sorted(names.items())),
            "",
            *_registered(trainer),
            f"config = {made}(",
            *(f"    {name}={python_source(value)}," for name, value in arguments),
            ")",
            f"trainer = {type(trainer).__name__}(",
            *(f"    {name}={value}," for name, value in named.items()),
            ")",
            "trainer.train()",
        ]
    )


def _registered(trainer: MarginMixin) -> list[str]:
    """Imports of the modules that registered what the config names."""
    objective = trainer.objective
    custom = [
        part for part in (objective.reward, *objective.terms) if not type(part).__module__.startswith(f"{PACKAGE}.")
    ]
    if not custom or trainer.from_python:
        return []
    found = {type(part).__module__: part.name for part in custom}
    lines = [
        f"# here: register {name!r}, as the script did that trained"
        if module == "__main__"
        else f"import {module}  # {name!r}"
        for module, name in found.items()
    ]
    return [*lines, ""]


def _loaded(name: str | None, otherwise: str) -> str:
    return f'load_dataset({python_text(name)}, split="train")' if hub_id(name) else otherwise


def _home(cls: Any) -> str:
    """What to import a class or function from: the package itself, where it has it."""
    package = cls.__module__.partition(".")[0]
    return package if getattr(import_module(package), cls.__name__, None) is cls else cls.__module__
