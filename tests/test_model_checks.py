"""Where model, tokenizer, data and config do not fit each other, that is said before training."""

import json
import logging
import re
import warnings
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BASES, VOCABULARY, byte_tokenizer, load, preference_rows, quiet, saved
from datasets import Dataset
from peft import LoraConfig, MultitaskPromptTuningConfig, PeftModel, PrefixTuningConfig, get_peft_model
from said import word_for_word  # noqa: F401 - its messages are held against said/
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BioGptConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OPTConfig,
    RobertaConfig,
    XGLMConfig,
)

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.cli import main
from trl_margins.evaluation.scorer import completion_logps
from trl_margins.forward.positions import positions_of
from trl_margins.rows import PreferenceRow
from trl_margins.trainers import model_checks
from trl_margins.trainers.card import stored_in
from trl_margins.trainers.model_checks import TokenLimits, _check_trains, check_weights

both_bases = pytest.mark.parametrize("base", BASES)
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(
    **IDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
BERT = BertConfig(**IDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
GPT2 = {**IDS, "n_embd": 16, "n_layer": 1, "n_head": 2}
OPT = {**IDS, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "dropout": 0.0}


def build(base, model, out, tokenizer=None, data=None, options=None, **arguments):
    trainer, config = BASES[base]
    return trainer(
        model,
        args=config(**quiet(output_dir=str(out), **(options or {}))),
        train_dataset=preference_rows(6) if data is None else data,
        processing_class=tokenizer or byte_tokenizer(),
        **arguments,
    )


def made(config, cls=None):
    """A tiny model that remembers a folder, as DPOTrainer's reference needs."""
    torch.manual_seed(0)
    return cls(config) if cls else AutoModelForCausalLM.from_config(config)


def kept(model, folder):
    saved(model, folder)
    return type(model).from_pretrained(folder)


# Healthy ones


def padded_vocabulary(tiny_model):
    model = load(tiny_model)
    model.resize_token_embeddings(320)
    return model


HEALTHY = {
    "llama": load,
    "embedding padded to a multiple of 64": padded_vocabulary,
    "gpt2": lambda _: made(GPT2Config(**GPT2, n_positions=128)),
    "opt": lambda _: made(OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=128)),
    "bert that is a decoder": lambda _: made(BertConfig(**{**BERT.to_dict(), "is_decoder": True}), BertLMHeadModel),
    "mixtral": lambda _: made(
        MixtralConfig(**{**LLAMA.to_dict(), "num_local_experts": 2, "model_type": "mixtral"}), MixtralForCausalLM
    ),
    "lora": lambda folder: get_peft_model(load(folder), LoraConfig(r=2, task_type="CAUSAL_LM")),
    "lora and a whole embedding": lambda folder: get_peft_model(
        load(folder),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"),
    ),
    "a token trained by lora": lambda folder: get_peft_model(
        load(folder),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5], task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize(("kind", "base"), [*product(HEALTHY, BASES), ("t5", "cpo")])
def test_what_fits_passes_without_a_word(kind, base, request, tiny_model, tokenizer, tmp_path, caplog):
    if kind == "t5":
        model = load(request.getfixturevalue("tiny_encoder_decoder"))
    else:
        model = HEALTHY[kind](tiny_model)
        model = model if isinstance(model, PeftModel) else kept(model, tmp_path / "model")
    with caplog.at_level(logging.INFO, "trl_margins"), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trainer = build(base, model, tmp_path, options={"max_completion_length": 64} if kind == "t5" else {})
    said = [r.getMessage() for r in caplog.records if r.levelno > logging.INFO and r.name.startswith("trl_margins")]
    assert not said
    assert not [w for w in warned if "model_checks" in w.filename]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".trial")]
    assert trainer.data_collator.limits.vocabulary >= VOCABULARY


