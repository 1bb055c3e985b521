"""What is published: metadata that agree with the package, templates that parse, distributions that are whole."""

from __future__ import annotations

import ast
import importlib.util
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from printed import FENCE

import trl_margins
from trl_margins.methods import METHODS, Paper

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PAPERS = {method.paper.title: method.paper for method in METHODS.values()}
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FOLDERS = ("trl_margins", "tests", "recipes", "docs", "benchmarks", ".ci", ".github")
CODE = sorted(
    [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
# what came to the standard library after Python 3.11
NEWER = {
    "collections.abc": {"Buffer"},
    "copy": {"replace"},
    "itertools": {"batched"},
    "typing": {"NoDefault", "ReadOnly", "TypeAliasType", "TypeIs", "get_protocol_members", "is_protocol", "override"},
    "warnings": {"deprecated"},
}


def script(name: str) -> ModuleType:
    """A program of `.ci` as a module."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_version_is_in_one_place():
    """Neither as `version = …` nor as `trl-margins==…` anywhere else; the changelog is history."""
    version = re.escape(trl_margins.__version__)
    repeated = re.compile(rf"(?i)(version|trl[-_]margins)[\W_]{{1,8}}{version}(?![\w.])")
    texts = (".py", ".toml", ".md", ".yaml", ".yml", ".cff", ".txt", ".in", "")
    files = [*ROOT.iterdir(), *(p for name in FOLDERS if name != "tests" for p in (ROOT / name).rglob("*"))]
    found = [
        relative(path)
        for path in files
        if path.is_file() and path.suffix in texts and repeated.search(path.read_text(errors="ignore"))
    ]
    assert found == ["trl_margins/__init__.py"]


def test_the_metadata_read_the_version_there():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]
    assert PROJECT["dynamic"] == ["readme", "version"]
    assert "version" not in PROJECT
    assert tool["version"] == {"path": "trl_margins/__init__.py"}
    assert "version" not in CITATION


def test_the_readme_is_the_description_with_absolute_links():
    """As the build makes it: the code unchanged, and every file that is linked within the repository is there."""
    core = ProjectMetadata(str(ROOT), PluginManager()).core
    readme, home = (ROOT / "README.md").read_text(), PROJECT["urls"]["Repository"]
    assert script("try_wheel").relative_links(core.readme) == []
    assert FENCE.findall(core.readme) == FENCE.findall(readme)
    linked = re.findall(re.escape(home) + r"/(blob|raw)/main/([^)#\"]+)", core.readme)
    assert {kind for kind, path in linked if path.endswith(".svg")} == {"raw"}
    assert [path for _, path in linked if not (ROOT / path).exists()] == []
    assert len(linked) > 20
    assert f"]({home}/actions/workflows/ci.yml)" in core.readme  # GitHub's own pages


def test_the_repository_has_one_address():
    """Whoever moves it changes pyproject.toml."""
    home = PROJECT["urls"]["Repository"]
    assert all(url.startswith(home) for url in PROJECT["urls"].values())
    project = (ROOT / "pyproject.toml").read_text()
    assert project.count("https://") == project.count(home)
    others = [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.cff"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / ".github").rglob("*.yml"),
    ]
    assert [relative(path) for path in others if home in path.read_text()] == []


def test_the_pythons_are_those_that_ci_runs():
    """In classifiers, badge and workflow, the oldest as `requires-python`."""
    versions = [line.split(" :: ")[-1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert f">={versions[0]}" == PROJECT["requires-python"]
    assert WORKFLOW["jobs"]["check"]["strategy"]["matrix"] == {"python": versions}
    assert f"badge/python-{'%20%7C%20'.join(versions)}-blue" in (ROOT / "README.md").read_text()


def test_the_workflow_does_what_ci_does():
    commands = {name: [step.get("run", "") for step in job["steps"]] for name, job in WORKFLOW["jobs"].items()}
    assert commands["check"][-1] == "bash .ci/run"
    assert commands["dist"][-1] == "make dist"
    assert (ROOT / ".ci" / "run").is_file()
    assert "\ndist: " in (ROOT / "Makefile").read_text()
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_the_hooks_before_a_commit_use_the_tested_ruff():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"\nruff=={hooks['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_the_version_is_in_its_normal_form():
    assert str(Version(trl_margins.__version__)) == trl_margins.__version__


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_the_tested_set_is_within_the_ranges(requirement):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)) for pin in pins}
    name = canonicalize_name(requirement.name)
    assert name in pinned, f"constraints.txt does not pin {requirement.name}"
    assert pinned[name].operator == "=="
    assert requirement.specifier.contains(pinned[name].version)


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_each_dependency_has_one_floor(line):
    """`nox -s oldest` installs it."""
    assert [s.operator for s in Requirement(line).specifier].count(">=") == 1


def test_python_3_11_reads_it():
    """The syntax that `requires-python` promises, also where a newer Python runs the tests."""
    assert PROJECT["requires-python"] == ">=3.11"
    assert len(CODE) > 100
    for path in CODE:
        ast.parse(path.read_text(), relative(path), feature_version=(3, 11))
    with pytest.raises(SyntaxError):
        ast.parse("type X = int", feature_version=(3, 11))


def newer_imports(source: str) -> list[str]:
    """What of NEWER a module imports."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
        if alias.name in NEWER.get(node.module, ())
    ]


def test_the_package_imports_nothing_that_python_3_11_lacks():
    package = [path for path in CODE if path.is_relative_to(ROOT / "trl_margins")]
    assert {relative(path): names for path in package if (names := newer_imports(path.read_text()))} == {}
    assert newer_imports("from typing import Any, override\n") == ["typing.override"]


def bibtex_authors(paper: Paper) -> list[dict[str, str]] | None:
    """A citation's authors as CFF writes them; None where it has none."""
    found = re.search(r"author\s*=\s*\{(.+?)\},?\n", paper.citation)
    if found is None:
        return None
    authors = []
    for name in found[1].split(" and "):
        family, _, given = name.partition(", ")
        authors.append({"family-names": family, "given-names": given} if given else {"name": family})
    return authors


def test_the_citation_file():
    """Keys and values of CFF 1.2.0: those of its lists that stand here."""
    keys = {"cff-version", "type", "title", "message", "abstract", "authors", "license", "keywords", "references"}
    assert CITATION.keys() == keys
    assert (CITATION["cff-version"], CITATION["type"]) == ("1.2.0", "software")
    assert (CITATION["title"], CITATION["license"]) == (PROJECT["name"], PROJECT["license"])
    assert CITATION["authors"] == PROJECT["authors"] == [{"name": "The trl-margins authors"}]


@pytest.mark.parametrize("paper", PAPERS.values(), ids=lambda paper: paper.title.split(":")[0])
def test_the_citation_file_names_the_paper(paper):
    (reference,) = [reference for reference in CITATION["references"] if reference["title"] == paper.title]
    assert reference.get("url") == (f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else None)
    year = re.search(r"year\s*=\s*(\d{4})", paper.citation)
    assert reference.get("year") == (int(year[1]) if year else None)
    authors = bibtex_authors(paper)
    assert reference["authors"] == authors or (authors is None and reference["authors"])
    named = re.findall(r"(?:^|; )([\w-]+)[:,] ", reference["notes"])
    assert named == [method.id for method in METHODS.values() if method.paper is paper]


def test_the_citation_file_names_no_other():
    assert [reference["title"] for reference in CITATION["references"]] == list(PAPERS)


@pytest.mark.parametrize("reference", CITATION["references"], ids=lambda reference: reference["title"].split(":")[0])
def test_a_reference_is_one_of_cff(reference):
    keys = {"type", "status", "title", "authors", "conference", "year", "url", "notes"}
    assert {"type", "title", "authors"} <= reference.keys() <= keys
    assert reference["type"] in ("article", "conference-paper")
    assert reference.get("status", "preprint") in ("preprint", "submitted")
    assert all("name" in author or "family-names" in author for author in reference["authors"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "title", "labels", "body"}
    ids = [element["id"] for element in form["body"]]
    assert len(ids) == len(set(ids))
    assert any(element.get("validations", {}).get("required") for element in form["body"])
    for element in form["body"]:
        assert element.keys() <= {"type", "id", "attributes", "validations"}
        check_attributes(element["type"], element["attributes"])


def check_attributes(kind: str, attributes: dict[str, Any]) -> None:
    known = {
        "input": {"label", "description", "placeholder", "value"},
        "textarea": {"label", "description", "placeholder", "value", "render"},
        "dropdown": {"label", "description", "multiple", "options"},
        "checkboxes": {"label", "description", "options"},
    }
    assert attributes["label"]
    assert attributes.keys() <= known[kind]
    if kind == "dropdown":
        assert attributes["options"]
        assert all(isinstance(option, str) for option in attributes["options"])
    elif kind == "checkboxes":
        assert all(option.keys() <= {"label", "required"} and option["label"] for option in attributes["options"])


def test_there_are_three_issue_forms():
    assert [path.stem for path in FORMS] == ["bug", "feature", "method"]
    assert len({yaml.safe_load(path.read_text())["name"] for path in FORMS}) == 3


@pytest.fixture
def project(tmp_path) -> Path:
    """A source tree in small."""
    for name in ("trl_margins/__init__.py", "trl_margins/py.typed", "tests/conftest.py", "recipes/a/b.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    cache = tmp_path / "trl_margins" / "__pycache__"
    cache.mkdir()
    (cache / "x.pyc").touch()
    return tmp_path


IN_A_WHEEL = ["trl_margins/__init__.py", "trl_margins/py.typed", "trl_margins/recipes/a/b.yaml"]


def write_wheel(folder: Path, *names: str, description: str = "") -> Path:
    path = folder / "trl_margins-9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("trl_margins-9.dist-info/METADATA", f"Metadata-Version: 2.4\n\n{description}")
    return path


def test_a_whole_wheel(project):
    wheel = write_wheel(project, *IN_A_WHEEL)
    assert script("try_wheel").check_wheel(wheel, project) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (IN_A_WHEEL[:-1], r"missing \['trl_margins/recipes/a/b.yaml'\]"),
        (IN_A_WHEEL[1:], r"missing \['trl_margins/__init__.py'\]"),
        ([*IN_A_WHEEL, "tests/conftest.py"], r"not in the source \['tests/conftest.py'\]"),
    ],
)
def test_a_wheel_with_a_hole_or_a_stranger(names, message, project):
    with pytest.raises(SystemExit, match=message):
        script("try_wheel").check_wheel(write_wheel(project, *names), project)


def test_a_description_for_a_package_index(tmp_path):
    check = script("try_wheel").check_description
    assert check(write_wheel(tmp_path, description="[γ](https://x.org/y.md#z) [here](#there)")) == 40
    for wrong in ("[a](docs/a.md)", "![a](../a.png)", '<img src="a.svg">', '<source srcset="a.svg">'):
        with pytest.raises(SystemExit, match=r"relative links \['[ad.]"):
            check(write_wheel(tmp_path, description=wrong))
    with pytest.raises(SystemExit, match="no description"):
        check(write_wheel(tmp_path))


@pytest.mark.parametrize("missing", [None, "tests/conftest.py", "recipes/a/b.yaml"])
def test_an_sdist_has_what_the_tests_need(missing, project):
    names = ["trl_margins/__init__.py", "trl_margins/py.typed", "tests/conftest.py", "recipes/a/b.yaml"]
    sdist = project / "trl_margins-9.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in names:
            if name != missing:
                archive.add(project / name, f"trl_margins-9/{name}")
    if missing is None:
        assert script("try_wheel").check_sdist(sdist, project) == 4
    else:
        with pytest.raises(SystemExit, match=rf"lacks \['{missing}'\]: see the sdist in pyproject.toml"):
            script("try_wheel").check_sdist(sdist, project)


def test_one_wheel_or_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"\*\.whl: 0 files instead of one"):
        script("try_wheel").the_only(tmp_path, "*.whl")


def test_the_sdist_includes_what_exists():
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"][
        "include"
    ]
    paths = [ROOT / name.removeprefix("/") for name in included]
    assert all(path.exists() for path in paths)
    assert {path.name for path in paths if path.is_dir()} == set(script("try_wheel").IN_THE_SDIST)


def test_the_smoke_test_trains(tmp_path):
    """Here in this environment; `make dist` does it in a fresh one."""
    assert "mean weight 2.00" in script("smoke").train(tmp_path)


def test_every_command_has_help():
    """One % in a field's help is enough to break it: argparse formats it."""
    assert "train" in script("smoke").help_of_every_command()


def test_the_smoke_test_wants_the_installed_package():
    """The one of this working tree is not it."""
    with pytest.raises(AssertionError, match="not from the fresh environment"):
        script("smoke").version(trl_margins.__version__)
