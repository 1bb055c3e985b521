"""What a trainer is called with: another kind of thing is named, with what to give instead."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, byte_tokenizer, load, preference_rows, quiet
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_margins import GapPOConfig, GapPOTrainer, MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.trainers.reference_checks import _warn_of_another

TRAINERS = {"cpo": (MarginCPOTrainer, MarginCPOConfig), "dpo": (MarginDPOTrainer, MarginDPOConfig)}


def build(base, model, out, **arguments):
    trainer, config = TRAINERS[base]
    options = {"args": config(**quiet(output_dir=str(out), max_steps=1)), "processing_class": byte_tokenizer()}
    return trainer(model, **{**options, "train_dataset": preference_rows(4), **arguments})


@pytest.mark.parametrize(
    ("base", "arguments", "said"),
    [
        ("dpo", {"model": AutoModelForCausalLM}, r"model has the class AutoModelForCausalLM .*from_pretrained"),
        ("cpo", {"model": None}, "model has a NoneType where it needs a name"),
        ("cpo", {"model": "config"}, r"model has a LlamaConfig .*from_config\(config\)"),
        ("cpo", {"model": "compiled"}, "model has an OptimizedModule .*torch_compile=True"),
        ("dpo", {"args": {"beta": 1}}, r"args has a dict .*MarginDPOConfig\(\*\*args\)"),
        ("dpo", {"args": MarginDPOConfig}, r"args has the class MarginDPOConfig .*MarginDPOConfig\('out'\)"),
        ("cpo", {"args": DPOConfig}, "args has a DPOConfig where it needs a MarginCPOConfig, or TRL's CPOConfig"),
        ("dpo", {"args": GapPOConfig}, "args has a GapPOConfig .*trainer of its base"),
        ("dpo", {"args": TrainingArguments}, "args has a TrainingArguments"),
        ("dpo", {"ref_model": "a/model"}, "ref_model has a str .*from_pretrained"),
        ("cpo", {"processing_class": "a/model"}, "processing_class has a str .*AutoTokenizer"),
        ("cpo", {"peft_config": {"r": 4}}, "peft_config has a dict .*LoraConfig"),
        ("cpo", {"callbacks": TrainerCallback()}, "callbacks has a TrainerCallback .*a list"),
        ("cpo", {"callbacks": [print]}, "callbacks has a builtin_function_or_method"),
        ("cpo", {"optimizers": torch.optim.SGD}, r"optimizers has the class SGD .*\(optimizer, None\)"),
        ("cpo", {"optimizers": (torch.optim.SGD, None)}, "optimizers has the class SGD .*of the model's parameters"),
        ("cpo", {"optimizers": (None, 3)}, "optimizers has an int .*a schedule"),
        ("dpo", {"eval_dataset": {0: None}}, "eval_dataset has an int .*text as the name"),
        ("cpo", {"tokenizer": None}, "processing_class"),
        ("cpo", {"train_datasets": None}, "'train_datasets': did you mean 'train_dataset'"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else part,
)
def test_an_argument_of_another_kind(base, arguments, said, tiny_model, tmp_path):
    arguments = dict(arguments)
    model, args = arguments.pop("model", load(tiny_model)), arguments.get("args")
    if args in (DPOConfig, GapPOConfig, TrainingArguments):
        arguments["args"] = args(output_dir=str(tmp_path), use_cpu=True)
    if isinstance(model, str):
        model = AutoConfig.from_pretrained(tiny_model) if model == "config" else torch.compile(load(tiny_model))
    with pytest.raises(TypeError, match=said):
        build(base, model, tmp_path, **arguments)


def test_a_path_and_numbers_of_numpy(tiny_model, tmp_path):
    """They are as good as text and Python's numbers; a checkpoint and its settings are JSON."""
    options = {"max_steps": np.int64(1), "learning_rate": np.float32(1e-4), "save_strategy": "steps", "save_steps": 1}
    args = GapPOConfig(**quiet(output_dir=str(tmp_path), **options))
    trainer = GapPOTrainer(Path(tiny_model), args=args, train_dataset=preference_rows(4))
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.parametrize("name", ["beta", "loss_types"])
def test_what_the_objective_has_read_is_not_set_later(name, tiny_model, tmp_path):
    trainer = build("dpo", load(tiny_model), tmp_path, ref_model=load(tiny_model))
    value = getattr(trainer, name)
    with pytest.raises(ValueError, match=rf"trainer\.{name} cannot be set any more: .*new trainer"):
        setattr(trainer, name, 30.0 if name == "beta" else ["hinge"])
    assert getattr(trainer, name) == value
    assert not hasattr(trainer, "simpo_gamma")  # CPOTrainer's


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize("name", ["beta", "simpo_gamma", "loss_type", "max_length", "weight", "ld_alpha"])
def test_a_setting_that_comes_too_late(name, base, tiny_model, tmp_path):
    """It would be in the card, and in no loss."""
    config = TRAINERS[base][1](**quiet(output_dir=str(tmp_path), max_steps=1))
    if not hasattr(config, name):
        return
    trainer = build(base, load(tiny_model), tmp_path, args=config)
    trainer.args.learning_rate = 1e-3  # which is read when training begins
    trainer.args.eval_min_score_gap = 3.0
    setattr(trainer.args, name, "hinge" if name == "loss_type" else 9)
    trainer.eval_dataset = trainer.train_dataset
    for late in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=rf"args\.{name} was .* when the trainer was made"):
            late()


