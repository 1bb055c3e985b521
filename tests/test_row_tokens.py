"""Tokens at the edges: what is right is rendered and tokenized here, one row at a time, by plain transformers."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from accelerate import PartialState
from conftest import BASES, VOCABULARY, byte_tokenizer, chat_tokenizer, load, preference_rows, trainer_of
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl.experimental.cpo import CPOTrainer, cpo_trainer

from trl_margins.evaluation.scorer import completion_logps
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.rows import PreferenceRow, RowReader, tokenize
from trl_margins.rows.cpo_tokens import CPOTokenizer
from trl_margins.rows.messages import InParts
from trl_margins.rows.tokens import unread

# ChatML as SmolLM2 has it, with a line break behind each end token, tools, and thinking that a variable switches off
CHATML = (
    "{% if tools %}tools {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if thinking is defined and not thinking %}(none)\n{% endif %}{% endif %}"
)
# Leaves the thinking of earlier turns out, as Qwen3's does, and puts an empty one at the end of a prompt
THINKING = (
    "{% for m in messages %}<s>{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:<think></think>{% endif %}"
)


def sequences(base: str, trainer: Any) -> list[list[tuple[list[int], list[int]]]]:
    """Of each row and side, the tokens before the completion, and the completion's."""
    found = []
    for row in trainer.train_dataset:
        sides = []
        for side in ("chosen", "rejected"):
            if base == "dpo":
                sides.append((list(row["prompt_ids"]), list(row[f"{side}_ids"])))
            else:
                ids, labels = list(row[f"{side}_input_ids"]), list(row[f"{side}_labels"])
                start = sum(label == -100 for label in labels)
                assert labels[start:] == ids[start:]
                sides.append((ids[:start], ids[start:]))
        found.append(sides)
    return found


def chats(**more: Any) -> list[dict[str, Any]]:
    rows = preference_rows(3, "conversational").to_list()
    return [{**row, **{name: value(i) for name, value in more.items()}} for i, row in enumerate(rows)]


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sides = ("chosen", "rejected")
    whole = [{**row, **{side: row["prompt"] + row[side] for side in sides}} for row in rows]
    return [{name: value for name, value in row.items() if name != "prompt"} for row in whole]


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"where": {"type": "string"}}}}]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", ["explicit", "implicit"])
@pytest.mark.parametrize(
    ("more", "variables"),
    [
        ({}, {}),
        ({"chat_template_kwargs": lambda i: {"thinking": bool(i)}}, {"thinking": None}),
        ({"tools": lambda i: TOOLS}, {"tools": TOOLS}),
        ({"tools": lambda i: json.dumps(TOOLS)}, {"tools": TOOLS}),
    ],
    ids=["plain", "chat_template_kwargs", "tools", "tools as JSON"],
)
def test_what_the_template_reads(form, base, streamed, more, variables, tiny_model, tmp_path):
    """Also a template that ends in a line break: no second end token behind it."""
    tokenizer = chat_tokenizer(CHATML)
    plain = chats(**more)
    given = Dataset.from_list(implicit(plain) if form == "implicit" else plain)
    rows = given.to_iterable_dataset() if streamed else given
    found = sequences(base, trainer_of(base, tiny_model, tokenizer, tmp_path, rows, max_length=512))
    for i, (row, sides) in enumerate(zip(plain, found, strict=True)):
        variables = {name: bool(i) if name == "thinking" else value for name, value in variables.items()}
        for side, (before, completion) in zip(("chosen", "rejected"), sides, strict=True):
            text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False, **variables)
            said = row[side][0]["content"]
            assert text.endswith(f"<s>assistant\n{said}</s>\n")
            assert before + completion == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(completion) == f"{said}</s>\n"
    evaluated = completion_logps(load(tiny_model), tokenizer, evaluation_set(given, "here").rows, max_length=512)
    lengths = [[len(completion) for _, completion in sides] for sides in found]
    assert [row.lengths.tolist() for row in evaluated] == lengths


