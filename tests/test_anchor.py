"""GAPO: the anchor against a plain reference, the weights' bytes, low precision, windows, resuming."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import DistributedType
from conftest import assert_same_gradients, load, preference_rows, quiet
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch.func import functional_call
from transformers import LlamaForCausalLM

from trl_margins import distributed
from trl_margins.cli import main as cli
from trl_margins.methods import METHODS
from trl_margins.pairs import PairView, with_columns
from trl_margins.probes.direction import Direction, GradientSum, momentum_direction
from trl_margins.probes.perturbation import perturbed, stochastic_round
from trl_margins.probes.scope import parameters_in_scope
from trl_margins.probes.selection import dataset_anchor_gaps, subsets
from trl_margins.registry import get_method
from trl_margins.terms.anchor import AnchorMargin, GradientNormMargin, anchor_margin, anchor_weight
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

BETA, GAMMA = 2.0, 0.4  # the paper's γ, so β·γ in reward units
GAPO = {"beta": BETA, "gamma_beta_ratio": GAMMA, "anchor_radius": 0.5}


def gapo_trainer(folder, tokenizer, out, base="cpo", method="geometric-anchor", model=None, rows=None, **options):
    fields = {"anchor_batch_multiplier": 2, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    fields |= {**GAPO, **options}
    if method == "simpo-sam":
        fields = {k: v for k, v in fields.items() if k != "anchor_radius"}
    return trainer_class(method, base)(
        load(folder) if model is None else model,
        args=config_class(method, base)(**quiet(output_dir=str(out), **fields)),
        train_dataset=preference_rows(16, seed=2) if rows is None else rows,
        processing_class=tokenizer,
    )


def prepared(trainer):
    """A trainer ready to look at a window, as after the start of `train`."""
    trainer.create_optimizer()
    return trainer


def window(trainer, n=2, size=4):
    rows = trainer.train_dataset
    return [trainer.data_collator([rows[i * size + j] for j in range(size)]) for i in range(n)]


def gaps(trainer, batch):
    return trainer.score_gap(trainer.forward_pairs(trainer._prepare_inputs(batch)))


def reference(trainer, batches, radius=GAPO["anchor_radius"]):
    """GAPO in ten lines of plain fp32: direction, anchor gaps, loss gradient."""
    model = trainer.model
    parameters = dict(model.named_parameters())
    sum(gaps(trainer, b).sum() for b in batches).backward()
    direction = {n: p.grad.clone() for n, p in parameters.items()}
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in direction.values()))
    before = {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter -= radius * direction[name] / norm
        there = [gaps(trainer, b) for b in batches]
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    model.zero_grad()
    fall = [gaps(trainer, b) - t for b, t in zip(batches, there, strict=True)]
    (sum(-F.logsigmoid(BETA * (f - GAMMA)).mean() for f in fall) / len(batches)).backward()
    gradient = {n: p.grad.clone() for n, p in parameters.items()}
    model.zero_grad()
    return [f.detach() for f in fall], gradient


def plain_gaps(logits, labels):
    """Δ of every pair, from the logits of its rows and their labels."""
    target, real = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    logps = logits[:, :-1].log_softmax(-1).gather(-1, target[..., None])[..., 0]
    chosen, rejected = ((logps * real).sum(1) / real.sum(1)).chunk(2)
    return chosen - rejected


def first_order(trainer, batches, radius):
    """ρ times the derivative of each Δ along ∇M̄/‖∇M̄‖: plain transformers in float64, forward-mode differentiation."""
    model = LlamaForCausalLM._from_config(trainer.model.config, attn_implementation="eager").double()
    model.load_state_dict(trainer.model.state_dict())
    rows = [trainer.standard_rows()(batch) for batch in batches]

    def all_gaps(parameters):
        outputs = [functional_call(model, parameters, (ids, mask)) for ids, mask, _ in rows]
        return torch.cat([plain_gaps(out.logits, labels) for out, (*_, labels) in zip(outputs, rows, strict=True)])

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradient = torch.func.grad(lambda moving: all_gaps(moving).mean())(parameters)
    norm = torch.stack([each.square().sum() for each in gradient.values()]).sum().sqrt()
    unit = {name: each / norm for name, each in gradient.items()}
    return radius * torch.func.jvp(all_gaps, (parameters,), (unit,))[1]


def bytes_of(model):
    return {n: p.detach().clone().contiguous().view(torch.uint8) for n, p in model.named_parameters()}


def assert_same_bytes(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# The terms


def test_margin_is_the_reward_gap_at_the_anchor():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        here, there = torch.randn(2, 7, generator=generator).double()
        margin = anchor_margin(BETA * here, here - there, BETA, BETA * GAMMA)
        np.testing.assert_allclose(margin, BETA * there + BETA * GAMMA, rtol=1e-12)
        loss = -F.logsigmoid(BETA * here - margin)
        np.testing.assert_allclose(loss, np.log1p(np.exp(-BETA * ((here - there).numpy() - GAMMA))), rtol=1e-12)


def test_both_forms_of_the_measurement_give_one_margin():
    term, (here, there) = AnchorMargin(BETA, 0.3), torch.randn(2, 5, dtype=torch.float64)
    by_anchor = term(PairView.of_gaps(BETA * here, {"anchor_score_gap": there}, training=True))
    by_gap = term(PairView.of_gaps(BETA * here, {"anchor_gap": here - there}, training=True))
    torch.testing.assert_close(by_anchor, by_gap)


def test_weight_falls_as_the_anchor_gap_grows_and_is_the_loss_gradient():
    gap = torch.linspace(-3, 3, 41, dtype=torch.float64)
    weight = anchor_weight(gap, BETA, BETA * GAMMA)
    assert (weight.diff() < 0).all()
    here = torch.randn(41, dtype=torch.float64, requires_grad=True)
    margin = anchor_margin(BETA * here, gap, BETA, BETA * GAMMA)
    (slope,) = torch.autograd.grad(-F.logsigmoid(BETA * here - margin).sum(), here)
    torch.testing.assert_close(slope, -weight)


@pytest.mark.parametrize("term", [AnchorMargin(BETA, 0.3), GradientNormMargin(BETA, 0.3)])
def test_evaluation_has_simpos_margin_and_training_needs_the_measurement(term):
    assert torch.equal(term(PairView.of_gaps(torch.randn(3))), torch.full((3,), 0.3))
    with pytest.raises(KeyError, match=r"our trainers measure before each optimizer step"):
        term(PairView.of_gaps(torch.randn(3), training=True))


# Against the reference


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("keep", [0, 2])
def test_gaps_weights_and_gradient_are_the_references(base, keep, tiny_model, tokenizer, tmp_path):
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, base, anchor_keep_graphs=keep))
    batches = window(trainer)
    fall, gradient = reference(trainer, batches)
    measured, _ = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    assert all(("cached_pairs" in batch) == bool(keep) for batch in measured)
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.current_gradient_accumulation_steps = 2
    for batch, expected in zip(measured, fall, strict=True):
        trainer.training_step(trainer.model, batch)
        logged = trainer._buffers["train"].drain(trainer.accelerator)
        # a difference of Δs of some 6 nats, each with an error of some last digits (5e-7)
        assert logged["anchor/gap/mean"] == pytest.approx(expected.mean().item(), rel=1e-5, abs=1e-5)
        assert logged["anchor/gap/max"] == pytest.approx(expected.max().item(), rel=1e-5, abs=1e-5)
        weights = anchor_weight(expected, BETA, BETA * GAMMA)
        assert logged["anchor/weight/min"] == pytest.approx(weights.min().item(), rel=1e-4)
    assert_same_gradients({n: p.grad for n, p in trainer.model.named_parameters()}, gradient)


def test_the_gradient_of_a_pair_keeps_its_direction(tiny_model, tokenizer, tmp_path):
    """∇loss_i = −weight_i · ∇Δ_i: one pair a batch shows it."""
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_keep_graphs=0))
    measured, _ = trainer.get_batch_samples(iter(window(trainer, size=1)), 2, trainer.args.device)
    for batch in measured:
        trainer.model.zero_grad()
        gap = gaps(trainer, batch)
        gap.sum().backward()
        own = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        weight = anchor_weight(gap - batch["pair_columns"]["anchor_score_gap"], BETA, BETA * GAMMA)
        assert_same_gradients(
            {n: p.grad for n, p in trainer.model.named_parameters()}, {n: -weight * g for n, g in own.items()}
        )


@pytest.mark.parametrize("estimator", ["difference", "float32", "per-pair"])
def test_radius_zero_weighs_all_pairs_alike(estimator, tiny_model, tokenizer, tmp_path):
    options = {"anchor_radius": 0.0, "anchor_estimator": estimator}
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, **options))
    measured, _ = trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    trainer.compute_loss(trainer.model.train(), measured[0])
    logged = trainer._buffers["train"].drain(trainer.accelerator)
    constant = BETA / (1 + math.exp(-BETA * GAMMA))
    assert logged["anchor/gap/max"] == pytest.approx(0, abs=1e-5)
    assert logged["anchor/weight/min"] == pytest.approx(constant, rel=1e-4)
    assert logged["anchor/weight/max"] == pytest.approx(constant, rel=1e-4)


def anchor_gaps(trainer, batches, radius, estimator):
    trainer.options.anchor_radius = radius
    probe = trainer._probes[0]
    trainer.options.anchor_estimator = estimator
    probe.__dict__.pop("_upcasts", None)
    direction, _ = probe._direction([dict(b) for b in batches])
    here = [gaps(trainer, b).detach() for b in batches]
    measured = probe.measure(batches, direction)
    return torch.cat(
        [
            m["anchor_gap"] if "anchor_gap" in m else h - m["anchor_score_gap"]
            for h, m in zip(here, measured, strict=True)
        ]
    )


def test_the_difference_is_of_first_order_and_curvature(tiny_model, tokenizer, tmp_path):
    """Halving the radius divides by 4 what the difference has beside the derivative."""
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=load(tiny_model).double()))
    batches = window(trainer)

    def curvature(radius):
        difference = anchor_gaps(trainer, batches, radius, "difference")
        return (first_order(trainer, batches, radius) - difference).abs().max().item()

    assert curvature(0.02) / curvature(0.01) == pytest.approx(4, rel=0.1)


def test_log_ratio_reward_falls_by_its_own_gap(tiny_model, tokenizer, tmp_path):
    """On DPO's reward Γ is the fall of the log-ratio gap, in which the reference cancels."""
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, "dpo", reward="log-ratio", anchor_radius=0.05))
    batches = window(trainer)
    _, gradient = reference(trainer, batches, radius=0.05)
    measured, _ = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 2
    for batch in measured:
        trainer.training_step(trainer.model, batch)
    # summed over the answers, log-ratios have fewer digits than means
    assert_same_gradients({n: p.grad for n, p in trainer.model.named_parameters()}, gradient, rtol=2e-4)


