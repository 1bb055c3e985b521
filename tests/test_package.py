"""The package as a whole: what it costs to import, what it exports, which way its imports run."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib import resources
from pathlib import Path

import pytest
from conftest import MANY, METHODS_AND_BASES, OWN_METHODS

import trl_margins
from trl_margins.methods import METHODS
from trl_margins.registry import get_method
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

ROOT = Path(trl_margins.__file__).parent


def test_import_loads_nothing_heavy():
    heavy = "('torch', 'transformers', 'trl', 'datasets', 'numpy')"
    code = f"import sys, trl_margins; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("name", trl_margins.__all__)
def test_every_public_name_is_there(name):
    assert getattr(trl_margins, name) is not None
    assert name in dir(trl_margins)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GapDPO'"):
        _ = trl_margins.GapDPO


def test_it_is_typed():
    assert resources.files("trl_margins").joinpath("py.typed").is_file()


def test_type_checkers_see_every_public_name():
    """Each of them as `import name as name`, which exports it."""
    (block,) = [
        node
        for node in ast.parse((ROOT / "__init__.py").read_text()).body
        if ast.unparse(node).startswith("if TYPE_CHECKING")
    ]
    names = [(alias.name, alias.asname) for node in block.body for alias in node.names]
    assert ["__version__", *(name for name, exported in sorted(names) if name == exported)] == trl_margins.__all__


USES_CONFIGS = """\
from trl_margins import GapPOConfig, MarginDPOConfig

GapPOConfig("x", bf16=False)
MarginDPOConfig("x", bf16=False, weight="score-gap", beta=0.1)
GapPOConfig("x", score_gap_treshold=1.0)
"""
# what the configs are not made of, and half a minute to read
FAR = "torch datasets accelerate peft numpy scipy sklearn pandas transformers.models transformers.generation"
MYPY = f"[mypy]\nstrict = True\n[mypy-{','.join(f'{name}.*' for name in FAR.split())}]\nfollow_imports = skip\n"
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--config-file", "mypy.ini"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_type_checker_knows_the_configs(checker, request, tmp_path):
    """TRL's fields and ours are accepted; what is no field is not."""
    if not (importlib.util.find_spec("mypy") if checker == "mypy" else shutil.which(checker)):
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "uses.py").write_text(USES_CONFIGS)
    (tmp_path / "mypy.ini").write_text(MYPY)
    cache = {"MYPY_CACHE_DIR": str(request.config.cache.mkdir("mypy"))}
    command = [*CHECKERS[checker], "uses.py"]
    printed = subprocess.run(command, cwd=tmp_path, env=os.environ | cache, capture_output=True, text=True).stdout
    errors = [line.strip() for line in printed.splitlines() if "error:" in line or "- error" in line]
    assert len(errors) == 1, printed
    assert "uses.py:5:" in errors[0]
    assert "score_gap_treshold" in errors[0]


