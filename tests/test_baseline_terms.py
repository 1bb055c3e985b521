"""The terms of the baselines: the published loss and its gradient, computed here without the package."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from syncs import Syncs
from torch import Tensor

from trl_margins.links import DPO_LINKS, margin_loss
from trl_margins.methods import MARGINS, WEIGHTS
from trl_margins.objective import Objective, ObjectiveOutput
from trl_margins.pairs import FACTOR, SCORES, PairLogps, PairView
from trl_margins.rewards import LengthNormalizedReward, LogRatioReward, SummedReward
from trl_margins.terms import Term
from trl_margins.terms.adaptive import AdaptiveMargin
from trl_margins.terms.alpha_dpo import ReferenceMargin
from trl_margins.terms.anchor import AnchorMargin, GradientNormMargin
from trl_margins.terms.baselines import DrDPOWeight, LengthMargin, MarginAdaptiveWeight, ScoreOffsetMargin
from trl_margins.terms.beta_dpo import BatchBetaMargin, KeptWeight
from trl_margins.terms.column import ColumnMargin
from trl_margins.terms.dynamic_target import DynamicTargetMargin
from trl_margins.terms.evaluation_factor import EvaluationFactorMargin
from trl_margins.terms.score_gap import ScoreGapWeight
from trl_margins.trainers.checkpoints import load_states, save_states
from trl_margins.trainers.configs import MarginCPOConfig, MarginDPOConfig

BETA = 0.3
REWARDS = {"log-ratio": LogRatioReward, "length-normalized": LengthNormalizedReward, "sum": SummedReward}


def drawn(n: int = 12, seed: int = 0) -> PairLogps:
    """Pairs with log-probabilities to differentiate by."""
    rng = np.random.default_rng(seed)
    lengths = [torch.tensor(rng.integers(3, 12, n)) for _ in range(2)]
    logps = [torch.tensor(rng.normal(-9, 3, n), requires_grad=True) for _ in range(2)]
    return PairLogps(*logps, *lengths, *(torch.tensor(rng.normal(-9, 3, n)) for _ in range(2)))


def scores(n: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """The chosen completion's is not always the higher one, and the first two are ties."""
    rng = np.random.default_rng(seed)
    chosen, rejected = torch.tensor(rng.normal(3, 4, n)), torch.tensor(rng.normal(0, 4, n))
    rejected[:2] = chosen[:2]
    return {"score_chosen": chosen, "score_rejected": rejected}


def gap_of(pairs: PairLogps, reward: str = "log-ratio") -> Tensor:
    """[n] the reward gap without β, by hand."""
    chosen, rejected = pairs.chosen, pairs.rejected
    if reward == "log-ratio":
        chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
    if reward == "length-normalized":
        chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
    return chosen - rejected


def ours(pairs: PairLogps, reward: str = "log-ratio", gamma: float = 0.0, **settings: Any) -> ObjectiveOutput:
    called = {name: settings.pop(name) for name in ("columns", "training", "evaluation") if name in settings}
    return Objective(REWARDS[reward](), DPO_LINKS["sigmoid"], BETA, gamma, **settings)(pairs, **called)


def gradient(loss: Tensor, pairs: PairLogps) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, [pairs.chosen, pairs.rejected], retain_graph=True))


