"""Tokens: those of the chat template, by TRL's DPO rule on both bases; CPOTrainer's own where asked for."""

from __future__ import annotations

import copy
import logging

import pandas as pd
import pytest
import torch
from conftest import BASES, load, preference_rows, quiet
from datasets import Dataset
from said import word_for_word  # noqa: F401 - its messages are held against said/
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.pairs import ROW
from trl_margins.recording.pair_log import PAIRS_FILE
from trl_margins.rows.tokens import PairTokenizer

CPO = ("prompt_input_ids", "chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
CPO += ("prompt_attention_mask", "chosen_attention_mask", "rejected_attention_mask")
DPO = ("prompt_ids", "chosen_ids", "rejected_ids")
TEXTS = [
    {"prompt": "héllo wörld ", "chosen": "日本語 ok", "rejected": "🙂🙂"},
    {"prompt": "x", "chosen": "", "rejected": "y"},
    {"prompt": "a" * 60, "chosen": "b" * 50, "rejected": "c"},
]


def merging_tokenizer(base) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that merges over the border between prompt and completion."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sings over the small dog", "ab ab abab"] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=base.chat_template,
    )


def test_cpos_tokens_of_empty_prompts(tiny_model, tokenizer, tmp_path):
    """Some have tokens, some have none: without a token that begins them."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    rows = Dataset.from_list([{"prompt": each, "chosen": "abc", "rejected": "def"} for each in ("x ", "", "y ")])
    theirs = trainer_of(CPOTrainer, CPOConfig, tiny_model, rows, tokenizer, tmp_path)
    ours = trainer_of(MarginCPOTrainer, MarginCPOConfig, tiny_model, rows, tokenizer, tmp_path, tokenization="cpo")
    assert rows_of(ours, CPO) == rows_of(theirs, CPO)
    assert [len(row["prompt_input_ids"]) for row in rows_of(ours, CPO)] == [2, 0, 2]


def rows_of(trainer, names):
    return trainer.train_dataset.select_columns(list(names)).to_list()


def trainer_of(trainer_class, config_class, model, rows, tokenizer, out, **options):
    return trainer_class(
        load(model),
        args=config_class(**quiet(output_dir=str(out), max_length=96, **options)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("form", ["standard", "conversational", "implicit", "texts"])
def test_tokenization_cpo_gives_cpo_trainers_tokens(form, merges, tiny_model, tokenizer, tmp_path):
    tokenizer = merging_tokenizer(tokenizer) if merges else tokenizer
    rows = Dataset.from_list(TEXTS) if form == "texts" else preference_rows(12, form)
    ours = trainer_of(MarginCPOTrainer, MarginCPOConfig, tiny_model, rows, tokenizer, tmp_path, tokenization="cpo")
    theirs = trainer_of(CPOTrainer, CPOConfig, tiny_model, rows, tokenizer, tmp_path)
    assert rows_of(ours, CPO) == rows_of(theirs, CPO)
    assert ours.eval_dataset.select_columns(list(CPO)).to_list() == rows_of(theirs, CPO)


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("form", ["standard", "conversational", "implicit", "texts"])
def test_both_bases_have_dpo_trainers_tokens(form, merges, tiny_model, tokenizer, tmp_path):
    tokenizer = merging_tokenizer(tokenizer) if merges else tokenizer
    rows = Dataset.from_list(TEXTS) if form == "texts" else preference_rows(12, form)
    theirs = rows_of(trainer_of(DPOTrainer, DPOConfig, tiny_model, rows, tokenizer, tmp_path), DPO)
    dpo = trainer_of(MarginDPOTrainer, MarginDPOConfig, tiny_model, rows, tokenizer, tmp_path)
    assert rows_of(dpo, DPO) == theirs
    cpo = trainer_of(MarginCPOTrainer, MarginCPOConfig, tiny_model, rows, tokenizer, tmp_path)
    for ours, reference in zip(rows_of(cpo, CPO), theirs, strict=True):
        prompt = reference["prompt_ids"]
        for side in ("chosen", "rejected"):
            whole = (prompt + reference[f"{side}_ids"])[:96]
            assert ours[f"{side}_input_ids"] == whole
            assert ours[f"{side}_labels"] == [-100] * len(prompt) + whole[len(prompt) :]
            assert ours[f"{side}_attention_mask"] == [1] * len(whole)
        assert ours["prompt_input_ids"] == prompt


def test_where_cpo_trainer_has_other_tokens_is_logged(tiny_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trl_margins"):
        trainer_of(MarginCPOTrainer, MarginCPOConfig, tiny_model, preference_rows(12), tokenizer, tmp_path)
    # this tokenizer puts no <s> in front of a text by itself, and CPOTrainer does
    assert "CPOTrainer's own tokens differ in 12 of the first 12 rows: one more begin token in 12" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "trl_margins"):
        chats = preference_rows(12, "conversational")
        trainer_of(MarginCPOTrainer, MarginCPOConfig, tiny_model, chats, tokenizer, tmp_path)
    assert "own tokens differ" not in caplog.text


def test_an_encoder_decoder_model_has_cpo_trainers_tokens(tiny_encoder_decoder, tokenizer, tmp_path):
    rows, options = preference_rows(6), {"max_completion_length": 32}
    names = ("prompt_input_ids", "prompt_attention_mask", "chosen_labels", "rejected_labels")
    args = (tiny_encoder_decoder, rows, tokenizer, tmp_path)
    ours = trainer_of(MarginCPOTrainer, MarginCPOConfig, *args, **options)
    theirs = trainer_of(CPOTrainer, CPOConfig, *args, **options)
    assert rows_of(ours, names) == rows_of(theirs, names)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_the_second_time_it_comes_from_the_cache(base, tiny_model, tokenizer, tmp_path, monkeypatch):
    preference_rows(6).to_json(tmp_path / "rows.jsonl")
    calls, tokens_of = [], PairTokenizer.__call__
    classes = {"cpo": (MarginCPOTrainer, MarginCPOConfig), "dpo": (MarginDPOTrainer, MarginDPOConfig)}[base]

    def load_rows():
        return Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))

    trainer_of(*classes, tiny_model, load_rows(), tokenizer, tmp_path)
    monkeypatch.setattr(PairTokenizer, "__call__", lambda *a: calls.append(a) or tokens_of(*a))
    trainer_of(*classes, tiny_model, load_rows(), tokenizer, tmp_path)
    assert not calls


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_evaluation_sets_are_not_grouped(base, tiny_model, tokenizer, tmp_path):
    """transformers would, by a length that their rows do not have, after all the training."""
    trainer_class, config_class = BASES[base]
    found = []
    for way in ("random", "group_by_length"):
        settings = quiet(output_dir=str(tmp_path), train_sampling_strategy=way, learning_rate=0.0, max_steps=1)
        settings |= {"eval_strategy": "steps", "eval_steps": 1}
        trainer = trainer_class(
            load(tiny_model),
            args=config_class(**settings),
            train_dataset=preference_rows(8),
            eval_dataset={"one": preference_rows(7, seed=1), "two": preference_rows(5, seed=2)},
            processing_class=tokenizer,
        )
        trainer.train()
        timed = ("runtime", "per_second", "preparation_time", "num_tokens")
        found.append({name: value for name, value in trainer.evaluate().items() if not name.endswith(timed)})
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_length_grouping_is_transformers_own(base, tiny_model, tokenizer, tmp_path):
    """CPOTrainer's rows have no length that transformers would find."""
    trainer_class, config_class = {
        "cpo": (MarginCPOTrainer, MarginCPOConfig),
        "dpo": (MarginDPOTrainer, MarginDPOConfig),
    }[base]
    trainer = trainer_class(
        load(tiny_model),
        args=config_class(
            **quiet(output_dir=str(tmp_path), train_sampling_strategy="group_by_length", num_train_epochs=1)
        ),
        train_dataset=preference_rows(32),
        processing_class=tokenizer,
    )
    trainer.train()
    order = list(trainer._get_train_sampler(trainer.train_dataset))
    lengths = trainer.train_dataset["length"][:]
    first = trainer.train_dataset[0]
    names = ("chosen_input_ids", "rejected_input_ids") if base == "cpo" else ("chosen_ids", "rejected_ids")
    assert lengths[0] == sum(len(first[name]) for name in names)
    batches = [[lengths[i] for i in order[s : s + 4]] for s in range(0, 32, 4)]
    spread = sum(max(batch) - min(batch) for batch in batches)
    plain = sum(max(lengths[s : s + 4]) - min(lengths[s : s + 4]) for s in range(0, 32, 4))
    assert spread < plain
    assert ROW in trainer.train_dataset.column_names


