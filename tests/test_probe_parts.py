"""The parts of a probe without a training: groups, directions, scopes, subsets, and what each of them refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from trl_margins.links import CPO_LINKS, DPO_LINKS
from trl_margins.objective import Objective
from trl_margins.pairs import CACHED, PairLogps
from trl_margins.probes import anchor as anchor_module
from trl_margins.probes import pair_gradients as pair_gradients_module
from trl_margins.probes import perturbation, window_probes
from trl_margins.probes.anchor import GeometricAnchor, OneByOne, check_estimator, in_groups
from trl_margins.probes.diagnostics import anchor_gap, check_diagnostics
from trl_margins.probes.direction import Direction, gradient_direction, momentum_direction, total_norm
from trl_margins.probes.pair_gradients import CachedGradients, GradientNorms, _joined, pair_gradients
from trl_margins.probes.perturbation import cannot_displace, cast_by_autocast, fused_head_moves, perturbed
from trl_margins.probes.probe import _without_reentry
from trl_margins.probes.scope import check_one_choice, parameters_in_scope, train_only
from trl_margins.probes.selection import dataset_anchor_gaps, subsets
from trl_margins.rewards import LengthNormalizedReward, SummedReward
from trl_margins.terms.anchor import AnchorMargin, GradientNormMargin
from trl_margins.terms.score_gap import ScoreGapWeight
from trl_margins.trainers.window import WindowMixin

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
MEAN, ANCHOR = LengthNormalizedReward(), AnchorMargin(2.0)


def llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=16, **options))


def options_of(**given: Any) -> Any:
    plain = {"anchor_estimator": "difference", "anchor_diagnostics": 0, "log_pairs": True, "sam_radius": 0.0}
    return SimpleNamespace(**{**plain, **given})


def simpo(margin: Any = ANCHOR, reward: Any = MEAN, link: Any = CPO_LINKS["simpo"], **terms: Any) -> Objective:
    return Objective(reward, link, 2.0, margin=margin, **terms)


# What is refused, word for word


def optimizer_of(state: dict[str, Any], known: bool = True, **defaults: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    weight = nn.Parameter(torch.ones(2))
    groups = [{"params": [weight] if known else []}]
    return SimpleNamespace(defaults=defaults, param_groups=groups, state={weight: state}), {"w": weight}


class Frozen(nn.Linear):
    def forward(self, x: Any) -> Any:
        return x


def wrapped(model: nn.Module) -> nn.Module:
    model.model.embed_tokens.forward = lambda ids: None
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two choices": (
        lambda: check_one_choice(["mlp"], True),
        "train_only and peft_config both choose what trains: give one of them",
    ),
    "adapters": (
        lambda: train_only(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])), ["mlp"]),
        "train_only and the model's adapters both choose what trains: leave train_only out, or merge the adapters "
        "first (model.merge_and_unload())",
    ),
    "a pattern of nothing": (
        lambda: train_only(llama(), ["mlp", "adapter"]),
        "train_only pattern 'adapter' matches none of the 12 parameters; their names look like "
        "model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight, "
        "lm_head.weight",
    ),
    "a scope of nothing": (
        lambda: parameters_in_scope(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False), ["weight"]),
        "anchor_scope=['weight'] holds none of the 0 tensors that train: ",
    ),
    "no optimizer": (
        lambda: momentum_direction(None, {}),
        "anchor_direction='momentum' reads a training's optimizer: use anchor_direction='gradient'",
    ),
    "no momentum": (
        lambda: momentum_direction(*optimizer_of({}, momentum=0, betas=None)),
        "anchor_direction='momentum' needs an optimizer with a momentum, and SimpleNamespace has none here: use "
        "adamw_torch, give it one with optim_args, or use anchor_direction='gradient'",
    ),
    "parameters of its own": (
        lambda: momentum_direction(*optimizer_of({}, known=False, momentum=0.9)),
        "anchor_direction='momentum' finds none of the model's parameters in SimpleNamespace, which keeps them in "
        "parts of its own (ZeRO-2 does): use anchor_direction='gradient', or ZeRO-3",
    ),
    "another momentum": (
        lambda: momentum_direction(*optimizer_of({"exp_avg": torch.ones(3), "step": 1}, beta1=0.9)),
        "anchor_direction='momentum' reads exp_avg or momentum_buffer from the optimizer's state; SimpleNamespace "
        "keeps exp_avg, step for w. Use an optimizer with a plain momentum (adamw_torch), or "
        "anchor_direction='gradient'",
    ),
    "diagnostics of nothing": (
        lambda: check_diagnostics(simpo(None, weight=ScoreGapWeight()), options_of(anchor_diagnostics=5)),
        "anchor_diagnostics=5 takes anchor gaps apart, and none is measured (score-gap): leave it out, or set margin "
        "to 'geometric-anchor'",
    ),
    "diagnostics without a term": (
        lambda: check_diagnostics(simpo(None), options_of(anchor_diagnostics=5)),
        "anchor_diagnostics=5 takes anchor gaps apart, and none is measured (no term): leave it out, or set margin "
        "to 'geometric-anchor'",
    ),
    "diagnostics of a norm": (
        lambda: check_diagnostics(simpo(GradientNormMargin(2.0)), options_of(anchor_diagnostics=5)),
        "anchor_diagnostics=5 takes anchor gaps apart, and none is measured (gradient-norm): leave it out, or set "
        "margin to 'geometric-anchor'",
    ),
    "diagnostics without lines": (
        lambda: check_diagnostics(simpo(), options_of(anchor_diagnostics=5, log_pairs=False)),
        "anchor_diagnostics=5 writes a line for each pair, and log_pairs is off: turn log_pairs on, or leave "
        "anchor_diagnostics out",
    ),
    "SAM beside cached gradients": (
        lambda: check_estimator(simpo(), options_of(anchor_estimator="per-pair", sam_radius=0.1)),
        "anchor_estimator='per-pair' makes the update at the policy, and sam_radius makes it elsewhere: set only one "
        "of them",
    ),
    "a set under ZeRO-3": (
        lambda: dataset_anchor_gaps(
            SimpleNamespace(
                accelerator=SimpleNamespace(
                    distributed_type="DEEPSPEED",
                    state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config={})),
                )
            )
        ),
        "DeepSpeed's ZeRO-3 holds a model for its training alone: rank pairs with DDP or one process",
    ),
    "a name of nothing": (
        lambda: perturbed(nn.Linear(2, 3), {"scale": torch.ones(2)}, 0.1).__enter__(),
        "direction names 'scale', which is not a parameter of the model",
    ),
    "another shape": (
        lambda: perturbed(nn.Linear(2, 3), {"weight": torch.ones(2, 3)}, 0.1).__enter__(),
        "direction of 'weight' has shape (2, 3), the parameter (3, 2)",
    ),
    "no pair": (
        lambda: subsets(np.zeros(9), 0.05),
        "fraction must be in (0, 1] and leave a row of 9, not 0.05",
    ),
    "more than all": (lambda: subsets(np.zeros(9), 1.01), "fraction must be in (0, 1] and leave a row of 9, not 1.01"),
    "less than none": (
        lambda: subsets(np.zeros(9), -0.5),
        "fraction must be in (0, 1] and leave a row of 9, not -0.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    run, said = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        run()


@pytest.mark.parametrize(
    "given",
    [
        {"objective": simpo(reward=LengthNormalizedReward(alpha=0.1))},
        {"objective": simpo(reward=SummedReward())},
        {"objective": simpo(link={CPO_LINKS["simpo"]: 1.0, DPO_LINKS["sft"]: 1.0})},
        {"options": {"cpo_alpha": 0.5}},
        {"has_aux_loss": True},
    ],
)
def test_cached_gradients_make_an_update_of_the_gap_alone(given):
    objective, aux = given.get("objective", simpo()), given.get("has_aux_loss", False)
    options = options_of(anchor_estimator="per-pair", **given.get("options", {}))
    with pytest.raises(ValueError, match=r"takes a loss of the reward gap .* without cpo_alpha, alpha and auxiliary"):
        check_estimator(objective, options, aux)
    check_estimator(simpo(), options_of(anchor_estimator="per-pair", cpo_alpha=0.0))
    check_estimator(objective, options_of(sam_radius=0.1), aux)  # another estimator
    check_estimator(simpo(None), options_of(anchor_estimator="per-pair", sam_radius=0.1))  # which measures none


def test_a_term_that_asks_for_something_else():
    class Asking(AnchorMargin):
        probes = ("heat", "anchor_gap", "cold")

    with pytest.raises(ValueError, match=r"'geometric-anchor' asks for cold, heat, which no probe measures; known: "):
        window_probes(SimpleNamespace(), simpo(Asking(2.0)), options_of())
    assert window_probes(SimpleNamespace(), simpo(None), options_of()) == []


def anchor_of(mixed_precision: str = "no", fsdp2: bool = False, zero3: bool = False, **given: Any) -> GeometricAnchor:
    """A probe of a model that is going to be sharded, or not."""
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={}) if zero3 else None
    accelerator = SimpleNamespace(
        mixed_precision=mixed_precision,
        is_fsdp2=fsdp2,
        distributed_type="DEEPSPEED" if zero3 else "NO",
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir="out"),
        model=llama(),
        objective=simpo(),
        accelerator=accelerator,
        has_aux_loss=False,
    )
    plain = {"anchor_scope": None, "anchor_radius": 0.05, "anchor_batch_multiplier": 4, "anchor_direction": "gradient"}
    return GeometricAnchor(trainer, options_of(**{**plain, **given}))


SHARDED = [
    (
        {"anchor_estimator": "per-pair"},
        "anchor_estimator='per-pair' takes every pair's own gradient, and {} gives",
    ),
    (
        {"anchor_estimator": "float32"},
        "anchor_estimator='float32' computes in float32 with weights of its own, and {} casts the weights itself: use",
    ),
    (
        {"mixed_precision": "fp16"},
        "on sharded parameters ({}) anchor gaps are not measured in float16, whose",
    ),
]


@pytest.mark.parametrize(("given", "said"), SHARDED)
def test_what_sharding_does_not_allow(given, said):
    anchor_of(**given)
    for kind, name in (("fsdp2", "FSDP2"), ("zero3", "ZeRO-3")):
        anchor_of(**{kind: True, "mixed_precision": "bf16"})
        with pytest.raises(ValueError, match=f"^{re.escape(said.format(name))}"):
            anchor_of(**{kind: True}, **given)


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        ("gradient", "the gradient over each group of 4 mini-batches"),
        ("momentum", "the optimizer's momentum"),
        ("pair", "each pair's own gradient"),
    ],
)
def test_an_anchor_says_what_it_is(direction, said, caplog):
    caplog.set_level("INFO", "trl_margins")
    model = llama()
    all_of_it = sum(parameter.numel() for parameter in model.parameters())
    anchor = anchor_of(anchor_direction=direction)
    anchor_of(anchor_direction=direction, anchor_scope=["lm-head"], anchor_estimator="per-pair")
    assert caplog.messages == [
        f"anchor: radius 0.05 over {all_of_it} parameters (scope all that trains), direction from {said}, gaps by "
        "difference",
        f"anchor: radius 0.05 over 256 parameters (scope ['lm-head']), direction from {said}, gaps by per-pair",
    ]
    assert anchor.log is None
    assert anchor_of(anchor_diagnostics=2).log is not None


@pytest.mark.parametrize(
    ("estimator", "narrow", "reason", "upcasts"),
    [
        ("float32", None, "tied", True),
        ("float32", torch.bfloat16, "tied", True),
        ("difference", None, "tied", False),
        ("difference", torch.bfloat16, None, False),
        ("difference", torch.float16, "tied", True),
    ],
)
def test_a_measurement_that_upcasts_unasked_says_why(estimator, narrow, reason, upcasts, monkeypatch, caplog):
    monkeypatch.setattr(anchor_module, "cannot_displace", lambda model, parameters: reason)
    anchor = anchor_of(anchor_estimator=estimator)
    anchor.narrow_dtype = narrow
    assert [anchor._upcasts, anchor._upcasts] == [upcasts] * 2
    slower = ["anchor gaps are measured in float32, which is slower: tied"]
    assert caplog.messages == slower * (upcasts and estimator == "difference")


@pytest.mark.parametrize(
    ("n", "keeps", "is_last", "reduces", "kept", "wrapped"),
    [
        (3, False, True, False, [], []),
        (3, True, False, False, [0, 1, 2], []),
        (3, True, True, False, [0, 1, 2], [2]),
        (3, True, False, True, [0, 1, 2], []),
        (3, True, True, True, [0, 1], []),  # DDP reduces the last one's way back, and no other may come before it
        (1, True, True, True, [0], [0]),
        (1, True, False, True, [0], []),
    ],
)
def test_which_forward_passes_serve_the_update(n, keeps, is_last, reduces, kept, wrapped):
    """And the last of the window goes through the model's wrapper."""
    anchor = anchor_of()
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    anchor.parameters, seen, metrics = {"w": weight}, [], []
    trainer = anchor.trainer
    trainer.model, trainer.model_wrapped, trainer.reduces_in_backward = nn.ParameterList([weight]), "wrapper", reduces
    trainer.accelerator.scaler, trainer.accelerator.num_processes = None, 1
    trainer.accelerator.device, trainer.accelerator.reduce = torch.device("cpu"), lambda value, how: value
    trainer.score_gap = lambda pairs: pairs
    trainer.store_metrics = metrics.append

    def forward_pairs(batch, model=None):
        seen.append((batch["i"], model))
        return (weight * torch.tensor([1.0, 2.0])).sum()[None]

    trainer.forward_pairs = forward_pairs
    group = [{"i": i} for i in range(n)]
    direction, ready = anchor._direction(group, keeps, is_last)
    assert [batch["i"] for batch in ready] == list(range(n))
    assert [batch["i"] for batch in ready if CACHED in batch] == kept
    assert seen == [(i, "wrapper" if i in wrapped else None) for i in range(n)]
    assert direction.vectors["w"].tolist() == [float(n), 2.0 * n]
    assert weight.grad is None
    (logged,) = metrics
    assert logged["anchor/gradient_norm"].item() == pytest.approx(math.sqrt(5))
    assert logged["anchor/no_direction"].item() == 0.0