@pytest.mark.parametrize(("name", "value"), [("beta", 9.0), ("gamma_beta_ratio", 9.0), ("simpo_gamma", 9.0)])
def test_a_target_margin_that_no_longer_fits_beta(name, value, tiny_model, tmp_path):
    config = GapPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1, beta=2.0, gamma_beta_ratio=0.5))
    assert config.simpo_gamma == 1.0
    setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"{name}=9.* do not fit each other: .*Make a new config"):
        GapPOTrainer(
            load(tiny_model), args=config, train_dataset=preference_rows(2), processing_class=byte_tokenizer()
        )


def lora():
    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize(
    ("names", "active", "fix"),
    [
        (["mine"], ["mine"], "leave adapter_name out"),
        (["default", "two"], ["two"], r"model\.set_adapter\('default'\)"),
        (["default", "two"], ["default", "two"], r"model\.set_adapter\('default'\)"),
        (["default", "two"], ["default"], None),
    ],
)
def test_the_adapter_that_trains_is_the_one_that_a_saved_folder_gives(names, active, fix, base, tiny_model, tmp_path):
    model = get_peft_model(load(tiny_model), lora(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora())
    model.base_model.set_adapter(active)
    if fix is None:
        build(base, model, tmp_path)
        return
    with pytest.raises(ValueError, match=f"active adapters are .*{fix}"):
        build(base, model, tmp_path)


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_weights_without_values(which, tiny_model, tmp_path):
    given = {"model": load(tiny_model), "ref_model": load(tiny_model)}
    given[which].lm_head.to("meta")
    with pytest.raises(ValueError, match=rf"1 of the \d+ weight tensors of {which} have no values \(lm_head"):
        build("dpo", given.pop("model"), tmp_path, **given)


def test_a_schedule_of_another_optimizer(tiny_model, tmp_path):
    model = load(tiny_model)
    one, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    for optimizer in (one, None):
        with pytest.raises(ValueError, match="the StepLR sets the learning rate of another optimizer"):
            build("cpo", model, tmp_path, optimizers=(optimizer, StepLR(other, 1)))
    build("cpo", model, tmp_path, optimizers=(one, StepLR(one, 1)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "follows a metric of the evaluations: set eval_strategy"),
        ({"metric_for_best_model": "eval_pwa_all"}, "has mode 'min', and eval_pwa_all is better where it is higher"),
        ({"metric_for_best_model": "eval_loss"}, None),
    ],
)
def test_a_schedule_that_follows_a_metric(options, said, tiny_model, tmp_path):
    model, rows = load(tiny_model), preference_rows(4)
    evaluates = {"eval_strategy": "steps", "eval_steps": 1} if options else {}
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1, **evaluates, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizers = (optimizer, ReduceLROnPlateau(optimizer))
    trainer = build("cpo", model, tmp_path, args=config, eval_dataset=rows, optimizers=optimizers)
    if said is None:
        trainer.train()
        return
    with pytest.raises(ValueError, match=said):
        trainer.train()


