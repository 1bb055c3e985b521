"""The objectives that the papers compare with, against NumPy written from their sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trl_margins.links import conservative, robust_simpo
from trl_margins.rewards import log_odds
from trl_margins.terms.baselines import dr_dpo_weight, length_margin, score_offset_margin


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def drawn(n: int = 64, scale: float = 4.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, n)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_conservative_is_the_cross_entropy_with_a_smoothed_label(epsilon):
    gap = drawn()
    p = sigmoid(gap)
    expected = -(1 - epsilon) * np.log(p) - epsilon * np.log(1 - p)
    np.testing.assert_allclose(conservative(torch.tensor(gap), epsilon), expected, rtol=1e-9)


def test_conservative_is_least_where_the_model_believes_as_much_as_the_labels_say():
    gap = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    least = gap[conservative(gap, 0.1).argmin()].item()
    assert sigmoid(least) == pytest.approx(0.9, abs=2e-3)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_robust_simpo_keeps_the_margin_of_a_flipped_pair(epsilon):
    gap, margin = drawn(), np.abs(drawn(seed=1))
    expected = -(1 - epsilon) * np.log(sigmoid(gap - margin)) - epsilon * np.log(sigmoid(-gap - margin))
    np.testing.assert_allclose(robust_simpo(torch.tensor(gap), torch.tensor(margin), epsilon), expected, rtol=1e-9)
    # relabelled, a pair has the same two terms with their shares exchanged
    other = robust_simpo(torch.tensor(-gap), torch.tensor(margin), 1 - epsilon)
    np.testing.assert_allclose(other, expected, rtol=1e-9)


def test_log_odds_of_a_probability():
    p = np.random.default_rng(0).uniform(0.01, 0.99, 64)
    np.testing.assert_allclose(log_odds(torch.tensor(np.log(p))), np.log(p / (1 - p)), rtol=1e-12)


def test_log_odds_at_both_ends_are_finite_with_their_gradient():
    mean_logp = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    odds = log_odds(mean_logp)
    odds.sum().backward()
    assert odds.isfinite().all()
    assert mean_logp.grad.isfinite().all()
    assert odds[2].item() == pytest.approx(-200.0)


@pytest.mark.parametrize("beta_prime", [0.5, 1.0, 10.0])
def test_dr_dpo_weight_gives_the_gradient_of_its_loss(beta_prime):
    gap = torch.tensor(drawn(16), requires_grad=True)
    losses = -torch.nn.functional.logsigmoid(gap)
    (expected,) = torch.autograd.grad(-beta_prime * torch.exp(-losses / beta_prime).mean().log(), gap)
    weight = dr_dpo_weight(gap, beta_prime)
    losses = -torch.nn.functional.logsigmoid(gap)
    (found,) = torch.autograd.grad((weight * losses).mean(), gap)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert weight.mean().item() == pytest.approx(1.0)


def test_dr_dpo_weight_over_all_ranks_is_cut_from_the_whole():
    gap = torch.tensor(drawn(16))
    whole = dr_dpo_weight(gap, 1.0)
    halves = [dr_dpo_weight(half, 1.0, everyone=gap) for half in gap.chunk(2)]
    torch.testing.assert_close(torch.cat(halves), whole)
    assert dr_dpo_weight(torch.tensor([-1e5, -1e5, 3.0]), 0.1).isfinite().all()


def test_score_offset_is_the_log_of_the_score_gap():
    gap = np.abs(drawn()) + 0.1
    offset = score_offset_margin(torch.tensor(gap + 2), torch.full((64,), 2.0, dtype=torch.float64), 0.5)
    np.testing.assert_allclose(offset, 0.5 * np.log(gap), rtol=1e-9)


def test_score_offset_of_a_tie_takes_the_pair_out_of_the_loss():
    score = torch.tensor([3.0, 3.0])
    margin = score_offset_margin(score, torch.tensor([3.0, 5.0]), 1.0)
    loss = -torch.nn.functional.logsigmoid(torch.tensor([-50.0, 50.0]) - margin)
    assert margin.isfinite().all()
    assert loss.tolist() == [0.0, 0.0]
    assert score_offset_margin(score, score, 0.0).tolist() == [0.0, 0.0]


def test_length_margin_asks_less_of_a_pair_whose_chosen_completion_is_longer():
    """The reward that DPO fits is r − α|y|: with its optimum π* ∝ π_ref e^{(r − α|y|)/β} the model's own reward gap is
    r_w − r_l − α(|y_w| − |y_l|), and the true gap, whose sigmoid is the likelihood, that plus α(|y_w| − |y_l|).
    """
    alpha, true_reward = 0.1, np.array([3.0, 1.0])
    length = np.array([30, 10])
    fitted_gap = np.diff(-(true_reward - alpha * length))[0]
    margin = length_margin(torch.tensor([30.0]), torch.tensor([10.0]), alpha).item()
    assert fitted_gap - margin == pytest.approx(true_reward[0] - true_reward[1])
    assert margin == pytest.approx(-2.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: dr_dpo_weight(x, 1.0),
        lambda x: score_offset_margin(x, x - 1, 1.0),
        lambda x: length_margin(x, x + 1, 1.0),
    ],
)
def test_weights_and_margins_are_detached_and_at_least_float32(function):
    value = function(torch.ones(3, dtype=torch.bfloat16, requires_grad=True))
    assert not value.requires_grad
    assert value.dtype == torch.float32
    assert value.shape == (3,)
