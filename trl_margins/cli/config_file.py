"""Config files: YAML that is read safely, checked against known keys, and typed like flags."""

from __future__ import annotations

import re
from argparse import Action, ArgumentTypeError
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..checks import nearest
from .other_keys import foreign, said

Settings = dict[str, Any]

_OF_ADAPTERS = re.compile(
    r"(lora_(r|alpha|dropout|target_modules|target_parameters|modules_to_save)|use_rslora|use_dora|"
    r"load_in_[48]bit|bnb_4bit_quant_(type|storage)|use_bnb_nested_quant)$"
)

MAX_VALUES = 100_000  # of a file with its aliases expanded; the longest recipe has a few dozen
_KINDS = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number"}  # types of HfArgumentParser


def read_yaml(path: str | Path) -> Settings:
    """The settings of a YAML file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a mapping.
        yaml.YAMLError: invalid YAML, a tag, a duplicate key, or aliases that expand without end; with the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no YAML file {path}")
    with open(path, encoding="utf-8") as file:
        try:
            settings = yaml.load(file, Loader=ConfigLoader)
        except yaml.MarkedYAMLError as error:
            error.note = "A config has one line `key: value` per setting, indented with spaces, without tags."
            raise
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path}: a config is a YAML mapping from keys to values, not a {type(settings).__name__}")
    return settings or {}


def as_yaml(settings: Mapping[str, Any]) -> str:
    """YAML with the keys in their order."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which escapes all line breaks: some are characters to one reader and not to another."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


class ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses duplicate keys and aliases that expand to too many values."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}  # values in each node, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None or (is_alias and node in self._sizes):
            return node
        if is_alias:
            raise _error("an alias stands for something that it is part of", node)
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in parts if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in keys]
            if twice := [key for i, key in enumerate(keys) if key.value in names[:i]]:
                raise _error(f"the key {twice[0].value!r} is there twice", twice[0])
            parts = [part for pair in parts for part in pair]
        self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        if self._sizes[node] > MAX_VALUES:
            raise _error(f"its aliases expand to more than {MAX_VALUES:,} values: write them out", node)
        return node


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, problem, node.start_mark)


def check_known(
    names: Iterable[Any], known: Collection[str], where: str = "", what: str = "key", also: Iterable[str] = ()
) -> None:
    """Refuses unknown names.

    Args:
        also: names to suggest besides the known ones.

    Raises:
        ValueError: lists them: those of another project with what they are called here, the others with the known name
            of which they are a slip.
    """
    strange = [str(name) for name in names if name not in known]
    if not strange:
        return
    is_flag = what == "option"
    plain = {name.lstrip("-").replace("-", "_"): name for name in strange}
    theirs = foreign(plain, {name.lstrip("-").replace("-", "_") for name in known})
    complaints = []
    for project, keys in theirs.items():
        told = ", ".join(said(name, here, is_flag) for name, here in keys.items())
        complaints.append(f"{_plural(what, keys)} of {project}: {told}")
    claimed = {name for keys in theirs.values() for name in keys}
    if left := [name for key, name in plain.items() if key not in claimed]:
        meant = {name: nearest(name, [*known, *also]) for name in left}
        told = ", ".join(repr(name) + (f" (did you mean {near!r}?)" if near else "") for name, near in meant.items())
        complaints.append(f"unknown {_plural(what, left)} {told}")
    raise ValueError((f"{where}: " if where else "") + "; ".join(complaints))


def flags_said(args: Sequence[str]) -> Settings:
    """The flags among the arguments by their fields' names, each with its first value."""
    following = [*args[1:], "--"]
    pairs = (
        (*text[2:].partition("=")[::2], after) for text, after in zip(args, following, strict=True) if text[:2] == "--"
    )
    return {
        name.replace("-", "_"): value or ("true" if after.startswith("--") else after) for name, value, after in pairs
    }


def check_adapter(said: Mapping[str, Any], where: str = "") -> None:
    """Refuses settings of an adapter without one: TRL would train the whole model.

    Args:
        said: what file and flags say, defaults not among it.

    Raises:
        ValueError: such settings, and nothing said of `use_peft`.
    """
    if said.get("use_peft") is not None:
        return
    trained = Path(str(said.get("model_name_or_path")), "adapter_config.json").is_file()  # an adapter already
    alone = [
        name
        for name, value in said.items()
        if _OF_ADAPTERS.match(str(name)) and not (trained and not name.startswith(("lora_", "use_")))
        if str(value).lower() not in ("none", "false", "0", "no")
    ]
    if alone:
        prefix, verb = f"{where}: " if where else "", "has" if len(alone) == 1 else "have"
        raise ValueError(
            f"{prefix}{', '.join(alone)} {verb} no effect without an adapter: add use_peft: true (--use_peft), or "
            "use_peft: false to train the whole model"
        )


def _plural(what: str, names: Collection[str]) -> str:
    return f"{what}s" if len(names) > 1 else what


def typed(settings: Mapping[str, Any], actions: Iterable[Action], where: str) -> Settings:
    """The settings with the types that flags would give them: YAML 1.1 reads 1e-6 as a string.

    Raises:
        ValueError: a value of the wrong type.
    """
    found = dict(settings)
    for action in actions:
        value, kind = found.get(action.dest), action.type
        if value is None or not callable(kind):
            continue
        many = action.nargs == "+"
        wanted = _KINDS.get(getattr(kind, "__name__", ""))
        try:
            values = [
                kind(str(each)) if wanted or isinstance(each, str) else each
                for each in (value if many and isinstance(value, list) else [value])
            ]
        except (ValueError, TypeError, ArgumentTypeError) as error:
            one = wanted or "a string"
            must = f"a list, each {one}" if many else one
            raise ValueError(f"{where}: {action.dest} must be {must}; it is {value!r}") from error
        found[action.dest] = values if many else values[0]
    return found