def endless():
    while True:
        yield {"prompt": "a ", "chosen": "b", "rejected": "c d"}


@pytest.mark.parametrize("base", TRAINERS)
def test_an_evaluation_stream_has_an_end(base, tiny_model, tmp_path):
    stream = IterableDataset.from_generator(endless)
    said = r"stream of more than 100,000 rows.*eval_dataset\.take"
    with pytest.raises(ValueError, match=f"the eval data set is a {said}"):
        build(base, load(tiny_model), tmp_path, eval_dataset=stream)
    trainer = build(base, load(tiny_model), tmp_path, train_dataset=stream, eval_dataset={"a": stream.take(3)})
    with pytest.raises(ValueError, match=said):
        trainer.evaluate(stream)
    assert trainer.evaluate()["eval_a_n_pairs"] == 3


@pytest.mark.parametrize("base", TRAINERS)
def test_sets_by_name_and_sets_without_tokens(base, tiny_model, tmp_path):
    rows = preference_rows(4)
    trainer = build(base, load(tiny_model), tmp_path, eval_dataset={"a": rows})
    with pytest.raises(ValueError, match="unknown evaluation set 'zz'; known: a"):
        trainer.evaluate("zz")
    for look in (trainer.evaluate, trainer.predict):
        with pytest.raises(TypeError, match=r"data set is a list, .*Dataset\.from_list"):
            look(rows.to_list())
    with pytest.raises(TypeError, match="the test data set is a str"):
        trainer.predict("a")
    named, raw, predicted = trainer.evaluate("a"), trainer.evaluate(rows), trainer.predict(rows).metrics
    assert named["eval_loss"] == raw["eval_loss"] == predicted["test_loss"]
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="has no evaluation sets by name"):
        trainer.evaluate("a")


@pytest.mark.parametrize("base", TRAINERS)
def test_a_list_in_place_of_a_mapping(base, tmp_path):
    with pytest.raises(ValueError, match=r"model_init_kwargs must be a mapping, or one as JSON; it is \['dtype'\]"):
        TRAINERS[base][1](output_dir=str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs=["dtype"])


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float32, "auto"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_model_by_name(key, dtype, base, tiny_model, tmp_path):
    """TRL and transformers write it into the config as a dtype and as text, by turns. The older key is an alias."""
    trainer, config = TRAINERS[base]
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = {"train_dataset": preference_rows(4), "eval_dataset": preference_rows(2)}
    for steps in (1, 2):
        options = quiet(output_dir=str(tmp_path), max_steps=steps, model_init_kwargs={key: dtype}, **often)
        made = trainer(tiny_model, args=config(**options), processing_class=byte_tokenizer(), **arguments)
        made.train(resume_from_checkpoint=steps == 2)
        made.evaluate()
    assert made.model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert made.state.global_step == 2


