"""What TRL's trainers take, ours take: with the numbers of TRL's, or of our own run without the feature."""

from __future__ import annotations

import copy
import logging
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY, VOCABULARY, byte_tokenizer, load, preference_rows, quiet, saved
from datasets import Dataset, Image, List
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import BEMACallback, DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer, cpo_trainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.pairs import CARRIED, SHARED, one_pair
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

BASES, SHARING = ("cpo", "dpo"), ("never", "always")
OURS = {"cpo": (MarginCPOTrainer, MarginCPOConfig), "dpo": (MarginDPOTrainer, MarginDPOConfig)}
TRLS = {"cpo": (CPOTrainer, CPOConfig), "dpo": (DPOTrainer, DPOConfig)}
ROWS, EVAL_ROWS = preference_rows(8), preference_rows(6, seed=1, scores=lambda i: (5.0, 1.0))
TOKENIZER = byte_tokenizer()
OUT_OF_MEMORY = RuntimeError("CUDA out of memory.")  # what transformers looks for in a message

Steps = dict[str, Tensor]


def built(kinds: tuple[type, type], model: Any, out: Path, options: dict[str, Any], **arguments: Any) -> Any:
    """A trainer for two steps of SGD, under which weights differ no more than gradients do."""
    trainer, config = kinds
    settings = {"max_steps": 2, "learning_rate": 1e-2, "optim": "sgd", "lr_scheduler_type": "constant", **options}
    return trainer(
        model,
        args=config(**quiet(output_dir=str(out), **settings)),
        **{"train_dataset": ROWS, "processing_class": TOKENIZER, **arguments},
    )


def of(name: str, base: str) -> tuple[type, type]:
    return trainer_class(name, base), config_class(name, base)


def weights(model: nn.Module) -> Steps:
    return {name: p.detach().clone().float() for name, p in model.named_parameters() if p.is_floating_point()}


def trained(*args: Any, **kwargs: Any) -> tuple[Any, Steps]:
    """A trainer after its run, and how far each parameter went."""
    trainer = built(*args, **kwargs)
    before = weights(trainer.model)
    trainer.train()
    return trainer, {name: value - before[name] for name, value in weights(trainer.model).items()}


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_steps(ours: Steps, theirs: Steps, rtol: float = 1e-4) -> None:
    """Relative to each tensor's longest step, and to what rounding the weights takes from it."""
    assert ours.keys() == theirs.keys()
    assert any(step.any() for step in theirs.values())
    for name, step in theirs.items():
        torch.testing.assert_close(ours[name], step, rtol=0, atol=rtol * step.abs().max().item() + 5e-7)


def assert_equal(ours: Steps, theirs: Steps) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    assert any(step.any() for step in theirs.values())
    assert not [name for name, step in theirs.items() if not torch.equal(ours[name], step)]


def as_trl(
    base: str,
    model: Callable[[], Any],
    out: Path,
    options: dict[str, Any],
    arguments: Callable[[], dict[str, Any]] = dict,
    share: str = "always",
    rtol: float = 1e-4,
) -> tuple[Any, Any]:
    """Trains ours and TRL's: the same losses, the same steps of the same parameters."""
    own = {"share_prompt": share, **({"tokenization": "cpo"} if base == "cpo" else {})}
    ours, our_steps = trained(OURS[base], model(), out / "ours", {**own, **options}, **arguments())
    theirs, their_steps = trained(TRLS[base], model(), out / "trl", options, **arguments())
    assert len(logged(ours)) >= 2
    assert logged(ours) == pytest.approx(logged(theirs), rel=max(1e-5, rtol / 10))
    assert_same_steps(our_steps, their_steps, rtol)
    return ours, theirs


# Adapters

ADAPTERS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole-head": {"modules_to_save": ["lm_head"]},
}


def lora(**options: Any) -> LoraConfig:
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(r=4, lora_alpha=8, **{**targets, **options})


@pytest.mark.parametrize(("kind", "share"), [("DoRA", "never"), *((kind, "always") for kind in ADAPTERS)])
@pytest.mark.parametrize("base", BASES)
def test_adapters(base, kind, share, tiny_model, tmp_path):
    """On the DPO base the reference is the model without them. Merged, the model is the same."""

    def arguments() -> dict[str, Any]:
        return {"peft_config": lora(**ADAPTERS[kind], init_lora_weights=kind == "whole-head")}

    trainer, _ = as_trl(base, lambda: load(tiny_model), tmp_path, {"learning_rate": 1e-3}, arguments, share)
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
        n for n in weights(trainer.model) if "lora_" in n or "modules_to_save" in n
    }
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        adapted = trainer.model(input_ids=ids).logits
        merged = trainer.model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("base", BASES)
