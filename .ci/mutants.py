"""Small changes to the code, one at a time: does a test notice? The rooms and their tests are in pyproject.toml.

    MUTANTS=100   how many, spread over the rooms; 0: all there are
    ROOM=terms    one room alone
    SEED=1        others

cosmic-ray makes the changes. The tests run in a process that has imported what they import, in a copy of the project.
"""

# ruff: noqa: T201 - a script that talks

from __future__ import annotations

import ast
import gc
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from difflib import unified_diff
from pathlib import Path
from typing import Any, NamedTuple

import parso.python.tree as tree
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

HERE = Path(__file__).resolve().parent.parent
OF_COSMIC_RAY = (
    *("AddNot", "NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceContinueWithBreak", "ReplaceUnaryOperator_Delete_Not"),
    *("ReplaceUnaryOperator_USub_UAdd", "ZeroIterationForLoop"),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Gt_GtE", "GtE_Gt", "Lt_LtE", "LtE_Lt")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "BitOr_BitAnd")),
)
# methods without which an expression often means nearly the same, and one that is put in another's place
DROPPED = {"clamp", "detach", "abs", "double", "float", "to", "clone", "contiguous", "strip", "lower"}
SWAPPED = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "amax": "amin", "any": "all", "all": "any"}
OF_THE_CODE = {"strict", "frozen"}  # keywords that check the code itself: without them it means the same


