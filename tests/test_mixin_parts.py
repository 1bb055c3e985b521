"""What a trainer makes of one batch, without a model: its loss, what it logs, and what it remembers for the set."""

from __future__ import annotations

import math
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import load, preference_rows, quiet
from test_core import random_pairs

from trl_margins import (
    AMaPOTrainer,
    GapAwarePOTrainer,
    GapPOTrainer,
    MarginCPOConfig,
    MarginCPOTrainer,
    MarginDPOTrainer,
)
from trl_margins.forward.standard import fused_token_logps, logits_token_logps
from trl_margins.links import CPO_LINKS
from trl_margins.objective import Objective, ObjectiveOutput
from trl_margins.pairs import CARRIED, PairLogps, PairView
from trl_margins.rewards import LengthNormalizedReward, SummedReward
from trl_margins.terms.column import ColumnMargin, ColumnWeight
from trl_margins.terms.score_gap import ScoreGapWeight
from trl_margins.trainers import cpo, mixin
from trl_margins.trainers.dpo import check_unread_options
from trl_margins.trainers.mixin import MarginMixin

CHOSEN, REJECTED = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 4.0])
COLUMNS = {
    "score_chosen": torch.tensor([5.0, 2.0, 1.0]),
    "score_rejected": torch.tensor([3.0, 2.0, 4.0]),
    "is_flipped": torch.tensor([0.0, 1.0, 0.0]),
    "row_number": torch.tensor([7, 8, 9]),
    "other": torch.zeros(3),
}
ONES, TWOS = torch.ones(3), 2 * torch.ones(3)


def output_of(columns: Any = COLUMNS, **given: Any) -> ObjectiveOutput:
    view = PairView.of_gaps(CHOSEN - REJECTED, columns)
    plain = {"weights": {}, "margins": {}, "weight": None, "margin": None, "gradient_scale": -ONES}
    return ObjectiveOutput(torch.zeros(3), CHOSEN, REJECTED, view, **{**plain, **given})


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in values.items()}


def test_metrics_of_a_batch():
    """A tie is no win; one term is the whole, and several are named."""
    pairs = PairLogps(CHOSEN, REJECTED, ONES, ONES, token_stats={"entropy": torch.tensor(0.5)})
    rewards = {
        "rewards/chosen": [1.0, 2.0, 3.0],
        "rewards/rejected": [0.5, 2.0, 4.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],
        "rewards/margins": [0.5, 0.0, -1.0],
        "entropy": 0.5,
    }

    def metrics(**given: Any) -> dict[str, Any]:
        return plain(MarginMixin._batch_metrics(SimpleNamespace(), pairs, output_of(**given), {}, "train"))

    assert metrics() == rewards
    one = metrics(weights={"a": ONES}, weight=ONES, margins={"b": TWOS}, margin=TWOS)
    assert one == {**rewards, "weights": [1.0] * 3, "target_margins": [2.0] * 3}
    two = metrics(weights={"a": ONES, "b": TWOS}, weight=TWOS, margins={"c": ONES, "d": TWOS}, margin=3 * ONES)
    assert two == {
        **rewards,
        **{"weights": [2.0] * 3, "weights/a": [1.0] * 3, "weights/b": [2.0] * 3},
        **{"target_margins": [3.0] * 3, "target_margins/c": [1.0] * 3, "target_margins/d": [2.0] * 3},
    }


def test_lines_of_the_pair_log():
    own = SimpleNamespace(objective=SimpleNamespace(gamma=0.75))
    found = plain(MarginMixin._pair_values(own, output_of(), {"anchor/gap/x": TWOS}))
    assert found == {
        "reward_gap": [0.5, 0.0, -1.0],
        "weight": [1.0] * 3,
        "margin": [0.75] * 3,
        "slope": [-1.0] * 3,
        "logp_chosen": [0.5, 0.0, -1.0],
        "logp_rejected": [0.0] * 3,
        "length_chosen": [1] * 3,
        "length_rejected": [1] * 3,
        "score_gap": [2.0, 0.0, -3.0],
        "is_flipped": [0.0, 1.0, 0.0],
        "row_number": [7, 8, 9],
        "anchor_gap_x": [2.0] * 3,
    }
    several = output_of(
        {}, weights={"a": ONES, "b": TWOS}, weight=TWOS, margins={"c": ONES, "d": TWOS}, margin=3 * ONES
    )
    found = plain(MarginMixin._pair_values(own, several, {}))
    assert (found["weight"], found["margin"]) == ([2.0] * 3, [3.0] * 3)
    assert {name: found[name][0] for name in ("weight_a", "weight_b", "margin_c", "margin_d")} == {
        **{"weight_a": 1.0, "weight_b": 2.0},
        **{"margin_c": 1.0, "margin_d": 2.0},
    }
    assert not found.keys() & {"score_gap", "is_flipped", "row_number"}


