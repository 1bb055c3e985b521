"""The comparison with the model's own logits: what it lets pass, what it notices, and that nothing changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_shared_prompt import EAGER_ONLY, MODELS, collated, random_batch, tiny
from torch import Tensor, nn

from trl_margins.forward import checked, shared_prompt, shared_rows
from trl_margins.forward.checked import Ways, checked_ways
from trl_margins.forward.precision import in_float32, why_not_float32
from trl_margins.forward.standard import IGNORE

BOTH = Ways(fused=True, shared=True)
NARROW = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_in(name: str, compute: str) -> tuple[nn.Module, torch.dtype | None]:
    model = tiny(name, "eager" if name in EAGER_ONLY else "sdpa", initializer_range=0.1).eval()
    return (model if NARROW[compute] is None else model.to(NARROW[compute])), NARROW[compute]


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def check(model: nn.Module, dtype: torch.dtype | None, ways: Ways = BOTH, seed: int = 0) -> Ways:
    return checked_ways(model, **random_batch(seed=seed), ways=ways, dtype=dtype)


@pytest.mark.parametrize("compute", NARROW)
@pytest.mark.parametrize("name", MODELS)
def test_healthy_passes_agree(name: str, compute: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trl_margins")
    model, dtype = model_in(name, compute)
    before = {key: (value, value.data_ptr(), value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    assert check(model, dtype) == BOTH  # transformers puts hooks of its own into some models
    hooks = n_hooks(model)
    for seed in range(2):
        caplog.clear()
        assert check(model, dtype, seed=seed) == BOTH
        assert caplog.messages[0].startswith(
            "log-probabilities match the model's own logits: on one pair in float32, "
        )
        assert len(caplog.messages) == 1
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is tensor and tensor.data_ptr() == at for key, (tensor, at, _) in before.items())
    assert all(torch.equal(after[key], values) for key, (_, _, values) in before.items())
    assert n_hooks(model) == hooks


def positions_shifted(rows: dict[str, Tensor]) -> None:
    own = rows["start"] > rows["prompt_start"]
    rows["position_ids"] = rows["position_ids"] + own


def first_token_hidden(rows: dict[str, Tensor]) -> None:
    rows["prompt_start"] = rows["prompt_start"] + 1
    rows["position_ids"] = rows["position_ids"] - 1


def last_prompt_token_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = shared_prompt._visible

    def wrong(rows: Any, window: int | None) -> Callable[..., Tensor]:
        visible = right(rows, window)
        length = rows["position_ids"] - (torch.arange(rows["start"].size(1)) - rows["start"])
        end = rows["prompt_start"] + length
        return lambda row, head, query, key: (
            visible(row, head, query, key) & ((key != end[row, query] - 1) | (key == query))
        )

    monkeypatch.setattr(shared_prompt, "_visible", wrong)


def change_rows(change: Callable[[dict[str, Tensor]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = shared_rows.shared_rows

        def wrong(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            rows = dict(right(*args, **kwargs))
            change(rows)
            return rows

        monkeypatch.setattr(checked, "shared_rows", wrong)

    return patch


@pytest.mark.parametrize("compute", NARROW)
@pytest.mark.parametrize(
    "fault",
    [change_rows(positions_shifted), change_rows(first_token_hidden), last_prompt_token_missed],
    ids=["positions + 1", "hidden first token", "missed last token of the prompt"],
)
def test_small_faults_are_noticed_in_any_precision(
    fault: Callable[[pytest.MonkeyPatch], None],
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of these are within what 16 bits differ by anyway."""
    model, dtype = model_in("Llama", compute)
    fault(monkeypatch)
    assert check(model, dtype) == Ways(fused=True, shared=False)
    (line,) = caplog.messages
    assert "against the model's own logits, on one pair in float32, the shared-prompt forward pass differs by" in line
    assert line.endswith("each prompt is computed once per completion. Please report the model: LlamaForCausalLM")


