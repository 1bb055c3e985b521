"""What comes from elsewhere runs nothing, says nothing that it should not, and reaches no file and no server."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import markdown
import pytest
import torch
import yaml
from conftest import drawn_pictures, load, preference_rows, quiet
from datasets import Dataset
from faults import drop_digests
from processes import output_of
from safetensors import SafetensorError

import trl_margins
from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins.cli import main
from trl_margins.cli.config_file import ConfigLoader
from trl_margins.cli.recipes import recipe_path
from trl_margins.cli.setup import load_tokenizer
from trl_margins.data.bundled import resolve_model
from trl_margins.data.evaluation_factors import add_evaluation_factor
from trl_margins.data.loading import load_splits, pick_split
from trl_margins.report import figures
from trl_margins.report.card_results import read_report
from trl_margins.report.page import write_report
from trl_margins.report.run_folder import read_runs
from trl_margins.trainers import card
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

PACKAGE = Path(trl_margins.__file__).parent


@pytest.fixture
def marker(tmp_path):
    """The file that whatever must not run would write."""
    return tmp_path / "it-ran"


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    preference_rows(6).to_json(file)
    return str(file)


# Code that comes with a model or a data set


def with_code(folder, marker, kind):
    """A copy of a model folder whose configs name a module; of a kind "known" to transformers without it, or not."""
    copy = marker.with_name(f"{kind}-with-code")
    shutil.copytree(folder, copy)
    code = f"open({str(marker)!r}, 'w').close()\nclass C:\n    pass\nclass M:\n    pass\nclass T:\n    pass\n"
    (copy / "its_code.py").write_text(code)
    auto = {"AutoConfig": "its_code.C", "AutoModel": "its_code.M", "AutoModelForCausalLM": "its_code.M"}
    changes = {
        "config.json": {"auto_map": auto},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "its_code.T"]}},
    }
    if kind == "unknown":
        changes["config.json"] |= {"model_type": "its_own", "architectures": ["M"]}
        changes["tokenizer_config.json"] |= {"tokenizer_class": "T"}
    for name, change in changes.items():
        (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | change))
    return str(copy)


def command(name, model, pairs, out):
    of_model = ["--model_name_or_path", model, "--dataset_name", pairs]
    training = [
        *of_model,
        "--output_dir",
        out,
        "--max_steps",
        "1",
        "--max_length",
        "64",
        "--report_to",
        "none",
        "--use_cpu",
    ]
    return {
        "train": ["train", *training],
        "train on dpo": ["train", "--base", "dpo", "--reward", "log-ratio", *training],
        "evaluate": ["evaluate", *of_model, "--bootstrap", "2"],
        "select": ["select", *of_model, "--output_dir", out],
        "anchors": ["anchors", "--checkpoints", model, *of_model[2:], "--output_dir", out, "--noise", "random:0.5"],
        "hessian": ["hessian", *of_model],
        "inspect": ["inspect", *of_model],
        "score": [
            "score",
            "--dataset_name",
            pairs,
            "--metric",
            "bertscore_f1",
            "--encoder",
            model,
            "--num_layers",
            "1",
        ],
    }[name]


@pytest.mark.parametrize(
    "name", ["train", "train on dpo", "evaluate", "select", "anchors", "hessian", "inspect", "score"]
)
def test_a_model_s_own_code_is_refused(name, tiny_model, pairs, marker, tmp_path, monkeypatch):
    if name == "score":
        pytest.importorskip("bert_score")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tiny_model, marker, "unknown")
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        main(command(name, folder, pairs, str(tmp_path / "out")))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_known_model_s_own_code_is_left_alone(name, tiny_model, pairs, marker, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(tiny_model, marker, "known")
    assert main(command(name, folder, pairs, str(tmp_path / "out"))) == 0
    assert not marker.exists()


def test_whoever_asks_for_it_gets_it(tiny_model, pairs, marker, tmp_path, monkeypatch):
    """So the tests above could fail."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = with_code(tiny_model, marker, "unknown")
    with pytest.raises(ValueError, match="register_for_auto_class"):  # it is no real model
        main([*command("evaluate", folder, pairs, ""), "--trust_remote_code"])
    assert marker.exists()


def test_a_data_set_s_script_is_not_run(marker, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"open({str(marker)!r}, 'w').close()")
    preference_rows(3).to_json(folder / "train.jsonl")
    with pytest.raises((RuntimeError, ValueError), match="scripts are no longer supported"):
        load_splits(str(folder))
    assert not marker.exists()