# The weights come back


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, None])
def test_weights_come_back_bit_for_bit(dtype, error, tiny_model):
    model = load(tiny_model).to(dtype)
    before = bytes_of(model)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with pytest.raises(error) if error else nullcontext(), perturbed(model, direction, 0.1):
        moved = sum(not torch.equal(before[n], value) for n, value in bytes_of(model).items())
        if error:
            raise error("inside")
    assert moved == len(before)
    assert_same_bytes(before, bytes_of(model))


def test_weights_come_back_when_moving_them_fails(tiny_model, monkeypatch):
    """Out of memory while the weights are being moved: those that have moved return."""
    model = load(tiny_model)
    before, calls = bytes_of(model), []
    from trl_margins.probes import perturbation

    move = perturbation.move

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("no memory")
        move(*args, **kwargs)

    monkeypatch.setattr(perturbation, "move", fails)
    with (
        pytest.raises(torch.OutOfMemoryError),
        perturbed(model, {n: p.data for n, p in model.named_parameters()}, 1.0),
    ):
        raise AssertionError("never entered")
    assert_same_bytes(before, bytes_of(model))


@pytest.mark.parametrize("estimator", ["difference", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_an_anchor_pass_that_fails_leaves_nothing_behind(estimator, dtype, error, tiny_model, tokenizer, tmp_path):
    """Whatever pass of the window it is that fails: bytes, dtypes, gradients and modes are as before."""
    model = load(tiny_model).to(dtype)
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=model, anchor_estimator=estimator))
    before, forward = bytes_of(model), trainer.pair_logps
    for failing in range(1, 5):
        calls = []

        def fails(model, batch, failing=failing, calls=calls):
            calls.append(batch)
            if len(calls) == failing:
                raise error("inside")
            return forward(model, batch)

        trainer.pair_logps = fails
        with pytest.raises(error):
            trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
        assert_same_bytes(before, bytes_of(model))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(p.grad is None for p in model.parameters())
        assert model.training
        assert all(module.training for module in model.modules())


