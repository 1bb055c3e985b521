"""A NaN in the model's output stops training before it reaches a weight, or is skipped as if it had not been there."""

from __future__ import annotations

import csv
import logging
import math

import pytest
import torch
from conftest import OWN_METHODS, load, preference_rows, quiet
from datasets import Dataset
from said import word_for_word  # noqa: F401 - its messages are held against said/
from transformers import TrainerCallback

from trl_margins import Term
from trl_margins.pairs import SHARED
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.finite import _message
from trl_margins.trainers.folder import is_whole
from trl_margins.trainers.named import trainer_class

BROKEN = "#"  # a byte whose embedding comes out as NaN


def rows(n: int = 16, broken: dict[int, str] | None = None) -> Dataset:
    """Pairs; of those in `broken`, by number, one side has the byte that the model cannot read."""
    pairs = preference_rows(n, seed=5).to_list()
    for i, side in (broken or {}).items():
        pairs[i][side] += BROKEN
    return Dataset.from_list(pairs)


@pytest.mark.parametrize(("n", "end"), [(1, ": p0"), (8, "p6, p7"), (9, "p6, p7 and 1 more")])
def test_a_message_names_some_pairs_and_counts_the_others(n, end):
    assert _message([f"p{i}" for i in range(n)], "the output", is_loss=False).endswith(end)


def model_that_breaks(folder, tokenizer):
    model, broken = load(folder), tokenizer.convert_tokens_to_ids(BROKEN)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == broken)[..., None], math.nan)
    )
    return model


def build(method, folder, tokenizer, out, data, base="cpo", eval_dataset=None, **options):
    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 1}
    settings |= {"train_sampling_strategy": "sequential", "output_dir": str(out), **options}
    return trainer_class(method, base)(
        model_that_breaks(folder, tokenizer),
        args=config_class(method, base)(**quiet(**settings)),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_same(mine, theirs):
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("method", OWN_METHODS)
def test_training_stops_and_names_the_rows(method, base, tiny_model, tokenizer, tmp_path):
    """Third step of four pairs: rows 9 and 10. What is saved are the weights after two steps, bit for bit."""
    data = rows(broken={9: "rejected", 10: "chosen"})
    # GaPO scales its margins by a mean over the whole set
    run = {"gap_aware_normalization": "none"} if method == "gap-aware" else {}
    trainer = build(method, tiny_model, tokenizer, tmp_path, data, base, save_strategy="epoch", **run)
    with pytest.raises(FloatingPointError, match="step 3") as caught:
        trainer.train()
    message = str(caught.value)
    if method != "simpo-sam":  # whose nearby policy is not a number for any pair
        assert "for 2 pair(s): row 9 ('" in message
        assert "row 10 ('" in message
        assert data[9]["prompt"] in message
    assert "checkpoint-2" in message
    two = build(method, tiny_model, tokenizer, tmp_path / "two", data.select(range(8)), base, **run)
    two.train()
    assert_same(weights(trainer), weights(two))
    assert is_whole(tmp_path / "checkpoint-2")
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    assert_same(dict(saved.named_parameters()), weights(two))


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("method", OWN_METHODS)
def test_a_skipped_step_leaves_no_trace(method, base, tiny_model, tokenizer, tmp_path, caplog):
    """The same weights, means and pair log as without these four pairs: the optimizer and the terms never saw them."""
    data = rows(broken={5: "chosen"})
    run = {"logging_steps": 4, "nonfinite_steps": "skip"}
    if method == "gap-aware":  # whose margins are scaled by the mean over the whole set
        run["gap_aware_normalization"] = "none"
    trainer = build(method, tiny_model, tokenizer, tmp_path / "all", data, base, **run)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "step 2: the model's output is NaN or infinite for" in caplog.text
    assert "left out; 1 so far" in caplog.text
    without = data.select([*range(4), *range(8, 16)])
    other = build(method, tiny_model, tokenizer, tmp_path / "less", without, base, **run | {"logging_steps": 3})
    other.train()
    assert_same(weights(trainer), weights(other))
    mine, theirs = trainer.state.log_history[0], other.state.log_history[0]
    assert mine.pop("skipped_steps") == 1
    skipped = ("step", "epoch", "loss", "grad_norm")
    # DPOTrainer counts the tokens that it has seen
    assert {k: v for k, v in mine.items() if k not in skipped} == {k: v for k, v in theirs.items() if k not in skipped}
    lines = list(csv.DictReader((tmp_path / "all" / "pair_log.csv").open()))
    assert [int(line["step"]) for line in lines] == [1] * 4 + [3] * 4 + [4] * 4
    assert [int(line["row_number"]) for line in lines] == [*range(4), *range(8, 16)]
    assert "nan" not in (tmp_path / "all" / "pair_log.csv").read_text()


def test_a_whole_window_is_skipped(tiny_model, tokenizer, tmp_path):
    """Two mini-batches of two: the second one's NaN takes the first one's gradient with it."""
    run = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "nonfinite_steps": "skip"}
    data = rows(broken={7: "chosen"})
    trainer = build("gamma-po", tiny_model, tokenizer, tmp_path, data, **run)
    trainer.train()
    other = build("gamma-po", tiny_model, tokenizer, tmp_path, data.select([*range(4), *range(8, 16)]), **run)
    other.train()
    assert_same(weights(trainer), weights(other))
    assert len(trainer.objective.margins[0].history) == 12


