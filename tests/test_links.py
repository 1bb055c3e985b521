"""Links beside the terms: the columns and options that they read, and the pairs that a term leaves no loss."""

from __future__ import annotations

import logging
import re
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows, quiet
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins import Link, MarginCPOTrainer, MarginDPOTrainer, Objective, config_class
from trl_margins.links import LINKS, TRLS, LossInputs
from trl_margins.pairs import PairLogps
from trl_margins.rewards import (
    REWARDS,
    LengthNormalizedReward,
    LogRatioReward,
    MeanLogRatioReward,
    Reward,
    SummedReward,
)
from trl_margins.rows.scores import ScoreError
from trl_margins.terms.adaptive import AdaptiveMargin
from trl_margins.terms.anchor import AnchorMargin
from trl_margins.terms.baselines import ScoreOffsetMargin
from trl_margins.terms.column import ColumnMargin, ColumnWeight
from trl_margins.terms.dynamic_target import DynamicTargetMargin
from trl_margins.terms.score_gap import ScoreGapWeight
from trl_margins.trainers.card import _registered
from trl_margins.trainers.objectives import objective_of
from trl_margins.trainers.preparation import with_checked_columns

HEARS = "INFO"
HARD = Link("hard", lambda x: torch.nn.functional.softplus(-x.z) * x.view["hard"], True, columns=("hard",))
CHOSEN, REJECTED = torch.tensor([-6.0, -3.0, -5.0, -4.0]), torch.tensor([-5.0, -7.0, -5.5, -4.2])
GAP = (CHOSEN - REJECTED).double().numpy()  # of the log-ratios: the reference has 0
OFFSETS = {"score_chosen": torch.tensor([5.0, 3.0, 4.0, 1.0]), "score_rejected": torch.tensor([3.0, 3.0, 1.5, 2.0])}


def pairs(grad: bool = False) -> PairLogps:
    logps = [each.clone().requires_grad_(grad) for each in (CHOSEN, REJECTED)]
    lengths = torch.tensor([3, 4, 2, 5]), torch.tensor([4, 3, 3, 2])
    return PairLogps(*logps, *lengths, torch.zeros(4), torch.zeros(4), sft_loss=torch.tensor(1.5))


def dpo(link: Any, **settings: Any) -> Objective:
    return Objective(LogRatioReward(), link, **{"beta": 0.3, **settings})


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0, -x)


def prepared(method: str, train: Any, evals: Any, tokenizer: Any, out: Any, base: str | None = None, **given: Any):
    """Builds a trainer whose model is not there: an error of the data comes first."""
    objective = given.pop("objective", None)
    config = config_class(None if method == "none" else method, base)(**quiet(output_dir=str(out), **given))
    cls = MarginCPOTrainer if config._base == "cpo" else MarginDPOTrainer
    data = {"train_dataset": train, "eval_dataset": evals, "processing_class": tokenizer}
    cls("/no/such/model", args=config, objective=objective, **data)


# Columns


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (None, r"loss_type 'hard' needs the columns \['hard'\], and the {split} data set has only"),
        ([1.0, None, 2.0, 1.0], "column 'hard', row 1 of the {split} data set: the value None is None: drop the row"),
        (["1", "2", "much", "1"], "column 'hard', row 2 of the {split} data set: the value 'much' is not a number"),
    ],
)
def test_the_columns_of_a_link_are_checked(split, values, problem, tokenizer, tmp_path):
    rows = preference_rows(4)
    good = rows.add_column("hard", [1.0] * 4)
    bad = rows if values is None else rows.add_column("hard", values)
    sets = (bad, good) if split == "train" else (good, bad)
    with pytest.raises(ValueError, match=problem.format(split=split)):
        prepared(
            *("none", *sets, tokenizer, tmp_path, "cpo"),
            objective=Objective(LengthNormalizedReward(), HARD, 1.0),
        )


