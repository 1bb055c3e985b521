"""Every baseline against its published formula, in NumPy and by finite differences, and against TRL's own trainers.

The formulas are written from the papers and their authors' repositories, not from this package: the source of each is
named beside it. Stop-gradients are explicit: a formula gets the pairs twice, `p` with gradient and `h` without.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_gradients, first_batch, load, loss_and_gradients, preference_rows, quiet
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from trl_margins.cli.train import parse
from trl_margins.links import LINKS, conservative, robust_simpo
from trl_margins.methods import METHODS
from trl_margins.objective import Objective, ObjectiveOutput
from trl_margins.pairs import PairLogps
from trl_margins.rewards import log_odds as package_log_odds
from trl_margins.terms.baselines import dr_dpo_weight, length_margin, score_offset_margin
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class
from trl_margins.trainers.objectives import objective_of

BASELINES = {id: row for id, row in METHODS.items() if row.baseline}
ROWS = [(id, base) for id, row in BASELINES.items() for base in row.bases]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(log_sigmoid(x))


@dataclass(frozen=True)
class Pairs:
    """B pairs in float64. Variables with gradient: `w`, `l`, `token_w` and `token_l`."""

    w: np.ndarray  # log π(y_w), summed
    l: np.ndarray  # noqa: E741
    token_w: np.ndarray  # Σ_t f(log π(y_w,t)), for the reward with an f per token
    token_l: np.ndarray
    ref_w: np.ndarray
    ref_l: np.ndarray
    n_w: np.ndarray  # tokens
    n_l: np.ndarray
    s_w: np.ndarray  # scores of a reward model
    s_l: np.ndarray
    policy: np.ndarray  # WPO's weight

    @property
    def mean_w(self) -> np.ndarray:
        return self.w / self.n_w

    @property
    def mean_l(self) -> np.ndarray:
        return self.l / self.n_l

    @property
    def ratio_w(self) -> np.ndarray:
        return self.w - self.ref_w

    @property
    def ratio_l(self) -> np.ndarray:
        return self.l - self.ref_l

    @property
    def gap(self) -> np.ndarray:
        """Of the log-ratios, before β."""
        return self.ratio_w - self.ratio_l

    @property
    def nll(self) -> float:
        """Mean over the chosen tokens of the batch."""
        return -self.w.sum() / self.n_w.sum()

    def __getitem__(self, rows: Any) -> Pairs:
        return Pairs(*(getattr(self, each.name)[rows] for each in fields(self)))

    def torch(self, dtype: torch.dtype = torch.float64) -> tuple[PairLogps, dict[str, torch.Tensor], list]:
        """The package's form of the pairs, its columns, and the tensors that require grad."""
        leaves = {name: torch.tensor(getattr(self, name), dtype=dtype, requires_grad=True) for name in VARIABLES}
        fixed = {each.name: torch.tensor(getattr(self, each.name)) for each in fields(self)}
        pairs = PairLogps(
            chosen=leaves["w"],
            rejected=leaves["l"],
            chosen_length=fixed["n_w"],
            rejected_length=fixed["n_l"],
            ref_chosen=fixed["ref_w"].to(dtype),
            ref_rejected=fixed["ref_l"].to(dtype),
            chosen_score=leaves["token_w"],
            rejected_score=leaves["token_l"],
            sft_loss=-leaves["w"].sum() / fixed["n_w"].sum(),
        )
        return pairs, {"score_chosen": fixed["s_w"], "score_rejected": fixed["s_l"]}, list(leaves.values())


VARIABLES = ("w", "l", "token_w", "token_l")


def random_pairs(seed: int, n: int = 8) -> Pairs:
    """Completions of unequal lengths, at and around their reference, whose rewards have both signs."""
    rng = np.random.default_rng(seed)
    n_w, n_l = rng.integers(3, 30, n), rng.integers(3, 30, n)
    w = -n_w * rng.uniform(0.2, 1.5, n)
    lose = np.minimum(w + rng.normal(0, 2, n), -0.1 * n_l)
    s_l = rng.uniform(1, 6, n)
    return Pairs(
        w=w,
        l=lose,
        token_w=-n_w * rng.uniform(0.2, 2, n),
        token_l=-n_l * rng.uniform(0.2, 2, n),
        ref_w=w + rng.normal(0.2 * (seed % 3 - 1), 1.5, n),
        ref_l=lose + rng.normal(-0.2 * (seed % 3 - 1), 1.5, n),
        n_w=n_w,
        n_l=n_l,
        s_w=s_l + rng.uniform(0.2, 5, n),
        s_l=s_l,
        policy=rng.uniform(0.05, 1, n),
    )


def gradients(total: Callable[[Pairs], float], p: Pairs, step: float = 1e-5) -> list[np.ndarray]:
    """Of a number computed from pairs, by central differences."""
    result = []
    for name in VARIABLES:
        value = getattr(p, name)
        slopes = np.zeros_like(value)
        for i in range(len(value)):
            shift = np.where(np.arange(len(value)) == i, step, 0.0)
            up, down = (total(replace(p, **{name: value + sign * shift})) for sign in (1, -1))
            slopes[i] = (up - down) / (2 * step)
        result.append(slopes)
    return result


@dataclass(frozen=True)
class Case:
    settings: dict[str, float]  # config fields
    loss: Callable[[Pairs, Pairs], np.ndarray]  # (p, h) → [B] published losses, without the SFT term
    sft: float = 0.0  # λ of the SFT term
    mixed_scores: bool = False  # some rejected completions have the higher score


