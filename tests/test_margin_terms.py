"""The margin terms against NumPy written from the papers, over hundreds of random batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from operators import Operators
from scipy.optimize import brentq
from scipy.special import expit, logsumexp
from test_core import random_pairs

from trl_margins.evaluation.label_smoothing import implied_label_smoothing
from trl_margins.links import CPO_LINKS
from trl_margins.objective import Objective
from trl_margins.pairs import PairView
from trl_margins.rewards import LengthNormalizedReward
from trl_margins.terms.adaptive import AdaptiveMargin, adaptive_margin
from trl_margins.terms.alpha_dpo import ReferenceMargin
from trl_margins.terms.anchor import AnchorMargin, GradientNormMargin, anchor_margin, anchor_weight
from trl_margins.terms.baselines import (
    DrDPOWeight,
    LengthMargin,
    MarginAdaptiveWeight,
    ScoreOffsetMargin,
    dr_dpo_weight,
    margin_adaptive_weight,
    score_offset_margin,
)
from trl_margins.terms.beta_dpo import BatchBetaMargin
from trl_margins.terms.dynamic_target import DynamicTargetMargin, dynamic_target_margin
from trl_margins.terms.evaluation_factor import EvaluationFactorMargin, evaluation_factor_margin, mapped_factor
from trl_margins.terms.history import GapHistory
from trl_margins.terms.score_gap import ScoreGapWeight, score_gap_weight
from trl_margins.trainers.configs import MarginDPOConfig


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class TestEvaluationFactor:
    MAPPINGS = {
        "log": lambda ef: np.log(1 / ef),
        "linear": lambda ef: 1 - ef,
        "square": lambda ef: 1 - ef**2,
        "sqrt": lambda ef: 1 - np.sqrt(ef),
    }

    @pytest.mark.parametrize("mapping", MAPPINGS)
    @pytest.mark.parametrize("normalization", ["scale", "add", "none"])
    def test_against_numpy(self, mapping, normalization):
        rng = np.random.default_rng(0)
        for _ in range(100):
            ef, gamma = rng.uniform(0, 1, 24).astype(np.float32), rng.uniform(0.1, 5)
            f = self.MAPPINGS[mapping](np.maximum(ef, 0.05).astype(np.float64))
            beta = rng.uniform(0.5, 10)
            gap = {"scale": gamma * f / f.mean(), "add": f - f.mean() + gamma, "none": f}[normalization]
            kwargs = {"floor": 0.05, "beta": beta}
            ours = evaluation_factor_margin(torch.tensor(ef), beta * gamma, mapping, normalization, **kwargs)
            np.testing.assert_allclose(ours.numpy(), beta * gap, rtol=2e-5, atol=5e-5)  # ten last digits of 50

    def test_the_mean_is_the_training_sets(self):
        train, batch = torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.tensor([0.5, 0.1])
        term = EvaluationFactorMargin(gamma=3.0)
        term.fit({"evaluation_factor": train})
        assert term.n_floored == 0
        expected = 3.0 * -batch.log() / -train.log().mean()
        torch.testing.assert_close(term(PairView.of_gaps(torch.zeros(2), {"evaluation_factor": batch})), expected)

    def test_a_checkpoint_has_the_mean(self):
        """A resumed run goes on with it, though its training set has another one."""
        term, resumed, batch = EvaluationFactorMargin(3.0), EvaluationFactorMargin(3.0), torch.tensor([0.5, 0.1])
        view = PairView.of_gaps(torch.zeros(2), {"evaluation_factor": batch})
        term.fit({"evaluation_factor": torch.tensor([0.1, 0.2])})
        resumed.fit({"evaluation_factor": torch.tensor([0.8, 0.9])})
        assert not torch.allclose(resumed(view), term(view))
        resumed.load_state_dict(term.state_dict())
        assert torch.equal(resumed(view), term(view))

    def test_factors_are_clipped_at_both_ends(self):
        """At the floor and at 1, and what lies beyond; only what lies below the floor counts as floored."""
        ef = torch.tensor([0.0, 0.0099, 0.01, 0.0101, 0.999, 1.0, 1.5])
        clipped = np.clip(ef.numpy(), np.float32(0.01), 1).astype(np.float64)
        for mapping, f in self.MAPPINGS.items():
            np.testing.assert_allclose(mapped_factor(ef, mapping).numpy(), f(clipped), rtol=1e-4, atol=1e-6)
        term = EvaluationFactorMargin(gamma=1.0, floor=0.5)
        term.fit({"evaluation_factor": torch.tensor([0.499, 0.5, 0.501])})
        assert term.n_floored == 1

    def test_a_small_mean_still_divides(self):
        ef = torch.tensor([1 - 1e-4, 1 - 3e-4], dtype=torch.float64)
        margins = evaluation_factor_margin(ef, 2.0, "linear")
        torch.testing.assert_close(margins, torch.tensor([1.0, 3.0], dtype=torch.float64), rtol=1e-6, atol=0)

    def test_in_16_bits_the_margins_are_float32(self):
        ef = torch.tensor([0.3, 0.6, 0.9]).bfloat16()
        margins = evaluation_factor_margin(ef, 2.0)
        assert margins.dtype == torch.float32
        torch.testing.assert_close(margins, evaluation_factor_margin(ef.float(), 2.0))

    def test_edges_are_numbers(self):
        for mapping in self.MAPPINGS:
            for normalization in ("scale", "add", "none"):
                margins = evaluation_factor_margin(torch.tensor([0.0, 1.0, 0.5]), 2.0, mapping, normalization)
                assert torch.isfinite(margins).all()
        # the same answer twice in every pair: equal factors, hence the plain target margin
        assert evaluation_factor_margin(torch.ones(3), 2.0).tolist() == [2.0] * 3
        term = EvaluationFactorMargin(gamma=1.0)
        term.fit({"evaluation_factor": torch.tensor([0.001, 0.5])})
        assert term.n_floored == 1

    def test_the_mean_is_that_of_the_training_set_to_the_last_digit_and_is_said(self, caplog):
        term, ef = EvaluationFactorMargin(gamma=1.0, floor=0.05), torch.linspace(0.001, 1, 1000)
        with caplog.at_level("INFO", "trl_margins"):
            term.fit({"evaluation_factor": ef})
        factors = mapped_factor(ef, floor=0.05).numpy()
        assert term.mean == factors.mean(dtype=np.float64)
        said = f"{len(ef)} training pairs: mean margin factor {term.mean:.4f}; 49 below the floor of 0.05 count as it"
        assert caplog.messages == [f"evaluation factor of {said}"]

    def test_errors(self):
        ef = torch.tensor([0.5])
        with pytest.raises(ValueError, match="unknown mapping 'cube'"):
            evaluation_factor_margin(ef, 1.0, "cube")
        with pytest.raises(ValueError, match="unknown normalization 'max'"):
            evaluation_factor_margin(ef, 1.0, normalization="max")
        with pytest.raises(ValueError, match="between 0 and 1, not at 0"):
            evaluation_factor_margin(ef, 1.0, floor=0)
        with pytest.raises(ValueError, match="between 0 and 1, not at 1"):
            evaluation_factor_margin(ef, 1.0, floor=1)
        EvaluationFactorMargin(gamma=0.0)
        with pytest.raises(ValueError, match="γ of GaPO must be a number, at least 0"):
            EvaluationFactorMargin(gamma=-0.1)
        EvaluationFactorMargin(gamma=-0.1, normalization="add")


def mirror_descent(m: np.ndarray, gamma0: float, tau: float, steps: int) -> np.ndarray:
    """The authors' algorithm: eqs. 23 and 24."""
    n = len(m)
    p = np.full(n, 1 / n)
    eta = min(0.5 / tau, 1)
    for _ in range(steps):
        gradient = gamma0 / (1 + np.exp(m - n * p * gamma0)) + tau * (1 + np.log(n * p))
        p = p * np.exp(-eta * gradient)
        p = p / p.sum()
    return gamma0 * n * p


