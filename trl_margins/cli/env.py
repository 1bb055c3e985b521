"""`trl-margins env`: versions and devices, for a bug report. Nothing of it is secret."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

from packaging.requirements import Requirement

from .. import __version__
from ..registry import GROUP


def main(argv: Sequence[str]) -> int:
    """Prints TRL's lines, then this package's."""
    ArgumentParser(prog="trl-margins env", description=__doc__).parse_args(argv)
    from trl.scripts.env import print_env

    optional = [each.name for each in map(Requirement, requires("trl-margins") or ()) if _is_of_users(each)]
    plugins = sorted({f"{each.dist.name} {each.dist.version}" for each in entry_points(group=GROUP) if each.dist})
    print_env()
    print(f"- trl-margins: {__version__}")
    print(f"- Optional packages: {', '.join(found for name in optional if (found := _found(name))) or 'none'}")
    print(f"- Plug-ins: {', '.join(plugins) or 'none'}")
    return 0


def _is_of_users(requirement: Requirement) -> bool:
    extras = ("report", "bertscore", "demo", "benchmarks")
    return str(requirement.marker) in {f'extra == "{name}"' for name in extras}


def _found(name: str) -> str | None:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None
