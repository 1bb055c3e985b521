"""Recipes: each has exactly its paper's values, each trains, and they are found wherever the package is."""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import preference_rows

from trl_margins.cli import compare, main, train
from trl_margins.cli import recipes as module
from trl_margins.cli.dry_run import resolved
from trl_margins.cli.recipes import recipe_folder, recipe_path, recipes
from trl_margins.cli.train import build_trainer
from trl_margins.methods import METHODS
from trl_margins.registry import get_method
from trl_margins.trainers.configs import MarginOptions

ROOT = Path(__file__).parents[1]
RECIPES = recipes()
NAMES = [recipe.name for recipe in RECIPES]
BASELINES = {id for id, row in METHODS.items() if row.baseline}
OF_BASELINES = [recipe.name for recipe in RECIPES if recipe.method in BASELINES]
PAPERS = {
    "gappo": ["GapPO"],
    "gap-aware": ["GaPO"],
    "gamma-po": ["γ-PO", "γ-DPO"],
    "amapo": ["AMaPO"],
    "geometric-anchor": ["GAPO"],
    "gradient-norm": ["GAPO"],
    "simpo-sam": ["GAPO"],
    **{id: [METHODS[id].name] for id in BASELINES},
}
# config/ and trainers.py of Dr. DPO's code, in the words of today; GAPO's paper refers to its protocol
OF_DR_DPO = {
    **{"learning_rate": 5e-7, "optim": "rmsprop", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 150},
    **{"max_grad_norm": 10.0, "num_train_epochs": 1, "max_length": 512, "seed": 0, "noise": "random:0.2"},
    **{"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1},  # its batch_size is that of a step
}
PROTOCOL = {
    "pythia-2.8b/dpo/full": {**OF_DR_DPO, "beta": 0.1},
    "pythia-2.8b/dr-dpo/full": {**OF_DR_DPO, "beta": 0.1, "dr_dpo_beta_prime": 1.0},
    "pythia-2.8b/geometric-anchor/full": OF_DR_DPO,
}
BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps"}
OBJECTIVE = {*MarginOptions.__dataclass_fields__, "beta", "simpo_gamma", "reward", "loss_type", "cpo_alpha", "alpha"}
# what a paper's recipe may say beside its paper's values
BESIDE = {
    *("model_name_or_path", "dtype", "attn_implementation", "method", "train_only", "seed", "output_dir"),
    *("dataset_name", "dataset_train_split", "dataset_test_split", "score_columns"),
    *("eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_steps", "save_total_limit"),
}


def values_of(flags: list[str], also: str) -> list[list[str]]:
    """A run's flags, and those with the values that its line names as well: "Table E; also 0.075, 0.1"."""
    first, value, *rest = flags
    others = [other for part in re.findall(r"also ([^;]+)", also) for other in part.split(", ")]
    kind = value.partition(":")[0] + ":" if ":" in value else ""  # of --noise length:0.2
    return [flags, *([first, kind + other, *rest] for other in others)]


class Head(NamedTuple):
    """What the comments above the settings say."""

    paper: str
    table: str
    model: str  # as `Method.settings` spells it
    command: list[str]
    runs: list[list[str]]  # flags of the paper's other runs

    @property
    def devices(self) -> int:
        """Of the command."""
        if "--num_processes" in self.command:
            return int(self.command[self.command.index("--num_processes") + 1])
        if "--config_file" not in self.command:
            return 1
        file = ROOT / self.command[self.command.index("--config_file") + 1]
        return yaml.safe_load(file.read_text(encoding="utf-8"))["num_processes"]


def head(name: str) -> Head:
    text = recipe_path(name).read_text(encoding="utf-8")
    comments = [line.removeprefix("#") for line in text[: text.index("\n\n")].splitlines()]
    first = re.fullmatch(r" ([^,]+), ([^,]+), ([^,]+), .+\.", comments[0])
    assert first, comments[0]
    joined = "\n".join(comments[1:]).replace("\\\n", "")
    command = next(line for line in joined.splitlines() if "--recipe" in line)
    lines = [line.removeprefix("   ").partition("  ") for line in comments if line.startswith("   --")]
    runs = [run for flags, _, also in lines for run in values_of(flags.split(), also)]
    return Head(*first.groups(), shlex.split(command), runs)


@cache
def parse(name: str, *flags: str) -> tuple[Any, ...]:
    return train.parse(["--config", str(recipe_path(name)), *flags])


@cache
def written(name: str) -> dict[str, Any]:
    return yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))