def test_a_completion_that_is_the_other_one():
    """Every token of it, whatever the prompt and the padding; of two that begin alike, neither."""
    chosen, rejected = [[5, 6, 0], [5, 6, 7], [5, 6, 0]], [[5, 6, 0], [5, 8, 7], [5, 6, 7]]
    ids = torch.tensor(chosen + rejected)
    dpo = {"input_ids": ids, "attention_mask": ids.ne(0), "completion_mask": ids.ne(0).int()}
    assert MarginDPOTrainer.same_completions(None, dpo).tolist() == [True, False, False]
    labels = ids.masked_fill(ids == 0, -100)
    for width in (3, 4):  # CPOTrainer pads each side to its own longest row
        sides = {"chosen_labels": labels[:3], "rejected_labels": F.pad(labels[3:], (0, width - 3), value=-100)}
        assert MarginCPOTrainer.same_completions(None, sides).tolist() == [True, False, False]
    assert MarginDPOTrainer.n_pairs(None, dpo) == MarginCPOTrainer.n_pairs(None, sides) == 3


@pytest.mark.parametrize("aux", [None, 3.0])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_what_is_added_to_the_mean_loss(alpha, enabled, aux):
    """CPO's SFT term, and the experts' load-balancing loss where the model is asked for it."""
    pairs = PairLogps(
        *[CHOSEN] * 2, *[ONES] * 2, sft_loss=torch.tensor(2.0), aux_loss=None if aux is None else torch.tensor(aux)
    )
    said: list[str] = []
    own = SimpleNamespace(cpo_alpha=alpha, aux_loss_enabled=enabled, aux_loss_coef=0.5, router_aux_loss_coef=0.125)
    own.args, own._warn_once = SimpleNamespace(router_aux_loss_coef=0.125), said.append
    of_experts = aux if enabled and aux else 0.0
    assert float(MarginCPOTrainer._extra_loss(own, pairs)) == 2 * alpha + 0.5 * of_experts
    assert float(MarginDPOTrainer._extra_loss(own, pairs)) == 0.125 * of_experts
    assert len(said) == (enabled and aux is None)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("alpha", "enabled"), [(0.0, True), (0.5, False)])
def test_what_each_base_adds_to_the_metrics(alpha, enabled, mode, monkeypatch):
    """TRL's names. CPOTrainer's log-probabilities are SimPO's means where its reward is."""
    monkeypatch.setattr(MarginMixin, "_batch_metrics", lambda *args: {"own": torch.tensor(float(args[4] == mode))})
    pairs = PairLogps(-CHOSEN, -REJECTED, TWOS, 4 * ONES, sft_loss=torch.tensor(2.0), aux_loss=torch.tensor(3.0))
    batch = {"attention_mask": torch.tensor([[1, 1], [1, 0]])}
    summed = {"logps/chosen": [-1.0, -2.0, -3.0], "logps/rejected": [-0.5, -2.0, -4.0]}
    means = {"logps/chosen": [-0.5, -1.0, -1.5], "logps/rejected": [-0.125, -0.5, -1.0]}
    of_cpo = {"nll_loss": 2.0 if alpha else 0.0}
    of_dpo = ({"aux_loss": 3.0} if enabled else {}) | ({"num_tokens": 3} if mode == "train" else {})
    for base, reward, logps, more in (
        (MarginCPOTrainer, LengthNormalizedReward(), means, of_cpo),
        (MarginCPOTrainer, SummedReward(), summed, of_cpo),
        (MarginDPOTrainer, LengthNormalizedReward(), summed, of_dpo),
    ):
        own = base.__new__(base)
        own.objective, own.cpo_alpha, own.aux_loss_enabled = SimpleNamespace(reward=reward), alpha, enabled
        assert plain(own._batch_metrics(pairs, output_of(), batch, mode)) == {"own": 1.0, **logps, **more}


