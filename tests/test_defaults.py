"""What holds where nobody says otherwise: the defaults of public functions and of all options, what options take, the
tables and numbers that modules are written with, and what people see of options and progress.

A change of one changes what somebody trains, and is a line in CHANGELOG.md. `defaults.txt` has them all.
`python tests/test_defaults.py` writes it anew: read what has changed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zlib import crc32

import trl_margins
from trl_margins.checks import _MOST, NUMBERS, default_of
from trl_margins.methods import METHODS
from trl_margins.methods.row import Method

_SHOWN = ("id", "name", "paper", "formula")  # of a method: what nothing computes with
WRITTEN = Path(__file__).with_name("defaults.txt")


def plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {plain(of)}" for key, of in value.items()) + "}"
    return getattr(value, "__name__", None) or (repr(value) if " at 0x" not in repr(value) else type(value).__name__)


def of_fields(kind: type) -> dict[str, str]:
    """Of the fields that a dataclass has itself, or whose default is its own."""
    inherited = {
        item.name: plain(default_of(item))
        for base in kind.__mro__[:0:-1]
        if is_dataclass(base)
        for item in fields(base)
    }
    own = {item.name: plain(default_of(item)) for item in fields(kind) if default_of(item) is not MISSING}
    return {name: default for name, default in own.items() if inherited.get(name) != default}


def of_parameters(function: Any) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: plain(each.default) for each in parameters if each.default is not each.empty}


def defaults() -> Iterator[str]:
    for found in pkgutil.walk_packages(trl_margins.__path__, "trl_margins."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for name, thing in sorted(vars(module).items()):
            if name.startswith("_") or getattr(thing, "__module__", None) != found.name:
                continue
            these: dict[str, dict[str, str]] = {}
            if inspect.isfunction(thing):
                these[name] = of_parameters(thing)
            elif inspect.isclass(thing) and not (
                getattr(thing, "_method_id", None) or getattr(thing, "_method", None)
            ):
                if is_dataclass(thing):
                    these[name] = of_fields(thing)
                elif "__init__" in vars(thing):
                    these[name] = of_parameters(thing.__init__)
                for key, method in vars(thing).items():
                    if inspect.isfunction(method) and not key.startswith("_"):
                        these[f"{name}.{key}"] = of_parameters(method)
            for of, values in these.items():
                if values:
                    said = ", ".join(f"{key}={value}" for key, value in values.items())
                    yield f"{found.name.removeprefix('trl_margins.')}.{of}: {said}"


def bounds() -> Iterator[str]:
    for name in sorted({*NUMBERS, *_MOST}):
        yield f"{name}: {NUMBERS.get(name, 'any number')}" + (f"; at most {_MOST[name]:,}" if name in _MOST else "")


def written_out(node: ast.expr) -> bool:
    """Whether a value is in the code itself, and not another library's or the machine's."""
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return called in ("compile", "frozenset", "MappingProxyType", "dict") and all(map(written_out, node.args))
    return all(
        not isinstance(part, ast.Call | ast.Name | ast.Attribute | ast.Lambda | ast.comprehension)
        for part in ast.walk(node)
    )


def constant(value: Any) -> str:
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r}, {value.flags}"
    return repr(sorted(value, key=repr)) if isinstance(value, set | frozenset) else plain(value)


def constants() -> Iterator[str]:
    """Those of all modules, also private ones; of a long text the beginning and a checksum."""
    for file in sorted(Path(trl_margins.__path__[0]).rglob("*.py")):
        name = ".".join(file.relative_to(trl_margins.__path__[0]).with_suffix("").parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id.isupper() and node.value and written_out(node.value):
                # of the code, whatever a test has done to the module's own
                code = compile(ast.Expression(node.value), str(file), "eval")
                text = constant(eval(code, {"re": re, "MappingProxyType": MappingProxyType}))
                text = text if len(text) <= 1000 else f"{text[:100]}… {crc32(text.encode())}"
                yield f"{name}.{target.id} = {text}"


def of_method(row: Method) -> str:
    return plain({key: value for key, value in vars(row).items() if key not in _SHOWN})


def shown() -> Iterator[str]:
    """What nothing computes with: of options their help and what else a field says, as a checksum; and how progress
    bars and flags are made."""
    for file in sorted(Path(trl_margins.__path__[0]).rglob("*.py")):
        name = ".".join(file.relative_to(trl_margins.__path__[0]).with_suffix("").parts)
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                module = importlib.import_module(f"trl_margins.{name}".removesuffix(".__init__"))
                if is_dataclass(kind := getattr(module, node.name, None)) and not getattr(kind, "_method_id", None):
                    own = [each for each in fields(kind) if each.name in kind.__annotations__ and each.metadata]
                    said = "\n".join(f"{each.name}: {plain(each.metadata)}" for each in own)
                    if own:
                        yield f"{name}.{node.name}: {len(own)} fields, {crc32(said.encode())}"
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("tqdm", "add_argument"):
                yield f"{name}: {' '.join((ast.get_source_segment(source, node) or '').split())}"


def all_lines() -> list[str]:
    return [
        *defaults(),
        "",
        *bounds(),
        "",
        *constants(),
        "",
        *shown(),
        "",
        *(f"{id}: {of_method(row)}" for id, row in METHODS.items()),
    ]


def test_what_holds_where_nobody_says_otherwise():
    assert all_lines() == WRITTEN.read_text().splitlines()


if __name__ == "__main__":
    WRITTEN.write_text("\n".join(all_lines()) + "\n")
