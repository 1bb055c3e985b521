"""The documentation does what it says: Python and command lines run, and placeholders find what they name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
from conftest import preference_rows
from datasets import Dataset, DatasetDict
from printed import FENCE
from test_pairing import ultrafeedback
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)

from trl_margins.cli import COMMANDS, main
from trl_margins.methods import METHODS
from trl_margins.report import figures
from trl_margins.trainers.named import trainer_class

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PLUGIN = "examples/plugin/README.md"
PAGES = ["README.md", "CONTRIBUTING.md", PLUGIN, *(str(path.relative_to(ROOT)) for path in sorted(DOCS.rglob("*.md")))]

# Name in the pages → what stands in for it: a folder's name in the workspace below
MODELS = {
    **dict.fromkeys(("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"), "tiny"),
    "bundled:smollm2-135m-instruct": "tiny",
    **dict.fromkeys(("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct"), "tiny"),
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": "reward-model",
    "Qwen/Qwen3-8B": "thinks",
}
# What every config has in the tests: TRL trains in bf16 by default, which transformers refuses without a GPU
EVERY_RUN = {"bf16": False, "gradient_checkpointing": False, "max_steps": 1, "disable_tqdm": True}
# Hub sets → the splits that are made of a few local pairs
HUB_SETS = {
    "HuggingFaceH4/ultrafeedback_binarized": ("train_prefs", "test_prefs"),
    "Anthropic/hh-rlhf": ("train", "test"),
    "openbmb/UltraFeedback": ("train",),
}
# What a page takes as given
GIVEN = {"docs/evaluation.md": {"dataset": "pairs_with_models"}}
# What is added to a command, so that it takes a second; the last of two equal flags counts
ADDED = {
    "train": "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_length 128 --eval_steps 1"
    " --overwrite_output_dir true",  # pages train into the same folder from Python and from the command line
    "compare": "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --max_length 128 --seeds 1"
    " --log_pairs false",
    "evaluate": "--max_length 128 --bootstrap 10",
    "select": "--max_length 128 --batch_size 2 --anchor_batch_multiplier 2",
    "anchors": "--max_length 128 --batch_size 2 --anchor_batch_multiplier 2",
    "hessian": "--max_length 64 --max_pairs 1",
    "inspect": "--max_length 128",
    "generate": "--max_new_tokens 4 --engine generate --engine_options {}",
    "trl": "--model_name_or_path tiny --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --use_cpu true",
}
# What a `train` says that a page leaves out with an ellipsis
LEFT_OUT = {"--model_name_or_path": "tiny", "--dataset_name": "pairs.jsonl.gz", "--output_dir": "left-out"}
# The questions of benchmarks, where their projects have them
QUESTIONS = {
    "alpaca_eval_gpt4_baseline.json": {"instruction": "Say a.", "output": "a", "generator": "g", "dataset": "koala"},
    "arena-hard-auto/data/arena-hard-v2.0/question.jsonl": {"uid": "1", "category": "hard_prompt", "prompt": "Say a."},
    "FastChat/fastchat/llm_judge/data/mt_bench/question.jsonl": {
        **{"question_id": 81, "category": "writing", "turns": ["Say a.", "Say b."]},
    },
}
# What `pip install` may also be given
OTHER_PACKAGES = {"deepspeed", "bitsandbytes"}
# Blocks in another language say that they are not to be run
LANGUAGES = {"python", "bash", "text", "bibtex", "yaml"}
# Slow, and nothing on any page builds on what they write: once is enough
ONCE = {"report", "inspect"}


def blocks(page: str) -> Iterator[tuple[str, str, int]]:
    """(language, code, line of the first one) of a page's fenced blocks."""
    text = (ROOT / page).read_text()
    found = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(found), f"{page}: a fence that this file cannot read"
    for match in found:
        yield match["language"], textwrap.dedent(match["code"]), text[: match.start("code")].count("\n") + 1


def lines(code: str) -> list[list[str]]:
    """A shell block's commands, split; without comments, and without an ellipsis and the flag that it is for.

    Of a loop, those of its first and its last value.
    """

    def unrolled(loop: re.Match[str]) -> str:
        echo = ["bash", "-c", f"echo {loop['values']}"]  # which expands braces
        values = subprocess.run(echo, capture_output=True, text=True, check=True).stdout.split()
        return "".join(loop["body"].replace(f"${loop['name']}", value) for value in (values[0], values[-1]))

    code = re.sub(r"for (?P<name>\w+) in (?P<values>.+); do\n(?P<body>(?s:.*?))done\n", unrolled, code)
    joined = re.sub(r"(--\w+ )?…", "", code.replace("\\\n", " ")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in joined) if words]