def looking(**given: Any) -> tuple[Any, list[Any]]:
    """A trainer that notes what it does with a batch."""
    seen: list[Any] = []
    output = output_of(**given)
    own = SimpleNamespace(
        state=SimpleNamespace(global_step=4),
        pair_logps=lambda model, batch: "pairs",
        _loss=lambda pairs, batch, training: seen.append((pairs, training)) or (9.0, output),
        _batch_metrics=lambda pairs, output, batch, train_eval: {"a": train_eval},
        _observed=lambda output, taken: {"b": [*taken]},
        _finite=SimpleNamespace(see=lambda *what: seen.append(("finite", *what))),
        _pair_log=SimpleNamespace(add=lambda step, values: seen.append(("log", step, values))),
        _pair_values=lambda output, observed: [*observed],
    )
    return own, seen


def test_a_batch_of_training():
    own, seen = looking()
    loss, metrics = MarginMixin.pair_loss(own, "model", "batch")
    assert (loss, metrics) == (9.0, {"a": "train", "b": ["a"]})
    output = seen[1][3]
    assert seen == [("pairs", True), ("finite", "batch", "pairs", output, 9.0), ("log", 5, ["b"])]
    own, seen = looking(gradient_scale=None)  # measured without a gradient
    MarginMixin.pair_loss(own, "model", "batch")
    assert len(seen) == 2
    own, seen = looking()
    own._pair_log = None
    MarginMixin.pair_loss(own, "model", "batch")
    assert len(seen) == 2


@pytest.mark.parametrize(("sizes", "n", "kept"), [(None, 3, 3), ([3, 2], 2, 2), ([3, 0], 0, 1)])
def test_a_batch_of_evaluation(sizes, n, kept, monkeypatch):
    """Pairs that repeat others are remembered, for accelerate to leave them out, and count nowhere else."""
    monkeypatch.setattr(mixin, "without_neighbours", lambda trainer, batch, pairs: pairs)
    monkeypatch.setattr(mixin, "counted_pairs", lambda accelerator, n_pairs: sizes)
    pairs = PairLogps(-CHOSEN, -REJECTED, ONES, ONES, sft_loss=torch.tensor(2.0))
    seen: list[Any] = []

    def loss_of(some, batch, training, evaluation, sizes):
        seen.append((some.chosen.tolist(), float(some.sft_loss), training, evaluation, sizes))
        assert {name: len(values) for name, values in batch[CARRIED].items()} == dict.fromkeys(COLUMNS, kept)
        return 9.0, "output"

    own = SimpleNamespace(
        accelerator=SimpleNamespace(process_index=1),
        pair_logps=lambda model, batch: pairs,
        _loss=loss_of,
        _batch_metrics=lambda some, output, batch, train_eval: {"a": some.chosen, "b": some.sft_loss},
        _remember=lambda *what: seen.append(what),
        same_completions=lambda batch: "same",
    )
    own._evaluated_loss = partial(MarginMixin._evaluated_loss, own)
    loss, metrics = MarginMixin.pair_loss(own, "model", {CARRIED: COLUMNS}, "eval")
    assert loss == 9.0
    assert plain(metrics) == {"eval_a": (-CHOSEN).tolist()[:n], "eval_b": 2.0}
    assert seen == [((-CHOSEN).tolist()[:kept], 2.0, False, True, sizes), (pairs, COLUMNS, 9.0, "same")]


def test_what_a_set_is_measured_by():
    """Means per token, whatever the reward; the same completion twice is a tie."""
    own = SimpleNamespace(_evaluated=[], accelerator=SimpleNamespace(gather_for_metrics=lambda rows: rows))
    pairs = PairLogps(-CHOSEN, -REJECTED, torch.tensor([1, 2, 2]), torch.tensor([1, 2, 4]))
    same = torch.tensor([False, False, True])
    for columns, scores in ((COLUMNS, [[5.0, 3.0], [2.0, 2.0], [1.0, 4.0]]), ({}, [[], [], []])):
        MarginMixin._remember(own, pairs, columns, torch.tensor(0.25), same)
        rows = [[0.25, -1.0, -0.5], [0.25, -1.0, -1.0], [0.25, -1.5, -1.5]]
        assert own._evaluated.pop().tolist() == [row + of_row for row, of_row in zip(rows, scores, strict=True)]