@pytest.mark.parametrize(
    ("given", "waits"),
    [
        ({}, True),
        ({"n_gpu": 2}, False),
        ({"torch_compile": True}, False),
        ({"checkpoints_reentrantly": True}, False),
        ({"distributed_type": "FSDP"}, False),
        ({"distributed_type": "FSDP", "reduces_in_backward": True}, True),
    ],
)
def test_graphs_that_survive_a_look(given, waits, one_process):
    plain = {"distributed_type": "NO", "checkpoints_reentrantly": False, "reduces_in_backward": False}
    found = {"n_gpu": 1, "torch_compile": False, **plain, **given}
    trainer = SimpleNamespace(model=nn.Linear(2, 2), args=SimpleNamespace(**found), **found)
    trainer.accelerator = SimpleNamespace(**found)
    assert WindowMixin.graphs_can_wait.fget(trainer) == waits
    trainer.model = fully_shard(nn.Linear(2, 2), mesh=one_process)
    assert not WindowMixin.graphs_can_wait.fget(trainer)


def test_a_pass_that_fails_shards_everything_again(monkeypatch):
    asked = []
    monkeypatch.setattr(perturbation, "reshard", lambda model, after_error=False: asked.append(after_error))
    model = nn.Linear(2, 2)
    for error in (False, True):
        asked.clear()
        with suppress(KeyError), perturbed(model, {"bias": torch.ones(2)}, 0.1):
            asked.append("there")
            if error:
                raise KeyError
        assert asked == [False, False, "there", error]