def test_a_direction_that_is_none_of_the_models_is_refused(tiny_model):
    model = load(tiny_model)
    with (
        pytest.raises(ValueError, match="'head', which is not a parameter"),
        perturbed(model, {"head": torch.ones(1)}, 1.0),
    ):
        pass
    with pytest.raises(ValueError, match=r"shape \(3,\)"), perturbed(model, {"lm_head.weight": torch.ones(3)}, 1.0):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-8, 4, (2000,), generator=generator)
    values = torch.cat([scales * torch.randn(2000, generator=generator), torch.tensor([0.0, 1.0, -1e-9, 65504.0])])
    generators = (torch.Generator().manual_seed(seed) for seed in range(1000))
    draws = torch.stack([stochastic_round(values, dtype, generator).double() for generator in generators])
    lower, upper = draws.min(0).values, draws.max(0).values
    near = values.to(dtype)
    step = (torch.nextafter(near, torch.full_like(near, torch.inf)).double() - near.double()).abs()
    assert ((draws - values).abs() <= step * 2 + 1e-30).all()
    assert all(len(column.unique()) <= 2 for column in draws.T[:50])
    on_grid = near.double() == values
    assert (lower == upper)[on_grid].all()
    # five standard errors of a mean of 1000 draws; to nearest it would be off by up to half a step
    assert ((draws.mean(0) - values).abs() <= 0.08 * step).all()


