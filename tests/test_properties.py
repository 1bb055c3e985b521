"""Every term, for whatever numbers come: finite, in the order of the pairs, with the right gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_margins.links import CPO_LINKS, margin_loss
from trl_margins.objective import Objective
from trl_margins.pairs import PairLogps, PairView
from trl_margins.rewards import (
    LengthNormalizedReward,
    LogRatioReward,
    SummedReward,
    alphapo,
    length_normalized,
    log_ratio,
)
from trl_margins.terms import Term
from trl_margins.terms.adaptive import AdaptiveMargin
from trl_margins.terms.anchor import AnchorMargin, GradientNormMargin, anchor_weight
from trl_margins.terms.column import ColumnMargin, ColumnWeight
from trl_margins.terms.dynamic_target import DynamicTargetMargin
from trl_margins.terms.evaluation_factor import EvaluationFactorMargin
from trl_margins.terms.score_gap import ScoreGapWeight

pytestmark = pytest.mark.rehearsal

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TERMS = {
    "score gap": lambda: ScoreGapWeight(),
    "score gap, squared": lambda: ScoreGapWeight("quadratic"),
    "score gap, exponential": lambda: ScoreGapWeight("exponential"),
    "score gap, exponential over its mean": lambda: ScoreGapWeight("exponential", normalize=True),
    "score gap, hard": lambda: ScoreGapWeight("hard", threshold=1.0, normalize=True),
    "gap-aware": lambda: EvaluationFactorMargin(3.0),
    "gap-aware, added": lambda: EvaluationFactorMargin(3.0, "sqrt", "add"),
    "gamma-po": lambda: DynamicTargetMargin(4.0),
    "gamma-po, low price": lambda: DynamicTargetMargin(4.0, tau=0.1),
    "amapo": lambda: AdaptiveMargin(3.0),
    "amapo, paper": lambda: AdaptiveMargin(3.0, "paper"),
    "amapo, without z-normalisation": lambda: AdaptiveMargin(3.0, z_normalize=False),
    "amapo, linear": lambda: AdaptiveMargin(3.0, exponential=False, zero_well_ranked=False),
    "anchor": lambda: AnchorMargin(2.5, 0.25),
    "gradient norm": lambda: GradientNormMargin(2.5, 0.25),
    "column": lambda: ColumnWeight("relative_gradient_norm"),
    "column of margins": lambda: ColumnMargin("anchor_gap", "gamma_beta_ratio", 2.5),
}
WEIGHTS = (ScoreGapWeight, ColumnWeight)
numbers = st.floats(-1e4, 1e4, width=32)
pairs = st.integers(1, 12).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "gap": st.lists(numbers, min_size=n, max_size=n),
            "score_chosen": st.lists(numbers, min_size=n, max_size=n),
            "score_rejected": st.lists(numbers, min_size=n, max_size=n),
            "evaluation_factor": st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n),
            "order": st.permutations(range(n)),
        }
    )
)
thorough = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def view_of(drawn, dtype, order=slice(None)):
    columns = {
        name: torch.tensor(drawn[name])[order] for name in ("score_chosen", "score_rejected", "evaluation_factor")
    }
    columns["anchor_gap"] = columns["score_chosen"]
    columns["relative_gradient_norm"] = columns["score_chosen"].abs()
    gap = torch.tensor(drawn["gap"])[order].to(dtype)
    return PairView.of_gaps(gap, columns, training=True)


@pytest.mark.parametrize("name", TERMS)
@thorough
@given(drawn=pairs)
def test_finite_for_finite_input(name, drawn):
    """Over two batches, the second with what the first left; and the loss made of it."""
    for dtype in DTYPES:
        term = TERMS[name]()
        for _ in range(2):
            view = view_of(drawn, dtype)
            gap, values = view.reward_gap, term(view)
            assert values.shape == gap.shape
            assert values.isfinite().all(), dtype
            if isinstance(term, WEIGHTS):
                assert (values >= 0).all()
                loss = margin_loss(gap, 0.5, values)
            else:
                loss = margin_loss(gap, values)
            assert loss.isfinite().all(), dtype


@pytest.mark.parametrize("name", TERMS)
@thorough
@given(drawn=pairs)
def test_the_order_of_the_pairs_does_not_matter(name, drawn):
    """Up to the rounding of a mean; in float64, where the sizes of the numbers leave it room."""
    order = torch.tensor(drawn["order"])
    # a hundred standard deviations from the mean, a last digit becomes a factor
    drawn = {**drawn, "gap": [gap / 100 for gap in drawn["gap"]]}
    view, turned = view_of(drawn, torch.float64), view_of(drawn, torch.float64, order)
    gap = view.reward_gap
    one, other = TERMS[name]()(view)[order], TERMS[name]()(turned)
    near_mean = (gap.float() - gap.float().mean()).abs()[order] < 1e-3  # on this side or on that of AMaPO's zero
    compared = ~near_mean if name.startswith("amapo") else torch.ones_like(near_mean)
    torch.testing.assert_close(other[compared], one[compared], rtol=2e-2 if "amapo" in name else 1e-4, atol=1e-4)


@thorough
@given(
    gap=st.lists(numbers, min_size=1, max_size=8),
    margin=numbers,
    weight=st.floats(0, 1e4, width=32),
    smoothing=st.floats(0, 0.5),
)
def test_margin_loss(gap, margin, weight, smoothing):
    """Finite, not below 0 without smoothing, falling in the gap, and with gradient −w·(σ(−z) − ε)."""
    gap = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
    loss = margin_loss(gap, margin, weight, smoothing)
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), gap)
    expected = -weight * (torch.sigmoid(margin - gap) - smoothing)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-6, atol=1e-6 * max(weight, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@thorough
@given(
    logps=st.lists(st.floats(-1e4, 0, width=32), min_size=1, max_size=8),
    length=st.integers(0, 2000),
    alpha=st.floats(-0.5, 0.5),
)
def test_rewards_are_finite(dtype, logps, length, alpha):
    logps = torch.tensor(logps).to(dtype)
    lengths = torch.full(logps.shape, length)
    mean = length_normalized(logps, lengths)
    assert mean.isfinite().all()
    assert (mean <= 0).all()
    assert log_ratio(logps, logps.flip(0)).isfinite().all()
    if length > 400:  # as SimPO-like losses have it: some nats a token
        assert alphapo(mean.float(), alpha).isfinite().all()


@thorough
@given(gaps=st.lists(numbers, min_size=1, max_size=8), beta=st.floats(0.1, 20), gamma=st.floats(0, 5))
def test_the_anchor_weight_falls_in_the_anchor_gap(gaps, beta, gamma):
    weight = anchor_weight(torch.tensor(sorted(gaps)), beta, gamma)
    assert weight.isfinite().all()
    rounding = 1e-6 * beta  # some last digits of the largest weight
    assert ((weight >= 0) & (weight <= beta + rounding)).all()
    assert (weight.diff() <= rounding).all()


@pytest.mark.parametrize("reward", [LengthNormalizedReward(), SummedReward(), LogRatioReward()], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_gradients_by_finite_differences(name, reward):
    """Of the whole objective in the log-probabilities: weight and margin are constants to it."""
    generator = torch.Generator().manual_seed(0)
    draw = {key: torch.rand(4, generator=generator).double() for key in ("a", "b", "c", "d", "w", "l", "f")}
    columns = {"score_chosen": 9 * draw["w"], "score_rejected": 9 * draw["l"], "evaluation_factor": draw["f"]}
    columns |= {"anchor_gap": draw["w"] - draw["l"], "relative_gradient_norm": draw["w"]}
    lengths = torch.tensor([[3, 5, 7, 2], [4, 4, 1, 9]])
    chosen, rejected = (-20 * draw[key] - 1 for key in ("a", "b"))
    references = (-20 * draw["c"], -20 * draw["d"])
    term = TERMS[name]()
    kind = "weight" if isinstance(term, WEIGHTS) else "margin"

    def objective(**terms):
        return Objective(reward, CPO_LINKS["sigmoid"], beta=1.5, **terms)

    def logps(w, l):  # noqa: E741
        return PairLogps(w, l, *lengths, *references)

    whole = objective(**{kind: term})
    columns = {key: values.float() for key, values in columns.items()}
    w, l = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()  # noqa: E741
    output = whole(logps(w, l), columns)
    gradients = torch.autograd.grad(output.losses.sum(), (w, l))

    class Constant(Term):
        name, holds_target = "constant", True

        def __call__(self, view):
            return getattr(output, kind)

    frozen, step = objective(**{kind: Constant()}), 1e-6
    for side, gradient in enumerate(gradients):
        for i in range(4):
            ends = []
            for sign in (1, -1):
                moved = [chosen.clone(), rejected.clone()]
                moved[side][i] += sign * step
                ends.append(frozen(logps(*moved), columns).losses.sum())
            slope = ((ends[0] - ends[1]) / (2 * step)).item()
            rounding = 2e-15 * abs(ends[0].item()) / step
            assert gradient[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-7 + rounding)