def alphapo(log_p: np.ndarray, alpha: float) -> np.ndarray:
    return (1 - np.exp(log_p) ** -alpha) / alpha


def log_odds(log_p: np.ndarray) -> np.ndarray:
    return np.log(np.exp(log_p) / (1 - np.exp(log_p)))


def madpo_weight(h: np.ndarray, c_max: float, c_min: float, steepness: float, tau: float) -> np.ndarray:
    """`utils/loss_functions.py` of sirano1004/Margin-Apative-Direct-Preference-Optimization."""
    steep = np.exp(steepness * (np.abs(h) - tau))
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * steep)
    return np.where(h > -tau, sigmoid(c * h) / sigmoid(h), 1.0)


def reward_aware(p: Pairs, beta: float, eta: float) -> np.ndarray:
    """NeMo-Aligner's `rpo_bwd_kl`: KL of the reward model's belief from the policy's."""
    belief, x = eta * (p.s_w - p.s_l), beta * p.gap
    return sigmoid(belief) * (log_sigmoid(belief) - log_sigmoid(x)) + sigmoid(-belief) * (
        log_sigmoid(-belief) - log_sigmoid(-x)
    )


def kto_pair(p: Pairs, h: Pairs, beta: float) -> np.ndarray:
    """TRL 0.8's `kto_pair`, there a row of 2B losses. KTO (arXiv 2402.01306) sends no gradient through the KL."""
    kl_w, kl_l = max(h.ratio_w.mean(), 0), max(h.ratio_l.mean(), 0)
    return (1 - sigmoid(beta * (p.ratio_w - kl_l))) + (1 - sigmoid(beta * (kl_w - p.ratio_l)))


CASES: dict[str, Case] = {
    # SimPO (2405.14734), eq. 6: γ in reward units is β times the ratio of its code
    "simpo": Case(
        {"beta": 2.0, "gamma_beta_ratio": 0.4}, lambda p, h: -log_sigmoid(2.0 * (p.mean_w - p.mean_l) - 2.0 * 0.4)
    ),
    # DPO (2305.18290), eq. 7
    "dpo": Case({"beta": 0.3}, lambda p, h: -log_sigmoid(0.3 * p.gap)),
    # CPO (2401.08417), eqs. 3 and 5
    "cpo": Case({"beta": 0.3}, lambda p, h: -log_sigmoid(0.3 * (p.w - p.l)), sft=1.0),
    # IPO (2310.12036), eq. 17, per token as its authors told TRL; γ-PO's Table 6 has the sums
    "ipo": Case({"beta": 0.2}, lambda p, h: (p.ratio_w / p.n_w - p.ratio_l / p.n_l - 1 / (2 * 0.2)) ** 2),
    "ipo-sum": Case({"beta": 0.2}, lambda p, h: (p.gap - 1 / (2 * 0.2)) ** 2),
    # SLiC-HF (2305.10425), eq. 9: max(0, δ − Δ) here divided by δ = 1/β = 2
    "slic-hf": Case({"beta": 0.5}, lambda p, h: np.maximum(0, 2 - (p.w - p.l)) / 2, sft=0.1),
    # AlphaPO (2501.03884), eq. 6, of the mean log-probability; and the mean of what each token has
    "alphapo": Case(
        {"beta": 1.5, "gamma_beta_ratio": 0.2, "alpha": 0.3},
        lambda p, h: -log_sigmoid(1.5 * (alphapo(p.mean_w, 0.3) - alphapo(p.mean_l, 0.3)) - 1.5 * 0.2),
    ),
    "alphapo-token": Case(
        {"beta": 1.5, "gamma_beta_ratio": 0.2, "alpha": 0.3},
        lambda p, h: -log_sigmoid(1.5 * (p.token_w / p.n_w - p.token_l / p.n_l) - 1.5 * 0.2),
    ),
    # rDPO (2403.00409), eq. 12
    "robust-dpo": Case(
        {"beta": 0.3, "label_smoothing": 0.15},
        lambda p, h: (-(1 - 0.15) * log_sigmoid(0.3 * p.gap) + 0.15 * log_sigmoid(-0.3 * p.gap)) / (1 - 2 * 0.15),
    ),
    # WPO (2406.11827), eq. 2, whose weights have no gradient
    "wpo": Case({"beta": 0.3}, lambda p, h: h.policy * -log_sigmoid(0.3 * p.gap)),
    # ORPO (2403.07691), eqs. 4, 6 and 7; λ is `beta`
    "orpo": Case({"beta": 0.4}, lambda p, h: 0.4 * -log_sigmoid(log_odds(p.mean_w) - log_odds(p.mean_l)), sft=1.0),
    # RRHF (2304.05302), eqs. 2 to 5, of one pair
    "rrhf": Case({}, lambda p, h: np.maximum(0, p.mean_l - p.mean_w), sft=1.0),
    # R-DPO (2403.19159): the optimum of E[r − α|y|] − β KL has r = β log π/π_ref + α|y| + a constant of the prompt,
    # so that a Bradley–Terry r makes the longer completion's lead count less. Tables that copy SimPO's have a minus.
    "r-dpo": Case({"beta": 0.3, "r_dpo_alpha": 0.07}, lambda p, h: -log_sigmoid(0.3 * p.gap + 0.07 * (p.n_w - p.n_l))),
    # Mitchell's note, eq. 3; γ-PO (2506.03690), eq. 13
    "cdpo": Case(
        {"beta": 0.3, "label_smoothing": 0.15},
        lambda p, h: -(1 - 0.15) * log_sigmoid(0.3 * p.gap) - 0.15 * log_sigmoid(-0.3 * p.gap),
    ),
    "rsimpo": Case(
        {"beta": 2.0, "gamma_beta_ratio": 0.4, "label_smoothing": 0.15},
        lambda p, h: (
            -(1 - 0.15) * log_sigmoid(2.0 * (p.mean_w - p.mean_l) - 0.8)
            - 0.15 * log_sigmoid(-2.0 * (p.mean_w - p.mean_l) - 0.8)
        ),
    ),
    # ODPO: `trainers.py` of rycolab/odpo
    "odpo": Case(
        {"beta": 0.3, "odpo_alpha": 0.6}, lambda p, h: -log_sigmoid(0.3 * p.gap - 0.6 * np.log(p.s_w - p.s_l))
    ),
    # FocalPO (2501.06645)
    "focalpo": Case(
        {"beta": 0.3, "focalpo_gamma": 0.7}, lambda p, h: -(sigmoid(0.3 * p.gap) ** 0.7) * log_sigmoid(0.3 * p.gap)
    ),
    "kto-pair": Case({"beta": 0.3}, lambda p, h: kto_pair(p, h, 0.3)),
    # DPO-Positive (2402.13228), eq. 3
    "dpop": Case(
        {"beta": 0.3, "dpop_lambda": 5.0},
        lambda p, h: -log_sigmoid(0.3 * (p.gap - 5.0 * np.maximum(0, p.ref_w - p.w))),
    ),
    # SPPO (2405.00675), eq. 4.7 with P = 1 and 0; the authors' `sppo_single` is half of it
    "sppo": Case({"beta": 0.05}, lambda p, h: (p.ratio_w - 0.5 / 0.05) ** 2 + (p.ratio_l + 0.5 / 0.05) ** 2),
    # SimPER: `simper_trainer.py` of tengxiao1/SimPER
    "simper": Case({}, lambda p, h: -np.exp(p.mean_w) + np.exp(p.mean_l)),
    "madpo": Case(
        {"beta": 0.3, "madpo_c_max": 3.0, "madpo_c_min": 0.4, "madpo_steepness": 0.8, "madpo_tau": 2.0},
        lambda p, h: madpo_weight(p.s_w - p.s_l, 3.0, 0.4, 0.8, 2.0) * -log_sigmoid(0.3 * p.gap),
        mixed_scores=True,
    ),
    "reward-aware-po": Case(
        {"beta": 0.3, "reward_aware_eta": 0.8}, lambda p, h: reward_aware(p, 0.3, 0.8), sft=1e-5, mixed_scores=True
    ),
}
STATEFUL = {"alpha-dpo", "beta-dpo", "beta-simpo"}  # and below: what has a state, and a loss of the batch
ELSEWHERE = STATEFUL | {"dr-dpo"}