def assert_same(output: ObjectiveOutput, published: Tensor, pairs: PairLogps, ratio: float = 1.0) -> None:
    """The mean loss, which is `ratio` times the published one, and its gradient, which is the published one's."""
    loss = output.losses.mean()
    torch.testing.assert_close(gradient(loss, pairs), gradient(published, pairs), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss, ratio * published, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
def test_r_dpo(alpha):
    """Park et al.: the longer the chosen completion, the less the log-ratios have to differ."""
    pairs = drawn()
    longer = (pairs.chosen_length - pairs.rejected_length).double()
    published = -F.logsigmoid(BETA * gap_of(pairs) + alpha * longer).mean()
    assert_same(ours(pairs, margin=LengthMargin(alpha)), published, pairs)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_odpo(alpha):
    pairs, columns = drawn(), scores()
    published = torch.zeros((), dtype=torch.float64)
    for i, gap in enumerate(gap_of(pairs)):
        offset = 0.0
        if alpha:
            difference = (columns["score_chosen"][i] - columns["score_rejected"][i]).item()
            offset = alpha * math.log(difference) if difference > 0 else -math.inf
        published = published - F.logsigmoid(BETA * gap - offset) / 12
    output = ours(pairs, columns=columns, margin=ScoreOffsetMargin(alpha))
    assert_same(output, published, pairs)
    assert output.margin.isfinite().all()


@pytest.mark.parametrize("beta_prime", [0.2, 1.0, 7.0])
def test_dr_dpo_has_the_published_gradient(beta_prime):
    """Its own value is the weighted mean of the losses."""
    pairs = drawn()
    losses = -F.logsigmoid(BETA * gap_of(pairs))
    published = -beta_prime * torch.log(torch.mean(torch.exp(-losses / beta_prime)))  # as its README has it
    output = ours(pairs, weight=DrDPOWeight(beta_prime))
    torch.testing.assert_close(gradient(output.losses.mean(), pairs), gradient(published, pairs), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output.losses, output.weight * losses)
    assert output.weight.mean().item() == pytest.approx(1.0)


def madpo(h: float, c_max: float, c_min: float, steepness: float, tau: float) -> float:
    """One pair's weight, by the author's function."""
    if h <= -tau:
        return 1.0
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(steepness * (abs(h) - tau)))
    return (1 + math.exp(-h)) / (1 + math.exp(-c * h))


@pytest.mark.parametrize("settings", [(2.0, 0.5, 1.0, math.log(999)), (4.0, 0.25, 2.0, 2.0)])
def test_madpo(settings):
    pairs, columns = drawn(), scores()
    margins = (columns["score_chosen"] - columns["score_rejected"]).tolist()
    assert min(margins) < -2.0 < 0.0 < max(margins)
    weights = torch.tensor([madpo(h, *settings) for h in margins], dtype=torch.float64)
    published = -(weights * F.logsigmoid(BETA * gap_of(pairs))).mean()
    assert_same(ours(pairs, columns=columns, weight=MarginAdaptiveWeight(*settings)), published, pairs)


def test_madpo_where_the_weight_is_known():
    def weights(term: MarginAdaptiveWeight, margins: list[float]) -> Tensor:
        columns = {"score_chosen": torch.tensor(margins), "score_rejected": torch.zeros(len(margins))}
        return term(PairView.of_gaps(torch.zeros(len(margins)), columns))

    weight = weights(MarginAdaptiveWeight(tau=2.0), [0.0, 2.0, -2.0, 1.0, 3.0, -1.0])
    torch.testing.assert_close(weight[:3], torch.ones(3))
    assert weight[3] > 1 > weight[4]
    assert weight[5] < 1
    far = weights(MarginAdaptiveWeight(), [1e4, -1e4, 88.0, -88.0, 1e-9, 0.0])
    assert far.isfinite().all()
    assert (far > 0).all()


@pytest.mark.parametrize("reward", ["length-normalized", "sum"])
def test_alpha_dpo(reward):
    """Three batches by the authors' loop: moments from 0, learned before they are used, all of it without gradient."""
    term, mean, std, alpha, gamma = ReferenceMargin(0.15, 0.2), 0.0, 0.0, 0.2, 0.15
    for step in range(3):
        pairs = drawn(seed=step)
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        if reward == "length-normalized":
            chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
        moved = (chosen - rejected).detach().numpy()
        mean, std = 0.9 * mean + 0.1 * moved.mean(), 0.9 * std + 0.1 * moved.std(ddof=1)
        target = torch.tensor(gamma / BETA + alpha * (moved - mean) / std)
        published = -F.logsigmoid(BETA * (gap_of(pairs, reward) - target)).mean()
        output = ours(pairs, reward, gamma=gamma, margin=term, training=True)
        assert_same(output, published, pairs)
    # an evaluation takes what there is, and leaves it
    for _ in range(2):
        pairs = drawn(seed=9)
        moved = (gap_of(pairs, "log-ratio") if reward == "sum" else per_token(pairs)).detach().numpy()
        target = torch.tensor(gamma / BETA + alpha * (moved - mean) / std)
        published = -F.logsigmoid(BETA * (gap_of(pairs, reward) - target)).mean()
        assert_same(ours(pairs, reward, gamma=gamma, margin=term, evaluation=True), published, pairs)