def is_quick(name: str) -> bool:
    return head(name).table == "quick"


def paper_values(name: str) -> dict[str, Any]:
    """The registry's, for the model that the recipe's first line names."""
    method = get_method(written(name)["method"])
    without = method.baseline and head(name).model not in method.settings
    return {**method.defaults, **(PROTOCOL.get(name) or ({} if without else method.settings[head(name).model]))}


@pytest.mark.parametrize("name", [name for name in NAMES if not is_quick(name)])
def test_a_paper_s_recipe_has_exactly_its_values(name):
    """Written down, not left to defaults; and no other value that changes what is trained."""
    script, config, model, _ = parse(name)
    said, expected = written(name), paper_values(name)
    values = {**vars(script), **vars(config)}
    pairs_a_step = math.prod(expected.pop(key) for key in BATCH)
    assert math.prod(said[key] for key in BATCH) * head(name).devices == pairs_a_step
    assert {key: said[key] for key in expected} == expected
    assert {key: values[key] for key in expected} == expected
    others = said.keys() - expected.keys() - BATCH - BESIDE
    is_gamma_dpo = head(name).paper == "γ-DPO"
    allowed = {"base", "reward"} if is_gamma_dpo else set()
    if is_gamma_dpo:  # Table 7 does not say that it is meant
        assert said["reward"] == "mean-log-ratio"
        assert "is a guess: the published configurations with these numbers are γ-SimPO's" in recipe_path(
            name
        ).read_text(encoding="utf-8")
    assert others <= allowed
    assert model.dtype == "float32"
    assert config.seed == expected.get("seed", 42)


def test_supervised_fine_tuning_before_table_b():
    """TRL's own parser takes it, with the same protocol, and the recipes begin with the model that it writes."""
    from trl.scripts.sft import make_parser

    file = recipe_folder() / "pythia-2.8b" / "sft.yaml"
    _, config, model, _ = make_parser().parse_args_and_config(["--config", str(file), "--use_cpu", "true"])
    pairs_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    same = OF_DR_DPO.keys() - BATCH - {"noise"}
    assert pairs_a_step == 64
    assert {key: getattr(config, key) for key in same} == {key: OF_DR_DPO[key] for key in same}
    assert (model.model_name_or_path, model.dtype) == ("EleutherAI/pythia-2.8b", "float32")
    assert {written(name)["model_name_or_path"] for name in PROTOCOL} == {config.output_dir}


def test_table_b_compares_what_its_recipes_train():
    methods = [name.split("/")[1] for name in PROTOCOL]
    comparison, _ = compare.plan(["--recipe", "pythia-2.8b/dpo", "--methods", *methods])
    for entry, name in zip(comparison.entries, PROTOCOL, strict=True):
        alone = yaml.safe_load(resolved(*parse(name)))
        differ = {key for key in {**entry.settings, **alone} if entry.settings.get(key) != alone.get(key)}
        assert differ <= {"output_dir"}


@pytest.mark.parametrize("name", [name for name in NAMES if is_quick(name)])
def test_a_quick_recipe_keeps_the_method(name):
    script, config, _, _ = parse(name)
    defaults = get_method(script.method).defaults
    of_method = {key: value for key, value in defaults.items() if key in OBJECTIVE}
    assert {key: getattr(config, key) for key in of_method} == of_method
    assert written(name).keys() & OBJECTIVE <= defaults.keys() | {"train_only"}
    assert config.max_steps > 0


def test_every_setting_of_every_paper_has_its_recipe():
    there = {(written(name)["method"], head(name).model, name.split("/")[2]) for name in NAMES}
    for method in METHODS.values():
        variants = ("full", "mlp") if method.id == "gappo" else ("full",)
        assert method.settings or method.baseline
        assert {(method.id, model, variant) for model in method.settings for variant in variants} <= there
    gamma_dpo = {head(name).model for name in NAMES if head(name).paper == "γ-DPO"}
    assert gamma_dpo == METHODS["gamma-po"].settings.keys()


