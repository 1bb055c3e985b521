"""Options of the subcommands: dataclass fields that are flags and keys of a config file."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from types import MappingProxyType
from typing import Any

from trl import TrlParser

from ..checks import Takes, check_options, options_of
from .config_file import Settings, check_known, read_yaml, typed
from .setup import MAX_LENGTH

DTYPES = ("float32", "bfloat16", "float16", "auto")
LENGTH = f"Longest prompt and completion, in tokens. By default that of the model's training run, else {MAX_LENGTH}."


def option(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A dataclass field with the help text of its flag; without a default, a required flag."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(kw_only=True)
class Options:
    """Options whose values are checked."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(kw_only=True)
class RowOptions(Options):
    """How to read a data set."""

    dataset_config: str | None = option("Configuration of a Hub data set.", None)
    prompt_column: str | None = option("Column with the prompt, if it is not `prompt`.", None)
    system_column: str | None = option("Column with each row's system message.", None)


@dataclass(kw_only=True)
class ScoredRowOptions(RowOptions):
    """How to read a data set and its scores."""

    score_columns: list[str] | None = option("Score columns, if they do not have one of the usual names.", None)


class OptionsParser(TrlParser):
    """Flags and a `--config` file for the fields of dataclasses. A flag overrides the file; unknown names are errors.

    Args:
        command: the subcommand.
        kinds: the dataclasses.
        scope: what decides which options there are, for errors.
        flags_only: fields that a file cannot set.
        old_keys: keys that are known under another name, for errors.
    """

    def __init__(
        self,
        command: str,
        *kinds: Any,
        scope: str = "",
        flags_only: Collection[str] = (),
        old_keys: Collection[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(kinds, prog=f"trl-margins {command}", allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file with any of these options.")
        self._held: Mapping[str, Any] = {}
        self.scope, self.flags_only, self.old_keys = scope, {"help", "config", *flags_only}, old_keys

    @property
    def _options(self) -> dict[str, Takes]:
        return {name: takes for kind in self.dataclass_types for name, takes in options_of(kind).items()}

    @property
    def keys(self) -> set[str]:
        """Keys that a config file can have."""
        return {"env", *(action.dest for action in self._actions)} - self.flags_only

    def check_keys(self, settings: Settings, source: str) -> None:
        """
        Raises:
            ValueError: unknown keys.
        """
        check_known(settings, self.keys, source, also=self.old_keys)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's, with the held options at their values; `said` has what was said of them."""
        found, rest = super().parse_known_args(args, namespace)
        self.said = {name: getattr(found, name) for name in self._held}
        for name, value in self._held.items():
            setattr(found, name, value)
        return found, rest

    def parse(
        self,
        args: Sequence[str],
        settings: Settings | None = None,
        source: str = "",
        held: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[Any, ...]:
        """The dataclasses that flags and file describe.

        Args:
            args: flags.
            settings: the file's settings, if they have been read.
            source: where they are from.
            held: values that options get, whatever is said of them.

        Raises:
            ValueError: an unknown option or key, or a value that its field does not take.
        """
        if settings is None:
            files = ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
            files.add_argument("--config")
            source = files.parse_known_args(list(args))[0].config or ""
            settings = read_yaml(source) if source else {}
        self.check_keys(settings, source)
        self.set_defaults_with_config(**typed(settings, self._options, source))
        _set_environment(settings.get("env"), source)
        self._held = held
        # before argparse asks for a required option that is only misspelled
        flags = [text.partition("=")[0] for text in args if text.startswith("--") and text != "--"]
        check_known((flag for flag in flags if " " not in flag), self._option_string_actions, self.scope, "option")
        try:
            *parsed, _, rest = self.parse_args_into_dataclasses(list(args), return_remaining_strings=True)
        except (ValueError, TypeError, RuntimeError) as error:  # of transformers' configs, about their fields
            raise ValueError(str(error)) from error
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}: put the option that it belongs to in front of it")
        return tuple(parsed)


def _set_environment(variables: Any, source: str) -> None:
    if not isinstance(variables, dict | None):
        raise ValueError(f"{source}: env must be a mapping from environment variables to values")
    for name, value in (variables or {}).items():
        if not isinstance(name, str) or not name or set(name) & {"=", "\0"} or isinstance(value, dict | list):
            raise ValueError(f"{source}: env must be a mapping from environment variables to values; {name!r} is not")
    os.environ.update({name: str(value) for name, value in (variables or {}).items() if value is not None})


def data_first(args: Sequence[str]) -> list[str]:
    """The flags, with that of the data set added where the data set comes first without it."""
    named = bool(args) and not args[0].startswith("-")
    return [*(["--dataset_name"] if named else []), *args]