def test_a_move_below_the_rounding_step_is_felt_in_bf16(tiny_model):
    """Round-to-nearest would leave every weight where it is."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.copy_(torch.rand(300, 300) + 1)  # steps of 2^-7
    before = model.weight.detach().float().clone()
    move = torch.full((300, 300), 1e-4)
    assert torch.equal((before + move).bfloat16().float(), before)
    with perturbed(model, {"weight": move}, 1.0):
        # five standard errors of the mean of 90,000 draws, one in 78 of which is a step
        assert (model.weight.float() - before).mean().item() == pytest.approx(1e-4, rel=0.15)


@pytest.mark.rehearsal
@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("regime", ["bfloat16", "float16", "autocast"])
def test_anchor_gaps_survive_16_bits(regime, head, tiny_model, tokenizer, tmp_path, monkeypatch):
    """Within 10 % of float32 in the mean and in nearly its order, where rounded weights would be far off."""
    monkeypatch.setattr(trainer_class("geometric-anchor"), "_plain_head_will_do", head == "logits")
    rows = preference_rows(64, seed=5)
    model = load(tiny_model) if regime == "autocast" else load(tiny_model).to(getattr(torch, regime))
    options = {"rows": rows, "anchor_radius": 0.05, "anchor_batch_multiplier": 8}
    exact = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=load(tiny_model), **options))
    ours = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=model, bf16=regime == "autocast", **options))
    if regime == "autocast":
        ours.model = ours.accelerator.prepare_model(ours.model)
    batches = window(ours, n=8, size=8)
    expected = anchor_gaps(exact, batches, 0.05, "difference")
    before, forwards = bytes_of(model), {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    measured = anchor_gaps(ours, batches, 0.05, "difference")
    assert_same_bytes(before, bytes_of(model))
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == forwards
    assert measured.mean().item() == pytest.approx(expected.mean().item(), rel=0.1)
    assert spearmanr(measured, expected).statistic >= 0.97
    # float32 forward passes are exact, along a direction from 16 bits, whose kernels differ from CPU to CPU
    in_float32 = anchor_gaps(ours, batches, 0.05, "float32")
    torch.testing.assert_close(in_float32, expected, rtol=0.1, atol=6e-3)


# Windows, directions, scopes


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_a_window_shorter_than_k_has_a_direction_of_its_own(base, n, tiny_model, tokenizer, tmp_path):
    """Plain autograd over its own pairs gives it: whatever windows came before it have no part in it."""
    options = {"gradient_accumulation_steps": n, "anchor_batch_multiplier": 8, "anchor_keep_graphs": 0}
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, base, max_steps=2, learning_rate=1e-2, **options)
    trainer.train()
    batches = window(trainer, n=4)
    for own in (batches[:n], batches[2 : 2 + n]):
        expected, _ = reference(trainer, own)
        found, _ = trainer.get_batch_samples(iter(own), n, trainer.args.device)
        for batch, raw, gap in zip(found, own, expected, strict=True):
            measured = gaps(trainer, raw).detach() - batch["pair_columns"]["anchor_score_gap"]
            torch.testing.assert_close(measured, gap, rtol=1e-4, atol=1e-5)
    alone, together = (reference(trainer, some)[0][0] for some in (batches[:1], batches))
    assert not torch.allclose(alone, together, rtol=1e-2)  # the difference would be seen


def test_a_direction_that_is_none_makes_no_step():
    for vector in (torch.zeros(2), torch.tensor([torch.nan, 1.0]), torch.tensor([torch.inf, 1.0])):
        assert Direction.along({"w": vector}).per_unit == 0
    assert Direction.along({"w": torch.tensor([3.0, 4.0])}).per_unit.item() == pytest.approx(0.2)


def test_gradients_are_scaled_on_their_way_in_fp16():
    """As GradScaler does for the update: the result is the same, the way there does not underflow."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    seen = []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    gradients = GradientSum(SimpleNamespace(scaler=scaler, distributed_type=DistributedType.NO), {"w": weight})
    for expected in (1, 2):
        gradients.add((3 * weight).sum())
        assert torch.equal(weight.grad, torch.full((2,), 3.0 * expected))
    assert all(torch.equal(gradient, torch.full((2,), 3072.0)) for gradient in seen)


def test_direction_from_momentum_needs_no_gradient_pass(tiny_model, tokenizer, tmp_path):
    trainer = gapo_trainer(
        tiny_model, tokenizer, tmp_path, anchor_direction="momentum", max_steps=1, learning_rate=1e-3
    )
    trainer.train()
    calls, forward = [], trainer.pair_logps
    trainer.pair_logps = lambda *a: calls.append(torch.is_grad_enabled()) or forward(*a)
    trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    assert calls == [False, False]
    direction = momentum_direction(trainer.optimizer, trainer._probes[0].parameters)
    momentum = {id(p): state["exp_avg"] for p, state in trainer.optimizer.state.items()}
    for name, parameter in trainer.model.named_parameters():
        assert direction.vectors[name] is momentum[id(parameter)]  # no copy
        pointed = direction.per_unit * direction.vectors[name]
        torch.testing.assert_close(pointed, -momentum[id(parameter)] / direction.norm)