def test_autocast_keeps_no_copy_of_other_weights():
    """Before, within and after the block the product is that of the weights which are there."""
    model, x, along = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 8.0]])
    model.weight.data = torch.tensor([[0.5, 0.25]])
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with perturbed(model, {"weight": along}, 0.5):
            within = model(x)
        assert (before.item(), within.item(), model(x).item()) == (1.0, 11.0, 1.0)


# Scopes


def test_what_trains_is_counted(caplog):
    model = llama()
    with caplog.at_level("INFO", "trl_margins"):
        train_only(model, ["mlp", "lm_head"])
    trained, total = 3 * 64 + 32 * 8, sum(parameter.numel() for parameter in model.parameters())
    assert caplog.messages == [
        f"train_only=['mlp', 'lm_head']: {trained} of {total} parameters train ({100 * trained / total:.1f} %), in 4 "
        "of 12 tensors"
    ]


def test_a_scope_is_of_what_trains():
    model = llama(tie_word_embeddings=True)
    every = dict(model.named_parameters())
    assert parameters_in_scope(model, None) == every
    assert list(parameters_in_scope(model, ["lm-head"])) == ["model.embed_tokens.weight"]  # a tied one's name
    assert sorted(parameters_in_scope(model, ["lm-head", r"\.norm\."])) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    model.model.norm.requires_grad_(False)
    assert list(parameters_in_scope(model, ["lm-head", r"\.norm\."])) == ["model.embed_tokens.weight"]
    assert "model.norm.weight" not in parameters_in_scope(model, None)