def test_many_skipped_steps_in_a_row_stop_training(tiny_model, tokenizer, tmp_path):
    data = rows(48, broken=dict.fromkeys(range(4, 48), "chosen"))
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, data, nonfinite_steps="skip")
    with pytest.raises(FloatingPointError, match=r"step 11: .*10 steps in a row are not finite"):
        trainer.train()
    assert trainer.state.global_step == 10


def test_skipped_steps_apart_from_each_other_do_not_stop(tiny_model, tokenizer, tmp_path):
    """Every other one of 22: eleven in all, and never two in a row."""
    data, run = rows(22, broken=dict.fromkeys(range(1, 22, 2), "chosen")), {"per_device_train_batch_size": 1}
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, data, nonfinite_steps="skip", **run)
    trainer.train()
    assert (trainer.state.global_step, trainer._finite.n_skipped) == (22, 11)
    trainer.args.num_train_epochs = 0.5  # a second call counts its own
    trainer.train()
    assert trainer._finite.n_skipped == 5


class Counting(Term):
    """Changes its state in place, and hands it out as it is."""

    name = "counting"

    def __init__(self):
        self.seen = torch.zeros(1)

    def __call__(self, view):
        self.seen += len(view.reward_gap) * view.training
        return torch.ones_like(view.reward_gap)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_a_state_is_kept_apart_from_its_term(tiny_model, tokenizer, tmp_path):
    """Of sixteen pairs the four of a skipped step are not counted; a second call counts from none."""
    config = config_class(None)(**quiet(output_dir=str(tmp_path), num_train_epochs=1, nonfinite_steps="skip"))
    data, term = rows(broken={5: "chosen"}), Counting()
    model = model_that_breaks(tiny_model, tokenizer)
    trainer = trainer_class(None)(model, config, train_dataset=data, processing_class=tokenizer, weight_term=term)
    for _ in range(2):
        trainer.train()
        assert term.seen == 12


def test_a_pair_is_not_blamed_for_its_neighbour(tiny_model, tokenizer, tmp_path):
    """Short pairs lie in one row behind each other, where the NaN of one reaches the others."""
    pair = {"chosen": "yes", "rejected": "no", "score_chosen": 2.0, "score_rejected": 1.0}
    pairs = [{"prompt": f"{i} ", **pair} for i in range(4)]
    pairs[2]["chosen"] += BROKEN
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, Dataset.from_list(pairs), share_prompt="always")
    (batch,) = trainer.get_train_dataloader()
    assert len(batch[SHARED]["of_rows"][0]) < 4
    with pytest.raises(FloatingPointError, match=r"for 1 pair\(s\): row 2 \('2 "):
        trainer.train()


class Begun(TrainerCallback):
    """NaN once, in the pass after a step has begun."""

    values = iter(())

    def on_step_begin(self, args, state, control, **kwargs):
        self.values = iter([math.nan])

    def factor(self):
        return next(self.values, 1.0)