@pytest.mark.parametrize(("optim", "name"), [("adafactor", "Adafactor"), ("sgd", "SGD"), ("rmsprop", "RMSprop")])
def test_an_optimizer_without_momentum_is_named(optim, name, tiny_model, tokenizer, tmp_path):
    """Before the first step."""
    options = {"anchor_direction": "momentum", "optim": optim, "max_steps": 2, "learning_rate": 1e-3}
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match=rf"a momentum, and {name} has none here: use adamw_torch"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("optim", ["sgd", "rmsprop"])
def test_an_optimizer_that_is_given_a_momentum(optim, tiny_model, tokenizer, tmp_path):
    """As the error says."""
    options = {"anchor_direction": "momentum", "optim": optim, "max_steps": 2, "learning_rate": 1e-3}
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, optim_args="momentum=0.9", **options)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("scope", "moves"),
    [
        ("lm-head", r"lm_head\.weight"),
        (r"layers\.1\.", r"layers\.1\."),
        (None, "."),
        (["lm-head", "mlp"], "lm_head|mlp"),
    ],
)
def test_only_the_scope_moves(scope, moves, tiny_model, tokenizer, tmp_path):
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_scope=scope))
    expected = {name for name, _ in trainer.model.named_parameters() if re.search(moves, name)}
    assert expected
    assert set(trainer._probes[0].parameters) == expected
    direction, _ = trainer._probes[0]._direction(window(trainer))
    assert set(direction.vectors) == expected
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_scope_in_which_nothing_trains_is_refused(tiny_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"anchor_scope=\['lm-head'\] holds none of the"):
        gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_scope="lm-head", train_only="mlp")
    with pytest.raises(ValueError, match="anchor_scope pattern 'heads' matches none"):
        gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_scope="heads")


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchor_radius": -0.1},
        {"anchor_radius": math.nan},
        {"anchor_batch_multiplier": 0},
        {"anchor_estimator": "guess"},
        {"anchor_direction": "up"},
        {"sam_radius": -1.0},
    ],
)
def test_bad_options_are_named(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config_class("geometric-anchor")(**quiet(output_dir=str(tmp_path), **wrong))


def test_only_trained_parameters_are_in_scope(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(tiny_model), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert all("lora_" in name for name in parameters_in_scope(model, None))


@pytest.mark.parametrize("estimator", ["difference", "float32", "per-pair"])
def test_adapters_are_what_moves(estimator, tiny_model, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(load(tiny_model), config)
    options = {"max_steps": 2, "learning_rate": 1e-2, "anchor_estimator": estimator}
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, model=model, **options)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in frozen.items())
    assert trainer.state.log_history[0]["anchor/gap/mean"] > 0


# Resuming


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_goes_on_bit_for_bit(accumulation, tiny_model, tokenizer, tmp_path):
    options = {
        "gradient_accumulation_steps": accumulation,
        "anchor_batch_multiplier": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "train_sampling_strategy": "random",
    }
    rows = preference_rows(32, seed=2)

    def trained(out, resume=None):
        trainer = gapo_trainer(tiny_model, tokenizer, out, rows=rows, max_steps=4, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not [file.name for file in checkpoint.iterdir() if "anchor" in file.name]  # the direction is not remembered
    resumed = trained(tmp_path / "resumed", resume=str(checkpoint))
    assert_same_bytes(bytes_of(whole.model), bytes_of(resumed.model))


# The controls


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_gradient_norms_are_those_of_one_pair_at_a_time(base, tiny_model, tokenizer, tmp_path):
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, base, method="gradient-norm"))
    batches = window(trainer)
    measured, _ = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    norms = []
    for batch in batches:
        for i in range(4):
            trainer.model.zero_grad()
            gaps(trainer, batch)[i].backward()
            norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in trainer.model.parameters())))
    expected = np.array(norms) / np.mean(norms)
    ours = torch.cat([batch["pair_columns"]["relative_gradient_norm"] for batch in measured])
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_sam_takes_the_gradient_at_the_worse_policy(tiny_model, tokenizer, tmp_path):
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, method="simpo-sam", sam_radius=0.3))
    batches = window(trainer)
    model = trainer.model
    before = bytes_of(model)

    def loss():
        return sum(-F.logsigmoid(BETA * (gaps(trainer, b) - GAMMA)).mean() for b in batches) / 2

    loss().backward()
    ascent = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in ascent.values()))
    model.zero_grad()
    with perturbed(model, ascent, 0.3 / norm):
        loss().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    measured, _ = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 2
    for batch in measured:
        trainer.training_step(model, batch)
    assert_same_gradients({n: p.grad for n, p in model.named_parameters()}, expected)
    assert_same_bytes(before, bytes_of(model))


# Together with the rest


def test_sam_goes_with_the_anchor(tiny_model, tokenizer, tmp_path):
    """The update is made at SAM's policy: no forward pass of the policy itself is kept for it."""
    options = {"sam_radius": 0.3, "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 1e-2}
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, **options)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[1]["loss"])
    with pytest.raises(
        ValueError, match="'per-pair' makes the update at the policy, and sam_radius makes it elsewhere"
    ):
        gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_estimator="per-pair", sam_radius=0.3)