def test_reentrant_checkpointing_becomes_the_other_kind(caplog):
    config = SimpleNamespace(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True, "a": 1}
    )
    _without_reentry(config)
    said = "use_reentrant=True cannot give single gradients: using use_reentrant=False instead"
    assert caplog.messages == [said]
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False, "a": 1}
    assert config.activation_checkpointing_kwargs == {"use_reentrant": False, "a": 1}
    for kwargs in (None, {"use_reentrant": False}):
        other = SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        _without_reentry(other)
        assert other.gradient_checkpointing_kwargs is kwargs
    assert caplog.messages == [said]


# Groups


@pytest.mark.parametrize(
    ("n", "k", "groups"),
    [
        (0, 2, []),
        (1, 2, [[0]]),
        (2, 2, [[0, 1]]),
        (3, 2, [[0, 1, 2]]),
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1], [2, 3, 4]]),
        (3, 1, [[0], [1], [2]]),
        (7, 3, [[0, 1, 2], [3, 4, 5, 6]]),
    ],
)
def test_a_rest_joins_the_last_group(n, k, groups):
    assert list(in_groups(range(n), k)) == groups


def test_mini_batches_that_are_made_when_asked_for():
    made = []
    window = OneByOne((made.append(i) or {"i": i} for i in range(3)), 3)
    assert (len(window), made) == (3, [])
    assert next(iter(window)) == {"i": 0}
    assert [batch["i"] for batch in window] == [1, 2]