def pairs_with_models() -> Dataset:
    """Ten prompts with eight pairs each, of the answers of four models."""
    models = {
        "chosen_model": [f"m{i % 4}" for i in range(80)],
        "rejected_model": [f"m{i // 4 % 4}" for i in range(80)],
    }
    rows = preference_rows(80, seed=7).to_dict() | models | {"prompt": [f"say {i // 8} " for i in range(80)]}
    return Dataset.from_dict(rows)


def as_on_the_hub() -> Dataset:
    """UltraFeedback binarized's columns: the prompt as text, the answers as whole conversations, one of them again."""

    def row(pair: dict[str, Any]) -> dict[str, Any]:
        sides = {side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}
        return {"prompt": pair["prompt"][0]["content"], **sides, "messages": sides["chosen"]}

    plain = preference_rows(8, "conversational", seed=3)
    return Dataset.from_list([{**pair, **row(pair)} for pair in plain])


def hh() -> Dataset:
    """Dialogues whose answers begin alike, half of them with the longer one chosen."""
    asked = [f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Say {i}.\n\nAssistant: I " for i in range(8)]
    ends = [("say so", "do") if i % 2 else ("do", "say no") for i in range(8)]
    rows = [
        {"chosen": one + chosen, "rejected": one + other} for one, (chosen, other) in zip(asked, ends, strict=True)
    ]
    return Dataset.from_list(rows)


def raw_ultrafeedback() -> Dataset:
    return Dataset.from_list(ultrafeedback(12))


_whole = TrainingArguments.__post_init__


def small(config: TrainingArguments) -> None:
    """A config's `__post_init__`, whatever was said before."""
    for name, value in EVERY_RUN.items():
        setattr(config, name, value)
    _whole(config)


@pytest.fixture(scope="session")
def workspace(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages name, among them a run's folder."""
    folder = tmp_path_factory.mktemp("docs")
    for name, seed in {"pairs": 1, "eval": 2}.items():
        rows = preference_rows(12, "conversational", seed=seed)
        for column in ("pair_weight", "pair_margin"):
            rows = rows.add_column(column, [i / 12 for i in range(12)])
        rows.to_json(folder / f"{name}.jsonl.gz", compression="gzip")
    lists = [{"prompt": f"say {i} ", "responses": ["one", "two", "three"], "scores": [i, 5, 2]} for i in range(3)]
    Dataset.from_list(lists).to_json(folder / "lists.jsonl.gz", compression="gzip")
    bench = [{"prompt": f"say {i} ", "chosen": ["a", "bb", "c c"], "rejected": ["d", "e", "f"]} for i in range(2)]
    Dataset.from_list(bench).to_json(folder / "chat_filtered.json", lines=False)
    (folder / "theirs.yaml").write_text(
        "model_name_or_path: tiny\ntorch_dtype: float32\ndataset_mixer: {pairs.jsonl.gz: 1.0}\n"
        "dataset_splits: [train]\nloss_type: simpo\nbeta: 2.0\ngamma_beta_ratio: 0.5\nmax_prompt_length: 64\n"
        "warmup_ratio: 0.1\noutput_dir: theirs\n"
    )
    (folder / "base.yaml").write_text(
        "model_name_or_path: tiny\ndataset_name: pairs.jsonl.gz\neval_dataset_name: eval.jsonl.gz\n"
    )
    prompts = [{"prompt": f"say {i} "} for i in range(4)]
    Dataset.from_list(prompts).to_json(folder / "prompts.jsonl.gz", compression="gzip")
    for name, row in QUESTIONS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps([row] if name.endswith(".json") else row) + "\n")
    shutil.copytree(tiny_model, folder / "tiny")
    shutil.copytree(tiny_model, folder / "thinks")
    with (folder / "thinks/chat_template.jinja").open("a") as template:
        template.write("{% if enable_thinking is false %}<think></think>{% endif %}")
    shutil.copytree(tiny_model, folder / "reward-model")
    reward = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
    LlamaForSequenceClassification(reward).save_pretrained(folder / "reward-model")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(TrainingArguments, "__post_init__", small)
        run(["trl-margins", "train", "--output_dir", "out"], set())
    for name in ("gappo", "simpo"):
        shutil.copytree(folder / "out", folder / name)
    return folder


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_registry: None) -> Path:
    """A copy of it, where Hub sets are local ones."""
    folder = tmp_path / "here"
    shutil.copytree(workspace, folder)
    monkeypatch.chdir(folder)
    real = datasets.load_dataset

    def load_dataset(path: str, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
        if path not in HUB_SETS:
            return real(path, *args, split=split, **kwargs)
        made = {"Anthropic/hh-rlhf": hh, "openbmb/UltraFeedback": raw_ultrafeedback}.get(path, as_on_the_hub)
        splits = DatasetDict({name: made() for name in HUB_SETS[path]})
        if split is None:
            return splits
        name, _, part = split.partition("[:")
        rows = splits[name]
        return rows.select([i % len(rows) for i in range(int(part.rstrip("]")))]) if part else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(TrainingArguments, "__post_init__", small)
    monkeypatch.setattr(figures, "PICTURES", figures.PICTURES[:1])  # of a report: drawing takes most of its time
    return folder


@pytest.fixture(scope="module")
def already_run() -> set[str]:
    return set()


@pytest.mark.rehearsal
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, here: Path, already_run: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, and its Python in one namespace."""
    if page == PLUGIN:  # installed by an entry point, it is imported when its names are looked up
        monkeypatch.syspath_prepend(ROOT / Path(page).parent)
        monkeypatch.delitem(sys.modules, "trl_margins_focal", raising=False)
        importlib.import_module("trl_margins_focal")
    namespace: dict[str, Any] = {"__name__": page}
    namespace |= {name: globals()[maker]() for name, maker in GIVEN.get(page, {}).items()}
    for language, code, line in blocks(page):
        assert language in LANGUAGES, f"{page}, line {line}: a block in no language, or in {language!r}"
        for name, stand_in in MODELS.items():
            code = code.replace(name, stand_in)
        if language == "python":
            # as many newlines as stand above it: a traceback then shows the page's own line
            exec(compile("\n" * line + code, str(ROOT / page), "exec", dont_inherit=True), namespace)
        elif language == "bash":
            for words in lines(code):
                run(words, already_run)
        elif language == "yaml":
            Path("of-the-page.yaml").write_text(code)
            given = ["--dataset_name", "pairs.jsonl.gz", "--output_dir", "of-the-page"]
            run(["trl-margins", "train", "--config", "of-the-page.yaml", "--method", "none", *given], already_run)
    for name, test in list(namespace.items()):
        if name.startswith("test_"):
            test()


def run(words: list[str], already_run: set[str]) -> None:
    """A command line of a page, or what can be said of it without running it."""
    program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    program = program.removeprefix(".venv/bin/")
    if program == "trl-margins":
        rest = rest[: rest.index(">")] if ">" in rest else rest
        if rest[0] in ONCE and str(rest) in already_run:
            return
        already_run.add(str(rest))
        assert main(as_run(rest)) == 0
    elif program == "trl":
        module = importlib.import_module(f"trl.scripts.{rest[0]}")  # which trl launches in a process of its own
        module.main(*module.make_parser().parse_args_and_config([*rest[1:], *shlex.split(ADDED["trl"])]))
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets, f"no such target: {words}"
    elif program == "pip":
        check_pip(rest)
    elif program == "accelerate":
        check_launch(rest)
    elif program == "hf":
        assert rest[0] == "download"
    elif program in ("alpaca_eval", "lm_eval"):
        check_judge(program, rest)
    elif program == "nox":
        assert rest[0] == "-s"
        sessions = (ROOT / "noxfile.py").read_text()
        assert f"\ndef {rest[1]}(session" in sessions or f'@nox.session(name="{rest[1]}")' in sessions
    else:
        raise AssertionError(f"tests/test_docs.py does not know how to check {words}")


def as_run(words: list[str]) -> list[str]:
    command, *rest = words
    if command == "train":
        given = {word.partition("=")[0] for word in rest}
        named = {"--config", "--recipe"} & given
        for flag, value in LEFT_OUT.items():
            if flag not in given and not (named and flag != "--model_name_or_path"):
                rest += [flag, value]
    return [command, *rest, *shlex.split(ADDED.get(command, ""))]


def check_pip(words: list[str]) -> None:
    """Installs this package, with extras that it has; the example; or what a contributor's page names."""
    from pip._internal.commands import create_command

    assert words[0] == "install"
    _, words = create_command("install").parse_args(words[1:])
    _, _, after = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")
    extras = re.findall(r"^(\w+) = ", after.partition("\n[")[0], re.MULTILINE)
    for word in words:
        if word in OTHER_PACKAGES or (ROOT / word / "pyproject.toml").is_file():
            continue
        match = re.fullmatch(r"(?:\.|trl-margins)(?:\[(.+)\])?", word)
        assert match, f"pip install {word}: not this package"
        assert set((match[1] or "").split(",")) - {""} <= set(extras), word


def check_judge(program: str, words: list[str]) -> None:
    """The flags are the program's, and the files are there that earlier commands of the page have written."""
    if importlib.util.find_spec(program) is None:
        return
    if program == "lm_eval":
        from lm_eval._cli import HarnessCLI

        assert HarnessCLI()._parser.parse_args(words).model == "hf"
        return
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert {flag.removeprefix("--") for flag in given} <= signature(
        importlib.import_module(program).evaluate
    ).parameters.keys()
    assert all(Path(given[flag]).is_file() for flag in ("--model_outputs", "--reference_outputs"))


def check_launch(words: list[str]) -> None:
    """The launcher's flags parse, and the command's do in this package."""
    from accelerate.commands.launch import launch_command_parser

    from trl_margins.cli.train import parse

    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])
    assert launch.module
    assert launch.training_script == "trl_margins.cli"
    assert launch.config_file is None or Path(launch.config_file).is_file(), launch.config_file
    command, *rest = launch.training_script_args
    assert command in COMMANDS
    if command == "train":
        parse(as_run([command, *rest])[1:])