def test_a_neighbour_in_the_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one pair is in the row twice."""
    right = shared_prompt._visible

    def wrong(rows: Any, window: int | None) -> Callable[..., Tensor]:
        begins = torch.zeros_like(rows["start"])
        return right({**rows, "start": begins.where(rows["start"] == rows["prompt_start"], rows["start"])}, window)

    monkeypatch.setattr(shared_prompt, "_visible", wrong)
    assert check(*model_in("Llama", "float32")) == Ways(fused=True, shared=False)


def test_a_crash_is_a_difference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(checked, "fused_token_logps", crash)
    assert check(*model_in("Llama", "bfloat16")) == Ways(fused=False, shared=True)
    (line,) = caplog.messages
    assert "TRL's fused LM head fails (tolerance 1e-04; AttributeError: no such thing): log-probabilities come" in line


def test_want_of_memory_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(checked, "fused_token_logps", crash)
    with pytest.raises(torch.OutOfMemoryError):
        check(*model_in("Llama", "float32"))


def test_what_crashes_in_16_bits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = checked.shared_token_logps

    def crash(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if model.lm_head.weight.dtype == torch.bfloat16:
            raise RuntimeError("attn_mask dtype")
        return right(model, *args, **kwargs)

    monkeypatch.setattr(checked, "shared_token_logps", crash)
    assert check(*model_in("Llama", "bfloat16")) == Ways(fused=True, shared=False)
    assert check(*model_in("Llama", "float32")) == BOTH


def test_weights_that_cannot_be_widened(caplog: pytest.LogCaptureFixture) -> None:
    """Quantized ones, say: then in the model's own type, in which only gross errors show."""
    caplog.set_level(logging.INFO, "trl_margins")
    model, dtype = model_in("Llama", "bfloat16")
    model.model.layers[0].quantized = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    assert "quantized weights (model.layers.0.quantized)" in why_not_float32(model)
    assert check(model, dtype) == BOTH
    assert "on one pair in bfloat16" in caplog.messages[0]


def test_logits_that_fail_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, dtype = model_in("Llama", "float32")

    def crash(*args: Any, **kwargs: Any) -> None:
        raise TypeError("needs something else")

    monkeypatch.setattr(checked, "_own", crash)
    assert check(model, dtype) == BOTH
    assert "which fail: TypeError: needs something else" in caplog.text


class Ranks:
    """Two ranks as two threads, each with a model of its own; a gather that one of them misses fails on the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier, self.values = threading.Barrier(2, timeout=30), {}
        self.n_gathers, self.n_passes = [0, 0], [0, 0]
        monkeypatch.setattr(checked, "ieee_float32", nullcontext)  # its switches are those of all threads

    def max_over_ranks(self, rank: int) -> Callable[[Tensor], Tensor]:
        def largest(values: Tensor) -> Tensor:
            self.n_gathers[rank] += 1
            self.values[rank] = values
            self.barrier.wait()
            found = torch.stack([self.values[0], self.values[1]]).amax(0)
            self.barrier.wait()
            return found

        return largest

    def check(self, change: Callable[[nn.Module], None], batches: tuple[int, int] = (0, 0)) -> list[Ways]:
        """What the ranks find, when the second one's model is changed."""
        models = [model_in("Llama", "float32")[0] for _ in range(2)]
        for rank, model in enumerate(models):
            model.model.register_forward_pre_hook(lambda *_, rank=rank: self.count(rank))
        change(models[1])

        def one(rank: int) -> Ways:
            rows = random_batch(seed=batches[rank])
            return checked_ways(models[rank], **rows, ways=BOTH, max_over_ranks=self.max_over_ranks(rank))

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    def count(self, rank: int) -> None:
        self.n_passes[rank] += 1


def fails_alone(model: nn.Module) -> None:
    """In the model's own pass."""

    def fail(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].size(0) == 1 and "use_cache" in kwargs:
            raise RuntimeError("here alone")

    model.register_forward_pre_hook(fail, with_kwargs=True)


