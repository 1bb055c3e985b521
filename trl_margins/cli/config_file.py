"""Config files: YAML that is read safely, checked against known keys, and typed like flags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from ..checks import Takes, nearest, odd_letters
from ..redaction import redacted
from .other_keys import ONE_BASE, foreign, said

Settings = dict[str, Any]

_OF_ADAPTERS = re.compile(
    r"(lora_(r|alpha|dropout|target_modules|target_parameters|modules_to_save)|use_rslora|use_dora|"
    r"load_in_[48]bit|bnb_4bit_quant_(type|storage)|use_bnb_nested_quant)$"
)

_OTHER_BASE = re.compile(r"[-+]?(?:0[0-7_]+|[0-9_]+(?::[0-9.]+)+)")
# Keys of model_init_kwargs, and the options that say the same
_LOADING = {
    **{name: name for name in ("dtype", "attn_implementation", "trust_remote_code")},
    **{"torch_dtype": "dtype", "revision": "model_revision"},
}
MAX_VALUES = 100_000  # of a file with its aliases expanded; the longest recipe has a few dozen
MAX_DEPTH = 50


def read_yaml(path: str | Path) -> Settings:
    """The settings of a YAML file. A key without a value is treated as absent, which null is not.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, or not a mapping.
        yaml.YAMLError: invalid YAML, a tag, a duplicate key, or aliases that expand without end; with the line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the YAML file in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no YAML file {path}")
    written = path.read_bytes()
    try:
        text = written.decode()
    except UnicodeDecodeError as error:
        number, byte = written.count(b"\n", 0, error.start) + 1, written[error.start]
        raise ValueError(f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from None
    try:
        settings = yaml.load(text, Loader=ConfigLoader)
    except yaml.MarkedYAMLError as error:
        at = _line_of(error, text)
        line = "" if at is None else f", line {at}"
        of_line = "" if at is None else text.split("\n")[at - 1]
        blank = odd_letters("".join(filter(str.isspace, of_line)))  # which looks like a space
        problem = ", ".join(part for part in (error.context, error.problem, blank) if part)
        said = f'{problem}, in "{path}"{line}. A config has one line `key: value` per setting, indented with spaces, '
        raise type(error)(None, None, f"{said}without tags.") from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        where = f'"{path}", position {error.position} (line {number})'
        raise yaml.YAMLError(f"{chr(error.character)!r} is no character of a text, in {where}") from error
    except ValueError as error:  # of Python, about a number
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path}: a config is a YAML mapping from keys to values, not a {type(settings).__name__}")
    return settings or {}


def _line_of(error: yaml.MarkedYAMLError, text: str) -> int | None:
    """The line at fault. Of `seed:1`, YAML notices only in the next line that it is no setting."""
    mark = error.problem_mark or error.context_mark
    if str(error.context).endswith(("simple key", "quoted scalar", "flow sequence", "flow mapping")):
        mark = error.context_mark or mark
    if mark is None:
        return None
    number = mark.line
    if error.context is None and error.problem == "mapping values are not allowed here":
        above = list(enumerate(text.split("\n")[:number]))
        before = next(((i, line) for i, line in reversed(above) if line.partition("#")[0].strip()), None)
        if before is not None and not re.search(r":([ \t]|$)|^\s*-\s", before[1]):
            number = before[0]
    return number + 1


def as_yaml(settings: Mapping[str, Any]) -> str:
    """YAML with the keys in their order, and without secrets."""
    return yaml.dump(redacted(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which escapes all line breaks: some are characters to one reader and not to another."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


class ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses tags, duplicate keys, deep nesting and aliases that expand to too many
    values. Dates are text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}  # values in each node, aliases expanded
        self._depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if isinstance(node, yaml.MappingNode):
            node.value = [(key, value) for key, value in node.value if not _is_empty(value)]
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        if tag := getattr(event, "tag", None):
            problem = f"could not determine a constructor for the tag {tag!r}"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        if self._depth > MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} levels deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or (is_alias and node in self._sizes):
            return node
        if is_alias:
            raise _error("an alias stands for something that it is part of", node)
        if isinstance(node, yaml.ScalarNode) and _OTHER_BASE.fullmatch(node.value) and ":str" not in node.tag:
            raise _error(f"{node.value} is a number to base 8 or 60 to YAML: write 10, 0.5 or '1:30'", node)
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in parts if isinstance(key, yaml.ScalarNode)]
            names = [key.value for key in keys]
            if twice := [key for i, key in enumerate(keys) if key.value in names[:i]]:
                first = keys[names.index(twice[0].value)].start_mark.line + 1
                raise _error(f"the key {twice[0].value!r} is there twice, first in line {first}", twice[0])
            parts = [part for pair in parts for part in pair]
        self._sizes[node] = 1 + sum(self._sizes[part] for part in parts)
        if self._sizes[node] > MAX_VALUES:
            raise _error(f"its aliases expand to more than {MAX_VALUES:,} values: write them out", node)
        return node


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == "" and node.tag.endswith(":null")


def _error(problem: str, node: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
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
    ours = {name.lstrip("-").replace("-", "_") for name in known}
    dashed = [] if is_flag else [key for key, name in plain.items() if key != name and key in {*known, *also}]
    complaints = [f"keys have underscores, not dashes: {', '.join(dashed)}"] if dashed else []
    bases = {base for key, base in ONE_BASE.items() if key in ours}
    elsewhere = {key: ONE_BASE[key] for key in plain if len(bases) == 1 and key in ONE_BASE and key not in dashed}
    complaints += [f"{plain[key]} is an option of base {base}" for key, base in elsewhere.items()]
    plain = {key: name for key, name in plain.items() if key not in {*dashed, *elsewhere}}
    theirs = foreign(plain, ours)
    for project, keys in theirs.items():
        told = ", ".join(said(name, here, is_flag) for name, here in keys.items())
        complaints.append(f"{_plural(what, keys)} of {project}: {told}")
    claimed = {name for keys in theirs.values() for name in keys}
    if left := [name for key, name in plain.items() if key not in claimed]:
        meant = {name: nearest(name, [*known, *also]) for name in left}
        hints = {name: f"did you mean {near!r}?" if near else odd_letters(name) for name, near in meant.items()}
        told = ", ".join(repr(name) + (f" ({hint})" if hint else "") for name, hint in hints.items())
        complaints.append(f"unknown {_plural(what, left)} {told}")
    raise ValueError((f"{where}: " if where else "") + "; ".join(complaints))


def flags_said(args: Sequence[str]) -> Settings:
    """The flags among the arguments by their fields' names, each with its first value."""
    following = [*args, "--"][1:]
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


def check_loading(said: Mapping[str, Any], init: Mapping[str, Any] | None) -> None:
    """Refuses options of the model that `model_init_kwargs` contradicts, which would count.

    Raises:
        ValueError: such an option, with both values.
    """
    for key, value in (init or {}).items():
        name = _LOADING.get(key)
        if name and said.get(name) is not None and str(said[name]).lower() != str(value).lower():
            raise ValueError(
                f"{name} is {said[name]}, and model_init_kwargs has {key}: {value}: give the one that is meant, once"
            )


def _plural(what: str, names: Collection[str]) -> str:
    return f"{what}s" if len(names) > 1 else what


def typed(settings: Mapping[str, Any], options: Mapping[str, Takes], where: str) -> Settings:
    """The settings in the types of their options.

    Raises:
        ValueError: a value that its option does not take.
    """
    try:
        return {name: options[name].read(value) if name in options else value for name, value in settings.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def short(value: Any) -> str:
    """A value as YAML has it, and no longer than a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