def test_a_pretrained_adapter_goes_on(base, share, tiny_model, tmp_path):
    """On the DPO base the reference is the adapter as it was, not the model without it."""
    get_peft_model(load(tiny_model), lora(init_lora_weights=False)).save_pretrained(tmp_path / "adapter")

    def model() -> PeftModel:
        return PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter", is_trainable=True)

    ours, _ = as_trl(base, model, tmp_path, {"learning_rate": 1e-3}, share=share)
    if base == "dpo":
        assert logged(ours, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-5)
        start = dict(model().named_parameters())
        kept = {name: value for name, value in ours.model.named_parameters() if ".ref." in name}
        assert kept
        for name, value in kept.items():
            assert torch.equal(value, start[name.replace(".ref.", ".default.")])


def test_prompt_tuning(tiny_model, tmp_path):
    def arguments() -> dict[str, Any]:
        return {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}

    ours, _ = as_trl("dpo", lambda: load(tiny_model), tmp_path, {}, arguments, share="auto")
    assert ours._sharing.decided is False
    ours, _ = trained(OURS["cpo"], load(tiny_model), tmp_path / "cpo", {}, **arguments())
    assert np.isfinite(logged(ours)).all()
    with pytest.raises(ValueError, match="batch_size"):  # TRL's own does not
        trained(TRLS["cpo"], load(tiny_model), tmp_path / "cpo-trl", {}, **arguments())


COMPUTED = {
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4),
    "PREFIX_TUNING": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=4
    ),
    "VBLORA": VBLoRAConfig(num_vectors=4, vector_length=2, r=2, topk=2, save_only_topk_weights=True),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_adapters_that_peft_saves_in_another_form(kind, tiny_model, tmp_path, caplog):
    """Of virtual tokens that are computed, not what is trained: loaded into a run, they would be another adapter."""

    def run(**options: Any) -> Any:
        config = copy.deepcopy(COMPUTED[kind])
        return built(
            OURS["cpo"],
            load(tiny_model),
            tmp_path,
            {"save_steps": 1, **options},
            peft_config=config,
            eval_dataset=ROWS,
        )

    run(save_strategy="steps").train()
    why = f"PEFT saves the virtual tokens of a {kind} adapter, and not what is trained to compute them"
    why = "with save_only_topk_weights, PEFT saves a part of what VB-LoRA trains" if kind == "VBLORA" else why
    assert f"no checkpoint of this run can be resumed: {why}" in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-1 cannot be resumed: {why}"):
        run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match=f"the best checkpoint cannot be loaded at the end: {why}"):
        run(load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps").train()


def test_a_model_with_an_adapters_layers_alone_is_refused(tiny_model, tmp_path):
    """What it saves, nothing could load."""
    model = get_peft_model(load(tiny_model), lora())
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM with an adapter's layers in it"):
        built(OURS["cpo"], model.get_base_model(), tmp_path, {})


def test_dispatched_batches_are_not_cut(tiny_model, tmp_path):
    """accelerate would cut the rows that share their prompt to the number of pairs."""
    losses = [
        logged(trained(OURS["dpo"], load(tiny_model), tmp_path, {"accelerator_config": {"dispatch_batches": each}})[0])
        for each in (None, True)
    ]
    assert losses[0] == losses[1]


def test_train_only_beside_adapters_is_refused(tiny_model, tmp_path):
    """It would have trained the reference's adapter and the weights under it."""
    model = get_peft_model(load(tiny_model), lora())
    with pytest.raises(ValueError, match="train_only and the model's adapters both choose what trains"):
        built(OURS["dpo"], model, tmp_path, {"train_only": "mlp"})


# Quantized models


class FourBit(nn.Linear):
    """A frozen layer of 16 levels kept as whole numbers: what a 4-bit layer is to a trainer."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, None
        self.scale = layer.weight.detach().abs().max().item() / 7.5
        levels = (layer.weight.detach() / self.scale + 7.5).round().to(torch.uint8)
        self.weight = nn.Parameter(levels, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.to(x.dtype) - 7.5) * self.scale)


def stand_in(folder: str) -> Any:
    model = load(folder)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, FourBit(module))
    model.is_loaded_in_4bit = True
    model.num_parameters = lambda **kwargs: 0  # transformers would ask bitsandbytes
    return model


def nf4(folder: str) -> Any:
    pytest.importorskip("bitsandbytes")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)


QUANTIZED = pytest.mark.parametrize("quantized", [stand_in, nf4], ids=["stand-in", "bitsandbytes"])


@QUANTIZED
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_qlora(base, checkpointing, quantized, tiny_model, tmp_path):
    """On the DPO base TRL keeps the adapters in bfloat16."""
    options = {"gradient_checkpointing": checkpointing, "learning_rate": 1e-3}
    as_trl(
        base,
        lambda: quantized(tiny_model),
        tmp_path,
        options,
        lambda: {"peft_config": lora(init_lora_weights=False)},
        rtol={"cpo": 1e-4, "dpo": 2e-2}[base],
    )


def test_qlora_under_autocast(tiny_model, tmp_path):
    """CPOTrainer then casts the adapters, and computes under an autocast of its own."""
    arguments = {"peft_config": lora(init_lora_weights=False)}
    runs = [
        trained(kinds["cpo"], stand_in(tiny_model), tmp_path / str(i), {"bf16": True}, **arguments)[0]
        for i, kinds in enumerate((OURS, TRLS))
    ]
    assert all(run._peft_has_been_casted_to_bf16 for run in runs)
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=2e-2)


@QUANTIZED
@pytest.mark.parametrize("base", BASES)
def test_the_anchor_moves_adapters_alone(base, quantized, tiny_model, tmp_path):
    """Estimators agree, but for the curvature and the 16 bits in which DPOTrainer keeps adapters."""
    gaps = []
    # in evaluation mode, in which share_prompt="auto" compares and float32 measures, bitsandbytes' CPU layers change
    for estimator in ("difference", "per-pair", *(["float32"] if quantized is stand_in else [])):
        model = quantized(tiny_model)
        frozen = [p.detach().clone() for p in model.parameters()]
        options = {"anchor_estimator": estimator, "learning_rate": 0.1, "share_prompt": "always"}
        arguments = {"peft_config": lora(init_lora_weights=False)}
        out = tmp_path / estimator
        trainer, steps = trained(of("geometric-anchor", base), model, out, options, **arguments)
        moved = trainer._probes[0].parameters
        assert all(p.is_floating_point() and "lora_" in name for name, p in moved.items())
        assert {name for name, step in steps.items() if step.any()} == moved.keys()
        after = [p for name, p in trainer.model.named_parameters() if "lora_" not in name]
        assert all(torch.equal(now, then) for now, then in zip(after, frozen, strict=True))
        gaps.append(logged(trainer, "anchor/gap/mean")[0])
    assert gaps[0] > 0
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=0.25)


# Checkpointing and offloading


METHODS = ("gappo", "geometric-anchor", "gradient-norm", "simpo-sam")


@pytest.fixture(scope="module")
def plain_run(tiny_model, tmp_path_factory) -> Callable[..., Steps]:
    """A method's run without the feature."""
    found: dict[tuple[str, ...], Steps] = {}

    def run(*key: str) -> Steps:
        if key not in found:
            base, name, share = key
            out = tmp_path_factory.mktemp("plain")
            found[key] = trained(of(name, base), load(tiny_model), out, {"share_prompt": share})[1]
        return found[key]

    return run


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("base", "name", "share"),
    [
        *(("cpo", name, "always") for name in METHODS),
        *((base, "geometric-anchor", "never") for base in BASES),
        ("dpo", "gappo", "always"),
    ],
)
def test_gradient_checkpointing(base, name, reentrant, share, plain_run, tiny_model, tmp_path, caplog):
    """A reentrant one cannot give the single gradients that a probe asks for: it is then the other kind."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with caplog.at_level(logging.WARNING, "trl_margins"):
        _, steps = trained(of(name, base), load(tiny_model), tmp_path, {"share_prompt": share, **options})
    assert_equal(steps, plain_run(base, name, share))
    assert ("using use_reentrant=False instead" in caplog.text) == (reentrant and name != "gappo")


@pytest.mark.filterwarnings("error:.*gradient_checkpointing:FutureWarning")
def test_checkpointing_of_some_layers_beside_a_reference(tiny_model, tmp_path):
    """The reference's forward pass runs without it, and puts it back as it was."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
    _, plain = trained(OURS["dpo"], load(tiny_model), tmp_path / "plain", {})
    trainer, steps = trained(OURS["dpo"], load(tiny_model), tmp_path, options)
    assert trainer.ref_model is not None
    assert_equal(steps, plain)
    layers = [layer.gradient_checkpointing for layer in trainer.model.model.layers]
    assert any(layers)
    assert not all(layers)