# What the site is made of


def module(name: str) -> ModuleType:
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("page", [page for page in PAGES if "{{" in (ROOT / page).read_text()])
def test_placeholders_are_filled(page: str) -> None:
    filled = module("hooks").expanded((ROOT / page).read_text())
    assert "{{" not in FENCE.sub("", filled)
    rows = re.findall(r"^\| .*$", filled, re.MULTILINE)
    assert rows
    for row in rows:
        assert row.endswith(" |"), row


def test_a_placeholder_for_nothing_is_an_error() -> None:
    hooks = module("hooks")
    for wrong in (
        "{{ optoins gappo }}",
        "{{ options gappo scoer_gap_* }}",
        "{{ settings gapo }}",
        "{{ flags train x }}",
    ):
        with pytest.raises(ValueError, match=r"no placeholder|no field|unknown method|no flags"):
            hooks.expanded(wrong)


def test_settings_say_what_differs_between_models() -> None:
    """A value that one model of the paper has otherwise is a column, whatever it is."""
    shown = module("hooks").settings("amapo")
    head, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert [cell.strip(" `") for cell in head.split("|")[2:5]] == ["beta", "gamma_beta_ratio", "learning_rate"]
    assert "| Mistral-7B-Base | `2` |" in rows[3]
    assert "`num_train_epochs` `1`" in shown.splitlines()[-1]


