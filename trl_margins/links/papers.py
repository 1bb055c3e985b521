"""The losses of further objectives that the papers compare with, per pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pairs import SCORE_CHOSEN, SCORE_REJECTED, SCORES
from ..rewards import LogOddsReward
from .link import Link, LossInputs, margin_loss
from .trls import MEANS, ipo, smoothed_sigmoid


def conservative(reward_gap: Tensor, label_smoothing: float) -> Tensor:
    r"""cDPO: :math:`-(1-\varepsilon)\log\sigma(m_i) - \varepsilon\log\sigma(-m_i)`, DPO's loss on smoothed labels.

    Args:
        reward_gap: [B] m = r_w − r_l, β inside.
        label_smoothing: ε, the share of labels taken to be flipped, in [0, 0.5].

    Returns:
        [B] losses. The loss is least where σ(m) = 1 − ε.

    Source: Mitchell (2023), A note on DPO with noisy preferences, eq. 3; γ-PO (arXiv 2506.03690), eq. 13 for DPO.
    """
    return margin_loss(reward_gap, label_smoothing=label_smoothing)


def robust_simpo(reward_gap: Tensor, margin: Tensor | float, label_smoothing: float) -> Tensor:
    r"""rSimPO: :math:`-(1-\varepsilon)\log\sigma(m_i-\gamma_i) - \varepsilon\log\sigma(-m_i-\gamma_i)`.

    A flipped pair has the target margin too. TRL's label smoothing of SimPO has −ε log σ(−m + γ) there: the flipped
    pair's target is −γ.

    Args:
        reward_gap: [B] m = r_w − r_l, β inside.
        margin: [B] or a number, γ in reward units.
        label_smoothing: ε, the share of labels taken to be flipped, in [0, 0.5].

    Returns:
        [B] losses.

    Source: γ-PO (arXiv 2506.03690), eq. 13.
    """
    right, flipped = F.logsigmoid(reward_gap - margin), F.logsigmoid(-reward_gap - margin)
    return -(1 - label_smoothing) * right - label_smoothing * flipped


def rsimpo(x: LossInputs) -> Tensor:
    """rSimPO: `robust_simpo`."""
    return robust_simpo(x.reward_gap, x.margin, x.label_smoothing)


def orpo(x: LossInputs) -> Tensor:
    """ORPO (arXiv 2403.07691), eq. 7: −λ log σ(log-odds gap), λ in the place of β as in TRL; a margin is γ/λ there."""
    return -x.beta * F.logsigmoid(x.z / x.beta)


def rrhf(x: LossInputs) -> Tensor:
    """RRHF (arXiv 2304.05302), eq. 3: max(0, −z), z = m − γ."""
    return torch.relu(-x.z)


def focalpo(x: LossInputs) -> Tensor:
    """FocalPO (arXiv 2501.06645): −σ(z)^γ log σ(z), z = m − margin, with the gradient of both factors."""
    log_likelihood = F.logsigmoid(x.z)
    return -torch.exp(x.options["focalpo_gamma"] * log_likelihood) * log_likelihood


def kto_pair(x: LossInputs) -> Tensor:
    """KTO (arXiv 2402.01306) on pairs: 1 − σ(β(s_w − KL_l)) + 1 − σ(β(KL_w − s_l)).

    KL is the batch's mean score of the other side, at least 0, over all ranks and without gradient.
    """
    kl_chosen, kl_rejected = (x.batch_mean(each).clamp(min=0) for each in (x.chosen, x.rejected))
    return 2 - torch.sigmoid(x.beta * (x.chosen - kl_rejected)) - torch.sigmoid(x.beta * (kl_chosen - x.rejected))


def dpop(x: LossInputs) -> Tensor:
    """DPOP (arXiv 2402.13228), eq. 3: −log σ(z − β λ max(0, −s_w)): y_w should not become less likely."""
    return -F.logsigmoid(x.z - x.beta * x.options["dpop_lambda"] * torch.relu(-x.chosen))


def simper(x: LossInputs) -> Tensor:
    """SimPER (arXiv 2502.00883), eq. 7: p_l − p_w, p = exp(mean log π), the inverse perplexity. It has no β."""
    return torch.exp(x.rejected) - torch.exp(x.chosen)


def reward_aware(x: LossInputs) -> Tensor:
    """Reward-aware RPO (arXiv 2406.11704): KL from Bernoulli(σ(η(s_w − s_l))), s the annotation scores, to
    Bernoulli(σ(m)).
    """
    if x.view is None:
        raise ValueError("loss_type 'reward_aware' reads the scores of the pairs, which LossInputs.view has")
    target = x.options["reward_aware_eta"] * (x.view[SCORE_CHOSEN] - x.view[SCORE_REJECTED])
    p = torch.sigmoid(target)
    return p * (F.logsigmoid(target) - F.logsigmoid(x.reward_gap)) + (1 - p) * (
        F.logsigmoid(-target) - F.logsigmoid(-x.reward_gap)
    )


ANY_REWARD: dict[str, Link] = {
    link.name: link
    for link in (
        Link("conservative", smoothed_sigmoid, takes_margin=True, reads_smoothing=True),
        Link("robust_simpo", rsimpo, takes_margin=True, reads_smoothing=True, reward=MEANS),
        Link("orpo", orpo, takes_margin=True, reward=LogOddsReward.name, needs_its_reward=True),
        Link("rrhf", rrhf, takes_margin=True, reward=MEANS),
        Link("focalpo", focalpo, takes_margin=True, options=(("focalpo_gamma", 0.05),)),
        Link("simper", simper, reward=MEANS, needs_its_reward=True),
        Link("reward_aware", reward_aware, columns=SCORES, options=(("reward_aware_eta", 1.0),)),
    )
}
LOG_RATIO: dict[str, Link] = {
    link.name: link
    for link in (
        Link("ipo_sum", ipo, needs_reference=True, reads_sums=True),
        Link("kto_pair", kto_pair, needs_reference=True, compares_pairs=True),
        Link("dpop", dpop, takes_margin=True, needs_reference=True, options=(("dpop_lambda", 50.0),)),
    )
}
