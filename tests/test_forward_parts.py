"""The small questions before a forward pass: in which precision, through which head, and in which layout."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from trl_margins.forward import checked, head
from trl_margins.forward.checked import Differences, Ways, _attempt, _largest, _own, _report, checked_ways
from trl_margins.forward.checkpointing import checkpointing_kwargs, without_checkpointing
from trl_margins.forward.head import StoppedForward, logits_will_do, why_not_fused
from trl_margins.forward.positions import positions_of
from trl_margins.forward.precision import eval_mode, has_dropout, narrow_dtype, rounds_products, why_not_float32
from trl_margins.forward.shared_prompt import _layer_kinds, _why_not_layers, shared_token_logps
from trl_margins.forward.shared_rows import shared_rows
from trl_margins.forward.standard import (
    TokenLogps,
    fused_token_logps,
    logit_scores,
    logits_token_logps,
    pair_logps,
    token_nll,
)
from trl_margins.pairs import SHARED
from trl_margins.trainers import prompt_sharing
from trl_margins.trainers.collator import PairCollator
from trl_margins.trainers.prompt_sharing import PromptSharing

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=16))


# Precision


def test_the_dtype_that_a_trainer_computes_in():
    """Autocast's, or else that of the weights which have 16 bits."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert narrow_dtype(model, "no") is None
    assert narrow_dtype(model, "bf16") == torch.bfloat16
    assert narrow_dtype(model, "fp16") == torch.float16
    assert narrow_dtype(model.double(), "no") is None
    model[0] = model[0].float()
    model[1] = model[1].half()
    assert narrow_dtype(model, "no") == torch.float16
    assert narrow_dtype(model, "bf16") == torch.bfloat16
    counts = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.int16), requires_grad=False)])
    assert narrow_dtype(counts, "no") is None


@pytest.mark.parametrize(
    ("module", "drops"),
    [
        (nn.Dropout(0.0), False),
        (nn.Dropout(1e-6), True),
        (nn.Dropout2d(0.1), True),
        ({"attention_dropout": 0.1}, True),
        ({"attention_dropout": 0.0}, False),
        ({"drop_path": 1e-6}, True),
        ({"p": 0.1, "rate": 0.1}, False),
        ({"drop_last": True, "dropped": 3}, False),
    ],
)
def test_what_drops_in_training(module, drops):
    if isinstance(module, dict):
        named, module = module, nn.Linear(2, 2)
        vars(module).update(named)
    assert has_dropout(nn.Sequential(nn.Linear(2, 2), module)) == drops


def test_products_that_are_rounded(monkeypatch):
    for precision, rounds in (("highest", False), ("high", True), ("medium", True)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert rounds_products() == rounds

    def disagree():
        raise RuntimeError

    monkeypatch.setattr(torch, "get_float32_matmul_precision", disagree)
    for newer, rounds in (("none", False), ("ieee", False), ("tf32", True)):
        switches = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=newer))
        monkeypatch.setattr(torch.backends, "cuda", switches)
        assert rounds_products() == rounds