def scipys_optimum(m: np.ndarray, gamma0: float, tau: float) -> np.ndarray:
    """n·p: SciPy's root of one equation in the multiplier, in which each share is a root by bisection."""

    def log_shares(c: float) -> np.ndarray:
        low, high = np.full(len(m), (c - gamma0) / tau), np.full(len(m), c / tau)
        for _ in range(100):
            u = (low + high) / 2
            too_large = gamma0 * expit(gamma0 * np.exp(np.minimum(u, 700)) - m) + tau * u > c
            low, high = np.where(too_large, low, u), np.where(too_large, u, high)
        return (low + high) / 2

    c = brentq(lambda c: logsumexp(log_shares(c)) - np.log(len(m)), 0, gamma0, xtol=1e-15, rtol=1e-15)
    return np.exp(log_shares(c))


class TestDynamicTarget:
    def test_against_numpy(self):
        rng = np.random.default_rng(1)
        for _ in range(300):
            b, h = rng.integers(1, 40), rng.integers(0, 200)
            gaps = rng.normal(rng.uniform(-2, 2), rng.uniform(0.1, 4), b + h)
            gamma0 = rng.uniform(0.1, 5)
            tau = rng.uniform(max(0.5, gamma0**2 / 4), 20)  # where the authors' steps arrive
            expected = mirror_descent(gaps, gamma0, tau, 20)
            history = torch.tensor(gaps[b:]) if h else None
            ours = dynamic_target_margin(torch.tensor(gaps[:b]), gamma0, tau, history)
            np.testing.assert_allclose(ours.numpy(), expected[:b], rtol=1e-5)

    @pytest.mark.parametrize("tau", [1.6, 2.0, 20.0])
    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_few_steps_are_the_authors(self, tau, steps):
        """Where they arrive, before they have arrived."""
        gaps = np.array([-1.0, 0.2, 0.9, 3.0])
        ours = dynamic_target_margin(torch.tensor(gaps), 2.0, tau, steps=steps)
        np.testing.assert_allclose(ours.numpy(), mirror_descent(gaps, 2.0, tau, steps), rtol=1e-12)

    @pytest.mark.parametrize(("gamma0", "tau"), [(4.0, 10.0), (0.375, 10.0), (5.0, 20.0), (3.0, 3.0)])
    @pytest.mark.parametrize(("steps", "error"), [(20, 2e-6), (60, 1e-12)])
    def test_the_steps_arrive_at_scipys_optimum(self, gamma0, tau, steps, error):
        """The paper's four settings, with gaps from all alike to far apart."""
        rng = np.random.default_rng(5)
        for spread in (0.03, 0.3, 1, 3, 10):
            m = rng.normal(rng.uniform(-3, 3), spread, 256)
            ours = dynamic_target_margin(torch.tensor(m), gamma0, tau, steps=steps).numpy() / gamma0
            np.testing.assert_allclose(ours, scipys_optimum(m, gamma0, tau), rtol=0, atol=error)

    @pytest.mark.parametrize("tau", [1e-8, 3e-4, 0.05, 0.4, 1.0, 1e3])
    @pytest.mark.parametrize("gamma0", [0.375, 2.0, 5.0])
    def test_every_tau_has_scipys_optimum(self, gamma0, tau):
        """Also where the authors' steps swing around it: one gap or many, all alike or very far apart, in float32."""
        rng = np.random.default_rng(7)
        for n, spread in ((1, 1.0), (2, 10.0), (17, 0.0), (64, 1e4), (300, 3.0)):
            m = rng.normal(0.5, spread, n).astype(np.float32)
            ours = dynamic_target_margin(torch.tensor(m), gamma0, tau)
            assert ours.dtype == torch.float32
            shares = ours.double().numpy() / gamma0
            np.testing.assert_allclose(shares, scipys_optimum(m.astype(float), gamma0, tau), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("gamma0", "tau"), [(1.414, 0.5), (1.4, 0.6), (2.0, 1.0), (2.0, 1.6), (3.0, 3.0), (5.0, 5.0)]
    )
    def test_few_clear_pairs_among_bad_ones(self, gamma0, tau):
        """They take almost all of the margin, and the steps' factor is largest there."""
        rng = np.random.default_rng(3)
        for share in (0.02, 0.1, 0.5):
            m = np.where(rng.random(64) < share, 9.0, -9.0) + rng.normal(0, 0.1, 64)
            ours = dynamic_target_margin(torch.tensor(m), gamma0, tau).numpy() / gamma0
            np.testing.assert_allclose(ours, scipys_optimum(m, gamma0, tau), rtol=0, atol=1e-3)

    @pytest.mark.parametrize(("tau", "most"), [(5.0, 300), (0.01, 3500)])
    def test_few_kernels_and_no_value_read_from_the_device(self, tau, most):
        gaps = torch.randn(256)
        with Operators() as seen:
            dynamic_target_margin(gaps, 2.0, tau)
        assert "_local_scalar_dense" not in seen.names
        assert "nonzero" not in seen.names
        assert len(seen.names) < most

    def test_shape_of_the_margins(self):
        """They rise with the gap (Fig. 5), have mean γ0, and leave it only as far as τ lets them."""
        gaps = torch.linspace(-4, 8, 101, dtype=torch.float64)
        margins = dynamic_target_margin(gaps, 2.0, 5.0)
        assert (margins.diff() > 0).all()
        assert margins.mean().item() == pytest.approx(2.0)
        stiff = dynamic_target_margin(gaps, 2.0, 500.0)
        assert (stiff - 2.0).abs().max() < (margins - 2.0).abs().max() / 20

    def test_one_value_of_gaps_is_simpo(self):
        torch.testing.assert_close(dynamic_target_margin(torch.full((5,), 1.3), 0.7, 3.0), torch.full((5,), 0.7))

    def test_large_gaps_stay_numbers(self):
        gaps = torch.tensor([1e4, -1e4, 0.0])
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.isfinite(dynamic_target_margin(gaps.to(dtype), 4.0, 0.1)).all()

    @pytest.mark.parametrize(
        ("gamma0", "tau"), [(0.0, 1.0), (1.0, 0.0), (1.0, -2.0), (float("nan"), 1.0), (1.0, float("inf"))]
    )
    def test_what_cannot_be_divided(self, gamma0, tau):
        with pytest.raises(ValueError, match="must be > 0"):
            dynamic_target_margin(torch.zeros(2), gamma0, tau)

    def test_the_queue(self):
        """It learns from training batches alone, and fills the batch up."""
        term = DynamicTargetMargin(gamma0=1.0, tau=1.0, estimation_size=6)
        first, second = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.1])
        term(PairView.of_gaps(torch.tensor([9.0])))
        assert len(term.history) == 0
        alone = term(PairView.of_gaps(first, training=True))
        torch.testing.assert_close(alone, dynamic_target_margin(first, 1.0, 1.0))
        filled = term(PairView.of_gaps(second, training=True))
        torch.testing.assert_close(filled, dynamic_target_margin(second, 1.0, 1.0, history=first))
        assert len(term.history) == 4

    def test_the_filling_is_spread_over_the_queue(self):
        """Not the latest of it; and a batch that is large enough is solved for alone."""
        term = DynamicTargetMargin(gamma0=1.0, tau=1.0, estimation_size=4, queue_size=6)
        for start in (0.0, 3.0, 6.0):  # the first three give way
            term(PairView.of_gaps(torch.arange(start, start + 3), training=True))
        batch = torch.tensor([2.0, 0.1])
        filled = term(PairView.of_gaps(batch))
        torch.testing.assert_close(filled, dynamic_target_margin(batch, 1.0, 1.0, torch.tensor([3.0, 6.0])))
        large = torch.tensor([2.0, 0.1, 1.0, -1.0])
        torch.testing.assert_close(term(PairView.of_gaps(large)), dynamic_target_margin(large, 1.0, 1.0))

    def test_in_16_bits_the_margins_are_float32(self):
        gaps = torch.tensor([0.5, -1.0, 3.0], dtype=torch.bfloat16)
        margins = dynamic_target_margin(gaps, 2.0, 1.0, history=torch.tensor([0.25]))
        assert margins.dtype == torch.float32
        expected = dynamic_target_margin(gaps.float(), 2.0, 1.0, history=torch.tensor([0.25]))
        torch.testing.assert_close(margins, expected, rtol=1e-6, atol=0)

    def test_centered(self):
        gaps = torch.tensor([0.5, -1.0, 3.0])
        plain, centered = (DynamicTargetMargin(2.0, centered=c)(PairView.of_gaps(gaps)) for c in (False, True))
        torch.testing.assert_close(centered, plain - 2.0)

    def test_ranks_solve_together(self):
        """Two ranks with two gaps each: each gets its part of the four's solution."""
        everyone = torch.tensor([0.5, -1.0, 2.0, 0.1])
        whole = dynamic_target_margin(everyone, 1.0, 1.0)
        for rank in range(2):
            view = PairView.of_gaps(everyone[2 * rank :][:2], gather=lambda local: everyone, first=2 * rank)
            mine = DynamicTargetMargin(1.0, 1.0)(view)
            torch.testing.assert_close(mine, whole[2 * rank :][:2])


