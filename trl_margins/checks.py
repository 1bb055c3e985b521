"""Validate option values and the environment. Standard library alone."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from difflib import SequenceMatcher
from enum import Enum
from functools import cache
from numbers import Integral, Real
from reprlib import repr as shortened
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .redaction import is_secret


def shown(value: Any) -> str:
    """The value as Python writes it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


@dataclass(frozen=True)
class Number:
    """The numbers that an option takes: finite, and within its bounds."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None  # a value out of bounds with a meaning of its own
    whole: bool = False
    optional: bool = False  # None is one of the values
    meaning: str = ""  # of a value that people look for

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.least, "at most": self.most, "below": self.below}
        said = " and ".join(f"{words} {bound:.10g}" for words, bound in bounds.items() if bound is not None)
        kind = "a whole number" if self.whole else "a number" if said else "a finite number"
        also = "" if self.also is None else f", or {self.also:g}"
        said = kind + (f", {said}" if said else "") + also + (", or None" if self.optional else "")
        return said + (f" ({self.meaning})" if self.meaning else "")

    def check(self, name: str, value: Any) -> None:
        """
        Raises:
            ValueError: another value, with the option's name and what it takes.
        """
        if not (self._has(value) or (self.optional and value is None)):
            hint = " (got a string; remove the quotes)" if isinstance(value, str) else ""
            raise ValueError(f"{name} must be {self}; it is {shown(value)}{hint}")

    def _has(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        return number == self.also or (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def unknown(what: str, value: Any, known: Iterable[str]) -> ValueError:
    """The error that lists what is known, and names the nearest."""
    names = list(known)
    meant = nearest(str(value), names)
    hint = f"; did you mean {meant!r}?" if meant else ""
    return ValueError(f"unknown {what} {shown(value)}; known: {', '.join(names)}{hint}")


_BLANK_LETTERS = dict.fromkeys(map(ord, "\u034f\u115f\u1160\u3164\uffa0"))  # whatever Unicode calls them


def looks_like(name: str, known: Iterable[str]) -> str | None:
    """The known name that a reader takes another one for, which has characters that nobody sees, or letters of another
    alphabet.
    """
    if name.isascii() and name.isprintable() and name == name.strip():
        return None
    text = unicodedata.normalize("NFKC", name.translate(_BLANK_LETTERS)).strip()
    text = "".join(each for each in text if unicodedata.category(each) not in ("Cc", "Cf", "Mn"))
    if 2 * sum(map(str.isascii, text)) <= len(text):  # a word of another alphabet
        return None
    # what is written with an accent does not look like what has none
    like = "".join(re.escape(each) if each.isascii() or unicodedata.decomposition(each) else "." for each in text)
    return next((each for each in known if each != name and re.fullmatch(like, each)), None)


class RepeatedKeyError(ValueError):
    """An object of JSON has a key twice: some readers take the first of its values, others the last."""

    def __init__(self, key: str, found: Mapping[str, Any]) -> None:
        super().__init__(f"the key {key!r} more than once in {shortened(found)}: remove one")
        self.key = key


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook`: an object as a dict; a RepeatedKeyError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKeyError(next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1), found)
    return found


def names_a_column(name: str) -> bool:
    """Whether a log can have it as a column: no line of a CSV file has to be quoted for it."""
    return name.isprintable() and name.strip() == name != "" and not {*name} & {*',"'}


def check_path(name: str, path: Any) -> None:
    """
    Raises:
        ValueError: a path that no file can have.
    """
    if isinstance(path, str | os.PathLike) and "\0" in os.fspath(path):
        raise ValueError(f"{name} is {os.fspath(path)!r}, and no path has a NUL character: correct it")


def why_look_alike(names: Iterable[str], read: Iterable[str]) -> str | None:
    """Which of a data set's columns looks like one of those that are read, and is another; None if none does."""
    there = list(names)
    missing = [name for name in read if name not in there]
    for name in there:
        if meant := looks_like(name, missing):
            odd = odd_letters(name) or "it has a blank or a control character"
            return f"the column {name!a} looks like {meant!r}, and is not, since {odd}: rename it"
    return None


