"""The test matrix: `nox` for lint and the tested set, `nox -s oldest newest` for the ends of what we admit."""

from __future__ import annotations

from pathlib import Path

import nox
from nox.project import load_toml
from packaging.requirements import Requirement

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.envdir = ".venv/nox"  # ignored by git, and gone with `make clean`

TESTED = ("--constraint", "constraints.txt")
PROJECT = ("--editable", ".[benchmarks,bertscore,demo,dev,report]")
# Always the tested one: a build of it is gigabytes, and TRL and transformers are what changes under us
TORCH = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def floors() -> list[str]:
    """Pins of every direct dependency but torch to the oldest version that pyproject.toml admits."""
    requirements = map(Requirement, load_toml("pyproject.toml")["project"]["dependencies"])
    return [
        f"{requirement.name}=={specifier.version}"
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">=" and requirement.name != "torch"
    ]


def run_tests(session: nox.Session) -> None:
    session.run("python", "-m", "pip", "check")
    command = ["python", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    session.run(*command, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """The tested set."""
    session.install(TORCH)
    session.install(*TESTED, *PROJECT)
    run_tests(session)


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest TRL, transformers and other direct dependencies that pyproject.toml admits."""
    session.install(TORCH)
    session.install(*PROJECT, *floors())
    run_tests(session)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest TRL, transformers and everything else that pyproject.toml admits."""
    session.install(TORCH)
    session.install("--upgrade", "--upgrade-strategy", "eager", *PROJECT, TORCH)
    run_tests(session)


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting, lint and types."""
    session.install(TORCH)
    session.install(*TESTED, *PROJECT)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation; warnings are errors."""
    session.install(TORCH)
    session.install(*TESTED, "--editable", ".[docs]")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