def per_token(pairs: PairLogps) -> Tensor:
    chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
    return chosen / pairs.chosen_length - rejected / pairs.rejected_length


def test_alpha_dpo_before_and_without_a_spread():
    pairs = drawn(3)
    untrained = ours(pairs, "length-normalized", margin=ReferenceMargin(0.5), evaluation=True)
    assert untrained.margin.tolist() == [0.5] * 3
    alike = PairLogps(*(torch.full((4,), -3.0) for _ in range(2)), *(torch.ones(4),) * 2, *(torch.zeros(4),) * 2)
    assert ours(alike, "length-normalized", margin=ReferenceMargin(0.5), training=True).margin.tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="margin 'alpha-dpo' compares with a reference model"):
        ReferenceMargin(0.5)(PairView.of_gaps(torch.zeros(2)))


def test_alpha_dpo_on_batches_of_one():
    """The deviation is that of two neighbours: without it, every margin would be γ."""
    term, moved, margins = ReferenceMargin(0.0, 1.0), [], []
    for step in range(6):
        pairs = drawn(1, seed=step)
        moved.append(per_token(pairs).item())
        margins.append(ours(pairs, "length-normalized", margin=term, training=True).margin.item())
    mean = std = 0.0
    for step, value in enumerate(moved):
        mean = 0.9 * mean + 0.1 * value
        std = 0.9 * std + (0.1 * np.std(moved[step - 1 : step + 1], ddof=1) if step else 0.0)
        assert margins[step] == pytest.approx(BETA * (value - mean) / std if step else 0.0)


@pytest.mark.parametrize(("reward", "gamma"), [("log-ratio", 0.0), ("length-normalized", 0.4)])
@pytest.mark.parametrize(("a", "keep"), [(0.6, 0.8), (-0.02, 0.5), (50.0, 1.0)])
def test_beta_dpo(reward, gamma, a, keep):
    """Four batches by the authors' loop; which pairs are kept is read from ours."""
    weight, margin, mean, std, n = KeptWeight(a, keep), BatchBetaMargin(a, keep), 0.0, 0.0, 12
    for step in range(4):
        pairs = drawn(n, seed=step)
        gap = gap_of(pairs, reward)
        gaps = gap.detach().numpy()
        mean, std = 0.9 * mean + 0.1 * gaps.mean(), 0.9 * std + 0.1 * gaps.std(ddof=1)
        output = ours(pairs, reward, gamma=gamma, weight=weight, margin=margin, training=True)
        kept = (output.weight > 0).numpy()
        assert kept.sum() == int(n * keep)
        beta = max(BETA * (1 + a * (gaps[kept].mean() - mean)), 1e-3)
        published = -F.logsigmoid(beta * gap - gamma)[torch.tensor(kept)].mean()
        assert_same(output, published, pairs, ratio=beta / BETA)
        beta_b = margin.observed(output.view, output.margin)["beta_dpo/beta"]
        np.testing.assert_allclose(beta_b, np.full(n, beta), rtol=1e-6)
    np.testing.assert_allclose(margin.state_dict()["moments"], [mean, std])


def test_beta_dpo_evaluates_as_dpo():
    weight, margin = KeptWeight(), BatchBetaMargin()
    ours(drawn(), weight=weight, margin=margin, training=True)
    before, pairs = copy.deepcopy(weight.state_dict()), drawn(seed=5)
    output = ours(pairs, weight=weight, margin=margin, evaluation=True)
    assert_same(output, -F.logsigmoid(BETA * gap_of(pairs)).mean(), pairs)
    assert weight.state_dict()["batches"] == before["batches"] == 1
    assert torch.equal(weight.state_dict()["moments"], before["moments"])