def amapo(delta: np.ndarray, beta: float, variant: str, z: bool, exp: bool, zero: bool) -> np.ndarray:
    gap = delta * (beta if variant == "paper" else 1.0)
    mu, sigma = gap.mean(), gap.std(ddof=1)
    a = (mu - gap) / sigma * mu if z else np.full_like(gap, mu)
    margin = beta * np.exp(a) if exp else a * (beta if variant == "code" else 1.0)
    if zero:
        keep = gap < mu if variant == "code" or not z else a > 0
        margin = np.where(keep, margin, 0.0)
    return margin


class TestAdaptive:
    @pytest.mark.parametrize("variant", ["code", "paper"])
    @pytest.mark.parametrize("z", [True, False])
    @pytest.mark.parametrize("exp", [True, False])
    @pytest.mark.parametrize("zero", [True, False])
    def test_against_numpy(self, variant, z, exp, zero):
        rng = np.random.default_rng(3)
        for _ in range(60):
            delta, beta = rng.normal(rng.uniform(-1, 1), rng.uniform(0.05, 1), 32), rng.uniform(1, 4)
            ours = adaptive_margin(torch.tensor(delta), beta, variant, z, exp, zero)
            np.testing.assert_allclose(ours.numpy(), amapo(delta, beta, variant, z, exp, zero), rtol=1e-9, atol=1e-12)

    def test_well_ranked_pairs_have_none(self):
        delta = torch.tensor([-0.5, 0.0, 0.4, 1.5])
        margins = adaptive_margin(delta, 3.0)
        assert (margins[:2] > 0).all()
        assert margins[3] == 0.0
        assert (margins[0] > margins[1]).item()

    @pytest.mark.parametrize("variant", ["code", "paper"])
    def test_no_spread_is_no_margin(self, variant):
        """A batch of one, or of equal gaps: SimPO without a target margin."""
        for delta in (torch.tensor([0.7]), torch.full((4,), 0.7)):
            assert adaptive_margin(delta, 3.0, variant).abs().max() == 0.0
            assert adaptive_margin(delta, 3.0, variant, zero_well_ranked=False).abs().max() == 0.0

    def test_large_gaps_stay_numbers(self):
        for dtype in (torch.float32, torch.bfloat16):
            delta = torch.tensor([1e4, -1e4, 9e3], dtype=dtype)
            for variant in ("code", "paper"):
                assert torch.isfinite(adaptive_margin(delta, 3.0, variant, zero_well_ranked=False)).all()

    def test_statistics_are_filled_up_with_recent_gaps(self):
        """A batch of one sees what a batch of four sees, once three gaps have gone before."""
        term = AdaptiveMargin(beta=2.0, estimation_size=4)
        deltas = torch.tensor([0.9, 0.1, -0.3, -0.2])
        margins = torch.cat([term(PairView.of_gaps(2.0 * d[None], training=True)) for d in deltas])
        torch.testing.assert_close(margins[3:], adaptive_margin(deltas, 2.0)[3:])
        assert margins[0] == 0.0

    def test_an_evaluation_neither_learns_nor_is_filled_up(self):
        term, seen = AdaptiveMargin(beta=2.0, estimation_size=4), torch.tensor([0.9, 0.1, -0.3])
        term(PairView.of_gaps(2.0 * seen, beta=2.0, training=True))
        evaluated = torch.tensor([0.4, 0.5, -0.6])
        margins = term(PairView.of_gaps(2.0 * evaluated, beta=2.0, evaluation=True))
        torch.testing.assert_close(margins, adaptive_margin(evaluated, 2.0))
        # outside of a trainer, neither training nor evaluation: filled up, and not learned
        alone = term(PairView.of_gaps(torch.tensor([0.2]), beta=2.0))
        torch.testing.assert_close(alone, adaptive_margin(torch.tensor([0.1, 0.9, 0.1, -0.3]), 2.0)[:1])
        assert term.history.recent(9).tolist() == pytest.approx(seen.tolist())

    def test_the_filling_is_the_latest_and_no_more_than_is_missing(self):
        term = AdaptiveMargin(beta=1.0, estimation_size=3)
        for gaps in ([9.0, 8.0], [0.1, 0.2]):
            term(PairView.of_gaps(torch.tensor(gaps), training=True))
        batch = torch.tensor([0.5, -0.6])
        expected = adaptive_margin(torch.tensor([0.5, -0.6, 0.2]), 1.0)[:2]
        torch.testing.assert_close(term(PairView.of_gaps(batch)), expected)
        assert len(term.history) == 3

    @pytest.mark.parametrize("variant", ["code", "paper"])
    def test_the_exponent_stops_at_eighty_and_not_before(self, variant):
        beta, delta = 1.5, np.array([10.0, 30.0, 40.0, 50.0])
        for scale in (1.0, 3.0):
            exponent = (scale * (delta.mean() - delta) / delta.std(ddof=1) * delta.mean()) * (
                beta if variant == "paper" else 1.0
            )
            expected = np.where(exponent > 0, beta * np.exp(np.minimum(exponent, 80)), 0.0)
            found = adaptive_margin(torch.tensor(scale * delta), beta, variant)
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
        assert 8 < exponent[1] < 80 < exponent[0]

    @pytest.mark.parametrize("variant", ["code", "paper"])
    def test_a_pair_at_the_mean_has_none(self, variant):
        margins = adaptive_margin(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 2.0, variant)
        assert (margins > 0).tolist() == [True, False, False]

    def test_statistics_given_are_those_of_the_gaps_without_beta(self):
        """Under both variants: μ and σ of Δ, whatever the batch's own are."""
        delta, seen = torch.tensor([0.2, 0.9]), torch.tensor([0.2, 0.9, 0.4, -0.5])
        for variant in ("code", "paper"):
            given = adaptive_margin(delta, 3.0, variant, mean=seen.mean(), std=seen.std())
            torch.testing.assert_close(given, adaptive_margin(seen, 3.0, variant)[:2])

    def test_in_16_bits_the_statistics_are_float32(self):
        """A mean of many gaps that are nearly alike has no digits left in bfloat16."""
        delta = torch.linspace(1, 1.25, 64).bfloat16()
        for found in (
            adaptive_margin(delta, 2.0),
            AdaptiveMargin(2.0)(PairView.of_gaps(2.0 * delta, beta=2.0)),
        ):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, adaptive_margin(delta.float(), 2.0), rtol=1e-4, atol=1e-4)

    def test_unknown_variant(self):
        with pytest.raises(ValueError, match="unknown AMaPO variant 'article'; known: code, paper"):
            AdaptiveMargin(2.0, "article")
        with pytest.raises(ValueError, match="beta of AMaPO must be a number, above 0; it is 0"):
            AdaptiveMargin(0.0)
        with pytest.raises(ValueError, match="estimation_size of AMaPO must be a whole number, at least 1; it is 0"):
            AdaptiveMargin(2.0, estimation_size=0)