@pytest.mark.parametrize("base", TRAINERS)
def test_a_later_set_without_scores_is_said_to_be(base, tiny_model, tmp_path, caplog):
    rows = preference_rows(4)
    config = TRAINERS[base][1](**quiet(output_dir=str(tmp_path), max_steps=1), weight="score-gap")
    trainer = build(base, load(tiny_model), tmp_path, args=config)
    trainer.evaluate(rows)
    assert not [each for each in caplog.messages if "no scores" in each]
    trainer.evaluate(rows.remove_columns(["score_chosen", "score_rejected"]))
    said = "the eval data set has no scores, which 'score-gap' needs: its loss is that without 'score-gap'"
    assert len([each for each in caplog.messages if each.startswith(said)]) == 1
    bad = rows.remove_columns("score_chosen").add_column("score_chosen", [1.0, None, 2.0, 3.0])
    with pytest.raises(ValueError, match="column 'score_chosen', row 1 of the eval data set: the score None is None"):
        trainer.evaluate(bad)
    plain = build(base, load(tiny_model), tmp_path)
    assert plain.evaluate(bad)["eval_n_pairs"] == 4
    assert "row 1 of the eval data set: the score None is None" in caplog.text
    assert "pairs without scores count in pwa_all alone" in caplog.text


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "has a NoneType where it needs numbers by name"),
        ([1.0], "has a list where it needs numbers by name"),
        ({"all": torch.ones(2)}, "'all' has a Tensor where it needs a number"),
        ({1: 2.0}, "1 has a float where it needs a number, under a name that is text"),
    ],
)
def test_metrics_that_are_none(found, said, tiny_model, tmp_path):
    trainer = build("cpo", load(tiny_model), tmp_path, compute_metrics=lambda _: found)
    with pytest.raises(TypeError, match=said):
        trainer.evaluate(preference_rows(2))


@pytest.mark.parametrize("base", TRAINERS)
def test_metrics_under_the_trainer_s_names(base, tiny_model, tmp_path, caplog):
    rows = preference_rows(4)
    plain = build(base, load(tiny_model), tmp_path).evaluate(rows)
    own = {"pwa_all": 7.0, "eval_spearman": 7.0, "loss": 7.0, "mine": np.float32(7)}
    trainer = build(base, load(tiny_model), tmp_path, compute_metrics=lambda _: own)
    for _ in range(2):
        found = trainer.evaluate(rows)
        assert found["eval_mine"] == 7.0
        assert all(found[f"eval_{name}"] == plain[f"eval_{name}"] for name in ("pwa_all", "spearman", "loss"))
    said = [each for each in caplog.messages if each.startswith("compute_metrics gives 'pwa_all' and 'eval_spearman'")]
    assert len(said) == 1


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize("name", ["default_data_collator", "DataCollatorWithPadding"])
def test_a_collator_that_makes_no_batch_of_pairs(name, base, tiny_model, tmp_path):
    collator = default_data_collator if name[0] == "d" else DataCollatorWithPadding(byte_tokenizer())
    trainer = build(base, load(tiny_model), tmp_path, data_collator=collator)
    with pytest.raises(ValueError, match=rf"data_collator: {name} makes no batch of \d rows"):
        trainer.train()


