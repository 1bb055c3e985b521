"""`trl-margins recipes`: lists the settings in the package, for `trl-margins train --recipe NAME`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import yaml

from ..tables import aligned


@dataclass(frozen=True)
class Recipe:
    """One YAML file of settings, by its keys and its first line."""

    name: str  # model/method/variant
    method: str
    model: str
    data: str
    paper: str
    table: str  # of the paper, or "quick" if the settings are not from a paper


def main(argv: Sequence[str]) -> int:
    """Prints the table and the folder of the files."""
    ArgumentParser(prog="trl-margins recipes", description=__doc__).parse_args(argv)
    heads = [field.name for field in fields(Recipe)]
    print(aligned(map(astuple, recipes()), heads, left=len(heads)))
    print(f"\nThe files, and accelerate configurations for several devices, are in {recipe_folder()}")
    return 0


def recipe_folder() -> Path:
    """Inside the package if it is installed, next to it in a clone."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_path(name: str) -> Path:
    """The file of `model/method/variant`; for `model/method` that of the variant "full".

    Raises:
        ValueError: no such recipe; names the closest.
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
    """All recipes, sorted by name."""
    return [_read(name, path) for name, path in sorted(_files().items())]


def _files() -> dict[str, Path]:
    paths = recipe_folder().glob("*/*/config_*.yaml")
    return {"/".join([*path.parts[-3:-1], path.stem.removeprefix("config_")]): path for path in paths}


def _read(name: str, path: Path) -> Recipe:
    text = path.read_text(encoding="utf-8")
    paper, table, _ = text.removeprefix("# ").split(", ", 2)
    written = yaml.safe_load(text)
    return Recipe(name, written["method"], written["model_name_or_path"], written["dataset_name"], paper, table)