def test_pairs_that_are_no_numbers_are_left_out_of_the_ranking(caplog):
    own = SimpleNamespace(_score_columns=lambda dataset: None, options=SimpleNamespace(eval_min_score_gap=1.0))
    values = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [math.nan, -1.0], [-1.0, -math.inf], [-1.0, -3.0]])
    found = MarginMixin._ranking(own, values, [])
    assert found["pwa_all"] == pytest.approx(2 / 3)
    assert found["n_pairs"] == 3
    said = "2 of 5 pairs are left out of the evaluation: their log-probabilities are NaN or infinite"
    assert caplog.messages == [said]
    MarginMixin._ranking(own, values[:2], [])
    assert caplog.messages == [said]


class Loop:
    """TRL's evaluation."""

    def evaluation_loop(self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix):
        self._evaluated += self.rows
        return SimpleNamespace(metrics={f"{metric_key_prefix}_loss": 7.0})


class Evaluating(MarginMixin, Loop):
    def __init__(self, rows, **options):
        self.rows, self._evaluated, self.checked = rows, [torch.ones(9, 9)], 0  # what an earlier one left
        self.options = SimpleNamespace(eval_min_score_gap=1.0, **options)
        self.args, self._settings_read, self.model, self.compute_metrics = None, {}, torch.nn.Linear(1, 1), None
        self._finite = SimpleNamespace(check_weights=lambda: setattr(self, "checked", self.checked + 1))
        self._buffers = {}

    def _score_columns(self, dataset):
        return None

    def _without_clear_pairs(self, prefix, ranking):
        self.ranking = prefix, ranking["n_pairs"]


Evaluating.__abstractmethods__ = frozenset()
RANKED = torch.tensor([[0.5, -1.0, -2.0], [1.5, -2.0, -1.0], [4.0, -1.0, -3.0]])


@pytest.mark.parametrize(
    ("losses", "filters", "loss"),
    [
        ([0.5, 1.5, 4.0], True, 2.0),
        ([0.5, math.nan, 1.5], True, 1.0),
        ([0.5, math.nan, 1.5], False, math.nan),
        ([math.inf] * 3, True, math.inf),
    ],
)
def test_an_evaluation_ranks_the_whole_set(losses, filters, loss, caplog):
    """Its loss is the pairs' mean, without values that are no numbers; the batches come one after the other."""
    values = torch.cat([torch.tensor(losses)[:, None], RANKED[:, 1:]], dim=1)
    trainer = Evaluating([values[:2], values[2:]], filters_evaluation=filters)
    metrics = trainer.evaluation_loop(SimpleNamespace(dataset=[]), "", metric_key_prefix="mine").metrics
    assert metrics["mine_loss"] == pytest.approx(loss, nan_ok=True)
    assert metrics["mine_pwa_all"] == pytest.approx(2 / 3)
    assert trainer.ranking == ("mine", metrics["mine_n_pairs"]) == ("mine", 3)
    assert (trainer._evaluated, trainer.checked) == ([], 1)
    assert not caplog.messages


def test_what_an_evaluation_cannot_say_is_said(caplog):
    scored = torch.cat([RANKED, torch.tensor([[3.0, 3.0]]).expand(3, 2)], dim=1)
    metrics = Evaluating([scored], filters_evaluation=False).evaluation_loop(SimpleNamespace(dataset=[]), "").metrics
    undefined = [message.split(" (")[0] for message in caplog.messages]
    assert undefined == [f"eval_{name} is undefined on this data set" for name in ("pwa", "spearman")]
    assert not {"eval_pwa", "eval_spearman"} & metrics.keys()
    nothing = Evaluating([], filters_evaluation=True)
    assert nothing.evaluation_loop(SimpleNamespace(dataset=[]), "").metrics == {"eval_loss": 7.0}


@pytest.mark.parametrize(
    ("columns", "training", "losses", "weights"),
    [
        (COLUMNS, True, 3, 1),
        (COLUMNS, False, 3, 1),
        ({}, False, 3, 0),  # an evaluation set without scores
    ],
)
def test_the_loss_of_an_evaluation_set_without_scores(columns, training, losses, weights):
    objective = Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 2.0, weight=ScoreGapWeight())
    own = SimpleNamespace(
        objective=objective,
        accelerator=SimpleNamespace(num_processes=1, even_batches=True, gather=lambda x: x, process_index=0),
        _extra_loss=lambda pairs: 0.5,
    )
    pairs = random_pairs(0, n=3)
    loss, output = MarginMixin._loss(own, pairs, {"pair_columns": columns}, training, not training)
    assert len(output.weights) == weights
    assert loss.item() == pytest.approx(output.losses.mean().item() + 0.5)
    assert (output.view.training, output.view.evaluation) == (training, not training)
    assert output.losses.shape == (losses,)