def test_weights_that_no_float32_can_take_the_place_of(one_process):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert why_not_float32(model) is None
    assert why_not_float32(model.bfloat16()) is None
    model[1].bias.ds_id = 0
    assert why_not_float32(model) == "DeepSpeed ZeRO-3, which casts the weights itself"
    del model[1].bias.ds_id
    model[1].register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    assert why_not_float32(model) == "quantized weights (1.packed)"
    model[1].packed = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
    assert why_not_float32(model) == "quantized weights (1.packed)"
    model[1].packed = nn.Parameter(torch.zeros(2, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert why_not_float32(model) == "quantized weights (1.packed)"
    assert why_not_float32(nn.Linear(2, 2, device="meta")) == "weights that are elsewhere until they are used"
    part = fully_shard(nn.Linear(2, 2), mesh=one_process)
    assert why_not_float32(nn.Sequential(part)) == "FSDP, which casts the weights itself"


def test_every_module_has_its_own_mode_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Linear(2, 2))
    model.train()
    model[1].eval()
    with suppress(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]


# The head


def test_logits_up_to_so_many_are_built(monkeypatch):
    model, labels = llama(), torch.zeros(2, 3, dtype=torch.long)
    monkeypatch.setattr(head, "FEW_LOGITS", 2 * 3 * 32)
    assert logits_will_do(model, labels)
    assert not logits_will_do(model, labels.to("meta"))
    monkeypatch.setattr(head, "FEW_LOGITS", 2 * 3 * 32 - 1)
    assert not logits_will_do(model, labels)


def test_heads_that_trl_cannot_fuse(monkeypatch):
    assert why_not_fused(llama()) is None
    of_t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=32))
    assert why_not_fused(of_t5) == "an encoder-decoder model"
    for target, reason in (("q_proj", None), ("lm_head", "an adapter on the LM head")):
        adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=[target]))
        assert why_not_fused(adapted) == reason
    model = llama()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert why_not_fused(model) == "a model without an LM head of its own"


def test_no_forward_pass_fills_a_cache(monkeypatch):
    """It would keep the keys and values of every layer until the way back."""
    model, asked = llama().eval(), []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: asked.append(k.get("use_cache")) or original(*a, **k))
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    mask, labels = torch.ones_like(ids), torch.tensor([[-100, 6, 7], [-100, 6, 8]])
    logits_token_logps(model, {"input_ids": ids}, labels)
    StoppedForward(model, {"input_ids": ids}, labels)
    shared_token_logps(model, shared_rows(ids, mask, labels), fused=False)
    _own(model, ids[0], mask[0], labels[0])
    with suppress(AttributeError, ValueError):  # TRL's head is not there
        fused_token_logps(model, {"input_ids": ids}, labels)
    assert asked == [False] * 5


def test_a_head_with_other_weights():
    model, other, ids = llama(), torch.randn(32, 8), torch.tensor([[5, 6, 7, 8], [5, 6, 8, 9]])
    stopped = StoppedForward(model, {"input_ids": ids}, torch.where(ids > 5, ids, -100))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(stopped.logits(stopped.hidden), logits)
    torch.testing.assert_close(stopped.logits(stopped.hidden, other), stopped.hidden @ other.T)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, None),
        ({"sliding_window": 4}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        (
            {"layer_types": ["full_attention", "recurrent", "chunked"]},
            "layers that a mask does not reach: chunked, recurrent",
        ),
        ({"attention_chunk_size": 8}, "attention in chunks of absolute positions"),
        ({"attention_layers": ["global", "local"]}, "a sliding window that its config does not show"),
        ({"attention_layers": ["global"], "attention_chunk_size": None, "alibi": False}, None),
        ({"alibi": True}, "ALiBi, which takes distances from places in the row"),
    ],
)
def test_layers_that_a_mask_reaches(config, reason):
    assert _why_not_layers(SimpleNamespace(**config)) == reason


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({}, {"full_attention"}),
        ({"sliding_window": None, "layer_types": None}, {"full_attention"}),
        ({"sliding_window": 4}, {"sliding_attention"}),
        ({"sliding_window": 4, "layer_types": ["full_attention"]}, {"full_attention"}),
    ],
)
def test_kinds_of_layers(config, kinds):
    assert _layer_kinds(SimpleNamespace(**config)) == kinds


# Positions


class Positioned(nn.Module):
    """With a table of positions, beside one of tokens that has as many rows."""

    def __init__(self, said: Any, name: str = "wpe", rows: int = 16, **options: Any) -> None:
        super().__init__()
        text = SimpleNamespace() if said is None else SimpleNamespace(max_position_embeddings=said)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.tokens = nn.Embedding(4, 2)
        offset = options.pop("offset", None)
        self.add_module(name, nn.Embedding(rows, 2, **options))
        if offset is not None:
            getattr(self, name).offset = offset


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (Positioned(16), 16),
        (Positioned(16, "embed_positions", 18, offset=2), 16),
        (Positioned(16, "position_embeddings", 18, padding_idx=1), 16),
        (Positioned(16, "wpe", 24), 24),
        (Positioned(16, "wpe", 25), None),
        (Positioned(16, "wpe", 15), None),
        (Positioned(4, "wte", 4), None),  # no name of positions
        (Positioned(None), None),
        (Positioned("16"), None),
    ],
)
def test_the_rows_of_a_table_of_positions(model, positions):
    assert positions_of(model) == positions


