"""Custom terms, rewards, links and methods: how to register one, and how any of them is found by name.

A package registers its own when it is imported, and names the module as an entry point:

    [project.entry-points."trl_margins.methods"]
    focal = "trl_margins_focal"

Entry points are loaded when a name is looked up that is not known yet, or when names are listed.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, field, make_dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .checks import Number, check_options, option_prefix, unknown
from .links import LINKS, Link
from .methods import MARGINS, METHODS, WEIGHTS, Method, Paper, names_of
from .rewards import REWARDS, Reward
from .terms import Term

logger = logging.getLogger(__name__)

GROUP = "trl_margins.methods"
Kind = Literal["weight", "margin"]
Base = Literal["cpo", "dpo"]

_TERMS: Mapping[str, dict[str, type[Term]]] = {"weight": WEIGHTS, "margin": MARGINS}
# What a margin's arguments of these names get: the config's own fields
_OF_EVERY_MARGIN = {"beta": "beta", "gamma": "simpo_gamma", "gamma0": "simpo_gamma"}

OPTIONS: dict[str, tuple[Any, Field[Any]]] = {}  # config field of a registered class → type, field
RESERVED: set[str] = set()  # the configs' own fields, which they add when they are imported
_failed: dict[str, BaseException] = {}  # entry point → what its import raised

T = TypeVar("T")
P = TypeVar("P", bound="Term | Reward")


# Registering


def register_term(term: type[Term], kind: Kind) -> type[Term]:
    """Makes a term available by its name, and its `__init__` arguments as config fields and flags.

    Args:
        term: a subclass of `Term`. An argument's default and annotation are its field's; the help text is the
            dataclass field's metadata "help", or the argument's line in the docstring.
        kind: "weight" or "margin".

    Raises:
        TypeError: not a subclass of `Term`, or an argument that neither a flag nor YAML can give.
        ValueError: another term has the name, or another field.
    """
    if kind not in _TERMS:
        raise unknown("kind of term", kind, _TERMS)
    return _register_class(term, Term, kind, _TERMS[kind])


def register_reward(reward: type[Reward]) -> type[Reward]:
    """Makes a reward available by its name, for `reward` in a config; its arguments become fields as a term's do.

    Raises:
        TypeError, ValueError: as `register_term`.
    """
    return _register_class(reward, Reward, "reward", REWARDS)


def register_link(link: Link, base: Base | None = None) -> Link:
    """Makes a link available by its name, for `loss_type` in a config.

    Each of its options becomes a config field and a flag.

    Args:
        link: its name is new to TRL.
        base: the base that knows it; both, if not given.

    Raises:
        ValueError: another link has the name, or another field that of an option; or a default is not a number.
    """
    bases = tuple(LINKS) if base is None else (base,)
    for one in bases:
        _check_free(LINKS[one], link.name, link, f"loss_type of the {one.upper()} base")
    # the other base's link of this name can have the same options
    own = [option for table in LINKS.values() if link.name in table for option in table[link.name].options]
    for option in link.options:
        name, default = option
        Number().check(f"the default of {name!r}, an option of loss_type {link.name!r},", default)
        if not name.isidentifier():
            raise ValueError(f"loss_type {link.name!r} has the option {name!r}: use letters, digits and _")
        if (name in OPTIONS or name in RESERVED) and option not in own:
            raise ValueError(
                f"loss_type {link.name!r} has the option {name!r}, which is another's config field already: give it "
                "another name"
            )
    for one in bases:
        LINKS[one][link.name] = link
    for name, default in link.options:
        if (name, default) not in own:
            declared: Any = field(default=default, metadata={"help": f"{name} of loss_type {link.name!r}."})
            OPTIONS[name] = float, declared
    return link


def register_method(method: Method) -> Method:
    """Makes a method available by its id, for `--method` and `config_class`.

    Raises:
        ValueError: another method has the id, its reward, loss or terms are not registered, or a base cannot carry it.
    """
    for name, of in {"paper": Paper, "defaults": Mapping}.items():
        if not isinstance(value := getattr(method, name), of):
            raise TypeError(f"{name} of method {method.id!r} is {value!r:.80}: give a {of.__name__}")
    if method.reward not in REWARDS:
        raise unknown(f"reward of method {method.id!r}", method.reward, REWARDS)
    for kind, named in {"weight": method.weight, "margin": method.margin}.items():
        for name in names_of(named):
            if name not in _TERMS[kind]:
                raise unknown(f"{kind} of method {method.id!r}", name, _TERMS[kind])
    if not isinstance(method.bases, tuple | list) or not method.bases or len({*method.bases}) < len(method.bases):
        raise ValueError(
            f"bases of method {method.id!r} must be a tuple of 'cpo' and 'dpo', its own first, or of one of them; it "
            f"is {method.bases!r}"
        )
    for base in method.bases:
        if base not in LINKS:
            raise unknown(f"base of method {method.id!r}", base, LINKS)
        if method.loss is not None and (not isinstance(method.loss, str) or method.loss not in LINKS[base]):
            raise unknown(f"loss of method {method.id!r} on the {base.upper()} base", method.loss, LINKS[base])
    if "cpo" in method.bases and (readers := _readers_of_reference(method)):
        raise ValueError(
            f"method {method.id!r} has {readers[0]!r}, which reads a reference model, and CPOTrainer has none: let "
            "its bases be ('dpo',)"
        )
    _add(METHODS, method.id, method, "method")
    return method


def _register_class(cls: type[P], parent: type, kind: str, table: dict[str, type[P]]) -> type[P]:
    if not (inspect.isclass(cls) and issubclass(cls, parent)):
        raise TypeError(f"{cls!r} cannot be registered as a {kind}: it is not a subclass of {parent.__name__}")
    if not isinstance(name := getattr(cls, "name", None), str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise TypeError(
            f"{cls.__name__} cannot be registered as a {kind}: its name is {name!r}. Use letters, digits, - and _"
        )
    if name == "none":
        raise ValueError(f"{cls.__name__} cannot be registered as {name!r}, which stands for no {kind}")
    known = table.get(name)
    if known is cls:
        return cls
    if known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
        for option in option_fields(known, kind).values():  # the same code, run again in a notebook
            OPTIONS.pop(option, None)
        del table[name]
    options = _options(cls, kind)
    for name in options:
        if name in OPTIONS or name in RESERVED:
            raise ValueError(
                f"{kind} {cls.name!r} has the config field {name!r}, which is another's already: give "
                f"{cls.__name__} another option_prefix"
            )
    _add(table, cls.name, cls, kind)
    OPTIONS.update(options)
    return cls


def _add(table: dict[str, T], name: str, value: T, what: str) -> None:
    _check_free(table, name, value, what)
    table[name] = value


def _check_free(table: Mapping[str, T], name: str, value: T, what: str) -> None:
    if table.get(name, value) is not value:
        raise ValueError(f"the {what} {name!r} is taken by {table[name]!r}: choose another name")


def _readers_of_reference(method: Method) -> list[str]:
    """The names of a method's parts that read a reference model."""
    parts: list[Any] = [
        REWARDS[method.reward],
        *(LINKS["dpo"][name] for name in names_of(method.loss) if name in LINKS["dpo"]),
    ]
    parts += [_TERMS[kind][name] for kind in _TERMS for name in names_of(getattr(method, kind))]
    return [part.name for part in parts if part.needs_reference]