# Directions


def test_a_unit_vector_or_none():
    vectors = {"b": torch.tensor([3.0]), "a": torch.tensor([[4.0]])}
    for sign in (1, -1):
        direction = Direction.along(vectors, sign)
        assert direction.norm.item() == 5.0
        assert direction.per_unit.item() == pytest.approx(sign / 5)
    assert Direction.along(vectors).per_unit.item() == pytest.approx(1 / 5)
    for value in (0.0, math.inf, math.nan):
        assert Direction.along({"a": torch.tensor([value])}).per_unit.item() == 0.0
    assert total_norm([torch.tensor([3.0, 4.0]).double()]).dtype == torch.float64


def test_an_overflow_in_fp16_is_no_gradient():
    for scaler, kept in ((None, True), (object(), False)):
        gradient = {"a": torch.tensor([1.0, math.inf]), "b": torch.tensor([2.0])}
        direction = gradient_direction(SimpleNamespace(scaler=scaler), gradient)
        assert direction.per_unit.item() == 0.0
        assert gradient["b"].tolist() == [2.0 if kept else 0.0]
    finite = {"a": torch.tensor([3.0, 4.0])}
    assert gradient_direction(SimpleNamespace(scaler=object()), finite).norm.item() == 5.0
    assert finite["a"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("setting", ["betas", "momentum", "beta1"])
@pytest.mark.parametrize("key", ["exp_avg", "momentum_buffer"])
def test_momenta_point_the_other_way(setting, key):
    value = torch.tensor([3.0, -4.0])
    optimizer, parameters = optimizer_of({"step": torch.ones(2), key: value}, **{setting: 0.9})
    for wrapper in (optimizer, SimpleNamespace(optimizer=optimizer)):
        direction = momentum_direction(wrapper, parameters)
        assert direction.vectors["w"] is value
        assert direction.per_unit.item() == pytest.approx(-1 / 5)
    unknown, parameters = optimizer_of({key: value})
    assert momentum_direction(unknown, parameters).norm.item() == 5.0  # one that says nothing of itself
    fresh, parameters = optimizer_of({}, momentum=0.9)
    assert momentum_direction(fresh, parameters) is None


# Gradients of pairs


def test_what_cached_gradients_give():
    gradients = {"a": torch.tensor([[[3.0]], [[1.0]]]), "b": torch.tensor([[4.0, 0.0], [0.0, 2.0]])}
    length = torch.tensor([2, 0])
    pairs = PairLogps(torch.zeros(2), torch.zeros(2), length, length)
    cached = CachedGradients(pairs, torch.tensor([0.5, -0.5]), gradients)
    assert cached.norms(["a", "b"]).tolist() == pytest.approx([5.0, math.sqrt(5)])
    assert cached.norms(["a"]).tolist() == [3.0, 1.0]
    assert cached.summed(["b"])["b"].tolist() == [4.0, 2.0]
    assert cached.along({"a": torch.tensor([[2.0]]), "b": torch.tensor([1.0, -1.0])}).tolist() == [10.0, 0.0]
    parameters = {"a": nn.Parameter(torch.zeros(1, 1)), "b": nn.Parameter(torch.zeros(2))}
    update = cached.for_the_update(parameters, lambda found: {name: 10 * value for name, value in found.items()})
    assert update.chosen.tolist() == [0.0, 0.0]
    (update.chosen / torch.tensor([2.0, 1.0]) @ torch.tensor([1.0, 3.0])).backward()
    assert parameters["a"].grad.tolist() == [[60.0]]
    assert parameters["b"].grad.tolist() == [40.0, 60.0]


@pytest.mark.parametrize("fp16", [False, True])
def test_a_rank_with_fewer_pairs_repeats_its_last(fp16, monkeypatch):
    """Two pairs on the second of three ranks, where the others have three: it takes part in each pass."""
    model, rows, asked = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0], [0.0, 2.0]]), []
    if fp16:
        model.half()
    trainer = SimpleNamespace(
        model=model,
        accelerator=Accelerator(cpu=True),
        n_pairs=len,
        one_pair=lambda batch, i: asked.append(i) or batch[i : i + 1],
        forward_pairs=lambda pair: PairLogps(model(pair.to(model.weight.dtype))[0], *[torch.ones(1)] * 3),
        score_gap=lambda pairs: pairs.chosen,
    )
    monkeypatch.setattr(pair_gradients_module, "is_sharded", lambda tensor: True)
    monkeypatch.setattr(pair_gradients_module, "most_pairs", lambda accelerator, n: n + 1)
    monkeypatch.setattr(pair_gradients_module, "gathered_parameters", lambda model, found: found)
    norms = SimpleNamespace(trainer=trainer, parameters={"w": model.weight})
    assert GradientNorms._norms_of_gathered(norms, rows).tolist() == pytest.approx([5.0, 2.0])
    assert asked == [0, 1, 1]
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    monkeypatch.setattr(Accelerator, "process_index", 1)
    found = list(pair_gradients(trainer, rows, {"w": model.weight}))
    assert [each.batch.tolist() for each in found] == [[row] for i in (0, 1, 1) for row in [rows[i].tolist()] * 3]
    assert [each.own for each in found] == [False, True, False] * 2 + [False] * 3
    of_rank = [each.gradient["w"][0] * each.own for each in found]  # the others' are zeros here
    assert [each.tolist() for each in of_rank] == [each.gradient["w"][0].tolist() for each in found]
    assert torch.stack(of_rank[1::3]).tolist() == [*rows.tolist(), [0.0, 0.0]]
    assert not found[0].gap.requires_grad
    assert not found[0].pairs.chosen.requires_grad


