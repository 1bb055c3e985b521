"""A model whose files lack weights, or are damaged, is not trained, evaluated or resumed as if it were whole."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, byte_tokenizer, load, preference_rows, quiet
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from said import word_for_word  # noqa: F401 - its messages are held against said/
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, Qwen3MoeConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_margins import GapPOConfig, GapPODPOConfig, GapPODPOTrainer, GapPOTrainer
from trl_margins.cli import main
from trl_margins.cli.setup import find_model, load_model
from trl_margins.trainers.loaded import is_converted, load_converted


def config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors(folder, change, name="model.safetensors"):
    found = load_file(folder / name)
    save_file(change(found), folder / name, {"format": "pt"})


def without(word):
    return lambda found: {name: value for name, value in found.items() if word not in name}


def prefixed(found):
    return {f"module.{name}": value for name, value in found.items()}


def broken(found):
    found["model.norm.weight"][3] = float("nan")
    return found


DAMAGES = {
    "no head": (lambda f: tensors(f, without("lm_head")), "no weights for lm_head.weight, which would be drawn at"),
    "no layer": (lambda f: tensors(f, without("layers.0.")), "no weights for model.layers.0.* and others"),
    "prefixed": (lambda f: tensors(f, prefixed), "no weights for lm_head.weight"),
    "another layer": (lambda f: config(f, num_hidden_layers=3), r"no weights for model.layers.2.*\(?and others"),
    "other sizes": (lambda f: config(f, hidden_size=8), "other shapes than its config.json: lm_head.weight"),
    "no number": (lambda f: config(f, hidden_size="32"), "Validation error for field 'hidden_size'"),
    "activation": (lambda f: config(f, hidden_act="none such"), "KeyError: 'none such'. Look at its config.json"),
    "positions": (lambda f: config(f, rope_scaling={"rope_type": "x"}), "KeyError: 'x'. Look at its config.json"),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "cannot be loaded"),
    "not finite": (lambda f: tensors(f, broken), "hold NaN or infinity.*model.norm.weight among them"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "a page": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), "cannot be loaded"),
    "a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "cannot be loaded: KeyError: .*Look at its config.json",
    ),
}


@pytest.mark.parametrize("base", ["cpo", "dpo"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model(damage, base, tiny_model, tmp_path):
    """`train` says what is wrong with it, on both bases: for one, the trainer loads the model."""
    damaged = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    byte_tokenizer().save_pretrained(damaged)
    harm, said = DAMAGES[damage]
    harm(damaged)
    preference_rows(6, seed=1).to_json(tmp_path / "rows.jsonl")
    named = ["--model_name_or_path", str(damaged), "--dataset_name", str(tmp_path / "rows.jsonl")]
    run = ["train", *named, "--base", base, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    with pytest.raises(ValueError, match=said) as caught:
        main([*run, "--use_cpu", "--report_to", "none"])
    assert str(damaged) in str(caught.value) or "of the model's 21" in str(caught.value)
    if damage == "not finite":
        load_model(str(damaged), device_map=None)  # says it, since what is not trained may do without
    elif damage != "a tokenizer":
        with pytest.raises(ValueError, match=f"the model '{damaged}' cannot be loaded: .*"):
            load_model(str(damaged), device_map=None)


@pytest.mark.parametrize("trainer", [(GapPOTrainer, GapPOConfig), (GapPODPOTrainer, GapPODPOConfig)])
def test_a_model_that_a_trainer_loads(trainer, tiny_model, tmp_path):
    damaged = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors(damaged, without("lm_head"))
    cls, options = trainer
    with pytest.raises(ValueError, match=f"the model '{damaged}': its files have no weights for lm_head.weight"):
        cls(
            str(damaged),
            args=options(**quiet(output_dir=str(tmp_path / "out"))),
            train_dataset=preference_rows(6, seed=1),
            processing_class=byte_tokenizer(),
        )


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """An adapter of two modules, beside its base model."""
    model = get_peft_model(
        load(tiny_model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    model.peft_config["default"].base_model_name_or_path = str(tiny_model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def adapter_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_without_some_tensors(adapter):
    tensors(adapter, without("v_proj"), "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"'{adapter}' cannot be loaded: Found missing adapter keys.*v_proj"):
        load_model(str(adapter), device_map=None)


def test_an_adapter_with_tensors_that_nothing_reads(adapter, caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        load_model(str(adapter), device_map=None)
        assert not caplog.text
        adapter_config(adapter, target_modules=["q_proj"])
        load_model(str(adapter), device_map=None)
    assert "has no place for 4 of its tensors, which are left out" in caplog.text
    assert "v_proj" in caplog.text


@pytest.mark.parametrize("base", [None, 3, "", "itself"])
def test_an_adapter_without_a_base(base, adapter):
    adapter_config(adapter, base_model_name_or_path=str(adapter) if base == "itself" else base)
    with pytest.raises(ValueError, match=r"adapter_config.json names no base model: base_model_name_or_path is"):
        find_model(str(adapter))


# Resuming what TRL's own trainer saved


@pytest.fixture(scope="module")
def of_trl(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("trl")
    options = quiet(output_dir=str(out), max_steps=2, learning_rate=1e-4, weight_decay=0.1, save_strategy="steps")
    DPOTrainer(
        load(tiny_model),
        args=DPOConfig(**options, save_steps=2),
        train_dataset=preference_rows(6, seed=1).select_columns(["prompt", "chosen", "rejected"]),
        processing_class=byte_tokenizer(),
    ).train()
    return out / "checkpoint-2"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"learning_rate": 5e-3}, "learning_rate 0.0001 → 0.005"),
        ({"weight_decay": 0.0}, "weight_decay 0.1 → 0.0"),
        ({"adam_beta2": 0.9}, r"adam_beta1, adam_beta2 \(0.9, 0.999\) → \(0.9, 0.9\)"),
    ],
)
def test_a_checkpoint_of_trl(options, said, of_trl, tiny_model, tmp_path, caplog):
    """The optimizer's own options would be the checkpoint's, without a word."""
    options = {"learning_rate": 1e-4, "weight_decay": 0.1, **options}
    trainer = GapPODPOTrainer(
        load(tiny_model),
        args=GapPODPOConfig(**quiet(output_dir=str(tmp_path), max_steps=4, **options)),
        train_dataset=preference_rows(6, seed=1),
        processing_class=byte_tokenizer(),
    )
    resume = partial(trainer.train, resume_from_checkpoint=str(of_trl))
    if said is None:
        with caplog.at_level(logging.WARNING, "trl_margins"):
            resume()
        assert trainer.state.global_step == 4
        assert "has no margin_run.json, as of another trainer" in caplog.text
    else:
        with pytest.raises(ValueError, match=f"checkpoint-2 is of a run with other settings: {said}"):
            resume()


def test_moments_that_are_not_finite(of_trl, tiny_model, tmp_path):
    checkpoint = Path(shutil.copytree(of_trl, tmp_path / of_trl.name))
    state = torch.load(checkpoint / "optimizer.pt")
    state["state"][0]["exp_avg"].view(-1)[0] = float("nan")
    torch.save(state, checkpoint / "optimizer.pt")
    trainer = GapPODPOTrainer(
        load(tiny_model),
        args=GapPODPOConfig(**quiet(output_dir=str(tmp_path / "out"), max_steps=4)),
        train_dataset=preference_rows(6, seed=1),
        processing_class=byte_tokenizer(),
    )
    with pytest.raises(ValueError, match=r"cannot be loaded into this run \(the optimizer's moments hold NaN"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# Weights that something else than the optimizer changes


class Breaks(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            next(model.parameters()).data[0, 0] = float("nan")


@pytest.mark.parametrize("step", [1, 2])
def test_a_callback_that_breaks_the_weights(step, tiny_model, tmp_path):
    """In the last step, too: nothing of it is saved."""
    trainer = GapPOTrainer(
        load(tiny_model),
        args=GapPOConfig(**quiet(output_dir=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1)),
        train_dataset=preference_rows(6, seed=1),
        processing_class=byte_tokenizer(),
    )
    trainer.add_callback(Breaks(step))  # behind those that look at the weights
    said = f"after step {step}, which left them whole, something else broke" if step == 2 else "broke"
    with pytest.raises(FloatingPointError, match=said):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"][: step - 1]
    if step == 2:
        with pytest.raises(FloatingPointError, match="something else broke"):
            trainer.save_model()


class BreaksBefore(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(model.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize("nonfinite_steps", ["stop", "skip"])
def test_a_callback_that_breaks_the_weights_before_a_step(nonfinite_steps, tiny_model, tmp_path):
    """The step is not to blame, nor is it left out: those to come would be no better."""
    options = {"nonfinite_steps": nonfinite_steps, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = GapPOTrainer(
        load(tiny_model),
        args=GapPOConfig(**quiet(output_dir=str(tmp_path), **options)),
        train_dataset=preference_rows(8, seed=1),
        processing_class=byte_tokenizer(),
        callbacks=[BreaksBefore()],
    )
    with pytest.raises(FloatingPointError, match="after step 1, which left them whole, something else broke"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


SMALL = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
CONVERTED = {  # each with what its files have under another name
    "neox": (GPTNeoXConfig(**SMALL, hidden_dropout=0.0, attention_dropout=0.0), "embed_out"),
    "mixtral": (MixtralConfig(**SMALL, **EXPERTS, num_local_experts=4), "block_sparse_moe.experts.3.w1"),
    "qwen3": (
        Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8, moe_intermediate_size=8, num_experts=4),
        "mlp.experts.3.up_proj",
    ),
}


@pytest.mark.parametrize(("base", "family"), [*(("cpo", family) for family in CONVERTED), ("dpo", "neox")])
def test_a_model_that_its_files_have_in_another_form(base, family, tmp_path):
    """A resumed run ends with the weights of one that was not stopped, and the best model is that of its step."""
    of_family, on_disk = CONVERTED[family]
    config = {"cpo": GapPOConfig, "dpo": GapPODPOConfig}[base]
    trainer = {"cpo": GapPOTrainer, "dpo": GapPODPOTrainer}[base]
    better = {1: 0.1, 2: 0.9, 3: 0.3}

    def run():
        torch.manual_seed(0)
        made = trainer(
            model=AutoModelForCausalLM.from_config(of_family),
            args=config(
                **quiet(
                    output_dir=str(tmp_path / "run"),
                    max_steps=3,
                    learning_rate=1e-2,
                    **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
                    **dict.fromkeys(("eval_steps", "save_steps"), 1),
                    load_best_model_at_end=True,
                    metric_for_best_model="better",
                    greater_is_better=True,
                )
            ),
            train_dataset=preference_rows(12),
            eval_dataset=preference_rows(4, scores=lambda i: (5.0 + i, 1.0), seed=1),
            processing_class=byte_tokenizer(),
            compute_metrics=lambda _: {"better": better.get(made.state.global_step, 0.0)},
        )
        return made

    at_step = {}

    class Keeps(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            at_step[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    made = run()
    made.add_callback(Keeps())
    made.train()
    assert made.state.best_global_step == 2
    torch.testing.assert_close(made.model.state_dict(), at_step[2], rtol=0, atol=0)
    assert any(on_disk in name for name in load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors"))

    straight = at_step.pop(3)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    again = run()
    again.add_callback(Keeps())
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(at_step[3], straight, rtol=0, atol=0)
    torch.testing.assert_close(again.model.state_dict(), at_step[2], rtol=0, atol=0)


def test_weights_of_another_form_in_several_files_and_of_two_precisions(tmp_path):
    model = AutoModelForCausalLM.from_config(CONVERTED["mixtral"][0], dtype=torch.bfloat16)
    for norm in (each for each in model.modules() if type(each).__name__.endswith("RMSNorm")):
        norm.float().weight.data.uniform_(0.5, 1.5)  # kept in full, as with `cast_layernorm`
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for weight in model.parameters():
        weight.data.zero_()
    load_converted(model, tmp_path)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


def test_a_model_that_was_loaded_by_names_of_ones_own(tiny_model, tmp_path):
    """transformers saves it by the names that it was loaded from."""
    named = tmp_path / "named"
    shutil.copytree(tiny_model, named)
    tensors(named, lambda found: {name.replace("model.", "transformer."): value for name, value in found.items()})
    model = AutoModelForCausalLM.from_pretrained(named, key_mapping={r"^transformer\.": "model."})
    model.save_pretrained(tmp_path / "saved")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for weight in model.parameters():
        weight.data.zero_()
    assert is_converted(model)
    load_converted(model, tmp_path / "saved")
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_a_best_checkpoint_that_is_gone_at_the_end(family, tiny_model, tmp_path, caplog):
    """What was trained stays, in either form."""

    class Removes(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            shutil.rmtree(state.best_model_checkpoint)

    model = load(tiny_model) if family == "llama" else AutoModelForCausalLM.from_config(CONVERTED[family][0])
    trainer = GapPOTrainer(
        model,
        GapPOConfig(
            **quiet(
                output_dir=str(tmp_path / "run"),
                max_steps=2,
                **dict.fromkeys(("eval_strategy", "save_strategy"), "epoch"),
                load_best_model_at_end=True,
                metric_for_best_model="loss",
            )
        ),
        train_dataset=preference_rows(4),
        eval_dataset=preference_rows(4, scores=lambda i: (5.0 + i, 1.0)),
        processing_class=byte_tokenizer(),
        callbacks=[Removes()],
    )
    assert trainer.train().global_step == 2


def test_a_checkpoint_of_another_form_that_lacks_a_tensor(tmp_path):
    model = AutoModelForCausalLM.from_config(CONVERTED["neox"][0])
    model.save_pretrained(tmp_path)
    tensors(tmp_path, without("embed_out"))
    with pytest.raises(ValueError, match=r"no weights for lm_head\.weight"):
        load_converted(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json is an adapter's, and the model is a whole one: move"):
        load_converted(model, tmp_path)