def test_the_smaller_of_two_tables():
    model = Positioned(16, "wpe", 18)
    model.add_module("pos_embed", nn.Embedding(17, 2))
    model.add_module("pos_bias", nn.Linear(16, 2))
    assert positions_of(model) == 17


# Checkpointing


def test_what_a_config_says_of_checkpointing():
    kwargs = {"use_reentrant": True}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert checkpointing_kwargs(SimpleNamespace(**{name: True, f"{name}_kwargs": kwargs})) == kwargs
        assert checkpointing_kwargs(SimpleNamespace(**{name: True, f"{name}_kwargs": None})) == {}
        assert checkpointing_kwargs(SimpleNamespace(**{name: False, f"{name}_kwargs": kwargs})) == {}
    assert checkpointing_kwargs(SimpleNamespace()) == {}


class Checkpointed(nn.Module):
    """Notes what is asked of it."""

    def __init__(self, name: str, on: bool) -> None:
        super().__init__()
        self.asked: list[Any] = []
        setattr(self, f"is_{name}", on)
        setattr(self, f"{name}_disable", lambda: self.asked.append("off"))
        setattr(self, f"{name}_enable", lambda *args, **kwargs: self.asked.append((args, kwargs)))


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_is_off_and_on_again(name):
    model = Checkpointed(name, on=True)
    kwargs = {"use_reentrant": False, "every_n_layers": 2, "offload": True}
    with suppress(KeyError), without_checkpointing(model, kwargs):
        assert model.asked == ["off"]
        raise KeyError
    assert model.asked[1:] == [(({"use_reentrant": False},), {"every_n_layers": 2, "offload": True})]
    with without_checkpointing(model, {"offload": False}):
        pass
    assert model.asked[-1] == ((None,), {"offload": False})
    off = Checkpointed(name, on=False)
    with without_checkpointing(off, kwargs):
        pass
    assert off.asked == []


# Tokens


def test_tokens_are_counted_in_float32_at_least():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 4, -100], [-100, 2, 0]])
    expected = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(token_nll(logits, labels), expected)
    assert token_nll(logits.bfloat16(), labels).dtype == torch.float32
    assert token_nll(logits.double(), labels).dtype == torch.float64
    scores = logit_scores(logits, labels, statistics=True)
    p, there = logits.softmax(-1), labels != -100
    assert not any(scores[name].requires_grad for name in scores)
    for name, values in {
        "logps": -expected,
        "mean_logit": logits.mean(-1),
        "entropy": -(p * p.log()).sum(-1),
        "log_sum_sq_probs": p.square().sum(-1).log(),
    }.items():
        torch.testing.assert_close(scores[name], values * there)
    assert torch.equal(scores["is_top1"], (logits.argmax(-1) == labels) & there)
    assert logit_scores(logits, labels, statistics=False).keys() == {"logps", "mean_logit"}


def tokens(**more: Any) -> TokenLogps:
    """Two pairs: of three and one tokens, and of one and none; what is not of a completion has values too."""
    there = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    return TokenLogps(-torch.arange(1.0, 13.0).view(4, 3) * there, there, **more)