def test_the_columns_of_a_link_are_checked_in_a_stream(tokenizer, tmp_path):
    stream = preference_rows(4).add_column("hard", [1.0, 1.0, float("nan"), 1.0]).to_iterable_dataset()
    objective = Objective(LengthNormalizedReward(), HARD, 1.0)
    with pytest.raises(ScoreError, match="column 'hard', row 2 of the eval data set: the value nan is NaN"):
        list(with_checked_columns(stream, "eval", objective))


# Evaluation sets without scores


@pytest.mark.parametrize(
    ("losses", "weights", "left"),
    [
        (["sigmoid", "reward_aware"], [1.0, 0.25], {"sigmoid": 1.0}),
        (["hinge", "reward_aware"], [0.5, 0.25], {"hinge": 0.5}),
        (["reward_aware"], [0.25], {"sigmoid": 0.25}),
        (["reward_aware", "sft"], [1.0, 0.5], {"sigmoid": 1.0, "sft": 0.5}),
        (["sigmoid", "reward_aware"], [0.0, 0.25], {"sigmoid": 0.25}),
    ],
)
def test_the_loss_without_scores(losses, weights, left, tmp_path):
    config = config_class(None, "dpo")(
        **quiet(output_dir=str(tmp_path), loss_type=losses, loss_weights=weights, beta=0.3, reward_aware_eta=2.0)
    )
    each = objective_of(config).without_scores
    assert {name: share for name, share in each.losses.items() if share} == left
    assert "score_chosen" not in each.columns
    of_link = {"sigmoid": -log_sigmoid(0.3 * GAP), "hinge": np.maximum(0, 1 - 0.3 * GAP), "sft": 1.5}
    expected = sum(share * of_link[name] for name, share in left.items())
    np.testing.assert_allclose(each(pairs(), {}).losses, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("gappo", {}, r"which 'score-gap' needs: its loss is that without 'score-gap', and it has no pwa"),
        (
            "reward-aware-po",
            {},
            r"which 'reward_aware' needs: .* without 'reward_aware', with the sigmoid instead, and",
        ),
        ("none", {"loss_type": ["sigmoid", "reward_aware"]}, r": its loss is that without 'reward_aware', and it has"),
        (
            "odpo",
            {"weight": "madpo"},
            r"which 'madpo' and 'odpo' need: its loss is that without 'madpo' and 'odpo', a",
        ),
    ],
)
def test_the_warning_says_what_the_loss_is(method, options, said, tokenizer, tmp_path, caplog):
    rows = preference_rows(4, scores=lambda i: (4.0 + i % 3, 3.0))
    unscored = rows.remove_columns(["score_chosen", "score_rejected"])
    base = "dpo" if method == "none" else None
    with pytest.raises(OSError, match="no/such/model"):
        prepared(method, rows, unscored, tokenizer, tmp_path, base, **options)
    assert re.search("the eval data set has no scores, " + (said if method != "none" else ".*" + said), caplog.text)


# What is said of a set


FLAGS = [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("method", "options", "columns", "said"),
    [
        ("gap-aware", {}, {"evaluation_factor": [0.5] * 4}, "evaluation_factor column found"),
        (
            "gap-aware",
            {"gap_aware_metric": "jaccard"},
            {},
            "no evaluation_factor column, computing jaccard of the two completions",
        ),
        ("simpo", {}, {"is_flipped": FLAGS}, "the labels of 1 of 4 pairs are marked as flipped"),
        (
            "gappo",
            {"score_gap_transform": "hard", "score_gap_threshold": 2.5},
            {"score_chosen": [3.0, 4.0, 3.0, 2.0], "score_rejected": [1.0, 1.0, 1.0, 1.0]},
            "the hard filter leaves out 3 of 4 pairs, whose score gap is below 2.5; 1 are trained on",
        ),
    ],
)
def test_what_is_found_in_a_set_is_said(method, options, columns, said, tokenizer, tmp_path, caplog):
    rows = preference_rows(4)
    for name, values in columns.items():
        rows = rows.remove_columns([name] if name in rows.column_names else []).add_column(name, values)
    with caplog.at_level(logging.INFO, "trl_margins"), pytest.raises(OSError, match="no/such/model"):
        prepared(method, rows, None, tokenizer, tmp_path, **options)
    assert f"train: {said}" in caplog.messages


