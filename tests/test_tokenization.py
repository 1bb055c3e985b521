"""Batched tokenization gives CPOTrainer's own columns; rows of like length can be grouped."""

from __future__ import annotations

import pytest
from conftest import load, preference_rows, quiet
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.trainers.collator import ROW
from trl_margins.trainers.tokenization import RowsOfABatch

TEXTS = [
    {"prompt": "héllo wörld ", "chosen": "日本語 ok", "rejected": "🙂🙂"},
    {"prompt": "x", "chosen": "", "rejected": "y"},
    {"prompt": "a" * 200, "chosen": "b" * 50, "rejected": "c"},
]


def merging_tokenizer(base) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that merges over the border between prompt and answer."""
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


def columns(trainer_class, config_class, model, rows, tokenizer, out, **options):
    trainer = trainer_class(
        load(model),
        args=config_class(**quiet(output_dir=str(out), max_length=96, **options)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    train = trainer.train_dataset  # whose rows have numbers, for errors and the pair log
    return train.remove_columns(ROW) if ROW in train.column_names else train, trainer.eval_dataset


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("form", ["standard", "conversational", "implicit", "texts"])
def test_the_tokens_are_trls(form, merges, tiny_model, tokenizer, tmp_path):
    tokenizer = merging_tokenizer(tokenizer) if merges else tokenizer
    rows = Dataset.from_list(TEXTS) if form == "texts" else preference_rows(12, form)
    ours = columns(MarginCPOTrainer, MarginCPOConfig, tiny_model, rows, tokenizer, tmp_path)
    theirs = columns(CPOTrainer, CPOConfig, tiny_model, rows, tokenizer, tmp_path)
    for mine, reference in zip(ours, theirs, strict=True):
        assert set(mine.column_names) == set(reference.column_names)
        assert mine.to_list() == [{name: row[name] for name in mine.column_names} for row in reference]


def test_an_encoder_decoder_model_too(tiny_encoder_decoder, tokenizer, tmp_path):
    rows, options = preference_rows(6), {"max_completion_length": 32}
    ours, _ = columns(MarginCPOTrainer, MarginCPOConfig, tiny_encoder_decoder, rows, tokenizer, tmp_path, **options)
    theirs, _ = columns(CPOTrainer, CPOConfig, tiny_encoder_decoder, rows, tokenizer, tmp_path, **options)
    assert ours.to_list() == [{name: row[name] for name in ours.column_names} for row in theirs]


def test_the_second_time_it_comes_from_the_cache(tiny_model, tokenizer, tmp_path, monkeypatch):
    preference_rows(6).to_json(tmp_path / "rows.jsonl")
    calls, rows_of = [], RowsOfABatch.__call__

    def load_rows():
        return Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))

    columns(MarginCPOTrainer, MarginCPOConfig, tiny_model, load_rows(), tokenizer, tmp_path)
    monkeypatch.setattr(RowsOfABatch, "__call__", lambda *a: calls.append(a) or rows_of(*a))
    columns(MarginCPOTrainer, MarginCPOConfig, tiny_model, load_rows(), tokenizer, tmp_path)
    assert not calls


def test_what_is_no_text_is_trls_error(tiny_model, tokenizer, tmp_path):
    rows = Dataset.from_list([{"prompt": 3, "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="prompt should be an str"):
        columns(MarginCPOTrainer, MarginCPOConfig, tiny_model, rows, tokenizer, tmp_path)


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