def test_sums_and_lengths_of_pairs():
    pairs = pair_logps(tokens())
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([-6.0, -5.0], [-7.0, 0.0])
    assert (pairs.chosen_length.tolist(), pairs.rejected_length.tolist()) == ([3, 1], [1, 0])
    assert pairs.sft_loss.item() == 11 / 4
    for name in ("unweighted", "chosen_score", "rejected_score", "policy_weight", "aux_loss"):
        assert getattr(pairs, name) is None
    assert pairs.token_stats == {}
    nothing = pair_logps(TokenLogps(torch.zeros(2, 3), torch.zeros(2, 3).bool()))
    assert nothing.sft_loss.item() == nothing.chosen.item() == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_a_longer_completions_tail_weighs_less(weight):
    """The second pair's is all tail; without a weight of one's own nothing is noted."""
    pairs = pair_logps(tokens(), tail_weight=weight)
    assert pairs.chosen.tolist() == [-1 - weight * 5, -5 * weight]
    assert pairs.rejected.tolist() == [-7.0, 0.0]
    assert pairs.unweighted.tolist() == [[-6.0, -7.0], [-5.0, 0.0]]
    assert pairs.mean_logps[0].tolist() == [-2.0, -5.0]


def test_the_reward_of_each_token():
    pairs = pair_logps(tokens(), of_token=lambda logps: 10 - logps)
    assert (pairs.chosen_score.tolist(), pairs.rejected_score.tolist()) == ([36.0, 15.0], [17.0, 0.0])


def test_how_likely_the_policy_writes_a_pair():
    sums = torch.full((4, 3), -2.0)
    pairs = pair_logps(tokens(log_sum_sq_probs=sums), policy_weight=True)
    expected = [math.exp(-6 / 3 + 2) * math.exp(-7 + 2), math.exp(-5 + 2)]
    assert pairs.policy_weight.tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs log_sum_sq_probs: compute the tokens with statistics=True"):
        pair_logps(tokens(), policy_weight=True)


def test_means_over_tokens():
    values = torch.arange(12.0).view(4, 3)
    stats = pair_logps(tokens(mean_logit=values, entropy=values, is_top1=values % 2 == 0)).token_stats
    assert {name: value.item() for name, value in stats.items()} == {
        "logits/chosen": (0 + 1 + 2 + 4) / 4,
        "logits/rejected": 6.0,
        "entropy": pytest.approx((0 + 1 + 2 + 4 + 6) / 5),
        "mean_token_accuracy": 3 / 4,
    }
    nothing = TokenLogps(
        torch.zeros(4, 3), torch.zeros(4, 3).bool(), mean_logit=values, entropy=values, is_top1=values
    )
    assert {value.item() for value in pair_logps(nothing).token_stats.values()} == {0.0}


# Shared prompts


def trainer_with(processes: int = 1, device: str = "cpu", **args: Any) -> Any:
    config = {"n_gpu": 1, "neftune_noise_alpha": None, **splitting(False), **args}
    of_run = {name: config.pop(name, False) for name in ("is_deepspeed_enabled", "is_fsdp_enabled")}
    return SimpleNamespace(
        model=llama(),
        args=SimpleNamespace(**config),
        accelerator=SimpleNamespace(num_processes=processes, device=torch.device(device), mixed_precision="no"),
        train_dataset=config.pop("train_dataset", [0]),
        checkpoints_reentrantly=config.pop("checkpoints_reentrantly", False),
        data_collator=None,
        _fused=True,
        **of_run,
    )


def splitting(batches: bool) -> Any:
    return {"accelerator_config": SimpleNamespace(split_batches=batches)}


SPLIT = "batches that accelerate splits over the ranks (split_batches)"