# Pairs without a loss


@pytest.mark.parametrize(
    ("method", "scores", "said"),
    [
        (
            "gappo",
            [(3, 3)] * 3 + [(4, 3)],
            r"training sees only 1 of 4 pairs: weight 'score-gap' keeps only pairs with",
        ),
        ("gappo", [(3, 4)] * 4, None),
        ("odpo", [(3, 3), (2, 4), (1, 2), (5, 1)], r"only 1 of 4 pairs: margin 'odpo' keeps only pairs whose chosen"),
        ("odpo", [(3, 3), (5, 4), (6, 2), (5, 1)], None),
        ("madpo", [(3, 3)] * 4, None),
        ("reward-aware-po", [(3, 3)] * 4, None),
    ],
)
def test_a_warning_where_most_pairs_have_no_loss(method, scores, said, tokenizer, tmp_path, caplog):
    rows = preference_rows(4, scores=lambda i: tuple(map(float, scores[i])))
    with pytest.raises(OSError, match="no/such/model"):
        prepared(method, rows, None, tokenizer, tmp_path)
    found = [record.message for record in caplog.records if "training sees only" in record.message]
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


@pytest.mark.parametrize(
    ("method", "options", "scores", "problem"),
    [
        ("odpo", {}, [(3, 3)] * 4, r"all 4 train pairs would have no loss: margin 'odpo' .*rejected is from 0 to 0"),
        ("odpo", {}, [(1, 3), (2, 2)] * 2, r"all 4 train pairs would have no loss: margin 'odpo' .* is from -2 to 0"),
        ("gappo", {"score_gap_threshold": 3.0}, [(1, 3)] * 4, r"at least 3 \(score_gap_threshold\); .* from -2 to -2"),
        ("gappo", {"margin": "odpo"}, [(1, 3)] * 4, "would have no loss: margin 'odpo' keeps only"),
        (
            "gappo",
            {"score_gap_transform": "hard", "score_gap_threshold": 4.0},
            [(1, 3), (2, 4.5)] * 2,
            r"hard filter leaves out all 4 train pairs: the largest score gap is 2\.5, and",
        ),
    ],
)
def test_a_training_set_without_a_loss_is_refused(method, options, scores, problem, tokenizer, tmp_path):
    rows = preference_rows(4, scores=lambda i: tuple(map(float, scores[i])))
    with pytest.raises(ScoreError, match=problem):
        prepared(method, rows, None, tokenizer, tmp_path, **options)
    if method == "odpo":  # with α = 0 it is DPO
        with pytest.raises(OSError, match="no/such/model"):
            prepared(method, rows, None, tokenizer, tmp_path, odpo_alpha=0.0)


LINKS_WITH_MARGIN = [name for name, link in LINKS["dpo"].items() if link.takes_margin and name != "orpo"]


@pytest.mark.parametrize("name", LINKS_WITH_MARGIN)
def test_odpo_drops_the_same_pairs_with_every_link(name):
    """A tie and a reversed pair have neither loss nor gradient; another pair has those of a margin of its own."""
    link = LINKS["dpo"][name]
    settings = {"label_smoothing": 0.1} if link.reads_smoothing else {}
    logps = pairs(grad=True)
    output = dpo(link, margin=ScoreOffsetMargin(2.0), **settings)(logps, OFFSETS, training=True)
    offsets = 2 * np.log([2.0, 2.5])
    for row, offset in zip((0, 2), offsets, strict=True):
        alone = dpo(link, gamma=offset, **settings)(pairs()).losses[row]
        assert output.losses[row].item() == pytest.approx(alone.item(), rel=1e-5)
    assert output.losses[[1, 3]].tolist() == [0.0, 0.0]
    (slopes,) = torch.autograd.grad(output.losses.sum(), logps.chosen)
    assert slopes[[1, 3]].tolist() == [0.0, 0.0]
    assert (slopes[[0, 2]] != 0).all()
    np.testing.assert_allclose(output.margin, [offsets[0], 0.0, offsets[1], 0.0], rtol=1e-6)
    assert output.weight.tolist() == [1.0, 0.0, 1.0, 0.0]


