"""`trl-margins recipes`: the settings that ship with the package; `trl-margins train --recipe NAME` takes one."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Recipe:
    """One YAML file of settings, in the words of its keys and of its first line."""

    name: str  # model/method/variant
    method: str
    model: str
    data: str
    paper: str
    table: str  # of the paper, or "quick" where the settings are no paper's


def main(argv: Sequence[str]) -> int:
    """Prints the table, and where the files are."""
    ArgumentParser(prog="trl-margins recipes", description=__doc__).parse_args(argv)
    print(_table([tuple(field.name for field in fields(Recipe)), *map(astuple, recipes())]))
    print(f"\nThe files, and configurations of several devices for accelerate, are in {recipe_folder()}")
    return 0


def recipe_folder() -> Path:
    """Inside the package where it is installed, beside it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_path(name: str) -> Path:
    """The file of `model/method/variant`; of `model/method` it is the variant "full".

    Raises:
        ValueError: no such recipe, naming those most like it.
    """
    files = _files()
    whole = name if name.count("/") == 2 else f"{name}/full"
    if whole in files:
        return files[whole]
    nearest = [each for each in files if each.startswith(f"{name}/")]
    nearest = nearest or get_close_matches(whole.lower(), files, cutoff=0.4)
    hint = f"; the nearest are {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"no recipe {name!r}{hint}; `trl-margins recipes` lists all {len(files)}")


def recipes() -> list[Recipe]:
    """All of them, by name."""
    return [_read(name, path) for name, path in sorted(_files().items())]


def _files() -> dict[str, Path]:
    paths = recipe_folder().glob("*/*/config_*.yaml")
    return {"/".join([*path.parts[-3:-1], path.stem.removeprefix("config_")]): path for path in paths}


def _read(name: str, path: Path) -> Recipe:
    text = path.read_text(encoding="utf-8")
    paper, table, _ = text.removeprefix("# ").split(", ", 2)
    written = yaml.safe_load(text)
    return Recipe(name, written["method"], written["model_name_or_path"], written["dataset_name"], paper, table)


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
