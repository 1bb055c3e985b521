"""A config's YAML: read safely, each key once, with values of the kind that the flags of the same names have."""

from __future__ import annotations

from argparse import Action, ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .aliases import check_aliases
from .dialects import Settings

_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def read_yaml(path: str | Path) -> Settings:
    """What a YAML file has.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else than keys with values.
        yaml.YAMLError: no YAML, a tag, or a key that is there twice; with its line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no YAML file {path}")
    with open(path, encoding="utf-8") as file:
        try:
            written = yaml.load(file, Loader=_EachKeyOnce)
        except yaml.MarkedYAMLError as error:
            error.note = "A config has a line `key: value` for each setting, indented by spaces, without tags."
            raise
    if not isinstance(written, dict | None):
        raise ValueError(f"{path}: a config is a YAML mapping from keys to values, not a {type(written).__name__}")
    return written or {}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's safe loader; it would take the last of keys that are there twice, and write out any number of aliases."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        check_aliases(root)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def typed(settings: Mapping[str, Any], actions: Iterable[Action], where: str) -> Settings:
    """The settings as flags of the same names would give them: for YAML 1.1, 1e-6 is a text.

    Raises:
        ValueError: a value of the wrong kind.
    """
    found = dict(settings)
    for action in actions:
        value = found.get(action.dest)
        if value is None or action.type is None:
            continue
        try:
            if action.nargs == "+":
                found[action.dest] = [
                    _typed(each, action.type) for each in (value if isinstance(value, list) else [value])
                ]
            else:
                found[action.dest] = _typed(value, action.type)
        except (ValueError, TypeError, ArgumentTypeError) as error:
            one = _KINDS.get(_made(action.type), "a text")
            wanted = f"a list, each {one}" if action.nargs == "+" else one
            raise ValueError(f"{where}: {action.dest} must be {wanted}; it is {value!r}") from error
    return found


def _typed(value: Any, kind: Callable[[str], Any]) -> Any:
    if isinstance(value, str):
        return kind(value)
    return kind(str(value)) if _made(kind) in _KINDS else value


def _made(kind: Callable[[str], Any]) -> type | None:
    """What a flag's type makes of a text; for argparse, any function is a type."""
    try:
        return type(kind("1"))
    except (ValueError, TypeError, ArgumentTypeError):
        return None