def test_a_length_that_cuts_nothing(tiny_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        build("cpo", load(tiny_model), tmp_path, options={"max_completion_length": 8})
    assert "no effect of max_completion_length: it is for encoder-decoder models" in caplog.text


# Tokens


@both_bases
def test_a_token_that_the_model_does_not_have(base, tiny_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    rows = preference_rows(6).to_list()
    rows[4]["rejected"] += "<tool>"
    data = Dataset.from_list(rows)
    found = (
        rf"row 4 of the train data set has the token {VOCABULARY} \('<tool>'\), and the embedding of the model has "
        rf"{VOCABULARY} rows \(the tokenizer has {VOCABULARY + 1} tokens\): call "
        r"model\.resize_token_embeddings\(len\(tokenizer\)\)"
    )
    with pytest.raises(ValueError, match=found):
        build(base, load(tiny_model), tmp_path, tokenizer, data)
    with pytest.raises(ValueError, match="row 4 of the two data set"):
        build(base, load(tiny_model), tmp_path, tokenizer, eval_dataset={"one": preference_rows(2), "two": data})
    # rows without it, and the fix
    build(base, load(tiny_model), tmp_path, tokenizer)
    model = load(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    model = kept(model, tmp_path / "resized")
    build(base, model, tmp_path, tokenizer, data, options={"max_steps": 1}).train()


@both_bases
def test_a_token_that_the_model_does_not_have_in_a_stream(base, tiny_model, tmp_path):
    """Not seen before it comes; but before the device sees it."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    rows = preference_rows(12).to_list()
    rows[9]["chosen"] += "<tool>"
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = build(base, load(tiny_model), tmp_path, tokenizer, stream, options={"max_steps": 3})
    with pytest.raises(ValueError, match=rf"row \d of a batch has the token {VOCABULARY} \('<tool>'\)"):
        trainer.train()
    assert trainer.state.global_step == 1
    # nor in a set that comes later
    trainer = build(base, load(tiny_model), tmp_path, tokenizer)
    trainer.data_collator([trainer.train_dataset[0]])
    bad = build(
        base, kept(padded_vocabulary(tiny_model), tmp_path / "model"), tmp_path, tokenizer, stream, {"max_steps": 1}
    )
    with pytest.raises(ValueError, match="row 1 of a batch has the token"):
        trainer.data_collator(list(bad.train_dataset)[8:10])


@both_bases
def test_a_padding_token_that_the_model_does_not_have(base, tiny_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    found = (
        rf"padding token {VOCABULARY} \('\[PAD\]'\) has no row in the embedding of the model, which has {VOCABULARY}"
    )
    with pytest.raises(ValueError, match=found):
        build(base, load(tiny_model), tmp_path, tokenizer)
    tokenizer.pad_token = "a"  # an ordinary token does
    build(base, load(tiny_model), tmp_path, tokenizer)


@pytest.mark.parametrize("columns", ["cpo", "dpo"])
def test_the_right_row_of_many(columns, tokenizer, caplog):
    """Found among several Arrow batches, behind a selection; NumPy says which it is."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, (5000, 3))
    names = (
        ("prompt_ids", "chosen_ids", "rejected_ids")
        if columns == "dpo"
        else ("chosen_input_ids", "a", "chosen_labels")
    )
    lists = [{name: rng.integers(0, 50, n).tolist() for name, n in zip(names, row, strict=True)} for row in lengths]
    order = rng.permutation(5000)[:4500]
    bad = int(order[4321])
    lists[bad][names[2]].append(70)
    dataset = Dataset.from_list(lists).select(order)
    limits = TokenLimits(tokenizer, vocabulary=70, positions=None, trained_positions=12)
    with pytest.raises(ValueError, match="row 4321 of the train data set has the token 70 "):
        limits.check_dataset(dataset, "train", None)
    numbered = dataset.add_column("row_number", order)
    with pytest.raises(ValueError, match=f"row {bad} of the train data set has the token 70 "):
        limits.check_dataset(numbered, "train", None)

    lengths[bad, 2] += 1
    lengths = lengths[order]
    tokens = lengths[:, 0] + lengths[:, 1:].max(axis=1) if columns == "dpo" else lengths[:, [0, 2]].max(axis=1)
    n_long, longest = int((tokens > 7).sum()), int(tokens.max())
    assert n_long
    TokenLimits(tokenizer, 71, None, trained_positions=7).check_dataset(dataset, "train", None)
    assert f"{n_long} of 4500 train rows are longer than the 7 positions" in caplog.text
    assert f"the longest has {longest} tokens" in caplog.text
    TokenLimits(tokenizer, 71, longest, None).check_dataset(dataset, "train", None)
    with pytest.raises(ValueError, match=f"row {tokens.argmax()} of the train data set takes {longest} tokens"):
        TokenLimits(tokenizer, 71, longest - 1, None).check_dataset(dataset, "train", None)


# Positions


ABSOLUTE = {
    "gpt2": GPT2Config(**GPT2, n_positions=16),
    "gpt_bigcode": GPTBigCodeConfig(**GPT2, n_positions=16),
    "openai-gpt": OpenAIGPTConfig(**GPT2, n_positions=16),
    "gpt_neo": GPTNeoConfig(
        **IDS, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], max_position_embeddings=16
    ),
    "opt": OPTConfig(**OPT, word_embed_proj_dim=16, max_position_embeddings=16),
    "biogpt": BioGptConfig(
        **IDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    ),
    "roberta": RobertaConfig(**{**BERT.to_dict(), "max_position_embeddings": 16, "is_decoder": True}),
    "bart": BartConfig(
        **IDS,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=16,
    ),
}


@pytest.mark.parametrize("kind", ABSOLUTE)
def test_the_number_of_positions_is_where_the_model_ends(kind):
    model = made(ABSOLUTE[kind]).eval()
    positions = positions_of(model)
    ids = torch.full((1, positions + 1), 7)
    model(input_ids=ids[:, :positions])
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)|must match the size"):
        model(input_ids=ids)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**{**LLAMA.to_dict(), "max_position_embeddings": 16}),
        XGLMConfig(**IDS, d_model=16, ffn_dim=32, num_layers=1, attention_heads=2, max_position_embeddings=16),
    ],
    ids=["llama", "xglm"],
)
def test_positions_that_are_computed_have_no_end(config):
    model = made(config).eval()
    assert positions_of(model) is None
    model(input_ids=torch.full((1, 24), 7))


