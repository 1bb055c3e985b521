"""The package as a whole: what it costs to import, what it exports, which way its imports run."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import trl_margins
from trl_margins.methods import METHODS, get_method
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
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "--config-file", "", "uses.py"],
    "pyright": ["pyright", "--pythonpath", sys.executable, "uses.py"],
    "basedpyright": ["basedpyright", "--level", "error", "--pythonpath", sys.executable, "uses.py"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_type_checker_knows_the_configs(checker, tmp_path):
    """TRL's fields and ours are accepted; what is no field is not."""
    if not (importlib.util.find_spec("mypy") if checker == "mypy" else shutil.which(checker)):
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "uses.py").write_text(USES_CONFIGS)
    printed = subprocess.run(CHECKERS[checker], cwd=tmp_path, capture_output=True, text=True).stdout
    errors = [line.strip() for line in printed.splitlines() if "error:" in line or "- error" in line]
    assert len(errors) == 1, printed
    assert "uses.py:5:" in errors[0]
    assert "score_gap_treshold" in errors[0]


# each room, and the rooms and libraries it may import
ALLOWED = {
    "checks": set(),
    "pairs": {"torch"},
    "rewards": {"torch", "pairs"},
    "losses": {"torch", "pairs", "rewards"},
    "terms": {"torch", "checks", "pairs", "terms"},
    "objective": {"torch", "checks", "pairs", "rewards", "losses", "terms"},
    "methods": {"checks", "terms"},
    "forward": {"trl", "torch", "accelerate", "transformers", "peft", "pairs"},
    "data": {
        "torch",
        "transformers",
        "datasets",
        "numpy",
        "pyarrow",
        "scipy",
        "rapidfuzz",
        "bert_score",
        "tqdm",
        "tokenizers",
        "huggingface_hub",
        "yaml",
        "data",
        "rows",
    },
    "rows": {"accelerate", "datasets", "numpy", "pyarrow", "transformers", "trl", "rows"},
    "report": {
        "matplotlib",
        "numpy",
        "scipy",
        "huggingface_hub",
        "jinja2",
        "tables",
        "data",
        "evaluation",
        "methods",
        "report",
    },
    "tables": {"tabulate"},
    "evaluation": {"tables", "numpy", "scipy", "sklearn", "datasets", "evaluate", "rows", "evaluation"},
}


def imports_of(path: Path) -> set[str]:
    """Third-party libraries and rooms that a module imports; names within its own room are left out."""
    found = set()
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(node.module.split(".")[0])
            elif node.level == depth:  # the package itself
                found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_downwards(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert imports_of(path) <= ALLOWED[room], path


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.id)
def test_a_row_is_whole(method):
    """Every row has a trainer, a config on both bases, and a paper that a card can cite."""
    for base, parent in {"cpo": trl_margins.MarginCPOTrainer, "dpo": trl_margins.MarginDPOTrainer}.items():
        config, trainer = config_class(method.id, base), trainer_class(method.id, base)
        assert trainer._method is method
        assert trainer._config_class is config
        assert trainer.__base__ is parent
        assert trainer.__name__ == config.__name__.replace("Config", "Trainer")
        assert getattr(trl_margins, trainer.__name__) is trainer
        assert (trainer._name, trainer._paper["title"]) == (method.name, method.paper.title)
        assert trainer._tag_names == ["trl", "trl-margins", *method.tags]
        for name, value in method.defaults.items():
            if name != "gamma_beta_ratio":
                assert config.__dataclass_fields__[name].default == value, (base, name)
    assert method.paper.citation.startswith("@")
    assert method.paper.title in method.paper.citation


def test_an_unknown_method_names_the_known():
    with pytest.raises(ValueError, match="unknown method 'GAPO'; known: gappo, gap-aware"):
        get_method("GAPO")
    with pytest.raises(ValueError, match="unknown base 'ppo'; known: cpo, dpo"):
        config_class("gappo", "ppo")
    with pytest.raises(ValueError, match="unknown method 'GAPO'; known: gappo, gap-aware"):
        trainer_class("GAPO", "dpo")
    with pytest.raises(ValueError, match="unknown base 'ppo'; known: cpo, dpo"):
        trainer_class(None, "ppo")