def test_a_collator_of_the_other_base(tiny_model, tmp_path):
    trainer = build("cpo", load(tiny_model), tmp_path, data_collator=DataCollatorForPreference(pad_token_id=0))
    with pytest.raises(ValueError, match=r"DataCollatorForPreference makes no batch .*'prompt_ids'.*leave data_coll"):
        trainer.train()


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize("share_prompt", ["auto", "never"])
def test_a_collator_that_changes_which_pairs_there_are(share_prompt, base, tiny_model, tmp_path):
    """Their scores are those of the rows, in their order."""

    def length(row):
        return len(row.get("chosen_ids", row.get("chosen_input_ids")))

    def build_with(collate):
        options = {"share_prompt": share_prompt, "per_device_train_batch_size": 4, "save_strategy": "no"}
        args = TRAINERS[base][1](**quiet(output_dir=str(tmp_path), max_steps=1, weight="score-gap", **options))
        trainer = build(base, load(tiny_model), tmp_path, args=args, train_dataset=preference_rows(8))
        trainer.data_collator.collator = partial(collate, trainer.data_collator.collator)
        return trainer

    def backwards(collator, rows):
        return collator(sorted(rows, key=length, reverse=True))

    def fewer(collator, rows):
        return collator(rows[1:])

    def half_backwards(collator, rows):
        names = [name for name in rows[0] if name.startswith("rejected")]
        others = [
            {**row, **{name: other[name] for name in names}} for row, other in zip(rows, rows[::-1], strict=True)
        ]
        return collator(others)

    def with_one_more(collator, rows):
        """A token behind each row."""
        sides = ("chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids", "chosen_labels")
        sides += ("rejected_labels", "chosen_attention_mask", "rejected_attention_mask")
        more = [{name: [*v, v[-1]] if name in sides else v for name, v in row.items()} for row in rows[::-1]]
        return collator(more)

    def same(collator, rows):
        return collator(list(rows))

    with pytest.raises(ValueError, match="data_collator: partial gives the pairs in another order than their rows"):
        build_with(backwards).train()
    for other in (half_backwards, with_one_more)[base == "dpo" :]:  # whose rows have their prompts apart
        with pytest.raises(ValueError, match="data_collator: partial gives the pairs in another order"):
            build_with(other).train()
    with pytest.raises(ValueError, match=r"data_collator: partial makes a batch of 3 pairs out of 4 rows"):
        build_with(fewer).train()
    build_with(same).train()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_needs_gradients(off, tiny_model, tmp_path):
    trainer = build("cpo", load(tiny_model), tmp_path)
    with off(), pytest.raises(ValueError, match="gradients are switched off where train"):
        trainer.train()


@pytest.mark.parametrize("base", TRAINERS)
@pytest.mark.parametrize("images", [[], None])
def test_a_column_of_no_images(images, base, tiny_model, tmp_path):
    rows = Dataset.from_list([{**row, "images": images} for row in preference_rows(4)])
    trainer = build(base, load(tiny_model), tmp_path, train_dataset=rows)
    assert "images" not in trainer.train_dataset.column_names


class Resizes(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.resize_token_embeddings(300, mean_resizing=False)


def test_weights_that_are_replaced_while_training(tiny_model, tmp_path):
    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), max_steps=2))
    trainer = build("cpo", load(tiny_model), tmp_path, args=config, callbacks=[Resizes()])
    with pytest.raises(ValueError, match=r"after step 1, model\.embed_tokens\.weight is not the weight tensor"):
        trainer.train()


def with_layers_of(reference, model):
    reference.model.layers = model.model.layers
    return reference


@pytest.mark.parametrize(
    ("made", "n"),
    [
        (lambda model, other: copy.copy(model), 21),
        (lambda model, other: with_layers_of(other, model), 18),
    ],
    ids=["a shallow copy", "the same layers"],
)
def test_a_reference_that_would_train_with_the_model(made, n, tiny_model, tmp_path):
    model = load(tiny_model)
    said = f"the reference model has {n} of the 21 weight tensors that train, model.*copy.deepcopy"
    with pytest.raises(ValueError, match=said):
        build("dpo", model, tmp_path, ref_model=made(model, load(tiny_model)))
    model = load(tiny_model)
    model.model.layers.requires_grad_(False)  # shared, and never trained
    build("dpo", model, tmp_path, ref_model=with_layers_of(load(tiny_model), model))


def test_references_that_cannot_be_read(tiny_model, tmp_path):
    adapted = get_peft_model(load(tiny_model), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"ref_model has a PeftModel.* needs the model itself: ref_model.merge_and_un"):
        build("dpo", load(tiny_model), tmp_path, ref_model=adapted)
    build("dpo", load(tiny_model), tmp_path, ref_model=adapted.merge_and_unload())
    broken = load(tiny_model)
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(
        ValueError, match=r"1 of the reference model's 21 weight tensors hold NaN .* model.norm.weight"
    ):
        build("dpo", load(tiny_model), tmp_path, ref_model=broken)