@both_bases
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_rows_beyond_the_positions(kind, base, tmp_path):
    config = type(ABSOLUTE[kind])(**{**ABSOLUTE[kind].to_dict(), "max_position_embeddings": 60})
    model = kept(made(config), tmp_path / "model")
    long = preference_rows(6).to_list()
    long[3]["chosen"] = "x" * 50
    long = Dataset.from_list([{**row, "prompt": "1234567890", "rejected": "x"} for row in long])
    with pytest.raises(ValueError, match=r"row 3 of the train data set takes 6\d tokens, .* 60 positions: set max_le"):
        build(base, model, tmp_path, data=long)
    build(base, model, tmp_path, data=long, options={"max_length": 60, "max_steps": 2}).train()
    with pytest.raises(ValueError, match=r"is a stream, of which max_length=61 .* set max_length=60 or less"):
        build(base, model, tmp_path, data=long.to_iterable_dataset(), options={"max_length": 61, "max_steps": 1})
    build(base, model, tmp_path, data=long.to_iterable_dataset(), options={"max_length": 60, "max_steps": 2}).train()


def test_padding_takes_positions_too(tmp_path):
    model = kept(made(GPT2Config(**GPT2, n_positions=50)), tmp_path / "model")
    options = {"max_length": 50, "pad_to_multiple_of": 16}
    with pytest.raises(ValueError, match="takes 64 tokens, and the model has learned 50 positions"):
        build("dpo", model, tmp_path, options=options, data=preference_rows(20))


@both_bases
def test_rotary_positions_may_be_exceeded(base, tiny_model, tmp_path, caplog):
    model = load(tiny_model)
    model.config.max_position_embeddings = 20
    trainer = build(base, model, tmp_path, options={"max_steps": 1})
    assert "6 of 6 train rows are longer than the 20 positions that the model was made for" in caplog.text
    trainer.train()
    caplog.clear()
    build(base, model, tmp_path, options={"max_length": 20}, data=preference_rows(6).map(lambda row: {"prompt": "a "}))
    assert "positions" not in caplog.text