@pytest.mark.parametrize("name", METHODS)
def test_activation_offloading(name, plain_run, tiny_model, tmp_path, monkeypatch):
    """TRL's needs an accelerator: here activations go to a list and back. A graph that was kept for the update would
    have been made outside."""
    offloaded: list[Tensor] = []

    def away(activation: Tensor) -> int:
        offloaded.append(activation.clone())
        return len(offloaded) - 1

    hooks = torch.autograd.graph.saved_tensors_hooks(away, offloaded.__getitem__)
    monkeypatch.setattr(dpo_trainer, "get_act_offloading_ctx_manager", lambda model: hooks)
    options = {"activation_offloading": True, "share_prompt": "always"}
    if name == "geometric-anchor":
        options["anchor_keep_graphs"] = 4
    _, steps = trained(of(name, "dpo"), load(tiny_model), tmp_path, options)
    assert len(offloaded) > 100
    assert_equal(steps, plain_run("dpo", name, "always"))


# The reference model


@pytest.mark.parametrize("share", SHARING)
def test_precomputed_references(share, tiny_model, tmp_path):
    """For training and evaluation sets, and for one that comes later."""

    def arguments() -> dict[str, Any]:
        return {"ref_model": load(tiny_model), "eval_dataset": {"one": EVAL_ROWS, "two": ROWS}}

    def model() -> Any:
        return load(tiny_model, noise=0.02)

    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    before, theirs = as_trl("dpo", model, tmp_path, options, arguments, share)
    each, _ = trained(OURS["dpo"], model(), tmp_path / "each", {"share_prompt": share}, **arguments())
    assert logged(before) == pytest.approx(logged(each), rel=1e-5)
    found = [trainer.evaluate() | trainer.evaluate(ROWS, metric_key_prefix="later") for trainer in (before, each)]
    for name in ("eval_one_loss", "eval_two_loss", "eval_two_pwa_all", "later_loss"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name
    assert found[0]["eval_one_loss"] == pytest.approx(theirs.evaluate()["eval_one_loss"], rel=1e-5)


def test_precomputed_references_of_a_set_that_comes_later(tiny_model, tmp_path):
    """As if the reference model were there; without one, it is too late after the first step."""
    rows = preference_rows(3)
    found = []
    for precompute in (False, True):
        options = {"precompute_ref_log_probs": precompute, "learning_rate": 1e-2}
        trainer = built(OURS["dpo"], load(tiny_model), tmp_path, options, ref_model=load(tiny_model))
        trainer.train()
        found.append([trainer.predict(rows).metrics["test_loss"], trainer.evaluate(rows)["eval_loss"]])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0][0] == pytest.approx(found[0][1], abs=1e-6)
    trainer = built(OURS["dpo"], load(tiny_model), tmp_path, {"precompute_ref_log_probs": True})
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    with pytest.raises(ValueError, match="keeps no reference model, and the test data set was not there before"):
        trainer.predict(rows)