# The rooms from the bottom up: each imports its own modules and rooms above it in this list, type-only imports counted
ROOMS = (
    "redaction",
    "printable",
    "logging",
    "checks",
    "disk",
    "tables",
    "pairs",
    "rewards",
    "links",
    "terms",
    "objective",
    "methods",
    "registry",
    "rows",
    "forward",
    "zero3",
    "distributed",
    "recording",
    "data",
    "probes",
    "evaluation",
    "generation",
    "report",
    "trainers",
    "cli",
)
# libraries that a room must not know; all others are free
FORBIDDEN = {
    "checks": {"torch", "numpy", "transformers", "trl", "datasets", "accelerate", "peft"},
    **{
        room: {"numpy", "transformers", "trl", "datasets", "accelerate", "peft"}
        for room in ("pairs", "rewards", "links", "terms", "objective", "methods", "registry")
    },
    "rows": {"peft", "matplotlib"},
    "forward": {"datasets", "matplotlib"},
    "distributed": {"transformers", "trl", "datasets", "peft"},
    "recording": {"trl", "peft", "matplotlib"},
    "data": {"trl", "peft"},
    "probes": {"trl", "matplotlib"},
    "evaluation": {"matplotlib"},
    "report": {"trl", "peft", "torch"},
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without the package's."""
    paths = (path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports_of(name: str, path: Path) -> set[str]:
    """Modules of the package and libraries that a module imports, also where only a type checker does."""
    here = ROOT.name + "." + name + (".x" if path.stem == "__init__" else "")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} - {"logging"}  # Python's, not that of the package
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            named = {f"{source}.{alias.name}" for alias in node.names}
            found |= {full if full.removeprefix(f"{ROOT.name}.") in modules() else source for full in named}
    return {each.removeprefix(f"{ROOT.name}.") if each.startswith(ROOT.name) else each for each in found}


def test_every_module_is_in_a_room():
    assert {name.split(".")[0] for name in modules()} == set(ROOMS)


@pytest.mark.parametrize("name", MANY)
def test_a_test_of_which_most_is_rehearsed_is_there(name):
    file, _, test = name.partition(".")
    assert f"\ndef {test}(" in (Path(__file__).parent / f"{file}.py").read_text()


def test_every_module_is_changed_by_make_mutants():
    rooms = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["mutants"]
    listed = {path for room in rooms.values() for pattern in room["files"] for path in ROOT.parent.glob(pattern)}
    there = {path for path in ROOT.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")}
    assert there - listed == set()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downwards(room):
    allowed, forbidden = set(ROOMS[: ROOMS.index(room) + 1]), FORBIDDEN.get(room, set())
    for name, path in modules().items():
        if name.split(".")[0] != room:
            continue
        for imported in imports_of(name, path):
            top = imported.split(".")[0]
            assert top not in set(ROOMS) - allowed, f"{name} imports {imported}"
            assert top not in forbidden, f"{name} imports {imported}"


def test_no_import_circle():
    graph = {name: imports_of(name, path) & modules().keys() for name, path in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("method", OWN_METHODS)
def test_a_method_has_its_trainers(method):
    """On both bases, with names of their own."""
    row = METHODS[method]
    for base, parent in {"cpo": trl_margins.MarginCPOTrainer, "dpo": trl_margins.MarginDPOTrainer}.items():
        config, trainer = config_class(method, base), trainer_class(method, base)
        assert trainer._method is row
        assert trainer._config_class is config
        assert trainer.__base__ is parent
        assert trainer.__name__ == config.__name__.replace("Config", "Trainer")
        assert getattr(trl_margins, trainer.__name__) is trainer
        assert (trainer._name, trainer._paper["title"]) == (row.name, row.paper.title)
        assert trainer._tag_names == ["trl", base, "trl-margins", *row.tags]


# β, γ/β, learning rate, pairs per step and length, as published: of the five papers and what they compare with
PUBLISHED = {
    "gappo": (1.0, 0.5, 1e-5, 16, 1024),
    "gap-aware": (10.0, 0.3, 1e-6, 128, 2048),
    "gamma-po": (10.0, 0.4, 1e-6, 128, 2048),
    "amapo": (3.0, 0.0, 1e-6, 128, 2048),
    "geometric-anchor": (2.5, 0.1, 5e-7, 128, 2048),
    "gradient-norm": (2.5, 0.1, 5e-7, 128, 2048),
    "simpo-sam": (2.5, 0.1, 5e-7, 128, 2048),
    "simpo": (2.5, 0.55, 1e-6, 128, 2048),
    "dpo": (0.01, None, 5e-7, 128, 2048),
    "cpo": (0.1, None, 1e-6, 128, 2048),
    "ipo": (0.1, None, 5e-7, 128, 2048),
    "alphapo": (2.5, 0.1, 7e-7, 128, 2048),
    "orpo": (0.1, None, 5e-6, 128, 2048),
    "r-dpo": (0.1, None, 5e-7, 128, 2048),
    "rsimpo": (10.0, 0.4, 1e-6, 128, 2048),
    "alpha-dpo": (2.5, 0.6, 1e-6, 128, 2048),
    "beta-simpo": (2.5, 0.3, 1e-6, 128, 2048),
    "odpo": (0.5, None, 5e-7, 128, 2048),
    "dpop": (0.3, None, 5e-7, 128, 2048),
    "simper": (1.0, None, 1e-6, 128, 2048),
}
# and what is a method's own
PUBLISHED_OPTIONS = {
    "gap-aware": {"gap_aware_metric": "rougeL", "gap_aware_mapping": "log", "gap_aware_normalization": "scale"},
    "gamma-po": {"gamma_po_tau": 10.0, "gamma_po_steps": 20, "gamma_po_estimation_size": 256},
    "amapo": {"amapo_estimation_size": 32, "amapo_variant": "code"},
    "geometric-anchor": {"anchor_radius": 0.05, "anchor_batch_multiplier": 8, "anchor_direction": "gradient"},
    "simpo-sam": {"sam_radius": 0.05},
    "alphapo": {"alpha": 0.25},
    "r-dpo": {"r_dpo_alpha": 0.05},
    "rsimpo": {"label_smoothing": 0.1},
    "alpha-dpo": {"alpha_dpo_alpha": 0.2},
    "beta-simpo": {"beta_dpo_a": 0.25, "beta_dpo_keep": 0.8},
    "odpo": {"odpo_alpha": 1.0},
    "dpop": {"dpop_lambda": 50.0},
}


@pytest.mark.parametrize(("method", "base"), METHODS_AND_BASES)
def test_a_row_is_whole(method, base, tmp_path):
    """Every row has a config on its bases, with what the papers published; and a paper that a card can cite."""
    row, config = METHODS[method], config_class(method, base)(str(tmp_path), use_cpu=True)
    if method in PUBLISHED:
        beta, ratio, rate, pairs, length = PUBLISHED[method]
        assert (config.beta, config.learning_rate, config.max_length) == (beta, rate, length)
        assert (config.gamma_beta_ratio or 0.0) == pytest.approx(ratio or 0.0)
        assert ratio is None or config.simpo_gamma == pytest.approx(beta * ratio)
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == pairs
        assert (config.lr_scheduler_type, config.warmup_steps, config.num_train_epochs) == ("cosine", 0.1, 1)
    own = PUBLISHED_OPTIONS.get(method, {})
    assert {name: getattr(config, name) for name in own} == own
    assert row.paper.citation.startswith("@")
    assert row.paper.title in row.paper.citation


def test_an_unknown_method_names_the_known():
    with pytest.raises(ValueError, match="unknown method 'GAPO'; known: gappo, gap-aware"):
        get_method("GAPO")
    with pytest.raises(ValueError, match="unknown base 'ppo'; known: cpo, dpo"):
        config_class("gappo", "ppo")
    with pytest.raises(ValueError, match="unknown method 'GAPO'; known: gappo, gap-aware"):
        trainer_class("GAPO", "dpo")
    with pytest.raises(ValueError, match="unknown base 'ppo'; known: cpo, dpo"):
        trainer_class(None, "ppo")