class TestAnchor:
    M, GAMMAS = np.array([0.5, -1.0, 3.0]), np.array([0.2, -0.4, 1.5])  # reward gaps, and Γ

    def test_against_numpy(self):
        m, anchor_gap = torch.tensor(self.M, requires_grad=True), torch.tensor(self.GAMMAS, requires_grad=True)
        for gamma, options in ((0.7, {"gamma": 0.7}), (0.0, {})):
            margin = anchor_margin(m, anchor_gap, 2.0, **options)
            np.testing.assert_allclose(margin.numpy(), self.M - 2 * self.GAMMAS + gamma)
            weight = anchor_weight(anchor_gap, 2.0, **options)
            np.testing.assert_allclose(weight.numpy(), 2 * sigmoid(gamma - 2 * self.GAMMAS))

    def test_the_term(self):
        """Of either measurement, the gap at the anchor first; and what it logs."""
        term, m = AnchorMargin(2.0, 0.7), torch.tensor(self.M)
        there = {"anchor_score_gap": torch.tensor(self.M / 2 - self.GAMMAS)}
        for columns in (there, {"anchor_gap": torch.tensor(self.GAMMAS)}, {**there, "anchor_gap": torch.zeros(3)}):
            view = PairView.of_gaps(m, columns, beta=2.0, training=True)
            margin = term(view)
            np.testing.assert_allclose(margin, self.M - 2 * self.GAMMAS + 0.7)
            seen = term.observed(view, margin)
            assert seen.keys() == {"anchor/gap", "anchor/weight"}
            np.testing.assert_allclose(seen["anchor/gap"], self.GAMMAS)
            np.testing.assert_allclose(seen["anchor/weight"], 2 * sigmoid(0.7 - 2 * self.GAMMAS))
        assert term(PairView.of_gaps(m, beta=2.0)).tolist() == [0.7] * 3
        for each, name in ((term, "anchor_gap"), (GradientNormMargin(2.0, 0.7), "relative_gradient_norm")):
            with pytest.raises(KeyError, match=f"margin '{each.name}' needs '{name}', which our trainers"):
                each(PairView.of_gaps(m, beta=2.0, training=True))