def test_a_model_made_in_code_needs_a_reference(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    with pytest.raises(ValueError, match=r"made in code.*pass ref_model=copy.deepcopy"):
        built(OURS["dpo"], model, tmp_path, {})
    for given in ({"ref_model": copy.deepcopy(model)}, {"options": {"precompute_ref_log_probs": True}}):
        built(OURS["dpo"], model, tmp_path, **{"options": {}, **given})


@pytest.mark.parametrize("share", SHARING)
def test_a_reference_that_follows(share, tiny_model, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "max_steps": 3}
    ours, theirs = as_trl("dpo", lambda: load(tiny_model), tmp_path, options, share=share)
    moved = weights(ours.ref_model)
    start = weights(load(tiny_model))
    assert any(not torch.equal(value, start[name]) for name, value in moved.items())
    for name, value in weights(theirs.ref_model).items():
        torch.testing.assert_close(moved[name], value, rtol=0, atol=1e-5)
    two, _ = trained(OURS["dpo"], load(tiny_model), tmp_path / "two", {"share_prompt": share, "max_steps": 2})
    for name, value in weights(two.model).items():
        torch.testing.assert_close(moved[name], 0.25 * value + 0.75 * start[name])


# Data


@pytest.mark.parametrize("base", BASES)
def test_a_stream_that_ends_before_a_step(base, tiny_model, tmp_path):
    """transformers would read it again without end."""
    kinds, options = (
        of("gappo", base),
        {"gradient_accumulation_steps": len(ROWS) + 1, "per_device_train_batch_size": 1},
    )
    with pytest.raises(ValueError, match=f"the stream ends before the {len(ROWS) + 1} mini-batches of 1 pairs"):
        trained(kinds, load(tiny_model), tmp_path, options, train_dataset=ROWS.to_iterable_dataset())


@pytest.mark.parametrize("base", BASES)
def test_a_stream_is_the_rows_in_their_order(base, tiny_model, tmp_path):
    """On the CPO base too, where TRL's trainer takes none."""
    stream, options = ROWS.to_iterable_dataset(), {"train_sampling_strategy": "sequential"}
    kinds = of("gappo", base)
    _, steps = trained(kinds, load(tiny_model), tmp_path / "a", options, train_dataset=stream)
    _, expected = trained(kinds, load(tiny_model), tmp_path / "b", options)
    assert_equal(steps, expected)
    if base == "dpo":
        as_trl("dpo", lambda: load(tiny_model), tmp_path, {}, lambda: {"train_dataset": ROWS.to_iterable_dataset()})


@pytest.mark.parametrize("base", BASES)
def test_several_evaluation_sets(base, tiny_model, tmp_path):
    """Metrics of each; the best checkpoint is that of the one that is named, and is what is left at the end."""
    options = {
        **{"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "learning_rate": 0.1, "max_steps": 4},
        **{"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_far_pwa", "greater_is_better": True},
    }
    sets = {"near": ROWS, "far": EVAL_ROWS}
    trainer, _ = trained(of("gappo", base), load(tiny_model), tmp_path, options, eval_dataset=sets)
    history = trainer.state.log_history
    assert history[0]["step"] == 0
    assert "eval_near_pwa" in history[0]
    found = {entry["step"]: entry["eval_far_pwa"] for entry in history if "eval_far_pwa" in entry}
    assert list(found) == [0, 1, 2, 3, 4]
    best = trainer.state.best_global_step
    assert found[best] == max(value for step, value in found.items() if step)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}", dtype=torch.float32)
    assert all(torch.equal(value, weights(trainer.model)[name]) for name, value in weights(kept).items())
    assert not list(tmp_path.glob("checkpoint-*/optimizer.pt"))
    again = trainer.predict(trainer.eval_dataset["far"]).metrics
    assert again["test_pwa"] == trainer.evaluate()["eval_far_pwa"] == found[best]


@pytest.mark.parametrize("base", BASES)
def test_evaluating_on_start_changes_nothing(base, plain_run, tiny_model, tmp_path):
    options = {"eval_on_start": True, "eval_strategy": "no", "share_prompt": "always"}
    trainer, steps = trained(of("gappo", base), load(tiny_model), tmp_path, options, eval_dataset=EVAL_ROWS)
    assert "eval_loss" in trainer.state.log_history[0]
    assert_equal(steps, plain_run(base, "gappo", "always"))


@dataclass
class Noting(DataCollatorForPreference):
    seen: list[int] = field(default_factory=list)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        self.seen.append(len(examples))
        return super().torch_call(examples)


COLLATORS = {
    ("cpo", "TRL's"): lambda: DPODataCollatorWithPadding(pad_token_id=0),
    ("cpo", "function"): lambda: lambda rows: DPODataCollatorWithPadding(pad_token_id=0)(rows),
    ("dpo", "subclass"): lambda: Noting(pad_token_id=0),
    ("dpo", "function"): lambda: lambda rows: DataCollatorForPreference(pad_token_id=0)(rows),
}


@pytest.mark.parametrize(("base", "kind"), COLLATORS)
def test_a_collator_of_ones_own(base, kind, plain_run, tiny_model, tmp_path):
    """Scores still reach the objective. On the CPO base, TRL's own trainer leaves a collator no columns by default."""
    collator = COLLATORS[base, kind]()
    options = {"share_prompt": "always"}
    trainer, steps = trained(of("gappo", base), load(tiny_model), tmp_path, options, data_collator=collator)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert batch[CARRIED]["score_chosen"].tolist() == ROWS["score_chosen"][:2]
    assert_equal(steps, plain_run(base, "gappo", "always"))
    if base == "cpo":  # CPOTrainer's own collator reads all columns, and one's own gets what the config says
        assert trainer.args.remove_unused_columns
        assert not built(of("gappo", base), load(tiny_model), tmp_path, options).args.remove_unused_columns
    if isinstance(collator, Noting):
        assert collator.seen == [4, 4, 2]


def test_worker_processes(plain_run, tiny_model, tmp_path):
    options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "share_prompt": "always"}
    _, steps = trained(of("gappo", "cpo"), load(tiny_model), tmp_path, options)
    assert_equal(steps, plain_run("cpo", "gappo", "always"))


