"""Options of the subcommands: dataclass fields that are flags and keys of a config file."""

from __future__ import annotations

import logging
import os
import re
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from trl import TrlParser
from yaml import YAMLError

from ..checks import PATHS, Takes, check_options, check_text, default_of, options_of, shown
from .config_file import Settings, check_known, read_yaml, typed
from .launcher import NO, check_environment
from .setup import MAX_LENGTH

logger = logging.getLogger(__name__)

_NEGATIVE = re.compile(r"-(?:(?:\d+\.?\d*|\.\d+)e[-+]?\d+|inf(?:inity)?|nan)", re.IGNORECASE)
DTYPES = ("float32", "bfloat16", "float16", "auto")
LENGTH = f"Longest prompt and completion, in tokens. By default that of the model's training run, else {MAX_LENGTH}."


def option(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A dataclass field with the help text of its flag; without a default, a required flag."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(kw_only=True)
class Options:
    """Options whose values are checked. In the name of a file or folder, `~` is the home."""

    def __post_init__(self) -> None:
        check_options(self)
        for name in PATHS.intersection(vars(self)):
            value = getattr(self, name)
            if value is not None:
                home = [*map(os.path.expanduser, value)] if isinstance(value, list) else os.path.expanduser(value)
                setattr(self, name, home)


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


def warn_of_unread(
    rows: Iterable[tuple[str, Any, str]], *options: Any, said: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Names the options that are set, and that nothing reads beside the others.

    Args:
        rows: names, whether they are read, and what they are for.
        options: dataclasses that have them; a name that none has is passed over.
        said: values that nobody here has set, such as a recipe's.
    """
    for names, is_read, when in rows:
        for name in () if is_read else names.split():
            of = next((each for each in options if name in each.__dataclass_fields__), None)
            if of is None or (value := getattr(of, name)) == default_of(of.__dataclass_fields__[name]):
                continue
            if name not in said or said[name] != value:
                logger.warning("no effect of %s: it is for %s", name, when)


@contextmanager
def usage() -> Iterator[None]:
    """Errors within the block are about what was asked for: the command ends with argparse's status."""
    try:
        yield
    except (ValueError, TypeError, YAMLError) as error:
        error.exit_status = 2  # type: ignore[union-attr]
        raise


class _Help(ArgumentDefaultsHelpFormatter):
    """Every name of an option in one spelling, `--dataset_name DATASET_NAME`; that with dashes works, too."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.dest in ("help", "version"):
            return super()._format_action_invocation(action)
        names = {name[2:].replace("-", "_"): name for name in reversed(action.option_strings)}
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return " ".join(filter(None, (", ".join(reversed(names.values())), value)))


class OptionsParser(TrlParser):
    """Flags and a `--config` file for the fields of dataclasses. A flag overrides the file; unknown names are errors.

    Args:
        command: the subcommand.
        kinds: the dataclasses.
        scope: what decides which options there are, for errors.
        flags_only: fields that a file cannot set.
        groups: titles in the help, and their options; the rest is shown by `--help_all` alone.
        old_keys: keys that are known under another name, for errors.
    """

    def __init__(
        self,
        command: str,
        *kinds: Any,
        scope: str = "",
        flags_only: Collection[str] = (),
        old_keys: Collection[str] = (),
        groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(kinds, prog=f"trl-margins {command}", allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file with any of these options.")
        self._held: Mapping[str, Any] = {}
        self._hidden = self._grouped(groups) if groups else None
        self.scope, self.flags_only, self.old_keys = scope, {"help", "help_all", "config", *flags_only}, old_keys

    def _grouped(self, groups: Mapping[str, Sequence[str]]) -> Any:
        """Sorts the options into groups; the group of the rest."""
        self.add_argument("--help_all", "--help-all", action="help", help="TRL's and transformers' options, too.")
        actions = {action.dest: action for action in self._actions}
        rest, self._optionals._group_actions = self._optionals._group_actions, [actions["help"], actions["help_all"]]
        for title, names in groups.items():
            group = self.add_argument_group(title)
            group._group_actions += [actions[name] for name in names if name in actions]
        shown = {id(action) for group in self._action_groups for action in group._group_actions}
        hidden = self.add_argument_group("Other options of TRL and transformers")
        hidden._group_actions += [action for action in rest if id(action) not in shown]
        return hidden

    def print_help(self, file: Any = None) -> None:
        """argparse's, without the options of the last group where only `--help` was asked for."""
        everything = self._action_groups
        if self._hidden is not None and not {"--help_all", "--help-all"} & set(self._given):
            self._action_groups = [group for group in everything if group is not self._hidden]
            n = len(self._hidden._group_actions)
            self.epilog = f"{n} more options of TRL and transformers: {self.prog} --help_all"
        super().print_help(file)
        self._action_groups = everything

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
        self._given = args = joined(args or ())
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
        with usage():
            return self._parsed(args, settings, source, held)

    def _parsed(
        self, args: Sequence[str], settings: Settings | None, source: str, held: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        self._check_once(args)
        if settings is None:
            files = ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
            files.add_argument("--config")
            source = files.parse_known_args(list(args))[0].config
            check_text("config", source)
            source, settings = source or "", {} if source is None else read_yaml(source)
        self.check_keys(settings, source)
        self.set_defaults_with_config(**typed(settings, self._options, source))
        _set_environment(settings.get("env"), source)
        said = [value for flag, value in pairwise([*args, ""]) if flag == "--use_cpu"]
        check_environment(on_cpu=said[-1].lower() not in NO if said else settings.get("use_cpu") is True)
        self._held = held
        # before argparse asks for a required option that is only misspelled
        flags = [text.partition("=")[0] for text in args if text.startswith("--") and text != "--"]
        check_known((flag for flag in flags if " " not in flag), self._option_string_actions, self.scope, "option")
        try:
            *parsed, _, rest = self.parse_args_into_dataclasses(
                list(args), return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, TypeError, RuntimeError) as error:  # of transformers' configs, about their fields
            raise ValueError(str(error)) from error
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}: {_way_out(args, rest[0])}")
        return tuple(parsed)

    def _check_once(self, args: Sequence[str]) -> None:
        """Says which of two values of an option counts.

        Raises:
            ValueError: two lists, of which no one knows whether they were to be one; two config files.
        """
        given: dict[str, list[str]] = {}
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for text, after in zip(args, [*args, "--"][1:], strict=True):
            flag, _, value = text.partition("=")
            if (action := self._option_string_actions.get(flag)) is not None:
                given.setdefault(action.dest, []).append(value or ("true" if after.startswith("--") else after))
        for name, values in given.items():
            if name in lists and len(values) > 1:
                raise ValueError(
                    f"--{name} is there twice: give all its values behind one, since the last would count"
                )
            if len(set(values)) > 1:
                both = f"--{name} is there twice, with {shown(values[0])} and {shown(values[-1])}"
                if name == "config":
                    raise ValueError(f"{both}: write the settings into one file")
                logger.warning("%s: the last counts", both)


def _set_environment(variables: Any, source: str) -> None:
    if not isinstance(variables, dict | None):
        raise ValueError(f"{source}: env must be a mapping from environment variables to values")
    for name, value in (variables or {}).items():
        if not isinstance(name, str) or not name or set(name) & {"=", "\0"} or isinstance(value, dict | list):
            raise ValueError(f"{source}: env must be a mapping from environment variables to values; {name!r} is not")
        check_text(f"env.{name}", value)
    os.environ.update({name: str(value) for name, value in (variables or {}).items() if value is not None})


def _way_out(args: Sequence[str], unread: str) -> str:
    """What to do about an argument that no option takes."""
    words = [word for text in args for word in (text.split("=", 1) if text.startswith("--") else [text])]
    for option, value, word in zip(words, words[1:], words[2:], strict=False):
        if word == unread and option.startswith("--") and not value.startswith("--"):
            name = f"--{option[2:].replace('-', '_')}"
            more = ": join the files, or name a folder that holds them alone" if name == "--dataset_name" else ""
            return f"{name} takes one value{more}"
    return "put the option that it belongs to in front of it"


def joined(args: Sequence[str]) -> list[str]:
    """With numbers such as -1e-6 joined to their option by a `=`: argparse takes them for options."""
    words: list[str] = []
    for text in args:
        if _NEGATIVE.fullmatch(text) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={text}"
        else:
            words.append(text)
    return words


def data_first(args: Sequence[str]) -> list[str]:
    """The flags, with that of the data set added where the data set comes first without it.

    Raises:
        ValueError: a flag names another one.
    """
    if not args or args[0].startswith("-"):
        return [*args]
    if any(text.partition("=")[0] in ("--dataset_name", "--dataset-name") for text in args):
        with usage():
            raise ValueError(f"{shown(args[0])} and --dataset_name both name the data set: name one, once")
    return ["--dataset_name", *args]