def test_beta_dpo_draws_as_multinomial_does():
    """How often each pair is kept, against torch's draw with the authors' probabilities."""
    gaps, draws = torch.tensor([0.1, -0.3, 1.0, -1.2, 2.0]), 2000
    mean, std = 0.2, 0.9
    term, state = KeptWeight(a=0.0, keep=0.4), KeptWeight().state_dict()
    learned = 0.9 * torch.tensor([mean, std]) + 0.1 * torch.stack([gaps.mean(), gaps.std()])
    counts = torch.zeros(5)
    for draw in range(draws):
        term.load_state_dict({**state, "moments": torch.tensor([mean, std]), "batches": draw})
        counts += term(PairView.of_gaps(gaps, training=True)) > 0
    probabilities = torch.exp(-0.5 * ((gaps - learned[0]) / learned[1]) ** 2)
    torch.manual_seed(0)
    theirs = torch.multinomial(probabilities.expand(20 * draws, 5), 2, replacement=False)
    expected = torch.bincount(theirs.flatten(), minlength=5) / (20 * draws)
    torch.testing.assert_close(counts / draws, expected, rtol=0, atol=0.04)  # four standard errors


def test_beta_dpo_of_few_or_equal_pairs():
    """At least one is kept; pairs that are all alike have no deviation; far ones do not become NaN."""
    for gaps in (torch.tensor([0.7]), torch.full((5,), 0.7), torch.tensor([1e30, -1e30, 0.0, 1.0])):
        weight = KeptWeight()
        for _ in range(2):
            values = weight(PairView.of_gaps(gaps, training=True))
            assert (values > 0).sum() == max(int(0.8 * len(gaps)), 1)
            assert values.isfinite().all()


MAKES: dict[str, Callable[[], Any]] = {
    "dr-dpo": lambda: DrDPOWeight(0.5),
    "beta-dpo-kept": lambda: KeptWeight(),
    "beta-dpo": lambda: BatchBetaMargin(),
    "alpha-dpo": lambda: ReferenceMargin(0.3),
}


OF_ANYTHING: dict[str, Callable[[], Any]] = {
    **{name: make for name, make in MAKES.items() if name != "alpha-dpo"},
    "madpo": lambda: MarginAdaptiveWeight(),
    "odpo": lambda: ScoreOffsetMargin(),
    "r-dpo": lambda: LengthMargin(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OF_ANYTHING)
def test_finite_for_finite_input(name, dtype):
    """In training, over batches of 1 to 8 pairs; and the loss made of it."""
    rng, term = np.random.default_rng(0), OF_ANYTHING[name]()
    for scale in (0.0, 1.0, 1e4):
        for n in (1, 2, 8):
            gaps, *columns = (torch.tensor(scale * rng.uniform(-1, 1, n), dtype=torch.float32) for _ in range(3))
            columns = dict(zip(("score_chosen", "score_rejected"), columns, strict=True))
            view = PairView.of_gaps(gaps.to(dtype), columns, training=True)
            values = term(view)
            assert values.shape == gaps.shape
            assert values.isfinite().all()
            if name in WEIGHTS:
                assert (values >= 0).all()
                assert margin_loss(view.reward_gap, 0.5, values).isfinite().all()
            else:
                assert margin_loss(view.reward_gap, values).isfinite().all()


def view_of(pairs: PairLogps, rank: slice = slice(None), everyone: PairView | None = None) -> PairView:
    """Of a rank's pairs, in training. What it gathers is found among what all have."""
    own = PairLogps(*(value[rank].detach() for value in list(vars(pairs).values())[:6]))
    chosen, rejected = LengthNormalizedReward()(own)

    def gather(local: Tensor) -> Tensor:
        whole = [whole_gap(everyone), everyone.reward_gap, everyone.unscaled_gap]
        return next(values for values in whole if torch.equal(values[rank], local))

    settings = {} if everyone is None else {"gather": gather, "first": rank.start}
    return PairView.of(own, (chosen, rejected), BETA, training=True, **settings)


def whole_gap(view: PairView) -> Tensor:
    return view.chosen_log_ratio / view.chosen_length - view.rejected_log_ratio / view.rejected_length


@pytest.mark.parametrize("name", MAKES)
def test_how_the_batch_lies_on_ranks_does_not_matter(name):
    whole, ranks = MAKES[name](), [MAKES[name]() for _ in range(3)]
    for step in range(3):
        pairs = drawn(12, seed=step)
        everyone = view_of(pairs)
        alone = whole(everyone)
        parts = [term(view_of(pairs, slice(4 * rank, 4 * rank + 4), everyone)) for rank, term in enumerate(ranks)]
        torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-12, atol=1e-12)
    assert all(str(term.state_dict()) == str(whole.state_dict()) for term in ranks)