def odd_letters(name: str) -> str:
    """The first character that ASCII does not have, by its name: some look like another."""
    return next((f"{each!r} is {unicodedata.name(each, ascii(each))}" for each in name if not each.isascii()), "")


# Objectives in their own right, and one letter from a name of the package
_NO_SLIPS = frozenset({"alphadpo", "betadpo", "cdpo", "rdpo"})


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of which this is a slip of the pen, if there is one.

    Word by word: `use_lora` resembles `use_rslora`, and `lora_rank` resembles `local_rank`, but no slip turns one into
    the other, and who follows a wrong suggestion trains something else.
    """
    parts = _words(name)
    if "".join(parts) in _NO_SLIPS:
        return None
    slips = {}
    for each in known:
        theirs = _words(each)
        if "".join(parts) == "".join(theirs):
            return each
        if len(parts) == len(theirs) and all(map(_is_slip, parts, theirs)):
            slips[each] = SequenceMatcher(None, name, each).ratio()
    return max(slips, key=slips.__getitem__, default=None)


def _words(name: str) -> list[str]:
    return re.split(r"[-_ ]+", name.lower().strip("-_ "))


def _is_slip(word: str, meant: str) -> bool:
    if sorted(word) == sorted(meant):  # letters swapped
        return True
    digits = [[letter for letter in each if letter.isdigit()] for each in (word, meant)]
    return digits[0] == digits[1] and word[:1] == meant[:1] and SequenceMatcher(None, word, meant).ratio() >= 0.8


_POSITIVE, _NOT_NEGATIVE, _AT_LEAST_ONE = Number(above=0), Number(least=0), Number(least=1)
_SHARE, _BELOW_ONE = Number(least=0, most=1), Number(least=0, below=1)
_SEED = Number(least=0, below=2**32)  # NumPy's

# The bounds of the numbers among all options, TRL's and transformers' own included; whether one is whole
# or can be None, its type says
NUMBERS: Mapping[str, Number] = MappingProxyType(
    {
        **dict.fromkeys(("beta", "gamma_po_tau", "discopop_tau", "num_train_epochs"), _POSITIVE),
        "test_split_size": _POSITIVE,
        "k": Number(least=1, whole=True),
        **dict.fromkeys(("min_gap", "dpop_lambda", "focalpo_gamma", "reward_aware_eta"), _NOT_NEGATIVE),
        **dict.fromkeys(("score_gap_threshold", "gamma_po_queue_size", "eval_min_score_gap"), _NOT_NEGATIVE),
        **dict.fromkeys(
            ("anchor_radius", "anchor_keep_graphs", "anchor_diagnostics", "sam_radius", "cpo_alpha", "ef_sample"),
            _NOT_NEGATIVE,
        ),
        **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay"), _NOT_NEGATIVE),
        "max_grad_norm": Number(least=0, meaning="0 clips nothing"),
        "adam_epsilon": Number(least=1e-38),  # else 0 / 0 where a gradient is 0, in float32
        **dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "eval_delay"), _NOT_NEGATIVE),
        **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha", "router_aux_loss_coef"), _NOT_NEGATIVE),
        **dict.fromkeys(("gamma_po_steps", "gamma_po_estimation_size", "amapo_estimation_size"), _AT_LEAST_ONE),
        **dict.fromkeys(("anchor_batch_multiplier", "max_length", "max_completion_length"), _AT_LEAST_ONE),
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _AT_LEAST_ONE),
        **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), _AT_LEAST_ONE),
        **dict.fromkeys(("dataloader_prefetch_factor", "dataset_num_proc", "torch_empty_cache_steps"), _AT_LEAST_ONE),
        **dict.fromkeys(("precompute_ref_batch_size", "ref_model_sync_steps", "ddp_bucket_cap_mb"), _AT_LEAST_ONE),
        **dict.fromkeys(("ddp_timeout", "lora_r", "lora_alpha", "num_layers", "num_proc"), _AT_LEAST_ONE),
        **dict.fromkeys(("batch_size", "bootstrap", "max_pairs"), _AT_LEAST_ONE),
        **dict.fromkeys(("n", "max_new_tokens", "max_prompts"), _AT_LEAST_ONE),
        **dict.fromkeys(("temperature", "top_k", "reward_label"), _NOT_NEGATIVE),
        **dict.fromkeys(("seed", "data_seed", "mixture_seed", "noise_seed"), _SEED),
        **dict.fromkeys(("ld_alpha", "ref_model_mixup_alpha"), _SHARE),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _BELOW_ONE),
        "top_p": Number(above=0, most=1),
        "gap_aware_floor": Number(above=0, below=1),
        "label_smoothing": Number(least=0, most=0.5),
        "fraction": Number(above=0, most=1),
        "max_steps": Number(least=1, also=-1),
    }
)
# What no run does: with more, it would go on for years, or fill the memory before it begins
_MOST: Mapping[str, float] = MappingProxyType(
    {
        "beta": 10**6,
        "gamma_beta_ratio": 10**6,
        "max_steps": 10**8,
        "num_train_epochs": 10**6,
        "gamma_po_steps": 10**4,
        **dict.fromkeys(("gamma_po_estimation_size", "amapo_estimation_size"), 10**6),
        "gamma_po_queue_size": 10**7,
        **dict.fromkeys(("max_length", "max_completion_length"), 10**9),
        **dict.fromkeys(("gradient_accumulation_steps", "anchor_batch_multiplier", "batch_size"), 10**6),
        **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 10**6),
        **dict.fromkeys(("dataloader_num_workers", "dataset_num_proc", "num_proc"), 1024),
        "dataloader_prefetch_factor": 10**4,
        "bootstrap": 10**6,
        "n": 10**5,
        "max_new_tokens": 10**7,
        **dict.fromkeys(("lora_r", "num_layers"), 10**5),
    }
)
_LARGEST = 1e30  # of the others: as far as float32 can multiply by them
_PATTERNS = ("train_only", "anchor_scope")
_NAMES = (*_PATTERNS, "score_columns")
# Options and keys that name files or folders, or what is looked up as such first
PATHS = frozenset(
    (
        *("runs", "dataset_name", "eval_dataset_name", "model_name_or_path", "tokenizer_name_or_path"),
        *("ref_model", "drift_from", "reward_model", "encoder", "gap_aware_encoder", "checkpoints"),
        *("resume_from_checkpoint", "deepspeed", "fsdp_config", "config", "output_dir"),
        *("logging_dir", "out", "output", "data_only", "json", "markdown", "rewards", "plot", "path"),
        *("data_dir", "data_files", "cache_dir"),
    )
)
_VARIABLE = re.compile(r"\$\{\w+\}|(?:^|/)\$[A-Za-z_]\w*")

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.ASCII)
_TRUTHS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    str: "text",
}  # in this order


@dataclass(frozen=True)
class Takes:
    """What an option takes, by its type, its choices and `NUMBERS`."""

    name: str
    kinds: tuple[Any, ...]  # the members of its type
    choices: tuple[Any, ...]
    number: Number | None

    def check(self, value: Any) -> None:
        """
        Raises:
            ValueError: a value that the option cannot have, with its name and what it takes.
        """
        if value is None and NoneType in self.kinds:
            return
        if self.number is not None:
            self.number.check(self.name, value)
            most = _MOST.get(self.name, _LARGEST)
            if value is not None and abs(value) > most:
                bound = f"at most {most:,}" if value > 0 else f"at least {-most:,}"
                raise ValueError(f"{self.name} must be {bound}; it is {shown(value)}")
        elif self.choices and value not in self.choices:
            raise unknown(self.name, value, self.choices)
        elif set(self.kinds) <= {bool, NoneType} and not isinstance(value, bool):
            raise ValueError(f"{self.name} must be True or False; it is {shown(value)}")

    def read(self, value: Any) -> Any:
        """The value, of YAML, in the option's type: YAML 1.1 reads 1e-6 as text.

        Raises:
            ValueError: as `check`, and a value of another type.
        """
        read = None if value is None and (self.number or NoneType in self.kinds) else self._typed(value)
        self.check(read)
        return read

    def _typed(self, value: Any) -> Any:
        listed = next((get_args(kind)[0] for kind in self.kinds if get_origin(kind) is list), None)
        plain = [kind for kind in _WORDS if kind in self.kinds]
        try:
            if listed is not None and (isinstance(value, list) or not plain):
                return [_as(listed, each) for each in (value if isinstance(value, list) else [value])]
        except (ValueError, KeyError) as error:
            said = f" ({error})" if is_dataclass(listed) else ""
            raise ValueError(f"{self._must_be(plain, listed)}; it is {self._shown(value)}{said}") from error
        for kind in plain:
            try:
                return _as(kind, value)
            except (ValueError, KeyError):
                continue
        if not plain:
            raise ValueError(f"{self.name} can be set in Python only")
        hint = ": put it in quotes" if str in plain and isinstance(value, bool | int | float) else ""
        if NoneType in self.kinds and str(value).lower() == "none":
            hint = ": YAML writes None as null"
        if isinstance(value, str) and "\u2212" in value:
            hint = ": its minus is no hyphen"
        raise ValueError(f"{self._must_be(plain, listed)}; it is {self._shown(value)}{hint}")

    def _shown(self, value: Any) -> str:
        return f"a {type(value).__name__}" if is_secret(self.name) else shown(value)

    def _must_be(self, plain: list[type], listed: Any) -> str:
        words = [_WORDS[kind] for kind in plain]
        if listed is not None:
            words.append(f"a list, each {_WORDS.get(listed, 'a mapping')}")
        return f"{self.name} must be {' or '.join(words)}"


def _as(kind: Any, value: Any) -> Any:
    """The value as a bool, a number, text, a mapping, or the fields of a dataclass."""
    if kind is bool:
        return _TRUTHS[str(value).lower()]
    if kind in (int, float):
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not a number")
        return kind(str(value))
    if not isinstance(value, dict if is_dataclass(kind) else kind):
        raise ValueError(f"{value!r} is not {_WORDS.get(kind, 'a mapping')}")
    if kind is str and "\0" in value:
        raise ValueError("text has no NUL")
    return _as_fields(kind, value) if is_dataclass(kind) else value


def _as_fields(kind: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    known = options_of(kind)
    if strange := [name for name in value if name not in known]:
        raise unknown("key", strange[0], known)
    missing = [item.name for item in fields(kind) if default_of(item) is MISSING and value.get(item.name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return {name: known[name].read(each) for name, each in value.items() if each is not None}


@cache
def options_of(cls: Any) -> Mapping[str, Takes]:
    """What the fields of a dataclass take, by their names."""
    hints, found = get_type_hints(cls), {}
    for item in fields(cls):
        kind = hints[item.name]
        kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,))
        choices = tuple(item.metadata.get("choices") or ())
        for each in list(kinds):
            if isinstance(each, type) and issubclass(each, Enum):  # its values are texts
                kinds, choices = kinds - {each} | {str}, tuple(member.value for member in each)
            elif get_origin(each) is Literal:
                kinds |= {type(value) for value in get_args(each)}
            elif get_origin(each) is dict:
                kinds |= {dict}
        if item.default is None:
            kinds.add(NoneType)
        number = None
        if kinds & {int, float} and not kinds & {str, bool}:
            row = NUMBERS.get(item.name, Number())
            number = replace(row, whole=float not in kinds, optional=NoneType in kinds)
        found[item.name] = Takes(item.name, tuple(kinds), choices, number)
    return MappingProxyType(found)


def check_options(options: Any) -> None:
    """Checks the fields of a config, or of a command's options, one by one.

    Raises:
        ValueError: a value that its field cannot have, with the field's name and what it takes.
    """
    kind: Any = type(options)
    for name, takes in options_of(kind).items():
        takes.check(getattr(options, name))
        check_text(name, getattr(options, name))
    for name in _NAMES:
        if getattr(options, name, None) is not None:
            check_names(name, getattr(options, name))
    for name in _PATTERNS:
        for pattern in getattr(options, name, None) or ():
            if not pattern.strip():
                raise ValueError(f"{name} has an empty pattern, which is in every name: leave it out")
            expression_of(name, pattern)


def check_text(name: str, value: Any) -> None:
    """Checks a text, or all texts in lists, mappings and dataclasses.

    Raises:
        ValueError: text with bytes that are none, as Python passes on those of a name on a disk; with NUL, or with a
            variable that nobody replaces; of a file or folder, an empty name, or one of an unknown home.
    """
    if isinstance(value, Mapping) or is_dataclass(value):
        for key, each in (value if isinstance(value, Mapping) else vars(value)).items():
            check_text(f"{name}.{key}", each)
    elif isinstance(value, list | tuple):
        for each in value:
            check_text(name, each)
    elif isinstance(value, str) and name != "chat_template":  # of which any text may be part
        _check_one_text(name, value, is_path=name.rpartition(".")[2] in PATHS)


def _check_one_text(name: str, value: str, is_path: bool) -> None:
    if "\0" in value:
        raise ValueError(f"{name} is {shown(value)}: a text has no NUL character")
    if is_path and not value.strip():
        raise ValueError(f"{name} is {value!r}, which names nothing: give a name, or leave the option out")
    variable = None if name.endswith(("column", "columns")) else _VARIABLE.search(value)
    if variable and not os.path.exists(value):
        raise ValueError(
            f"{name} is {shown(value)}, and nothing replaces {variable[0].lstrip('/')} there: write its value, or let "
            "a shell do it, on the command line and outside single quotes"
        )
    if is_path and value.startswith("~") and os.path.expanduser(value) == value and not os.path.exists(value):
        raise ValueError(f"{name} is {shown(value)}, and there is no such home folder: write the whole path")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} is {value!r}, of which some bytes are no text here: rename it, or, if the name is right in "
            "another locale, set PYTHONUTF8=1"
        ) from None


def expression_of(name: str, pattern: str) -> re.Pattern[str]:
    """A pattern that an option gives.

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} pattern {pattern!r} is not a regular expression: {error}") from error