def config_of(id: str, base: str, **settings: Any) -> Any:
    return config_class(id, base)(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **settings)


def objective(id: str, base: str, **settings: Any) -> Objective:
    return objective_of(config_of(id, base, **settings))


def losses_and_gradients(each: Objective, p: Pairs, wpo: bool = False) -> tuple[ObjectiveOutput, list[np.ndarray]]:
    """What the package says of pairs in training; gradients are those of the mean loss."""
    pairs, columns, leaves = p.torch()
    pairs = replace(pairs, policy_weight=torch.tensor(p.policy) if wpo else None)
    output = each(pairs, columns=columns, training=True)
    slopes = torch.autograd.grad(output.losses.mean(), leaves, allow_unused=True, materialize_grads=True)
    return output, [slope.numpy() for slope in slopes]


def assert_close(ours: Any, published: Any, rtol: float = 1e-6, what: str = "") -> None:
    published = np.asarray(published)
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    scale = np.abs(published).max() if published.size else 0.0
    np.testing.assert_allclose(ours, published, rtol=rtol, atol=1e-9 * scale + 1e-12, err_msg=what)


def assert_gradients(ours: list[np.ndarray], total: Callable[[Pairs], float], p: Pairs) -> None:
    """Relative to each variable's largest slope, which finite differences know to some 1e-9."""
    for name, got, expected in zip(VARIABLES, ours, gradients(total, p), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * scale + 1e-12, err_msg=f"gradient over {name}")


def test_every_baseline_has_its_formula():
    assert set(CASES) | ELSEWHERE == set(BASELINES)


@pytest.mark.parametrize(("id", "base"), [row for row in ROWS if row[0] not in ELSEWHERE])
def test_published_formula(id, base):
    case = CASES[id]
    sft = case.sft if base == "dpo" else 0.0  # CPOTrainer adds its own, below
    for seed in range(3):
        p = random_pairs(seed)
        if case.mixed_scores:
            flip = np.arange(8) % 3 == 0
            p = replace(p, s_w=np.where(flip, p.s_l, p.s_w), s_l=np.where(flip, p.s_w, p.s_l))
        output, slopes = losses_and_gradients(objective(id, base, **case.settings), p, wpo=id == "wpo")
        assert_close(output.losses, case.loss(p, p) + sft * p.nll)
        assert_gradients(slopes, lambda q, h=p: (case.loss(q, h) + sft * q.nll).mean(), p)


