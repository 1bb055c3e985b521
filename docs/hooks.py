"""Fills the pages' placeholders from the package: `{{ options gappo score_gap_* }}` becomes a table, built anew with
every build, so that no default, option or setting is written down twice."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

PLACEHOLDER = re.compile(r"^\{\{ (\w+) ?(.*?) \}\}$", re.MULTILINE)
_WORDS = re.compile(r" ?(?<![\\A-Za-z])[A-Za-z]{2,}(?:[- ][A-Za-z]{2,})* ?")
_UPRIGHT = r"\\text{\g<0>}"
_CODE = re.compile(r"<code>([^<\n]+)</code>(?!</pre>)")
_ALWAYS_SHOWN = ("beta", "gamma_beta_ratio", "learning_rate")  # of a paper's settings; others where they differ


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """MkDocs calls this with every page."""
    return expanded(markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """MkDocs calls this with every page's HTML: names and flags that fit a phone's line are kept in one piece."""
    return _CODE.sub(_kept_words, html)


def _kept_words(code: re.Match[str]) -> str:
    words = re.sub(r"(?<![^ ])[^ ]{1,40}(?![^ ])", r'<span class="word">\g<0></span>', code[1])
    return f"<code>{words}</code>"


def expanded(markdown: str) -> str:
    """The page with its placeholders filled.

    Raises:
        ValueError: a placeholder that no function here fills, or that names what is not there.
    """

    def fill(match: re.Match[str]) -> str:
        name, arguments = match[1], match[2].split()
        if name not in FILLERS:
            raise ValueError(f"no placeholder {name!r}; known: {', '.join(FILLERS)}")
        return FILLERS[name](*arguments)

    return PLACEHOLDER.sub(fill, markdown)


def options(method_id: str, *patterns: str) -> str:
    """A method's own config fields: name, default, help. `none` is the trainer without a method."""
    from trl_margins.trainers.configs import MarginOptions, config_class

    declared = config_class(None if method_id == "none" else method_id).__dataclass_fields__
    own = [field.name for field in dataclasses.fields(MarginOptions)]
    named = [name for name in own if any(fnmatch(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in named):
            raise ValueError(f"options {method_id}: no field is called {pattern!r}")
    rows = [(f"`{name}`", _value(declared[name].default), _help(declared[name])) for name in named]
    return _table(("field", "default", "meaning"), rows)


def settings(method_id: str) -> str:
    """A method's defaults, and what its paper takes for each model."""
    from trl_margins.registry import get_method

    method = get_method(method_id)
    models = {model: {**method.defaults, **own} for model, own in {"default": {}, **method.settings}.items()}
    names = list(dict.fromkeys([*_ALWAYS_SHOWN, *(name for values in models.values() for name in values)]))
    shown = [
        name
        for name in names
        if name in _ALWAYS_SHOWN or any(values[name] != method.defaults[name] for values in models.values())
    ]
    rows = [(model, *(_value(values[name]) for name in shown)) for model, values in models.items()]
    common = ", ".join(f"`{name}` {_value(method.defaults[name])}" for name in names if name not in shown)
    return _table(("", *(f"`{name}`" for name in shown)), rows) + f"\n\nIn every row: {common}."


def gammas() -> str:
    """The target margins of all papers, as ratio and in reward units."""
    from trl_margins.methods import METHODS

    rows = []
    for method in METHODS.values():
        for model, own in (method.settings or {"default": {}}).items():
            values = {**method.defaults, **own}
            if "gamma_beta_ratio" not in values:
                continue
            beta, ratio = values["beta"], values["gamma_beta_ratio"]
            rows.append((f"`{method.id}`", model, *map(_value, (beta, ratio, beta * ratio))))
    return _table(("method", "model", "`beta`", "`gamma_beta_ratio`", "`simpo_gamma`"), rows)


def paper(method_id: str) -> str:
    """Its title, linked where it can be."""
    from trl_margins.registry import get_method

    cited = get_method(method_id).paper
    return f"[{cited.title}](https://arxiv.org/abs/{cited.arxiv})" if cited.arxiv else cited.title


def citation(method_id: str) -> str:
    """What to cite it as."""
    from trl_margins.registry import get_method

    return f"```bibtex\n{get_method(method_id).paper.citation}\n```"


def recipes(method_id: str) -> str:
    """The settings that ship for a method."""
    from trl_margins.cli.recipes import recipes as all_recipes

    rows = [
        (f"`{each.name}`", each.data, f"{each.paper}, {each.table}")
        for each in all_recipes()
        if each.method == method_id
    ]
    return _table(("`--recipe`", "data", "source"), rows)


def keys() -> str:
    """Keys of other projects, and what they are today."""
    from trl_margins.cli.other_keys import DROPPED, RENAMED

    today = {key: re.sub(r"\w+", r"`\g<0>`", fields) for key, fields in RENAMED.items()}
    dropped = {key: f"dropped: {why}" for key, why in DROPPED.items()}
    return _table(("key", "today"), [(f"`{key}`", text) for key, text in {**today, **dropped}.items()])


def objectives(*method_ids: str) -> str:
    """What methods are made of, and the defaults in which they differ from SimPO's general settings."""
    from trl_margins.methods.row import SIMPO_SETTINGS, names_of
    from trl_margins.registry import get_method

    rows = []
    for method in map(get_method, method_ids):
        parts = [f"reward `{method.reward}`", *([f"loss `{method.loss}`"] if method.loss else [])]
        parts += [f"{kind} `{name}`" for kind in ("weight", "margin") for name in names_of(getattr(method, kind))]
        parts += [f"SFT {_value(method.sft)}"] if method.sft else []
        own = {name: value for name, value in method.defaults.items() if SIMPO_SETTINGS.get(name) != value}
        defaults = ", ".join(f"`{name}` {_value(value)}" for name, value in own.items())
        formula = _latex(method.formula.removeprefix("loss = (1/B) Σ "))
        source = f"[{method.name}](https://arxiv.org/abs/{method.paper.arxiv})" if method.paper.arxiv else method.name
        rows.append((f"`{method.id}`", source, formula, ", ".join(parts), ", ".join(method.bases), defaults))
    return _table(("`--method`", "paper", "loss of a pair", "as", "base", "defaults"), rows)


def _latex(formula: str) -> str:
    """A method's formula, which consoles and model cards print as it is, as LaTeX."""
    text = formula.replace("  ", r" \quad ").replace("|", r"\vert ").replace("M̄", r"\bar M")
    text = re.sub(r"_(\w+(?:,\w)?)", r"_{\1}", text)
    text = re.sub(r"\^(?:\(([^)]*)\)|(−?\w))", lambda match: f"^{{{match[1] or match[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])(?:log|exp|max)\b(?!-)", r"\\\g<0>", text)
    return f"${_WORDS.sub(_UPRIGHT, text)}$"


def evidence() -> str:
    """For each baseline: the lines of code that it alone needs, its tests, and the source of its recipe's settings."""
    from trl_margins.cli.recipes import recipes as all_recipes
    from trl_margins.methods import METHODS

    sources = {each.method: each.table for each in all_recipes() if each.name.startswith("llama-3-8b-instruct/")}
    rows = []
    for method in METHODS.values():
        if method.baseline:
            own = _own_code(method)
            where = ", ".join(f"`{name}`" for name in own) or "TRL's loss"
            tests = ", ".join(f"`{name}`" for name in _tests_of(method.id))
            rows.append((f"`{method.id}`", str(sum(own.values())), where, tests, sources[method.id]))
    return _table(("`--method`", "lines", "own code", "tests", "settings of the recipe from"), rows)


def _own_code(method: Any) -> dict[str, int]:
    """Functions and classes that only this method needs → lines, without docstrings, comments and blank lines."""
    from trl_margins.links import LINKS, TRLS
    from trl_margins.methods import MARGINS, WEIGHTS, names_of
    from trl_margins.rewards import REWARDS

    base = method.bases[0]
    roots: list[Any] = [REWARDS[method.reward]] if method.reward in ("log-odds", "alphapo-token") else []
    if method.loss and method.loss not in TRLS[base]:
        roots.append(LINKS[base][method.loss].function)
    for kind, table in (("weight", WEIGHTS), ("margin", MARGINS)):
        roots += [table[name] for name in names_of(getattr(method, kind))]
    found = {}
    for file in {root.__module__ for root in roots}:
        source = inspect.getsource(import_module(file))
        defined = {
            node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        uses = {
            name: {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & defined.keys() - {name}
            for name, node in defined.items()
        }
        own = {root.__name__ for root in roots if root.__module__ == file}
        while new := {name for each in own for name in uses[each]} - own:
            own |= new
        while shared := {name for each in defined.keys() - own for name in uses[each]} & own:
            own -= shared
        found |= {name: _lines(defined[name], source.splitlines()) for name in defined if name in own}
    return found


def _lines(node: ast.AST, source: list[str]) -> int:
    within = {
        number
        for each in ast.walk(node)
        if isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each) is not None
        for number in range(each.body[0].lineno, each.body[0].end_lineno + 1)
    }
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    numbers = set(range(first, node.end_lineno + 1)) - within
    return sum(
        not source[number - 1].lstrip().startswith("#") and bool(source[number - 1].strip()) for number in numbers
    )


def _tests_of(method_id: str) -> list[str]:
    """In tests/test_objectives.py: the tests whose table of cases has a method, or else the first that names it."""
    of_table = {"CASES": "test_published_formula", "TRLS": "test_trls_trainer"}
    tree = ast.parse((Path(__file__).parents[1] / "tests" / "test_objectives.py").read_text(encoding="utf-8"))
    naming = [
        node
        for node in tree.body
        if any(isinstance(each, ast.Constant) and each.value == method_id for each in ast.walk(node))
    ]
    targets = [
        ast.unparse(getattr(node, "target", None) or node.targets[0]) for node in naming if _is_assignment(node)
    ]
    first = [node.name for node in naming if isinstance(node, ast.FunctionDef)][:1]
    return [of_table[name] for name in targets if name in of_table] or first


def _is_assignment(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign | ast.AnnAssign)


def elsewhere() -> str:
    """Objectives by the names that other code gives them, and what they are here."""
    from trl_margins.trainers.elsewhere import ELSEWHERE

    rows = [
        (
            each.name,
            ", ".join([f"`loss_type: {loss}`" for loss in each.losses] + [f"`{key}`" for key in each.keys]),
            f"`{each.word}`" if each.word else "",
            ", ".join(f"`{key}: {value}`" for key, value in each.here.items()).replace("'", "") or "an error",
            each.remark if each.here else re.sub(r"(--.*)\.$", r"`\1`", each.instead),
        )
        for each in ELSEWHERE
    ]
    return _table(("objective", "keys", "name", "here", ""), rows)


def foreign() -> str:
    """Keys that are called otherwise here, by project."""
    from trl_margins.cli.other_keys import FOREIGN

    found: dict[str, dict[str, list[str]]] = {}
    for project, table in FOREIGN.items():
        for key, here in table.items():
            if here:
                found.setdefault(here, {}).setdefault(project, []).append(f"`{key}`")
    rows = [(f"`{here}`", *(", ".join(keys.get(project, ())) for project in FOREIGN)) for here, keys in found.items()]
    return _table(("here", *FOREIGN), rows)


def commands() -> str:
    """Every subcommand and what it is for."""
    from trl_margins.cli import COMMANDS

    return _table(("command", "what it does"), [(f"[`{name}`](#{name})", text) for name, text in COMMANDS.items()])


def flags(command: str, *names: str) -> str:
    """Flags of a subcommand; a name that its own arguments do not have is a field of the trainers' configs."""
    from trl_margins.trainers.configs import MarginCPOConfig

    module = import_module(f"trl_margins.cli.{command}")
    own = [
        value for name, value in vars(module).items() if name.endswith("Arguments") and dataclasses.is_dataclass(value)
    ]
    known: dict[str, dataclasses.Field[Any]] = {}
    for holder in (MarginCPOConfig, *_model_config(), *own):
        known |= holder.__dataclass_fields__
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"trl-margins {command} has no flags {missing}")
    return _table(("flag", "default", "meaning"), [_flag(known[name]) for name in names])


def _flag(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = "required" if required else _value(field.default)
    return f"`--{field.name}`", default, _help(field)


def _help(field: dataclasses.Field[Any]) -> str:
    """As `--help` prints it: argparse takes %% for a percent sign."""
    return " ".join(field.metadata.get("help", "").replace("%%", "%").split())


def _model_config() -> Iterable[type]:
    from trl import ModelConfig

    return (ModelConfig,)


def losses() -> str:
    """Which loss goes with what."""
    from trl_margins.links import CPO_LINKS, DPO_LINKS

    def mark(value: bool) -> str:
        return "yes" if value else ""

    reference_free = [name for name, link in DPO_LINKS.items() if not link.needs_reference]
    rows = [
        (
            f"`{name}`",
            *(mark(name in table) for table in (CPO_LINKS, DPO_LINKS, reference_free)),
            mark(link.per_pair),
            mark(link.takes_margin),
        )
        for name, link in {**DPO_LINKS, **CPO_LINKS}.items()
    ]
    return _table(("`loss_type`", "CPO base", "DPO base", "DPO base, no reference", "weight", "margin"), rows)


def score_columns() -> str:
    """Where scores are looked for."""
    from trl_margins.rows.scores import GAP_COLUMNS, PAIRED_COLUMNS

    pairs = [f"`{chosen}`, `{rejected}`" for chosen, rejected in PAIRED_COLUMNS]
    return "\n".join(
        f"{place}. {name}" for place, name in enumerate([*pairs, *(f"`{gap}`" for gap in GAP_COLUMNS)], start=1)
    )


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None or value is dataclasses.MISSING:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{re.sub(r'e-0', 'e-', f'{value:g}')}`" if isinstance(value, float) else f"`{value}`"


FILLERS: Mapping[str, Any] = {
    filler.__name__: filler
    for filler in (
        *(options, settings, gammas, paper, citation, recipes, objectives, evidence),
        *(keys, elsewhere, foreign, commands, flags, losses, score_columns),
    )
}
