"""What a run leaves in its folder, and what it says of flipped pairs."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import OWN_METHODS, TINY, load, preference_rows, quiet
from transformers import TrainerCallback

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer, __version__
from trl_margins.cli import main
from trl_margins.data.noise import flip_labels
from trl_margins.links import CPO_LINKS, DPO_LINKS
from trl_margins.objective import Objective
from trl_margins.pairs import IS_FLIPPED, ROW, PairLogps
from trl_margins.recording import pair_log
from trl_margins.recording.metrics import MetricBuffer
from trl_margins.recording.pair_log import PairLog, flip_metrics
from trl_margins.rewards import LengthNormalizedReward, LogRatioReward
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.settings import run_settings


def read(folder):
    with (folder / "pair_log.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return dict(zip(head, np.array(rows, float).T, strict=True))


def build(method, folder, tokenizer, out, rows=None, base="cpo", **options):
    return trainer_class(method, base)(
        load(folder),
        args=config_class(method, base)(**quiet(output_dir=str(out), learning_rate=1e-3, **options)),
        train_dataset=rows or preference_rows(12, seed=3),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("method", OWN_METHODS)
def test_a_line_a_pair(method, base, tiny_model, tokenizer, tmp_path):
    """Twelve pairs in steps of two mini-batches: once each, also where a method looks at them more often."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    trainer = build(method, tiny_model, tokenizer, tmp_path, base=base, logging_steps=2, **options)
    trainer.train()
    pairs = read(tmp_path)
    assert np.bincount(pairs["step"].astype(int)).tolist() == [0, 4, 4, 4]
    sigmoid = 1 / (1 + np.exp(pairs["reward_gap"] - pairs["margin"]))
    np.testing.assert_allclose(pairs["slope"], sigmoid, rtol=1e-4)
    scores = np.abs([row["score_chosen"] - row["score_rejected"] for row in preference_rows(12, seed=3)])
    assert sorted(np.abs(pairs["score_gap"])) == pytest.approx(sorted(scores))
    np.testing.assert_allclose(pairs["weight"], np.abs(pairs["score_gap"]) if method == "gappo" else 1.0)
    anchor = {"anchor_gap", "anchor_weight"}
    factors = {"evaluation_factor", "mapped_factor"}
    extra = {"gap-aware": factors, "geometric-anchor": anchor, "gradient-norm": anchor}.get(method, set())
    assert {"evaluation_factor", "mapped_factor", "anchor_gap", "anchor_weight"} & set(pairs) == extra
    if extra == anchor:
        np.testing.assert_allclose(pairs["anchor_weight"], trainer.objective.beta * pairs["slope"], rtol=1e-3)
    if method == "gap-aware":
        np.testing.assert_allclose(pairs["mapped_factor"], -np.log(pairs["evaluation_factor"].clip(0.01)), atol=1e-5)
    run = json.loads((tmp_path / "margin_run.json").read_text())
    assert (run["method"], run["base"], run["train_rows"]) == (method, base, 12)
    assert run["config"]["learning_rate"] == 1e-3
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert history[0]["step"] == 2
    if trainer.objective.weight or trainer.objective.margin:
        term, name = ("weights", "weight") if trainer.objective.weight else ("target_margins", "margin")
        column = pairs[name]
        assert history[0][f"{term}/mean"] == pytest.approx(column[pairs["step"] <= 2].mean(), rel=1e-4)


def tensors(n=5, reference=True):
    generator = torch.Generator().manual_seed(0)
    sums = [-20 * torch.rand(n, generator=generator, dtype=torch.float64) - 1 for _ in range(4)]
    lengths = torch.randint(1, 9, (2, n), generator=generator)
    return sums[:2], lengths, sums[2:] if reference else (None, None)


@pytest.mark.parametrize(
    ("loss", "table", "reward"),
    [
        *((name, CPO_LINKS, LengthNormalizedReward()) for name in ("simpo", "hinge", "ipo")),
        *((name, DPO_LINKS, LogRatioReward()) for name in ("sigmoid", "hinge", "ipo", "robust", "apo_zero")),
    ],
)
def test_slope_is_the_derivative_in_the_gap(loss, table, reward):
    """By central differences: the chosen reward up and the rejected one down by half a step each."""
    (chosen, rejected), lengths, references = tensors()
    objective = Objective(reward, table[loss], beta=0.7, label_smoothing=0.1 if loss == "robust" else 0.0)

    def output(shift, grad):
        scale = lengths if isinstance(reward, LengthNormalizedReward) else (1, 1)
        up = (chosen + shift / 2 / 0.7 * scale[0]).requires_grad_(grad)
        down = (rejected - shift / 2 / 0.7 * scale[1]).requires_grad_(grad)
        return objective(PairLogps(up, down, *lengths, *references), training=grad)

    step = 1e-6
    expected = -(output(step, False).losses - output(-step, False).losses) / (2 * step)
    torch.testing.assert_close(output(0.0, True).gradient_scale, expected, rtol=1e-4, atol=1e-6)
    assert output(0.0, False).gradient_scale is None