@both_bases
def test_from_the_command_line(base, tiny_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    load(tiny_model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    preference_rows(4).to_json(tmp_path / "train.jsonl")
    flags = {"model_name_or_path": "model", "dataset_name": "train.jsonl", "output_dir": "out"}
    flags = [text for name, path in flags.items() for text in (f"--{name}", str(tmp_path / path))]
    with pytest.raises(ValueError, match=r"the padding token \d+ \('\[PAD\]'\) has no row"):
        main(["train", *flags, "--base", base, "--use_cpu", "--report_to", "none"])


# Reference models


@pytest.mark.parametrize(
    ("start", "warns"), [("pissa", True), ("olora", True), ("Gaussian", False), ("orthogonal", False), (True, False)]
)
def test_an_adapter_that_takes_its_values_out_of_the_reference(start, warns, tiny_model, tmp_path, caplog):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    said = f"init_lora_weights={start!r} takes the adapter's first values out of the model under it"
    build("dpo", load(tiny_model), tmp_path, peft_config=adapter)
    assert (said in caplog.text) == warns
    caplog.clear()
    build("dpo", load(tiny_model), tmp_path, peft_config=adapter, ref_model=load(tiny_model))
    build("dpo", load(tiny_model), tmp_path, peft_config=adapter, options={"reward": "sum"})
    build("cpo", load(tiny_model), tmp_path, peft_config=adapter)
    assert said not in caplog.text


@pytest.mark.parametrize("start", ["pissa_niter_4", "pissa", True])
def test_an_adapter_that_is_loaded_as_another_one(start, tiny_model, tmp_path, caplog):
    """What PEFT gives back of it, beside what was trained."""
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM")
    trainer = build("cpo", load(tiny_model), tmp_path, peft_config=adapter)
    is_said = f"init_lora_weights={start!r} draws the adapter's first values at random" in caplog.text
    trainer.save_model()
    ids = torch.arange(10, 30)[None]
    torch.manual_seed(1)  # the trainer has set one
    with torch.no_grad():
        ours = trainer.model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(load(tiny_model), str(tmp_path))(input_ids=ids).logits
    assert is_said == (not torch.allclose(ours, theirs, atol=1e-3)) == (start == "pissa_niter_4")


def test_a_reference_model_of_another_vocabulary(tiny_model, tmp_path, caplog):
    other = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 2 * VOCABULARY})
    found = rf"vocabulary has {VOCABULARY} tokens, and the reference model's {2 * VOCABULARY}"
    with pytest.raises(ValueError, match=found):
        build("dpo", load(tiny_model), tmp_path, ref_model=made(other))
    build("dpo", load(tiny_model), tmp_path, ref_model=load(tiny_model))
    assert "the reference model's" not in caplog.text
    # padding to a round number is none
    build("dpo", load(tiny_model), tmp_path, ref_model=made(LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 264})))
    assert (
        f"embedding has {VOCABULARY} rows, and the reference model's 264: is it a model with the same" in caplog.text
    )


@pytest.mark.parametrize(  # DPOTrainer refuses both
    ("streams", "precomputes"), [(False, False), (False, True), (True, False)]
)
def test_reference_log_probabilities_that_the_data_has(streams, precomputes, tiny_model, tmp_path, caplog):
    """They are computed anew, as without these columns."""
    losses = []
    for data in (preference_rows(6), preference_rows(6).add_column("ref_chosen_logps", [9.0, None] * 3)):
        options = {"precompute_ref_log_probs": precomputes, "max_steps": 1}
        data = data.to_iterable_dataset() if streams else data
        trainer = build("dpo", load(tiny_model), tmp_path / str(len(losses)), data=data, options=options)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]
    assert "train: the columns ref_chosen_logps are left out: the reference model's log-prob" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"), [({"fp16": True}, "float32"), ({"bf16": True}, "float32; computed in bf16")]
)
def test_what_a_cpu_computes_in(options, said, tiny_model, tmp_path):
    """Not in float16, whatever was asked for."""
    trainer = build("cpo", load(tiny_model), tmp_path, options={"use_cpu": True, **options})
    assert stored_in(trainer) == said
    with trainer.accelerator.autocast():
        kind = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    assert (kind == torch.bfloat16) == ("bf16" in said)