def other_head(model: nn.Module) -> None:
    """Fused log-probabilities that are not those of the model's own logits."""
    fused = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = fused(*args, **kwargs)
        if hasattr(output, "log_probs"):
            output.log_probs = output.log_probs + 0.01
        return output

    model.forward = forward


def nothing(model: nn.Module) -> None: ...


@pytest.mark.parametrize(
    ("change", "right", "passes"),
    [
        (nothing, BOTH, 2 + 1 + 2),
        (other_head, Ways(fused=False, shared=True), 2 + 1 + 1 + 1),
        (fails_alone, BOTH, None),
    ],
)
def test_ranks_come_to_the_same_end(
    change: Callable[[nn.Module], None],
    right: Ways,
    passes: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By the same passes, in which a sharded model's ranks wait for each other."""
    ranks = Ranks(monkeypatch)
    assert ranks.check(change) == [right, right]
    assert ranks.n_gathers[0] == ranks.n_gathers[1]
    if passes is None:
        said = sorted(line for line in caplog.messages if "which fail: " in line)
        assert [line.split("which fail: ")[1] for line in said] == ["RuntimeError: here alone", "on another rank"]
    else:
        assert ranks.n_passes == [passes, passes]


def prompts_with(*kept: int) -> dict[str, Tensor]:
    """Four prompts, the later the longer. Those that are not kept fill max_length: there is no answer after them."""
    prompts = [[3 + i] * (2 + 4 * i) for i in range(4)]
    return collated(
        [
            [(prompt, [7] * (i + 1) * (i in kept)), (prompt, [8] * (i + 2) * (i in kept))]
            for i, prompt in enumerate(prompts)
        ]
    )


@pytest.mark.parametrize("kept", range(4))
def test_a_prompt_without_answers_is_not_the_one(kept: int) -> None:
    _, _, labels = checked.one_prompt(tiny("Llama"), **prompts_with(kept), k=2)
    assert (labels != IGNORE).sum(1).tolist() == [kept + 1, kept + 2]


def test_where_nothing_can_be_compared_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trl_margins")
    assert checked_ways(tiny("Llama").eval(), **prompts_with(), ways=BOTH) == BOTH
    (line,) = caplog.messages
    assert line.endswith("not compared with the model's own logits, since the pair has no completion tokens")


def test_autocast_is_off_and_on_again() -> None:
    """As accelerate wraps a model: float32 weights that compute in bfloat16."""
    model = tiny("Llama").eval()
    plain = model.forward
    model._original_forward = plain
    model.forward = torch.autocast("cpu", torch.bfloat16)(plain)
    wrapped = model.forward
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        narrow = model(input_ids=ids).logits
        with in_float32(model, layer_by_layer=True):
            wide = model(input_ids=ids).logits
        assert model.forward is wrapped
        torch.testing.assert_close(wide, plain(input_ids=ids).logits, rtol=0, atol=0)
        assert torch.equal(model(input_ids=ids).logits, narrow)
    assert narrow.dtype == torch.bfloat16


def test_one_layer_at_a_time() -> None:
    model, _ = model_in("Llama", "bfloat16")
    layers, widest = model.model.layers, []

    def watch(*args: Any) -> None:
        widest.append([layer.mlp.up_proj.weight.dtype == torch.float32 for layer in layers])

    for layer in layers:
        layer.self_attn.register_forward_pre_hook(watch)
    with torch.no_grad(), in_float32(model, layer_by_layer=True):
        model(input_ids=torch.arange(3, 12)[None])
    assert widest == [[True, False], [False, True]]
    layers[1].mlp.forward = _fail
    with pytest.raises(KeyError), torch.no_grad(), in_float32(model, layer_by_layer=True):
        model(input_ids=torch.arange(3, 12)[None])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def _fail(*args: Any) -> None:
    raise KeyError