@pytest.mark.parametrize(
    ("processes", "args", "reason"),
    [
        (1, {}, None),
        (2, {}, None),
        (1, {"n_gpu": 2}, "nn.DataParallel, which splits every tensor of a batch along its first dimension"),
        (1, {"neftune_noise_alpha": 5.0}, "NEFTune, whose noise depends on what else is in a row"),
        (1, splitting(True), None),
        (2, splitting(True), SPLIT),
    ],
)
def test_runs_that_cannot_share_prompts(processes, args, reason, caplog):
    caplog.set_level("INFO", "trl_margins")
    auto = PromptSharing(trainer_with(processes, **args), "auto")
    assert (auto.decided, auto.possible) == ((None, True) if reason is None else (False, False))
    assert caplog.messages == ([] if reason is None else [f"prompts are computed once per completion: {reason}"])
    caplog.clear()
    never = PromptSharing(trainer_with(processes, **args), "never")
    assert (never.decided, caplog.messages) == (False, [])
    if reason is None:
        assert PromptSharing(trainer_with(processes, **args), "always").decided is True
    else:
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            PromptSharing(trainer_with(processes, **args), "always")
        assert str(refused.value) == f"share_prompt='always' does not go with {reason}"


def test_an_unknown_mode_of_sharing():
    with pytest.raises(ValueError, match="unknown share_prompt 'maybe'; known: auto, always, never"):
        PromptSharing(trainer_with(), "maybe")


@pytest.mark.parametrize(
    ("device", "args", "timed"),
    [
        ("cuda", {}, 3),
        ("cpu", {}, 0),
        ("cuda", {"n_gpu": 2}, 0),
        ("cuda", {"is_deepspeed_enabled": True}, 0),
        ("cuda", {"is_fsdp_enabled": True}, 0),
        ("cuda", {"checkpoints_reentrantly": True}, 0),
    ],
)
def test_where_both_ways_are_timed(device, args, timed):
    assert PromptSharing(trainer_with(device=device, **args), "auto")._to_time == timed
    assert PromptSharing(trainer_with(device=device), "always")._to_time == 0


def test_a_part_that_is_sharded_is_not_timed(one_process):
    trainer = trainer_with(device="cuda")
    fully_shard(trainer.model.model.layers[0], mesh=one_process)
    assert PromptSharing(trainer, "auto")._to_time == 0


def test_what_was_timed_goes_into_the_checkpoint():
    """Each part of it, to a run that times, and to no other."""
    trainer = trainer_with(device="cuda")
    first = PromptSharing(trainer, "auto")
    assert first.state_dict(trainer) == {}
    first._seconds, first._to_time, first.decided = {True: 1.5, False: 0.0}, 2, True
    state = first.state_dict(trainer)
    assert state == {"seconds": [1.5, 0.0], "to_time": 2, "shares": True}
    again = PromptSharing(trainer_with(device="cuda"), "auto")
    again.load_state_dict(trainer_with(device="cuda"), state)
    assert (again._seconds, again._to_time, again.decided) == ({True: 1.5, False: 0.0}, 2, None)
    again.load_state_dict(trainer_with(device="cuda"), {**state, "shares": False, "to_time": 0})
    assert (again._to_time, again.decided) == (0, False)
    for mode, device in (("auto", "cpu"), ("always", "cuda"), ("never", "cuda")):
        other = PromptSharing(trainer_with(device=device), mode)
        decided = other.decided
        other.load_state_dict(trainer_with(device=device), {**state, "shares": False})
        assert (other._seconds, other._to_time, other.decided) == ({True: 0.0, False: 0.0}, 0, decided)


@pytest.mark.parametrize("shares", [True, False])
def test_what_was_compared_goes_into_the_checkpoint(shares):
    """A model near the tolerance is computed after a resume as before; one in another dtype is compared anew."""
    trainer = trainer_with(device="cpu")
    first = PromptSharing(trainer, "auto")
    first._checked, first.decided, trainer._fused = True, shares, False
    state = json.loads(json.dumps(first.state_dict(trainer)))
    for mode, decided in (("auto", shares), ("always", True), ("never", False)):
        trainer = trainer_with(device="cpu")
        again = PromptSharing(trainer, mode)
        again.load_state_dict(trainer, state)
        assert again.decided == decided
        alike = decided == shares
        assert (again._checked, trainer._fused) == (alike, not alike)
    other = trainer_with(device="cpu")
    other.model.bfloat16()
    again = PromptSharing(other, "auto")
    again.load_state_dict(other, state)
    assert (again._checked, again.decided, other._fused) == (False, None, True)