def test_baselines_differ_from_the_five_methods_in_nothing_but_the_objective():
    """Model, data, budget and rule for checkpoints are the same; the three that read scores have a set with scores."""
    own = written("llama-3-8b-instruct/amapo/full")
    there = [written(name) for name in OF_BASELINES if name.startswith("llama-3-8b-instruct/")]
    assert {recipe["method"] for recipe in there} == BASELINES
    for recipe in there:
        different = {key for key in BESIDE | BATCH | {"num_train_epochs"} if recipe.get(key) != own.get(key)}
        reads_scores = recipe["method"] in ("odpo", "madpo", "reward-aware-po")
        assert different == {"method", "output_dir", *(("dataset_name", "score_columns") if reads_scores else ())}


@pytest.mark.parametrize("name", NAMES)
def test_the_head_says_what_follows(name):
    script, config, model, _ = parse(name)
    comments = head(name)
    folder, method, variant = name.split("/")
    assert comments.paper in PAPERS[script.method]
    assert method == ("gamma-dpo" if (script.method, script.base) == ("gamma-po", "dpo") else script.method)
    assert script.base == ("dpo" if comments.paper == "γ-DPO" else METHODS[script.method].bases[0])
    assert recipe_path(comments.command[comments.command.index("--recipe") + 1]) == recipe_path(name)
    assert (variant == "mlp", variant == "lora") == (config.train_only == ["mlp"], model.use_peft)
    assert config.output_dir == f"data/{folder}-{method}-{variant}"
    if "--config_file" in comments.command:
        assert (ROOT / comments.command[comments.command.index("--config_file") + 1]).is_file()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    preference_rows(8, "conversational").save_to_disk(folder)
    return str(folder)


def small(model: str, pairs: str, out: Path, max_steps: int = 2) -> list[str]:
    """Flags that make a recipe's run a small one."""
    instead = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "dataset_train_split": "train",
        "output_dir": out,
        "max_steps": max_steps,
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        **dict.fromkeys(("log_pairs", "gradient_checkpointing", "bf16"), False),
        **dict.fromkeys(("use_cpu", "disable_tqdm"), True),
    }
    return [str(part) for key, value in instead.items() for part in (f"--{key}", value)]


OTHER_RUNS = [(name, flags) for name in NAMES for flags in head(name).runs]


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    ("name", "flags"), OTHER_RUNS, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_another_run_of_the_paper_trains(name, flags, tiny_model, pairs, tmp_path):
    """Its flags after the recipe, as the comment says: each changes something, and a step is taken."""
    plain, changed = (
        {key: value for part in parse(name, *more) for key, value in vars(part).items()} for more in ([], flags)
    )
    for flag in (flag[2:] for flag in flags if flag.startswith("--")):
        assert changed[flag] != plain[flag]
    if any(word.startswith("bertscore") for word in flags):
        pytest.importorskip("bert_score")
    standing_in = [tiny_model if word == "roberta-large" else word for word in flags]
    trainer = build_trainer(*parse(name, *small(tiny_model, pairs, tmp_path, max_steps=1), *standing_in))
    assert math.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_runs_dry(name, capsys):
    """As the recipe prints it, from "train" on."""
    words = head(name).command
    assert main([*words[words.index("train") :], "--dry_run"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["method"], shown["output_dir"]) == (written(name)["method"], written(name)["output_dir"])


@pytest.mark.rehearsal
@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_BASELINES])
def test_a_recipe_trains(name, tiny_model, pairs, tmp_path):
    """Two steps of a stand-in: the recipe's objective is at work, and what trains is what its variant says. That each
    baseline trains, `test_methods.py` shows.
    """
    trainer = build_trainer(*parse(name, *small(tiny_model, pairs, tmp_path)))
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2]
    assert all(math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]) for log in logs)
    method = get_method(written(name)["method"])
    assert ("weights/mean" in logs[0], "target_margins/mean" in logs[0]) == (bool(method.weight), bool(method.margin))
    assert ("is_flipped" in trainer.train_dataset.column_names) == ("noise" in written(name))
    moved = {key for key, value in trainer.model.named_parameters() if not value.equal(before[key])}
    part = {"full": "", "mlp": r"\.mlp\.", "lora": r"\.lora_[AB]\."}[name.split("/")[2]]
    assert moved
    assert moved <= {key for key, value in trainer.model.named_parameters() if value.requires_grad}
    assert {key for key, value in trainer.model.named_parameters() if value.requires_grad} == {
        key for key in before if re.search(part, key)
    }