@pytest.mark.parametrize("base", BASES)
def test_thinking_beside_a_plain_answer(base, tiny_model, tmp_path):
    """The prompt alone ends with an empty thought that the whole conversation does not have: the completion begins
    where they part.
    """
    tokenizer = chat_tokenizer(THINKING)
    row = chats()[0]
    row["chosen"] = [{"role": "assistant", "content": "<think>hm</think>yes"}]
    row["rejected"] = [{"role": "assistant", "content": "no"}]
    ((chosen, rejected),) = sequences(
        base, trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list([row]))
    )
    assert tokenizer.decode(rejected[0]).endswith("<s>assistant:")
    assert chosen[0] == rejected[0]
    assert [tokenizer.decode(ids) for _, ids in (chosen, rejected)] == ["<think>hm</think>yes</s>", "no</s>"]


@pytest.mark.parametrize("base", BASES)
def test_a_tokenizer_that_adds_its_own_tokens(base, tiny_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    rows = preference_rows(3).to_list()
    rows[1]["chosen"] += "</s>"
    found = sequences(base, trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows)))
    for row, sides in zip(rows, found, strict=True):
        for side, (before, completion) in zip(("chosen", "rejected"), sides, strict=True):
            assert before + completion == tokenizer(row["prompt"] + row[side].removesuffix("</s>"))["input_ids"]
            assert (before + completion).count(2) == 1
            assert tokenizer.decode(completion) == row[side].removesuffix("</s>") + "</s>"


@pytest.mark.parametrize("base", BASES)
def test_every_text_is_the_tokenizers_own(base, tiny_model, tmp_path):
    """Special tokens written in a text are split where the tokenizer is told so; also by two processes."""
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = True
    rows = preference_rows(4).to_list()
    for row in rows[2:]:  # not in the first, by which a shortcut would be judged
        row["chosen"] += " </s> or <pad>"
    found = sequences(
        base, trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows), dataset_num_proc=2)
    )
    for row, ((before, completion), _) in zip(rows, found, strict=True):
        # the end token is one, all the same
        assert before + completion == [*tokenizer(row["prompt"] + row["chosen"])["input_ids"], 2]


def test_a_truncating_tokenizer_cuts_nothing(tiny_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    rows = preference_rows(2)
    ((_, completion), _), *_ = sequences("cpo", trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows))
    assert tokenizer.decode(completion) == rows[0]["chosen"] + "</s>"


def test_merges_across_the_border():
    """Every token with a character of a completion belongs to it."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ", "ab", "abc"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")
    (merged, plain) = tokenize([PreferenceRow("x ab", ["c", "d"]), PreferenceRow("x a", ["b", "bc"])], tokenizer)
    assert tokenizer.convert_ids_to_tokens(merged.prompt) == ["x", " "]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in merged.completions] == [
        ["abc", "</s>"],
        ["ab", "d", "</s>"],
    ]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in plain.completions] == [["ab", "</s>"], ["abc", "</s>"]]


def split_by_dpos_code(row: dict[str, str], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Of Anthropic/hh-rlhf, and by Dr. DPO's: prompt and answer apart, and the end token behind the answer."""
    start = row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")
    ids = [
        tokenizer(text)["input_ids"]
        for text in (row["chosen"][:start], row["chosen"][start:], row["rejected"][start:])
    ]
    return [(ids[0], [*each, tokenizer.eos_token_id]) for each in ids[1:]]


@pytest.mark.parametrize("base", BASES)
def test_hh_on_a_base_model(base, tiny_model, tmp_path):
    """Dialogues as text, and a byte-level BPE without chat template, begin token and padding, as GPT-NeoX has it."""
    asked = "\n\nHuman: May I?\n\nAssistant: What?\n\nHuman: Ask {}.\n\nAssistant:"
    answers = [
        (" I think so.", " I don't think so."),  # that begin alike
        (" Yes", " No"),
        (" Yes", " Yes, do.\n\nI insist."),  # of which one is the other's beginning
        (" It is.", " Is it?"),  # that share half a word
        (" Yes.", ""),
    ]
    rows = [
        {"chosen": asked.format(i) + one, "rejected": asked.format(i) + other}
        for i, (one, other) in enumerate(answers)
    ]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator([row[side] for row in rows for side in row], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    found = sequences(base, trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows)))
    assert found == [split_by_dpos_code(row, tokenizer) for row in rows]
    assert [tokenizer.decode(ids) for _, ids in found[0]] == [f"{answer}<|endoftext|>" for answer in answers[0]]