def truth_of(value: Any) -> bool:
    """What a bool, 0 or 1, or one of the words that an option takes says.

    Raises:
        ValueError: any other value.
    """
    if isinstance(value, float) and value in (0, 1):
        return bool(value)
    try:
        return _TRUTHS[str(value).strip().lower()]
    except KeyError:
        raise ValueError(f"{shown(value)} is neither true nor false") from None


def values_of(value: Any, key: str = "") -> Any:
    """A value of a mapping with the bools and numbers that texts in it spell: YAML 1.1 reads 1e-7 as text."""
    if isinstance(value, Mapping):
        return {name: values_of(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [values_of(each, key) for each in value]
    if not isinstance(value, str) or key.endswith("revision"):  # a commit may have digits alone
        return value
    if (text := value.strip().lower()) in ("true", "false", "yes", "no"):
        return text in ("true", "yes")
    if _NUMBER.fullmatch(text):
        return float(text) if {".", "e"} & set(text) else int(text)
    return value


def default_of(item: Field[Any]) -> Any:
    """The default of a dataclass field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def option_prefix(name: str) -> str:
    """What the config fields of a term or a reward begin with, unless its class says otherwise."""
    return name.replace("-", "_") + "_"


def check_names(option: str, value: Any) -> None:
    """
    Raises:
        ValueError: not a list of strings, or an empty one.
    """
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{option} must be a list of one or more names; it is {shown(value)}")


def launched_processes() -> tuple[int, str]:
    """How many processes a launcher started, this one included, and the variable that says so."""
    # torchrun's and accelerate's, then those of MPI. Slurm's tasks may be runs of their own.
    names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    sizes = ((os.environ.get(name, ""), name) for name in names)
    return max(((int(size), name) for size, name in sizes if size.isdecimal()), default=(1, ""))