def test_any_weight_goes_with_the_anchor(tiny_model, tokenizer, tmp_path):
    plain = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_keep_graphs=0))
    weighted = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, weight="score-gap", anchor_keep_graphs=0))
    measured, _ = plain.get_batch_samples(iter(window(plain)), 2, plain.args.device)
    both, _ = weighted.get_batch_samples(iter(window(weighted)), 2, weighted.args.device)
    inputs = [t._prepare_inputs(m[0]) for t, m in ((plain, measured), (weighted, both))]
    outputs = [
        t.objective(
            t.pair_logps(t.model, {k: v for k, v in b.items() if k != "pair_columns"}),
            b["pair_columns"],
            training=True,
        )
        for t, b in zip((plain, weighted), inputs, strict=True)
    ]
    columns = inputs[1]["pair_columns"]
    gap = (columns["score_chosen"] - columns["score_rejected"]).abs()
    torch.testing.assert_close(outputs[1].losses, gap * outputs[0].losses)


def test_evaluation_during_training_asks_for_no_anchor(tiny_model, tokenizer, tmp_path):
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, max_steps=1)
    trainer.eval_dataset = trainer.train_dataset
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert "eval_anchor/gap/mean" not in metrics


def test_the_papers_table():
    row = get_method("geometric-anchor")
    assert row.defaults["anchor_radius"] == 0.05
    assert row.defaults["anchor_batch_multiplier"] == 8
    assert row.settings["Llama-3-8B-Instruct"] == {"beta": 2.5, "gamma_beta_ratio": 0.55, "learning_rate": 1e-6}
    assert row.defaults["per_device_train_batch_size"] * row.defaults["gradient_accumulation_steps"] == 128
    assert {"gradient-norm", "simpo-sam"} <= METHODS.keys()


# Pair by pair


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_cached_gradients_give_the_first_order_and_the_same_update(base, tiny_model, tokenizer, tmp_path):
    """One backward pass per pair, and none after: gaps as by forward-mode differentiation, gradients as by the usual
    update."""
    plain, cached = (
        prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, base, anchor_estimator=estimator, anchor_radius=0.05))
        for estimator in ("difference", "per-pair")
    )
    batches = window(plain)
    expected = first_order(plain, batches, 0.05).float().split(4)
    measured, _ = cached.get_batch_samples(iter(batches), 2, cached.args.device)
    for batch, gap in zip(measured, expected, strict=True):
        torch.testing.assert_close(batch["pair_columns"]["anchor_gap"], gap, rtol=1e-4, atol=1e-5)
    cached.token_logps = None  # there is no further forward pass
    usual = [with_columns(batch, {"anchor_gap": gap}) for batch, gap in zip(batches, expected, strict=True)]
    losses = []
    for trainer, some in ((plain, usual), (cached, measured)):
        trainer.current_gradient_accumulation_steps = 2
        losses.append(torch.stack([trainer.training_step(trainer.model, batch) for batch in some]))
    torch.testing.assert_close(*losses)
    gradients, others = ({n: p.grad for n, p in trainer.model.named_parameters()} for trainer in (cached, plain))
    assert_same_gradients(gradients, others, rtol=1e-4)
    theirs, mine = (t._buffers["train"].drain(t.accelerator) for t in (plain, cached))
    for name in ("rewards/margins", "logps/chosen", "anchor/gap/mean", "target_margins/std"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_cached_gradients_are_refused_where_the_loss_reads_more_than_the_gap(tiny_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'per-pair' makes the update from the gradients of the length-normalized"):
        gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_estimator="per-pair", cpo_alpha=1.0)


# What anchor gaps are made of


def diagnosed(folder):
    return pd.read_csv(folder / "anchor_diagnostics.csv").to_dict("records")


def test_diagnostics_take_the_anchor_gap_apart(tiny_model, tokenizer, tmp_path):
    options = {"anchor_radius": 0.05, "anchor_diagnostics": 2}
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, **options))
    batches = window(trainer)
    trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    trainer.state.global_step = 1
    trainer.get_batch_samples(iter(batches), 2, trainer.args.device)  # not due
    trainer.log({})
    rows = diagnosed(tmp_path)
    assert len(rows) == 8
    exact = anchor_gaps(trainer, batches, 0.05, "difference")
    derivative = first_order(trainer, batches, 0.05)
    for row, gap, first in zip(rows, exact.tolist(), derivative.tolist(), strict=True):
        assert row["anchor_gap"] == pytest.approx(gap, abs=1e-5)
        assert row["first_order"] == pytest.approx(first, abs=1e-5)
        assert row["curvature"] == pytest.approx(gap - first, abs=1e-5)
        assert row["first_order"] == pytest.approx(0.05 * row["gradient_norm"] * row["alignment"], rel=1e-4)
        assert {"step", "score_chosen", "score_rejected"} <= row.keys()