# Options: from the arguments of `__init__` to config fields


def option_fields(cls: type[Any], kind: str) -> dict[str, str]:
    """Argument of `__init__` → the config field that gives it."""
    prefix = cls.option_prefix or option_prefix(cls.name)
    said = cls.option_fields if issubclass(cls, Reward) else _OF_EVERY_MARGIN if kind == "margin" else {}
    return {name: said.get(name, prefix + name) for name in inspect.signature(cls).parameters}


def own_alpha(margins: Iterable[type[Any]]) -> str | None:
    """The config field of a margin's own α, or β-DPO's a; `alpha` is AlphaPO's."""
    fields = [option_fields(each, "margin") for each in margins]
    return next((each[name] for each in fields for name in ("alpha", "a") if name in each), None)


def built(cls: type[P], kind: str, config: Any) -> P:
    """A term or reward with the arguments that a config gives.

    Raises:
        ValueError: an argument without default that the config leaves out.
    """
    given = {arg: getattr(config, name) for arg, name in option_fields(cls, kind).items() if hasattr(config, name)}
    for argument in inspect.signature(cls).parameters:
        if _default(cls, argument) is inspect.Parameter.empty and given.get(argument) is None:
            raise ValueError(f"{kind} {cls.name!r} needs {option_fields(cls, kind)[argument]}, which is not set")
    return cls(**given)


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _options(cls: type[Any], kind: str) -> dict[str, tuple[Any, Field[Any]]]:
    """The config fields of a class's own arguments: name → type, field."""
    hints = get_type_hints(cls.__init__)
    found: dict[str, tuple[Any, Field[Any]]] = {}
    for argument, name in option_fields(cls, kind).items():
        if kind == "margin" and argument in _OF_EVERY_MARGIN:
            continue
        default = _default(cls, argument)
        if inspect.signature(cls).parameters[argument].kind not in _BY_NAME:
            raise TypeError(
                f"argument {argument!r} of {kind} {cls.name!r} cannot be given by name, as options are: replace "
                "*args, **kwargs and arguments before a / by named ones"
            )
        if argument not in hints and default in (inspect.Parameter.empty, None):
            raise TypeError(f"argument {argument!r} of {kind} {cls.name!r} has no type: annotate it, as in x: float")
        declared = hints.get(argument, type(default))
        if not _can_be_written(declared):
            raise TypeError(
                f"argument {argument!r} of {kind} {cls.name!r} is of type {declared}, which neither a flag nor YAML "
                "can give: use bool, int, float, str, a Literal or a list of these"
            )
        if default is inspect.Parameter.empty:
            default, declared = None, declared | None
        told: dict[str, Any] = {"help": _help(cls, argument, kind)}
        if get_origin(declared) is Literal:
            told["choices"] = list(get_args(declared))
        if isinstance(default, list):
            factory: Any = partial(list, default)
            found[name] = declared, field(default_factory=factory, metadata=told)
        else:
            found[name] = declared, field(default=default, metadata=told)
    try:
        check_options(make_dataclass(cls.__name__, [(name, *option) for name, option in found.items()])())
    except ValueError as error:
        raise TypeError(f"the default of an argument of {kind} {cls.name!r} does not fit its type: {error}") from error
    return found


