"""GAPO's anchor, gradient norms and diagnostics where FSDP2 shards the parameters, in 16 bits and at its edges."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sharded_anchor
import torch
from conftest import VOCABULARY, load, preference_rows, quiet
from peft import LoraConfig, get_peft_model
from processes import output_of
from scipy.stats import spearmanr
from sharded_anchor import CASES, PAIRS
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trl_margins.distributed import is_sharded
from trl_margins.trainers import mixin
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

pytestmark = pytest.mark.rehearsal

SCRIPT = str(Path(__file__).with_name("sharded_anchor.py"))


def anchor_gaps(folder: Path) -> np.ndarray:
    with (folder / "pair_log.csv").open() as file:
        rows = {int(row["row_number"]): float(row["anchor_gap"]) for row in csv.DictReader(file)}
    assert sorted(rows) == list(range(PAIRS))
    return np.array([rows[i] for i in range(PAIRS)])


@pytest.fixture(scope="module")
def exact(tiny_model, tmp_path_factory):
    """In float32, by one process."""
    out = tmp_path_factory.mktemp("alone")
    sharded_anchor.make("float32", tiny_model, str(out)).train()
    return anchor_gaps(out)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    output_of(2, SCRIPT, tiny_model, str(out))
    return out, json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_gaps_in_16_bits_are_float32s(case, runs, exact):
    """Within 10 % in the mean and in nearly its order, though the gather casts what it gathers."""
    out, results = runs
    assert all(found["sharded"] for found in results[case])
    found = anchor_gaps(out / case)
    assert found.mean() == pytest.approx(exact.mean(), rel=0.1)
    assert spearmanr(found, exact).statistic >= 0.97


@pytest.mark.parametrize("case", CASES)
def test_the_gather_casts_the_anchor_exactly_and_the_bytes_come_back(case, runs):
    assert len(runs[1][case]) == 2
    for found in runs[1][case]:
        at_the_anchor = [each for each in found["passes"] if each["anchor"]]
        assert len(at_the_anchor) == PAIRS // 8
        assert all(each["exact"] for each in at_the_anchor)
        assert {dtype for each in found["passes"] for dtype in each["gathered"]} == {"torch.bfloat16"}
        assert found["back"]


def test_a_pass_that_breaks_off_leaves_nothing_gathered(runs):
    assert len(runs[1]["broken"]) == 2
    for found in runs[1]["broken"]:
        assert found == {"raised": True, "back": True, "alike": True}


def test_ranks_with_the_same_values_draw_the_same_numbers(runs):
    first, second = runs[1]["draws"]
    assert len(set(first["replicas"])) == 2
    assert first["replicas"] == second["replicas"]
    assert first["shards"] != second["shards"]


@pytest.mark.parametrize("held", ["replicas", "shards"])
def test_the_backup_of_a_shard_is_all_that_a_step_needs(held, runs):
    for found in runs[1]["draws"]:
        assert found[f"copies, {held}"] == ["clone"]


def shard(model, mesh, **policy):
    layers = [module for module in model.modules() if isinstance(module, (LlamaDecoderLayer, GPT2Block))]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    return model


def made(kind, folder):
    if "Conv1D" in kind:
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0))
        return model.bfloat16().float()  # as published weights are
    model = load(folder)
    if "tied" in kind:
        model.lm_head.weight, model.config.tie_word_embeddings = model.model.embed_tokens.weight, True
    if "checkpointing" in kind:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "adapters" in kind:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))
        for parameter in model.parameters():  # LoRA's second factor starts at 0: nothing would pass the first
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def norms_trainer(model, tokenizer, out, **options):
    config = config_class("gradient-norm")(**quiet(output_dir=str(out), **options))
    rows = preference_rows(4, seed=2)
    return trainer_class("gradient-norm")(model, config, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("kind", ["plain", "tied", "fused head", "checkpointing", "adapters", "scope"])
def test_norms_of_pairs_are_the_unsharded_models(kind, one_process, tiny_model, tokenizer, tmp_path, monkeypatch):
    """In float64; a tied weight counts once, with the sum of what arrives at both of its uses."""
    if kind == "fused head":
        monkeypatch.setattr(mixin, "logits_will_do", lambda *_: False)
    options = {"gradient_checkpointing": kind == "checkpointing"}
    if kind == "scope":
        options["anchor_scope"] = ["mlp", "norm"]

    found = []
    for each in (made(kind, tiny_model).double(), shard(made(kind, tiny_model).double(), one_process)):
        trainer = norms_trainer(each, tokenizer, tmp_path, **options)
        assert trainer._fused
        (probe,) = trainer._probes
        (batch,) = probe.prepared([trainer.data_collator(list(trainer.train_dataset))])
        assert is_sharded(next(iter(probe.parameters.values()))) == bool(found)
        found.append(probe._norms(batch))
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
    tolerance = 1e-5 if kind == "fused head" else 1e-12  # TRL's head computes in float32
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=0)
    assert len(found[0].unique()) == 4


@pytest.mark.parametrize(
    "kind", ["tied", "adapters, fused head", "autocast alone", "autocast alone, tied", "autocast alone, Conv1D"]
)
def test_gaps_of_other_models_in_16_bits(kind, one_process, tiny_model, tokenizer, tmp_path, monkeypatch):
    """FSDP2 casts norms, biases and adapters; autocast alone casts what is multiplied with."""
    monkeypatch.setattr(sharded_anchor, "load", partial(made, kind))
    if "adapters" in kind:  # at 0.05 the gaps are half as large as what bf16 makes of them, sharded or not
        monkeypatch.setattr(sharded_anchor, "RADIUS", 0.2)
    alone = sharded_anchor.make("float32", tiny_model, str(tmp_path / "alone"))
    alone.train()
    policy = {} if "autocast" in kind else {"param_dtype": torch.bfloat16}
    monkeypatch.setattr(sharded_anchor, "load", lambda folder: shard(made(kind, folder), one_process, **policy))
    trainer = sharded_anchor.make("mixed" + ", fused head" * ("fused" in kind), tiny_model, str(tmp_path / "sharded"))
    trainer.train()
    assert is_sharded(next(trainer.model.parameters()))
    exact, found = (anchor_gaps(tmp_path / name) for name in ("alone", "sharded"))
    assert found.mean() == pytest.approx(exact.mean(), rel=0.1)
    assert spearmanr(found, exact).statistic >= 0.97
