"""The shared-prompt pass gives what the standard pass gives: log-probabilities and gradients, model by model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from trl_margins.forward import shared_prompt
from trl_margins.forward.head import causal_model, decoder, only_positions
from trl_margins.forward.shared_prompt import shared_token_logps, why_not_shared
from trl_margins.forward.shared_rows import SharedRows, packed, shared_rows, unpacked, width_step
from trl_margins.forward.standard import (
    IGNORE,
    TokenLogps,
    fused_token_logps,
    logit_scores,
    logits_token_logps,
    pair_logps,
)

VOCABULARY = 40
WINDOW = 5  # shorter than a prompt
OUTPUTS = ("log_probs", "mean_logits", "entropy", "is_top1", "log_sum_sq_probs")
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **COMMON,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SHAPE,
    "Qwen2": {**SHAPE, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    "Qwen3": {**SHAPE, "head_dim": 8},
    "Mistral": {**SHAPE, "sliding_window": WINDOW},
    "Gemma2": {**SHAPE, **MIXED, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "Gemma3": {**SHAPE, **MIXED},
    "Phi3": {**SHAPE, "sliding_window": WINDOW},
    "GPT2": {**COMMON, **GPT2},
    "GPTNeoX": {**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5},
    "OPT": {**COMMON, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.0},
    "Mixtral": {**SHAPE, **EXPERTS, "sliding_window": None},
}
EAGER_ONLY = ("Gemma2",)  # softcapping inside the attention
CASES = [(name, kind) for name in MODELS for kind in ("eager", "sdpa") if kind == "eager" or name not in EAGER_ONLY]


def tiny(name: str, attention: str = "sdpa", **overrides: Any) -> Any:
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**MODELS[name], **overrides})
    config._attn_implementation = attention
    torch.manual_seed(0)
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)(config)
    add_fused_lm_head(model, outputs=OUTPUTS)
    return model


# Batches


def random_rows(rng: random.Random, k: int) -> list[tuple[list[int], list[int]]]:
    """k pairs (prompt, answer) that share their prompt, or less of it."""

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]

    prompt = tokens(1, 12)
    rows = [(list(prompt), tokens(1, 9)) for _ in range(k)]
    kind = rng.choice(["whole", "whole", "merged", "cut", "empty", "none"])
    victim = rng.randrange(k)
    if kind == "merged":  # the prompt's last token became another one
        rows[victim][0][-1] = rng.randrange(3, VOCABULARY)
    elif kind == "cut":  # truncation took the prompt's beginning
        del rows[victim][0][: rng.randint(1, len(prompt))]
    elif kind == "empty":
        rows[victim][1].clear()
    elif kind == "none":
        rows = [(ids[1:], answer) for ids, answer in rows]
    return [(ids, answer) if ids or answer else (prompt, answer) for ids, answer in rows]


def collated(examples: list[list[tuple[list[int], list[int]]]], side: str = "right") -> dict[str, Tensor]:
    """The standard layout: row j · B + i is answer j of prompt i."""
    rows = [example[j] for j in range(len(examples[0])) for example in examples]
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 2
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), width), IGNORE)
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        begin = width - length if side == "left" else 0
        batch["input_ids"][row, begin : begin + length] = torch.tensor(prompt + answer)
        batch["attention_mask"][row, begin : begin + length] = 1
        batch["labels"][row, begin + len(prompt) : begin + length] = torch.tensor(answer, dtype=torch.long)
    return batch


def random_batch(k: int = 2, side: str = "right", seed: int = 0, prompts: int = 4) -> dict[str, Tensor]:
    rng = random.Random(seed)
    examples = [random_rows(rng, k) for _ in range(prompts)]
    if side == "left":
        # the standard pass predicts a row's first token from the padding before it; nobody has such rows
        examples = [[(ids or [3], answer) for ids, answer in rows] for rows in examples]
    return collated(examples, side)


# The two passes


def standard(model: nn.Module, batch: Mapping[str, Tensor], fused: bool, **inputs: Any) -> TokenLogps:
    inputs |= {name: batch[name] for name in ("input_ids", "attention_mask")}
    # learned positions have to be told where a row begins; the others see distances alone
    inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return (fused_token_logps if fused else logits_token_logps)(model, inputs, batch["labels"])


def shared(model: nn.Module, batch: Mapping[str, Tensor], k: int, fused: bool, **inputs: Any) -> TokenLogps:
    return shared_token_logps(model, shared_rows(**batch, k=k), fused=fused, **inputs)


def loss_of(tokens: TokenLogps) -> Tensor:
    """Something that gives every row another weight."""
    lengths = tokens.is_completion.sum(1)
    weight = torch.linspace(-1, 2, len(lengths))
    loss = -(weight * tokens.logps.sum(1) / lengths.clamp(min=1)).sum()
    return loss if tokens.aux_loss is None else loss + tokens.aux_loss


def loss_and_gradients(model: nn.Module, tokens: TokenLogps) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(tokens)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: TokenLogps, theirs: TokenLogps, rtol: float = 1e-5) -> None:
    """Field by field, token by token, whatever the columns."""
    assert torch.equal(ours.is_completion.sum(1), theirs.is_completion.sum(1))
    for name in ("logps", "mean_logit", "entropy", "log_sum_sq_probs", "is_top1"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None), name
        if one is not None:
            one, other = one[ours.is_completion], other[theirs.is_completion]
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * 10, msg=lambda m, name=name: f"{name}: {m}")
    assert (ours.aux_loss is None) == (theirs.aux_loss is None)


def assert_same_steps(model: nn.Module, ours: TokenLogps, theirs: TokenLogps, rtol: float = 1e-5) -> None:
    """Loss and gradients; a gradient's error is relative to its largest entry, or to noise where that is none."""
    our_loss, our_gradients = loss_and_gradients(model, ours)
    their_loss, their_gradients = loss_and_gradients(model, theirs)
    assert torch.isclose(our_loss, their_loss, rtol=rtol), (our_loss, their_loss)
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(gradient.abs().max() for gradient in their_gradients.values())
    for name, gradient in their_gradients.items():
        scale = (
            gradient.abs().max().clamp(min=0.05 * largest)
        )  # a key's bias has gradient 0 where positions are learned
        error = (our_gradients[name] - gradient).abs().max() / scale
        assert error < rtol, f"{name}: relative error {error:.2e}"