@pytest.mark.parametrize("base", BASES)
def test_a_collator_can_be_sent(base, tiny_model, tmp_path):
    """As it is to workers that start anew, on macOS say."""
    trainer = built(of("gappo", base), load(tiny_model), tmp_path, {"share_prompt": "always"})
    rows = [trainer.train_dataset[i] for i in range(3)]
    ours, sent = trainer.data_collator(rows), pickle.loads(pickle.dumps(trainer.data_collator))(rows)
    assert torch.equal(ours[SHARED]["of_completions"], sent[SHARED]["of_completions"])
    assert torch.equal(ours[CARRIED]["score_chosen"], sent[CARRIED]["score_chosen"])


def test_a_set_that_lacks_a_column(tiny_model, tmp_path):
    """Evaluation factors are added to the sets that a trainer is built with, not to one that comes later."""
    trainer = built(of("gap-aware", "dpo"), load(tiny_model), tmp_path, {})
    with pytest.raises(ValueError, match=r"reads \['evaluation_factor'\], which these rows do not have"):
        trainer.evaluate(EVAL_ROWS)


# What a trainer is called with


@pytest.mark.rehearsal
@pytest.mark.parametrize("base", BASES)
def test_an_optimizer_of_ones_own(base, tiny_model, tmp_path):
    runs = []
    for kinds in (OURS[base], TRLS[base]):
        model = load(tiny_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        options = {"max_steps": 3, **({"tokenization": "cpo"} if kinds == OURS["cpo"] else {})}
        runs.append(trained(kinds, model, tmp_path, options, optimizers=(optimizer, schedule)))
        assert logged(runs[-1][0], "learning_rate") == pytest.approx([0.02, 0.01, 0.02 / 3])
    assert logged(runs[0][0]) == pytest.approx(logged(runs[1][0]), rel=1e-4)
    assert_same_steps(runs[0][1], runs[1][1], rtol=1e-3)


class Watch(TrainerCallback):
    """Notes the weights at every event."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def _note(self, event: str, model: nn.Module) -> None:
        self.seen.append((event, sum(p.detach().double().abs().sum().item() for p in model.parameters())))

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._note("begin", model)

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._note("before", model)

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._note("end", model)


@pytest.mark.parametrize(("base", "name"), [("cpo", "simpo-sam"), ("dpo", "geometric-anchor")])
def test_callbacks_see_the_policy(base, name, tiny_model, tmp_path):
    """Never the worse policy at which something was measured."""
    watch = Watch()
    trained(of(name, base), load(tiny_model), tmp_path, {}, callbacks=[watch])
    events, sizes = zip(*watch.seen, strict=True)
    assert events == ("begin", "before", "end") * 2
    assert sizes[0] == sizes[1] != sizes[2] == sizes[3] == sizes[4] != sizes[5]


@pytest.mark.parametrize("base", BASES)
def test_moving_averages(base, tiny_model, tmp_path):
    """TRL's callback: an exponential moving average of the policy."""
    callbacks: list[BEMACallback] = []

    def arguments() -> dict[str, Any]:
        callbacks.append(BEMACallback(update_freq=1, update_after=0))
        return {"callbacks": [callbacks[-1]]}

    as_trl(base, lambda: load(tiny_model), tmp_path, {"max_steps": 3}, arguments)
    ours, theirs = (weights(callback.running_model) for callback in callbacks)
    start = weights(load(tiny_model))
    for name, value in theirs.items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch_eval_metrics": True, "eval_accumulation_steps": 1}], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_compute_metrics(base, options, tiny_model, tmp_path):
    """Predictions are TRL's: whole logits on the DPO base; on the CPO base the mean logits of each batch."""
    found: dict[str, list[Any]] = {}

    def metrics_of(whose: str) -> Callable[..., dict[str, float]]:
        def compute(prediction: Any, compute_result: bool = True) -> dict[str, float]:
            found.setdefault(whose, []).append((prediction.predictions, prediction.label_ids))
            return {"mine": float(np.mean(np.asarray(prediction.predictions)))}

        return compute

    evaluated = {}
    for whose, kinds in {"ours": OURS, "trl": TRLS}.items():
        arguments = {"eval_dataset": EVAL_ROWS, "compute_metrics": metrics_of(whose)}
        evaluated[whose] = built(kinds[base], load(tiny_model), tmp_path, options, **arguments).evaluate()
    assert "eval_mine" in evaluated["ours"]
    for ours, theirs in zip(found["ours"], found["trl"], strict=True):
        assert np.shape(ours[0]) == np.shape(theirs[0])
        assert np.array_equal(ours[1], theirs[1])
        if base == "dpo":
            np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    if base == "cpo" and not options:
        each = np.reshape(found["ours"][0][0], (-1, 2)).mean(0)  # of the two batches
        names = ("eval_logits/chosen", "eval_logits/rejected")
        assert each == pytest.approx([evaluated["ours"][name] for name in names], rel=1e-5)


def test_a_batch_that_does_not_fit(tiny_model, tmp_path):
    """`auto_find_batch_size`: memory runs out at the anchor, and the weights come back before the next try."""
    options = {"train_sampling_strategy": "sequential", "anchor_batch_multiplier": 1}
    kinds = of("geometric-anchor", "cpo")
    trainer = built(kinds, load(tiny_model), tmp_path / "a", {"auto_find_batch_size": True, **options})
    before, forward = weights(trainer.model), trainer.forward_pairs
    sizes: list[int] = []

    def passes(batch: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(trainer.n_pairs(batch))
        if len(sizes) == 2:
            assert any(not torch.equal(value, before[name]) for name, value in weights(trainer.model).items())
            raise OUT_OF_MEMORY
        return forward(batch, *args, **kwargs)

    trainer.forward_pairs = passes
    trainer.train()
    assert sizes[:2] == [4, 4]
    assert sizes[2] < 4
    steps = {name: value - before[name] for name, value in weights(trainer.model).items()}
    smaller = {"per_device_train_batch_size": sizes[2], **options}
    assert_equal(steps, trained(kinds, load(tiny_model), tmp_path / "b", smaller)[1])


def test_generation_during_evaluation(tiny_model, tmp_path, monkeypatch):
    """CPOTrainer sends answers of the policy to a tracker."""
    logged: list[Any] = []

    class Tracker:
        Table = staticmethod(lambda data: data)
        log = staticmethod(logged.append)

    monkeypatch.setattr(cpo_trainer, "is_wandb_available", lambda: True)
    monkeypatch.setattr(cpo_trainer, "wandb", Tracker, raising=False)
    for kinds in (OURS["cpo"], TRLS["cpo"]):
        options = {"generate_during_eval": True, "max_length": 48}
        options |= {"tokenization": "cpo"} if kinds == OURS["cpo"] else {}
        trainer = built(kinds, load(tiny_model), tmp_path, options, eval_dataset=EVAL_ROWS)
        trainer.args.report_to = ["wandb"]
        transformers.set_seed(0)
        trainer.evaluate()
    ours, theirs = (entry["game_log"] for entry in logged)
    assert set(ours["Prompt"]) <= set(EVAL_ROWS["prompt"])
    assert ours.values.tolist() == theirs.values.tolist()


# Mixture of experts


@pytest.fixture(scope="module", params=["Mixtral", "Qwen3Moe"])
def experts(request, tmp_path_factory) -> str:
    """Folder of a tiny mixture of experts; Mixtral's config asks for the router's logits, as CPOTrainer wants it."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {
        "Mixtral": {"num_local_experts": 4, "output_router_logits": True},
        "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    }[request.param]
    config = getattr(transformers, f"{request.param}Config")(
        **{
            "vocab_size": VOCABULARY,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.1,
        },
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "router_aux_loss_coef": 0.5, **shape, **more},
    )
    return saved(getattr(transformers, f"{request.param}ForCausalLM")(config), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("base", "options"), [("cpo", {}), ("dpo", {"router_aux_loss_coef": 0.05})], ids=str)
def test_mixture_of_experts(base, options, experts, tmp_path):
    """CPOTrainer adds the load-balancing loss where the config asks for the router's logits, DPOTrainer wherever there
    are some."""
    ours, theirs = as_trl(base, lambda: load(experts), tmp_path, options)
    assert ours.aux_loss_enabled == theirs.aux_loss_enabled == (base == "dpo" or "mixtral" in experts.lower())
    if base == "dpo":
        assert logged(ours, "aux_loss") == pytest.approx(logged(theirs, "aux_loss"), rel=1e-5)
        # at the first step, equal models have a loss of log 2
        balance = options["router_aux_loss_coef"] * logged(ours, "aux_loss")[0]
        assert logged(ours)[0] - balance == pytest.approx(np.log(2), abs=1e-4)


def test_experts_at_the_anchor(experts, tmp_path):
    """Their grouped products are computed at the anchor by both estimators."""
    gaps = {}
    for estimator in ("difference", "float32"):
        options = {"anchor_estimator": estimator, "max_steps": 1}
        trainer, _ = trained(of("geometric-anchor", "cpo"), load(experts), tmp_path, options)
        gaps[estimator] = logged(trainer, "anchor/gap/mean")[0]
    assert gaps["difference"] == pytest.approx(gaps["float32"], rel=1e-3)
    assert gaps["difference"] > 0


# Images

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
VISION = {"max_length": None}  # as TRL advises: images must not be cut


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> tuple[str, Any, Dataset]:
    """Folder of a tiny LLaVA, its processor, and pairs about images."""
    pictures = pytest.importorskip("PIL.Image")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 8, "width": 8}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), **shape, max_position_embeddings=256, initializer_range=0.2
        ),
        vision_config=transformers.CLIPVisionConfig(**shape, image_size=8, patch_size=4),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    rows, rng = preference_rows(8, "conversational").to_list(), np.random.default_rng(0)
    for row in rows:
        row["images"] = [pictures.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))]
    return str(folder), processor, Dataset.from_list(rows).cast_column("images", List(Image()))


def llava(folder: str) -> Any:
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.rehearsal
@pytest.mark.parametrize("images", [True, False], ids=["images", "text-alone"])
def test_vision(images, vision, tmp_path, caplog, monkeypatch, capsys):
    folder, processor, rows = vision
    rows = rows if images else preference_rows(8, "conversational")

    def arguments() -> dict[str, Any]:
        return {"train_dataset": rows, "eval_dataset": rows, "processing_class": processor}

    with caplog.at_level(logging.INFO, "trl_margins"):
        ours, theirs = as_trl("dpo", lambda: llava(folder), tmp_path, VISION, arguments, share="auto")
    assert "prompts are computed once per completion: a model of more than text" in caplog.text
    found, expected = ours.evaluate(), theirs.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert found["eval_n_pairs"] == 8
    seen = [
        not torch.equal(value, weights(llava(folder))[n]) for n, value in weights(ours.model).items() if "vis" in n
    ]
    assert any(seen) == images
    if images:
        ours.save_model()
        processor.save_pretrained(ours.args.output_dir)
        ours.create_model_card()
        check_card_of_images(Path(ours.args.output_dir), rows[0]["images"][0], monkeypatch, capsys)


def check_card_of_images(out: Path, picture: Any, monkeypatch: Any, capsys: Any) -> None:
    """It has the Hub's tag of such models, and its first block runs as it stands, beside a picture."""
    text = (out / "README.md").read_text()
    assert "\npipeline_tag: image-text-to-text\n" in text
    picture.save(out.parent / "picture.jpg")
    monkeypatch.chdir(out.parent)
    capsys.readouterr()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        *((name, "length-normalized") for name in ("gappo", "gap-aware", "geometric-anchor")),
        *((name, "log-ratio") for name in ("gamma-po", "amapo", "geometric-anchor")),
    ],
)
def test_methods_on_images(name, reward, vision, tmp_path):
    folder, processor, rows = vision
    arguments = {"train_dataset": rows, "processing_class": processor}
    trainer, steps = trained(of(name, "dpo"), llava(folder), tmp_path, {**VISION, "reward": reward}, **arguments)
    assert len(logged(trainer)) == 2
    assert np.isfinite(logged(trainer)).all()
    assert steps["model.multi_modal_projector.linear_1.weight"].any()