def test_a_model_that_is_wrapped_already(tiny_model, tmp_path):
    model = torch.nn.DataParallel(load(tiny_model))
    with pytest.raises(TypeError, match="model has a DataParallel where it needs the model in it"):
        build("cpo", model, tmp_path)


def test_an_optimizer_that_needs_a_closure(tiny_model, tmp_path):
    model = load(tiny_model)
    with pytest.raises(TypeError, match=r"optimizers has an? LBFGS where it needs one whose step needs no closure"):
        build("cpo", model, tmp_path, optimizers=(torch.optim.LBFGS(model.parameters()), None))
    build("cpo", model, tmp_path, optimizers=(torch.optim.SparseAdam(model.parameters()), None))


def test_a_trainer_is_not_copied(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="a MarginCPOTrainer cannot be copied"):
        copy.deepcopy(build("cpo", load(tiny_model), tmp_path))


def test_the_pair_log_goes_where_the_model_goes(tiny_model, tmp_path):
    """Also where output_dir has been set since the trainer was made."""
    trainer = build("cpo", load(tiny_model), tmp_path / "a")
    trainer.args.output_dir = str(tmp_path / "b")
    trainer.train()
    assert (tmp_path / "b" / "pair_log.csv").exists()
    assert not (tmp_path / "a" / "pair_log.csv").exists()


@pytest.mark.parametrize(
    "reference",
    [
        lambda: LlamaForSequenceClassification(LlamaConfig(**TINY)),
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1)),
        lambda: torch.nn.Linear(2, 2),
    ],
)
def test_references_of_another_kind(reference, tiny_model, tmp_path):
    with pytest.raises(
        TypeError, match=r"ref_model has an? \w+ where it needs one that writes text from left to right"
    ):
        build("dpo", load(tiny_model), tmp_path, ref_model=reference())


def test_a_module_that_is_no_model_of_transformers(tmp_path):
    with pytest.raises(TypeError, match="model has a Linear where it needs a model of transformers'"):
        build("cpo", torch.nn.Linear(2, 2), tmp_path)


def test_a_reference_drops_nothing_out(tiny_model, tmp_path):
    """However it is given."""
    trainer = build("dpo", load(tiny_model), tmp_path, ref_model=load(tiny_model).train())
    assert not any(module.training for module in trainer.ref_model.modules())


def test_a_model_that_has_changed_since_it_was_loaded(tiny_model, tmp_path, caplog):
    """Its reference model would be what it was."""
    build("dpo", load(tiny_model), tmp_path)
    assert "has changed since" not in caplog.text
    model = load(tiny_model)
    model.model.norm.weight.data[3] += 0.1
    build("dpo", model, tmp_path, ref_model=copy.deepcopy(model))
    assert "has changed since" not in caplog.text
    build("dpo", model, tmp_path)
    assert f"loaded from {tiny_model}, and in 1 of 21 weight tensors it is not the model" in caplog.text
    assert "(model.norm.weight is one)" in caplog.text
    caplog.clear()
    model = load(tiny_model)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    build("dpo", model, tmp_path)
    assert "in 1 of 22 weight tensors it is not the model" in caplog.text
    assert "(lm_head.bias is one)" in caplog.text
    caplog.clear()
    model = load(tiny_model)
    del model.model.layers[1]
    build("dpo", model, tmp_path)
    assert "in 9 of 21 weight tensors it is not the model" in caplog.text