@pytest.mark.parametrize("name", ["beta-dpo-kept", "beta-dpo", "alpha-dpo"])
def test_a_resumed_term_goes_on(name, tmp_path):
    term, views = MAKES[name](), [view_of(drawn(seed=step)) for step in range(5)]
    for view in views[:3]:
        term(view)
    save_states({name: term.state_dict()}, tmp_path / "terms.safetensors")
    resumed = MAKES[name]()
    resumed.load_state_dict(load_states(tmp_path / "terms.safetensors", torch.device("cpu"))[name])
    for view in views[3:]:
        assert torch.equal(term(view), resumed(view))
    assert not torch.equal(MAKES[name]()(views[4]), term(views[4]))


@pytest.mark.parametrize("name", MAKES)
def test_nothing_is_read_from_the_device(name):
    term, view = MAKES[name](), view_of(drawn())
    with Syncs() as syncs:
        term(view)
        term(view)
    assert not syncs.found


def test_from_a_config(tmp_path):
    options = {
        "dr_dpo_beta_prime": 0.5,
        "madpo_c_max": 4.0,
        "madpo_c_min": 0.25,
        "madpo_steepness": 2.0,
        "madpo_tau": 2.0,
        "beta_dpo_a": 0.1,
        "beta_dpo_keep": 0.5,
        "r_dpo_alpha": 0.1,
        "odpo_alpha": 0.5,
        "alpha_dpo_alpha": 0.05,
    }
    config = MarginDPOConfig(
        str(tmp_path),
        use_cpu=True,
        beta=2.5,
        gamma_beta_ratio=0.6,
        weight=["dr-dpo", "beta-dpo-kept", "madpo"],
        margin=["r-dpo", "odpo", "alpha-dpo", "beta-dpo"],
        **options,
    )
    dr_dpo, kept, adaptive = config.terms("weight")
    length, offset, reference, batch = config.terms("margin")
    assert (dr_dpo, adaptive) == (DrDPOWeight(0.5), MarginAdaptiveWeight(4.0, 0.25, 2.0, 2.0))
    assert (length, offset) == (LengthMargin(0.1), ScoreOffsetMargin(0.5))
    assert (kept.a, kept.keep, batch.a, batch.keep) == (0.1, 0.5, 0.1, 0.5)
    assert (reference.gamma, reference.alpha) == (1.5, 0.05)


def test_the_config_and_the_terms_have_the_same_defaults(tmp_path):
    names = {"weight": ["dr-dpo", "beta-dpo-kept", "madpo"], "margin": ["r-dpo", "odpo", "alpha-dpo", "beta-dpo"]}
    config = MarginDPOConfig(str(tmp_path), use_cpu=True, simpo_gamma=0.5, **names)
    plain = [DrDPOWeight(), KeptWeight(), MarginAdaptiveWeight()]
    plain += [LengthMargin(), ScoreOffsetMargin(), ReferenceMargin(0.5), BatchBetaMargin()]

    def numbers(term: Any) -> dict[str, float]:
        return {name: value for name, value in vars(term).items() if isinstance(value, float)}

    assert [numbers(term) for kind in names for term in config.terms(kind)] == [numbers(term) for term in plain]


def test_alpha_dpo_needs_a_reference_and_a_target(tmp_path):
    with pytest.raises(ValueError, match=r"'alpha-dpo'.*reference model"):
        MarginCPOConfig(str(tmp_path), use_cpu=True, loss_type="simpo", margin="alpha-dpo")
    with pytest.raises(
        ValueError, match="'alpha-dpo' builds on a target margin: give gamma_beta_ratio or simpo_gamma"
    ):
        MarginDPOConfig(str(tmp_path), use_cpu=True, margin="alpha-dpo")