def test_pickles_are_no_data(bomb, tmp_path):
    """Not by a builder of `datasets` either, which a YAML's `datasets` may name."""
    file = tmp_path / "pairs.pkl"
    file.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="a data file is one of"):
        load_splits(str(file))
    config = tmp_path / "pickle.yaml"
    parts = [{"path": "pandas", "data_files": str(file)}]
    config.write_text(
        yaml.safe_dump({"datasets": parts, "model_name_or_path": "m", "output_dir": str(tmp_path / "o")})
    )
    with pytest.raises(ValueError, match="pandas reads pickles"):
        main(["train", "--config", str(config), "--use_cpu"])
    assert not bomb.marker.exists()


def test_a_chat_template_stays_in_its_sandbox(tiny_model):
    from jinja2.exceptions import SecurityError

    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


# Pickles


class Bomb:
    """Whose unpickling writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def bomb(marker):
    return Bomb(marker)


def test_a_bomb_goes_off(bomb):
    """So the tests of checkpoints could fail."""
    pickle.loads(pickle.dumps(bomb)).close()
    assert bomb.marker.exists()


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tokenizer, tmp_path_factory):
    """A folder of checkpoints of a method whose term remembers, and the training that made them."""

    def train(out, resume=None):
        trainer = trainer_class("gamma-po")(
            load(tiny_model),
            config_class("gamma-po")(**quiet(output_dir=str(out), max_steps=2, save_strategy="steps", save_steps=1)),
            train_dataset=preference_rows(8),
            processing_class=tokenizer,
        )
        trainer.train(resume)
        return trainer

    folder = tmp_path_factory.mktemp("checkpoints")
    train(folder)
    return folder, train


@pytest.mark.parametrize("save", ["pickle", "torch"])
@pytest.mark.parametrize(
    "name",
    [
        "margin_terms.safetensors",
        "model.safetensors",
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    ],
)
def test_a_checkpoint_s_pickle_is_refused(name, save, checkpoints, bomb, tmp_path):
    """Ours are no pickles, and those of transformers are read for tensors and plain values alone."""
    folder, train = checkpoints
    out = shutil.copytree(folder, tmp_path / "run")
    drop_digests(out)  # which whoever means harm would write, too
    file = out / "checkpoint-1" / name
    assert file.exists() or name == "pytorch_model.bin"
    if name == "pytorch_model.bin":
        (out / "checkpoint-1" / "model.safetensors").unlink()
    file.write_bytes(pickle.dumps(bomb)) if save == "pickle" else torch.save(bomb, file)
    ours = "its margin_terms.safetensors cannot be read" if name.startswith("margin") else ""
    with pytest.raises((SafetensorError, pickle.UnpicklingError, ValueError), match=ours):
        train(out, str(out / "checkpoint-1"))
    assert not bomb.marker.exists()


def test_nobody_reads_the_arguments_of_a_checkpoint(checkpoints, bomb, tmp_path):
    folder, train = checkpoints
    out = shutil.copytree(folder, tmp_path / "run")
    (out / "checkpoint-1" / "training_args.bin").write_bytes(pickle.dumps(bomb))
    assert train(out, str(out / "checkpoint-1")).state.global_step == 2
    assert not bomb.marker.exists()


@pytest.mark.parametrize("name", ["evaluate", "train"])
def test_a_model_s_pickle_is_refused(name, tiny_model, pairs, bomb, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": bomb}, folder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
        main(command(name, str(folder), pairs, str(tmp_path / "out")))
    assert not bomb.marker.exists()


# What our own code calls


CALLS = {  # dotted name → keyword without which, or None: never
    "eval": None,
    "exec": None,
    "compile": None,
    "__import__": None,
    "os.system": None,
    "os.popen": None,
    "torch.load": None,
    "np.load": None,
    "numpy.load": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "yaml.load": "Loader",
    "yaml.load_all": None,
}
MODULES = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess")
SWITCHES = ("trust_remote_code", "allow_pickle", "shell")  # never True in the code itself


def dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def dangers(source, module=None):
    """What a source does that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {word.arg: word.value for word in node.keywords}
        if name in CALLS and not is_safe_loader(keywords.get(CALLS[name]), module):
            found.append(name)
        found += [f"{word}=True" for word in SWITCHES if ast.dump(keywords.get(word, node)) == "Constant(value=True)"]
        if keywords.get("weights_only") is not None and ast.dump(keywords["weights_only"]) != "Constant(value=True)":
            found.append("weights_only")
    return found