# The functions behind the terms, of values in (0, 1) that may have a gradient
FUNCTIONS = {
    "score_gap_weight": lambda x: score_gap_weight(x, x.flip(0)),
    "score_gap_weight, exponential": lambda x: score_gap_weight(x, x.flip(0), "exponential", 0.1, normalize=True),
    "mapped_factor": mapped_factor,
    "evaluation_factor_margin": lambda x: evaluation_factor_margin(x, 1.0),
    "evaluation_factor_margin, none": lambda x: evaluation_factor_margin(x, 1.0, normalization="none"),
    "dynamic_target_margin": lambda x: dynamic_target_margin(x, 1.0, 10.0),
    "dynamic_target_margin, history": lambda x: dynamic_target_margin(x, 1.0, 10.0, x.double().detach()),
    "dynamic_target_margin, bisected": lambda x: dynamic_target_margin(x, 2.0, 0.1),
    "adaptive_margin": lambda x: adaptive_margin(x, 2.0),
    "adaptive_margin, linear": lambda x: adaptive_margin(x, 2.0, "paper", z_normalize=False, exponential=False),
    "anchor_margin": lambda x: anchor_margin(x, x.flip(0), 2.0),
    "anchor_weight": lambda x: anchor_weight(x, 2.0),
    "dr_dpo_weight": lambda x: dr_dpo_weight(x, 1.0),
    "dr_dpo_weight, everyone": lambda x: dr_dpo_weight(x, 1.0, torch.cat([x, x])),
    "score_offset_margin": lambda x: score_offset_margin(x, x.flip(0), 1.0),
    "score_offset_margin, DPO": lambda x: score_offset_margin(x, x.flip(0), 0.0),
    "margin_adaptive_weight": lambda x: margin_adaptive_weight(x, x.flip(0)),
}
NOT_UPCAST = {"anchor_margin", "anchor_weight"}  # of what a trainer measured, in its dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_no_gradient_and_the_dtype_of_its_inputs(name, dtype):
    """At least float32; and it leaves its inputs as they are."""
    given = torch.linspace(0.1, 0.9, 5).to(dtype).requires_grad_()
    before = given.detach().clone()
    found = FUNCTIONS[name](given)
    assert found.shape == given.shape
    assert not found.requires_grad
    assert found.dtype == (dtype if name in NOT_UPCAST else torch.promote_types(dtype, torch.float32))
    assert found.isfinite().all()
    assert torch.equal(given, before)