def test_what_images_cannot_do(vision, tmp_path):
    folder, processor, rows = vision
    arguments = {"train_dataset": rows, "processing_class": processor}
    with pytest.raises(ValueError, match="share_prompt='always' does not go with a model of more than text"):
        built(OURS["dpo"], llava(folder), tmp_path, {**VISION, "share_prompt": "always"}, **arguments)
    with pytest.raises(ValueError, match=r"`max_length` \(8\) is too short and causes image placeholder"):
        trained(OURS["dpo"], llava(folder), tmp_path, {"max_length": 8}, **arguments)
    with pytest.raises(ValueError, match="train_sampling_strategy='group_by_length': how long rows with images are"):
        trained(OURS["dpo"], llava(folder), tmp_path, {"train_sampling_strategy": "group_by_length"}, **arguments)
    # models that lay the patches of all images in a row, as Qwen2-VL's
    with pytest.raises(ValueError, match=r"shape \(64, 3\) in a batch of 4 pairs cannot be cut into pairs"):
        one_pair({"pixel_values": torch.zeros(64, 3)}, 0, 4)


# Options of transformers and TRL

EITHER: list[dict[str, Any]] = [
    {"max_length": 28, "label_smoothing": 0.2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    {"max_length": None, "disable_dropout": False, "optim": "adafactor", "learning_rate": 1e-3},
    {"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 3, "dataloader_drop_last": True},
    {"full_determinism": True, "torch_empty_cache_steps": 1, "include_num_input_tokens_seen": "all"},
]
CASES = [(base, options) for base in BASES for options in EITHER] + [
    # of encoder-decoder models the first
    ("cpo", {"max_completion_length": 8, "loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.1}),
    ("dpo", {"truncation_mode": "keep_end", "max_length": 28, "pad_to_multiple_of": 32, "pad_token": "</s>"}),
    # TRL says that the first does nothing at present
    ("dpo", {"padding_free": True, "ld_alpha": 0.5, "use_weighting": True}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "f_divergence_type": "js_divergence"}),
]


@pytest.mark.parametrize(("base", "options"), CASES, ids=str)
def test_options(base, options, tiny_model, tmp_path):
    as_trl(base, lambda: load(tiny_model), tmp_path, options)


@pytest.mark.parametrize("base", BASES)
def test_a_model_by_its_name(base, tiny_model, tmp_path):
    options = {"model_init_kwargs": {"dtype": "float32", "attn_implementation": "eager"}}
    ours, _ = as_trl(base, lambda: tiny_model, tmp_path, options)
    assert ours.model.config._attn_implementation == "eager"


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    ("base", "name", "reward"),
    [("cpo", "geometric-anchor", {}), ("dpo", "gappo", {"reward": "log-ratio"})],
    ids=str,
)
def test_compiled(base, name, reward, tiny_model, tmp_path):
    """By dynamo, with a backend of its own that compiles the way back too: what a compiler makes of it is the
    compiler's affair. One layer: dynamo traces each anew.
    """
    model = load(tiny_model)
    model.config.num_hidden_layers = 1
    del model.model.layers[1:]
    model.save_pretrained(tmp_path / "model")
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = []
    for i, options in enumerate(({}, how)):
        options = {"share_prompt": "always", **reward, **options}
        runs.append(trained(of(name, base), load(tmp_path / "model"), tmp_path / str(i), options)[1])
    assert_same_steps(*runs)


@pytest.mark.parametrize("base", BASES)
def test_neftune(base, tiny_model, tmp_path, caplog):
    """Its noise is drawn for a row as a whole, so that shared prompts would get another one."""
    options = {"neftune_noise_alpha": 5.0}
    with caplog.at_level(logging.INFO, "trl_margins"):
        as_trl(base, lambda: load(tiny_model), tmp_path, options, share="auto")
    assert "prompts are computed once per completion: NEFTune" in caplog.text
    with pytest.raises(ValueError, match="share_prompt='always' does not go with NEFTune"):
        built(OURS[base], load(tiny_model), tmp_path, {"share_prompt": "always", **options})


# What TRL refuses, in its own words


@pytest.mark.parametrize("whose", [OURS, TRLS], ids=["ours", "trl"])
def test_a_function_that_makes_the_model(whose, tmp_path):
    """CPOTrainer has `model_init` in its signature, and no way through."""
    trainer, config = whose["cpo"]
    arguments = {"model_init": lambda: None, "train_dataset": ROWS, "processing_class": TOKENIZER}
    for options, error in (({}, ValueError), ({"is_encoder_decoder": False}, AttributeError)):
        with pytest.raises(TypeError if whose is OURS else error, match=r"is_encoder_decoder|NoneType"):
            trainer(args=config(**quiet(output_dir=str(tmp_path), **options)), **arguments)


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="Liger is installed")
@pytest.mark.parametrize("base", BASES)
def test_liger_is_asked_for(base, tiny_model, tmp_path):
    with pytest.raises(ImportError, match="liger-kernel"):
        trained(OURS[base], load(tiny_model), tmp_path, {"use_liger_kernel": True})