def test_a_tie_goes_to_the_shared_pass(caplog):
    """And the slowest rank decides; the numbers that are said are its."""
    caplog.set_level("INFO", "trl_margins")
    for others, shares in (([0.5, 0.5], True), ([0.75, 0.5], False), ([0.25, 0.25], True)):
        trainer = trainer_with(device="cpu")
        trainer.accelerator.gather = lambda totals, others=others: torch.cat([totals, torch.tensor([others])])
        sharing = PromptSharing(trainer, "auto")
        sharing._seconds = {True: 0.5, False: 0.5}
        sharing._take_the_faster(trainer)
        assert sharing.decided is shares
        way = "for both completions" if shares else "per completion"
        said = f"take {max(0.5, others[0]):.3f} s with a shared prompt, {max(0.5, others[1]):.3f} s without"
        expected = f"prompts are computed once {way}: forward and backward of the first 3 batches {said}"
        assert caplog.messages[-1] == expected


def test_timing_leaves_modes_and_random_numbers_as_they_were(monkeypatch):
    """The first pass is left out, and of the others the fastest counts."""
    trainer, now = trainer_with(), iter([0.0, 9.0, 9.5, 10.0, 10.25])
    trainer.model.eval()
    trainer.model.model.train()
    modes = [module.training for module in trainer.model.modules()]
    passes = []

    def one_pass(trainer, batch, shared):
        assert all(module.training for module in trainer.model.modules())
        passes.append(torch.rand(()))

    monkeypatch.setattr(prompt_sharing, "_forward_and_backward", one_pass)
    monkeypatch.setattr(prompt_sharing, "_clock", lambda device: next(now))
    state = torch.get_rng_state()
    assert prompt_sharing._seconds(trainer, {}, shared=True) == 0.25
    assert len(passes) == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trainer.model.modules()] == modes


def test_what_shares_is_decided_and_laid_out():
    sharing = PromptSharing(trainer_with(), "always")
    sharing._checked = True
    trainer = SimpleNamespace(_fused=False)
    assert sharing(trainer, {SHARED: {}})
    assert not sharing(trainer, {})  # a batch that somebody else has collated
    sharing.decided = False
    assert not sharing(trainer, {SHARED: {}})


def test_a_layout_that_is_not_needed_is_not_made():
    trainer = trainer_with()
    trainer.data_collator = PairCollator(list, standard_rows=list)
    sharing = PromptSharing(trainer, "auto")
    sharing._decide(trainer, shares=True)
    assert trainer.data_collator.standard_rows is list
    sharing._decide(trainer, shares=False)
    assert trainer.data_collator.standard_rows is None


def test_parameters_that_a_batch_does_not_use_are_timed_too():
    """And no gradient is left behind."""
    used, unused = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    there = torch.ones(2, 1).bool()
    trainer = SimpleNamespace(
        model=nn.ParameterList([used, unused]),
        _adapter_autocast=nullcontext,
        token_logps=lambda model, batch, shared: TokenLogps(used * torch.ones(2, 1), there),
    )
    with torch.no_grad():
        prompt_sharing._forward_and_backward(trainer, {}, True)
    assert used.grad is unused.grad is None