def test_alpha_dpo():
    """`scripts/dpo_trainer.py` of junkangwu/alpha-DPO: moments from 0, of this batch too; unbiased deviation."""
    each = objective("alpha-dpo", "dpo", beta=1.5, gamma_beta_ratio=0.3, alpha_dpo_alpha=0.2)
    mean = deviation = 0.0
    for seed in range(3):
        p = random_pairs(seed)
        m = (p.mean_w - p.mean_l) - (p.ref_w / p.n_w - p.ref_l / p.n_l)
        mean, deviation = 0.9 * mean + 0.1 * m.mean(), 0.9 * deviation + 0.1 * m.std(ddof=1)
        target = 0.3 + 0.2 * (m - mean) / deviation

        def published(q, target=target):
            return -log_sigmoid(1.5 * (q.mean_w - q.mean_l - target))

        output, slopes = losses_and_gradients(each, p)
        assert_close(output.losses, published(p))
        assert_gradients(slopes, lambda q, published=published: published(q).mean(), p)


@pytest.mark.parametrize("beta_prime", [0.5, 1.0, 20.0])
def test_dr_dpo(beta_prime):
    """`trainers.py` of junkangwu/Dr_DPO: −β′ log mean exp(−ℓ/β′). Its gradient is exact, as that of a weighted mean;
    the logged loss is that mean, Σ exp(−ℓ/β′) ℓ / Σ exp(−ℓ/β′), and not the published number.
    """
    for seed in range(3):
        p = random_pairs(seed)
        output, slopes = losses_and_gradients(objective("dr-dpo", "dpo", beta=0.3, dr_dpo_beta_prime=beta_prime), p)
        dpo = -log_sigmoid(0.3 * p.gap)
        tilted = np.exp(-dpo / beta_prime)
        assert_close(output.losses, tilted / tilted.mean() * dpo)
        assert_gradients(
            slopes, lambda q: -beta_prime * np.log(np.exp(log_sigmoid(0.3 * q.gap) / beta_prime).mean()), p
        )


@pytest.mark.parametrize(
    ("id", "base", "a"),
    [("beta-dpo", "dpo", 0.4), ("beta-dpo", "dpo", 40.0), ("beta-simpo", "cpo", 0.4), ("beta-simpo", "dpo", 0.4)],
)
def test_beta_dpo(id, base, a):
    """`trainers.py` of junkangwu/beta-DPO: moments from 0, of this batch too, of gaps before β; the loss is the mean
    over the kept pairs. Its gradient is exact; a kept pair's logged loss is β_b/β times the published one, over the
    share of pairs that is kept. β-SimPO has SimPO's gap and its γ.
    """
    beta, ratio = 0.3, 0.5 if id == "beta-simpo" else 0.0
    options = {"gamma_beta_ratio": ratio} if ratio else {}
    each = objective(id, base, beta=beta, beta_dpo_a=a, beta_dpo_keep=0.7, **options)
    mean = 0.0
    clamped = []
    for seed in range(4):
        p = random_pairs(seed)

        def gap(q):
            return q.gap if id == "beta-dpo" else q.mean_w - q.mean_l

        mean = 0.9 * mean + 0.1 * gap(p).mean()
        output, slopes = losses_and_gradients(each, p)
        (kept,) = (value.numpy() > 0 for value in output.weights.values())
        assert kept.sum() == int(8 * 0.7)
        beta_b = max(beta * (1 + a * (gap(p)[kept].mean() - mean)), 1e-3)
        clamped.append(beta_b == 1e-3)

        def published(q, beta_b=beta_b):
            return -log_sigmoid(beta_b * gap(q) - beta * ratio)

        assert_close(output.losses, np.where(kept, beta_b / beta * published(p) / kept.mean(), 0))
        assert_gradients(slopes, lambda q, kept=kept, published=published: published(q)[kept].mean(), p)
    assert any(clamped) == (a == 40.0)


# TRL's own trainers. The settings are written out: those of ours come from the method's row

TRLS = [
    ("simpo", "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 2.5 * 0.55}),
    ("cpo", "cpo", {"loss_type": "sigmoid", "cpo_alpha": 1.0, "beta": 0.1}),
    ("slic-hf", "cpo", {"loss_type": "hinge", "cpo_alpha": 0.1, "beta": 1.0}),
    ("alphapo", "cpo", {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 2.5 * 0.1}),
    ("orpo", "cpo", {"beta": 0.1}),
    ("dpo", "dpo", {"beta": 0.01}),
    ("dpo", "dpo", {"beta": 0.01, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.5]}),
    ("ipo", "dpo", {"beta": 0.1, "loss_type": "ipo"}),
    ("robust-dpo", "dpo", {"beta": 0.1, "loss_type": "robust", "label_smoothing": 0.1}),
    ("wpo", "dpo", {"beta": 0.01, "use_weighting": True}),
    ("sppo", "dpo", {"beta": 0.001, "loss_type": "sppo_hard"}),
]


