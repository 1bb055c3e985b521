"""Errors of the main process, each of which every process must raise. Prints them: `refused.py MODEL PAIRS OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState
from conftest import preference_rows, quiet
from transformers import TrainerCallback

from trl_margins import (
    GapPOConfig,
    GapPODPOConfig,
    GapPODPOTrainer,
    GapPOTrainer,
    MarginCPOConfig,
    MarginCPOTrainer,
    Term,
)
from trl_margins.cli import main
from trl_margins.distributed import agreed
from trl_margins.trainers.folder import locked

MODEL, PAIRS, OUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])


BASES = {"cpo": (GapPOConfig, GapPOTrainer), "dpo": (GapPODPOConfig, GapPODPOTrainer)}


class UnsendableError(RuntimeError):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def refuse():
    raise UnsendableError("of another", "kind")


def command():
    flags = "--use_cpu true --report_to none --max_steps 1 --per_device_train_batch_size 2"
    argv = ["--model_name_or_path", MODEL, "--dataset_name", PAIRS, "--output_dir", str(OUT / "cli"), *flags.split()]
    main(["train", *argv])


def train(out, rows=8, seed=0, evals=None, base="cpo", change=lambda rows: rows, **options):
    settings = {"output_dir": str(OUT / out), "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2}
    config = BASES[base][0](**quiet(**settings, **options, save_strategy="steps"))
    given = {"train_dataset": change(preference_rows(rows, seed=seed)), "eval_dataset": evals}
    trainer = BASES[base][1](MODEL, args=config, **given)
    if out == "checkpoint":
        trainer.add_callback(InTheWay())
    trainer.train()


class Plain(Term):
    name = "plain"

    seen = "seen"

    def __call__(self, view):
        return view.reward_gap * 0

    def observed(self, view, value):
        return {self.seen: value}


def in_roles(role):
    config = MarginCPOConfig(**quiet(output_dir=str(OUT / "roles"), loss_type="simpo", max_steps=1))
    MarginCPOTrainer(MODEL, args=config, train_dataset=preference_rows(8), **{role: Plain()}).train()


def that_observes(name):
    config = MarginCPOConfig(**quiet(output_dir=str(OUT / "observed"), loss_type="simpo", max_steps=1))
    term = Plain()
    term.seen = name
    MarginCPOTrainer(MODEL, args=config, train_dataset=preference_rows(8), margin_term=term).train()


class InTheWay(TrainerCallback):
    def on_train_begin(self, args, state, *more, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir, "checkpoint-1").write_text("not a folder")


def attempt(what, run):
    try:
        run()
        said = "no error"
    except Exception as error:
        said = str(error).replace("\n", " ")
    sys.stdout.write(f"{what}: {said}\n")
    sys.stdout.flush()
    state.wait_for_everyone()


state = PartialState(cpu=True)
if state.is_main_process:
    (OUT / "settings" / "margin_run.json").mkdir(parents=True)
    (OUT / "cli").mkdir()
    (OUT / "cli" / "pair_log.csv").write_text("step\n")
state.wait_for_everyone()
attempt("error", lambda: agreed(state, refuse))
attempt("settings", lambda: train("settings"))
attempt("checkpoint", lambda: train("checkpoint"))
attempt("options", lambda: train("options", data_seed=state.process_index, num_train_epochs=1 + state.process_index))
attempt("rows", lambda: train("rows", seed=state.process_index))
attempt("sizes", lambda: train("sizes", rows=8 + state.process_index))
attempt("sets", lambda: train("sets", evals=None if state.process_index else {"a": preference_rows(2)}))
orders = ({"a": preference_rows(2), "b": preference_rows(2)}, {"b": preference_rows(2), "a": preference_rows(2)})
attempt("order", lambda: train("order", evals=orders[state.process_index]))
scores = {"score_chosen": "chosen_score", "score_rejected": "rejected_score"}
renamed = (lambda rows: rows, lambda rows: rows.rename_columns(scores))
attempt("scores", lambda: train("scores", change=renamed[state.process_index]))
stream = {"change": lambda rows: rows.to_iterable_dataset()}
attempt("streams", lambda: train("streams", seed=state.process_index, **stream))
attempt("observed", lambda: that_observes(("one", "other")[state.process_index]))
attempt("bases", lambda: train("bases", base=("cpo", "dpo")[state.process_index]))
attempt("roles", lambda: in_roles(("weight_term", "margin_term")[state.process_index]))
of_reference = {"base": "dpo", "reward": "log-ratio"}
of_one = bool(state.process_index)
attempt("precomputed", lambda: train("precomputed", **of_reference, precompute_ref_log_probs=of_one))
several = {**of_reference, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 1 + state.process_index}
attempt("precomputing", lambda: train("precomputing", **several))
attempt("used", command)
if state.is_main_process:
    (OUT / "cli" / "pair_log.csv").unlink()
    with locked(OUT / "cli"):
        attempt("locked", command)
else:
    attempt("locked", command)
