"""The best checkpoint: it is saved, loaded and delivered, and all that is said of the model is said of it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import load, preference_rows, quiet, rest_rehearsed
from datasets import DatasetDict
from transformers import TrainerCallback, TrainerControl
from transformers.integrations import integration_utils

from trl_margins import GapPOConfig, MarginCPOTrainer
from trl_margins.cli import main
from trl_margins.cli.recipes import recipes
from trl_margins.trainers.best import EvaluateLast
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

GAPPO = [recipe.name for recipe in recipes() if "/gappo/" in recipe.name and recipe.table == "Table 1"]
ROWS, EVALS = preference_rows(32), preference_rows(24, seed=1, scores=lambda i: (6.0, 1.0 + i % 5))
UNSCORED = EVALS.remove_columns(["score_chosen", "score_rejected"])
PLAIN = {"method": None, "load_best_model_at_end": True, "metric_for_best_model": "eval_pwa"}
NEAR = preference_rows(8, seed=2, scores=lambda i: (0.9, i / 10))  # on [0, 1]: no pair reaches τ = 2


class Tracker(TrainerCallback):
    """As TensorBoard's callback and others: what is logged after the end of a run opens another."""

    runs: list[list[tuple[str, int]]]  # transformers makes the tracker: what it saw is its class's
    is_open = False

    def open(self) -> None:
        if not self.is_open:
            self.is_open = True
            self.runs.append([])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.open()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.open()
        self.runs[-1] += [(name, state.global_step) for name in logs if name.startswith("eval_")]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_open = False