def test_the_clock_waits_for_an_accelerator(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    before = prompt_sharing._clock(torch.device("cpu"))
    assert waits == []
    assert prompt_sharing._clock(torch.device("cuda")) >= before
    assert waits == [torch.device("cuda")]


# The comparison with the model's own logits


BOTH, FUSED, SHARES, NEITHER = Ways(True, True), Ways(True, False), Ways(False, True), Ways(False, False)
OWN = "against the model's own logits, on one pair in float32, "
MATCH = "log-probabilities match the model's own logits: on one pair in float32, "
PER_COMPLETION = "each prompt is computed once per completion. Please report the model: Linear"
WHOLE = "log-probabilities come from the whole logits"


@pytest.mark.parametrize(
    ("ways", "right", "found", "said"),
    [
        (
            BOTH,
            BOTH,
            {"fused": 1e-6, "shared": 2e-6},
            f"INFO {MATCH}TRL's fused LM head differs by 1.0e-06 nats per token and the shared-prompt forward pass "
            "differs by 2.0e-06 nats per token",
        ),
        (
            SHARES,
            SHARES,
            {"shared": 2e-6},
            f"INFO {MATCH}the shared-prompt forward pass differs by 2.0e-06 nats per token",
        ),
        (
            BOTH,
            FUSED,
            {"fused": 1e-6, "shared": 0.5},
            f"WARNING {OWN}the shared-prompt forward pass differs by 5.0e-01 nats per token (tolerance 1e-03): "
            f"{PER_COMPLETION}",
        ),
        (
            BOTH,
            NEITHER,
            {"fused": 0.25, "shared": math.inf, "padded": 0.125, "crash": "ValueError: no"},
            f"WARNING {OWN}TRL's fused LM head differs by 2.5e-01 nats per token and the shared-prompt forward pass "
            "fails (tolerance 1e-03; ValueError: no; padding alone changes the model's own logits by 1.2e-01): "
            f"{WHOLE} and {PER_COMPLETION}",
        ),
        (
            BOTH,
            SHARES,
            {"fused": math.inf, "padded": 1e-3},
            f"WARNING {OWN}TRL's fused LM head fails (tolerance 1e-03): {WHOLE}. Please report the model: Linear",
        ),
    ],
)
def test_what_is_said_of_a_comparison(ways, right, found, said, caplog):
    caplog.set_level("INFO", "trl_margins")
    _report(nn.Linear(1, 1), ways, right, Differences(n_tokens=3, **found), torch.float32, 1e-3)
    (record,) = caplog.records
    assert f"{record.levelname} {record.getMessage()}" == said


@pytest.mark.parametrize(("dtype", "most"), [(None, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("way", ["fused", "shared"])
def test_how_far_a_way_may_be(dtype, most, way, monkeypatch):
    """In nats per token. The model is one that cannot be upcast."""
    monkeypatch.setattr(checked, "why_not_float32", lambda model: "quantized")
    monkeypatch.setattr(checked, "one_prompt", lambda *args: None)
    for apart in (0.0, most, 1.01 * most):
        found = Differences(n_tokens=1, **{way: apart})
        monkeypatch.setattr(checked, "differences_from_own", lambda *args, found=found: found)
        right = checked_ways(llama(), None, None, None, BOTH, dtype=dtype)
        assert {name: getattr(right, name) for name in ("fused", "shared")} == {
            **{"fused": True, "shared": True},
            way: apart <= most,
        }


def test_a_failure_is_said_with_its_kind():
    assert _attempt(lambda: 5) == (5, "")
    assert _attempt(lambda: int("x")) == (None, "ValueError: invalid literal for int() with base 10: 'x'")


def test_the_largest_difference_of_a_completion():
    """In nats per token, on average; what is NaN in every way is no difference."""
    there = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()

    def largest(logps: list[list[float]], own: list[list[float]]) -> float:
        return _largest(lambda: TokenLogps(torch.tensor(logps), there), [torch.tensor(row) for row in own])

    logps = [[-1.0, -2.0, 9.0], [-4.0, 9.0, 9.0], [9.0, 9.0, 9.0]]
    assert largest(logps, [[-1.0, -2.0], [-4.0], []]) == 0.0
    assert largest(logps, [[-2.0, -1.0], [-4.25], []]) == 1.0
    assert largest(logps, [[-1.5, -2.0], [-4.75], []]) == 0.75
    assert largest([[math.nan, -2.0, 0.0], *logps[1:]], [[math.nan, -2.0], [-4.0], []]) == 0.0
    assert largest([[math.nan, -2.0, 0.0], *logps[1:]], [[-1.0, -2.0], [-4.0], []]) == math.inf
    assert largest(logps, [[-math.inf, -2.0], [-4.0], []]) > 1e38