def _default(cls: type[Any], argument: str) -> Any:
    """The default of an argument of `__init__`, `Parameter.empty` without one."""
    declared = getattr(cls, "__dataclass_fields__", {}).get(argument)
    if declared is not None and declared.default_factory is not MISSING:
        return declared.default_factory()
    return inspect.signature(cls).parameters[argument].default


def _can_be_written(declared: Any) -> bool:
    if declared in (bool, int, float, str) or get_origin(declared) in (list, Literal):
        return True
    one, *others = [each for each in get_args(declared) if each is not type(None)] or [None]
    return not others and one is not None and _can_be_written(one)


def _help(cls: type[Any], argument: str, kind: str) -> str:
    declared = getattr(cls, "__dataclass_fields__", {}).get(argument)
    if declared is not None and "help" in declared.metadata:
        return str(declared.metadata["help"])
    lines = [line.strip() for line in (inspect.getdoc(cls) or "").splitlines()]
    said = next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{argument}:")), "")
    return said or f"{argument} of {kind} {cls.name!r}."


# Looking up


@cache
def load_plugins() -> None:
    """Imports the modules that installed packages name in the entry-point group, once.

    One that cannot be imported is a warning: it must not stop a run that does not need it.
    """
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            _failed[point.value] = error
            logger.warning("the plugin %r (%s) cannot be loaded: %s", point.name, point.value, error)


def term_class(kind: str, name: str) -> type[Term]:
    """The class of a weight or a margin.

    Raises:
        ValueError: an unknown name.
    """
    return _found(_TERMS[kind], name, kind)


def reward_class(name: str) -> type[Reward]:
    """The class of a reward.

    Raises:
        ValueError: an unknown name.
    """
    return _found(REWARDS, name, "reward")


def find_link(base: str, name: str) -> Link:
    """The link that a base knows as this `loss_type`.

    Raises:
        ValueError: an unknown name.
    """
    return _found(LINKS[base], name, "loss_type")


def usual_reward(base: str, loss: str) -> str:
    """A loss's implicit reward on a base: TRL's, or its paper's."""
    return "log-ratio" if base == "dpo" else find_link(base, loss).reward or "sum"


def term_names(kind: str) -> tuple[str, ...]:
    """All weights or margins."""
    load_plugins()
    return tuple(_TERMS[kind])


def method_ids() -> tuple[str, ...]:
    """All methods."""
    load_plugins()
    return tuple(METHODS)


def get_method(method_id: str) -> Method:
    """The method with an id.

    Raises:
        ValueError: an unknown id. The names of three papers differ only by the letters' case, so a name is not an id.
    """
    if isinstance(method_id, str) and (method_id in METHODS or method_id in method_ids()):
        return METHODS[method_id]
    names = {method.id: method.name for method in METHODS.values()}
    named = [key for key, name in names.items() if name == method_id]
    named = named or [key for key, name in names.items() if name.lower() == str(method_id).lower()]
    if not named:
        raise _unknown("method", method_id, METHODS)
    hint = " or ".join(f"{key!r} ({names[key]})" for key in named)
    raise ValueError(f"unknown method {method_id!r}; known: {', '.join(METHODS)}; did you mean {hint}?")


def base_of(method_id: str | None, base: Any = None) -> str:
    """The base to train a method on: the one named, or the method's own.

    Raises:
        ValueError: an unknown method or base, or a base that cannot carry the method.
    """
    method = None if method_id is None else get_method(method_id)
    bases = tuple(LINKS) if method is None else method.bases
    base = bases[0] if base is None else base
    if not isinstance(base, str) or base not in LINKS:
        raise unknown("base", base, LINKS)
    if method is not None and base not in bases:
        why = f"does not go with base {base!r}"
        if base == "cpo" and _readers_of_reference(method):
            why = "needs a reference model, which CPOTrainer does not have"
        raise ValueError(f"method {method_id!r} {why}: leave base out, or take base {bases[0]!r}")
    return base


def _found(table: Mapping[str, T], name: Any, what: str) -> T:
    if not isinstance(name, str) or name not in table:
        load_plugins()
    if not isinstance(name, str) or name not in table:
        raise _unknown(what, name, table)
    return table[name]


def _unknown(what: str, name: Any, known: Mapping[str, Any]) -> ValueError:
    error = unknown(what, name, known)
    failed = "".join(f"; the plugin {module} could not be loaded: {why}" for module, why in _failed.items())
    return ValueError(f"{error}{failed}")