# Every number of a term: what it is called, what it takes, the last values of those, and the first of the others
NUMBERS: dict[tuple[type[Term], str], tuple[str, str, tuple[Any, ...], tuple[Any, ...]]] = {
    (ScoreGapWeight, "threshold"): ("threshold of the score gap", "a number, at least 0, or None", (0.0,), (-1e-9,)),
    (DrDPOWeight, "beta_prime"): ("dr_dpo_beta_prime", "a number, above 0", (1e-9,), (0.0,)),
    (KeptWeight, "a"): ("beta_dpo_a", "a finite number", (-9.0, 0), ()),
    (KeptWeight, "keep"): ("beta_dpo_keep", "a number, above 0 and at most 1", (1e-9, 1.0), (0.0, 1.000001)),
    (BatchBetaMargin, "a"): ("beta_dpo_a", "a finite number", (-9.0, 0), ()),
    (BatchBetaMargin, "keep"): ("beta_dpo_keep", "a number, above 0 and at most 1", (1e-9, 1.0), (0.0, 20)),
    (MarginAdaptiveWeight, "c_max"): ("madpo_c_max", "a number, above 1", (1.000001,), (1.0,)),
    (MarginAdaptiveWeight, "c_min"): ("madpo_c_min", "a number, above 0 and below 1", (1e-9, 0.999999), (0.0, 1.0)),
    (MarginAdaptiveWeight, "steepness"): ("madpo_steepness", "a number, above 0", (1e-9,), (0.0,)),
    (MarginAdaptiveWeight, "tau"): ("madpo_tau", "a number, above 0", (1e-9,), (0.0,)),
    (ScoreOffsetMargin, "alpha"): ("odpo_alpha", "a number, at least 0", (0.0,), (-1e-9,)),
    (LengthMargin, "alpha"): ("r_dpo_alpha", "a finite number", (-9.0, 0), ()),
    (ReferenceMargin, "gamma"): ("gamma of margin 'alpha-dpo'", "a finite number", (-9.0, 0), ()),
    (ReferenceMargin, "alpha"): ("alpha_dpo_alpha", "a number, at least 0", (0.0,), (-1e-9,)),
    (EvaluationFactorMargin, "gamma"): ("γ of GaPO", "a number, at least 0", (0.0,), (-1e-9,)),
    (EvaluationFactorMargin, "beta"): ("beta of margin 'gap-aware'", "a number, above 0", (1e-9,), (0.0,)),
    (EvaluationFactorMargin, "floor"): ("the floor of the evaluation factor", "", (1e-9, 0.999999), (0.0, 1.0)),
    (DynamicTargetMargin, "gamma0"): ("γ-PO divides", "", (1e-9,), (0.0, math.inf)),
    (DynamicTargetMargin, "tau"): ("γ-PO divides", "", (1e-9,), (0.0, math.inf)),
    (DynamicTargetMargin, "steps"): ("steps of γ-PO", "a whole number, at least 1", (1,), (0, 1.5)),
    (DynamicTargetMargin, "estimation_size"): (
        "estimation_size of γ-PO",
        "a whole number, at least 1",
        (1,),
        (0, 1.5),
    ),
    (DynamicTargetMargin, "queue_size"): ("queue_size of γ-PO", "a whole number, at least 0", (0,), (-1, 1.5)),
    (AdaptiveMargin, "beta"): ("beta of AMaPO", "a number, above 0", (1e-9,), (0.0,)),
    (AdaptiveMargin, "estimation_size"): ("estimation_size of AMaPO", "a whole number, at least 1", (1,), (0, 1.5)),
    (AnchorMargin, "beta"): ("beta of margin 'geometric-anchor'", "a number, above 0", (1e-9,), (0.0,)),
    (AnchorMargin, "gamma"): ("gamma of margin 'geometric-anchor'", "a finite number", (-9.0, 0), ()),
    (GradientNormMargin, "beta"): ("beta of margin 'gradient-norm'", "a number, above 0", (1e-9,), (0.0,)),
    (GradientNormMargin, "gamma"): ("gamma of margin 'gradient-norm'", "a finite number", (-9.0, 0), ()),
    (ColumnMargin, "beta"): ("beta of margin 'column'", "a number, above 0", (1e-9,), (0.0,)),
}
NEEDED = {"gamma": 1.0, "gamma0": 1.0, "beta": 2.0, "column": "mine", "column_unit": "reward"}