def test_a_reference_model_that_was_not_resized(tiny_model, tmp_path):
    """DPOTrainer loads it from the folder of the model, which is the one of before."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    data = preference_rows(4).map(lambda row: {"chosen": row["chosen"] + "<tool>"})
    model = load(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    found = rf"the embedding of the reference model has {VOCABULARY} rows .*: give a reference model as large as"
    with pytest.raises(ValueError, match=found):
        build("dpo", model, tmp_path, tokenizer, data)
    # before the reference's pass, which comes within the construction
    trainer = build("dpo", model, tmp_path, tokenizer, data, options={"precompute_ref_log_probs": True})
    assert trainer.ref_model is None  # it is the model itself
    reference = load(tiny_model)
    reference.resize_token_embeddings(len(tokenizer))
    build("dpo", model, tmp_path, tokenizer, data, {"max_steps": 1}, ref_model=reference).train()


def test_precomputed_references_are_looked_at_before_they_are_computed(tiny_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    data = preference_rows(4).map(lambda row: {"chosen": row["chosen"] + "<tool>"})
    with pytest.raises(ValueError, match=r"of a batch has the token 259 \('<tool>'\)"):
        build("dpo", load(tiny_model), tmp_path, tokenizer, data, {"precompute_ref_log_probs": True})


def test_a_tokenizer_of_another_family(tiny_model, tmp_path, caplog):
    """Smaller than the embedding, so that every token has a row; but the model's end token is a letter there."""
    model = load(tiny_model)
    model.config.eos_token_id = byte_tokenizer().convert_tokens_to_ids("k")
    build("cpo", model, tmp_path)
    assert "ends texts with token" in caplog.text
    assert "which in the tokenizer is 'k' and not a special token" in caplog.text


def test_a_model_whose_config_has_no_end_token(tiny_model, tmp_path, monkeypatch):
    """As CpmAnt's."""
    model = load(tiny_model)
    monkeypatch.delattr(model.config, "eos_token_id")
    build("cpo", model, tmp_path, options={"max_steps": 1}).train()
    model.config.eos_token_id, model.config._name_or_path = -1, None
    build("cpo", model, tmp_path / "other", options={"max_steps": 1}).train()


# Nothing that trains, nothing that writes


@both_bases
def test_nothing_that_trains(base, tiny_model, tmp_path):
    with pytest.raises(
        ValueError, match="none of the model's 21 weight tensors trains: set requires_grad, give a peft"
    ):
        build(base, load(tiny_model).requires_grad_(False), tmp_path)
    get_peft_model(load(tiny_model), LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"trains: load the adapter with .*is_trainable=True"):
        build(base, PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter"), tmp_path)
    build(base, PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter", is_trainable=True), tmp_path)


def test_patterns_of_an_adapter_that_match_nothing(tiny_model, tmp_path, caplog):
    patterns = {"rank_pattern": {"q_proj": 4, "zz": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "yy": 3}}
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **patterns)
    build("cpo", load(tiny_model), tmp_path, peft_config=adapter)
    assert [each.partition(",")[0] for each in caplog.messages] == [
        "rank_pattern names 'zz'",
        "alpha_pattern names 'yy'",
    ]


def test_patterns_that_peft_makes_for_experts(tmp_path, caplog):
    """Of "all-linear", and for parameters that are no modules."""
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build("cpo", HEALTHY["mixtral"](""), tmp_path, peft_config=adapter)
    assert trainer.model.peft_config["default"].rank_pattern
    assert "rank_pattern names" not in caplog.text


def test_weights_of_several_dtypes(tiny_model, tmp_path):
    model = load(tiny_model)
    model.model.layers[1].to(torch.bfloat16)
    trainer = build("cpo", model, tmp_path, options={"max_steps": 1})
    for run in (trainer.train, lambda: trainer.evaluate(preference_rows(2))):
        with pytest.raises(ValueError, match=r"several dtypes \(model.embed_tokens.weight is float32, model.layers.1"):
            run()


@both_bases
def test_names_that_match_nothing(base, tiny_model, tmp_path):
    """PEFT's refusal, and `train_only`'s, come at construction."""
    with pytest.raises(ValueError, match=r"Target modules \{'nothing'\} not found"):
        build(
            base, load(tiny_model), tmp_path, peft_config=LoraConfig(target_modules=["nothing"], task_type="CAUSAL_LM")
        )
    with pytest.raises(ValueError, match="train_only pattern 'nothing' matches none of the 21 parameters"):
        build(base, load(tiny_model), tmp_path, options={"train_only": ["nothing"]})


@both_bases
@pytest.mark.parametrize("cls", [LlamaModel, LlamaForSequenceClassification, BertForMaskedLM])
def test_no_language_model(cls, base, tmp_path):
    model = made(BERT if cls is BertForMaskedLM else LLAMA, cls)
    with pytest.raises(
        ValueError, match=rf"a {cls.__name__} writes no text: .* AutoModelForCausalLM\.from_pretrained"
    ):
        build(base, model, tmp_path)
    if base == "dpo":  # takes a folder's class from its config
        with pytest.raises(ValueError, match=f"a {cls.__name__} writes no text"):
            build(base, saved(model, tmp_path / "model"), tmp_path)


def test_an_encoder_and_decoder_by_name(tiny_encoder_decoder, tmp_path):
    """TRL's CPOTrainer loads names with AutoModelForCausalLM."""
    with pytest.raises(ValueError, match=r"no model that has a T5Config.*AutoModelForSeq2SeqLM\.from_pretrained"):
        build("cpo", tiny_encoder_decoder, tmp_path)


def test_names_of_an_adapter(tiny_model, tmp_path, caplog):
    """PEFT says nothing of a name in vain beside others."""
    more = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "nope"], "modules_to_save": ["lm_head"]}
    build("cpo", load(tiny_model), tmp_path, peft_config=LoraConfig(**more))
    assert "target_modules (--lora_target_modules) names 'nope'" in caplog.text
    assert "it has down_proj, embed_tokens, gate_proj, input_layernorm, k_proj, lm_head, norm," in caplog.text
    for wrong, words in (
        ({"modules_to_save": ["lm_headx"]}, "names 'lm_headx', which the model does not have. It has down_proj"),
        ({"task_type": "FEATURE_EXTRACTION"}, "task type is 'FEATURE_EXTRACTION'.*set lora_task_type to CAUSAL_LM"),
    ):
        with pytest.raises(ValueError, match=words):
            build("cpo", load(tiny_model), tmp_path, peft_config=LoraConfig(**more | wrong))
    tasks = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2)
    with pytest.raises(ValueError, match="MULTITASK_PROMPT_TUNING one, which asks for the task of each row"):
        build("cpo", load(tiny_model), tmp_path, peft_config=tasks)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_a_prefix_needs_the_cache(base, tiny_model, tmp_path):
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"PREFIX_TUNING one.*cache.*set gradient_checkpointing=False"):
        build(base, load(tiny_model), tmp_path, options={"gradient_checkpointing": True}, peft_config=prefix)
    trainer = build(base, load(tiny_model), tmp_path, options={"max_steps": 1}, peft_config=prefix)
    before = trainer.model.prompt_encoder["default"].embedding.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.prompt_encoder["default"].embedding.weight)