def is_safe_loader(node, module):
    """Of a class, named within the module."""
    name = dotted(node) if node is not None else ""
    return bool(name) and issubclass(getattr(module, name, type), yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import cloudpickle.extra",
        "torch.load(file)",
        "np.load(file)",
        "yaml.load(file)",
        "yaml.load(file, Loader=yaml.UnsafeLoader)",
        "yaml.full_load(file)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "f(model, trust_remote_code=True)",
        "run(text, shell=True)",
        "load(file, weights_only=False)",
        "np.lib.format.read_array(file, allow_pickle=True)",
    ],
)
def test_dangers_are_found(source):
    assert len(dangers(source)) == 1


def test_a_safe_loader_is_no_danger():
    assert dangers("yaml.load(file, Loader=SafeLoader)", yaml) == []
    assert dangers("yaml.load(file, Loader=UnsafeLoader)", yaml) == ["yaml.load"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_runs_nothing_that_it_reads(path):
    source = path.read_text()
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(parts)) if "Loader=" in source else None
    assert dangers(source, module) == []


# YAML


TAGS = (
    '!!python/object/apply:builtins.open ["{marker}", "w"]',
    '!!python/object/new:builtins.open ["{marker}", "w"]',
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
)
PLACES = (
    "beta: {}",
    "{}: 1",
    "datasets:\n  - path: {}",
    "dataset_mixer:\n  me/pairs: {}",
    "dataset_mixture:\n  datasets:\n    - id: {}",
    "model_init_kwargs:\n  - {}",
    "env:\n  X: {}",
)


@pytest.mark.parametrize("argv", [["train", "--config"], ["train", "--dry_run", "--config"], ["convert"]])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tag", TAGS)
def test_a_yaml_file_makes_no_objects(tag, place, argv, marker, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(place.format(tag.format(marker=marker)))
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        main([*argv, str(file)])
    assert not marker.exists()


@pytest.mark.parametrize("name", ["evaluate", "select", "inspect", "score", "demo"])
def test_nor_does_the_config_of_another_command(name, marker, tmp_path):
    """TRL's own parser reads it."""
    file = tmp_path / "c.yaml"
    file.write_text(f"seed: {TAGS[0].format(marker=marker)}")
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        main([name, "--config", str(file)])
    assert not marker.exists()


def bomb_of(levels, width=9):
    """Aliases of aliases: width ** levels values, in a line for each level."""
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (bomb_of(9), "more than 100,000 values"),
        (bomb_of(9).replace("[", "{x: [").replace("]", "]}"), "more than 100,000 values"),
        (
            "\n".join(
                ["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9))]
            ),
            "more than 100,000 values",
        ),
        ("a: &a [*a]", "something that it is part of"),
        ("a: &a {b: {c: *a}}", "something that it is part of"),
    ],
)
def test_aliases_are_counted_before_they_are_written_out(text, problem):
    with pytest.raises(yaml.YAMLError, match=problem):
        yaml.load(text, Loader=ConfigLoader)


