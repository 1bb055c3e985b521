"""The pure functions, against NumPy written from the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_margins.links import CPO_LINKS, DPO_LINKS, LINKS, margin_loss
from trl_margins.objective import Objective
from trl_margins.pairs import PairLogps, PairView, one_pair
from trl_margins.rewards import (
    REWARDS,
    LengthNormalizedReward,
    LogRatioReward,
    alphapo,
    length_normalized,
    log_odds,
    log_ratio,
)
from trl_margins.terms import Term
from trl_margins.terms.column import ColumnMargin
from trl_margins.terms.score_gap import ScoreGapWeight, score_gap_weight
from trl_margins.trainers.configs import MarginDPOConfig

NOT_PER_PAIR = {name for name, link in DPO_LINKS.items() if not link.per_pair}
TAKES_MARGIN = [(base, name) for base, table in LINKS.items() for name, link in table.items() if link.takes_margin]


def softplus(x: np.ndarray) -> np.ndarray:
    """−log σ(−x)"""
    return np.logaddexp(0.0, x)


def reward_for(link, usual):
    return REWARDS[link.reward]() if link.needs_its_reward else usual()


def test_a_loss_of_one_reward_says_which():
    with pytest.raises(ValueError, match="'orpo' does not go with reward 'log-ratio': it is a loss of"):
        Objective(LogRatioReward(), DPO_LINKS["orpo"], 0.1)


def random_pairs(seed: int, n: int = 7, reference: bool = False) -> PairLogps:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    return PairLogps(
        chosen=(-draw(n, scale=30).abs()).requires_grad_(),
        rejected=(-draw(n, scale=30).abs()).requires_grad_(),
        chosen_length=torch.randint(1, 40, (n,), generator=g),
        rejected_length=torch.randint(1, 40, (n,), generator=g),
        ref_chosen=-draw(n, scale=30).abs() if reference else None,
        ref_rejected=-draw(n, scale=30).abs() if reference else None,
    )


def test_length_normalized_is_the_mean_and_empty_answers_have_reward_zero():
    logps = torch.tensor([-6.0, 0.0, -1.0], requires_grad=True)
    rewards = length_normalized(logps, torch.tensor([3, 0, 1]))
    assert rewards.tolist() == [-2.0, 0.0, -1.0]
    assert length_normalized(torch.tensor([-5.0]), torch.tensor([0])).item() == 0.0
    rewards.sum().backward()
    assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_margin_loss_against_numpy(seed, smoothing):
    rng = np.random.default_rng(seed)
    gap, margin, weight = rng.normal(0, 5, 50), rng.normal(1, 1, 50), rng.uniform(0, 5, 50)
    z = gap - margin
    expected = weight * ((1 - smoothing) * softplus(-z) + smoothing * softplus(z))
    ours = margin_loss(torch.tensor(gap), torch.tensor(margin), torch.tensor(weight), smoothing)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


def test_margin_loss_defaults_are_plain_log_sigmoid():
    assert margin_loss(torch.tensor([0.0])).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("transform", "threshold", "reference"),
    [
        ("linear", None, lambda d: d),
        ("quadratic", None, lambda d: d**2),
        ("exponential", None, lambda d: np.exp(d) - 1),
        ("hard", 2.0, lambda d: (d >= 2.0).astype(float)),
        ("linear", 1.0, lambda d: d * (d >= 1.0)),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_score_gap_weight_against_numpy(transform, threshold, reference, normalize):
    rng = np.random.default_rng(3)
    for _ in range(50):
        chosen, rejected = rng.uniform(0, 10, (2, 33)).astype(np.float32)
        expected = reference(np.abs(chosen - rejected).astype(np.float64))  # e^δ − 1 loses digits in float32
        if normalize:
            expected = expected / expected.mean()
        ours = score_gap_weight(torch.tensor(chosen), torch.tensor(rejected), transform, threshold, normalize)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-5, atol=1e-7)


def test_a_threshold_keeps_what_reaches_it():
    """At it, and at the next numbers of its dtype on either side, as decimals round."""
    for dtype in (torch.float64, torch.float32):
        at = torch.tensor(2.0, dtype=dtype)
        infinity = torch.tensor(math.inf, dtype=dtype)
        gaps = torch.stack([at - 1e-6, torch.nextafter(at, -infinity), at, torch.nextafter(at, infinity)])
        zeros = torch.zeros_like(gaps)
        for transform in ("hard", "linear", "quadratic", "exponential"):
            weight = score_gap_weight(gaps, zeros, transform, 2.0)
            assert (weight > 0).tolist() == [False, True, True, True]
            term = ScoreGapWeight(transform, 2.0)
            assert term.keeps({"score_chosen": zeros, "score_rejected": gaps}).tolist() == [False, *[True] * 3]
    assert (
        ScoreGapWeight().keeps({"score_chosen": gaps, "score_rejected": gaps + 1e-3 * zeros}).tolist() == [False] * 4
    )
    kept = [ScoreGapWeight(threshold=threshold).keeps_only for threshold in (None, 0.0, 1.5)]
    assert kept[0] == kept[1] == "pairs with a score gap other than 0"
    assert kept[2] == "pairs with a score gap of at least 1.5 (score_gap_threshold)"
    assert score_gap_weight(gaps, zeros, "linear", 0.0).tolist() == gaps.tolist()  # a threshold of 0 keeps all


def test_the_exponential_stops_at_thirty_and_not_before():
    gaps = torch.tensor([29.0, 30.0, 31.0, 1e4], dtype=torch.float64)
    expected = np.expm1([29.0, 30.0, 30.0, 30.0])
    np.testing.assert_allclose(score_gap_weight(gaps, torch.zeros(4), "exponential").numpy(), expected, rtol=1e-12)


def test_a_small_mean_of_weights_still_divides():
    weight = score_gap_weight(torch.tensor([1e-6, 3e-6]), torch.zeros(2), normalize=True)
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.5]))


def test_score_gap_weight_edges():
    ties = torch.tensor([3.0, 3.0])
    for normalize in (False, True):
        assert score_gap_weight(ties, ties, normalize=normalize).tolist() == [0.0, 0.0]
    huge = score_gap_weight(torch.tensor([1e4]), torch.tensor([-1e4]), "exponential")
    assert torch.isfinite(huge).all()
    scores = torch.tensor([5.0, 1.0])
    assert torch.equal(score_gap_weight(scores, scores.flip(0)), score_gap_weight(scores.flip(0), scores))
    assert score_gap_weight(torch.tensor([5], dtype=torch.int64), torch.tensor([2])).dtype == torch.float32
    assert not score_gap_weight(torch.tensor([5.0], requires_grad=True), torch.tensor([2.0])).requires_grad
    half = torch.tensor([6e4], dtype=torch.float16)
    assert score_gap_weight(half, -half).item() == 120000  # float16 ends at 65504
    with pytest.raises(ValueError, match="threshold"):
        score_gap_weight(ties, ties, "hard")
    with pytest.raises(ValueError, match="unknown score-gap transform 'cubic'; known: linear"):
        score_gap_weight(ties, ties, "cubic")


def test_the_mean_weight_is_that_of_all_ranks():
    """What one rank sees, when the other rank holds pairs of gap 3."""
    columns = {"score_chosen": torch.tensor([4.0, 2.0]), "score_rejected": torch.tensor([3.0, 2.0])}
    view = PairView.of_gaps(torch.zeros(2), columns, gather=lambda local: torch.cat([local, torch.tensor([3.0, 3.0])]))
    weight = ScoreGapWeight(normalize=True)(view)
    assert weight.tolist() == pytest.approx([1 / 1.75, 0.0])


def test_alphapo_against_its_formula_and_far_from_zero():
    logps = torch.linspace(-20, -0.01, 50, dtype=torch.float64)
    for alpha in (-0.5, 0.25, 1.0):
        expected = (1 - torch.exp(logps).pow(-alpha)) / alpha
        torch.testing.assert_close(alphapo(logps, alpha), expected)
    assert torch.equal(alphapo(logps, 0.0), logps)
    # e^-300 is 0 in float32, yet the reward is a number
    assert torch.isfinite(alphapo(torch.tensor([-300.0]), 0.01)).all()


@pytest.mark.parametrize("alpha", [1e-3, -1e-4, 1e-6, 1.1e-7])
def test_a_small_alpha_is_not_none(alpha):
    """To second order the shape is log p − α (log p)² / 2."""
    logps = torch.linspace(-20, -1, 20, dtype=torch.float64)
    shift = (alphapo(logps, alpha) - logps) / alpha
    np.testing.assert_allclose(shift.numpy(), -(logps**2 / 2).numpy(), rtol=10 * abs(alpha) + 1e-5)
    assert torch.equal(alphapo(logps, math.copysign(9e-8, alpha)), logps)  # where float32 has no such difference


@pytest.mark.parametrize("alpha", [-2.0, -0.5, 1e-5, 0.25, 1.0])
def test_alphapos_signs(alpha):
    """The reward rises with p whatever α is, by p^−α over log p; it is 0 at p = 1 and bounded by 1/α below 0."""
    logps = torch.linspace(-6, 0, 40, dtype=torch.float64, requires_grad=True)
    reward = alphapo(logps, alpha)
    (slope,) = torch.autograd.grad(reward.sum(), logps)
    np.testing.assert_allclose(slope.numpy(), np.exp(logps.detach().numpy()) ** -alpha, rtol=1e-9)
    assert (reward.diff() > 0).all()
    assert reward[-1] == 0
    if alpha < 0:
        assert alphapo(torch.tensor(-1e6), alpha).item() == pytest.approx(1 / alpha)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_log_ratio_is_the_derivative_of_its_divergence(divergence):
    u = np.linspace(0.2, 4, 40)
    expected = {
        "reverse_kl": np.log(u),
        "forward_kl": 1 - 1 / u,
        "js_divergence": np.log(2 * u / (1 + u)),
        "alpha_divergence": (u ** (0.3 - 1) - 1) / (0.3 - 1),
    }[divergence]
    ours = log_ratio(torch.tensor(np.log(u)), torch.zeros(40, dtype=torch.float64), divergence, alpha=0.3)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_an_alpha_divergence_stops_before_infinity(dtype):
    """Where u is far too small: at e^80, and not before."""
    exponents = np.array([10.0, 72.0, 80.0, 88.0, 240.0])
    log_u = torch.tensor(-exponents / 0.5, dtype=dtype)
    found = log_ratio(log_u, torch.zeros(5, dtype=dtype), "alpha_divergence", 0.5)
    np.testing.assert_allclose(found.double().numpy(), np.expm1(np.minimum(exponents, 80)) / -0.5, rtol=1e-5)


def test_an_alpha_near_one_is_not_one():
    log_u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for alpha in (0.9, 0.99, 1.01, 1.0001, 1.00001):
        expected = np.expm1((alpha - 1) * log_u.numpy()) / (alpha - 1)
        found = log_ratio(log_u, torch.zeros(7), "alpha_divergence", alpha).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
        assert np.abs(found - log_u.numpy()).max() > abs(alpha - 1)
    assert torch.equal(log_ratio(log_u, torch.zeros(7), "alpha_divergence", 1.0), log_u)


def test_log_odds_near_certainty():
    """Against NumPy down to p = 1 − 1e-6, finite at 1, and as fine in 16 bits as in float32."""
    mean = np.array([-5.0, -0.5, -1e-2, -1e-3, -1e-6])
    expected = mean - np.log(-np.expm1(mean))
    np.testing.assert_allclose(log_odds(torch.tensor(mean)).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(log_odds(torch.tensor(mean[:4], dtype=torch.float32)).numpy(), expected[:4], rtol=1e-4)
    assert log_odds(torch.zeros(1)).item() == pytest.approx(-math.log(2**-23), rel=1e-3)
    narrow = torch.tensor([-1e-3], dtype=torch.bfloat16)
    assert log_odds(narrow).item() == log_odds(narrow.float()).item()


def test_rewards_against_numpy():
    """Each of both completions, with an empty one, which has a mean of 0; and what they have in common with TRL."""
    pairs = random_pairs(5, reference=True)
    lengths = pairs.chosen_length.clone(), pairs.rejected_length.clone()
    lengths[0][0] = lengths[1][1] = 0
    scores = torch.linspace(-9, -1, 7), torch.linspace(-2, -8, 7)
    pairs = replace(pairs, chosen_length=lengths[0], rejected_length=lengths[1])
    pairs = replace(pairs, chosen_score=scores[0], rejected_score=scores[1])

    def mean(sums: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.divide(sums, n, out=np.zeros(7), where=n > 0)

    for i, side in enumerate(("chosen", "rejected")):
        logps, reference = (getattr(pairs, name).detach().numpy() for name in (side, f"ref_{side}"))
        n = lengths[i].numpy()
        expected = {
            "length-normalized": mean(logps, n),
            "sum": logps,
            "log-ratio": logps - reference,
            "mean-log-ratio": mean(logps - reference, n),
            "alphapo-token": mean(scores[i].double().numpy(), n),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(REWARDS[name]()(pairs)[i].detach().numpy(), value, rtol=1e-6)
    ratio = LogRatioReward()
    assert ratio.alpha == MarginDPOConfig.__dataclass_fields__["f_alpha_divergence_coef"].default == 0.5
    assert ratio.divergence == "reverse_kl"
    assert {name for name, reward in REWARDS.items() if reward.summed} == {"sum", "log-ratio"}
    view = PairView.of_gaps(torch.tensor([2.0]), beta=4.0)
    assert (view.reward_gap.item(), view.unscaled_gap.item(), view.beta) == (2.0, 0.5, 4.0)


def test_unknown_divergence_is_an_error():
    known = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    for divergence in known:
        LogRatioReward(divergence)
    with pytest.raises(ValueError, match=f"^unknown f_divergence_type 'hellinger'; known: {', '.join(known)}$"):
        LogRatioReward("hellinger")
    with pytest.raises(ValueError, match="'hellinger'; known: reverse_kl"):
        log_ratio(torch.zeros(1), torch.zeros(1), "hellinger")


def test_all_but_the_losses_is_detached():
    pairs = random_pairs(4, reference=True)
    columns = {"score_chosen": torch.arange(7.0), "score_rejected": torch.zeros(7), "mine": torch.ones(7)}
    terms = {"weight": ScoreGapWeight(), "margin": ColumnMargin("mine", "reward")}
    for link, given in (("sigmoid", terms), ("nca_pair", {})):
        output = Objective(LogRatioReward(), DPO_LINKS[link], 0.5, **given)(pairs, columns, training=True)
        seen = [vars(output), vars(output.view), output.weights, output.margins]
        tensors = [(name, value) for each in seen for name, value in each.items() if isinstance(value, torch.Tensor)]
        with_gradient = {name for name, value in tensors if value.requires_grad}
        assert with_gradient == {"losses"}
        ratio = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        torch.testing.assert_close(output.chosen_reward, 0.5 * ratio[0].detach())
        torch.testing.assert_close(output.rejected_reward, 0.5 * ratio[1].detach())


@pytest.mark.parametrize("seed", range(20))
def test_gappo_against_numpy(seed):
    """Eq. 8 with scores, lengths and log-probabilities drawn at random, and its gradient in closed form."""
    rng = np.random.default_rng(seed)
    pairs = random_pairs(seed, n=9)
    chosen_scores, rejected_scores = rng.uniform(1, 10, (2, 9)).astype(np.float32)
    beta, ratio = rng.uniform(0.5, 10), rng.uniform(0, 1)
    objective = Objective(
        LengthNormalizedReward(), CPO_LINKS["simpo"], beta, gamma=beta * ratio, weight=ScoreGapWeight()
    )
    columns = {"score_chosen": torch.tensor(chosen_scores), "score_rejected": torch.tensor(rejected_scores)}
    output = objective(pairs, columns)
    output.losses.mean().backward()

    lengths = pairs.chosen_length.numpy(), pairs.rejected_length.numpy()
    delta = pairs.chosen.detach().numpy() / lengths[0] - pairs.rejected.detach().numpy() / lengths[1]
    weight = np.abs(chosen_scores - rejected_scores)
    z = beta * (delta - ratio)
    np.testing.assert_allclose(output.losses.detach().numpy(), weight * softplus(-z), rtol=1e-6)
    slope = -weight * beta / (1 + np.exp(z)) / 9
    np.testing.assert_allclose(pairs.chosen.grad.numpy(), slope / lengths[0], rtol=1e-6)
    np.testing.assert_allclose(pairs.rejected.grad.numpy(), -slope / lengths[1], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(DPO_LINKS.keys() - NOT_PER_PAIR))
def test_a_weight_scales_every_per_pair_loss(name):
    pairs = random_pairs(1, reference=True)
    scores = {"score_chosen": torch.arange(7.0), "score_rejected": torch.zeros(7)}
    common = {"reward": reward_for(DPO_LINKS[name], LogRatioReward), "link": DPO_LINKS[name], "beta": 0.1}
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    plain = Objective(**common, **smoothing)(pairs, scores).losses
    weighted = Objective(**common, **smoothing, weight=ScoreGapWeight())(pairs, scores).losses
    torch.testing.assert_close(weighted, torch.arange(7.0) * plain)


def test_the_policys_weight_is_on_every_part():
    """As TRL's WPO has it: on the SFT loss of the batch, too, which a pair's own weight leaves alone."""
    policy = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    pairs = replace(random_pairs(6, reference=True), sft_loss=torch.tensor(3.0), policy_weight=policy)
    links = {DPO_LINKS["sigmoid"]: 1.0, DPO_LINKS["sft"]: 0.5}
    scores = {"score_chosen": torch.arange(7.0), "score_rejected": torch.zeros(7)}
    found = Objective(LogRatioReward(), links, 0.1, weight=ScoreGapWeight())(pairs, scores).losses
    plain = Objective(LogRatioReward(), DPO_LINKS["sigmoid"], 0.1)(replace(pairs, policy_weight=None)).losses
    torch.testing.assert_close(found, policy * (torch.arange(7.0) * plain + 0.5 * 3.0))


def test_the_gradient_scale_is_the_slope_of_the_loss_in_the_gap():
    """In reward units, whatever β; of a loss that is not of the gap, the mean of both sides; in training alone."""
    pairs, beta = random_pairs(7, reference=True), 0.25
    for link in ("sigmoid", "bco_pair"):
        objective = Objective(LogRatioReward(), DPO_LINKS[link], beta)
        assert objective(pairs).gradient_scale is None
        output = objective(pairs, training=True)
        chosen, rejected = output.chosen_reward, output.rejected_reward
        slopes = {
            "sigmoid": torch.sigmoid(rejected - chosen),
            "bco_pair": (torch.sigmoid(-chosen) + torch.sigmoid(rejected)) / 2,
        }
        torch.testing.assert_close(output.gradient_scale, slopes[link])


class ConstantMargin(Term):
    name = "constant"

    def __call__(self, view):
        assert not view.reward_gap.requires_grad
        return torch.full_like(view.reward_gap, 0.7)


@pytest.mark.parametrize(("base", "name"), TAKES_MARGIN)
def test_a_constant_margin_is_a_target_margin(base, name):
    pairs = random_pairs(2, reference=True)
    reward = reward_for(LINKS[base][name], LengthNormalizedReward if base == "cpo" else LogRatioReward)
    common = {"reward": reward, "link": LINKS[base][name], "beta": 2.0}
    if name == "exo_pair":
        common["label_smoothing"] = 0.1
    with_term = Objective(**common, margin=ConstantMargin(), gamma=0.2)(pairs)
    fixed = Objective(**common, gamma=0.9)(pairs)
    torch.testing.assert_close(with_term.losses, fixed.losses)
    torch.testing.assert_close(with_term.margin, torch.full((7,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(DPO_LINKS.keys() - {name for _, name in TAKES_MARGIN}))
def test_a_margin_with_another_loss_is_an_error_that_names_both(name):
    with pytest.raises(ValueError, match=f"'constant' does not go with loss_type '{name}'"):
        Objective(LogRatioReward(), DPO_LINKS[name], 0.1, margin=ConstantMargin())


@pytest.mark.parametrize("name", sorted(NOT_PER_PAIR))
def test_a_weight_with_a_batch_loss_is_an_error_that_names_both(name):
    with pytest.raises(ValueError, match=f"'score-gap' does not go with loss_type '{name}'"):
        Objective(LogRatioReward(), DPO_LINKS[name], 0.1, weight=ScoreGapWeight())


def test_a_loss_that_needs_a_reference_is_an_error_without_one():
    with pytest.raises(ValueError, match="loss_type 'ipo' does not go with reward 'length-normalized'"):
        Objective(LengthNormalizedReward(), DPO_LINKS["ipo"], 0.1)


def test_one_pair_of_a_batch():
    """Row i of what has a row per pair; rows i and B + i of what has two; the rest is left as it is."""
    batch = {
        "rows": torch.arange(6),
        "pairs": {"score": torch.tensor([7.0, 8.0, 9.0])},
        "both": (torch.arange(3), torch.tensor(5)),
        "texts": ["a", "b", "c"],
        "list": [1, 2],
        "name": "abc",
    }
    pair = one_pair(batch, 1, 3)
    assert pair["rows"].tolist() == [1, 4]
    assert pair["pairs"]["score"].tolist() == [8.0]
    assert (pair["both"][0].tolist(), pair["both"][1].item()) == ([1], 5)
    assert (pair["texts"], pair["list"], pair["name"]) == (["b"], [1, 2], "abc")
    for n in (1, 4, 9):
        with pytest.raises(ValueError, match=rf"a tensor of shape \({n},\) in a batch of 3 pairs cannot be cut"):
            one_pair({"patches": torch.zeros(n)}, 0, 3)


def test_pairs_do_not_see_each_other():
    """Permuting the pairs permutes the losses."""
    pairs = random_pairs(4)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    names = ("chosen", "rejected", "chosen_length", "rejected_length")
    shuffled = PairLogps(**{name: getattr(pairs, name)[order] for name in names})
    scores = {"score_chosen": torch.arange(7.0), "score_rejected": torch.ones(7)}
    objective = Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 2.0, weight=ScoreGapWeight())
    permuted = {name: column[order] for name, column in scores.items()}
    torch.testing.assert_close(objective(shuffled, permuted).losses, objective(pairs, scores).losses[order])