def test_another_attribute_error_is_left_alone(tiny_model, tmp_path):
    model = load(tiny_model)

    class Broken(MarginCPOTrainer):
        def _validate_args(self):  # which transformers' constructor calls
            return model.nothing_of_that_name

    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        Broken(
            model,
            args=MarginCPOConfig(**quiet(output_dir=str(tmp_path))),
            train_dataset=preference_rows(2),
            processing_class=byte_tokenizer(),
        )


def sees_the_end(model):
    """Whether what the model says after the first token hangs on the last one."""
    embedded = torch.randn(1, 6, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embedded).logits[0, 0].sum().backward()
    return bool(embedded.grad[0, -1].any())


@both_bases
def test_an_encoder(base, tmp_path):
    model = kept(made(BERT, BertLMHeadModel), tmp_path / "model")
    assert sees_the_end(model)
    assert not sees_the_end(made(BertConfig(**{**BERT.to_dict(), "is_decoder": True}), BertLMHeadModel))
    with pytest.raises(ValueError, match=r"this BertLMHeadModel is an encoder: .*is_decoder=True"):
        build(base, model, tmp_path)


def test_an_encoder_decoder_on_the_dpo_base(tiny_encoder_decoder, tmp_path):
    with pytest.raises(
        ValueError, match="a T5ForConditionalGeneration has an encoder and a decoder, which DPOTrainer d"
    ):
        build("dpo", load(tiny_encoder_decoder), tmp_path)


# Weights