# Selecting


def test_select_ranks_a_set_by_its_anchor_gaps(tiny_model, tmp_path, capsys):
    rows = preference_rows(10, "conversational", seed=9)
    rows.to_json(tmp_path / "pairs.jsonl")
    arguments = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    options = ["--batch_size", "2", "--anchor_batch_multiplier", "2", "--anchor_radius", "0.5", "--max_length", "128"]
    assert cli([*arguments, "--output_dir", str(tmp_path / "out"), "--fraction", "0.4", *options]) == 0
    parts = {name: read_rows(tmp_path / "out" / f"{name}.jsonl") for name in ("all", "stable", "unstable", "random")}
    assert [{name: row[name] for name in rows.column_names} for row in parts["all"]] == rows.to_list()
    gaps = np.array([row["anchor_gap"] for row in parts["all"]])
    assert {len(parts[name]) for name in ("stable", "unstable", "random")} == {4}
    assert sorted(row["anchor_gap"] for row in parts["stable"]) == sorted(gaps)[:4]
    assert sorted(row["anchor_gap"] for row in parts["unstable"]) == sorted(gaps)[-4:]
    assert "stable         4 pairs" in capsys.readouterr().out


def test_select_takes_an_adapter(tiny_model, tokenizer, tmp_path):
    preference_rows(4, seed=9).to_json(tmp_path / "pairs.jsonl")
    get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    arguments = ["select", "--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")]
    options = ["--batch_size", "2", "--anchor_batch_multiplier", "2", "--anchor_radius", "0.5", "--max_length", "128"]
    assert cli([*arguments, "--dataset_name", str(tmp_path / "pairs.jsonl"), "--fraction", "0.5", *options]) == 0
    assert all(row["anchor_gap"] != 0 for row in read_rows(tmp_path / "out" / "all.jsonl"))


def test_selected_gaps_are_those_of_the_reference(tiny_model, tokenizer, tmp_path):
    """Groups of two mini-batches, the last one of three."""
    rows = preference_rows(10, seed=9)
    options = {"per_device_train_batch_size": 2, "anchor_keep_graphs": 0, "rows": rows}
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, **options)
    batches = window(trainer, n=5, size=2)
    expected = [gap for group in (batches[:2], batches[2:]) for gap in reference(trainer, group)[0]]
    np.testing.assert_allclose(dataset_anchor_gaps(trainer), torch.cat(expected), rtol=1e-3, atol=1e-5)


def test_selected_gaps_of_a_short_last_mini_batch(tiny_model, tokenizer, tmp_path):
    """Ten pairs by four: accelerate cuts what it gathers at the end to the last mini-batch's size."""
    rows = preference_rows(10, seed=9)
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_keep_graphs=0, rows=rows)
    batches = [
        trainer.data_collator([trainer.train_dataset[i] for i in some]) for some in (range(4), range(4, 8), (8, 9))
    ]
    expected = reference(trainer, batches)[0]  # the third joins the first two
    np.testing.assert_allclose(dataset_anchor_gaps(trainer), torch.cat(expected), rtol=1e-3, atol=1e-5)


def test_select_leaves_out_what_training_drops(tiny_model, tmp_path, capsys):
    rows = preference_rows(8, seed=9).to_list()
    whole = [row for i, row in enumerate(rows) if i != 2]
    rows[2]["prompt"] = "a" * 200
    options = ["--batch_size", "2", "--anchor_batch_multiplier", "2", "--max_length", "128", "--fraction", "0.5"]
    found = {}
    for name, some in {"with": rows, "without": whole}.items():
        Dataset.from_list(some).to_json(tmp_path / f"{name}.jsonl")
        model = ["--model_name_or_path", tiny_model, "--output_dir", str(tmp_path / name)]
        assert cli(["select", "--dataset_name", str(tmp_path / f"{name}.jsonl"), *model, *options]) == 0
        found[name] = {part: read_rows(tmp_path / name / f"{part}.jsonl") for part in ("all", "stable", "unstable")}
        assert ("1 of 8 pairs could not be measured" in capsys.readouterr().out) == (name == "with")
    assert found["with"] == found["without"]
    assert [row["prompt"] for row in found["with"]["all"]] == [row["prompt"] for row in whole]


def test_select_checks_the_fraction_of_what_is_left(tiny_model, tmp_path):
    """Before it measures: of four pairs a quarter is one, of one pair none."""
    long = [{**row, "prompt": "a" * 200} for row in preference_rows(3).to_list()]
    Dataset.from_list([*preference_rows(1).to_list(), *long]).to_json(tmp_path / "pairs.jsonl")
    arguments = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    with pytest.raises(ValueError, match=r"leave a row of 1, not 0\.25"):
        cli([*arguments, "--output_dir", str(tmp_path / "out"), "--fraction", "0.25", "--max_length", "128"])