def test_single_pairs_as_one_batch():
    def one(x: float, **more: Any) -> PairLogps:
        value, length = torch.tensor([x]), torch.tensor([int(x)])
        loss = torch.tensor(x)
        return PairLogps(value, -value, length, 2 * length, sft_loss=loss, token_stats={"entropy": loss}, **more)

    joined = _joined([one(1.0), one(2.0), one(6.0)])
    assert joined.chosen.tolist() == [1.0, 2.0, 6.0]
    assert joined.rejected.tolist() == [-1.0, -2.0, -6.0]
    assert (joined.chosen_length.tolist(), joined.rejected_length.tolist()) == ([1, 2, 6], [2, 4, 12])
    assert joined.sft_loss.item() == joined.token_stats["entropy"].item() == 3.0
    assert joined.ref_chosen is None
    assert _joined([one(1.0, ref_chosen=torch.ones(1))] * 2).ref_chosen.tolist() == [1.0, 1.0]


def test_both_measurements_give_one_gap():
    trainer = SimpleNamespace(forward_pairs=lambda batch: 5.0, score_gap=lambda pairs: torch.tensor([pairs, 2.0]))
    for columns, gap in (
        ({"anchor_score_gap": torch.tensor([1.0, 4.0])}, [4.0, -2.0]),
        ({"anchor_gap": torch.tensor([1.0, 4.0]), "anchor_score_gap": torch.zeros(2)}, [1.0, 4.0]),
    ):
        assert anchor_gap(trainer, {"pair_columns": columns}).tolist() == gap
    half = {"anchor_gap": torch.tensor([1.0], dtype=torch.float16)}
    assert anchor_gap(trainer, {"pair_columns": half}).dtype == torch.float32