@both_bases
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(value, base, tiny_model, tmp_path):
    model = load(tiny_model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    found = r"1 of the model's 21 weight tensors hold NaN or infinity .* model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(ValueError, match=found):
        build(base, model, tmp_path)


def test_the_broken_weights_and_their_rows():
    """Their number, the first one's name, and of an embedding the tokens' rows."""
    model = AutoModelForCausalLM.from_config(LLAMA)
    check_weights(model)
    total, ends = len(list(model.parameters())), ": its files are damaged"
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
        model.model.norm.weight[0] = torch.inf
    said = (
        f"2 of the model's {total} weight tensors hold NaN or infinity before training, model.norm.weight among them"
    )
    with pytest.raises(ValueError, match=re.escape(said + ends)):
        check_weights(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[[7, 9], -1] = -torch.inf
    said = said.replace("2 of", "3 of").replace("model.norm", "model.embed_tokens")
    rows = " (in the rows of 2 tokens, from 7 on: set them to 0 if no text needs them)"
    with pytest.raises(ValueError, match=re.escape(said + rows + ends)):
        check_weights(model)


def test_weights_that_an_evaluation_converts(tiny_model, tokenizer, tmp_path, caplog):
    """transformers does, before a training that would go on in it."""
    for option, said in (("bf16_full_eval", True), ("prediction_loss_only", False)):
        caplog.clear()
        trainer = MarginDPOTrainer(
            load(tiny_model),
            args=MarginDPOConfig(**quiet(output_dir=str(tmp_path / option), max_steps=1, **{option: True})),
            train_dataset=preference_rows(4),
            eval_dataset=preference_rows(4),
            processing_class=tokenizer,
        )
        trainer.evaluate()
        trainer.train()
        found = "the weights are bfloat16 by now, and were float32 when the trainer was made: they train so"
        assert (found in caplog.text) == said


def test_float16_weights(caplog):
    """torch: Attempting to unscale FP16 gradients."""
    model, args = nn.Linear(2, 2).half(), SimpleNamespace(fp16=True)
    with pytest.raises(ValueError, match=r"weight is float16 itself: load the model with dtype=torch\.float32"):
        _check_trains(model, args)
    _check_trains(model.float(), args)
    assert not caplog.messages
    _check_trains(model.half(), SimpleNamespace(fp16=False))
    assert "weight trains in float16, in which small gradients and steps are lost" in caplog.text
    model.weight.requires_grad_(False)
    model.bias.data = model.bias.data.float()
    _check_trains(model, args)


# Saving


def head_tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def layers_shared(model):
    model.model.layers[1] = model.model.layers[0]


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (head_tied, "embed_tokens.weight and lm_head.weight are one tensor.*config.tie_word_embeddings = True"),
        (layers_shared, r"layers\.0\.\S+ and \S+layers\.1\.\S+ are one tensor.*copy\.deepcopy"),
    ],
)
def test_weights_that_are_tied_by_hand(share, said, tiny_model, tmp_path):
    model = load(tiny_model)
    share(model)
    with pytest.raises(ValueError, match=said):
        build("cpo", model, tmp_path)
    if share is head_tied:  # as the message says
        model.config.tie_word_embeddings = True
        trainer = build("cpo", model, tmp_path)
        trainer.save_model()
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@both_bases
def test_a_generation_config_that_cannot_be_saved(base, tiny_model, tmp_path):
    model = load(tiny_model)
    model.generation_config.temperature = 0.6
    with pytest.raises(
        ValueError, match=r"generation_config cannot be saved.*`temperature` is set to `0\.6`.*do_sample"
    ):
        build(base, model, tmp_path)
    model.generation_config.do_sample = True
    build(base, model, tmp_path, options={"max_steps": 1}).save_model(str(tmp_path / "out"))
    # adapters have none
    peft = get_peft_model(load(tiny_model), LoraConfig(r=2, task_type="CAUSAL_LM"))
    peft.get_base_model().generation_config.temperature = 0.6
    build(base, peft, tmp_path).save_model(str(tmp_path / "out"))


def loaded_with(settings, folder):
    saved(made(LLAMA), folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, **settings}))
    return AutoModelForCausalLM.from_pretrained(folder)


@both_bases
@pytest.mark.parametrize("settings", [{}, {"pad_token_id": 0}, {"pad_token_id": 0, "eos_token_id": 9}], ids=str)
def test_a_published_generation_config_that_training_changes(settings, base, tmp_path):
    """It is saved as it came; but TRL gives it the tokenizer's padding token, and transformers the others."""
    model = loaded_with(settings, tmp_path / "model")
    model.generation_config.save_pretrained(tmp_path / "as it came")
    with pytest.raises(ValueError, match="generation_config cannot be saved"):
        build(base, model, tmp_path)