@pytest.mark.parametrize("argv", [["train", "--dry_run", "--config"], ["convert"]])
@pytest.mark.parametrize("levels", [6, 9, 40])
def test_a_yaml_bomb_does_not_go_off(levels, argv, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(bomb_of(levels) + f"\nbeta: *a{levels - 1}\n")
    with pytest.raises(yaml.YAMLError, match=r"(?s)more than 100,000 values.*c\.yaml.*, line \d"):
        main([*argv, str(file)])


@pytest.mark.parametrize("text", ["", "a: 1", bomb_of(3), "usual: &usual {beta: 1}\nmine: {<<: *usual, gamma: 2}"])
def test_ordinary_aliases_are_welcome(text):
    yaml.load(text, Loader=ConfigLoader)


# Texts in cards, pages, pictures and tables


EVIL = (
    "](javascript:alert(1)) <script>alert(1)</script><img src=x onerror=alert(1)> | `c`\n---\ninjected: true\n---\n"
    "=cmd|' /C calc'!A0"
)
CANARY = "canary-7f3a"
CARD_KEYS = {
    *(
        "base_model",
        "datasets",
        "library_name",
        "licence",
        "license",
        "model-index",
        "model_name",
        "pipeline_tag",
        "tags",
    ),
}


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def assert_harmless(html, allowed):
    """No script, no handler, and nothing from elsewhere."""
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "svg"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("href", "src"):
            assert attributes.get(name, allowed[0]).startswith(allowed), attributes


@pytest.fixture(scope="module")
def hostile(tiny_model, tokenizer, tmp_path_factory):
    """A run in which every name and text that is somebody's is `EVIL`, and the texts carry a canary."""
    above = tmp_path_factory.mktemp("above")
    out = above / EVIL.replace("/", "∕").replace("\n", " ")
    column = f"../../{EVIL}"
    rows = preference_rows(14, scores=lambda i: (4.0 + i % 3, 1.0)).rename_column("score_chosen", column)
    rows = rows.map(lambda row: {name: f"{CANARY} {EVIL} {row[name]}" for name in ("prompt", "chosen", "rejected")})
    model = load(tiny_model)
    model.config._name_or_path = EVIL
    before = {path for path in above.parent.rglob("*") if above not in path.parents}
    trainer = GapPOTrainer(
        model,
        GapPOConfig(
            **quiet(
                output_dir=str(out),
                max_steps=2,
                max_length=512,
                hub_token="hf_secret",
                run_name=EVIL,
                score_columns=[column, "score_rejected"],
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=False,
            )
        ),
        train_dataset=rows.select(range(8)),
        eval_dataset=dict.fromkeys(("easy", f"../../{EVIL}"), rows.select(range(8, 14))),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "pictures", drawn_pictures)
        patch.setattr(figures, "PICTURES", (figures.ranking, figures.logps))
        trainer.create_model_card(
            model_name=EVIL,
            dataset_name=EVIL,
            eval_dataset_name=EVIL,
            tags=[EVIL],
            reproduce=f"trl-margins train --hub_token hf_secret --run_name '{EVIL}' --hub-token=hf_secret",
        )
        write_report(read_runs([out]), out / "report", "svg")
    after = {path for path in above.parent.rglob("*") if above not in path.parents}
    return out, after - before


@pytest.mark.rehearsal
def test_a_card_s_metadata_are_its_own(hostile):
    text = (hostile[0] / "README.md").read_text()
    assert text.startswith("---\n")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    metadata = yaml.safe_load(front)
    assert metadata.keys() <= CARD_KEYS
    assert "datasets" not in metadata
    assert "base_model" not in metadata
    (index,) = metadata["model-index"]
    assert index["name"] == EVIL
    assert "injected" not in body.split()
    told = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in told.splitlines() if line.startswith(("---", "="))]


def test_a_card_s_text_does_nothing(hostile):
    body = (hostile[0] / "README.md").read_text().split("\n---\n", 1)[1]
    html = markdown.markdown(body, extensions=["tables", "fenced_code"])
    assert_harmless(html, ("https://", "figures/"))
    tables = re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE)
    assert len(tables) >= 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_a_card_tells_no_secret(hostile):
    """Neither what it was trained on word by word, nor the token that a command held."""
    text = (hostile[0] / "README.md").read_text()
    assert CANARY not in text
    assert "--hub_token … --run_name" in text
    kinds = (".md", ".html", ".svg", ".json", ".csv", ".jinja")
    files = [file for file in hostile[0].rglob("*") if file.is_file() and file.suffix in kinds]
    assert {file.suffix for file in files} == set(kinds)
    for file in files:
        assert "hf_secret" not in file.read_text(), file
        assert CANARY not in file.read_text(), file


def test_a_page_does_nothing(hostile):
    html = (hostile[0] / "report" / "report.html").read_text()
    assert_harmless(html, ("data:image/",))
    assert "default-src 'none'" in html


def test_a_picture_does_nothing(hostile):
    drawn = sorted((hostile[0] / "report").glob("*.svg"))
    assert [file.stem for file in drawn] == ["logps", "ranking"]
    for file in drawn:
        for element in ElementTree.parse(file).iter():
            assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "a"), file
            for name, value in element.attrib.items():
                assert not name.startswith("on")
                assert not name.endswith("href") or value.startswith("#"), (name, value)