def test_a_training_batch_without_scores_is_an_error():
    own = SimpleNamespace(
        objective=Objective(LengthNormalizedReward(), CPO_LINKS["simpo"], 2.0, weight=ScoreGapWeight()),
        accelerator=SimpleNamespace(num_processes=1, even_batches=True, gather=lambda x: x, process_index=0),
    )
    with pytest.raises(KeyError, match="the batch has no column 'score_chosen'"):
        MarginMixin._loss(own, random_pairs(0, n=3), {}, training=True)


@pytest.mark.parametrize(
    ("share", "terms", "probes", "is_trls", "runs"),
    [
        ("never", (), [], True, True),
        ("auto", (), [], True, False),
        ("never", (1,), [], True, False),
        ("never", (), [1], True, False),
        ("never", (), [], False, False),
    ],
)
def test_where_trls_own_method_computes_the_loss(share, terms, probes, is_trls, runs):
    own = SimpleNamespace(
        objective=SimpleNamespace(terms=terms, is_trls=is_trls),
        options=SimpleNamespace(share_prompt=share),
        _probes=probes,
    )
    assert MarginMixin.runs_trl.fget(own) is runs


@pytest.mark.parametrize(
    ("fused", "plain_will_do", "logits_will", "fuses"),
    [
        (True, True, True, False),
        (True, True, False, True),
        (True, False, True, True),  # what the head alone gives is asked for
        (False, True, False, False),
        (False, False, True, False),
    ],
)
def test_where_the_head_is_trls_fused_one(fused, plain_will_do, logits_will, fuses, monkeypatch):
    monkeypatch.setattr(mixin, "logits_will_do", lambda model, labels: (model, labels) == ("model", 3) and logits_will)
    own = SimpleNamespace(_fused=fused, _plain_head_will_do=plain_will_do, model="model")
    assert MarginMixin._fuses(own, {"label": 3}) is fuses


# What a trainer is given