@both_bases
def test_a_published_generation_config_that_training_leaves(base, tmp_path):
    model = loaded_with({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, tmp_path / "model")
    trainer = build(base, model, tmp_path, options={"max_steps": 1})
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["bos_token_id"] == 1


def test_a_config_that_cannot_be_saved(tiny_model, tmp_path):
    model = load(tiny_model)
    model.config.seen = {1, 2}
    with pytest.raises(ValueError, match=r"the model's config cannot be saved.*training, correct model\.config$"):
        build("cpo", model, tmp_path)


def test_a_tokenizer_that_cannot_be_saved(tiny_model, tmp_path):
    from tokenizers import pre_tokenizers

    class Letters:
        def pre_tokenize(self, text):
            text.split(lambda i, part: [part])

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Letters())
    with pytest.raises(
        ValueError, match=r"the model's tokenizer cannot be saved.*Custom PreTokenizer cannot be serial"
    ):
        model_checks._try_to_save(tokenizer, str(tmp_path), "tokenizer")


@both_bases
def test_an_output_folder_that_cannot_be_written_to(base, tiny_model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_checks.tempfile, "TemporaryDirectory", full)
    with pytest.raises(OSError, match=r"output_dir .* cannot be written to \(No space left on device\): name another"):
        build(base, load(tiny_model), tmp_path)


def test_a_disk_too_small_for_a_checkpoint(tiny_model, tmp_path, monkeypatch, caplog):
    model = load(tiny_model)
    saved(model, tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((tmp_path / "model" / "model.safetensors").read_bytes()[:8], "little")
    weights = size - header
    free = {}
    monkeypatch.setattr(model_checks.shutil, "disk_usage", lambda folder: SimpleNamespace(**free))
    for factor, options in {3: {}, 1: {"save_only_model": True}}.items():  # two more numbers a weight, of AdamW
        for free["free"], warns in ((factor * weights, False), (factor * weights - 1, True)):
            caplog.clear()
            build("cpo", model, tmp_path, options={"save_strategy": "steps", **options})
            assert ("a checkpoint takes at least" in caplog.text) == warns
    caplog.clear()
    free["free"] = 0
    build("cpo", model, tmp_path)  # saves none
    assert "a checkpoint takes" not in caplog.text
    peft = LoraConfig(r=2, task_type="CAUSAL_LM")
    free["free"] = weights
    build("cpo", model, tmp_path, options={"save_strategy": "steps"}, peft_config=peft)
    assert "a checkpoint takes" not in caplog.text


def test_positions_that_an_evaluation_lacks(tmp_path, caplog):
    """Of a table there is nothing beyond its end; what is computed goes on, as far as the model was made for."""
    rows = [PreferenceRow("1234567890", [x, "x"]) for x in ("y", "x" * 50)]
    table = kept(made(OPTConfig(**{**ABSOLUTE["opt"].to_dict(), "max_position_embeddings": 60})), tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"row 1 of pairs has 6\d tokens, and the model has 60 positions: set max_len"
    ):
        completion_logps(table, byte_tokenizer(), rows, desc="pairs")
    assert not caplog.text
    computed = made(LlamaConfig(**{**LLAMA.to_dict(), "max_position_embeddings": 60}))
    completion_logps(computed, byte_tokenizer(), rows, desc="pairs")
    said = "1 of 2 rows are longer than the 60 positions that the model was made for"
    assert said in caplog.text
    caplog.clear()
    for model in (table, computed):
        completion_logps(model, byte_tokenizer(), rows, desc="pairs", max_length=60)
    assert said not in caplog.text


@pytest.mark.parametrize("base", BASES)
def test_dropout_that_trl_leaves(base, tmp_path, caplog):
    """OPT drops out in functions: two passes differ, although disable_dropout is set; with 0 they do not."""
    given = ABSOLUTE["opt"].to_dict() | {"max_position_embeddings": 128}
    for rate, differs in ((0.5, True), (0.0, False)):
        caplog.clear()
        model = kept(made(OPTConfig(**{**given, "dropout": rate})), tmp_path / str(rate))
        build(base, model, tmp_path, options={"disable_dropout": True})
        ids = torch.arange(5, 15)[None]
        one, other = (model.train()(input_ids=ids).logits for _ in range(2))
        assert torch.equal(one, other) != differs
        assert ("leaves what is not a module: dropout of OPTDecoder" in caplog.text) == differs