# Options


def test_an_option_that_no_link_has_is_refused():
    dpop = LINKS["dpo"]["dpop"]
    with pytest.raises(ValueError, match="unknown link option 'dpop_lamda'; known: dpop_lambda; did you mean"):
        dpo(dpop, link_options={"dpop_lamda": 5})
    with pytest.raises(ValueError, match="unknown link option 'dpop_lambda'; known: none"):
        dpo(LINKS["dpo"]["sigmoid"], link_options={"dpop_lambda": 5})
    with pytest.raises(ValueError, match="dpop_lambda must be a number, at least 0"):
        dpo(dpop, link_options={"dpop_lambda": -5})


@pytest.mark.parametrize(("options", "strength"), [({}, 50.0), ({"dpop_lambda": 5.0}, 5.0)])
def test_a_link_alone_has_its_defaults(options, strength):
    inputs = LossInputs(pairs(), CHOSEN, REJECTED, beta=0.3, options=options)
    expected = -log_sigmoid(0.3 * GAP - 0.3 * strength * np.maximum(0, -CHOSEN.double().numpy()))
    np.testing.assert_allclose(LINKS["dpo"]["dpop"](inputs), expected, rtol=1e-6)


DECLARED = {
    "cpo": {
        "sigmoid": "takes_margin reads_smoothing",
        "hinge": "takes_margin",
        "ipo": "",
        "simpo": "takes_margin reads_smoothing",
        "alphapo": "takes_margin reads_smoothing",
    },
    "dpo": {
        "sigmoid": "takes_margin",
        "hinge": "takes_margin",
        "ipo": "needs_reference reads_sums",
        "exo_pair": "takes_margin reads_smoothing",
        "nca_pair": "needs_reference",
        "robust": "takes_margin reads_smoothing",
        "bco_pair": "needs_reference",
        "sppo_hard": "needs_reference",
        "aot": "not per_pair needs_reference reads_smoothing reads_sums",
        "aot_unpaired": "not per_pair needs_reference reads_smoothing",
        "apo_zero": "needs_reference",
        "apo_down": "needs_reference",
        "discopop": "takes_margin",
        "sft": "not per_pair of_batch",
        "sigmoid_norm": "needs_reference reads_sums",
        "ipo_sum": "needs_reference reads_sums",
        "kto_pair": "needs_reference compares_pairs",
        "dpop": "takes_margin needs_reference",
    },
    "both": {
        "conservative": "takes_margin reads_smoothing",
        "robust_simpo": "takes_margin reads_smoothing",
        "orpo": "takes_margin needs_its_reward",
        "rrhf": "takes_margin",
        "focalpo": "takes_margin",
        "simper": "needs_its_reward",
        "reward_aware": "",
    },
}


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_what_a_link_says_of_itself(base):
    """Options are refused, warned of and offered by it."""
    flags = {field.name for field in fields(Link) if field.type == "bool"} - {"per_pair"}
    found = {
        name: {flag for flag in flags if getattr(link, flag)} | (set() if link.per_pair else {"not", "per_pair"})
        for name, link in LINKS[base].items()
    }
    assert found == {name: set(declared.split()) for name, declared in (DECLARED[base] | DECLARED["both"]).items()}
    options = {name: dict(link.options) for name, link in LINKS[base].items() if link.options}
    published = {"focalpo": {"focalpo_gamma": 0.05}, "reward_aware": {"reward_aware_eta": 1.0}}
    assert options == published | ({"dpop": {"dpop_lambda": 50.0}} if base == "dpo" else {})
    read = {name: link.columns for name, link in LINKS[base].items() if link.columns}
    assert read == {"reward_aware": ("score_chosen", "score_rejected")}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


