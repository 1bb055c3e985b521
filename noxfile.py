"""The test matrix: `nox` for lint and the tested set, `nox -s oldest newest next` for what we admit and what comes."""

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

# What changes under us, with its pre-releases in `next`; there its warnings of what goes away are errors
UNDER_US = ("accelerate", "datasets", "peft", "transformers", "trl")
GOES_AWAY = "\n".join(
    [
        *(
            rf"error::{kind}:(trl_margins|{'|'.join(UNDER_US)})\b"
            for kind in ("FutureWarning", "DeprecationWarning", "PendingDeprecationWarning")
        ),
        # TRL's own configs set it and PEFT asks for it; tests/test_trl_features.py says that we do not
        r"ignore:.(is_)?gradient_checkpointing\w*. is deprecated:FutureWarning",
        "ignore::trl.import_utils.TRLExperimentalWarning",
    ]
)


def floors() -> list[str]:
    """Pins of every direct dependency but torch to the oldest version that pyproject.toml admits."""
    requirements = map(Requirement, load_toml("pyproject.toml")["project"]["dependencies"])
    return [
        f"{requirement.name}=={specifier.version}"
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == ">=" and requirement.name != "torch"
    ]


def run_tests(session: nox.Session, *more: str) -> None:
    session.run("python", "-m", "pip", "check", success_codes=[0, 1] if more else [0])
    command = ["python", "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", ""]  # rehearsals, too
    session.run(*command, *more, *session.posargs, env={"OMP_NUM_THREADS": "1"})


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


@nox.session(name="next")
def upcoming(session: nox.Session) -> None:
    """Pre-releases of TRL, transformers and their kind, whatever pyproject.toml admits: what breaks next."""
    session.install(TORCH)
    session.install("--upgrade", "--upgrade-strategy", "eager", *PROJECT, TORCH)
    session.install("--upgrade", "--pre", *UNDER_US, TORCH)
    session.run("python", "-m", "pip", "list")
    run_tests(session, "-o", f"filterwarnings={GOES_AWAY}")


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
