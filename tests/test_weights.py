"""A step that breaks the weights is found before it is saved or measured; a run that learns nothing says so."""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch
from conftest import load, preference_rows, quiet
from datasets import Dataset
from faults import drop_digests
from peft import LoraConfig, PeftModel, get_peft_model
from said import word_for_word  # noqa: F401 - its messages are held against said/
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from trl_margins.cli import main
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.folder import is_whole
from trl_margins.trainers.learning import Idle, warn_of_schedule, why_no_gradient
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.weights import Sample, broken_names, is_broken, largest

HUGE = 1e30  # learning rate of which AdamW makes weights that no forward pass survives
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}


class Breaks(torch.optim.SGD):
    """Its second step leaves `value` in one element of the fourth tensor."""

    value, steps = math.nan, 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 2:
            self.param_groups[0]["params"][3].data[0, 0] = self.value


def build(folder, tokenizer, out, method="gappo", base="cpo", rows=None, model=None, optimizer=None, **options):
    model = load(folder) if model is None else model
    settings = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 3, "learning_rate": 1e-3}
    config = config_class(method, base)(**quiet(output_dir=str(out), **settings | options))
    return trainer_class(method, base)(
        model,
        args=config,
        train_dataset=preference_rows(8, seed=5) if rows is None else rows,
        eval_dataset=preference_rows(4, seed=6) if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        **({} if optimizer is None else {"optimizers": (optimizer(model.parameters()), None)}),
    )


def of(value):
    """An optimizer whose second step leaves this value."""
    return type("Breaks", (Breaks,), {"value": value, "__init__": lambda self, p: Breaks.__init__(self, p, lr=1e-3)})


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# Weights that a step breaks