def test_the_page_of_baselines_has_each_with_its_code_and_its_tests() -> None:
    baselines = [id for id, row in METHODS.items() if row.baseline]
    page = (DOCS / "baselines.md").read_text()
    named = [name for match in re.findall(r"\{\{ objectives (.+) \}\}", page) for name in match.split()]
    assert sorted(named) == sorted(baselines)
    _, _, *rows = module("hooks").evidence().splitlines()
    table = {cells[0]: cells[1:] for cells in ([cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows)}
    assert list(table) == baselines
    tests = (ROOT / "tests" / "test_objectives.py").read_text()
    for _, _, named_tests, source in table.values():
        assert source
        assert named_tests
        for test in re.findall(r"\w+", named_tests):
            assert f"def {test}(" in tests
    assert table["dpo"][:2] == ["0", "TRL's loss"]
    assert table["rrhf"][:2] == ["2", "rrhf"]  # def and return
    # the function's two lines; decorator, class, two fields, a check and a call of two lines each
    assert table["r-dpo"][:2] == ["10", "length_margin`, `LengthMargin"]
    assert table["beta-dpo"][2] == table["beta-simpo"][2] == "test_beta_dpo"
    assert table["orpo"][2] == "test_published_formula`, `test_trls_trainer"


def test_formulas_of_methods_become_latex() -> None:
    latex = module("hooks")._latex
    assert latex("|s_w,i| σ(x)^(1/β)") == r"$\vert s_{w,i}\vert  σ(x)^{1/β}$"
    assert latex("−log σ(β Δ),  Δ = mean log π(y_w)") == r"$−\log σ(β Δ), \quad Δ =\text{ mean }\log π(y_{w})$"


def test_every_command_has_its_section() -> None:
    sections = re.findall(r"^## (.+)$", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert set(sections) == set(COMMANDS)


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_first_block_of_the_readme_runs_on_a_cpu(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands: only the Hub's model and data set are local ones, and what it saves loads with transformers."""
    monkeypatch.setattr(TrainingArguments, "__post_init__", _whole)
    code = next(code for language, code, _ in blocks("README.md") if language == "python")
    (model,) = [name for name in MODELS if name in code]
    exec(compile(code.replace(model, "tiny"), "README.md", "exec", dont_inherit=True), {})
    (saved,) = re.findall(r'Config\("([\w-]+)"', code)
    trained, before = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (saved, "tiny"))
    assert any((trained[name] != before[name]).any() for name in before)
    assert AutoTokenizer.from_pretrained(saved).chat_template


def test_the_readme_begins_with_the_two_commands() -> None:
    assert [words[:2] for words in lines(next(blocks("README.md"))[1])] == [["make", "demo"], ["make", "test"]]


def test_the_readme_has_the_papers_of_the_five_methods() -> None:
    text = (ROOT / "README.md").read_text()
    five = [row for row in METHODS.values() if not row.baseline and f"`{trainer_class(row.id).__name__}`" in text]
    assert len(five) == 5
    linked = re.findall(r"\(https://arxiv\.org/abs/([\d.]+)\)", text)
    assert sorted(linked) == sorted(row.paper.arxiv for row in five if row.paper.arxiv)
    assert text.count("under review") == sum(row.paper.arxiv is None for row in five)


def test_the_speeds_of_the_readme_are_measured_ones() -> None:
    """The numbers of each row stand in one table of docs/performance.md, TRL's and ours in their rows."""
    rows = re.findall(r"^\| .*pairs per step \|.*|^\| the same.*", (ROOT / "README.md").read_text(), re.MULTILINE)
    tables = re.split(r"\n(?!\|)", (DOCS / "performance.md").read_text())
    assert len(rows) == 6
    for row in rows:
        theirs, ours, ratio, memory = [cell.strip() for cell in row.split("|")[2:6]]
        their_memory, our_memory = re.findall(r"[\d.]+", memory)
        of_trl, of_ours = (
            {line for table in tables for line in table.splitlines() if line.startswith(begin)}
            for begin in ("| TRL CPOTrainer(simpo) ", ("| MarginCPOTrainer(simpo) ", "| ours, SimPO |"))
        )
        assert any({theirs, their_memory} <= set(line.split()) for line in of_trl), row
        assert any({ours, ratio, our_memory} <= set(line.split()) for line in of_ours), row
        assert float(theirs) / float(ours) == pytest.approx(float(ratio), abs=0.011)


def test_docstrings_become_markdown() -> None:
    readable = module("docstrings").readable
    assert readable(r"gap :math:`\delta_i = |s_{w,i} - s_l|`.") == r"gap $\delta_i = |s_{w,i} - s_l|$."
    assert readable(r".. math:: \frac1n \sum_i KL(p_i)") == "$$\n\\frac1n \\sum_i \\text{KL}(p_i)\n$$"
    lines = ".. math::\n    a_i\n    = b_i\n\nrest"
    assert readable(lines) == "$$\na_i\n= b_i\n$$\n\nrest"
    assert readable("a\n\n=== ====\nx   y\n=== ====\n1   |2|\n=== ====\n\nb") == (
        "a\n\n| x | y |\n| --- | --- |\n| 1 | \\|2\\| |\n\nb"
    )


def test_the_walk_of_a_row_names_what_there_is():
    """Ten hops or fewer, each with a name that its module defines."""
    hops = re.findall(r"^\| \d+ \| (.+?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert 5 <= len(hops) <= 10
    for hop in hops:
        paths = re.findall(r"`([\w/]+\.py)`", hop)
        names = re.findall(r"`(\w+)`", hop)
        assert paths, hop
        files = [next((ROOT / "trl_margins").rglob(Path(path).name)) for path in paths]
        source = "\n".join(file.read_text() for file in files)
        for name in names:
            assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), (hop, name)