def test_tables_of_pairs_are_numbers(hostile):
    """No text from data, so no formula for a spreadsheet either."""
    with (hostile[0] / "pair_log.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert all(name.isidentifier() for name in head)
    assert len(rows) == 8
    for row in rows:
        assert [float(cell) for cell in row]


def test_nothing_is_written_elsewhere(hostile):
    out, outside = hostile
    assert outside == set()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    names = {path.name for path in out.rglob("*")}
    assert {"ranking.svg", "logps.png", "report.html", "README.md", "pair_log.csv"} <= names
    assert not [name for name in names if "script" in name]


@pytest.mark.parametrize(
    "numbers",
    [
        {"kind": "listwise", "ndcg@1": EVIL},
        {"kind": "pairs", "pwa": 0.5, "n_pairs": EVIL},
        {"kind": "rm-bench", "total": {}, "domains": {EVIL: {"n_prompts": 1}}},
        {"kind": "pairs", "pwa": 0.5, "intervals": {"pwa": [EVIL, 1.0]}},
    ],
)
def test_numbers_for_a_card_are_numbers(numbers, tmp_path):
    file = tmp_path / "numbers.json"
    file.write_text(json.dumps({"reward": "sum", "min_score_gap": 1, "sets": {EVIL: numbers}}))
    with pytest.raises(ValueError, match=r"was not written by `trl-margins evaluate --json`.*among the numbers"):
        read_report(file)


def test_names_do_nothing_on_a_console(tiny_model, tmp_path, capsys):
    """Nor in the tables that `evaluate` writes."""
    name = "\x1b]0;x\x07<script>|`c`"
    file = tmp_path / f"{name}.jsonl"
    preference_rows(4).add_column(name, [1] * 4).to_json(file)
    assert main(["inspect", str(file)]) == 0
    written = str(tmp_path / "tables.md")
    argv = ["evaluate", "--model_name_or_path", tiny_model, "--dataset_name", str(file), "--bootstrap", "2"]
    assert main([*argv, "--markdown", written]) == 0
    printed = capsys.readouterr().out
    assert "<script>" in printed
    assert "\x1b" not in printed
    assert not set("\x1b<`") & set(Path(written).read_text())


# Paths


@pytest.mark.parametrize("name", ["bundled:../../x", "bundled:/etc/passwd", "bundled:"])
def test_a_bundled_model_is_one_that_we_know(name):
    with pytest.raises(ValueError, match="unknown bundled model"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "../x/y", "a/../../b/c", "*/*/*"])
def test_a_recipe_is_one_that_we_have(name):
    with pytest.raises(ValueError, match="no recipe"):
        recipe_path(name)


def test_evaluation_factors_are_cached_in_the_cache(tmp_path, monkeypatch):
    """Whatever the column, the split and the texts are called."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    file = tmp_path / "pairs.jsonl"
    preference_rows(4).to_json(file)
    rows = pick_split(load_splits(str(file)), None, "pairs")
    column = "../../../outside/<x>"
    first, again = (add_evaluation_factor(rows, column=column) for _ in range(2))
    assert first[column] == again[column]
    assert isinstance(first, Dataset)
    assert [path.name for path in tmp_path.iterdir() if path not in (cache, file)] == []
    files = {Path(part["filename"]) for part in first.cache_files}
    assert files
    assert all(cache.resolve() in file.resolve().parents for file in files)


# The network


OFFLINE = str(Path(__file__).with_name("offline.py"))


@pytest.mark.rehearsal
def test_importing_asks_nobody(tmp_path):
    """The Hub not being offline."""
    left_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    environment = {**kept, "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, OFFLINE, "import"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.rehearsal
def test_training_offline_asks_nobody(tiny_model, tmp_path):
    assert json.loads(output_of(1, OFFLINE, str(tmp_path), tiny_model).splitlines()[-1]) == []
    assert (tmp_path / "run" / "report" / "report.html").exists()
    assert "## Evaluation" in (tmp_path / "run" / "README.md").read_text()


def test_who_asks_is_noted():
    """So the tests above could fail."""
    code = """
        import sys
        sys.path.insert(0, {folder!r})
        import socket, offline
        socket.create_connection = offline.refused("create_connection")
        import urllib.request
        try:
            urllib.request.urlopen("http://127.0.0.1:9")
        except OSError:
            print(len(offline.TRIED))
    """
    code = textwrap.dedent(code).format(folder=str(Path(__file__).parent))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