@pytest.mark.parametrize(
    ("template", "advice"),
    [
        ("{% for m in messages %}{{ m.content ", "No row can be read with it: give another template"),
        (
            "{{ foo(messages) }}",
            "'foo' is undefined. Change the messages or their tools, drop the row, or give another template",
        ),
        ("{{ raise_exception('no.') }}", "no. Change the messages, or drop the row$"),
    ],
)
def test_a_mistake_of_the_template(template, advice, tiny_model):
    """No row that is dropped helps."""
    rows = evaluation_set(Dataset.from_list(chats()), "here").rows
    with pytest.raises(ValueError, match=f"row 0 of here: the chat template refuses .*{advice}"):
        completion_logps(load(tiny_model), chat_tokenizer(template), rows, desc="here")


@pytest.mark.parametrize("base", BASES)
def test_what_the_template_refuses_is_named(base, tiny_model, tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    rows = chats()
    rows[2]["prompt"] = [{"role": "system", "content": "Be kind"}, *rows[2]["prompt"]]
    tokenizer = chat_tokenizer(template + CHATML)
    with pytest.raises(ValueError, match=r"row 2 of the train data set: the chat template refuses.*System role not"):
        trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows))
    with pytest.raises(ValueError, match="row 2 of here: the chat template refuses"):
        completion_logps(
            load(tiny_model), tokenizer, evaluation_set(Dataset.from_list(rows), "here").rows, desc="here"
        )


@pytest.mark.parametrize("base", BASES)
def test_a_template_without_the_answers(base, tiny_model, tmp_path):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>' + m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(
        ValueError,
        match=r"same tokens in every one of the 3 train pairs.*template or the tokenizer drops the difference",
    ):
        trainer_of(base, tiny_model, chat_tokenizer(template), tmp_path, Dataset.from_list(chats()))


@pytest.mark.parametrize("base", BASES)
def test_pairs_that_are_alike_after_the_cut(base, tiny_model, tokenizer, tmp_path, caplog):
    rows = preference_rows(3).to_list()
    rows[1] |= {"prompt": "a ", "chosen": "b" * 200 + "c", "rejected": "b" * 200 + "d"}
    with caplog.at_level(logging.WARNING, "trl_margins"):
        trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows), max_length=100)
    assert "1 of 3 train pairs have the same tokens twice, although their texts differ" in caplog.text


def test_equal_answers_are_no_win(tiny_model, tokenizer, tmp_path):
    """Not by rounding either, wherever in a batch they are."""
    rows = preference_rows(8).to_list()
    for row in rows[::2]:
        row["rejected"] = row["chosen"]
    dataset = Dataset.from_list(rows)
    for found in completion_logps(load(tiny_model), tokenizer, evaluation_set(dataset, "here").rows)[::2]:
        assert found.logps[0] == found.logps[1]
    for base in BASES:
        trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, dataset, per_device_eval_batch_size=8)
        metrics = trainer.evaluate(Dataset.from_list(rows[::2]))
        assert metrics["eval_pwa_all"] == 0.0
        assert torch.tensor(metrics["eval_loss"]).isfinite()


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("adds", [False, True])
def test_cpo_trainers_tokens_many_at_a_time(adds, max_length):
    """As its own code makes them of each row, also where the tokenizer would put another token in front."""
    tokenizer = byte_tokenizer()
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<pad> $A", special_tokens=[("<pad>", 0)]
        )
    PartialState()  # TRL's warnings need one
    rows = preference_rows(3).to_list()
    ours = CPOTokenizer(None, tokenizer, max_length or 512, None, is_encoder_decoder=False)
    made = ours.rows([PreferenceRow(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])
    for row, found in zip(rows, made, strict=True):
        expected = CPOTrainer.tokenize_row(ours, row)
        assert found.pop("prompt") == row["prompt"]
        assert {name: values.tolist() for name, values in found.items()} == expected


@pytest.mark.parametrize("tokenization", ["chat-template", "cpo"])
def test_no_max_length_cuts_nothing(tokenization, tiny_model, tokenizer, tmp_path, monkeypatch):
    """CPOTrainer cuts at 512 tokens where it is told no length; with its tokens, that is what `evaluate` is told."""
    rows = Dataset.from_list([{"prompt": "q ", "chosen": "a" * 600, "rejected": "b"}])
    options = {"tokenization": tokenization, "max_length": None, "max_steps": 1}
    trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, **options)
    length = len(trainer.train_dataset[0]["chosen_input_ids"])
    assert (length > 600, trainer.args.max_length) == ((True, None) if tokenization != "cpo" else (False, 512))
    trainer.train()
    if tokenization != "cpo":
        monkeypatch.setattr(cpo_trainer, "is_wandb_available", lambda: True)
        with pytest.raises(ValueError, match="generate_during_eval=True needs max_length"):
            trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, generate_during_eval=True, **options)