def test_what_does_not_happen_again_is_named_as_it_was(tiny_model, tokenizer, tmp_path):
    """A NaN of the device, not of a row: in the pass that looks for the pair all is well."""
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, rows(4))
    step = Begun()
    trainer.add_callback(step)
    trainer.model.model.norm.register_forward_hook(lambda module, args, output: output * step.factor())
    with pytest.raises(FloatingPointError, match=r"the model's output is NaN or infinite for 4 pair\(s\): row 0"):
        trainer.train()


def test_a_loss_beside_the_pairs_is_watched(tiny_model, tokenizer, tmp_path):
    """As the balance of experts: each pair's own loss is finite, and the gradient is too."""
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, rows(4))
    trainer._extra_loss = lambda pairs: torch.tensor(math.nan)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is NaN or infinite for 4 pair\(s\)"):
        trainer.train()


def test_a_gradient_alone_stops_training(tiny_model, tokenizer, tmp_path):
    """At the first step there is nothing to save."""
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, rows(), save_strategy="epoch")
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"step 1: the gradient is NaN or infinite, .* after step 0\."):
        trainer.train()
    assert_same(weights(trainer), before)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_loss_alone_stops_training(tiny_model, tokenizer, tmp_path):
    """A term from Python that gives NaN: every pair of the batch is named."""

    class Broken(Term):
        name = "broken"

        def __call__(self, view):
            return torch.full_like(view.reward_gap, math.nan)

    config, fine = config_class(None)(**quiet(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0)), Counting()
    trainer = trainer_class(None)(
        load(tiny_model), config, train_dataset=rows(4), processing_class=tokenizer, weight_term=[fine, Broken()]
    )
    with pytest.raises(
        FloatingPointError, match=r"^step 1: weight 'broken' is NaN or infinite for 4 pair\(s\): row"
    ) as error:
        trainer.train()
    assert "Look at these rows" in str(
        error.value
    )  # of a model whose outputs are numbers, which may be a term's doing


def test_rows_keep_their_numbers(tiny_model, tokenizer, tmp_path):
    """Of a set that was shuffled, the numbers are those of the set that the trainer was given."""
    data = rows(12).shuffle(seed=1)
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, data)
    trainer.train()
    lines = list(csv.DictReader((tmp_path / "pair_log.csv").open()))
    for i, line in enumerate(lines):
        assert int(line["row_number"]) == i
        gap = data[i]["score_chosen"] - data[i]["score_rejected"]
        assert float(line["score_gap"]) == pytest.approx(gap)


def test_an_evaluation_leaves_such_pairs_out(tiny_model, tokenizer, tmp_path, caplog):
    """Of eight pairs one cannot be read: the numbers are those of the other seven, and a line says so."""
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, rows(4), eval_dataset=rows(8, broken={3: "rejected"}))
    with caplog.at_level(logging.WARNING):
        found = trainer.evaluate()
    assert "1 of 8 pairs are left out of the evaluation" in caplog.text
    assert found["eval_n_pairs"] == 7
    assert math.isfinite(found["eval_spearman"])


def test_unknown_choice(tmp_path):
    with pytest.raises(ValueError, match="unknown nonfinite_steps 'ignore'; known: stop, skip"):
        config_class("gappo")(**quiet(output_dir=str(tmp_path), nonfinite_steps="ignore"))


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_trls_own_method_is_watched(base, tiny_model, tokenizer, tmp_path):
    """`share_prompt='never'` without a term: the loss is TRL's, and a NaN still does not reach the weights."""
    cls, config = trainer_class(None, base), config_class(None, base)
    args = config(**quiet(output_dir=str(tmp_path), share_prompt="never", max_steps=2))
    common = {"train_dataset": preference_rows(4), "processing_class": tokenizer}
    trainer = cls(load(tiny_model), args=args, **common, **({"ref_model": load(tiny_model)} if base == "dpo" else {}))
    assert trainer.runs_trl
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is NaN or infinite\. share_prompt='auto'"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_broken_reference_is_named(tiny_model, tokenizer, tmp_path):
    """Not the rows, nor the model."""
    trainer = build("gappo", tiny_model, tokenizer, tmp_path, rows(broken={}), "dpo", reward="log-ratio")
    trainer.ref_model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="step 1: the reference model's output is NaN or infinite for 4 pair"):
        trainer.train()