def test_every_number_of_a_term_is_there():
    numbers = {
        (term, name)
        for term in {*WEIGHTS.values(), *MARGINS.values()}
        for name, parameter in signature(term).parameters.items()
        if re.search("int|float", str(parameter.annotation))
    }
    assert numbers == NUMBERS.keys()


@pytest.mark.parametrize(("term", "option"), NUMBERS)
def test_the_numbers_that_a_term_takes(term, option):
    name, takes, taken, refused = NUMBERS[term, option]
    needed = {key: value for key, value in NEEDED.items() if signature(term).parameters.get(key)}
    for value in taken:
        made = term(**{**needed, option: value})
        assert getattr(made, option, value) == value
    for value in (*refused, math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"^{re.escape(name)}.* {re.escape(str(value))}") as error:
            term(**{**needed, option: value})
        if takes:
            assert str(error.value) == f"{name} must be {takes}; it is {value}"
        else:
            assert option in str(error.value)


# What a term says of itself: the columns that it reads, what is measured for it, its options, and what holds of it
GIVEN = {"holds_target", "takes_target"}
SAID: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...], str, set[str]]] = {
    ("weight", "score-gap"): (SCORES, (), "score_gap_", set()),
    ("weight", "column"): (("mine",), (), "weight_", {"column_minimum"}),
    ("weight", "dr-dpo"): ((), (), "dr_dpo_", {"compares_pairs"}),
    ("weight", "beta-dpo-kept"): ((), (), "beta_dpo_", {"remembers"}),
    ("weight", "madpo"): (SCORES, (), "madpo_", set()),
    ("margin", "gap-aware"): ((FACTOR,), (), "gap_aware_", {*GIVEN, "remembers"}),
    ("margin", "gamma-po"): ((), (), "gamma_po_", {*GIVEN, "remembers"}),
    ("margin", "amapo"): ((), (), "amapo_", {"holds_target", "remembers"}),
    ("margin", "geometric-anchor"): ((), ("anchor_score_gap", "anchor_gap"), "anchor_", GIVEN),
    ("margin", "gradient-norm"): ((), ("relative_gradient_norm",), "gradient_norm_", {*GIVEN, "further_options"}),
    ("margin", "column"): (("mine",), (), "margin_", {"holds_target"}),
    ("margin", "r-dpo"): ((), (), "r_dpo_", set()),
    ("margin", "odpo"): (SCORES, (), "odpo_", set()),
    ("margin", "alpha-dpo"): ((), (), "alpha_dpo_", {*GIVEN, "needs_reference", "remembers"}),
    ("margin", "beta-dpo"): ((), (), "beta_dpo_", {"remembers"}),
}


def test_what_a_term_says_of_itself():
    flags = ("holds_target", "compares_pairs", "needs_reference", "further_options")
    found = {}
    for kind, table in {"weight": WEIGHTS, "margin": MARGINS}.items():
        for name, term in table.items():
            needed = {key: value for key, value in NEEDED.items() if signature(term).parameters.get(key)}
            true = {flag for flag in flags if getattr(term, flag)}
            true |= {"takes_target"} if term.takes_target() else set()
            true |= {"column_minimum"} if term.column_minimum == 0 else set()
            true |= {"remembers"} if term(**needed).state_dict() else set()
            found[kind, name] = (term(**needed).columns, term.probes, term.option_prefix, true)
    assert found == SAID
    kept = WEIGHTS["column"]("mine").keeps({"mine": torch.tensor([0.0, 1e-9, 2.0])})
    assert kept.tolist() == [False, True, True]
    assert MARGINS["gradient-norm"].further_options == ("anchor_scope",)
    assert Term.compares_pairs is Term.needs_reference is Term.holds_target is False
    assert Term.columns == Term.probes == Term.further_options == ()
    assert Term.keeps_only == ""
    assert Term.column_minimum is None
