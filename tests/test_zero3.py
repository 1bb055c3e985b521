"""GAPO under DeepSpeed ZeRO-3, in float32 and bf16: its gradients and steps are those of plain PyTorch, and the
training goes on as if they had not been."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import VOCABULARY, byte_tokenizer, load, preference_rows, quiet, saved
from peft import LoraConfig
from processes import output_of
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from trl_margins import GeometricAnchorPOConfig, GeometricAnchorPOTrainer
from trl_margins.zero3 import (
    PartitionedSum,
    check_parameters,
    check_settings,
    is_partitioned,
    n_elements,
    optimizer_state,
    part,
    part_index,
    release,
    zero3_settings,
)

SCRIPT = str(Path(__file__).with_name("zero3_ranks.py"))
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
RADIUS = 0.05  # as in the script
WINDOW = {"gradient_accumulation_steps": 4, "anchor_radius": RADIUS, "anchor_batch_multiplier": 2}
PRECISIONS = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a tied head, and norms that two ranks do not share evenly."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=15,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    if not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed")
    out = tmp_path_factory.mktemp("zero3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        output_of(2, SCRIPT, model, str(out))
    known = json.loads((out / "found.json").read_text())
    for precision in PRECISIONS:
        for file in (out / precision).glob("*.safetensors"):
            known[precision][file.stem] = load_file(file)
    return known


def gaps(model, rows):
    """Per token, by plain transformers, one completion at a time."""
    tokenizer, found = byte_tokenizer(), []
    for row in rows:
        means = []
        for side in ("chosen", "rejected"):
            prompt, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], row[side]))
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
            means.append(logps[len(prompt) - 1 :].mean())
        found.append(means[0] - means[1])
    return torch.stack(found)


def relative(tensors, others):
    """‖one − other‖ / ‖other‖ over all of them."""
    one, other = (torch.cat([each[name].double().flatten() for name in others]) for each in (tensors, others))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_training_is_that_without_a_look(precision, found):
    """Its weights, bit for bit. What DeepSpeed notes about the training is compared at each look."""
    assert found[precision]["same"]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_the_gradient_is_that_of_all_ranks_pairs(precision, tolerance, found, model):
    """Of the first group, two mini-batches of one pair on each of two ranks."""
    policy = load(model)
    gaps(policy, preference_rows(24, seed=4).select(range(4))).sum().backward()
    expected = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert relative(found[precision]["gradient"], expected) < tolerance


def test_no_rank_holds_the_whole_gradient_of_two_parameters(found):
    assert [found[precision]["alive"] for precision in PRECISIONS] == [1, 1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_step(precision, found, model):
    """Within the block the gathered weights are θ − ρ · ∇M̄/‖∇M̄‖: in bf16 one of its two neighbours, and right on
    average."""
    policy, dtype = load(model), getattr(torch, precision)
    gradient = {name: each.double() for name, each in found[precision]["gradient"].items()}
    norm = torch.cat([each.flatten() for each in gradient.values()]).norm()
    step = {name: -RADIUS * each / norm for name, each in gradient.items()}
    before = {name: parameter.detach().to(dtype).double() for name, parameter in policy.named_parameters()}
    moved = {name: each.double() - before[name] for name, each in found[precision]["there"].items()}
    if precision == "float32":
        assert relative(moved, step) < 1e-4
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(before[name] + step[name])
            expected = gaps(policy, preference_rows(24, seed=4).select(range(2)))
        torch.testing.assert_close(found[precision]["gaps"]["gaps"], expected, atol=1e-5, rtol=1e-5)
        return
    for name, each in moved.items():
        target = before[name] + step[name]
        spacing = 2.0 ** (torch.maximum(target.abs(), before[name].abs()).log2().floor() - 7)
        assert ((before[name] + each - target).abs() < spacing).all(), name
    along = sum((moved[name] * step[name]).sum() for name in step) / RADIUS**2
    assert along == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("case", ["float32", "adapters"])
def test_gapo_trains_as_in_one_process(case, found, model, tmp_path):
    """Windows of more mini-batches than make a direction: losses, gaps and weights after three of them."""
    settings = quiet(output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, warmup_steps=0, **WINDOW)
    config = GeometricAnchorPOConfig(**settings, learning_rate=1e-2, train_sampling_strategy="sequential")
    rows = preference_rows(24, seed=4)
    trainer = GeometricAnchorPOTrainer(
        load(model),
        config,
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        peft_config=LORA if case == "adapters" else None,
    )
    trainer.train()
    for mine, theirs in zip(trainer.state.log_history[:3], found[case]["log"], strict=False):
        for name in ("loss", "grad_norm", "anchor/gap/mean", "anchor/gap/std", "anchor/gradient_norm"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), name
    if case == "float32":
        mine = dict(trainer.model.named_parameters())
        assert relative(found[case]["weights"], mine) < 1e-5


SETTINGS = {
    "torch_autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast casts the weights within its own"),
    "deepcompile": ({"compile": {"deepcompile": True}}, "DeepCompile gathers the weights in compiled graphs"),
    "half a number": (
        {"zero_optimization": {"zero_hpz_partition_size": 2}},
        "zero_hpz_partition_size gathers something",
    ),
    "mics of one": ({"zero_optimization": {"mics_shard_size": 1}}, "mics_shard_size gathers something else"),
    "without": ({}, None),
    "offload": ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param keeps them on 'cpu'"),
    "quantized": ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights gathers something"),
    "secondary": ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size gathers"),
    "mics": ({"zero_optimization": {"mics_shard_size": 4}}, "mics_shard_size gathers something else: leave it out"),
    "zenflow": ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow gathers something else"),
    "by default": (
        {
            "bf16": {"enabled": "auto"},
            "torch_autocast": {"enabled": False},
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "none"},
                "offload_optimizer": {"device": "cpu"},
                "zero_quantized_weights": False,
                "zero_hpz_partition_size": 1,
                "mics_shard_size": -1,
            },
        },
        None,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    settings, said = SETTINGS[name]
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config=settings)
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        check_settings(accelerator)


def test_only_the_third_stage_has_settings_to_check():
    def of(stage, kind="DEEPSPEED"):
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={"a": 1})
        return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))

    assert zero3_settings(of(3)) == {"a": 1}
    assert zero3_settings(of(2)) is None
    assert zero3_settings(of(3, "MULTI_CPU")) is None
    nothing = SimpleNamespace(distributed_type="DEEPSPEED", state=SimpleNamespace(deepspeed_plugin=None))
    assert zero3_settings(nothing) is None
    check_settings(nothing)


def partitioned(values: torch.Tensor, padding: int = 0, **of_optimizer: Any) -> Any:
    """A parameter with what DeepSpeed leaves on it."""
    parameter = torch.nn.Parameter(values)
    parameter.ds_id, parameter.ds_numel = 0, values.numel()
    parameter.ds_tensor = torch.nn.functional.pad(values.flatten(), (0, padding))
    parameter.ds_process_group = dist.group.WORLD
    parameter._z3_optimizer = SimpleNamespace(empty_partition_cache=None, get_local_fp32_param=None, optimizer=None)
    vars(parameter._z3_optimizer).update(of_optimizer)
    return parameter


def test_the_parts_of_a_parameter(one_process):
    whole, plain = partitioned(torch.arange(6.0).view(2, 3), padding=2), torch.nn.Parameter(torch.ones(2, 5))
    assert is_partitioned(whole)
    assert not is_partitioned(plain)
    assert part(whole).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0]
    assert part_index(whole) == 0
    assert n_elements(plain) == 10
    whole.data = torch.empty(0)  # as DeepSpeed leaves it
    assert n_elements(whole) == 6


def test_what_is_gathered_is_let_go_once():
    released = []
    model = torch.nn.Module()
    release(model)
    model.first = torch.nn.Parameter(torch.ones(1))
    release(model)
    model.first._z3_optimizer = SimpleNamespace(empty_partition_cache=lambda: released.append(1))
    release(model)
    assert released == [1]


def test_what_an_unknown_deepspeed_does_not_leave():
    known = partitioned(torch.ones(2))
    model = torch.nn.Module()
    check_parameters(model, {"known": known})
    for name in ("ds_tensor", "ds_numel", "ds_process_group"):
        other = partitioned(torch.ones(2))
        delattr(other, name)
        with pytest.raises(ValueError, match=f"'other' is partitioned by a ZeRO-3 without {name}, which GAPO needs"):
            check_parameters(model, {"known": known, "other": other})
    for name in ("empty_partition_cache", "get_local_fp32_param", "optimizer"):
        other = partitioned(torch.ones(2))
        delattr(other._z3_optimizer, name)
        with pytest.raises(ValueError, match=f"'other' is partitioned by a ZeRO-3 without {name}, which GAPO needs"):
            check_parameters(model, {"known": known, "other": other})
    del other._z3_optimizer
    with pytest.raises(ValueError, match="without _z3_optimizer, empty_partition_cache, get_local_fp32_param, optim"):
        check_parameters(model, {"other": other})
    model.experts = torch.nn.Module()
    model.experts._z3_leaf = False
    check_parameters(model, {"known": known})
    model.experts._z3_leaf = True
    with pytest.raises(ValueError, match="ZeRO-3 treats 'experts' as one, and not every rank has a gradient"):
        check_parameters(model, {"known": known})


def test_a_sum_of_gradients(one_process):
    """What is added twice counts twice, padding and what no value reads are 0, and nothing is left behind."""
    first, second, unread = (torch.randn(3, 5), torch.randn(4), torch.randn(2))
    parameters = {"first": partitioned(first, 1), "second": partitioned(second), "unread": partitioned(unread)}
    total = PartitionedSum(parameters)
    value = parameters["first"].square().sum() * parameters["second"].sum()
    total.add(value, retain_graph=True)
    total.add(value, retain_graph=True)
    found = total.take()
    assert all(isinstance(tensor, DTensor) for tensor in found.values())
    expected = {"first": 4 * first * second.sum(), "second": 2 * first.square().sum().expand(4), "unread": unread * 0}
    for name, gradient in expected.items():
        of_this_rank = found[name].to_local()
        assert of_this_rank.shape == parameters[name].ds_tensor.shape
        torch.testing.assert_close(of_this_rank[: gradient.numel()], gradient.flatten())
        assert not of_this_rank[gradient.numel() :].any()
        assert parameters[name].grad is None
    assert total.take() == {}
    value.backward()  # the training's own: nothing looks on any more
    torch.testing.assert_close(parameters["first"].grad, 2 * first * second.sum())


@pytest.mark.parametrize("graph", [True, False])
def test_a_graph_is_kept_only_if_asked(graph, one_process):
    parameter = partitioned(torch.ones(2))
    value = parameter.square().sum()
    PartitionedSum({"w": parameter}).add(value, retain_graph=graph)
    with nullcontext() if graph else pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_half_of_a_sum():
    """Of two ranks, each of which has a half with its padding."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        parameter = partitioned(torch.randn(3, 5))
        parameter.ds_tensor = torch.zeros(8)
        total = PartitionedSum({"w": parameter})
        total.add(parameter.sum())
        found = total.take()["w"]
        assert (found.shape, found.to_local().shape) == ((16,), (8,))
        assert part_index(parameter) == 1
    finally:
        dist.destroy_process_group()


def test_the_optimizers_own_tensors(one_process):
    """Those that were asked for; of the others, that they are there."""
    values = {"exp_avg": torch.arange(2.0), "exp_avg_sq": torch.ones(2)}
    state = {0: {**values, "step": 3}}
    parameter = partitioned(
        torch.ones(2),
        optimizer=SimpleNamespace(state=state),
        get_local_fp32_param=lambda parameter, key: values[key],
    )
    found = optimizer_state(parameter, ("exp_avg", "momentum_buffer", "step"))
    assert found.keys() == {"exp_avg", "exp_avg_sq", "step"}
    assert found["exp_avg_sq"] is found["step"] is None
    assert found["exp_avg"].to_local().data_ptr() == values["exp_avg"].data_ptr()
    state.clear()
    assert optimizer_state(parameter, ("exp_avg",)) == {}