def test_the_command_lists_them(capsys):
    assert main(["recipes"]) == 0
    titles, *rows, empty, where = capsys.readouterr().out.splitlines()
    assert titles.split() == ["name", "method", "model", "data", "paper", "table"]
    assert [row.split()[0] for row in rows] == NAMES == sorted(NAMES)
    line = next(row for row in rows if row.startswith("gemma-2-9b-it/gamma-dpo/full"))
    cells = [
        "gemma-2-9b-it/gamma-dpo/full",
        "gamma-po",
        "google/gemma-2-9b-it",
        "princeton-nlp/gemma2-ultrafeedback-armorm",
        "γ-DPO",
        "Table 3",
    ]
    assert re.split(r"  +", line) == cells
    assert not empty
    assert where.endswith(str(recipe_folder()))


def test_names():
    full = recipe_folder() / "llama-3-8b-instruct" / "amapo" / "config_full.yaml"
    assert recipe_path("llama-3-8b-instruct/amapo") == recipe_path("llama-3-8b-instruct/amapo/full") == full
    assert recipe_path("qwen2.5-0.5b-instruct/gappo/mlp").name == "config_mlp.yaml"
    assert all(recipe_path(name).is_file() for name in NAMES)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen2.5-0.5b-instruct/amapo", "the nearest are qwen2.5-0.5b-instruct/amapo/lora;"),
        ("Llama-3-8B-Instruct/AMaPO", "the nearest are llama-3-8b-instruct/amapo/full,"),
        ("mistral-7b/gradnorm", "the nearest are .*mistral-7b-instruct/gradient-norm/full"),
        ("zzz", r"no recipe 'zzz'; `trl-margins recipes` lists all \d+"),
        ("accelerate_configs/zero3", "no recipe 'accelerate_configs/zero3'"),
        ("../recipes/llama-3-8b-instruct/amapo", "no recipe"),
        ("", "no recipe ''"),
    ],
)
def test_an_unknown_name_says_the_nearest(name, hint):
    with pytest.raises(ValueError, match=hint):
        recipe_path(name)


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    """As the wheel lays them out; a clone has them beside the package."""
    assert recipe_folder() == ROOT / "recipes"
    package = tmp_path / "trl_margins"
    monkeypatch.setattr(module, "__file__", str(package / "cli" / "recipes.py"))
    assert recipe_folder() == tmp_path / "recipes"
    assert recipes() == []
    inside = package / "recipes" / "a-model" / "gappo" / "config_mlp.yaml"
    inside.parent.mkdir(parents=True)
    inside.write_text("# GapPO, quick, A, b.\n\nmethod: gappo\nmodel_name_or_path: a\ndataset_name: d")
    assert recipe_path("a-model/gappo/mlp") == inside
    assert [recipe.name for recipe in recipes()] == ["a-model/gappo/mlp"]


def test_the_wheel_takes_them_along():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["include"] == ["/trl_margins", "/recipes/**/*.yaml"]
    assert wheel["sources"] == {"recipes": "trl_margins/recipes"}


@pytest.mark.parametrize(
    ("name", "kind", "section", "options"),
    [
        ("ddp", "MULTI_GPU", None, {}),
        ("fsdp2", "FSDP", "fsdp_config", {"fsdp_version": 2, "fsdp_reshard_after_forward": True}),
        ("zero3", "DEEPSPEED", "deepspeed_config", {"zero_stage": 3, "zero3_init_flag": True}),
    ],
)
def test_accelerate_reads_its_configurations(name, kind, section, options):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(recipe_folder() / "accelerate_configs" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert (config.num_machines, config.num_processes) == (1, 8)
    assert config.mixed_precision == "no"  # the recipe's word counts
    sections = {key for key, value in vars(config).items() if isinstance(value, dict) and value}
    assert sections == ({section} if section else set())
    if section:
        found = getattr(config, section)
        assert found.items() >= options.items()
        # accelerate's loader takes any key of a section; only those that its launcher knows do anything
        assert found.keys() <= vars(launch_command_parser().parse_args(["script.py"])).keys()