@pytest.mark.parametrize(("id", "base", "settings"), TRLS)
def test_trls_trainer(id, base, settings, tiny_model, tokenizer, tmp_path):
    """The method by its name, and TRL's trainer with the paper's settings: loss and gradients to 1e-5.

    ORPOTrainer's NLL has the prompt's tokens too. A prompt of one token has none that are predicted.
    """
    rows = preference_rows(6)
    if id == "orpo":
        rows = rows.map(lambda row: {"prompt": tokenizer.bos_token})
    common = {"train_dataset": rows, "processing_class": tokenizer}
    models = {"ref_model": load(tiny_model)} if base == "dpo" else {}
    options = quiet(output_dir=str(tmp_path))
    own = {"tokenization": "cpo"} if base == "cpo" else {}
    if "loss_weights" in settings:  # a loss that the method does not have
        own = {name: settings[name] for name in ("loss_type", "loss_weights")}
    ours = trainer_class(id, base)(
        load(tiny_model, noise=0.02),
        args=config_class(id, base)(**options, **own, share_prompt="never"),
        **models,
        **common,
    )
    cls, config = {"cpo": (CPOTrainer, CPOConfig), "dpo": (DPOTrainer, DPOConfig)}[base]
    if id == "orpo":
        cls, config = ORPOTrainer, ORPOConfig
    theirs = cls(load(tiny_model, noise=0.02), args=config(**options, **settings), **models, **common)
    ours.options.share_prompt = "auto"  # our own pass and objective, not TRL's
    assert not ours.runs_trl
    our_loss, our_gradients = loss_and_gradients(ours, first_batch(ours))
    their_loss, their_gradients = loss_and_gradients(theirs, first_batch(theirs))
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert_same_gradients(our_gradients, their_gradients, rtol=1e-5)