@pytest.mark.parametrize(("value", "nonfinite"), [(math.nan, "stop"), (-math.inf, "skip"), (1e30, "stop")])
def test_what_a_step_breaks_is_not_saved(value, nonfinite, tiny_model, tokenizer, tmp_path):
    """The checkpoint before it stays, under `save_total_limit` 1; no row is named, in the next step neither."""
    options = {"optimizer": of(value), "nonfinite_steps": nonfinite}
    trainer = build(tiny_model, tokenizer, tmp_path / "saves", **options, **SAVING)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    name = [name for name, _ in trainer.model.named_parameters()][3]
    message = str(caught.value)
    assert message.startswith(f"step 2 broke 1 of the 21 weight tensors that train, {name} (float32) among them")
    assert "of Breaks with the learning rate 0.001, or a callback at its end, and not" in message
    assert f"The last checkpoint before it is {tmp_path / 'saves' / 'checkpoint-1'}" in message
    assert checkpoints(tmp_path / "saves") == ["checkpoint-1"]
    assert is_whole(tmp_path / "saves" / "checkpoint-1")
    assert trainer.state.global_step == 2
    later = build(tiny_model, tokenizer, tmp_path / "none", **options)  # found with the next step's value
    with pytest.raises(FloatingPointError, match=r"^step 2 broke 1 of the 21 .* No checkpoint was saved before it"):
        later.train()
    assert later.state.global_step == 2
    lines = (tmp_path / "none" / "pair_log.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} <= {"1", "2"}


@pytest.mark.parametrize(
    ("method", "base"),
    [
        *(("gamma-po", "cpo"), ("amapo", "dpo"), ("geometric-anchor", "cpo"), ("simpo-sam", "cpo")),
        *(("gradient-norm", "dpo"), (None, "cpo"), (None, "dpo")),
    ],
)
def test_every_method_blames_the_step(method, base, tiny_model, tokenizer, tmp_path):
    """Also where the next step's measurements come before its forward pass, or TRL's own method computes the loss."""
    own = {"share_prompt": "never"} if method is None else {}
    trainer = build(tiny_model, tokenizer, tmp_path, method, base, learning_rate=HUGE, **own)
    with pytest.raises(
        FloatingPointError, match=r"^step 1 broke 21 of the 21 .* of AdamW with the learning rate 1e\+30"
    ):
        trainer.train()


def test_the_last_step_is_no_exception(tiny_model, tokenizer, tmp_path):
    """Nothing follows it that would see it. Afterwards the model can be neither saved nor evaluated."""
    trainer = build(tiny_model, tokenizer, tmp_path, learning_rate=HUGE, max_steps=1, eval_strategy="no")
    with pytest.raises(FloatingPointError, match=r"^step 1 broke"):
        trainer.train()
    for use in (trainer.save_model, lambda: trainer.evaluate(trainer.train_dataset)):
        with pytest.raises(FloatingPointError, match=r"^step 1 broke"):
            use()
    assert not list(tmp_path.glob("*.safetensors"))
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("steps", [2, 3])
def test_an_evaluation_never_sees_it(steps, tiny_model, tokenizer, tmp_path):
    """With the best model to be loaded at the end, a broken last step is an error still."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": steps}
    trainer = build(tiny_model, tokenizer, tmp_path, optimizer=of(math.nan), **evaluated, **SAVING)
    with pytest.raises(FloatingPointError, match=r"^step 2 broke"):
        trainer.train()
    assert [each["step"] for each in trainer.state.log_history if "eval_loss" in each] == [1]
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_an_adapter_and_accumulated_batches(tiny_model, tokenizer, tmp_path):
    model = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"]))
    window = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = build(tiny_model, tokenizer, tmp_path, model=model, learning_rate=HUGE, **window)
    with pytest.raises(FloatingPointError, match=r"^step 1 broke \d of the 4 .* base_model.*lora_B.*default"):
        trainer.train()


def test_the_command_ends_with_an_error(tiny_model, tmp_path):
    preference_rows(4).to_json(tmp_path / "pairs.jsonl")
    flags = (
        f"--model_name_or_path {tiny_model} --dataset_name {tmp_path / 'pairs.jsonl'} --output_dir {tmp_path / 'out'}"
    )
    flags += " --max_steps 1 --learning_rate 1e30 --warmup_steps 0 --per_device_train_batch_size 4 --max_length 128"
    with pytest.raises(FloatingPointError, match=r"^step 1 broke"):
        main(["train", *flags.split(), "--use_cpu", "true", "--report_to", "none"])
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_checkpoint_with_nan_is_not_resumed(tiny_model, tokenizer, tmp_path, caplog):
    build(tiny_model, tokenizer, tmp_path, **SAVING).train()
    kept = tmp_path / "checkpoint-3"
    build(tiny_model, tokenizer, tmp_path, **SAVING).train(str(kept))  # has no step left
    assert "learnt" not in caplog.text
    damaged = type(load(tiny_model)).from_pretrained(kept)
    damaged.model.norm.weight.data[1] = math.inf
    damaged.save_pretrained(kept)
    drop_digests(tmp_path)  # or it is another file than was saved
    with pytest.raises(
        ValueError, match=r"1 of the 21 .* before step 4, model\.norm\.weight among them: resume from an"
    ):
        build(tiny_model, tokenizer, tmp_path, max_steps=4).train(str(kept))


def test_a_table_with_nan_is_named_with_its_rows(tiny_model, tokenizer, tmp_path):
    model = load(tiny_model)
    model.get_input_embeddings().weight.data[[7, 9], 2] = math.nan
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight among them \(in the rows of 2 tokens, from 7 on"
    ):
        build(tiny_model, tokenizer, tmp_path, model=model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_of_every_dtype(dtype):
    """Values whose squares, or whose sum, would overflow are finite."""
    top = torch.finfo(dtype).max if dtype != torch.float64 else 1e38
    parts = {"a": nn.Parameter(torch.full((4, 4), -top, dtype=dtype)), "b": nn.Parameter(torch.ones(2))}
    parts |= {"none": nn.Parameter(torch.empty(0)), "int": nn.Parameter(torch.ones(2).int(), requires_grad=False)}
    assert largest(parts).item() == pytest.approx(top)
    assert not is_broken(parts)
    assert is_broken(parts, most=top / 2)
    for value in (math.nan, math.inf, -math.inf):
        parts["b"].data[1] = value
        assert broken_names(parts) == ["b"]
        assert is_broken(parts)
    assert not is_broken({})


# Runs that learn nothing


def said(trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer.train()
    return caplog.text


def test_a_first_step_without_a_gradient(tiny_model, tokenizer, tmp_path, caplog):
    """Four ties, then four pairs with a gap: said once, with the term."""
    rows = preference_rows(8, seed=5, scores=lambda i: (3.0, 3.0) if i < 4 else (4.0, 2.0))
    trainer = build(tiny_model, tokenizer, tmp_path, rows=rows, train_sampling_strategy="sequential", max_steps=2)
    text = said(trainer, caplog)
    assert "the gradient of step 1 is exactly 0, and nothing is learnt: weight 'score-gap' is 0 for all 4" in text
    assert text.count("nothing is learnt") == 1


def test_steps_of_one_s_own_without_a_forward_pass(tiny_model, tokenizer, tmp_path, caplog):
    """As of a subclass that skips what it is given."""
    trainer = build(tiny_model, tokenizer, tmp_path, rows=preference_rows(4), max_steps=2)
    trainer.training_step = lambda *args, **kwargs: torch.tensor(0.0)
    assert "step 1 is exactly 0, and nothing is learnt: no pair went through the trainer's" in said(trainer, caplog)


def test_a_loss_that_is_flat(tiny_model, tokenizer, tmp_path, caplog):
    """Pairs that the model ranks rightly, and hinge with a β that lifts their gaps far above 1: said at the first step
    and at the tenth.
    """
    hinge = {"method": None, "loss_type": "hinge", "cpo_alpha": 0.0, "per_device_train_batch_size": 2}
    rows = preference_rows(2, seed=5)
    build(tiny_model, tokenizer, tmp_path / "gaps", rows=rows, max_steps=1, learning_rate=0.0, **hinge).train()
    right = rows.to_list()
    for row in Dataset.from_csv(str(tmp_path / "gaps" / "pair_log.csv")):
        pair = right[row["row_number"]]
        if row["reward_gap"] < 0:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    caplog.clear()
    trainer = build(tiny_model, tokenizer, tmp_path, rows=Dataset.from_list(right), beta=1e5, max_steps=10, **hinge)
    text = said(trainer, caplog)
    assert "the gradient of step 1 is exactly 0, and nothing is learnt: the loss is flat at all 2 pairs, whose" in text
    assert "the gradient of the last 10 steps (up to step 10) is exactly 0" in text
    assert "no weight has changed" not in text  # which needs no further reason


def test_reasons_in_their_order():
    ones, zeros = torch.ones(2), torch.zeros(2)
    reasons = list(why_no_gradient(2, ones > 0, {"weight 'a'": zeros}, zeros, torch.tensor([1.0, 9.0])))
    assert [reason.split(" ")[0] for reason in reasons] == ["both", "weight", "the", "the"]
    assert "whose reward gaps are from 1 to 9: lower beta" in reasons[2]
    small = why_no_gradient(2, None, {"weight 'a'": torch.tensor([-3e-22, 1e-23])}, None, None)
    assert next(small) == "weight 'a' is at most 3e-22 for all 2 pairs"
    (last,) = why_no_gradient(2, ones == 0, {"weight 'a'": ones}, ones, ones)
    assert last.startswith("the loss does not depend on the weights that train")


def test_a_gradient_that_comes_and_goes_is_no_news(caplog):
    idle = Idle()
    for step in range(2, 40):
        idle.gradient(step, is_zero=step % 10 != 0, is_first=False, why=iter(["of ties"]))
    assert not caplog.records
    for step in range(41, 1141):
        idle.gradient(step, is_zero=True, is_first=False, why=iter(["of ties"]))
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"the gradient of the last {n} steps" for n in (10, 100, 1000)
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.0}, "the learning rate is 0 in all 3 steps: nothing is learnt"),
        (
            {"lr_scheduler_type": "linear", "warmup_steps": 0.1, "max_steps": 1},
            "the learning rate is 0 in the only step: lr_scheduler_type 'linear' with warmup_steps=0.1: nothing is",
        ),
        (
            {"lr_scheduler_type": "cosine", "warmup_steps": 100},
            "still rising when training ends: warmup_steps=100 is the whole of its 3 steps, and 2e-05 of 0.001 is",
        ),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 1}, None),
        ({"lr_scheduler_type": "constant", "warmup_steps": 100}, None),
    ],
)
def test_the_learning_rate_of_the_whole_run(options, words, tiny_model, tokenizer, tmp_path, caplog):
    text = said(build(tiny_model, tokenizer, tmp_path, **options), caplog)
    assert words in text if words else "learning rate" not in text


@pytest.mark.parametrize(
    ("dtype", "steps", "words"),
    [
        (
            torch.float32,
            3,
            "up to step 3, .* although there is a gradient: the steps of SGD with the learning rate 1e-30 are",
        ),
        (torch.bfloat16, 12, "up to step 10, .* are lost in the rounding of bfloat16 weights: load them in float32"),
    ],
)
def test_steps_that_change_nothing(dtype, steps, words, tiny_model, tokenizer, tmp_path, caplog):
    """Said once: after ten steps, or at the end of a shorter run."""
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-30), "max_steps": steps}
    small = {"rows": preference_rows(2), "per_device_train_batch_size": 2}
    text = said(build(tiny_model, tokenizer, tmp_path, model=load(tiny_model).to(dtype), **options, **small), caplog)
    assert re.search(f"no weight has changed {words}", text)
    assert text.count("no weight has changed") == 1


class Stops(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **more):
        for group in optimizer.param_groups:
            group["lr"] = 0.0


class Ends(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        control.should_training_stop = True


@pytest.mark.parametrize("saves", [{}, {"save_strategy": "steps", "save_steps": 1}])
def test_a_run_that_ends_in_its_warmup(saves, tiny_model, tokenizer, tmp_path, caplog):
    """Where its schedule would have gone on; also if a checkpoint has looked at the weights before."""
    options = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 5, **saves}
    trainer = build(tiny_model, tokenizer, tmp_path, **options)
    trainer.add_callback(Ends())
    assert "no weight has changed up to step 1, by a sample of each tensor, although" in said(trainer, caplog)


@pytest.mark.parametrize("steps", [3, 15])
def test_a_callback_that_sets_the_rate_to_0(steps, tiny_model, tokenizer, tmp_path, caplog):
    """Which no schedule says."""
    trainer = build(tiny_model, tokenizer, tmp_path, max_steps=steps)
    trainer.add_callback(Stops())
    text = said(trainer, caplog)
    words = "with the learning rate 0 are none: something ends the run in its warm-up, or sets the rate, such as a"
    assert re.search(f"no weight has changed up to step {min(steps, 10)}, .* {words}", text)
    assert text.count("no weight has changed") == 1


def test_a_sample_sees_the_first_step(tiny_model):
    model = load(tiny_model)
    sample = Sample(dict(model.named_parameters()))
    assert sample.is_unchanged()
    model.model.norm.weight.data[5] += 1e-6
    assert not sample.is_unchanged()


def test_an_optimizer_of_something_else(tiny_model, tokenizer, tmp_path, caplog):
    other = load(tiny_model)
    trainer = build(tiny_model, tokenizer, tmp_path, optimizer=lambda p: torch.optim.AdamW(other.parameters()))
    with pytest.raises(ValueError, match="the AdamW that the trainer was given has none of the 21 weight tensors"):
        trainer.train()
    some = build(tiny_model, tokenizer, tmp_path, optimizer=lambda p: torch.optim.AdamW(list(p)[:-1]), max_steps=1)
    assert "lacks 1 of the 21 weight tensors that train, which stay as they are: lm_head.weight is one" in said(
        some, caplog
    )


def test_adapters_that_do_not_train(tiny_model, tokenizer, tmp_path):
    """Loaded without `is_trainable`; switched off."""
    get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"none of the model's 25 .* is_trainable=True"):
        build(tiny_model, tokenizer, tmp_path, model=PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter"))
    off = PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter", is_trainable=True)
    trainer = build(tiny_model, tokenizer, tmp_path, model=off)
    off.base_model.disable_adapter_layers()
    for name, parameter in off.named_parameters():
        parameter.requires_grad_("lora" in name)
    with pytest.raises(ValueError, match=r"the loss depends on none of the 4 weight tensors that train \(base_model"):
        trainer.train()


def test_the_end_of_a_schedule_is_no_warmup(caplog):
    """To a resumed run, whose only step has the schedule's last rate, 0."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    args = TrainingArguments(use_cpu=True, learning_rate=1e-3)
    warn_of_schedule(args, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2)), 2, 3)
    idle = Idle()
    idle.weights(3, "AdamW", 0.0, torch.float32)
    idle.say()
    assert not caplog.messages
    warn_of_schedule(args, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2)), 2, 9)
    assert "the learning rate is 0 in all 7 steps" in caplog.text
    warn_of_schedule(args, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0), 2, 3)
    assert "the learning rate is 0 in the only step" in caplog.text


@pytest.mark.parametrize("rates", [[2e-3, 1e-3], [1e-3, 2e-3]])
def test_of_several_rates_the_highest_is_named(rates, caplog):
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in rates]
    optimizer = torch.optim.SGD([{"params": [each], "lr": rate} for each, rate in zip(weights, rates, strict=True)])
    args = TrainingArguments(use_cpu=True, warmup_steps=8, learning_rate=5e-3)
    warn_of_schedule(args, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 8), 0, 5)
    (message,) = caplog.messages
    assert "warmup_steps=8 is the whole of its 5 steps, and 0.001 of 0.005 is reached" in message