def test_select_takes_every_number_of_rows(tiny_model, tmp_path):
    """With the measuring itself, and pairs that are dropped at the beginning, in the middle or at the end."""
    for n in (2, 3, 5, 6, 9, 31, 38):
        rows = preference_rows(n, seed=n).to_list()
        dropped = {n // 2, n - 1} if n % 2 else {0}
        for i in dropped if n > 3 else {0}:
            rows[i]["prompt"] = "a" * 200
        Dataset.from_list(rows).to_json(tmp_path / f"{n}.jsonl")
        argv = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / f"{n}.jsonl")]
        argv += ["--output_dir", str(tmp_path / str(n)), "--batch_size", "4", "--anchor_batch_multiplier", "2"]
        few = "0.37" if n > 3 else "1"
        assert cli([*argv, "--fraction", few, "--max_length", "128"]) == 0
        parts = {name: read_rows(tmp_path / str(n) / f"{name}.jsonl") for name in ("all", "stable", "unstable")}
        kept = [row["prompt"] for row in rows if len(row["prompt"]) < 200]
        assert [row["prompt"] for row in parts["all"]] == kept
        assert len(parts["stable"]) == len(parts["unstable"]) == round(float(few) * len(kept))
        assert all(math.isfinite(row["anchor_gap"]) for row in parts["all"])
        assert not (tmp_path / str(n) / "measured.json").exists()


def test_select_loses_nothing_that_was_measured(tiny_model, tmp_path):
    """The last part cannot be written: the gaps are in a file that the error names."""
    preference_rows(4, seed=9).to_json(tmp_path / "pairs.jsonl")
    out = tmp_path / "out"
    (out / "random.jsonl").mkdir(parents=True)
    arguments = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    with pytest.raises(
        RuntimeError, match=r"the parts could not be written .*random.* is in .*measured\.json: 'row_num"
    ):
        cli([*arguments, "--output_dir", str(out), "--fraction", "0.5", "--max_length", "128"])
    kept = json.loads((out / "measured.json").read_text())
    assert kept["row_number"] == [0, 1, 2, 3]
    assert kept["anchor_gap"] == pytest.approx([row["anchor_gap"] for row in read_rows(out / "all.jsonl")])


def test_select_whose_reader_leaves(tiny_model, tmp_path, monkeypatch):
    preference_rows(4, seed=9).to_json(tmp_path / "pairs.jsonl")
    argv = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    monkeypatch.setattr(
        sys, "argv", ["trl-margins", *argv, "--output_dir", str(tmp_path / "o"), "--max_length", "128"]
    )
    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        assert cli() == 0
    names = ["all.jsonl", "random.jsonl", "stable.jsonl", "unstable.jsonl"]
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == names


def test_select_reads_named_columns_and_the_trained_length(tiny_model, tmp_path, caplog):
    rows = preference_rows(4, seed=9).rename_columns(
        {"prompt": "question", "score_chosen": "good", "score_rejected": "bad"}
    )
    rows.add_column("system", ["be brief"] * 4).to_json(tmp_path / "pairs.jsonl")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    of_no_anchor = {"config": {"max_length": 96, "anchor_radius": 0.3}, "margin": "dynamic-target"}
    (model / "margin_run.json").write_text(json.dumps(of_no_anchor))
    arguments = ["select", "--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    named = ["--prompt_column", "question", "--system_column", "system", "--score_columns", "good", "bad"]
    with caplog.at_level("INFO", logger="trl_margins"):
        assert cli([*arguments, "--output_dir", str(tmp_path / "out"), "--fraction", "0.5", *named]) == 0
    assert "max_length=96, with which the model was trained" in caplog.text
    assert "anchor_radius" not in caplog.text
    assert "column 'question' holds the prompts" in caplog.text
    assert "is not used" not in caplog.text  # as the system message would be
    assert len(read_rows(tmp_path / "out" / "all.jsonl")) == 4
    with pytest.raises(ValueError, match=r"score_columns names \['worse'\]"):
        cli([*arguments, "--output_dir", str(tmp_path / "out"), *named[:-1], "worse"])


def test_a_fraction_that_is_none_is_refused():
    for fraction in (0, -1, 1.5, 0.01):
        with pytest.raises(ValueError, match="fraction must be in"):
            subsets(np.arange(10.0), fraction)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parameters_that_cannot_be_reached_are_refused(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Before the first step: a ZeRO-3 that leaves other marks on its parameters, and FSDP1, which wraps the model."""
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path / "zero3")
    for parameter in trainer.model.parameters():
        parameter.ds_id = 0
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is partitioned by a ZeRO-3 without ds_tensor"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path / "fsdp1")
    monkeypatch.setattr(distributed, "FullyShardedDataParallel", type(trainer.model))
    with pytest.raises(ValueError, match=r"FSDP1 keeps no parameters by name.*set fsdp_version to 2"):
        trainer.train()