# Steps beside the weights


def test_what_a_step_beside_the_weights_cannot_do():
    model = llama()
    names = [name for name, _ in model.named_parameters()]
    assert cannot_displace(model, names) is None
    assert cannot_displace(wrapped(llama()), names) == (
        "the forward pass of model.embed_tokens.weight's Embedding is wrapped (several devices, offloading)"
    )
    model.model.layers[0].mlp.up_proj = Frozen(8, 8, bias=False)
    name = "model.layers.0.mlp.up_proj.weight"
    assert cannot_displace(model, [name]) == f"{name} is a matrix of Frozen, neither a linear layer nor an embedding"
    assert cannot_displace(model, ["model.norm.weight"]) is None


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_16_bits_and_its_factor(given, dtype):
    """In float16 what is larger than its largest number fits, too."""
    along = torch.tensor([0.5, -3.0 if given == torch.float16 else -3e6], dtype=given)
    narrow, factor = perturbation._narrow(along, 0.25, dtype)
    assert narrow.dtype == dtype
    scaled = given == torch.float32 and dtype == torch.float16
    assert narrow.tolist() == pytest.approx([0.5 / 3e6, -1.0] if scaled else along.tolist(), rel=0.01, abs=1e-7)
    assert float(factor) == (0.25 * 3e6 if scaled else 0.25)


def test_what_autocast_casts():
    model = llama(attention_bias=True)
    multiplied = {name for name, parameter in model.named_parameters() if "proj" in name or "lm_head" in name}
    assert cast_by_autocast(model, dict(model.named_parameters())) == multiplied
    assert cast_by_autocast(model, ["model.norm.weight", "model.embed_tokens.weight"]) == set()


def test_steps_that_the_fused_head_sees(monkeypatch):
    model = llama()
    assert fused_head_moves(model, ["model.norm.weight"])
    assert fused_head_moves(model, ["model.norm.weight", "lm_head.weight"])
    model.lm_head = nn.Linear(8, 32, bias=True)
    assert fused_head_moves(model, ["lm_head.weight"])
    assert not fused_head_moves(model, ["lm_head.weight", "lm_head.bias"])
    assert not fused_head_moves(model, ["lm_head.bias"])
    model.lm_head = Frozen(8, 32, bias=False)
    assert not fused_head_moves(model, ["lm_head.weight"])
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert fused_head_moves(model, ["lm_head.weight"])


# Subsets


def test_subsets_of_a_set():
    gaps = np.array([5.0, 1.0, 4.0, 1.0, 3.0, 2.0])
    found = subsets(gaps, 0.5)
    assert found["stable"].tolist() == [1, 3, 5]
    assert found["unstable"].tolist() == [0, 2, 4]
    assert sorted(found["random"]) == found["random"].tolist()
    assert len(set(found["random"])) == 3
    assert all(rows.tolist() == list(range(6)) for rows in subsets(gaps, 1).values())
    (one,) = subsets(gaps, 1 / 6)["stable"]
    assert one == 1  # of equal gaps the first
    many = np.arange(100.0)
    for seed in (0, 7):
        small, large = (set(subsets(many, share, seed)["random"]) for share in (0.1, 0.3))
        assert small < large
    assert set(subsets(many, 0.1, 0)["random"]) != set(subsets(many, 0.1, 7)["random"])
    assert set(subsets(many, 0.1)["random"]) == set(subsets(many, 0.1, 0)["random"])
    assert subsets(many, 0.1)["random"].tolist() == sorted(np.random.default_rng([0, 1]).permutation(100)[:10])