B, EPSILON, TARGET = 0.3, 0.1, 0.2  # β, ε and γ
R_W, R_L = B * CHOSEN.double().numpy(), B * REJECTED.double().numpy()  # rewards
M = R_W - R_L
PER_TOKEN_GAP = CHOSEN.double().numpy() / [3, 4, 2, 5] - REJECTED.double().numpy() / [4, 3, 3, 2]
Z = M - TARGET
# of TRL's losses, from their papers; with the target margin where they take one
FORMULAS = {
    "sigmoid": -log_sigmoid(Z),
    "hinge": np.maximum(0, 1 - Z),
    "ipo": (PER_TOKEN_GAP - 1 / (2 * B)) ** 2,
    "ipo_sum": (M / B - 1 / (2 * B)) ** 2,
    "exo_pair": sigmoid(Z) * (log_sigmoid(Z) - np.log(1 - EPSILON))
    + sigmoid(-Z) * (log_sigmoid(-Z) - np.log(EPSILON)),
    "nca_pair": -log_sigmoid(R_W) - (log_sigmoid(-R_W) + log_sigmoid(-R_L)) / 2,
    "robust": (-(1 - EPSILON) * log_sigmoid(Z) + EPSILON * log_sigmoid(-Z)) / (1 - 2 * EPSILON),
    "bco_pair": -log_sigmoid(R_W) - log_sigmoid(-R_L),
    "sppo_hard": (R_W / B - 1 / (2 * B)) ** 2 + (R_L / B + 1 / (2 * B)) ** 2,
    "aot": -(1 - EPSILON) * log_sigmoid(np.sort(M)) - EPSILON * log_sigmoid(-np.sort(M)),
    "aot_unpaired": -(1 - EPSILON) * log_sigmoid(np.sort(R_W) - np.sort(R_L))
    - EPSILON * log_sigmoid(np.sort(R_L) - np.sort(R_W)),
    "apo_zero": 1 - sigmoid(R_W) + sigmoid(R_L),
    "apo_down": sigmoid(R_W) + 1 - sigmoid(M),
    "discopop": -log_sigmoid(Z) * (1 - sigmoid(Z / 0.05)) + np.exp(-Z) * sigmoid(Z / 0.05),
    "sft": np.full(4, 1.5),
    "sigmoid_norm": -log_sigmoid(B * PER_TOKEN_GAP),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_of_trl_is_its_papers(name):
    assert FORMULAS.keys() >= {*TRLS["dpo"], "ipo_sum"}
    inputs = LossInputs(pairs(), CHOSEN, REJECTED, beta=B, margin=TARGET, label_smoothing=EPSILON)
    np.testing.assert_allclose(LINKS["dpo"][name](inputs), FORMULAS[name], rtol=1e-5)
    if name in ("sigmoid", "hinge"):
        expected = FORMULAS[name] if name == "hinge" else (1 - EPSILON) * FORMULAS[name] - EPSILON * log_sigmoid(-Z)
        np.testing.assert_allclose(LINKS["cpo"][name](inputs), expected, rtol=1e-5)


# What does not go together


def named(base: str, *flags: str, without: bool = False) -> str:
    """The links that say this of themselves, or that do not."""
    said = {name: set(words.split()) for name, words in (DECLARED[base] | DECLARED["both"]).items()}
    return ", ".join(sorted(name for name in said if said[name].isdisjoint(flags) == without))


class Twice(AdaptiveMargin):
    """A term with a state that may be anything."""


CPO, DPO = LINKS["cpo"], LINKS["dpo"]
MEAN, RATIO, PER_TOKEN = LengthNormalizedReward(), LogRatioReward(), MeanLogRatioReward()
REFUSED = {
    "a weight without a loss per pair": (
        (RATIO, DPO["aot"], {"weight": ScoreGapWeight()}),
        "weight 'score-gap' does not go with loss_type 'aot', which has no loss per pair to weight",
    ),
    "a weight of the SFT loss": (
        (RATIO, DPO["sft"], {"weight": ScoreGapWeight()}),
        "weight 'score-gap' does not go with loss_type 'sft' alone, which has no loss per pair: add another",
    ),
    "a margin of the SFT loss": (
        (RATIO, DPO["sft"], {"margin": AdaptiveMargin(2.0)}),
        "margin 'amapo' does not go with loss_type 'sft' alone, which has no loss per pair: add another",
    ),
    "a target of the SFT loss": (
        (RATIO, DPO["sft"], {"gamma": 0.5}),
        "margin of 0.5 does not go with loss_type 'sft' alone, which has no loss per pair: add another",
    ),
    "a margin": (
        (MEAN, CPO["ipo"], {"margin": AdaptiveMargin(2.0), "gamma": 0.25}),
        f"margin 'amapo' does not go with loss_type 'ipo': only {named('cpo', 'takes_margin')} subtract a margin from "
        "the reward gap",
    ),
    "a target": (
        (RATIO, DPO["bco_pair"], {"gamma": 0.25}),
        f"margin of 0.25 (simpo_gamma) does not go with loss_type 'bco_pair': only {named('dpo', 'takes_margin')} "
        "subtract a margin from the reward gap",
    ),
    "a reference": (
        (MEAN, DPO["bco_pair"], {}),
        "loss_type 'bco_pair' does not go with reward 'length-normalized', which has no reference model; these do: "
        + named("dpo", "needs_reference", without=True),
    ),
    "a reward": (
        (RATIO, DPO["simper"], {}),
        "loss_type 'simper' does not go with reward 'log-ratio': it is a loss of reward='length-normalized'",
    ),
    "a shape of the reward": (
        (LengthNormalizedReward(alpha=0.25), CPO["simper"], {}),
        "loss_type 'simper' does not go with alpha=0.25: it is a loss of the log-probability itself, which is alpha=0",
    ),
    "sums": (
        (PER_TOKEN, DPO["ipo"], {}),
        "loss_type 'ipo' does not go with reward 'mean-log-ratio': it computes with log-ratios summed over the "
        "tokens, which are reward='log-ratio'; loss_type 'sigmoid' goes with both",
    ),
    "states of one name": (
        (MEAN, CPO["simpo"], {"weight": Twice(2.0), "margin": AdaptiveMargin(2.0)}),
        "a weight and a margin are both called 'amapo': a checkpoint has one state per name",
    ),
    "two weights of one name": (
        (MEAN, CPO["simpo"], {"weight": [ScoreGapWeight(), ScoreGapWeight("quadratic")]}),
        "two weight terms are called 'score-gap': logs and checkpoints know a term by its name",
    ),
    "two targets": (
        (MEAN, CPO["simpo"], {"margin": [DynamicTargetMargin(1.0), AnchorMargin(2.0)]}),
        "margins 'gamma-po' and 'geometric-anchor' each hold the target margin γ, so that their sum would have it "
        "more than once: name one of them",
    ),
    "β": ((MEAN, CPO["simpo"], {"beta": 0.0}), "beta must be a number, above 0; it is 0.0"),
    "γ": ((MEAN, CPO["simpo"], {"gamma": np.inf}), "simpo_gamma must be a finite number; it is inf"),
    "τ": ((MEAN, CPO["simpo"], {"discopop_tau": 0.0}), "discopop_tau must be a number, above 0; it is 0.0"),
    "too much smoothing": (
        (MEAN, CPO["simpo"], {"label_smoothing": 0.51}),
        "label_smoothing must be a number, at least 0 and at most 0.5; it is 0.51",
    ),
    "negative smoothing": (
        (MEAN, CPO["simpo"], {"label_smoothing": -0.01}),
        "label_smoothing must be a number, at least 0 and at most 0.5; it is -0.01",
    ),
    "half of the labels": (
        (RATIO, {DPO["sigmoid"]: 1.0, DPO["robust"]: 1.0}, {"label_smoothing": 0.5}),
        "label_smoothing of loss_type 'robust' must be a number, at least 0 and below 0.5; it is 0.5",
    ),
    "no smoothing": (
        (RATIO, DPO["exo_pair"], {}),
        "label_smoothing of loss_type 'exo_pair' must be a number, above 0 and at most 0.5; it is 0.0",
    ),
    "a negative share": (
        (RATIO, {DPO["sigmoid"]: 1.0, DPO["hinge"]: -0.1}, {}),
        "the weight of loss_type 'hinge' (loss_weights) must be a number, at least 0; it is -0.1",
    ),
    "no loss": (
        (RATIO, {DPO["sigmoid"]: 0.0, DPO["hinge"]: 0}, {}),
        "no loss to train on: loss_type is ['sigmoid', 'hinge'], and all its loss_weights are 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_go_together(case):
    (reward, link, given), said = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Objective(reward, link, **{"beta": 0.1, **given})


def test_parts_that_do(caplog):
    """At the last value that is taken, and beside what would be refused alone."""
    for reward, link, given in (
        (RATIO, {DPO["sft"]: 1.0, DPO["sigmoid"]: 0.0}, {"weight": ScoreGapWeight(), "gamma": 0.5}),
        (RATIO, DPO["sft"], {}),
        (MEAN, CPO["simpo"], {"weight": ColumnWeight("mine"), "margin": ColumnMargin("mine", "reward")}),  # stateless
        (MEAN, CPO["simpo"], {"label_smoothing": 0.5}),
        (RATIO, DPO["robust"], {"label_smoothing": 0.49}),
        (RATIO, DPO["robust"], {}),
        (RATIO, DPO["exo_pair"], {"label_smoothing": 0.5}),
        (RATIO, DPO["ipo"], {}),
        (SummedReward(), DPO["sigmoid"], {}),
        (MEAN, CPO["simper"], {}),
    ):
        Objective(reward, link, **{"beta": 0.1, **given})
    assert not caplog.messages
    Objective(RATIO, {DPO["sigmoid"]: 1.0, DPO["hinge"]: 1.0}, 0.1, label_smoothing=0.25)
    assert caplog.messages == ["label_smoothing=0.25 has no effect with loss_type ['sigmoid', 'hinge']"]


def test_what_is_left_without_scores():
    """The shares of the losses that read none; where none is left, the sigmoid's in their place."""
    reads = DPO["reward_aware"]
    for given, left in (
        ({reads: 0.5, DPO["hinge"]: 1.0, DPO["rrhf"]: 0.0}, {"hinge": 1.0, "rrhf": 0.0}),
        ({reads: 0.5, DPO["hinge"]: 0.0}, {"hinge": 0.0, "sigmoid": 0.5}),
        ({reads: 0.5, DPO["sft"]: 2.0}, {"sft": 2.0, "sigmoid": 0.5}),
        ({reads: 0.5}, {"sigmoid": 0.5}),
    ):
        without = Objective(RATIO, given, 0.1, weight=[ScoreGapWeight(), ColumnWeight("mine")]).without_scores
        assert without.losses == left
        assert [term.name for term in without.terms] == ["column"]


def test_what_is_missing_is_named():
    without = PairLogps(CHOSEN, REJECTED, torch.ones(4), torch.ones(4))
    for reward in (RATIO, PER_TOKEN):
        with pytest.raises(ValueError, match=f"reward '{reward.name}' needs the reference model's log-prob"):
            reward(without)
    for lacking in (replace(pairs(), ref_chosen=None), replace(pairs(), ref_rejected=None)):
        with pytest.raises(ValueError, match="reward 'log-ratio' needs the reference model's"):
            RATIO(lacking)
        with pytest.raises(ValueError, match="loss_type 'aot' compares with a reference model, which this objective"):
            DPO["aot"](LossInputs(lacking, CHOSEN, REJECTED, beta=0.3))
    for lacking in (replace(without, chosen_score=CHOSEN), replace(without, rejected_score=CHOSEN)):
        with pytest.raises(ValueError, match=r"reward 'alphapo-token' needs PairLogps\.chosen_score: let pair_log"):
            REWARDS["alphapo-token"]()(lacking)
    with pytest.raises(ValueError, match=r"loss_type 'sft' needs PairLogps\.sft_loss"):
        DPO["sft"](LossInputs(without, CHOSEN, REJECTED, beta=0.3))
    with pytest.raises(ValueError, match=r"'reward_aware' reads the scores of the pairs, which LossInputs\.view has"):
        DPO["reward_aware"](LossInputs(without, CHOSEN, REJECTED, beta=0.3))


def test_what_a_reward_says_of_itself():
    """Which config fields are its arguments, and what it is a function of."""
    flags = ("needs_reference", "summed")
    shaped = {"alpha": "alpha"}
    of_ratio = {"divergence": "f_divergence_type", "alpha": "f_alpha_divergence_coef"}
    found = {name: ({flag for flag in flags if getattr(r, flag)}, r.option_fields) for name, r in REWARDS.items()}
    assert found == {
        "length-normalized": (set(), shaped),
        "sum": ({"summed"}, shaped),
        "log-ratio": ({*flags}, of_ratio),
        "mean-log-ratio": ({"needs_reference"}, {}),
        "alphapo-token": (set(), shaped),
        "log-odds": (set(), {}),
    }
    assert {name for name, reward in REWARDS.items() if reward().of_token is not None} == {"alphapo-token"}
    assert {getattr(REWARDS[name](), "alpha", 0.0) for name in REWARDS if name != "log-ratio"} == {0.0}
    assert not Reward.needs_reference
    assert not Reward.summed


# The reward of a link


def test_simper_is_of_the_probability_itself(tmp_path):
    for base in ("cpo", "dpo"):
        with pytest.raises(ValueError, match=r"'simper' does not go with alpha=0.25: .* which is alpha=0"):
            objective_of(config_class("simper", base)(**quiet(output_dir=str(tmp_path), alpha=0.25)))
    of_ratio = Link("of_ratio", lambda x: x.reward_gap, reward="log-ratio", needs_its_reward=True)
    assert dpo(of_ratio).losses == {"of_ratio": 1.0}  # its reward's alpha is that of a divergence


@pytest.mark.parametrize("reward", REWARDS)
def test_an_alpha_is_read_or_refused(reward, tmp_path):
    def made(**more):
        options = {"reward": reward, "alpha": 0.25, "simpo_gamma": 0.5, **more}
        return objective_of(config_class(None, "dpo")(**quiet(output_dir=str(tmp_path), **options))).reward

    if reward in ("length-normalized", "sum", "alphapo-token"):
        assert made().alpha == 0.25
        return
    said = f"alpha=0.25 does not go with reward={reward!r}, which does not read it: set it to 0.0"
    for more, meant in (
        ({}, ""),
        ({"margin": "gamma-po"}, ""),
        ({"margin": "alpha-dpo"}, " and give that of margin='alpha-dpo' as alpha_dpo_alpha"),
    ):
        able = "alphapo-token, length-normalized, sum"
        with pytest.raises(ValueError, match=f"^{re.escape(f'{said}{meant}, or use one of the rewards {able}')}$"):
            made(**more)
    assert type(made(alpha=0.0)) is REWARDS[reward]


def test_ties_are_counted_without_a_word_of_weights(tokenizer, tmp_path, caplog):
    rows = preference_rows(4, scores=lambda i: (3.0, 3.0))
    with caplog.at_level(logging.DEBUG, "trl_margins"), pytest.raises(OSError, match="no/such/model"):
        prepared("madpo", rows, None, tokenizer, tmp_path)
    assert "4 pairs, 4 ties, 0 whose rejected completion scores higher" in caplog.text


def test_a_card_s_script_imports_the_module_of_a_link():
    trainer = SimpleNamespace(from_python=[], objective=Objective(LengthNormalizedReward(), HARD, 1.0))
    assert f"import {__name__}  # 'hard'" in _registered(trainer)
