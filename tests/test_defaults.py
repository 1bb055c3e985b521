"""What holds where nobody says otherwise: the defaults of public functions and of all options, what options take, the
tables and numbers that modules are written with, and what people see of options and progress.

A change of one changes what somebody trains, and is a line in CHANGELOG.md. `defaults.txt` has them all.
`python tests/test_defaults.py` writes it anew: read what has changed.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import trl_margins
from trl_margins.checks import _MOST, NUMBERS, default_of
from trl_margins.cli import top_parser
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


def modules() -> Iterator[tuple[str, ast.Module, Any]]:
    """Each file's name in `defaults.txt`, its code, and the module."""
    for file in sorted(Path(trl_margins.__path__[0]).rglob("*.py")):
        name = ".".join(file.relative_to(trl_margins.__path__[0]).with_suffix("").parts)
        if file.stem != "__main__":
            module = importlib.import_module(f"trl_margins.{name}".removesuffix(".__init__"))
            yield name, ast.parse(file.read_text(encoding="utf-8")), module


def constants_of(code: ast.Module) -> dict[str, ast.expr]:
    found = {}
    for node in code.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id.isupper() and node.value:
            found[f"{target.id} |" if isinstance(node, ast.AugAssign) else target.id] = node.value
    return found


def is_ours(node: ast.expr, module: Any, every: Mapping[str, list[tuple[ast.expr, Any]]]) -> bool:
    """Whether a value is the package's own, and not another library's or the machine's."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    bound = {part.id for part in names if isinstance(part.ctx, ast.Store)}
    others = {name: found for name, found in every.items() if all(of is not node for of, _ in found)}

    def known(name: str) -> bool:
        if name in every:  # elsewhere, or here; of equal names all
            return all(of is node or is_ours(of, its, others) for of, its in every[name])
        return (
            name in ("re", "MappingProxyType")
            or hasattr(builtins, name)
            or getattr(getattr(module, name, None), "__module__", "").startswith("trl_margins")
        )

    return all(map(known, {part.id for part in names} - bound))


def constant(value: Any) -> str | None:
    """None of what is not made of text, numbers and the package's own dataclasses."""
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r}, {value.flags}"
    if isinstance(value, Mapping):
        pairs = [(constant(key), constant(of)) for key, of in value.items()]
        return None if any(None in pair for pair in pairs) else f"{{{', '.join(f'{k}: {v}' for k, v in pairs)}}}"
    if isinstance(value, tuple | list | set | frozenset):
        parts = [constant(each) for each in value]
        if None in parts:
            return None
        joined = ", ".join(parts if isinstance(value, tuple | list) else sorted(parts))
        return f"({joined}{',' * (len(value) == 1)})" if isinstance(value, tuple) else f"[{joined}]"
    if is_dataclass(value) and type(value).__module__.startswith("trl_margins"):
        parts = {each.name: constant(getattr(value, each.name)) for each in fields(value)}
        if None in parts.values():
            return None
        return f"{type(value).__name__}({', '.join(f'{name}={of}' for name, of in parts.items())})"
    return repr(value) if value is None or type(value) in (str, bytes, bool, int, float) else None


def constants() -> Iterator[str]:
    """Those of all modules, also private ones; of a long text the beginning and a checksum."""
    found = {name: (constants_of(code), module) for name, code, module in modules()}
    every: dict[str, list[tuple[ast.expr, Any]]] = {}
    for of, module in found.values():
        for key, node in of.items():
            every.setdefault(key, []).append((node, module))
    for name, (of, module) in found.items():
        for key, node in of.items():
            if is_ours(node, module, every) and ("|" not in key or key[:-2] not in ast.unparse(node)):
                # of the code, whatever a test has done to the module's own
                text = constant(eval(compile(ast.Expression(node), name, "eval"), vars(module)))
                if text not in (None, "[]"):
                    text = text if len(text) <= 1000 else f"{text[:100]}… {crc32(text.encode())}"
                    yield f"{name}.{key} = {text}"


def of_method(row: Method) -> str:
    return plain({key: value for key, value in vars(row).items() if key not in _SHOWN})


def shown() -> Iterator[str]:
    """What nothing computes with: of options their help and what else a field says, as a checksum; and how progress
    bars and flags are made; and what the help of all commands ends with."""
    yield from (f"help: {line}" for line in str(top_parser().epilog).splitlines() if line)
    for name, code, module in modules():
        source = Path(module.__file__).read_text(encoding="utf-8")
        for node in ast.walk(code):
            kind = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
            if is_dataclass(kind) and not getattr(kind, "_method_id", None):
                own = [each for each in fields(kind) if each.name in kind.__annotations__ and each.metadata]
                said = "\n".join(f"{each.name}: {plain(each.metadata)}" for each in own)
                if own:
                    yield f"{name}.{node.name}: {len(own)} fields, {crc32(said.encode())}"
            called = getattr(node, "func", None)
            if getattr(called, "attr", getattr(called, "id", "")) in ("tqdm", "add_argument"):
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
