"""The losses of TRL's CPOTrainer and DPOTrainer, per pair.

TRL's trainers return only the mean over a batch; a weight per pair needs each pair's own loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rewards import LengthNormalizedReward
from .link import Link, LossInputs, margin_loss

MEANS = LengthNormalizedReward.name


def sigmoid(x: LossInputs) -> Tensor:
    """DPO (arXiv 2305.18290), eq. 7, with a margin."""
    return margin_loss(x.reward_gap, x.margin)


def smoothed_sigmoid(x: LossInputs) -> Tensor:
    """Conservative DPO's label smoothing (Mitchell, 2023), as CPO and SimPO use it, with a margin."""
    return margin_loss(x.reward_gap, x.margin, label_smoothing=x.label_smoothing)


def hinge(x: LossInputs) -> Tensor:
    """SLiC (arXiv 2305.10425): max(0, 1 − z), z = m − γ."""
    return torch.relu(1 - x.z)


def ipo(x: LossInputs) -> Tensor:
    """IPO (arXiv 2310.12036), eq. 17, on the scores as they are: per token on CPOTrainer's base; summed log-ratios as
    `ipo_sum`, which is GapPO's eq. 4.
    """
    return (x.chosen - x.rejected - 1 / (2 * x.beta)) ** 2


def ipo_per_token(x: LossInputs) -> Tensor:
    """IPO on summed scores, divided by the completions' lengths as its authors do."""
    return (x.per_token_gap - 1 / (2 * x.beta)) ** 2


def sigmoid_norm(x: LossInputs) -> Tensor:
    """DPO's loss on log-ratios per token (arXiv 2411.15124): 'sigmoid' with reward 'mean-log-ratio', which takes
    margins.
    """
    return margin_loss(x.beta * x.per_token_gap)


def exo_pair(x: LossInputs) -> Tensor:
    """EXO (arXiv 2402.00856), eq. 16 for two completions: KL(policy ‖ smoothed label)."""
    epsilon = torch.tensor(x.label_smoothing, device=x.chosen.device)
    m = x.z
    return torch.sigmoid(m) * (F.logsigmoid(m) - torch.log1p(-epsilon)) + torch.sigmoid(-m) * (
        F.logsigmoid(-m) - torch.log(epsilon)
    )


def nca_pair(x: LossInputs) -> Tensor:
    """NCA (arXiv 2402.05369), pairwise."""
    r_w, r_l = x.beta * x.chosen, x.beta * x.rejected
    return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)


def robust(x: LossInputs) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased under a flip rate ε."""
    clean, flipped = -F.logsigmoid(x.z), -F.logsigmoid(-x.z)
    return ((1 - x.label_smoothing) * clean - x.label_smoothing * flipped) / (1 - 2 * x.label_smoothing)


def bco_pair(x: LossInputs) -> Tensor:
    """BCO (arXiv 2404.04656), pairwise, without its running shift."""
    return -F.logsigmoid(x.beta * x.chosen) - F.logsigmoid(-x.beta * x.rejected)


def sppo_hard(x: LossInputs) -> Tensor:
    """SPPO (arXiv 2405.00675), eq. 4.7 with a winning probability of 1."""
    return (x.chosen - 0.5 / x.beta) ** 2 + (x.rejected + 0.5 / x.beta) ** 2


def apo_zero(x: LossInputs) -> Tensor:
    """APO-zero (arXiv 2408.06266), eq. 7."""
    return 1 - torch.sigmoid(x.beta * x.chosen) + torch.sigmoid(x.beta * x.rejected)


def apo_down(x: LossInputs) -> Tensor:
    """APO-down (arXiv 2408.06266), eq. 8."""
    return torch.sigmoid(x.beta * x.chosen) + 1 - torch.sigmoid(x.reward_gap)


def discopop(x: LossInputs) -> Tensor:
    """DiscoPOP (arXiv 2406.08414), eq. 5: logistic and exponential loss, blended by the gap."""
    m = x.z
    blend = torch.sigmoid(m / x.discopop_tau)
    return -F.logsigmoid(m) * (1 - blend) + torch.exp(-m) * blend


def aot(x: LossInputs) -> Tensor:
    """AOT (arXiv 2406.05882), paired: sorts the batch, so a row is no longer one pair."""
    if x.pairs.ref_chosen is None or x.pairs.ref_rejected is None:
        raise ValueError("loss_type 'aot' compares with a reference model, which this objective does not have")
    policy = (x.pairs.chosen - x.pairs.rejected).sort(dim=0).values
    reference = (x.pairs.ref_chosen - x.pairs.ref_rejected).sort(dim=0).values
    return margin_loss(x.beta * (policy - reference), label_smoothing=x.label_smoothing)


def aot_unpaired(x: LossInputs) -> Tensor:
    """AOT (arXiv 2406.05882), unpaired: sorts chosen and rejected apart."""
    gap = x.chosen.sort(dim=0).values - x.rejected.sort(dim=0).values
    return margin_loss(x.beta * gap, label_smoothing=x.label_smoothing)


def sft(x: LossInputs) -> Tensor:
    """Mean negative log-likelihood of the batch's chosen tokens, the same number in every row."""
    if x.pairs.sft_loss is None:
        raise ValueError("loss_type 'sft' needs PairLogps.sft_loss")
    return x.pairs.sft_loss.expand_as(x.chosen)


# Without a reference model only the gap of the two scores, or the chosen completion's likelihood, means something
CPO: dict[str, Link] = {
    link.name: link
    for link in (
        Link("sigmoid", smoothed_sigmoid, takes_margin=True, reads_smoothing=True),
        Link("hinge", hinge, takes_margin=True),
        Link("ipo", ipo, reward=MEANS),
        Link("simpo", smoothed_sigmoid, takes_margin=True, reads_smoothing=True, reward=MEANS),
        # to TRL, simpo without SFT loss
        Link("alphapo", smoothed_sigmoid, takes_margin=True, reads_smoothing=True, reward=MEANS),
    )
}
DPO: dict[str, Link] = {
    link.name: link
    for link in (
        Link("sigmoid", sigmoid, takes_margin=True),
        Link("hinge", hinge, takes_margin=True),
        Link("ipo", ipo_per_token, needs_reference=True, reads_sums=True),
        Link("exo_pair", exo_pair, takes_margin=True, reads_smoothing=True),
        Link("nca_pair", nca_pair, needs_reference=True),
        Link("robust", robust, takes_margin=True, reads_smoothing=True),
        Link("bco_pair", bco_pair, needs_reference=True),
        Link("sppo_hard", sppo_hard, needs_reference=True),
        Link("aot", aot, per_pair=False, reads_smoothing=True, needs_reference=True, reads_sums=True),
        Link("aot_unpaired", aot_unpaired, per_pair=False, reads_smoothing=True, needs_reference=True),
        Link("apo_zero", apo_zero, needs_reference=True),
        Link("apo_down", apo_down, needs_reference=True),
        Link("discopop", discopop, takes_margin=True),
        Link("sft", sft, per_pair=False, of_batch=True),
        Link("sigmoid_norm", sigmoid_norm, needs_reference=True, reads_sums=True),
    )
}