TERMS = {
    "gap-aware": lambda: EvaluationFactorMargin(gamma=3.0),
    "gamma-po": lambda: DynamicTargetMargin(gamma0=1.0),
    "amapo": lambda: AdaptiveMargin(beta=2.0),
}


# the papers' numbers, and with them the authors' code: a class's own, the config's and the method's are the same
PUBLISHED = {
    "gap-aware": (EvaluationFactorMargin(1.0), {"mapping": "log", "normalization": "scale", "floor": 0.01}),
    "gamma-po": (
        DynamicTargetMargin(1.0),
        {"tau": 10.0, "steps": 20, "estimation_size": 256, "queue_size": 2048, "centered": False},
    ),
    "amapo": (
        AdaptiveMargin(1.0),
        {"variant": "code", "z_normalize": True, "exponential": True, "zero_well_ranked": True, "estimation_size": 32},
    ),
    "score-gap": (ScoreGapWeight(), {"transform": "linear", "threshold": None, "normalize": False}),
    "alpha-dpo": (ReferenceMargin(1.0), {"alpha": 0.2}),
    "beta-dpo": (BatchBetaMargin(), {"a": 0.6, "keep": 0.8}),
    "r-dpo": (LengthMargin(), {"alpha": 0.05}),
    "odpo": (ScoreOffsetMargin(), {"alpha": 1.0}),
    "dr-dpo": (DrDPOWeight(), {"beta_prime": 1.0}),
    "madpo": (
        MarginAdaptiveWeight(),
        {"c_max": 2.0, "c_min": 0.5, "steepness": 1.0, "tau": pytest.approx(6.9068, abs=1e-4)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_defaults(name):
    term, published = PUBLISHED[name]
    fields = MarginDPOConfig.__dataclass_fields__
    for option, value in published.items():
        field = "queue" if option == "queue_size" else option
        own = term.history.capacity if field == "queue" else getattr(term, option)
        assert own == value, option
        default = fields[f"{term.option_prefix}{option}"].default
        assert default == value or (option == "centered" and default is None), option  # None: False on CPO's base


@pytest.mark.parametrize("name", TERMS)
def test_no_gradient_flows_through_a_term(name):
    """The gradient is that of the loss with the margins as constants."""
    pairs = random_pairs(0, n=9)
    columns = {"evaluation_factor": torch.linspace(0.05, 0.9, 9)}
    common = {"reward": LengthNormalizedReward(), "link": CPO_LINKS["simpo"], "beta": 2.0}
    output = Objective(**common, margin=TERMS[name]())(pairs, columns, training=True)
    assert not output.margin.requires_grad
    output.losses.sum().backward()
    slope = pairs.chosen.grad * pairs.chosen_length
    gap = output.chosen_reward - output.rejected_reward
    torch.testing.assert_close(slope, -2.0 * torch.sigmoid(output.margin - gap))


@pytest.mark.parametrize(
    ("margin", "same"),
    [
        (EvaluationFactorMargin(gamma=1.4), 1.4),
        (DynamicTargetMargin(gamma0=1.4), 1.4),
        (AdaptiveMargin(beta=2.0), 0.0),
    ],
)
def test_reductions_to_simpo(margin, same):
    """Equal evaluation factors; one value of gaps; no spread: SimPO with that fixed margin."""
    pairs = random_pairs(3, n=1)
    columns = {"evaluation_factor": torch.tensor([0.3])}
    common = {"reward": LengthNormalizedReward(), "link": CPO_LINKS["simpo"], "beta": 2.0}
    ours = Objective(**common, margin=margin, gamma=9.0)(pairs, columns)
    torch.testing.assert_close(ours.losses, Objective(**common, gamma=same)(pairs).losses)


class TestHistory:
    def test_first_in_first_out(self):
        history = GapHistory(5)
        assert history.recent(3) is None
        for start in (0, 3, 6):
            history.push(torch.arange(start, start + 3.0))
        assert len(history) == 5
        assert history.recent(2).tolist() == [7.0, 8.0]
        assert history.recent(99).tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]
        assert history.spread(3).tolist() == [4.0, 5.0, 7.0]
        assert history.spread(1).tolist() == [4.0]
        assert history.spread(0) is None
        assert history.spread(5).tolist() == history.spread(6).tolist() == [4.0, 5.0, 6.0, 7.0, 8.0]
        none = GapHistory(0)
        none.push(torch.ones(3))
        assert len(none) == 0
        assert none.spread(2) is None

    def test_round_trip(self):
        history, copy = GapHistory(4), GapHistory(4)
        copy.load_state_dict(history.state_dict())
        assert len(copy) == 0
        history.push(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
        assert history.recent(2).dtype == torch.float32
        history.push(torch.empty(0))
        copy.load_state_dict(history.state_dict())
        assert copy.recent(4).tolist() == [1.0, 2.0]


class TestImpliedLabelSmoothing:
    """γ-PO's Theorem 3.1: a margin of one's own, or labels smoothed by ε under the shared margin: the same loss."""

    M = np.array([-6.0, -1.5, -0.3, 0.2, 0.9, 3.0, 7.0])

    @staticmethod
    def losses(m: np.ndarray, margin: torch.Tensor, rate: torch.Tensor, gamma0: float) -> tuple[torch.Tensor, ...]:
        """Eqs. 10 and 13."""
        log_sigmoid, gap = torch.nn.functional.logsigmoid, torch.tensor(m)
        smoothed = -rate * log_sigmoid(-gap - gamma0) - (1 - rate) * log_sigmoid(gap - gamma0)
        return -log_sigmoid(gap - margin), smoothed

    @pytest.mark.parametrize("gamma0", [0.0, 1.5, 4.0])
    def test_it_is_the_first_order_of_equal_losses(self, gamma0):
        """ε = δ · (∂L_γPO/∂γ) / (∂L_rDPO/∂ε) at δ = ε = 0, both by autograd."""
        delta = np.linspace(-0.7, 0.9, len(self.M))
        margin = torch.full((len(self.M),), gamma0, dtype=torch.float64, requires_grad=True)
        rate = torch.zeros(len(self.M), dtype=torch.float64, requires_grad=True)
        own, smoothed = self.losses(self.M, margin, rate, gamma0)
        assert torch.allclose(own, smoothed, rtol=1e-12)
        (by_margin,) = torch.autograd.grad(own.sum(), margin)
        (by_rate,) = torch.autograd.grad(smoothed.sum(), rate)
        expected = delta * (by_margin / by_rate).numpy()
        np.testing.assert_allclose(implied_label_smoothing(self.M, gamma0 + delta, gamma0), expected, rtol=1e-10)

    def test_it_nears_the_rate_that_makes_the_losses_equal(self):
        """What is left out is of second order: a tenth of the change of the margin leaves a hundredth of the error."""
        gamma0, errors = 2.0, []
        for delta in (0.1, 0.01):
            found = []
            for m in self.M:
                own = np.logaddexp(0, gamma0 + delta - m)
                right, wrong = np.logaddexp(0, gamma0 - m), np.logaddexp(0, gamma0 + m)
                found.append(brentq(lambda e: e * wrong + (1 - e) * right - own, -10, 10, xtol=1e-15))  # noqa: B023
            errors.append(np.abs(implied_label_smoothing(self.M, gamma0 + delta, gamma0) - found))
        np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.1)

    def test_of_the_papers_own_margins_it_smooths_only_wrong_and_clear_pairs(self):
        """γ-PO gives ambiguous pairs less than γ0: where they are ranked rightly, that is a negative rate."""
        gaps = torch.linspace(-8, 10, 256, dtype=torch.float64)
        margin = dynamic_target_margin(gaps, 4.0, 10.0).numpy()
        rate = implied_label_smoothing(gaps, margin, 4.0)
        less = margin < 4.0
        assert (rate[(gaps < 0).numpy()] > 0).all()
        assert less[(gaps < 0).numpy()].all()
        assert (rate[(gaps > 0).numpy() & less] < 0).all()
        assert (rate[~less] > 0).all()

    def test_where_it_has_no_value_and_far_out(self):
        with np.errstate(all="raise", under="ignore"):
            rate = implied_label_smoothing([0.0, 900.0, -900.0], [1.0, 3.5, 3.5], 3.0)
        assert np.isnan(rate[0])
        np.testing.assert_allclose(rate[1:], [0, -0.5 / 903], atol=1e-300)