def test_groups_of_an_encoder_decoder(tiny_encoder_decoder, tokenizer, tmp_path):
    rows = preference_rows(8)
    trainer = MarginCPOTrainer(
        AutoModelForSeq2SeqLM.from_pretrained(tiny_encoder_decoder),
        args=MarginCPOConfig(
            **quiet(output_dir=str(tmp_path), train_sampling_strategy="group_by_length", max_steps=1)
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    labels = (trainer.train_dataset[f"{side}_labels"] for side in ("chosen", "rejected"))
    assert trainer.train_dataset["length"][:] == [len(one) + len(other) for one, other in zip(*labels, strict=True)]


class HalfEpochs(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 2 == 0


def test_epochs_that_a_callback_ends_differ(tiny_model, tokenizer, tmp_path):
    trainer = MarginCPOTrainer(
        load(tiny_model),
        args=MarginCPOConfig(
            **quiet(output_dir=str(tmp_path), train_sampling_strategy="group_by_length", num_train_epochs=3)
        ),
        train_dataset=preference_rows(16),
        processing_class=tokenizer,
        callbacks=[HalfEpochs()],
    )
    trainer.train()
    order = pd.read_csv(tmp_path / PAIRS_FILE)["row_number"].tolist()
    assert len({tuple(order[s : s + 8]) for s in range(0, 24, 8)}) == 3


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_groups_of_a_resumed_run(base, tiny_model, tokenizer, tmp_path):
    """In the second epoch; and only the first run evaluates before it trains, which draws random numbers."""
    trainer_class, config_class = BASES[base]

    def trained(resume: str | None) -> tuple[list[int], dict[str, torch.Tensor]]:
        settings = quiet(output_dir=str(tmp_path), train_sampling_strategy="group_by_length", learning_rate=1e-3)
        trainer = trainer_class(
            load(tiny_model),
            args=config_class(**settings | {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}),
            train_dataset=preference_rows(16),
            eval_dataset=preference_rows(4, seed=1),
            processing_class=tokenizer,
        )
        if resume is None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume)
        return pd.read_csv(tmp_path / PAIRS_FILE)["row_number"].tolist(), trainer.model.state_dict()

    order, weights = trained(None)
    assert sorted(order[:16]) == sorted(order[16:]) == list(range(16))
    assert order[:16] != order[16:]
    again, resumed = trained(str(tmp_path / "checkpoint-6"))
    assert again == order
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