ALL_KEYS = "{% for m in messages %}{% for key in m %}{{ key }}={{ m[key] }};{% endfor %}{% endfor %}"


def asked_with(**keys: Any) -> PreferenceRow:
    return PreferenceRow([{"role": "user", "content": "why"}], [[{"role": "assistant", "content": "so", **keys}]])


def test_keys_of_messages_that_the_template_does_not_read():
    """Named where the model would have to see them; not where they say when, by whom or how well it was written."""
    notes = {
        **{"message_id": "a", "created_at": 1, "model": "gpt", "finish_reason": "stop", "lang": "en", "rank": 0},
        **{"score": 1.0, "emojis": {"name": ["x"]}, "tokens": [1], "logprobs": [-0.1], "tags": ["a"], "url": "b"},
        **{"tool_calls": [], "reasoning_content": "", "audio": {}, "reasoning_tokens": 7, "tool_call_id": "a"},
    }
    for_the_model = {"name": "Bob", "reasoning_content": "since", "tool_calls": [{}], "thought": "hm"}
    rows = [asked_with(**notes), asked_with(**for_the_model)]
    assert [*unread(rows[:1], chat_tokenizer(CHATML), [0])] == []
    said = [*unread(rows, chat_tokenizer(CHATML), range(len(rows)))]
    assert [text.split()[0] for text in said] == [repr(name) for name in sorted(for_the_model)]
    assert said[0].startswith("'name' is in 1 rows (the first is row 1), and the chat template does not read it")


@pytest.mark.parametrize(
    "template", [ALL_KEYS, "{{ messages | tojson }}", "{% for m in messages %}{{ m['na' + 'me'] }}"]
)
def test_keys_that_a_template_reads_without_naming_them(template):
    template += "{% endfor %}" * (template.count("{% for") - template.count("{% endfor"))
    assert [*unread([asked_with(name="Bob")], chat_tokenizer(template), [0])] == []


# Parts of a message: these read them one by one, the last as text alone
READ_PARTS = {
    "parts alone": "{% for c in m.content %}{{ c.text }}{% endfor %}",
    "lines": "{{ m.content if m.content is string else m.content | map(attribute='text') | join('\n') }}",
    "marks": "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}|{{ c.text | trim }}{% endfor %}{% endif %}",
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", READ_PARTS)
def test_content_in_parts_is_what_the_template_reads(way, base, tiny_model, tmp_path):
    tokenizer = chat_tokenizer(template_of(READ_PARTS[way]))
    rows = [
        {
            "prompt": [{"role": "user", "content": [text_part(f"q{i} "), text_part("r")]}],
            **{side: [{"role": "assistant", "content": [text_part(side)]}] for side in ("chosen", "rejected")},
            "margin": 1.0,
        }
        for i in range(2)
    ]
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows))
    for row, sides in zip(rows, sequences(base, trainer), strict=True):
        for side, (prompt, completion) in zip(("chosen", "rejected"), sides, strict=True):
            whole = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=True, return_dict=True)
            assert [*prompt, *completion] == whole["input_ids"]


def test_content_in_parts_is_text_for_other_templates():
    """Which would write the list as Python does."""
    tokenizer = chat_tokenizer(template_of("{{ m.content }}"))
    row = {"role": "user", "content": [text_part("a "), text_part("b")]}
    reader = RowReader.of(("prompt", "chosen", "rejected"), "train")
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (found,) = tokenize([reader({"prompt": [row], **answers}, 0)], tokenizer)
    assert "a b" in tokenizer.decode(found.prompt)
    assert copy.deepcopy(InParts(["a", "b"])).parts == [text_part("a"), text_part("b")]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def template_of(content: str) -> str:
    end = "{% if add_generation_prompt %}<assistant>{% endif %}"
    return "{% for m in messages %}<{{ m.role }}>" + content + "</s>{% endfor %}" + end