def test_a_model_that_was_loaded_with_another_config(tiny_model, tmp_path, caplog):
    """The reference model is not."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, rms_norm_eps=0.1, use_cache=False)
    model.config.output_hidden_states, model.config.id2label = True, {0: "a"}
    build("dpo", model, tmp_path)
    said = f"loaded from {tiny_model} with another config: rms_norm_eps 1e-06, and the model's 0.1. To compare"
    assert said in caplog.text
    caplog.clear()
    build("dpo", model, tmp_path, ref_model=copy.deepcopy(model))
    args = MarginDPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1, model_init_kwargs={"rms_norm_eps": 0.1}))
    build("dpo", str(tiny_model), tmp_path, args=args)
    assert "reference model" not in caplog.text


def test_a_reference_that_is_wrapped(tiny_model, tmp_path, caplog):
    """By which all tensors have other names."""
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    args = MarginDPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1, **how))
    trainer = build("dpo", load(tiny_model), tmp_path, args=args)
    assert next(iter(dict(trainer.ref_model.named_parameters()))).startswith("_orig_mod.")
    assert "is not the model" not in caplog.text
    model = load(tiny_model)
    model.model.norm.weight.data[3] += 0.1
    build("dpo", model, tmp_path, args=args)
    assert "in 1 of 21 weight tensors it is not the model" in caplog.text
    caplog.clear()
    _warn_of_another(load(tiny_model), torch.nn.Sequential(load(tiny_model, 0.1)))
    assert not caplog.messages
    _warn_of_another(load(tiny_model), load(tiny_model, 0.1))
    assert "in 21 of 21 weight tensors it is not the model" in caplog.text


def test_a_reference_in_the_memory_of_the_model(tiny_model, tmp_path):
    model, reference = load(tiny_model), load(tiny_model)
    reference.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ValueError, match="the reference model has 21 of the 21 weight tensors that train"):
        build("dpo", model, tmp_path, ref_model=reference)
    at, weights = 0, [*reference.parameters(), *load(tiny_model).parameters()]
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    model = load(tiny_model)
    for weight in [*reference.parameters(), *model.parameters()]:
        weight.data, at = flat[at : at + weight.numel()].view_as(weight), at + weight.numel()
    build("dpo", model, tmp_path, ref_model=reference)  # each has its own part of one storage


def test_more_rows_than_the_reference_that_was_loaded(tiny_model, tmp_path):
    model = load(tiny_model)
    model.resize_token_embeddings(300)
    said = rf"It was loaded from {tiny_model}, and the model has changed since: pass ref_model=copy.deepcopy\(model\)"
    with pytest.raises(ValueError, match=said):
        build("dpo", model, tmp_path)
    build("dpo", model, tmp_path, ref_model=copy.deepcopy(model))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("model.norm", lambda weight: weight[:1].expand_as(weight)),
        ("lm_head", lambda weight: weight[:1].expand_as(weight)),
        ("lm_head", lambda weight: torch.ones(sum(weight.shape)).unfold(0, weight.shape[1], 1)[1:]),
    ],
)
def test_weights_that_are_written_over_one_another(name, make, tiny_model, tmp_path):
    model = load(tiny_model)
    module = model.get_submodule(name)
    whole = module.weight.detach()
    module.weight = torch.nn.Parameter(make(whole))
    assert module.weight.shape == whole.shape
    with pytest.raises(ValueError, match=rf"\({name}.weight\) have values that share memory"):
        build("cpo", model, tmp_path)
    module.weight = torch.nn.Parameter(whole.T.contiguous().T)
    build("cpo", model, tmp_path)


def test_a_mixed_model_that_nothing_could_load(tiny_model, tmp_path):
    mixed = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="of which nothing could load what is saved"):
        build("cpo", mixed, tmp_path)


@pytest.mark.parametrize("base", TRAINERS)
def test_tokens_that_the_head_cannot_write(base, tiny_model, tmp_path):
    """A prompt may have them."""
    model = load(tiny_model)
    tokenizer = byte_tokenizer()
    row = {"prompt": "z ", "chosen": "a", "rejected": "b"}
    largest = max(tokenizer(row["prompt"] + row["chosen"])["input_ids"][1:])
    assert largest > max(tokenizer("ab")["input_ids"])
    ends = tokenizer.eos_token_id
    model.lm_head = torch.nn.Linear(model.config.hidden_size, max(ends, *tokenizer("ab")["input_ids"]) + 1, bias=False)
    model.config.tie_word_embeddings = False
    options = {"ref_model": copy.deepcopy(model)} if base == "dpo" else {}
    build(base, model, tmp_path, train_dataset=Dataset.from_list([row] * 2), **options)
    rows = Dataset.from_list([row, {**row, "chosen": "az"}])
    with pytest.raises(
        ValueError, match=r"row 1 of the train data set has the token .* in a completion, and the lang"
    ):
        build(base, model, tmp_path, train_dataset=rows, **options)


@pytest.mark.parametrize("there", ["a file", "a link to nowhere", "below a file"])
def test_an_output_folder_that_cannot_be_made(there, tiny_model, tmp_path):
    out = tmp_path / "out"
    if there == "a link to nowhere":
        out.symlink_to(tmp_path / "nowhere" / "else")
    else:
        out.write_text("mine")
    out = out / "run" if there == "below a file" else out
    with pytest.raises(OSError, match=f"output_dir {out} cannot be made .*: name another folder"):
        build("cpo", load(tiny_model), out)


def test_sets_without_names(tiny_model, tmp_path):
    rows = preference_rows(2)
    for given, said in (({}, "is a dict without sets"), ({"": rows}, "has a set without a name")):
        with pytest.raises(ValueError, match=f"eval_dataset {said}: give one data set, or a dict with a name"):
            build("cpo", load(tiny_model), tmp_path, eval_dataset=given)


@pytest.mark.parametrize("base", TRAINERS)
def test_adapters_of_which_nothing_can_train(base, tiny_model, tmp_path):
    for adapter, said in (
        (PromptTuningConfig(num_virtual_tokens=2), "the PromptTuningConfig needs the task type CAUSAL_LM"),
        (PeftConfig(task_type="CAUSAL_LM"), "the PeftConfig needs a kind of adapter: LoraConfig"),
        (LoraConfig(lora_alpha=float("nan")), "lora_alpha is nan: give a finite number"),
    ):
        with pytest.raises(ValueError, match=f"peft_config: {said}"):
            build(base, load(tiny_model), tmp_path, peft_config=adapter)
    assert build(base, load(tiny_model), tmp_path, peft_config=LoraConfig(target_modules=["q_proj"])).train()


@pytest.mark.parametrize("name", ["cpo_loss", "concatenated_forward", "concatenated_inputs", "tokenize_row"])
@pytest.mark.parametrize("is_trls", [False, True])
def test_methods_that_would_be_overridden_in_vain(is_trls, name, tiny_model, tmp_path):
    """Where the loss is CPOTrainer's own, its parts are called."""
    options = {"loss_type": "ipo", "share_prompt": "never"} if is_trls else {"loss_type": "ipo"}
    own = type("Own", (MarginCPOTrainer,), {name: lambda *args, **kwargs: 1 / 0})

    def train() -> None:
        args = MarginCPOConfig(**quiet(output_dir=str(tmp_path), max_steps=1, **options))
        given = {"train_dataset": preference_rows(4), "processing_class": byte_tokenizer()}
        own(load(tiny_model), args=args, **given).train()

    if is_trls and name != "tokenize_row":
        with pytest.raises(ZeroDivisionError):
            train()
    else:
        with pytest.raises(TypeError, match=f"Own.{name} would not be called: "):
            train()


def test_a_config_is_shown_without_its_secrets(tmp_path):
    """As text, in a notebook and in an error."""
    token = "hf_" + "Ab1" * 12
    for cls in (GapPOConfig, MarginDPOConfig):
        config = cls(output_dir=str(tmp_path), bf16=False, hub_token=token, model_init_kwargs={"token": token})
        assert config.hub_token == token
        for shown in (repr(config), str(config), f"{config}"):
            assert token not in shown
            assert shown.startswith(f"{cls.__name__}(output_dir=")
            assert "learning_rate=" in shown