class Killed(TrainerCallback):
    """Keeps what the log has when the checkpoint is there: after a kill there is no more, and perhaps half a line."""

    def on_save(self, args, state, control, **kwargs):
        self.lines = Path(args.output_dir, "pair_log.csv").read_text() + "5,0.1,0."
        control.should_training_stop = True


def test_stopping_and_going_on_leaves_the_same_lines(tiny_model, tokenizer, tmp_path):
    """The log is written with each checkpoint, however rarely the run logs."""
    options = {"per_device_train_batch_size": 3, "num_train_epochs": 1, "logging_steps": 10}
    whole = build("gappo", tiny_model, tokenizer, tmp_path / "whole", **options)
    whole.train()
    options |= {"save_strategy": "steps", "save_steps": 2}
    cut, kill = build("gappo", tiny_model, tokenizer, tmp_path / "cut", **options), Killed()
    cut.add_callback(kill)
    cut.train()
    file = tmp_path / "cut" / "pair_log.csv"
    file.write_text(kill.lines)
    resumed = build("gappo", tiny_model, tokenizer, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert file.read_text() == (tmp_path / "whole" / "pair_log.csv").read_text()


def test_logged_means_and_spreads():
    """Over the pairs of several batches of different sizes, each added at once."""
    rng, buffer = np.random.default_rng(0), MetricBuffer()
    for _ in range(2):  # a drained buffer begins anew
        batches = [np.append(rng.normal(1e4, 0.1, n), 0.0) for n in (3, 6)]
        for values in batches:
            buffer.add(
                {"weights": torch.tensor(values), "loss": torch.tensor(values), "num_tokens": float(len(values))}
            )
            buffer.add({"eval_weights/mine": torch.tensor(-values), "target_margins": torch.tensor(values[:-1])})
        logs, values = buffer.drain(Accelerator(cpu=True)), np.concatenate(batches)
        assert logs.pop("loss") == pytest.approx(values.mean())
        assert logs.pop("num_tokens") == len(values)
        for name, these in (("weights", values), ("eval_weights/mine", -values)):
            expected = {
                "mean": these.mean(),
                "std": these.std(),
                "min": these.min(),
                "max": these.max(),
                "zero": 2 / 11,
            }
            assert {key: logs.pop(f"{name}/{key}") for key in expected} == pytest.approx(expected)
        close = np.concatenate([values[:-1] for values in batches])  # a small spread around a large mean
        assert logs.pop("target_margins/std") == pytest.approx(close.std(), rel=1e-4)
        assert {key.partition("/")[0] for key in logs} == {"target_margins"}
    assert buffer.drain(Accelerator(cpu=True)) == {}


class Ranks:
    """This rank and another one, whose tensors it was given."""

    def __init__(self, other=None):
        self.other, self.given = other, []

    def reduce(self, values):
        self.given.append(values)
        return values if self.other is None else values + self.other.given[0]

    def gather(self, values):
        self.given.append(values)
        return values if self.other is None else torch.cat([values, self.other.given[1]])


def test_ranks_agree_on_names_whatever_comes_first():
    """A rank that has had another batch first has its metrics in another order."""
    values = {"weights": torch.tensor([1.0, 2.0]), "anchor/gap": torch.tensor([5.0, 9.0]), "loss": torch.tensor(3.0)}
    mine, theirs, other = MetricBuffer(), MetricBuffer(), Ranks()
    mine.add(values)
    theirs.add({name: 10 * values[name] for name in reversed(values)})
    theirs.drain(other)
    logs = mine.drain(Ranks(other))
    assert (logs["loss"], logs["weights/mean"], logs["anchor/gap/mean"]) == (16.5, 8.25, 38.5)
    assert (logs["weights/max"], logs["anchor/gap/min"]) == (20.0, 5.0)


def test_a_rank_whose_pairs_do_not_count_changes_nothing():
    values = {"weights": torch.tensor([1.0, 2.0]), "loss": torch.tensor([3.0])}
    mine, theirs, other = MetricBuffer(), MetricBuffer(), Ranks()
    mine.add(values)
    alone = mine.copy().drain(Ranks())
    theirs.add({name: value[:0] for name, value in values.items()})
    theirs.drain(other)
    assert mine.drain(Ranks(other)) == alone
    assert (alone["loss"], alone["weights/min"], alone["weights/max"]) == (3.0, 1.0, 2.0)


RUN = {
    **{"method": "gappo", "name": "GapPO", "base": "cpo", "trainer": "GapPOTrainer", "reference": None},
    **{"reward": "length-normalized", "weight": "score-gap", "margin": None, "loss_type": "simpo"},
    **{
        "term_options": ["score_gap_transform", "score_gap_threshold", "score_gap_normalize"],
        "reward_options": ["alpha"],
    },
    **{"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0, "discopop_tau": 0.05},
    "sampling": {"use_seedable_sampler": True, "even_batches": True},
    **{"score_columns": ["score_chosen", "score_rejected"], "prompt_column": "prompt"},
    **{"adapter": None, "train_rows": 12, "evaluation_sets": {}, "pairs_per_step": 8, "processes": 1},
    # which no config describes
    **{
        "parts": {},
        "objects": {},
        "optimizer": None,
        "optimizer_options": None,
        "optimizer_arguments": None,
        "optimizer_class": None,
    },
    **{"reference_config": None, "reference_types": None, "reference_attention": None, "precision": "no"},
    **{"schedule": None, "schedule_arguments": None, "weight_types": "float32", "attention": "sdpa"},
    "experts": "eager",
}


AMAPO = ("variant", "z_normalize", "exponential", "zero_well_ranked", "estimation_size")


@pytest.mark.parametrize(
    ("method", "base", "expected"),
    [
        ("gappo", "cpo", RUN),
        (
            *(None, "dpo"),
            {
                **RUN,
                **{"method": None, "name": "MarginDPOTrainer", "base": "dpo", "trainer": "MarginDPOTrainer"},
                **{"reward": "log-ratio", "weight": None, "margin": "amapo", "loss_type": "sigmoid + 0.5 sft"},
                **{"term_options": [f"amapo_{option}" for option in AMAPO], "score_columns": None},
                **{"reward_options": ["f_divergence_type", "f_alpha_divergence_coef"], "beta": 0.1, "gamma": 0.0},
            },
        ),
    ],
)
def test_the_whole_of_a_runs_file(method, base, expected, tiny_model, tokenizer, tmp_path):
    more = {"beta": 2.0, "gamma_beta_ratio": 0.25}
    if method is None:
        more = {"margin": "amapo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    more |= {"gradient_accumulation_steps": 2, "hub_token": "hf_secret"}
    settings = run_settings(build(method, tiny_model, tokenizer, tmp_path, base=base, **more))
    (model, reference, rows, trained) = map(settings.pop, ("model", "reference", "rows", "trained_parameters"))
    assert (model, reference) == (tiny_model, tiny_model if base == "dpo" else None)
    assert (len(rows), trained[:11]) == (8, "21 tensors ")
    columns, fixed = settings.pop("columns"), settings.pop("fixed_weights")
    assert [*columns] == ["tokens", *(expected["score_columns"] or ())]
    assert {*map(len, columns.values())} == {8}
    assert fixed is None if base == "cpo" else len(fixed) == 8
    computed = settings.pop("model_config")
    if base == "dpo":
        assert (settings["reference_config"], settings["reference_types"]) == (computed, "float32")
        expected = expected | {name: settings[name] for name in ("reference_config", "reference_types")}
        expected |= {"reference_attention": settings["attention"]}
    assert (computed["model_type"], computed["hidden_size"]) == ("llama", TINY["hidden_size"])
    assert not computed.keys() & {"dtype", "transformers_version", "use_cache"}
    config = settings.pop("config")
    assert (config["gradient_accumulation_steps"], settings.pop("version")) == (2, __version__)
    assert "hf_secret" not in str(config)
    assert settings == {key: value for key, value in expected.items() if key != "reference"}


def test_a_new_run_begins_a_new_log(tiny_model, tokenizer, tmp_path):
    for _ in range(2):
        build("gappo", tiny_model, tokenizer, tmp_path, max_steps=1).train()
    assert len(read(tmp_path)["step"]) == 4


def test_no_log_when_it_is_not_wanted(tiny_model, tokenizer, tmp_path):
    build("gappo", tiny_model, tokenizer, tmp_path / "x", max_steps=1, log_pairs=False).train()
    assert not (tmp_path / "x" / "pair_log.csv").exists()
    assert json.loads((tmp_path / "x" / "margin_run.json").read_text())["method"] == "gappo"  # `evaluate` reads it


def test_trl_configs_have_it_too(tiny_model, tokenizer, tmp_path):
    """Any loss, no term."""
    for name, trainer, config, more in (
        ("cpo", MarginCPOTrainer, MarginCPOConfig, {"loss_type": "ipo"}),
        ("dpo", MarginDPOTrainer, MarginDPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ):
        args = config(**quiet(output_dir=str(tmp_path / name), max_steps=1, **more))
        trainer(load(tiny_model), args=args, train_dataset=preference_rows(4), processing_class=tokenizer).train()
        assert np.isfinite(read(tmp_path / name)["slope"]).all()


# Flips


def flips_by_hand(pairs):
    flipped = pairs["is_flipped"] == 1
    scale = pairs["weight"] * pairs["slope"]
    order = np.argsort(scale, kind="stable")
    third = -(-len(order) // 3)
    return {
        "flips/rate": flipped.mean(),
        "flips/weight": pairs["weight"][flipped].mean(),
        "flips/weight_clean": pairs["weight"][~flipped].mean(),
        "flips/gradient_scale": scale[flipped].mean(),
        "flips/gradient_scale_clean": scale[~flipped].mean(),
        "flips/gradient_share": scale[flipped].sum() / scale.sum(),
        "flips/rate_low": flipped[order[:third]].mean(),
        "flips/rate_high": flipped[order[-third:]].mean(),
    }


def test_flips_are_logged(tiny_model, tokenizer, tmp_path):
    rows = flip_labels(preference_rows(12, seed=3), 0.5)
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, rows, logging_steps=3, num_train_epochs=1)
    trainer.train()
    pairs, logged = read(tmp_path), trainer.state.log_history[0]
    assert pairs["is_flipped"].sum() == 6
    for name, value in flips_by_hand(pairs).items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


def test_flips_are_never_trained_on(tiny_model, tokenizer, tmp_path):
    rows = flip_labels(preference_rows(8), 0.5)
    states = []
    for name, data in (("with", rows), ("without", rows.remove_columns(IS_FLIPPED))):
        trainer = build("gappo", tiny_model, tokenizer, tmp_path / name, data, max_steps=2)
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_flips_of_nothing():
    pairs = {"weight": np.ones(4), "slope": np.zeros(4)}
    assert flip_metrics(pairs, weighted=True) == {}
    found = flip_metrics({**pairs, IS_FLIPPED: np.zeros(4)}, weighted=False)
    assert found["flips/rate"] == 0.0
    assert "flips/gradient_scale" not in found  # of no pair
    assert "flips/gradient_share" not in found  # of nothing
    assert "flips/weight_clean" not in found  # every pair weighs 1


def test_values_between_logs_are_counted_once(tmp_path):
    log = PairLog(tmp_path / "x.csv")
    log.add(1, {"weight": torch.tensor([1.0, 2.0])})
    log.flush(Accelerator())  # at a checkpoint
    log.add(2, {"weight": torch.tensor([3.0])})
    log.flush(Accelerator())
    assert log.drain()["weight"].tolist() == [1.0, 2.0, 3.0]
    assert log.drain()["weight"].tolist() == []
    assert (tmp_path / "x.csv").read_text().split() == ["step,weight", "1,1", "1,2", "2,3"]


@pytest.mark.parametrize(
    ("others", "lines"), [([], []), ([[1, 5], [3, 6]], ["step,weight", "1,2", "1,5", "2,4", "3,6"])]
)
def test_the_pairs_of_all_ranks_by_their_steps(others, lines, tmp_path, monkeypatch):
    """The main process writes them; a rank without pairs adds none."""
    log = PairLog(tmp_path / "x.csv")
    for step, value in ((1, 2.0), (2, 4.0)) if lines else ():
        log.add(step, {"weight": torch.tensor([value])})
    theirs = [np.reshape(others, (-1, 2)), np.empty((0, 1))]
    monkeypatch.setattr(pair_log, "gather_object", lambda mine: [*mine, *theirs])
    log.flush(SimpleNamespace(num_processes=3, is_main_process=False))
    assert not log.file.exists()
    assert log.drain()["step"].tolist() == [int(line[0]) for line in lines[1:]]
    for step, value in ((1, 2.0), (2, 4.0)) if lines else ():
        log.add(step, {"weight": torch.tensor([value])})
    log.flush(SimpleNamespace(num_processes=3, is_main_process=True))
    assert (log.file.read_text().split() if log.file.exists() else []) == lines


def test_a_resumed_run_has_no_later_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO, "trl_margins")
    log, file = PairLog(tmp_path / "x.csv"), tmp_path / "x.csv"
    log.rewind(3)  # there is none yet
    lines = ["step,row_number,weight", "1,0,0.5", "2,1,0.5", "2,2,1e-05", "3,3,0.25"]
    for text, kept, dropped in (
        ("\n".join(lines) + "\n", 4, 1),
        ("\n".join(lines[:4]) + "\n2,4,0.", 4, 1),  # cut by a kill within a line that looks whole
        ("\n".join(lines[:4]) + "\n2,4\n", 4, 1),
        ("\n".join(lines[:4]) + "\n", 4, 0),
    ):
        caplog.clear()
        file.write_text(text)
        log.rewind(2)
        assert file.read_text().split() == lines[:kept]
        assert caplog.messages == [f"x.csv: {dropped} lines of steps after 2 are removed"] * bool(dropped)
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    log.rewind(0)
    assert not file.exists()


@pytest.mark.parametrize(
    "damaged",
    [
        b"\0\xff\n" * 9,
        b"step,weight\n1,1\n2,1\n\xff\xff",
        "step,weight\n1,1\n".encode("utf-16"),
        b"step,weight\nx1,1\n",
    ],
)
def test_a_damaged_log_stops_no_resumed_run(damaged, tmp_path, caplog):
    """It is kept aside, as it was."""
    log = PairLog(tmp_path / "x.csv")
    log.file.write_bytes(damaged)
    log.rewind(2)
    assert "x.csv is damaged" in caplog.text
    assert "it is now x-damaged-2.csv" in caplog.text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x-damaged-2.csv": damaged}


def test_a_log_that_is_never_drained_does_not_grow(tmp_path, monkeypatch, caplog):
    """The file has all pairs, memory the last five or a few more, and a line says what is only in the file."""
    caplog.set_level(logging.INFO, "trl_margins")
    monkeypatch.setattr(pair_log, "MOST_CACHED", 5)
    monkeypatch.setattr(pair_log, "MOST_WAITING", 2)
    log, alone = PairLog(tmp_path / "x.csv"), Accelerator(cpu=True)
    for step in range(1, 6):
        assert not log.is_full
        for _ in range(2):
            log.add(step, {ROW: torch.tensor([7.0]), "weight": torch.tensor([step / 3])})
        assert log.is_full
        log.flush(alone)
    log.flush(alone)  # nothing is waiting
    log.add(6, {ROW: torch.tensor([7.0]), "weight": torch.tensor([2.0])})
    log.forget(6)  # a step that is not taken
    log.flush(alone)
    assert log.drain()["step"].tolist() == [3, 3, 4, 4, 5, 5]
    assert "of the pairs since the last log, the first 4 are only in x.csv" in caplog.text
    caplog.clear()
    assert not log.drain()["step"].size
    assert not caplog.text
    lines = (tmp_path / "x.csv").read_text().split()
    assert lines[:2] == ["step,row_number,weight", "1,7,0.3333333"]
    assert len(lines) == 11
    log.add(7, {ROW: torch.tensor([7.0]), "weight": torch.tensor([2.0])})
    log.n_lost = 3  # in an earlier call of `train`
    log.clear()
    log.flush(alone)
    assert len((tmp_path / "x.csv").read_text().split()) == 11
    assert log.n_lost == 0


def test_noise_from_the_command_line(tiny_model, tmp_path, caplog):
    preference_rows(10, "conversational").to_json(tmp_path / "pairs.jsonl")
    argv = ["train", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_length", "128", "--report_to", "none", "--use_cpu"]
    with caplog.at_level(logging.INFO, "trl_margins"):
        assert main([*argv, "--num_train_epochs", "1", "--noise", "random:0.3", "--noise_seed", "1"]) == 0
    assert "flipped 3 of 10 pairs (random)" in caplog.text
    assert read(tmp_path / "out")["is_flipped"].sum() == 3
    with pytest.raises(ValueError, match="noise is written KIND:RATE"):
        main([*argv, "--overwrite_output_dir", "--noise", "0.3"])