def plain_pairs(model: Any, ref_model: Any, batch: dict[str, Any], alpha: float) -> Pairs:
    """The pairs of a batch by plain transformers in float64, one row at a time."""
    if "input_ids" in batch:
        sides = zip(batch["input_ids"].chunk(2), batch["attention_mask"].chunk(2), strict=True)
        masks = batch["completion_mask"].bool().chunk(2)
        rows = [(ids, seen.bool(), mask) for (ids, seen), mask in zip(sides, masks, strict=True)]
    else:
        rows = [
            (batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"].bool(), batch[f"{side}_labels"] != -100)
            for side in ("chosen", "rejected")
        ]
    found: dict[str, list] = {name: [] for name in ("sum", "n", "token", "ref", "policy")}
    policy, reference = (copy.deepcopy(each).double().eval() for each in (model, ref_model or model))
    for side, seen, mask in rows:
        for ids, real, completion in zip(side, seen, mask, strict=True):
            tokens, of_completion = ids[real], completion[real][1:]
            with torch.no_grad():
                every, theirs = (each(tokens[None]).logits[0, :-1].log_softmax(-1) for each in (policy, reference))
            logps, ref = (each.gather(1, tokens[1:, None])[:, 0][of_completion].numpy() for each in (every, theirs))
            aligned = logps - (2 * every).logsumexp(-1)[of_completion].numpy()  # log Σ_v π(v)²
            values = (logps.sum(), len(logps), alphapo(logps, alpha).sum(), ref.sum(), np.exp(aligned.mean()))
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    halves = {name: np.array(values).reshape(2, -1) for name, values in found.items()}
    (w, lose), (n_w, n_l), (token_w, token_l), (ref_w, ref_l), policies = halves.values()
    scores = batch["pair_columns"]
    s_w, s_l = (scores[f"score_{side}"].double().numpy() for side in ("chosen", "rejected"))
    return Pairs(w, lose, token_w, token_l, ref_w, ref_l, n_w, n_l, s_w, s_l, policies[0] * policies[1])


REAL = [
    *((id, base) for id in ("cpo", "slic-hf", "orpo", "rrhf", "alphapo-token") for base in ("cpo", "dpo")),
    *((id, "dpo") for id in ("wpo", "kto-pair", "reward-aware-po", "r-dpo")),
]


@pytest.mark.parametrize(("id", "base"), REAL)
def test_the_trainers_loss(id, base, tiny_model, tokenizer, tmp_path):
    """What a trainer adds to the objective: the SFT term of either base, tokens' scores, WPO's weights, lengths."""
    case, rows = CASES[id], preference_rows(6)
    # an SFT term of the weight 1e-5 is not seen beside the loss
    options = {"loss_weights": [1.0, 0.5]} if id == "reward-aware-po" else {}
    sft = 0.5 if options else case.sft
    config = config_class(id, base)(**quiet(output_dir=str(tmp_path), **case.settings, **options))
    models = {"ref_model": load(tiny_model)} if METHODS[id].bases == ("dpo",) else {}
    trainer = trainer_class(id, base)(
        load(tiny_model, noise=0.02), args=config, train_dataset=rows, processing_class=tokenizer, **models
    )
    batch = first_batch(trainer)
    p = plain_pairs(trainer.model, models.get("ref_model"), batch, case.settings.get("alpha", 1.0))
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.item() == pytest.approx((case.loss(p, p) + sft * p.nll).mean(), rel=1e-5)
    assert all(slope.isfinite().all() for slope in gradients.values())


# The contract's functions, called by name as outside checks do

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GAPS = [0.0, 1.0, -1.0, 30.0, -30.0, 3e4, -3e4]


def finite(function: Callable[[torch.Tensor], torch.Tensor], values: list[float], dtype: torch.dtype) -> torch.Tensor:
    """[B] in, [B] out, with finite values and slopes."""
    given = torch.tensor(values, dtype=dtype, requires_grad=True)
    found = function(given)
    assert found.shape == given.shape
    assert found.isfinite().all(), found
    if found.requires_grad:
        (slope,) = torch.autograd.grad(found.float().sum(), given)
        assert slope.isfinite().all(), slope
    return found.detach().double()


def rounding(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_smoothed_links_at_extremes(epsilon, dtype):
    gap = np.array(GAPS)
    found = finite(lambda m: conservative(m, epsilon), GAPS, dtype)
    expected = -(1 - epsilon) * log_sigmoid(gap) - epsilon * log_sigmoid(-gap)
    np.testing.assert_allclose(found, expected, rtol=rounding(dtype), atol=rounding(dtype))
    expected = -(1 - epsilon) * log_sigmoid(gap - 2) - epsilon * log_sigmoid(-gap - 2)
    for margin in (2.0, torch.full((len(GAPS),), 2.0, dtype=dtype)):
        found = finite(lambda m, margin=margin: robust_simpo(m, margin, epsilon), GAPS, dtype)
        np.testing.assert_allclose(found, expected, rtol=rounding(dtype), atol=2 * rounding(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_odds_from_certain_to_impossible(dtype):
    certain = finite(package_log_odds, [0.0, -1e-30, -torch.finfo(dtype).eps], dtype)
    assert certain.min() > 4  # the odds of the largest p below 1: 128 to 1 in bfloat16
    # 1 − p is not the difference of two numbers that are nearly the same
    values = [-11.3 * torch.finfo(dtype).eps, -0.1, -0.7, -1.0, -5.0, -60.0, -3e4]
    given = torch.tensor(values, dtype=dtype).double().numpy()
    expected = given - np.log(-np.expm1(given))
    np.testing.assert_allclose(finite(package_log_odds, values, dtype), expected, rtol=10 * rounding(dtype))
    every = finite(package_log_odds, sorted([*values, -0.2, 0.0]), dtype)
    assert (every.diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_at_extremes(dtype):
    for beta_prime in (0.01, 1.0, 100.0):
        weight = finite(lambda m, b=beta_prime: dr_dpo_weight(m, b), GAPS, dtype)
        assert (weight >= 0).all()
        assert weight.mean() == pytest.approx(1, rel=1e-5)
        for alike in (-3e4, 0.0, 3e4):
            weight = finite(lambda m, b=beta_prime: dr_dpo_weight(m, b), [alike] * 3, dtype)
            np.testing.assert_allclose(weight, 1, rtol=1e-5)
        assert finite(lambda m, b=beta_prime: dr_dpo_weight(m, b), [-7.0], dtype).item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margins_at_extremes(dtype):
    chosen, rejected = [5.0, 5.0, 1.0, 3e4, 2.0, 2.0**-12], [5.0, 1.0, 5.0, -3e4, 1.0, 0.0]
    other = torch.tensor(rejected, dtype=dtype)
    offset = finite(lambda s: score_offset_margin(s, other, 0.5), chosen, dtype)
    gap = torch.tensor(chosen, dtype=dtype).double().numpy() - other.double().numpy()
    right = gap > 0
    np.testing.assert_allclose(offset[right], 0.5 * np.log(gap[right]), rtol=1e-4, atol=1e-6)
    # log 0 and beyond: the pair is satisfied by any gap, as with the authors' log(0) = −∞
    for m in (-100.0, 0.0, 100.0):
        assert -torch.nn.functional.logsigmoid(m - offset[~torch.tensor(right)]).max() == 0
    assert not finite(lambda s: score_offset_margin(s, other, 0.0), chosen, dtype).any()
    # lengths are whole numbers, and 0 where truncation left nothing
    lengths = torch.tensor([0, 5, 2048, 3]), torch.tensor([7, 0, 1, 3])
    for given in (lengths, tuple(each.to(dtype) for each in lengths)):
        margin = length_margin(*given, 0.05)
        assert margin.shape == (4,)
        # a longer chosen completion lowers what is asked: −α(|y_w| − |y_l|)
        np.testing.assert_allclose(margin.double(), [0.35, -0.25, -0.05 * 2047, 0], rtol=max(1e-6, rounding(dtype)))


EXTREMES = Pairs(  # certain, empty, hopeless, long; with scores that tie and that are reversed
    w=np.array([0.0, 0.0, -90.0, -3000.0]),
    l=np.array([-50.0, 0.0, 0.0, -1.0]),
    token_w=np.array([0.0, 0.0, -900.0, -9000.0]),
    token_l=np.array([-80.0, 0.0, 0.0, -1.0]),
    ref_w=np.array([-1.0, 0.0, -1.0, -3000.0]),
    ref_l=np.array([-1.0, 0.0, -200.0, -3000.0]),
    n_w=np.array([1, 0, 1, 40]),
    n_l=np.array([1, 0, 3, 40]),
    s_w=np.array([1.0, 3.0, 1.0, 100.0]),
    s_l=np.array([1.0, 1.0, 9.0, -100.0]),
    policy=np.array([1.0, 1.0, 0.0, 0.5]),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("id", "base"), ROWS)
def test_every_baseline_at_extremes(id, base, dtype):
    """Losses and gradients of whatever a batch brings are numbers, in training and in evaluation."""
    each = objective(id, base)
    for training, rows in ((True, slice(None)), (False, slice(None)), (True, slice(1)), (True, slice(1, 2))):
        p = EXTREMES[rows]
        pairs, columns, leaves = replace(p, n_w=np.maximum(p.n_w, 1)).torch(dtype)
        pairs = replace(pairs, chosen_length=torch.tensor(p.n_w), sft_loss=pairs.sft_loss)
        output = each(pairs, columns=columns, training=training, evaluation=not training)
        slopes = torch.autograd.grad(output.losses.mean(), leaves, allow_unused=True, materialize_grads=True)
        assert output.losses.shape == pairs.chosen.shape
        assert output.losses.isfinite().all(), output.losses
        assert all(slope.isfinite().all() for slope in slopes), slopes


# Composition: the five methods' weights and margins with every link that takes one

TERMS: dict[str, dict[str, Any]] = {
    "score-gap": {"weight": "score-gap"},
    "gap-aware": {"margin": "gap-aware"},
    "gamma-po": {"margin": "gamma-po", "gamma_po_tau": 1.0},
    "amapo": {"margin": "amapo"},
}
WITH_MARGIN = [(base, name) for base in LINKS for name, link in LINKS[base].items() if link.takes_margin]
PER_PAIR = [(base, name) for base in LINKS for name, link in LINKS[base].items() if link.per_pair]


def composed(base: str, loss: Any, **settings: Any) -> Objective:
    """Without a method: this loss, with the smoothing that some losses need."""
    names = [loss] if isinstance(loss, str) else loss
    smooth = any(LINKS[base][name].reads_smoothing for name in names)
    options = {"beta": 0.4, "label_smoothing": 0.1 if smooth else 0.0, **settings}
    (own,) = {LINKS[base][name].reward for name in names if LINKS[base][name].needs_its_reward} or {None}
    options |= {"reward": own} if own else {}
    return objective_of(config_class(None, base)(**quiet(output_dir="unused", loss_type=loss, **options)))


def composed_losses(each: Objective, p: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] losses, and [2, B] slopes of their sum over the log-probabilities."""
    pairs, columns, leaves = p.torch()
    columns |= {"evaluation_factor": torch.full((len(p.w),), 0.3, dtype=torch.float64)}
    columns |= {"asked": torch.full((len(p.w),), 0.6, dtype=torch.float64)}
    for term in each.terms:
        term.fit(columns)
    losses = each(pairs, columns=columns, training=True).losses
    slopes = torch.autograd.grad(losses.sum(), leaves[:2], retain_graph=True)
    assert losses.isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes)
    return losses.detach(), torch.stack(slopes)


@pytest.mark.parametrize(("base", "loss"), WITH_MARGIN)
def test_every_margin_with_every_link(base, loss):
    p, with_target = random_pairs(0), {"gamma_beta_ratio": 1.5}  # 0.6 in reward units
    expected = composed_losses(composed(base, loss, **with_target), p)
    plain = composed_losses(composed(base, loss, gamma_beta_ratio=0.0), p)
    assert not torch.allclose(expected[0], plain[0])
    # margins that are γ for every pair are γ: of a column, and GaPO's where all pairs are equally similar
    for options in (
        {"margin": "column", "margin_column": "asked", "margin_column_unit": "reward", "gamma_beta_ratio": 0.0},
        {"margin": "gap-aware", **with_target},
    ):
        found = composed_losses(composed(base, loss, **options), p)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # columns are float32
    for name in ("gamma-po", "amapo"):
        losses, _ = composed_losses(composed(base, loss, **TERMS[name], **with_target), p)
        assert not torch.allclose(losses, expected[0])
        each = composed(base, loss, **TERMS[name], weight="score-gap", **with_target)
        weighted, _ = composed_losses(each, p)
        torch.testing.assert_close(weighted, losses * torch.tensor(p.s_w - p.s_l), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("base", "loss"), PER_PAIR)
def test_the_weight_with_every_link(base, loss):
    """A pair weighs what its scores differ by; without a difference it has neither loss nor gradient."""
    p = random_pairs(1)
    p = replace(p, s_l=np.where(np.arange(8) == 2, p.s_w, p.s_l))
    weight = torch.tensor(p.s_w - p.s_l)
    losses, slopes = composed_losses(composed(base, loss, gamma_beta_ratio=None), p)
    weighted, weighted_slopes = composed_losses(composed(base, loss, weight="score-gap"), p)
    torch.testing.assert_close(weighted, weight * losses, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weighted_slopes, weight * slopes, rtol=1e-6, atol=1e-9)
    assert weighted[2] == 0
    assert not weighted_slopes[:, 2].any()
    if base == "dpo":  # beside the SFT term, which no pair's weight scales
        both = composed(base, [loss, "sft"], weight="score-gap", loss_weights=[0.5, 2.0])
        found, found_slopes = composed_losses(both, p)
        torch.testing.assert_close(found, 0.5 * weight * losses + 2 * p.nll, rtol=1e-6, atol=1e-9)
        nll_slope = torch.tensor([-1.0, 0.0], dtype=torch.float64)[:, None] / p.n_w.sum()
        torch.testing.assert_close(
            found_slopes, 0.5 * weight * slopes + 2 * 8 * nll_slope, rtol=1e-6, atol=1e-9, msg="SFT term"
        )


@pytest.mark.parametrize("margin", [None, "gamma-po", "amapo"])
def test_sigmoid_norm_is_the_sigmoid_of_mean_log_ratios(margin):
    p = random_pairs(2)
    # of γ-PO, `gamma_po_centered` follows from the reward that is named
    options = {"simpo_gamma": 0.6, "margin": margin, "gamma_po_centered": True}
    named = composed_losses(composed("dpo", "sigmoid_norm", **options), p)
    other = composed_losses(composed("dpo", "sigmoid", reward="mean-log-ratio", **options), p)
    torch.testing.assert_close(named, other)
    if margin is None:
        assert_close(named[0], -log_sigmoid(0.4 * (p.ratio_w / p.n_w - p.ratio_l / p.n_l) - 0.6))


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_a_weight_leaves_the_trainers_sft_term_alone(base, tiny_model, tokenizer, tmp_path):
    sft = {"cpo": {"cpo_alpha": 0.5}, "dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}}[base]
    config = config_class("cpo", base)(**quiet(output_dir=str(tmp_path), weight="score-gap", **sft))
    trainer = trainer_class("cpo", base)(
        load(tiny_model), args=config, train_dataset=preference_rows(6), processing_class=tokenizer
    )
    batch = first_batch(trainer)
    p = plain_pairs(trainer.model, None, batch, alpha=1.0)
    loss, _ = loss_and_gradients(trainer, batch)
    expected = ((p.s_w - p.s_l) * -log_sigmoid(0.1 * (p.w - p.l))).mean() + 0.5 * p.nll
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("id", "base"), ROWS)
def test_a_baseline_with_another_weight_is_not_the_baseline(id, base):
    """`--method X --weight score-gap` is an objective of its own, which no paper is cited for."""
    argv = ["--method", id, "--base", base, "--use_cpu", "--dry_run"]
    assert parse(argv)[1].method is METHODS[id]
    config = parse([*argv, "--weight", "score-gap"])[1]
    assert config.method is None
    assert [term.name for term in objective_of(config).weights] == ["score-gap"]


# Ranks: what a batch shares is shared by all


class Ranks:
    """Two ranks as two threads. A gather that one of them misses fails on the other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.values: dict[int, torch.Tensor] = {}

    def gather(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def over_ranks(values: torch.Tensor) -> torch.Tensor:
            self.values[rank] = values.detach()
            self.barrier.wait()
            found = torch.cat([self.values[0], self.values[1]])
            self.barrier.wait()
            return found

        return over_ranks

    def losses(self, each: Objective, p: Pairs, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs, columns, leaves = p[4 * rank : 4 * rank + 4].torch()
        losses = each(pairs, columns, gather=self.gather(rank), first=4 * rank, training=True).losses
        # DDP's mean over ranks makes it that of the whole
        return losses.detach(), torch.stack(torch.autograd.grad(losses.sum(), leaves[:2]))


@pytest.mark.parametrize(("id", "base"), [row for row in ROWS if row[0] in STATEFUL | {"dr-dpo", "kto-pair"}])
def test_two_ranks_of_four_are_one_of_eight(id, base):
    whole, (first, second), ranks = objective(id, base), (objective(id, base) for _ in range(2)), Ranks()
    with ThreadPoolExecutor(2) as pool:
        for seed in range(3):
            p = random_pairs(seed)
            pairs, columns, leaves = p.torch()
            losses = whole(pairs, columns, training=True).losses
            slopes = torch.stack(torch.autograd.grad(losses.sum(), leaves[:2]))
            halves = list(pool.map(ranks.losses, (first, second), (p, p), (0, 1)))
            torch.testing.assert_close(torch.cat([loss for loss, _ in halves]), losses.detach())
            torch.testing.assert_close(torch.cat([slope for _, slope in halves], dim=1), slopes)
    for one, other in zip(first.terms, whole.terms, strict=True):
        assert str(one.state_dict()) == str(other.state_dict())


@pytest.mark.parametrize(
    ("id", "base", "settings"),
    [
        ("dpo", "dpo", {"loss_type": "ipo"}),
        ("dpo", "dpo", {"loss_type": ["sigmoid", "sft"]}),
        ("dr-dpo", "dpo", {"loss_type": "hinge"}),
        ("wpo", "dpo", {"use_weighting": False}),
        ("dpo", "dpo", {"use_weighting": True}),
        ("dpo", "dpo", {"simpo_gamma": 0.5}),
        ("dpo", "dpo", {"f_divergence_type": "forward_kl"}),
        ("dpo", "dpo", {"ld_alpha": 0.5}),
        ("odpo", "dpo", {"gamma_beta_ratio": 0.5}),
        ("orpo", "cpo", {"simpo_gamma": 0.5}),
        ("simpo", "cpo", {"alpha": 0.25}),
        ("simpo", "cpo", {"label_smoothing": 0.1}),
        ("simpo", "cpo", {"cpo_alpha": 1.0}),
        ("alphapo", "cpo", {"alpha": 0.0}),
        ("alpha-dpo", "dpo", {"reward": "log-ratio"}),
    ],
)
def test_what_makes_another_objective_of_a_baseline(id, base, settings):
    assert config_of(id, base).method is METHODS[id]
    assert config_of(id, base, **settings).method is None


def test_numbers_leave_a_baseline_what_it_is():
    for id, settings in {
        "simpo": {"beta": 10.0, "gamma_beta_ratio": 0.0},
        "robust-dpo": {"label_smoothing": 0.3},
        "alphapo": {"alpha": 0.5, "simpo_gamma": 0.3},
        "cpo": {"beta": 0.05, "learning_rate": 1e-5},
    }.items():
        assert config_of(id, METHODS[id].bases[0], **settings).method is METHODS[id]


@pytest.mark.parametrize("id", ["simpo", "cpo", "slic-hf", "orpo", "rrhf", "rsimpo", "simper"])
def test_a_loss_alone_has_its_methods_reward(id):
    """`loss_type: orpo` without a method: on sums of log-probabilities it would be no paper's."""
    row = METHODS[id]
    alone = config_class(None, "cpo")(**quiet(output_dir="unused", loss_type=row.loss or "simpo"))
    assert objective_of(alone).reward.name == row.reward