class Own(Operator):
    """A change that cosmic-ray does not know: `change` gives the node's new code."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if self.change(node) is not None:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Name(node.get_first_leaf().prefix + str(self.change(node)), node.start_pos)

    def change(self, node: Any) -> str | None:
        raise NotImplementedError

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropCall(Own):
    """`x.clamp(min=0)` → `x`, and `torch.where(a, b, c)` → `b`."""

    def change(self, node: Any) -> str | None:
        if node.type not in ("atom_expr", "power"):
            return None
        for i, (name, call) in enumerate(zip(node.children[1:], node.children[2:], strict=False), start=1):
            called = [child.get_code().strip() for child in (name, call)]
            if name.type == call.type == "trailer" and called[0][1:] in DROPPED and called[1].startswith("("):
                return "".join(child.get_code() for child in (*node.children[:i], *node.children[i + 2 :])).lstrip()
        return None


class SwapReduction(Own):
    """`x.mean()` → `x.sum()`, and `min(x)` → `max(x)`."""

    def change(self, node: Any) -> str | None:
        following = node.get_next_leaf() if node.type == "name" else None
        return SWAPPED.get(node.value) if following is not None and following.value == "(" else None


class DropKeyword(Own):
    """`f(x, y=1)` → `f(x)`."""

    def change(self, node: Any) -> str | None:
        named = node.type == "argument" and node.children[1].get_code().strip() == "="
        return "" if named and node.children[0].get_code().strip() not in OF_THE_CODE else None

    def mutate(self, node: Any, index: int) -> Any:
        return tree.Name(f"{node.get_first_leaf().prefix}*()", node.start_pos)


class OtherName(Own):
    """`state["mean"]` → `state["other"]`: a key, a column or a default that is another."""

    def change(self, node: Any) -> str | None:
        alone = node.type == "string" and (node.parent is None or node.parent.type not in ("simple_stmt", "strings"))
        return '"other"' if alone and re.fullmatch(r"""["'][a-z0-9_/-]+["']""", node.value) else None


class DropEntry(Own):
    """`{"a": 1, "b": 2}` → `{"b": 2}`: an entry that a state or a table has lost."""

    def entries(self, node: Any) -> list[str]:
        maker = node.children[1] if node.type == "atom" and node.children[0].get_code().strip() == "{" else None
        if maker is None or maker.type != "dictorsetmaker":
            return []
        entries, start = [], 0
        for i, child in enumerate((*maker.children, None)):
            if child is None or child.get_code().strip() == ",":
                entries.append(maker.children[start:i])
                start = i + 1
        named = any(len(entry) == 3 and entry[1].get_code().strip() == ":" for entry in entries)
        return ["".join(part.get_code() for part in entry) for entry in entries if entry] if named else []

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        yield from ((node.start_pos, node.end_pos) for _ in self.entries(node))

    def mutate(self, node: Any, index: int) -> Any:
        entries = self.entries(node)
        prefix = node.get_first_leaf().prefix
        return tree.Name(f"{prefix}{{{', '.join(entries[:index] + entries[index + 1 :])}}}", node.start_pos)


class OtherInMessage(Own):
    """`f"row {i}"` → `f"row {0}"`, and `logger.info("row %d", i)` → `logger.info("row %d", 0)`."""

    def change(self, node: Any) -> str | None:
        if node.type == "fstring_expr":
            return "{0}"
        arguments = node.parent
        if arguments is None or arguments.type != "arglist" or node.get_code().strip() == ",":
            return None
        called = arguments.parent.parent.get_first_leaf().value if arguments.parent.parent else ""
        return "0" if called == "logger" and node is not arguments.children[0] and node.type != "argument" else None


class DropStatement(Own):
    """`check(x)` → `pass`, also for what is raised, and for `x += 1` and `self.x = 1` in a function."""

    def change(self, node: Any) -> str | None:
        if node.type == "raise_stmt":
            return "pass"
        if node.parent is None or node.parent.type != "simple_stmt" or tree.search_ancestor(node, "funcdef") is None:
            return None
        first = node.children[0].get_code().strip() if node.type == "expr_stmt" else ""
        changes = node.type == "expr_stmt" and (node.children[1].get_code().strip().endswith("=") and "." in first)
        return "pass" if changes or node.type == "atom_expr" else None


class Place(NamedTuple):
    """Where a file can be changed, and how."""

    file: str
    operator: Operator
    occurrence: int


def places_of(file: str) -> Iterator[Place]:
    nodes = list(ast_nodes(get_ast(Path(file).read_text())))
    operators = [get_operator(f"core/{name}")() for name in OF_COSMIC_RAY]
    for operator in (*operators, *(operator() for operator in Own.__subclasses__())):
        n = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        yield from (Place(file, operator, occurrence) for occurrence in range(n))


def changed(place: Place) -> str | None:
    """The file's code with the change; None where that means the same."""
    code = Path(place.file).read_text()
    found = mutate_code(code, place.operator, place.occurrence)
    return found if found is not None and meaning_of(found) not in (None, meaning_of(code)) else None


def difference(place: Place, code: str) -> str:
    lines = unified_diff(Path(place.file).read_text().splitlines(), code.splitlines(), lineterm="", n=0)
    kept = (line for line in lines if not line.startswith(("---", "+++")))
    return "\n    ".join([f"{place.file}, {type(place.operator).__name__} {place.occurrence}", *kept])


def meaning_of(code: str) -> str | None:
    """The code without annotations, docstrings, `strict` of zip and `frozen`; None if it is no code."""
    try:
        parsed = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(parsed):
        if isinstance(node, (ast.FunctionDef, ast.arg, ast.AnnAssign)):
            for name in {"annotation", "returns"} & set(node._fields):
                setattr(node, name, ast.Constant(None))
        if isinstance(node, ast.Call):
            node.keywords = [each for each in node.keywords if each.arg not in OF_THE_CODE]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(parsed)


def notices(copy: Path, tests: list[str], timeout: float) -> bool:
    """Whether a test fails, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        output = os.open(copy / "output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        options = ["-qx", "-m", "", "-W", "ignore", "-p", "no:cacheprovider"]  # the long tests, too
        arguments = [*options, "--basetemp", str(copy.parent / "tests")]
        os._exit(int(pytest.main([*arguments, *(f"tests/{name}" for name in tests)])))
    until = time.monotonic() + timeout
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what a test has started, too
    if ended == (0, 0):
        os.waitpid(child, 0)
    return ended == (0, 0) or ended[1] != 0


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    settings = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["mutants"]
    rooms = {name: room for name, room in settings.items() if os.environ.get("ROOM", name) == name}
    wanted = -(-int(os.environ.get("MUTANTS", "100")) // len(rooms))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        listed = subprocess.check_output(["git", "ls-files"], cwd=HERE, text=True).split("\n")
        for file in filter(None, listed):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / file, copy / file)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:0] = [str(copy), str(copy / "tests")]
        import conftest  # noqa: F401 - all that takes long to import

        for name in list(sys.modules):
            if name.split(".")[0] in ("trl_margins", "conftest"):
                del sys.modules[name]  # each mutant's tests import these themselves
        package = logging.getLogger("trl_margins")  # and are not to have the handler of the code as it was
        package.handlers.clear()
        package.propagate = True
        package.setLevel(logging.NOTSET)
        gc.collect()
        gc.freeze()
        scores = []
        for name, room in rooms.items():
            scores.append(score_of(name, room, copy, wanted))
            print(scores[-1], flush=True)
    print("", *scores, sep="\n")


def keep_bytecode(keep: bool) -> None:
    sys.dont_write_bytecode = not keep
    os.environ["PYTHONDONTWRITEBYTECODE"] = "" if keep else "1"


def score_of(name: str, room: dict[str, Any], copy: Path, wanted: int) -> str:
    started = time.monotonic()
    keep_bytecode(True)
    if notices(copy, room["tests"], 600):
        raise SystemExit(f"{name}: a test fails without a change\n{(copy / 'output').read_text()[-3000:]}")
    timeout = 20 + 3 * (time.monotonic() - started)
    keep_bytecode(False)  # two changed files may have the same size and the same second
    files = sorted({str(path) for glob in room["files"] for path in Path().glob(glob)})
    places = [place for file in files for place in places_of(file)]
    random.Random(os.environ.get("SEED", "0")).shuffle(places)
    tried = noticed = 0
    for place in places:
        if (code := changed(place)) is None:
            continue
        file, shown = Path(place.file), difference(place, code)
        before, times = file.read_bytes(), file.stat()
        file.write_text(code)
        tried += 1
        if notices(copy, room["tests"], timeout):
            noticed += 1
        else:
            print(f"not noticed: {shown}", flush=True)
        file.write_bytes(before)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # by which Python knows the bytecode of it
        if tried == wanted:
            break
    seconds = (time.monotonic() - started) / max(1, tried)
    return f"{name}: {noticed} of {tried} noticed ({noticed / max(1, tried):.0%}), {seconds:.1f} s each"


if __name__ == "__main__":
    main()