class Snapshots(TrainerCallback):
    """The weights at each evaluation."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at[state.global_step] = {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture
def tracker(monkeypatch) -> type[Tracker]:
    """What `report_to: tensorboard` reports to."""
    monkeypatch.setattr(Tracker, "runs", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    return Tracker


def curve(history: Any, name: str = "eval_pwa") -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in history if name in entry}


def peak(values: dict[int, float], greater: bool = True) -> int:
    """The first step with the best value."""
    return (max if greater else min)(values, key=values.__getitem__)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    splits = {
        "train_prefs": preference_rows(64, "conversational"),
        "test_prefs": preference_rows(40, "conversational", seed=1),
    }
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def test_six_recipes_of_the_paper():
    assert len(GAPPO) == 6


@pytest.mark.rehearsal
@pytest.mark.parametrize("name", GAPPO)
def test_a_recipe_delivers_its_peak(name, tiny_model, pairs, tmp_path, tracker, capsys):
    """Evaluated five times as often as saved, as in the recipe; the peak comes before the end and is not on a save."""
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    flags = {"model_name_or_path": tiny_model, "dataset_name": pairs, "output_dir": out, "max_length": 128}
    flags |= {"max_steps": 9, "eval_steps": 1, "save_steps": 5, "learning_rate": 0.03}
    flags |= {"lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    flags |= {"report_to": "tensorboard", "use_cpu": True}
    argv = ["train", "--recipe", name, *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]
    assert main(argv) == 0
    screen = capsys.readouterr().out
    state = json.loads((out / "trainer_state.json").read_text())
    values = curve(state["log_history"])
    best = peak(values)
    assert list(values) == list(range(1, 10))
    assert best < 9
    assert best % 5, "the peak must not be where a checkpoint is saved anyway"
    assert state["best_global_step"] == best
    argv = ["evaluate", "--model_name_or_path", str(out), "--dataset_name", pairs, "--dataset_split", "test_prefs"]
    assert main([*argv, "--json", str(numbers), "--bootstrap", "10"]) == 0
    ((_, measured),) = json.loads(numbers.read_text())["sets"].items()
    results = json.loads((out / "eval_results.json").read_text())
    assert measured["pwa"] == results["eval_pwa"] == values[best] == max(values.values())
    assert measured["pwa_all"] == pytest.approx(results["eval_pwa_all"])
    assert measured["spearman"] == pytest.approx(results["eval_spearman"])
    assert results["step"] == best
    assert (
        f"kept    the model of step {best} of 9, the best by eval_pwa: {values[best]:.4f}\nsaved   {out}\n" in screen
    )
    card = (out / "README.md").read_text()
    assert f"The model is that of step {best} of 9, the best by `eval_pwa`" in card
    assert re.search(rf"\| evaluation pairs +\| +{values[best]:.4f} \|.* {best} \|", card)
    (run,) = tracker.runs  # one, in which no number is there twice
    assert len(run) == len(set(run))
    assert {step for name, step in run if name == "eval_pwa"} == set(values)


def run(folder: str, tokenizer: Any, out: Any, method: str | None = "gappo", base: str = "cpo", **options: Any) -> Any:
    """A trainer after training, and the weights at each of its evaluations."""
    evals = options.pop("evals", EVALS)
    resume = options.pop("resume", None)
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 7, "learning_rate": 0.03, **options}
    options = {"per_device_eval_batch_size": 12, **options}
    config = config_class(method, base)(
        **quiet(
            output_dir=str(out), lr_scheduler_type="constant", save_strategy=options.pop("save", "steps"), **options
        )
    )
    cls = trainer_class(method, base)
    trainer = cls(load(folder), args=config, train_dataset=ROWS, eval_dataset=evals, processing_class=tokenizer)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train(resume)
    return trainer, snapshots.at


def assert_delivers(trainer: Any, weights: dict[int, dict[str, torch.Tensor]], best: int) -> None:
    """The model is that of this step, by its weights; what is evaluated now is logged there."""
    assert trainer.loaded_step == best
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, weights[best][name]), name
    before = trainer.loaded_metrics
    again = trainer.evaluate()
    assert trainer.state.log_history[-1]["step"] == best
    assert trainer.state.global_step == trainer.args.max_steps
    key = trainer.args.metric_for_best_model
    assert again[key if key.startswith("eval_") else f"eval_{key}"] == trainer.state.best_metric
    assert {key: value for key, value in before.items() if "pwa" in key} == {
        key: value for key, value in again.items() if "pwa" in key
    }


PEAKS: list[dict[str, Any]] = [
    {"save_steps": 3},
    {"save_steps": 3, "load_best_model_at_end": True},
    {"save_steps": 3, "save_total_limit": 1},
    {"eval_steps": 2, "save_steps": 3},  # no multiple, which transformers refuses
    {"eval_steps": 0.15, "save_steps": 0.6},
    {"eval_steps": 0.15, "save_steps": 3, "save_total_limit": 1},
    {"save": "epoch"},
    {"save": "no"},
    {"save": "best"},
    {"eval_strategy": "epoch", "save_steps": 3, "per_device_train_batch_size": 16},
    {"eval_strategy": "epoch", "save": "epoch", "per_device_train_batch_size": 16, "save_total_limit": 1},
    {"eval_on_start": True, "eval_delay": 3, "save_steps": 2},
    {"metric_for_best_model": "loss", "save_steps": 3},
    {"metric_for_best_model": "eval_spearman", "save_steps": 4},
    {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": False, "save_steps": 3},
    {"method": None, "load_best_model_at_end": True, "save_steps": 3},
    {"method": "amapo", "base": "dpo", "load_best_model_at_end": True, "metric_for_best_model": "pwa_all"},
    {"evals": {"first": UNSCORED, "second": EVALS}, **PLAIN, "save_steps": 3},
    {"evals": {"first": NEAR, "second": NEAR}, "save_steps": 3},
    {"evals": {"first": NEAR, "second": EVALS}, "metric_for_best_model": "eval_first_loss", "save_steps": 3},
    {"evals": {"first": NEAR, "second": EVALS}, "method": None, "load_best_model_at_end": True},
    {"evals": UNSCORED, **PLAIN, "save_steps": 3},
    {"evals": UNSCORED, "save_steps": 3},
    {"evals": {"first": UNSCORED, "second": EVALS}, "save_steps": 3},
    {"evals": NEAR, "save_steps": 3},
    {"evals": NEAR.to_iterable_dataset(), "save_steps": 3},
    {"evals": {"first": UNSCORED.to_iterable_dataset(), "second": EVALS.to_iterable_dataset()}, **PLAIN},
    {"evals": EVALS, "score_columns": ["score_chosen"], "method": None, "load_best_model_at_end": True},
]


@pytest.mark.parametrize("options", rest_rehearsed(PEAKS, 10), ids=str)
def test_the_peak_is_delivered(options, tiny_model, tokenizer, tmp_path):
    trainer, weights = run(tiny_model, tokenizer, tmp_path, **options)
    config = trainer.args
    key = config.metric_for_best_model
    values = curve(trainer.state.log_history, key if key.startswith("eval_") else f"eval_{key}")
    values.pop(0, None)
    assert len(set(values.values())) > 1, "there must be something to choose from"
    best = peak(values, config.greater_is_better)
    assert config.greater_is_better == (not key.endswith("loss") and "margins" not in key)
    assert_delivers(trainer, weights, best)
    left = sorted(int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*"))
    assert best in left
    if config.save_total_limit == 1:
        assert left == [best]


TWO = {"a": EVALS, "b": NEAR}


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_each_set_has_its_own_means_of_batches(base, tiny_model, tokenizer, tmp_path):
    """As an evaluation of that set alone, whatever `predict` has left before it."""
    method = "gappo" if base == "cpo" else "amapo"

    def trainer(evals: Any) -> Any:
        config = config_class(method, base)(**quiet(output_dir=str(tmp_path)))
        return trainer_class(method, base)(
            load(tiny_model), args=config, train_dataset=ROWS, eval_dataset=evals, processing_class=tokenizer
        )

    both = trainer(TWO)
    both.predict(ROWS)
    found = both.evaluate()
    for name, rows in TWO.items():
        alone = trainer(rows).evaluate()
        timed = ("time", "per_second", "num_tokens")
        means = {key: value for key, value in alone.items() if not key.endswith(timed) and key != "epoch"}
        assert "eval_rewards/margins" in means
        for key, value in means.items():
            assert found[key.replace("eval_", f"eval_{name}_", 1)] == pytest.approx(value, abs=1e-6), key
    assert not [key for key in found if key.startswith(("eval_rewards", "eval_logps"))]


@pytest.mark.parametrize(
    ("evals", "options", "metric", "says"),
    [
        (EVALS, {}, "eval_pwa", ""),
        (EVALS, {"load_best_model_at_end": True}, "eval_pwa", ""),
        (EVALS, {"save": "best", "load_best_model_at_end": False}, "eval_pwa", ""),
        (EVALS, {"method": None, "load_best_model_at_end": True}, "loss", ""),
        (NEAR, {}, "eval_pwa_all", "eval_min_score_gap=2: the best checkpoint is chosen by eval_pwa_all"),
        (NEAR, {"eval_min_score_gap": 0.5}, "eval_pwa", ""),
        (NEAR, {"metric_for_best_model": "pwa"}, "eval_pwa_all", "the best checkpoint is chosen by eval_pwa_all"),
        (UNSCORED, PLAIN, "eval_pwa_all", "the evaluation set has no pair for eval_pwa"),
        (UNSCORED, {}, "eval_pwa_all", "the eval data set has no scores, which 'score-gap' needs"),
        (UNSCORED, {"score_columns": ["score_chosen", "score_rejected"]}, "eval_pwa_all", "has no scores, which"),
        (UNSCORED.to_iterable_dataset(), PLAIN, "eval_pwa_all", "the evaluation set has no pair for eval_pwa"),
        ({"a": UNSCORED, "b": EVALS}, PLAIN, "eval_b_pwa", "several evaluation sets"),
        ({"a": NEAR, "b": UNSCORED}, PLAIN, "eval_a_pwa_all", "the evaluation set 'a' has no pair for eval_a_pwa"),
        ({"pwa": EVALS, "b": EVALS}, {}, "eval_pwa_pwa", "several evaluation sets"),
        ({"a": EVALS}, {"metric_for_best_model": "a_loss"}, "a_loss", ""),
        ({"a": EVALS}, {"metric_for_best_model": "loss"}, "eval_a_loss", "several evaluation sets"),
        (EVALS, {"metric_for_best_model": "eval_rewards/margins"}, "eval_rewards/margins", ""),
        (TWO, {"metric_for_best_model": "rewards/margins"}, "eval_a_rewards/margins", "several evaluation sets"),
        (TWO, {"metric_for_best_model": "eval_b_rewards/margins"}, "eval_b_rewards/margins", ""),
        (TWO, {"metric_for_best_model": "nll_loss"}, "eval_a_nll_loss", "several evaluation sets"),
        (TWO, {"metric_for_best_model": "eval_c_nll_loss"}, None, "'eval_c_nll_loss': no evaluation will have it"),
        (
            TWO,
            {"metric_for_best_model": "eval_a_rewards/marginz"},
            None,
            "'eval_a_rewards/marginz'.*a_rewards/margins",
        ),
        (UNSCORED, PLAIN | {"metric_for_best_model": "spearman"}, None, "has no scores.*or choose by eval_pwa_all"),
        (EVALS, {"metric_for_best_model": "eval_c_pwa"}, None, "no evaluation will have it.*eval_loss, eval_pwa,"),
        (EVALS, {"metric_for_best_model": "eval_pwaa"}, None, "no evaluation will have it"),
        (EVALS, {"metric_for_best_model": "nope"}, None, "'nope': no evaluation will have it"),
        (EVALS, {"metric_for_best_model": "grad_norm"}, None, "'grad_norm': no evaluation will have it"),
        (EVALS, {"metric_for_best_model": "runtime"}, "runtime", ""),
        (EVALS, {"metric_for_best_model": "weights/mean"}, "weights/mean", ""),
        (EVALS, {"metric_for_best_model": "weights/mode"}, None, "no evaluation will have it.*eval_weights/mean, "),
        (EVALS, {"metric_for_best_model": "anchor/gap/mean"}, None, "no evaluation will have it.*eval_loss, "),
        (EVALS, PLAIN | {"metric_for_best_model": "weights/mean"}, None, "no evaluation will have it.*eval_loss, "),
        (EVALS, {"method": "amapo", "metric_for_best_model": "weights/mean"}, None, "no evaluation will have it"),
        (EVALS, {"method": "amapo", "metric_for_best_model": "target_margins/std"}, "target_margins/std", ""),
        (UNSCORED, {"metric_for_best_model": "weights/mean"}, None, "no evaluation will have it"),
        ({"a": EVALS, "b": NEAR}, {"metric_for_best_model": "eval_c_pwa"}, None, "eval_a_pwa, .*eval_b_pwa, "),
        (EVALS, {"load_best_model_at_end": True, "eval_strategy": "no"}, None, "nothing is evaluated"),
        (EVALS, {"save": "best", "eval_strategy": "no", "load_best_model_at_end": None}, None, "nothing is evaluated"),
    ],
    ids=str,
)
def test_what_it_is_chosen_by_is_said_before_training(
    evals, options, metric, says, tiny_model, tokenizer, tmp_path, caplog
):
    method, save = options.get("method", "gappo"), options.get("save", "steps")
    settings = {key: value for key, value in options.items() if key not in ("method", "save")}
    settings = {"eval_strategy": "steps", "max_steps": 1, **settings}

    def trainer() -> Any:
        config = config_class(method)(**quiet(output_dir=str(tmp_path), save_strategy=save, **settings))
        return trainer_class(method, "cpo")(
            load(tiny_model), args=config, train_dataset=ROWS, eval_dataset=evals, processing_class=tokenizer
        )

    if metric is None:
        with pytest.raises(ValueError, match=says):
            trainer()
        return
    with caplog.at_level(logging.INFO, "trl_margins"):
        assert trainer().args.metric_for_best_model == metric
    assert says in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"eval_steps": 100},
            "saved every 500 steps, evaluated every 100 steps; each that is the best so far is saved",
        ),
        ({"eval_steps": 0.1}, "saved every 500 steps, evaluated every 0.1 of all steps"),
        ({"eval_steps": 100, "save_strategy": "epoch"}, "saved every epoch, evaluated every 100 steps"),
        ({"eval_steps": 100, "save_strategy": "no"}, "save_strategy 'no' becomes 'best'"),
        ({"eval_steps": 100, "save_strategy": "best"}, ""),
        ({"eval_steps": 500}, ""),
        ({"eval_steps": 100, "load_best_model_at_end": False}, ""),
    ],
    ids=str,
)
def test_what_is_saved_is_said(options, says, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trl_margins"):
        config = GapPOConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", **options)
    assert says in caplog.text
    assert bool(caplog.text) == bool(says)
    assert config.save_steps == 500  # the user's stays


def test_a_resumed_run_goes_on_from_its_best(tiny_model, tokenizer, tmp_path):
    """The peak was in the first part, and the folder is a copy: what becomes of the other is none of its business."""
    first, weights = run(tiny_model, tokenizer, tmp_path / "whole", save_steps=3)
    best = first.state.best_global_step
    stop = next(step for step in (3, 6) if step > best)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    resume = str(tmp_path / "moved" / f"checkpoint-{stop}")
    again, _ = run(tiny_model, tokenizer, tmp_path / "moved", save_steps=3, resume=resume)
    assert_delivers(again, weights, best)
    assert again.state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{best}")


@pytest.mark.parametrize(
    ("damage", "metric", "why"),
    [
        (shutil.rmtree, "eval_pwa", "is gone"),
        (lambda best: (best / "optimizer.pt").unlink(), "eval_pwa", "is incomplete (its optimizer.pt is missing"),
        (lambda best: None, "eval_loss", "was not chosen by eval_loss"),
        (lambda best: None, "eval_pwa", "was chosen by other evaluation rows"),
    ],
)
def test_a_best_that_does_not_count_any_more(damage, metric, why, tiny_model, tokenizer, tmp_path, caplog):
    """Its checkpoint was deleted or damaged, or chosen by another metric: the best is among those that follow."""
    first, _ = run(tiny_model, tokenizer, tmp_path, save_steps=3)
    best = first.state.best_global_step
    stop = next(step for step in (3, 6) if step > best)
    damage(tmp_path / f"checkpoint-{best}")
    options = {"save_steps": 3, "resume": str(tmp_path / f"checkpoint-{stop}"), "metric_for_best_model": metric}
    if "other evaluation rows" in why:
        options["evals"] = EVALS.select(range(1, len(EVALS)))
    with caplog.at_level(logging.WARNING, "trl_margins"):
        trainer, weights = run(tiny_model, tokenizer, tmp_path, **options)
    assert f"the best checkpoint so far, of step {best}, {why}" in caplog.text
    later = {step: value for step, value in curve(trainer.state.log_history, metric).items() if step > stop}
    assert_delivers(trainer, weights, peak(later, greater=metric == "eval_pwa"))


LAST_EVALUATIONS: list[tuple[list[str], int | None]] = [
    (["--metric_for_best_model", "rewards/chosen"], 4),  # evaluated at the end, although no strategy says so
    (["--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end", "false"], 4),
    (["--eval_strategy", "steps", "--eval_steps", "1"], None),
    (["--eval_strategy", "steps", "--eval_steps", "2", "--eval_delay", "20"], 4),  # none is due
    (["--eval_strategy", "epoch", "--load_best_model_at_end", "false"], 4),
    (["--method", "none", "--eval_strategy", "steps", "--eval_steps", "1"], 4),
    (["--eval_strategy", "epoch", "--eval_delay", "2"], 4),
    (["--eval_strategy", "steps", "--eval_steps", "50"], 4),
]


@pytest.mark.parametrize(("flags", "step"), rest_rehearsed(LAST_EVALUATIONS, 4), ids=str)
def test_one_tracker_run_and_no_number_twice(flags, step, tiny_model, pairs, tmp_path, tracker, capsys, monkeypatch):
    out, loops = tmp_path / "out", []
    counted = MarginCPOTrainer.evaluation_loop
    monkeypatch.setattr(MarginCPOTrainer, "evaluation_loop", lambda *a, **k: loops.append(1) or counted(*a, **k))
    argv = ["train", "--model_name_or_path", tiny_model, "--dataset_name", pairs, "--eval_dataset_name", pairs]
    argv += ["--dataset_train_split", "train_prefs", "--dataset_test_split", "test_prefs", "--output_dir", str(out)]
    argv += ["--max_steps", "4", "--learning_rate", "0.03", "--lr_scheduler_type", "constant", "--max_length", "128"]
    argv += ["--use_cpu", "true", "--report_to", "tensorboard", "--disable_tqdm", "true", "--bf16", "false"]
    assert main([*argv, "--gradient_accumulation_steps", "1", *flags]) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    values = curve(history)
    loaded = peak(values) if step is None else step
    results = json.loads((out / "eval_results.json").read_text())
    assert (results["step"], results["eval_pwa"]) == (loaded, values[loaded])
    assert len(loops) == len(values)
    (run,) = tracker.runs
    assert len(run) == len(set(run)) > 0
    assert f"the model of step {loaded}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"eval_steps": 2, "eval_delay": 20}, True, True),
        ({"eval_strategy": "epoch", "eval_delay": 2, "num_train_epochs": 1}, True, True),
        ({"eval_steps": 2, "eval_delay": 4}, False, False),
        ({"eval_steps": 2, "eval_delay": 20, "eval_on_start": True}, False, False),
        ({"eval_steps": 50}, False, False),  # transformers evaluates the last step
        ({"eval_steps": 2, "eval_delay": 20, "load_best_model_at_end": False}, False, False),
    ],
    ids=str,
)
def test_without_an_evaluation_no_best_is_promised(options, before, after, tiny_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        trainer, weights = run(tiny_model, tokenizer, tmp_path, max_steps=4, **options)
    is_evaluated = any("eval_loss" in entry for entry in trainer.state.log_history)
    assert is_evaluated == bool(weights)
    assert is_evaluated == (not after and options.get("load_best_model_at_end") is not False)
    assert ("no evaluation will happen before it ends" in caplog.text) == before
    assert ("training ended at step 4 without an evaluation" in caplog.text) == after
    assert trainer.loaded_step == (4 if options == {"eval_steps": 50} else trainer.state.best_global_step)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("step", [3, 4])
def test_the_last_step_is_evaluated_where_nothing_else_was(strategy, evaluated, step):
    """By steps and by epochs where no evaluation was due; without a strategy always."""
    args, log = SimpleNamespace(eval_strategy=strategy), [{"loss": 1.0}, *([{"eval_loss": 1.0}] if evaluated else [])]
    state, found = SimpleNamespace(global_step=step, max_steps=4, log_history=log), []
    for event in ("on_step_end", "on_epoch_end"):
        control = TrainerControl()
        getattr(EvaluateLast(), event)(args, state, control)
        found.append(control.should_evaluate)
    due = step == 4 and (strategy == "no" or not evaluated)
    assert found == [due and strategy != "epoch", due and strategy == "epoch"]


def test_an_undefined_evaluation_does_not_win(tiny_model, tokenizer, tmp_path, caplog, monkeypatch):
    """Rewards that are all NaN at one step: no error, no best."""
    ranking = MarginCPOTrainer._ranking

    def undefined_at_2(self: Any, values: torch.Tensor, dataset: Any) -> dict[str, Any]:
        return ranking(self, values * (float("nan") if self.state.global_step == 2 else 1.0), dataset)

    monkeypatch.setattr(MarginCPOTrainer, "_ranking", undefined_at_2)
    for evals in (EVALS, EVALS.to_iterable_dataset()):
        caplog.clear()
        trainer, weights = run(tiny_model, tokenizer, tmp_path, evals=evals, save_steps=3, max_steps=4)
        values = curve(trainer.state.log_history)
        assert list(values) == [1, 3, 4]
        assert_delivers(trainer, weights, peak(values))
        assert "the evaluation at step 2 has no eval_pwa, so it cannot win" in caplog.text


@pytest.mark.parametrize("sets", ["one", "several"])
def test_the_delivered_model_has_its_numbers_from_evaluate(sets, tiny_model, tokenizer, tmp_path):
    """Also where a prompt fills `max_length`, so that training leaves the pair out."""
    rows = EVALS.map(lambda row, i: {"prompt": row["prompt"] * (9 if i % 4 == 0 else 1)}, with_indices=True)
    rows.to_json(tmp_path / "rows.jsonl")
    evals = rows if sets == "one" else {"a": ROWS, "b": rows}
    trainer, _ = run(
        tiny_model, tokenizer, tmp_path / "out", evals=evals, max_length=100, max_steps=3, loss_type="simpo", beta=2.0
    )
    trainer.save_model()
    prefix = "eval" if sets == "one" else "eval_b"
    files = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--json", str(tmp_path / "n.json"), "--bootstrap", "10"]
    assert main(["evaluate", "--model_name_or_path", str(tmp_path / "out"), *files]) == 0
    found = json.loads((tmp_path / "n.json").read_text())["sets"]["rows"]
    assert 0 < found["n_pairs"] < len(rows)
    for name in ("pwa", "pwa_all", "spearman", "n_pairs", "n_pairs_gap"):
        assert found[name] == pytest.approx(trainer.loaded_metrics[f"{prefix}_{name}"]), name


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "is NaN, so it cannot win"), ("high", None)])
def test_a_metric_of_ones_own_that_is_no_number(value, said, tiny_model, tokenizer, tmp_path, caplog):
    """And one that only a callback or a subclass adds is nobody's business."""
    config = config_class("gappo", "cpo")(
        **quiet(output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps"),
        **{"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "mine"},
    )
    trainer = trainer_class("gappo", "cpo")(
        load(tiny_model),
        args=config,
        train_dataset=ROWS,
        eval_dataset=EVALS,
        processing_class=tokenizer,
        compute_metrics=lambda _: {"mine": value},
    )
    if said is None:
        with pytest.raises(
            TypeError, match="metric_for_best_model='eval_mine' is 'high', and no number, so none can be better"
        ):
            trainer.train()
        return
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert f"eval_mine of the evaluation at step 2 {said}" in caplog.text


class OfItsOwn(trainer_class("gappo", "cpo")):  # type: ignore[misg]
    """Evaluates without this package."""

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return {"eval_win": [0.1, 0.9, 0.3, 0.2][self.state.global_step - 1]}


def own_evaluation(kind: Any, model: str, tokenizer: Any, folder: Any, **options: Any) -> Any:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", **options}
    config = config_class("gappo", "cpo")(
        **quiet(output_dir=str(folder), eval_steps=1, load_best_model_at_end=True, **options),
        metric_for_best_model="win",
        greater_is_better=True,
    )
    data = {"train_dataset": ROWS, "eval_dataset": EVALS, "processing_class": tokenizer}
    return kind(load(model), args=config, **data)


def test_an_evaluation_of_ones_own_chooses(tiny_model, tokenizer, tmp_path, caplog):
    """It logs nothing; the best is known at the end, and to a run that goes on."""
    whole = own_evaluation(OfItsOwn, tiny_model, tokenizer, tmp_path / "whole")
    whole.train()
    assert (whole.loaded_step, whole.state.best_metric) == (2, 0.9)
    rest = own_evaluation(OfItsOwn, tiny_model, tokenizer, tmp_path / "rest")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert (rest.loaded_step, rest.state.best_metric) == (2, 0.9)
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "without an evaluation" not in caplog.text
    assert "not chosen by" not in caplog.text


def test_an_evaluation_of_ones_own_that_is_undefined(tiny_model, tokenizer, tmp_path, caplog):
    class Undefined(OfItsOwn):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            return {"eval_win": float("nan")}

    trainer = own_evaluation(Undefined, tiny_model, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert "eval_win of the evaluation at step 1 is NaN, so it cannot win" in caplog.text
    assert "without an evaluation" not in caplog.text


@pytest.mark.parametrize("value", [None, [], {"eval_win": None}, {"eval_win": 1j}])
def test_an_evaluation_of_ones_own_without_a_number(value, tiny_model, tokenizer, tmp_path):
    class Returns(OfItsOwn):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            return value

    said = (
        "'eval_win' is .*, and no number" if value else r"Returns.evaluate\(\) returned .*: return the metrics, a dict"
    )
    with pytest.raises(TypeError, match=said):
        own_evaluation(Returns, tiny_model, tokenizer, tmp_path).train()


class Adds(TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        metrics["eval_mine"] = 1.0


def test_a_metric_that_a_callback_adds(tiny_model, tokenizer, tmp_path):
    """Nobody knows its name before."""
    config = config_class("gappo", "cpo")(
        **quiet(output_dir=str(tmp_path), max_steps=1, save_strategy="steps", save_steps=1, eval_strategy="steps"),
        **{"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "mine"},
    )
    trainer_class("gappo", "cpo")(
        load(tiny_model),
        args=config,
        train_dataset=ROWS,
        eval_dataset=EVALS,
        processing_class=tokenizer,
        callbacks=[Adds()],
    )