# The layout


def test_layout_of_a_pair() -> None:
    batch = collated([[([5, 6, 7], [8, 9]), ([5, 6, 7], [10])], [([5, 6], [7, 8]), ([5, 4], [9])]])
    rows = shared_rows(**batch)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 4, 9]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 1, 2]]
    assert rows["prompt_start"].tolist() == [[0] * 6] * 2
    assert rows["start"].tolist() == [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 4, 4]]
    assert rows["count"].tolist() == [[2, 2, 2, 1, 1, 1], [2, 1, 1, 1, 1, 1]]
    assert rows["label"].tolist() == [8, 9, 7, 8, 10, 9]
    assert rows["source"].tolist() == [2, 3, 6 + 1, 6 + 2, 2, 6 + 4]
    assert rows["row"].tolist() == [0, 0, 1, 1, 2, 3]
    assert rows["place"].tolist() == [0, 1, 0, 1, 0, 0]
    assert rows["is_completion"].tolist() == [[True, True], [True, True], [True, False], [True, False]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_layout_of_random_batches(side: str) -> None:
    for seed in range(60):
        k = 1 + seed % 5
        batch = random_batch(k, side, seed, prompts=1 + seed % 4)
        check_layout(shared_rows(**batch, k=k), batch, k)


def read_off(rows: SharedRows) -> tuple[Tensor, Tensor]:
    """Of each token in the flattened rows its prompt and its answer, by the order in which they come: prompt −1 is
    padding, answer 0 shared. Answers without a token of their own have no number.
    """
    n_rows, width = rows["input_ids"].shape
    real = rows["count"].flatten() > 0
    row = torch.arange(n_rows).repeat_interleave(width)
    prompt = (row * width + rows["prompt_start"].flatten()).masked_fill(~real, -1)
    return prompt, (row * width + rows["start"].flatten()).masked_fill(~real, -1)


def check_layout(rows: SharedRows, batch: Mapping[str, Tensor], k: int, step: int = 1) -> None:
    """Each standard row can be read off: tokens, positions, labels; and no more is written than has to be."""
    n_rows, width = rows["input_ids"].shape
    prompts = len(batch["input_ids"]) // k
    assert n_rows <= prompts
    assert width % step == 0
    of_prompt, begin = read_off(rows)
    flat = {name: rows[name].flatten() for name in ("input_ids", "position_ids", "count")}
    plain = [batch["input_ids"][r][batch["attention_mask"][r] == 1].tolist() for r in range(k * prompts)]
    labels = [batch["labels"][r][batch["attention_mask"][r] == 1].tolist() for r in range(k * prompts)]
    starts = [start for start in of_prompt.unique().tolist() if start >= 0]
    assert len(starts) == prompts
    for i in range(prompts):
        copies, marks = plain[i::prompts], labels[i::prompts]
        most = min(len(ids) for ids in copies)
        alike = next(
            (
                t
                for t in range(most)
                if any(c[t] != copies[0][t] for c in copies) or any(m[t] != IGNORE for m in marks)
            ),
            most,
        )
        written = copies[0][:alike] + [token for ids in copies for token in ids[alike:]]
        (start,) = (s for s in starts if flat["input_ids"][of_prompt == s].tolist() == written)
        mine = (of_prompt == start).nonzero()[:, 0]
        assert len({int(place) // width for place in mine}) == 1, "over the end of a row"
        assert mine.tolist() == list(range(start, start + len(written)))
        assert flat["count"][mine].tolist() == [k] * alike + [1] * (len(written) - alike)
        at = start + alike
        for r, ids, row_marks in zip(range(i, k * prompts, prompts), copies, marks, strict=True):
            places = [*range(start, start + alike), *range(at, at + len(ids) - alike)]
            assert flat["position_ids"][places].tolist() == list(range(len(ids)))
            assert begin[places].tolist() == [start] * alike + [at] * (len(ids) - alike)
            at += len(ids) - alike
            expected = [(t, token) for t, token in enumerate(row_marks) if token != IGNORE and t > 0]
            here = (rows["row"] == r) & (rows["label"] != IGNORE)
            assert rows["source"][here].tolist() == [places[t - 1] for t, _ in expected]
            assert rows["label"][here].tolist() == [token for _, token in expected]
            assert rows["place"][here].tolist() == list(range(len(expected)))
            assert rows["is_completion"][r].sum() == len(expected)
    assert flat["count"].sum() == sum(map(len, plain))
    longest = max(int((row > 0).sum()) for row in rows["count"])
    assert width < longest + step, "wider than the longest row"


def test_prompts_are_packed_where_that_costs_less() -> None:
    """Four pairs of 7, 3, 3 and 1 tokens: two rows of 7 waste nothing, one row of 14 is for cheap attention."""
    pairs = [[([5], [6] * 3), ([5], [7] * 3)], *[[([5], [6]), ([5], [7])]] * 2, [([5], []), ([5], [])]]
    batch = collated(pairs)
    assert shared_rows(**batch)["input_ids"].shape in {(1, 14), (2, 7)}
    assert shared_rows(**batch, balance=1e9)["input_ids"].numel() == 14
    assert shared_rows(**batch, balance=1.0)["input_ids"].shape == (2, 7)


def test_the_width_is_a_multiple_on_accelerators() -> None:
    assert width_step(torch.device("cpu")) == 1
    for seed in range(10):
        batch = random_batch(2, seed=seed)
        check_layout(shared_rows(**batch, step=64), batch, 2, step=64)
    model, batch = tiny("Llama"), random_batch()
    aligned = shared_token_logps(model, shared_rows(**batch, step=64), fused=False)
    assert_equal(aligned, standard(model, batch, False))


def test_an_epoch_has_few_shapes() -> None:
    """For each, cuDNN builds a plan: 100 batches of four pairs as long as people's."""
    rng = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [3] * rng.randint(least, most)

    shapes: dict[int, set[Any]] = {1: set(), 64: set()}
    used = dict.fromkeys(shapes, 0)
    for _ in range(100):
        pairs = []
        for _ in range(4):
            prompt = tokens(20, 300)
            pairs.append([(prompt, tokens(50, 400)), (prompt, tokens(50, 400))])
        for step, seen in shapes.items():
            ids = shared_rows(**collated(pairs), step=step)["input_ids"]
            seen.add(ids.shape)
            used[step] += ids.numel()
    assert len(shapes[1]) > 90
    assert len(shapes[64]) < 35
    assert used[64] < 1.05 * used[1]


def test_packed_rows_are_the_same_rows() -> None:
    rows = shared_rows(**random_batch(3), k=3)
    back = unpacked(packed(rows))
    assert back.keys() == rows.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in rows.items())
    assert len(packed(rows)) == 3
    assert packed(rows)["of_rows"].dtype == torch.int32


# The mask


@pytest.mark.parametrize(("name", "kinds"), [("Llama", 1), ("Gemma3", 2)])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "autocast"])
def test_one_mask_is_kept_for_the_way_back(name: str, kinds: int, compute: str) -> None:
    """One for each kind of layer, in the type that the attention computes in; not one for each of four layers."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "Gemma3" else {}
    model = tiny(name, num_hidden_layers=4, **layers)
    model = model.bfloat16() if compute == "bfloat16" else model
    rows = shared_rows(**random_batch())
    count, size = rows["input_ids"].shape
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # heads that share a mask are a stride of 0
        if tensor.ndim == 4 and tensor.shape[-2:] == (size, size) and (tensor.size(1) == 1 or not tensor.stride(1)):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=compute == "autocast"):
        shared_token_logps(model, rows, fused=False)
    bytes_each = 4 if compute == "float32" else 2
    assert [storage.nbytes() for storage in kept.values()] == [count * size * size * bytes_each] * kinds


def test_a_mask_is_built_of_bytes() -> None:
    """Positions compared with positions would take eight bytes an entry."""
    rows = shared_rows(**random_batch(prompts=6, seed=3), balance=1e9)
    count, size = rows["input_ids"].shape
    made: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            made.extend(t for t in ([out] if isinstance(out, Tensor) else []) if t.numel() >= count * size * size)
            return out

    with Watch():
        shared_prompt.attention_masks(tiny("Gemma3"), rows)
    assert made
    assert {tensor.dtype for tensor in made} == {torch.bool}


# Equality with the standard pass


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_equals_the_standard_pass(name: str, attention: str, k: int) -> None:
    model = tiny(name, attention)
    assert why_not_shared(model) is None
    for seed, (side, fused) in enumerate([("right", True), ("right", False), ("left", True), ("left", False)]):
        batch = random_batch(k, side, seed)
        ours, theirs = shared(model, batch, k, fused), standard(model, batch, fused)
        assert_equal(ours, theirs)
        assert_same_steps(model, ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_read_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = (8 * torch.randn(2, 5, 50)).to(dtype), torch.randint(0, 50, (2, 5))
    labels[0, 1] = IGNORE
    found, wide = logit_scores(logits, labels, True), logit_scores(logits.float(), labels, True)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], wide[name])
        assert found[name][0, 1] == 0
    probabilities = logits.double().softmax(-1).numpy()
    entropy = -(probabilities * np.log(probabilities)).sum(-1) * (labels != IGNORE).numpy()
    np.testing.assert_allclose(found["entropy"].numpy(), entropy, rtol=1e-4, atol=1e-6)


LENGTHS = [[2, 5], [6, 1], [3, 3]]  # of answers


def test_pair_logps_are_the_same() -> None:
    """Of the shared pass, against sums over the standard pass's tokens, by hand: LD-DPO's, WPO's and TRL's logs."""
    rng = random.Random(0)
    rows = [
        [([rng.randrange(3, VOCABULARY)] * 3, [rng.randrange(3, VOCABULARY) for _ in range(n)]) for n in pair]
        for pair in LENGTHS
    ]
    model, batch, tail = tiny("Llama"), collated(rows), 0.3
    ours = pair_logps(shared(model, batch, 2, True), tail_weight=tail, policy_weight=True, of_token=torch.exp)
    tokens = standard(model, batch, True)
    is_completion, n = tokens.is_completion.numpy(), len(tokens.logps) // 2
    values = {name: getattr(tokens, name).detach().double().numpy() for name in ("logps", "log_sum_sq_probs")}
    lengths = is_completion.sum(1)
    assert lengths.reshape(2, n).T.tolist() == LENGTHS
    for i in range(n):
        sides, aligned, shortest = {}, 0.0, min(lengths[i], lengths[n + i])
        for side, row in (("chosen", i), ("rejected", n + i)):
            logps = values["logps"][row][is_completion[row]]
            sides[side] = logps
            squares = values["log_sum_sq_probs"][row][is_completion[row]]
            aligned += (logps - squares).mean()
            assert getattr(ours, f"{side}_length")[i] == len(logps)
            summed = logps[:shortest].sum() + tail * logps[shortest:].sum()
            np.testing.assert_allclose(getattr(ours, side)[i].item(), summed, rtol=1e-5)
            np.testing.assert_allclose(getattr(ours, f"{side}_score")[i].item(), np.exp(logps).sum(), rtol=1e-4)
        np.testing.assert_allclose(ours.unweighted[i].tolist(), [each.sum() for each in sides.values()], rtol=1e-5)
        means = [each[i].item() for each in ours.mean_logps]
        np.testing.assert_allclose(means, [each.mean() for each in sides.values()], rtol=1e-5)
        np.testing.assert_allclose(ours.policy_weight[i].item(), np.exp(aligned), rtol=1e-4)
    chosen, rejected = is_completion[:n], is_completion[n:]
    np.testing.assert_allclose(ours.sft_loss.item(), -values["logps"][:n][chosen].mean(), rtol=1e-5)
    logit, entropy, top1 = (
        getattr(tokens, name).detach().double().numpy() for name in ("mean_logit", "entropy", "is_top1")
    )
    stats = {
        "logits/chosen": logit[:n][chosen].mean(),
        "logits/rejected": logit[n:][rejected].mean(),
        "entropy": entropy[is_completion].mean(),
        "mean_token_accuracy": top1[:n][chosen].mean(),
    }
    assert ours.token_stats.keys() == stats.keys()
    for name, value in stats.items():
        np.testing.assert_allclose(ours.token_stats[name].item(), value, rtol=1e-4, atol=1e-5)


def test_a_padding_id_inside_a_prompt_is_not_shared_with_padding() -> None:
    """The chosen row was cut within the prompt, and its padding has the id of the other's next token."""
    ids, mask = torch.tensor([[5, 6, 0, 0], [5, 6, 0, 9]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    labels = torch.full_like(ids, -100)
    labels[1, 3] = 9
    rows = shared_rows(ids, mask, labels)
    laid_out = {name: rows[name].flatten().tolist() for name in ("input_ids", "position_ids", "count", "start")}
    assert laid_out == {
        "input_ids": [5, 6, 0, 9],
        "position_ids": [0, 1, 2, 3],
        "count": [2, 2, 1, 1],
        "start": [0, 0, 2, 2],
    }
    assert (rows["source"].tolist(), rows["label"].tolist(), rows["row"].tolist()) == ([2], [9], [1])


def test_a_batch_without_answers() -> None:
    model = tiny("Llama")
    batch = collated([[([5, 6, 7], []), ([5, 6, 7], [])], [([8, 9], []), ([8, 7], [])]])
    for fused in (True, False):
        tokens = shared(model, batch, 2, fused)
        loss, gradients = loss_and_gradients(model, tokens)
        assert loss == 0
        assert not tokens.is_completion.any()
        assert gradients
        assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = tiny("Gemma3"), random_batch()
    expected = standard(model, batch, True)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    ours = shared(model, batch, 2, True)
    assert_equal(ours, expected)
    assert_same_steps(model, ours, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [True, False])
def test_bf16_autocast(attention: str, fused: bool) -> None:
    model, batch = tiny("Qwen2", attention, initializer_range=0.1), random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = shared(model, batch, 2, fused), standard(model, batch, fused)
    assert_equal(ours, theirs, rtol=2e-2)
    assert_same_steps(model, ours, theirs, rtol=5e-2)


def test_bf16_weights() -> None:
    batch = random_batch()
    for attention in ("eager", "sdpa"):
        model = tiny("Gemma3", attention, initializer_range=0.1).bfloat16()
        ours, theirs = shared(model, batch, 2, True), standard(model, batch, True)
        torch.testing.assert_close(ours.logps.sum(1), theirs.logps.sum(1), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_lora(fused: bool) -> None:
    model = get_peft_model(tiny("Llama"), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    batch = random_batch()
    assert why_not_shared(model) is None
    ours, theirs = shared(model, batch, 2, fused), standard(model, batch, fused)
    assert_equal(ours, theirs)
    assert_same_steps(model, ours, theirs)


def test_data_parallel_wrapper(tmp_path: Any) -> None:
    model, batch = tiny("Llama"), random_batch()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert decoder(wrapped) is model.model
        assert why_not_shared(wrapped) is None
        assert_equal(shared(wrapped, batch, 2, True), standard(model, batch, True))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.rehearsal
def test_compiled() -> None:
    """What the hooks do changes with every batch; a compiled model has to notice."""
    model = tiny("Llama")
    compiled = torch.compile(model, backend="eager")
    assert causal_model(compiled) is model
    assert "virtual tokens" in why_not_shared(torch.compile(prompt_tuning()))
    for seed in range(3):
        batch = random_batch(seed=seed)
        assert_equal(shared(compiled, batch, 2, False), standard(model, batch, False))


@pytest.mark.parametrize("fused", [True, False])
def test_load_balancing_loss(fused: bool) -> None:
    """The same too: a shared token counts once for each of its standard rows."""
    model = tiny("Mixtral")
    for k in (2, 3):
        batch = random_batch(k)
        ours = shared(model, batch, k, fused, output_router_logits=True)
        theirs = standard(model, batch, fused, output_router_logits=True)
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_flex_attention(name: str) -> None:
    """Uncompiled and without gradient, all that it does on a CPU."""
    batch = random_batch()
    expected = standard(tiny(name, "eager"), batch, False)
    model = tiny(name, "flex_attention").eval()
    assert why_not_shared(model) is None
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        assert_equal(shared(model, batch, 2, False), expected)


# A wrong mask would be noticed


def everything_before(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    return lambda row, head, query, key: (key <= query) & (rows["start"][row, query] >= 0)


def other_prompts(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    in_first = rows["prompt_start"] == 0
    moved = rows["start"].masked_fill(rows["start"] == rows["prompt_start"], 0)
    return RIGHT(
        {**rows, "prompt_start": torch.zeros_like(moved), "start": moved.where(~in_first, rows["start"])}, window
    )


def without_window(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    return RIGHT(rows, None)


def window_by_column(rows: SharedRows, window: int | None) -> Callable[..., Tensor]:
    right = RIGHT(rows, None)
    return lambda row, head, query, key: right(row, head, query, key) & (query - key < (window or 1000))


RIGHT = shared_prompt._visible


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Llama", everything_before),
        ("GPT2", everything_before),
        ("Llama", other_prompts),
        ("Mistral", without_window),
        ("Gemma3", without_window),
        ("Mistral", window_by_column),
        ("Qwen2", window_by_column),
    ],
)
def test_a_wrong_mask_is_noticed(
    name: str, wrong: Callable[..., Any], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(name, attention), random_batch()
    expected = standard(model, batch, False).logps.sum(1)
    monkeypatch.setattr(shared_prompt, "_visible", wrong)
    found = shared(model, batch, 2, False).logps.sum(1)
    assert ((found - expected).abs() / expected.abs().clamp(min=1)).max() > 1e-3


def test_padding_and_empty_rows_stay_finite() -> None:
    batch = collated([[([5], []), ([5], [])], [([6] * 10, [7] * 9), ([6] * 10, [8] * 9)]])
    for name, attention in CASES:
        model = tiny(name, attention)
        _, gradients = loss_and_gradients(model, shared(model, batch, 2, False))
        assert all(gradient.isfinite().all() for gradient in gradients.values()), (name, attention)


# The device


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_no_value_is_read_on_the_device(name: str, attention: str) -> None:
    """Tensors without values refuse whatever depends on one."""
    model = tiny(name, attention).to("meta")
    rows = {key: tensor.to("meta") for key, tensor in shared_rows(**random_batch()).items()}
    pair_logps(shared_token_logps(model, rows, fused=False)).chosen.sum().backward()


def test_hooks_go_when_the_model_fails() -> None:
    model, batch = tiny("Llama"), random_batch()
    rows = shared_rows(**batch)
    rows["input_ids"] = rows["input_ids"] + VOCABULARY
    with pytest.raises(IndexError):
        shared_token_logps(model, rows)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_only_positions() -> None:
    model, batch = tiny("Llama"), random_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model(**inputs).logits
    index = torch.tensor([3, 0, 3, whole.size(1) + 1])
    with only_positions(model, index):
        some = model(**inputs).logits
    torch.testing.assert_close(some, whole.flatten(0, 1)[index][None])
    assert model(**inputs).logits.shape == whole.shape


# Which models


def flash() -> nn.Module:
    model = tiny("Llama")
    model.config._attn_implementation = "flash_attention_2"
    return model


def vision() -> nn.Module:
    vision_config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SHAPE),
        vision_config=transformers.CLIPVisionConfig(**vision_config, image_size=8, patch_size=4),
    )
    return transformers.LlavaForConditionalGeneration(config)


def prompt_tuning() -> nn.Module:
    return get_peft_model(tiny("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def of(name: str, **config: Any) -> Callable[[], nn.Module]:
    head = {"T5": "T5ForConditionalGeneration"}.get(name, f"{name}ForCausalLM")
    return lambda: getattr(transformers, head)(getattr(transformers, f"{name}Config")(**config))


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
LINEAR = {"num_attention_heads": 2, "intermediate_size": 24, "layer_types": ["linear_attention", "full_attention"]}
GPT_NEO = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
REFUSED = [
    ("encoder-decoder", of("T5", vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2)),
    ("linear_attention", of("Mamba", **SMALL)),
    ("linear_attention", of("Qwen3Next", **{**SHAPE, **LINEAR})),
    ("recurrent", of("Rwkv", **SMALL, attention_hidden_size=16)),
    ("position_ids", of("Bloom", vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)),
    ("ALiBi", of("Falcon", **SMALL, num_attention_heads=2, alibi=True)),
    ("window", of("GPTNeo", vocab_size=VOCABULARY, hidden_size=16, **GPT_NEO)),
    ("later tokens", of("Roberta", **SMALL, num_attention_heads=2, intermediate_size=16)),
    ("more than text", vision),
    ("flash_attention_2", flash),
    ("virtual tokens", prompt_tuning),
]


@pytest.mark.parametrize(("reason", "build"), REFUSED, ids=[f"{i}-{reason}" for i, (reason, _) in enumerate(REFUSED)])
def test_refused(reason: str, build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = build()
    assert reason in why_not_shared(model)


@pytest.mark.parametrize("part", ["vision_config", "audio_config"])
def test_a_part_beside_the_text_is_refused(part: str) -> None:
    """A config that is flat, as Phi-4-multimodal's is."""
    model = tiny("Llama")
    setattr(model.config, part, transformers.PreTrainedConfig())
    assert "more than text" in why_not_shared(model)