def named(name: str, **parts: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(**parts)


def test_a_config_of_another_method(tmp_path):
    config = MarginCPOConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="simpo", margin=["amapo", "gamma-po"])
    for trainer, has, says in ((GapPOTrainer, "weight 'score-gap'", "None"),
                               (GapAwarePOTrainer, "margin 'gap-aware'", "'amapo', 'gamma-po'")):  # fmt: skip
        method, config_class = trainer._method, trainer._config_class
        own = named(trainer.__name__, _method=method, options=config, _config_class=config_class)
        said = (
            f"{trainer.__name__} has {has}, but its MarginCPOConfig says {says}: give it a {config_class.__name__}, "
            "or take MarginCPOTrainer for other terms"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            MarginMixin._check_method(own, config)
    for own in (named("Any", _method=None), named("Any", _method=AMaPOTrainer._method, options=config)):
        MarginMixin._check_method(own, config)


def test_an_objective_is_the_whole_of_it(tmp_path, caplog):
    def check(given: Any = ("objective",), method: Any = None, **config: Any) -> None:
        own = named("MyTrainer", from_python=[*given], _method=method)
        MarginMixin._check_objective(own, MarginCPOConfig(str(tmp_path), use_cpu=True, bf16=False, **config))

    check()
    assert not caplog.messages
    check(beta=0.7, label_smoothing=0.1, loss_type="simpo")
    check(gamma_beta_ratio=0.5)
    assert caplog.messages == [
        "no effect of beta, loss_type, label_smoothing: the trainer was given an objective",
        "no effect of gamma_beta_ratio: the trainer was given an objective",
    ]
    rest = ": the objective has the weight and the margin already"
    for options, what in (
        ({"given": ("weight_term", "objective")}, "weight_term"),
        ({"weight": "score-gap", "margin": "amapo", "loss_type": "simpo"}, "weight and margin"),
        ({"method": object()}, "MyTrainer, whose objective is its method's"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'objective does not go with {what}{rest}')}$"):
            check(**options)


def test_values_that_a_term_observes():
    class Observing(ColumnWeight):
        key, value = "mine", ONES

        def observed(self, view, value):
            return {self.key: self.value}

    weight = Observing("other")
    objective = SimpleNamespace(weights=(weight,), margins=(ColumnMargin("other", "reward"),))
    own = SimpleNamespace(objective=objective, _first_observed=None, accelerator=SimpleNamespace(num_processes=1))
    output = output_of(weights={"column": ONES}, margins={"column": ONES})
    assert plain(MarginMixin._observed(own, output, ["a"])) == {"mine": [1.0] * 3}
    for value in (torch.ones(3, 1), 1.0):
        weight.value = value
        said = "term 'column' observes 'mine', which must be a tensor of shape (3,)"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            MarginMixin._observed(own, output, ["a"])
    weight.value = ONES
    for key in (
        "a",
        "loss",
        "learning_rate",
        "epoch",
        "eval_loss",
        "train_loss",
        "a,b",
        "a\nb",
        '"a"',
        " a",
        "",
        1,
        None,
    ):
        weight.key = key
        with pytest.raises(ValueError, match=f"^term 'column' observes {re.escape(repr(key))}: take a name that"):
            MarginMixin._observed(own, output, ["a"])
    weight.key, weight.value = "mine", ONES
    own.objective.margins = (weight,)
    with pytest.raises(ValueError, match="observes 'mine'"):  # twice
        MarginMixin._observed(own, output, [])


def test_a_term_observes_the_same_names_every_time():
    class Observing(ColumnWeight):
        keys = ("a", "b")

        def observed(self, view, value):
            return dict.fromkeys(self.keys, ONES)

    weight = Observing("other")
    objective = SimpleNamespace(weights=(weight,), margins=())
    own = SimpleNamespace(objective=objective, _first_observed=["a", "b"])
    output = output_of(weights={"column": ONES}, margins={})
    assert [*MarginMixin._observed(own, output, [])] == ["a", "b"]
    weight.keys = ("a", "b", "c")
    said = "observed() of the terms gives ['a', 'b', 'c'], and gave ['a', 'b'] before: return the same names"
    with pytest.raises(ValueError, match=re.escape(said)):
        MarginMixin._observed(own, output, [])


def test_options_that_a_reward_does_not_read():
    """Each with the value that switches it off, and only where it does."""
    off = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "precompute_ref_log_probs": False}
    plain = {**off, "sync_ref_model": False}
    why = {
        "log-ratio": "",
        "mean-log-ratio": "does not read it",
        "length-normalized": "has no reference model and whole completions",
    }
    on = {"f_divergence_type": "js_divergence", "ld_alpha": 0.5}
    on |= {"precompute_ref_log_probs": True, "sync_ref_model": True}
    for reward, reason in why.items():
        objective = SimpleNamespace(reward=SimpleNamespace(name=reward), needs_reference="ratio" in reward)
        check_unread_options(SimpleNamespace(**plain), objective)
        for name, value in on.items():
            config = SimpleNamespace(**{**plain, name: value})
            if reward == "log-ratio" or (reward == "mean-log-ratio" and "ref" in name):
                check_unread_options(config, objective)
                continue
            said = f"{name}={value!r} does not go with reward={reward!r}, which {reason}: set it to {plain[name]!r},"
            with pytest.raises(ValueError, match=f"^{re.escape(said)} or use reward='log-ratio'$"):
                check_unread_options(config, objective)


@pytest.mark.parametrize("n_gpu", [1, 2])
@pytest.mark.parametrize("reason", [None, "an adapter on the LM head"])
def test_where_the_head_is_fused(n_gpu, reason, monkeypatch, caplog):
    monkeypatch.setattr(cpo, "why_not_fused", lambda model: reason)
    trainer = SimpleNamespace(model=None, args=SimpleNamespace(n_gpu=n_gpu))
    with caplog.at_level("INFO", "trl_margins"):
        assert MarginCPOTrainer._can_fuse(trainer) == (n_gpu == 1 and reason is None)
    several = "nn.DataParallel, whose replicas do not carry the fused head; accelerate launch does better"
    said = reason or (several if n_gpu == 2 else None)
    assert caplog.messages == ([] if said is None else [f"log-probabilities come from the whole logits: {said}"])


def test_the_fused_head_gives_what_is_logged(tiny_model, tokenizer, tmp_path):
    model = load(tiny_model)
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path)))
    MarginCPOTrainer(model, config, train_dataset=preference_rows(2), processing_class=tokenizer)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 8, 9]])
    found = fused_token_logps(model, {"input_ids": ids}, ids)
    expected = logits_token_logps(model, {"input_ids": ids}, ids)
    torch.testing.assert_close(found.logps, expected.logps)
    torch.testing.assert_close(found.mean_logit, expected.mean_logit)
