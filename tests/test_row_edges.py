"""What outsiders found in the reading of rows: text stays text, a row is what it is alone, and nothing is remembered
that has changed.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from datetime import datetime
from itertools import permutations
from typing import Any

import pytest
from conftest import BASES, byte_tokenizer, chat_tokenizer, load, preference_rows, quiet, trainer_of
from datasets import Dataset, Features, IterableDataset, Json, Value

from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins.cli.inspect import in_tokens_of
from trl_margins.data.audit import audit
from trl_margins.data.loading import load_splits
from trl_margins.evaluation.scorer import completion_tokens
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.rows import PreferenceRow, open_rows, tokenize
from trl_margins.rows import tokenized as tokenized_module
from trl_margins.rows.form import RowError, RowReader
from trl_margins.rows.limited import limited
from trl_margins.rows.lists import ScoredLists
from trl_margins.rows.messages import may_be_messages, spelled, stored_messages
from trl_margins.rows.mixed import mixed
from trl_margins.rows.raw import column_names
from trl_margins.rows.references import referred
from trl_margins.rows.tokens import PairTokenizer, unread

TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(i: Any, **more: Any) -> dict[str, Any]:
    sides = {side: [says("assistant", f"{side[0]}{i}")] for side in ("chosen", "rejected")}
    return {"prompt": [says("user", f"q{i}")], **sides, **more}


def texts(base: str, dataset: Any, tokenizer: Any) -> list[str]:
    """Prompt and chosen completion of each row."""
    if base == "dpo":
        return [tokenizer.decode([*row["prompt_ids"], *row["chosen_ids"]]) for row in dataset]
    return [tokenizer.decode(row["chosen_input_ids"]) for row in dataset]


# Text stays text


@pytest.mark.parametrize("text", ['"x"', "42", "1.50", "null", "true", '{"a": 1}', "[1, 2]", "7", "ok"])
def test_a_mixture_keeps_text_that_is_json(text):
    rows = [{"prompt": text, "chosen": f"{text} ", "rejected": "no"}]
    together = mixed([("text", Dataset.from_list(rows)), ("chats", Dataset.from_list([chat(1)]))])
    assert {name: together[0][name] for name in rows[0]} == rows[0]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ('[{"value": 3, "label": "x"}]', '[{"value": 4, "label": "y"}]'),
        ('[{"content": "hi"}] is it', "no"),
        ('[{"role": "CEO", "content": "boss"}]', '[{"role": "CTO", "content": "boss"}]'),
        ('[{"role": "assistant", "content": "b"}]', "no"),
    ],
)
def test_an_answer_in_json_is_text(chosen, rejected):
    row = {"prompt": "As JSON: ", "chosen": chosen, "rejected": rejected}
    other = {"prompt": "q ", "chosen": "a", "rejected": "b"}
    for rows in ([row], [other, row]):
        found = list(open_rows(Dataset.from_list(rows), "train"))[-1]
        assert found == PreferenceRow("As JSON: ", [chosen, rejected])
    lists = Dataset.from_list([{"prompt": "As JSON: ", "responses": [chosen, "x"], "scores": [2.0, 1.0]}])
    assert evaluation_set(lists, "lists").rows[0].completions == [chosen, "x"]


def test_dialogues_with_line_ends_of_windows_are_read():
    """As those with a line feed alone, which they become."""
    rows = [{side: f"\n\nHuman: {q}\n\nAssistant: the {side}" for side in ("chosen", "rejected")} for q in "ab"]
    theirs = [{side: text.replace("\n", "\r\n") for side, text in row.items()} for row in rows]
    plain, windows = (list(open_rows(Dataset.from_list(each), "train")) for each in (rows, theirs))
    assert plain[0] == PreferenceRow("\n\nHuman: a\n\nAssistant:", [" the chosen", " the rejected"])
    assert [PreferenceRow(row.prompt.replace("\r", ""), row.completions) for row in windows] == plain


DIALOGUES = [  # as templates and transcripts write one, and the mark that an error names
    ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n", "<|im_start|>"),
    ("<s>[INST] {} [/INST] {}</s>", "[INST]"),
    ("A chat. USER: {} ASSISTANT: {}</s>", "USER:"),
    ("<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>x {}", "<|start_header_id|>"),
    ("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}", "<start_of_turn>"),
    ("<|user|>\n{}</s>\n<|assistant|>\n{}", "<|user|>"),
    ("<｜User｜>{}<｜Assistant｜>{}", "<｜User｜>"),
    ("Below is a task.\n\n### Instruction:\n{}\n\n### Response:\n{}", "### Instruction:"),
    ("### Human: {}### Assistant: {}", "### Human:"),
    ("**User:** {}\n\n**AI:** {}", "**User:"),
    ("q: {}\nA: {}", "q:"),
    ("[USER] {}\n[BOT] {}", "[USER]"),
]


@pytest.mark.parametrize(("written", "mark"), DIALOGUES, ids=[mark for _, mark in DIALOGUES])
def test_dialogues_that_are_written_otherwise_are_refused(written, mark):
    """Alone, the words with which both answers begin would be the prompt's; beside it, it would be there twice."""
    rows = [
        {side: written.format(f"is it {i}?", f"so {side} {i}") for side in ("chosen", "rejected")} for i in range(3)
    ]
    with pytest.raises(ValueError, match=rf"row 0 .*look like dialogues, by their {re.escape(repr(mark))}.*messages"):
        open_rows(Dataset.from_list(rows), "train")
    rows = [{"prompt": f"is it {i}?", **row} for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match=r"row 0 .* and their prompt in it, as in all 3 rows"):
        open_rows(Dataset.from_list(rows), "train")


@pytest.mark.parametrize(
    "text",
    [
        "The table [user] of {} ",
        "What does [INST] mean in {}? ",
        "Human: is the first word of {} ",
        "Is {} as good? {}",
    ],
)
def test_a_text_with_one_mark_is_no_dialogue(text):
    """Nor is one in which only an answer quotes two."""
    quote = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant"
    rows = [
        {"chosen": text.format(i, quote) + "It is.", "rejected": text.format(i, "") + "I do not know."}
        for i in range(3)
    ]
    for row, given in zip(open_rows(Dataset.from_list(rows), "train"), rows, strict=True):
        assert [row.prompt + part for part in row.completions] == [given["chosen"], given["rejected"]]


@pytest.mark.parametrize("text", ["Ask: why {}", "the user: {}, a model: b", "[1] {} <b>x</b> <|endoftext|>"])
def test_text_that_is_no_dialogue_is_read(text):
    rows = [{side: text.format(f"{i} {side}") for side in ("chosen", "rejected")} for i in range(3)]
    (row, *_) = open_rows(Dataset.from_list(rows), "train")
    assert row.prompt + row.completions[0] == rows[0]["chosen"]


@pytest.mark.parametrize("before", ["", "\n", "\n\n "])
@pytest.mark.parametrize("prompt", ["Q one", "Q one\n", "\nQ one "])
def test_white_space_before_a_prompt_that_is_repeated(prompt, before):
    rows = [{"prompt": prompt, "chosen": f"{before}Q one\nyes", "rejected": "Q one\nno"}] * 2
    (row, _) = open_rows(Dataset.from_list(rows), "train")
    assert [(row.prompt + part).split() for part in row.completions] == [["Q", "one", "yes"], ["Q", "one", "no"]]


@pytest.mark.parametrize(
    "answer",
    [
        "The word {} means {}.",
        "You asked: {}. It is {}",
        '{{"query": "{}", "answer": "{}"}}',
        "<think>So: {}</think>{}",
        "To answer '{}':\nQuestion: x\nAnswer: {}",
    ],
)
def test_answers_that_quote_their_prompt_are_no_dialogues(answer, caplog):
    rows = [{"prompt": f"q{i}", "chosen": answer.format(f"q{i}", "a"), "rejected": answer.format(f"q{i}", "b")}
            for i in range(3)]  # fmt: skip
    with caplog.at_level(logging.WARNING, "trl_margins"):
        (row, *_) = open_rows(Dataset.from_list(rows), "train")
    assert (row.prompt, row.completions) == ("q0", [rows[0]["chosen"], rows[0]["rejected"]])
    assert "in 3 of 3 text rows, chosen and rejected begin with the same text, and their prompt in it" in caplog.text


def test_some_completions_hold_their_prompt(caplog):
    some = [{"prompt": "is it?", "chosen": "To is it? yes", "rejected": "To is it? no"}]
    others = [{"prompt": "or not?", "chosen": "[INST] yes", "rejected": "no"}]
    with caplog.at_level(logging.WARNING, "trl_margins"):
        open_rows(Dataset.from_list(some + others), "train")
    assert "in 1 of 2 text rows, chosen and rejected begin with the same text, and their" in caplog.text
    assert "in 1 of 2 rows a completion holds '[INST]' or the like (the first is row 1)" in caplog.text


def test_messages_in_a_mapping_as_json_text_are_read():
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": each}] for each in "ab"]
    for key in ("messages", "conversations"):
        texts = [json.dumps({key: each}) for each in turns]
        found = next(iter(open_rows(Dataset.from_list([{"chosen": texts[0], "rejected": texts[1]}]), "train")))
        assert found == PreferenceRow(turns[0][:1], [turns[0][1:], turns[1][1:]])


def test_conversations_as_json_text_are_read():
    turns = json.dumps([{"from": "human", "value": "q"}])
    rows = Dataset.from_list([{"conversations": turns, "chosen": "The good one", "rejected": "The bad one"}] * 2)
    assert next(iter(open_rows(rows, "train"))).prompt == [says("user", "q")]


def test_messages_that_were_made_json_twice_are_read():
    twice = {
        side: json.dumps(json.dumps([says("user", "q"), says("assistant", side)])) for side in ("chosen", "rejected")
    }
    found = next(iter(open_rows(Dataset.from_list([twice] * 2), "train")))
    assert found == PreferenceRow(
        [says("user", "q")], [[says("assistant", "chosen")], [says("assistant", "rejected")]]
    )
    curly = {side: json.dumps([says("assistant", side)]).replace('"', "”") for side in twice}
    with pytest.raises(ValueError, match=r"column 'chosen', row 0 .* its quotes are curly: save"):
        open_rows(Dataset.from_list([curly] * 2), "train")


def test_a_system_column_that_holds_a_message_or_stands_beside_a_dialogue():
    row = {"prompt": [says("user", "q")], "chosen": "a", "rejected": "b", "s": json.dumps(says("system", "S"))}
    for system in (row["s"], f"[{row['s']}]", "S"):
        (read,) = open_rows(Dataset.from_list([{**row, "s": system}]), "train", None, "s")
        assert read.prompt == [says("system", "S"), says("user", "q")]
    for number in (0, False, 3):
        with pytest.raises(RowError, match=f"column 's', row 0 of the train data set: .* but is of type .*: {number}"):
            list(open_rows(Dataset.from_list([{**row, "s": number}]), "train", None, "s"))
    dialogue = {side: f"\n\nHuman: q\n\nAssistant: {side}" for side in ("chosen", "rejected")} | {"s": "S"}
    with pytest.raises(RowError, match=r"row 0 of the train data set: 'Human: q.* marks turns, and system_column='s'"):
        open_rows(Dataset.from_list([dialogue]), "train", None, "s")
    lists = {"prompt": "\n\nHuman: q\n\nAssistant:", "responses": ["a", "b"], "scores": [1, 2], "s": "S"}
    with pytest.raises(RowError, match=r"row 0 of the lists: 'Human: q.* marks turns, and system_column='s'"):
        list(ScoredLists.of(Dataset.from_list([lists]), "the lists", system_column="s"))
    (found,) = ScoredLists.of(Dataset.from_list([lists]), "the lists", system_column="s", as_chat=True)
    assert found.prompt == [says("system", "S"), says("user", "q")]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([says("user", "q")], "column 'chosen', row 0 .* begins with a system message, 's': put it in front"),
        ("q", "row 0 .* begin with a system message, and not with the prompt 'q', which would be lost"),
    ],
)
def test_a_system_message_within_completions(prompt, error):
    row = {side: [says("system", "s"), says("assistant", side)] for side in ("chosen", "rejected")}
    with pytest.raises(ValueError, match=error):
        open_rows(Dataset.from_list([{"prompt": prompt, **row}]), "train")
    whole = {side: [says("system", "s"), says("user", "q"), *row[side][1:]] for side in row}
    found = next(iter(open_rows(Dataset.from_list([{"prompt": prompt, **whole}]), "train")))
    assert found.prompt == whole["chosen"][:2]


def test_a_column_that_may_say_which_answer_is_better(caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        open_rows(preference_rows(2).add_column("label", [0, 1]), "train")
    assert "column 'label' is not read: whatever it says, chosen is the better" in caplog.text


# What a template reads


def test_any_key_of_a_message_that_the_template_does_not_read(tokenizer):
    notes = dict.fromkeys(["id", "msg_id", "timestamp", "hashed_ip", "turn_identifier", "language", "metadata"], "x")
    message = says("assistant", "a", name="Bo", text="t", **notes)  # by whom and when it was written is for nobody
    row = PreferenceRow([says("user", "q")], [[message]] * 2)
    assert [note.split(" is ")[0] for note in unread([row], tokenizer, [0])] == ["'name'", "'text'"]


def test_a_row_has_its_own_tools(tiny_model, tmp_path):
    """Also where they differ in nothing but the order of their keys."""
    first, second = {"type": "function", "name": "f"}, {"name": "f", "type": "function"}
    rows = [PreferenceRow(chat(1)["prompt"], [chat(1)["chosen"]] * 2, {"tools": [tool]}) for tool in (first, second)]
    tokenizer = chat_tokenizer(TOOLS)
    together = tokenize(rows, tokenizer)
    for row, tokens in zip(rows, together, strict=True):
        assert tokens == tokenize([row], tokenizer)[0]
        assert tokenizer.decode(tokens.prompt).startswith(json.dumps(row.template["tools"]))


def test_nulls_that_the_data_has_stay():
    """A column of structs has others, which Arrow added."""
    tools = [{"name": "f", "parameters": {"x": {"type": "string", "default": None}}}]
    call = says("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": None, "y": 1}}])
    row = {**chat(1), "chosen": [call], "tools": json.dumps(tools)}
    features = Features({name: Json() if name != "tools" else Value("string") for name in row})
    found = next(iter(open_rows(Dataset.from_list([row], features=features), "train")))
    assert found.template["tools"] == tools
    assert found.completions[0] == [call]
    struct = Dataset.from_list([chat(1, tools=[{"a": {"x": 1}}]), chat(2, tools=[{"b": {"y": 2}}])])
    assert [row.template for row in open_rows(struct, "train")] == [{"tools": [{"a": {"x": 1}}]},
                                                                    {"tools": [{"b": {"y": 2}}]}]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        'add_message(role="user", content="hello")',
        '[{"id": 0, "role": "user", "scopes": ["content"]}]',
        '[{"path": "/content/0", "allow": {"role": "user"}}]',
        '[{"title": "x", "content": "y", "author": {"role": "user"}}]',
        '(Short answer) Send {"role": "user", "content": "hi"}.',
        '[...history, {"role": "user", "content": text}]',
        'print({"role": "user", "content": "hi"})',
        '(<Message role="user" content="hi"/>)',
        "User(name='a', role='user', value=2)",
        '[docs](http://x) say: pass {"role": "user", "content": "hi"}',
        "(From user: content)",
        '{"from": "Berlin"}, {"to": "Paris"}',
        '{"role": "pirate", "content": "arr"} and more',
        '[["user", "age"], ["bob", "3"]]',
        "[('Berlin', 'Paris')]",
        "[('system', 'NOUN'), ('crashed', 'VERB')]",
        '[\n  SystemMessage(content="Help."),\n  HumanMessage(content="hi"),\n]',
        'HumanMessage(content="hi") is what a user says.',
        '[{from: "user", to: "db", value: 0}]',
        '{"from": "assistant@example.com", "subject": "Re", "content": ""} and more',
        "['HumanMessage(content=1)']",
        "Use role='user' and content='x'.",
        '<message role="user" content="hi">',
        "[1, 2]",
    ],
)
def test_text_about_messages_is_text(text):
    """Of code, of JSON, and of chats."""
    assert not may_be_messages(text)
    assert spelled(f"  {text}x") == f"  {text}x"


@pytest.mark.parametrize(
    "text",
    [
        "[('system', 's'), ('human', 'q'), ('ai', 'a')]",
        "[HumanMessage(content='q', additional_kwargs={}), AIMessage(content='a')]",
        "AIMessage(content='a', additional_kwargs={}, response_metadata={})",
        "[[('role', 'assistant'), ('content', 'a')]]",
        "[{'role': <Role.USER: 'user'>, 'content': 'q'}]",
        "[{'role': Role.ASSISTANT, 'content': 'a'}]",
        '[{"role": “assistant”, "content": “a”}]',
        "[ChatMessage(role=<MessageRole.USER: 'user'>, content='a')]",
        "role='assistant' content='a'",
        "[{'role': b'assistant', 'content': b'a'}]",
        "[{' role ': 'assistant', 'content': 'a'}]",
        '[{role: "assistant", content: "a"}]',
        "[<Message role='assistant' content='a'>]",
    ],
)
def test_messages_that_cannot_be_read_are_an_error(text):
    rows = Dataset.from_list([{"prompt": "q", "chosen": text, "rejected": text.replace("a'", "b'")}] * 2)
    with pytest.raises(RowError, match="looks like messages stored as text"):
        open_rows(rows, "train")


@pytest.mark.parametrize(
    "text",
    [
        "content='a' role='assistant'",
        "frozendict.frozendict({'role': 'assistant', 'content': 'a'})",
        "[{'role': np.str_('user'), 'content': 'q'}]",
        "\u200e[{'role': 'assistant', 'content': 'a'}",
        '[{"role": /* whose */ "assistant", "content": "a"}]',
        "［｛'role': 'assistant', 'content': 'a'｝］",
    ],
)
def test_texts_that_seem_to_be_messages_are_said(text, caplog):
    """In all rows. In some, they may be texts about messages."""
    rows = [{"prompt": "q", "chosen": text, "rejected": text.replace("a'", "b'")}] * 2
    some = [*rows, {"prompt": "q", "chosen": "a role for the user", "rejected": "b"}]
    for each, is_said in ((rows, True), (some, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trl_margins"):
            (row, *_) = open_rows(Dataset.from_list(each), "train")
        assert row.completions[0] == text
        assert ("of all text rows begin as messages do" in caplog.text) is is_said


def test_a_developer_in_messages_that_are_text():
    """As in messages that are a list."""
    asked = [says("developer", "Be brief."), says("user", "q")]
    answers = {name: [says("assistant", name)] for name in ("chosen", "rejected")}
    row = {"prompt": asked, **answers}
    (found,) = open_rows(Dataset.from_list([{name: json.dumps(value) for name, value in row.items()}]), "train")
    (expected,) = open_rows(Dataset.from_list([row]), "train")
    assert (found.prompt, found.completions) == (expected.prompt, expected.completions)
    assert found.prompt == asked


def test_a_system_column_of_messages_that_cannot_be_read(caplog):
    rows = [chat(i, system="[{'role': Role.SYSTEM, 'content': 's'}]" if i else "Be brief.") for i in range(3)]
    with caplog.at_level(logging.WARNING, "trl_margins"):
        open_rows(Dataset.from_list(rows), "train", system_column="system")
    said = (
        "in 2 of 3 rows column 'system' holds messages, written as text (the first is row 1), and is read as text. If"
    )
    assert said in caplog.text


def test_a_system_message_that_only_begins_like_json():
    system = '{"role": "pirate", "tone": "gruff"}\nAnswer as this persona.'
    (row,) = open_rows(Dataset.from_list([{"system": system, **chat(1)}]), "train", system_column="system")
    assert row.prompt[0]["content"] == system


@pytest.mark.parametrize("text", ["{{'a': 1}}", "{[1]: 2}"])
def test_text_that_python_cannot_make(text):
    assert spelled(text) == text


@pytest.mark.parametrize("form", ["{}, {}", "[{}],", "[[{}, {}]]", "[{{'index': 0, 'message': {}}}]"])
def test_messages_in_a_list_too_many_or_too_few(form):
    message = {"role": "assistant", "content": "a"}
    with pytest.raises(ValueError, match="not all of it is messages"):
        stored_messages(form.format(message, message))


def test_a_call_may_have_null_for_arguments():
    """As TRL's trainers and transformers have it; keys that Arrow added to calls with more of them are none."""
    calls = [{"function": {"name": "f", "arguments": None}}, {"id": "1", "function": {"name": "g", "arguments": None}}]
    row = {**chat(1), "chosen": [says("assistant", "", tool_calls=calls)]}
    (found,) = open_rows(Dataset.from_list([row]), "train")
    assert found.completions[0][0]["tool_calls"] == calls


@pytest.mark.parametrize("tools", ["", None, []])
def test_no_tools(tools):
    rows = Dataset.from_list([chat(1, tools=tools, chat_template_kwargs='{"x": 1}')])
    assert next(iter(open_rows(rows, "train"))).template == {"x": 1}


def test_a_list_of_responses_has_its_template_variables_and_its_prompt_once():
    row = {"prompt": [says("user", "q")], "tools": "[1]", "scores": ["2", 1.0]}
    row["responses"] = [[*row["prompt"], says("assistant", text)] for text in "ab"]
    features = Features({name: Json() if name != "tools" else Value("string") for name in row})
    found = evaluation_set(Dataset.from_list([row], features=features), "lists")
    assert found.rows == [PreferenceRow(row["prompt"], [[says("assistant", text)] for text in "ab"], {"tools": [1]})]
    assert found.scores == [[2.0, 1.0]]
    with pytest.raises(ValueError, match="column 'responses', row 0 of lists: None is not a list"):
        evaluation_set(Dataset.from_list([{**row, "responses": None}], features=features), "lists")


def test_what_the_template_does_not_read_is_told(tiny_model, tmp_path, caplog):
    """By training, evaluation and inspection; not where it is read."""
    call = says("assistant", "", tool_calls=[{"name": "f"}], reasoning_content="hm")
    rows = [
        chat(0),
        chat(1, tools=[{"name": "f"}], chat_template_kwargs={"mood": "kind"}),
        {**chat(2), "chosen": [call]},
    ]
    dataset = Dataset.from_list([{"tools": None, "chat_template_kwargs": None, **row} for row in rows])
    plain, knowing = byte_tokenizer(), chat_tokenizer(TOOLS)
    of_lists = evaluation_set(dataset, "lists").rows

    def said(work: Any) -> set[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trl_margins"):
            work()
        found = re.findall(r"(\w+): '(\w+)' is in 1 rows \(the first is row (\d)\)", caplog.text)
        return {" ".join(each) for each in found}

    def commands(tokenizer: Any) -> list[Any]:
        return [
            lambda: trainer_of("dpo", tiny_model, tokenizer, tmp_path, dataset),
            lambda: completion_tokens(load(tiny_model), tokenizer, of_lists, name="train"),
            lambda: audit({"train": dataset}, measure=in_tokens_of(tokenizer)),
        ]

    unread = {"train tools 1", "train mood 1", "train tool_calls 2", "train reasoning_content 2"}
    assert [said(command) for command in commands(plain)] == [unread] * 3
    assert [said(command) for command in commands(knowing)] == [{"train mood 1", "train reasoning_content 2"}] * 3


def test_a_role_that_templates_seldom_know_is_told(tiny_model, tokenizer, tmp_path, caplog):
    rows = [chat(0), {**chat(1), "chosen": [says("bot", "a")]}, {**chat(2), "prompt": [says("developer", "a")]}]
    dataset = Dataset.from_list(rows)
    for command in (
        lambda: trainer_of("cpo", tiny_model, tokenizer, tmp_path, dataset),
        lambda: evaluation_set(dataset, "train"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trl_margins"):
            command()
        assert "in 1 of 3 rows a message has the role 'bot' (the first is row 1)" in caplog.text
        assert "developer" not in caplog.text
    (note,) = audit({"train": dataset}).splits["train"].notes
    assert "has the role 'bot'" in note


@pytest.mark.parametrize("base", BASES)
def test_a_stream_of_which_no_pair_is_left(base, tiny_model, tokenizer, tmp_path):
    """Training would wait for its first batch without end."""
    rows = preference_rows(4).to_iterable_dataset()
    with pytest.raises(
        ValueError, match="no pair of the train stream is left, among its first 10,000: the prompts fill max_length=2"
    ):
        trainer_of(base, tiny_model, tokenizer, tmp_path, rows, max_length=2)


def test_a_stream_of_which_the_hard_filter_leaves_nothing(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(4).map(lambda _: {"score_chosen": 2.0, "score_rejected": 1.0}).to_iterable_dataset()
    hard = {"score_gap_transform": "hard", "score_gap_threshold": 3.0}
    with pytest.raises(ValueError, match=r"no pair of the train stream is left: .* score_gap_transform=hard is one"):
        trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, weight="score-gap", max_steps=1, **hard)


def endless(n_short):
    """Rows without end, of which those after the first have prompts that fill 64 tokens."""
    short, long = ({"prompt": q, "chosen": "a", "rejected": "b"} for q in ("q ", "q" * 64))
    yield from [short] * n_short
    while True:
        yield long


def test_an_endless_stream_of_which_no_pair_is_left(tiny_model, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tokenized_module, "_IN_A_ROW", 100)
    rows = IterableDataset.from_generator(endless, gen_kwargs={"n_short": 0})
    with pytest.raises(ValueError, match="no pair of the train stream is left, among its first 100: "):
        trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, max_length=64)
    rows = IterableDataset.from_generator(endless, gen_kwargs={"n_short": 1})
    left = iter(trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, max_length=64).train_dataset)
    assert next(left)["prompt"] == "q "

    class EnoughError(Exception):
        pass

    def stop(record):
        if "training waits" in record.getMessage():
            raise EnoughError(record.getMessage())

    monkeypatch.setattr(tokenized_module.logger, "handle", stop)
    with pytest.raises(EnoughError, match=r"train: the last 100 pairs of the stream were dropped, .* training waits"):
        next(left)
    monkeypatch.setattr(tokenized_module, "_NO_END", 1)
    rows = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, max_length=64).train_dataset
    with pytest.raises(ValueError, match=r"train: the last 100 pairs .*: raise max_length, or end the stream before"):
        list(rows)


@pytest.mark.parametrize("base", BASES)
def test_pairs_of_a_stream_that_are_dropped_are_counted(base, tiny_model, tokenizer, tmp_path, caplog):
    """At the first, the tenth and so on."""
    rows = preference_rows(24).map(lambda row, i: {"prompt": "q" * 99 if i % 2 else "q "}, with_indices=True)
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows.to_iterable_dataset(), max_length=64)
    caplog.clear()
    assert len(list(trainer.train_dataset)) == 12
    found = [record.getMessage() for record in caplog.records if "pairs that were read from the stream" in record.msg]
    why = "were dropped, because the prompt fills max_length=64: raise it to keep them"
    assert found == [f"train: {n} of the {2 * n} pairs that were read from the stream so far {why}" for n in (1, 10)]


def test_a_stream_with_a_text_that_is_not_utf_8(tiny_model, tokenizer, tmp_path):
    line = '{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 1}\n'
    (tmp_path / "x.jsonl").write_bytes(line.encode() + line.replace("b", "é").encode("latin-1"))
    rows = load_splits(str(tmp_path / "x.jsonl"), streaming=True)["train"]
    with pytest.raises(
        ValueError, match=r"the train data set, after 1 rows: a text is not UTF-8 .*: convert its file"
    ):
        trainer_of("dpo", tiny_model, tokenizer, tmp_path, rows)


@pytest.mark.parametrize("column", ["image", "images"])
def test_images_are_not_left_out_in_silence(column, tiny_model, tokenizer, tmp_path):
    dataset = Dataset.from_list([chat(i, **{column: [b"x"]}) for i in range(2)])
    for command in (
        lambda: trainer_of("cpo", tiny_model, tokenizer, tmp_path, dataset),
        lambda: evaluation_set(dataset, "here"),
    ):
        with pytest.raises(ValueError, match=f"the column '{column}'.* remove the column"):
            command()
    assert any(f"column '{column}': images are not" in note for note in audit({"a": dataset}).splits["a"].notes)


@pytest.mark.parametrize("base", BASES)
def test_a_template_that_moves_the_question_is_told(base, tiny_model, tmp_path, caplog):
    """As Mistral's, which renders the system message where the user's is the last one."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[I]"
        "{% if loop.last %}{{ messages[0]['content'] }}{% endif %}"
        "{{ m['content'] }}[/I]{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    rows = [{**chat(i), "prompt": [says("system", "Be kind"), says("user", f"what {i}")]} for i in range(3)]
    caplog.set_level(logging.INFO, "trl_margins")
    trainer_of(base, tiny_model, chat_tokenizer(template), tmp_path, Dataset.from_list(rows))
    assert "in 3 of the first 3 rows the prompt alone ends otherwise" in caplog.text
    assert "In 3 rows it begins before the last message of the prompt" in caplog.text


def test_two_begin_tokens_are_told(tiny_model, tmp_path, caplog):
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    rows = preference_rows(3).to_list()
    rows[1]["prompt"] = "<s>" + rows[1]["prompt"]
    trainer_of("dpo", tiny_model, tokenizer, tmp_path, Dataset.from_list(rows))
    assert "1 of the first 3 rows begin with two begin tokens (the first is row 1)" in caplog.text


# Prompts given twice


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ([says("user", "q")], [says("system", "s"), says("user", "q")]),
        ([says("system", "s"), says("user", "q")], [says("user", "q")]),
        ([says("user", "q", id="7")], [says("user", "q")]),
    ],
)
def test_a_prompt_that_conversations_repeat_nearly(prompt, before):
    row = {"prompt": prompt, **{s: [*before, says("assistant", s)] for s in ("chosen", "rejected")}}
    found = next(iter(open_rows(Dataset.from_list([row], features=Features({n: Json() for n in row})), "train")))
    assert found.completions == [[says("assistant", "chosen")], [says("assistant", "rejected")]]
    assert [message["content"] for message in found.prompt] == [
        message["content"] for message in max(prompt, before, key=len)
    ]


def test_a_turn_that_comes_again_later_is_no_prompt():
    turns = [says("assistant", "x"), says("user", "hi")]
    row = {"prompt": [says("user", "hi")], **{s: [*turns, says("assistant", s)] for s in ("chosen", "rejected")}}
    found = next(iter(open_rows(Dataset.from_list([row]), "train")))
    assert found.prompt == row["prompt"]
    assert found.completions[0] == row["chosen"]


@pytest.mark.parametrize("base", BASES)
def test_every_set_of_a_trainer_loses_the_prompt_that_answers_repeat(base, tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": f"{i} ", "chosen": f"{i} a", "rejected": f"{i} b"} for i in range(4)]
    evals = Dataset.from_list([*rows, {"prompt": "z ", "chosen": "c", "rejected": "d"}])
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, Dataset.from_list(rows), evals)
    assert texts(base, trainer.train_dataset, tokenizer) == [f"{i} a</s>" for i in range(4)]
    assert texts(base, trainer.eval_dataset, tokenizer) == [*(f"{i} a</s>" for i in range(4)), "z c</s>"]


# Sets


@pytest.mark.parametrize("base", BASES)
def test_an_evaluation_set_called_train(base, tiny_model, tokenizer, tmp_path):
    """The two are read apart, and counted apart."""
    rows = Dataset.from_list([{"prompt": f"Q{i}: ", "chosen": "The a", "rejected": "The b"} for i in range(6)])
    other = Dataset.from_list([{"chosen": f"P{i} x", "rejected": f"P{i} y"} for i in range(3)])
    trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, {"train": other, "test": rows})
    assert texts(base, trainer.train_dataset, tokenizer) == [f"Q{i}: The a</s>" for i in range(6)]
    assert texts(base, trainer.eval_dataset["train"], tokenizer) == [f"P{i} x</s>" for i in range(3)]
    assert {name: facts.pairs for name, facts in trainer.set_facts.items()} == {"train": 6, "eval train": 3, "test": 6}
    assert "eval_train_pwa_all" in trainer.evaluate()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["loaded", "stream", "transformed"])
def test_sets_that_come_later(base, kind, tiny_model, tokenizer, tmp_path):
    """As those that the trainer was built with, with their scores."""
    scored = preference_rows(6, "conversational")
    plain = scored.remove_columns(["score_chosen", "score_rejected"])
    later = {
        "loaded": scored,
        "stream": scored.to_iterable_dataset(),
        "transformed": scored.rename_column("chosen", "better").with_transform(
            lambda batch: {"chosen": batch["better"], **{k: v for k, v in batch.items() if k != "better"}}
        ),
    }[kind]
    size = {"per_device_eval_batch_size": 3}  # which divides them: the loss is a mean over batches
    size |= {"reward": "length-normalized"} if base == "dpo" else {}  # a log-ratio to itself ranks nothing
    early = trainer_of(base, tiny_model, tokenizer, tmp_path, scored, scored, **size).evaluate()
    found = trainer_of(base, tiny_model, tokenizer, tmp_path, plain, **size).evaluate(later)
    for name in ("eval_loss", "eval_pwa_all", "eval_pwa", "eval_spearman"):
        assert found[name] == pytest.approx(early[name], rel=1e-4), name


def test_named_scores_that_an_evaluation_set_lacks(tiny_model, tokenizer, tmp_path):
    rows = preference_rows(4).rename_columns({"score_chosen": "a", "score_rejected": "b"})
    evals = preference_rows(4).remove_columns(["score_chosen", "score_rejected"])
    options = {"score_columns": ["a", "b"]}
    trainer = trainer_of("cpo", tiny_model, tokenizer, tmp_path, rows, evals, **options)
    assert set(trainer.evaluate()) >= {"eval_pwa_all"}
    with pytest.raises(ValueError, match="score_columns names"):
        GapPOTrainer(
            load(tiny_model),
            GapPOConfig(**quiet(output_dir=str(tmp_path), **options)),
            train_dataset=evals,
            processing_class=tokenizer,
        )


def test_a_column_that_comes_late_in_a_stream(tiny_model, tmp_path):
    def rows():
        yield chat(1)
        yield chat(2, tools=[{"name": "f"}])

    tokenizer = chat_tokenizer(TOOLS)
    for base in BASES:
        trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, IterableDataset.from_generator(rows))
        assert [text.startswith('[{"name": "f"}]') for text in texts(base, trainer.train_dataset, tokenizer)] == [
            False,
            True,
        ]


def test_a_newer_tokenization_is_not_read_from_an_older_cache(tiny_model, tokenizer, tmp_path, monkeypatch):
    preference_rows(6).to_json(tmp_path / "rows.jsonl")
    calls, tokens_of = [], PairTokenizer.__call__
    monkeypatch.setattr(PairTokenizer, "__call__", lambda *a: calls.append(a) or tokens_of(*a))

    def make() -> None:
        rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
        opened = open_rows(rows, "train")
        tokenized_module.tokenized(opened, PairTokenizer(opened.reader, tokenizer, _lengths))

    make()
    assert len(calls) == 1
    make()
    assert len(calls) == 1
    monkeypatch.setattr(PairTokenizer.__init__, "__defaults__", ("2, trl 1.0",))
    make()
    assert len(calls) == 2


def _lengths(tokens: Any) -> dict[str, int]:
    return {"n": len(tokens.prompt)}


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        (["Prompt", "Chosen", "Rejected"], "names are case-sensitive, so 'Chosen' and 'Rejected' must be written"),
        (
            ["prompt", "responses", "scores"],
            "these are scored lists, so make pairs of them with trl-margins pairs FILE --out",
        ),
        (["prompt", "better", "worse"], "rename yours in the file"),
    ],
)
def test_columns_that_are_called_otherwise(columns, fix):
    with pytest.raises(ValueError, match=f"no column 'chosen' and no column 'rejected', only .*; {fix}"):
        open_rows(Dataset.from_list([dict.fromkeys(columns, "x")]), "train")


def test_pairs_that_were_dropped_blame_no_template(tiny_model, tokenizer, tmp_path, caplog):
    """One pair has the same completion twice, the other is dropped for its length."""
    rows = preference_rows(2).to_list()
    rows[0]["rejected"], rows[1]["prompt"] = rows[0]["chosen"], "x" * 200
    trainer_of("cpo", tiny_model, tokenizer, tmp_path, Dataset.from_list(rows), max_length=100)
    assert "same tokens" not in caplog.text


# Readers


def test_a_reader_knows_what_it_was_told():
    features = dict.fromkeys(("mine", "sys", "chosen", "rejected", "more"), Value("string"))
    reader = RowReader.of(features, "dev", "mine", "sys", keeps_parts=True, features=features)
    assert (reader.split, reader.prompt_column, reader.system_column, reader.keeps_parts) == (
        "dev",
        "mine",
        "sys",
        True,
    )
    assert reader.features.keys() == {"mine", "sys", "chosen", "rejected"}
    plain = RowReader.of(("prompt", "chosen", "rejected"), "dev")
    assert (plain.prompt_column, plain.system_column, plain.keeps_parts) == ("prompt", None, False)
    assert plain.needed == ["prompt", "chosen", "rejected"]


def test_columns_of_a_set():
    """Also of one without rows, and of a stream that does not know them: those of its first rows."""
    assert column_names(Dataset.from_dict({"a": [], "b": []})) == ["a", "b"]
    rows = [{"a": 1}, {"b": 2, "a": 1}, *[{"a": 3}] * 30, {"late": 4}]
    assert column_names(rows) == ["a", "b"]
    assert column_names(rows[1:]) == ["b", "a", "late"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no such timer on Windows")
def test_the_limit_of_templates_leaves_signals_as_they_were():
    def own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, own)
    try:
        with limited():
            assert signal.getsignal(signal.SIGALRM) is not own
            assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
        assert signal.getsignal(signal.SIGALRM) is own
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("parts", "others", "columns"),
    [
        (("A", "B"), {"choices": ["bees", "ants"]}, {"choices"}),
        (("A", "B"), {"choices": ["who", "what"]}, set()),  # which the prompt has: a multiple choice
        (("1", "2"), {"responses": ["bees", "ants"]}, {"responses"}),
        (("1", "3"), {"responses": ["bees", "ants"]}, set()),
        (("1", "2"), {"answers": ["1", "2"]}, set()),
        (("1", "2"), {"scores": [[0.5], [0.1]], "steps": ["bees", "ants"]}, set()),
        (("no", "me"), {"options": ["bees", "ants"] * 8}, set()),
        (("Response b", "a"), {"response_a": "bees", "response_b": "ants"}, {"response_a", "response_b"}),
        (("A", "B"), {"option_a": "who", "option_b": "what"}, set()),
        (("x", "y"), {"models": ["x", "y"]}, {"models"}),
        (("x", "z"), {"models": ["x", "y"]}, set()),
        (("c1", "c2"), {"outputs": '[{"id": "c1", "text": "bees"}, {"id": "c2", "text": "ants"}]'}, {"outputs"}),
        (("", "A"), {"choices": ["bees", "ants"]}, set()),
        ((["A"], "B"), {"choices": ["bees", "ants"]}, set()),
    ],
)
def test_what_only_points_to_another_column(parts, others, columns):
    assert referred(parts, others, "who or what?") == columns


def test_a_column_has_one_role():
    row = {"prompt": "q", "system": "s", "chosen": "a", "rejected": "b", "tools": "[]"}
    for options, role in (
        ({"prompt_column": "chosen"}, "a completion"),
        ({"system_column": "rejected"}, "a completion"),
        ({"prompt_column": "tools"}, "a variable of the chat template"),
        ({"system_column": "prompt"}, "the prompt"),
        ({"prompt_column": "system", "system_column": "system"}, "the prompt"),
    ):
        option = [*options][-1]
        expected = f"{option} names {options[option]!r}, which the train data set holds {role} in"
        with pytest.raises(ValueError, match=expected):
            open_rows(Dataset.from_list([row]), "train", **options)
    assert len(list(open_rows(Dataset.from_list([row]), "train", system_column="system"))) == 1


SPELLED = json.dumps([{"role": "assistant", "content": "x"}])
BROKEN = SPELLED + " is the list"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pairs", "outcome"),
    [
        ([(SPELLED, SPELLED)] * 3, "messages"),
        ([(SPELLED, "no"), ("fine", "no"), ("good", "bad")], "text"),
        ([(SPELLED, "no"), (SPELLED, "no"), ("fine", "no")], "text"),
        ([(BROKEN, "no"), ("fine", "no"), ("good", SPELLED)], "text"),
        ([(BROKEN, "no")] * 3, "text"),
        ([(SPELLED, SPELLED), ("fine", "no"), ("good", "bad")], "text"),
        ([(SPELLED, SPELLED), (SPELLED, SPELLED), ("fine", "no")], "refused"),
        ([(SPELLED, SPELLED), (SPELLED, SPELLED), (SPELLED, BROKEN)], "refused"),
    ],
    ids=str,
)
def test_the_order_of_rows_says_nothing_of_their_form(pairs, outcome, stream, caplog):
    """Whether completions that spell messages are messages is said by all rows, in both columns."""
    found = set()
    for some in {*permutations(pairs)}:
        rows = Dataset.from_list([{"prompt": "q ", "chosen": a, "rejected": b} for a, b in some])
        try:
            row = next(iter(open_rows(rows.to_iterable_dataset() if stream else rows, "train")))
        except ValueError as error:
            named = re.search(
                "column '(chosen|rejected)', row [012] .*(most rows hold|looks like) messages", str(error)
            )
            found.add("refused" if named else str(error))
        else:
            found.add("messages" if row.is_conversational else "text")
    assert found == {outcome}


def test_a_completion_of_characters_without_width_is_blank(caplog):
    rows = [
        {"prompt": "q ", "chosen": "\u200b\u2060\ufeff\n", "rejected": "b"},
        {"prompt": "p ", "chosen": "…", "rejected": "b"},
    ]
    open_rows(Dataset.from_list(rows), "train")
    assert "1 of 2 chosen completions have no text of their own (the first is in row 0)" in caplog.text


def test_turns_in_a_prompt_that_is_repeated_are_not_the_completions(caplog):
    """HH's rows, with the prompt in a column of its own as well."""
    asked = [f"\n\nHuman: hi {i}\n\nAssistant: yes?\n\nHuman: so?\n\nAssistant:" for i in range(3)]
    rows = [{"prompt": q, "chosen": f"{q} a", "rejected": f"{q} b"} for q in asked]
    assert [row.completions for row in open_rows(Dataset.from_list(rows), "train")] == [[" a", " b"]] * 3
    assert not caplog.text
    rows[1]["chosen"] += "\n\nHuman: oh"
    open_rows(Dataset.from_list(rows), "train")
    (record,) = caplog.records
    assert "in 1 of 3 rows a completion holds 'Human:' or the like (the first is row 1)" in record.getMessage()


TEMPLATES = [  # what begins the user's turn and the model's, and what ends the model's
    ("USER: ", " ASSISTANT: ", "</s>"),
    ("### Human: ", "### Assistant: ", ""),
    ("### Instruction:\n", "\n\n### Response:\n", "</s>"),
    ("GPT4 Correct User: ", "<|end_of_turn|>GPT4 Correct Assistant: ", "<|end_of_turn|>"),
    ("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ("<|header_start|>user<|header_end|>\n\n", "<|header_start|>assistant<|header_end|>\n\n", "<|eot|>"),
    ("<|im_user|>user<|im_middle|>", "<|im_assistant|>assistant<|im_middle|>", "<|im_end|>"),
    ("[|user|]", "\n[|assistant|]", "[|endofturn|]\n"),
    ("<extra_id_1>User\n", "\n<extra_id_1>Assistant\n", "\n"),
    ("<human>: ", "\n<bot>: ", "\n"),
    ("[|Human|]:", "[|AI|]:", "\n"),
    ("[Round 1]\n\n问：", "\n\n答：", "\n\n"),
    ("User: ", " Assistant: ", " "),
    ("Usuario: ", "\nAsistente: ", "\n"),
    ("Instruction: be kind.\nUser: ", "\nBot:", "\n"),
    ("Title: ", "\nSummary:", "\n\n"),  # of a model that writes further examples
    ("User: ", "\nAssistant: <think>\n", "\n"),
]


@pytest.mark.parametrize(("user", "model", "end"), TEMPLATES, ids=[user.strip() for user, _, _ in TEMPLATES])
def test_a_turn_of_the_user_behind_the_answer(user, model, end, caplog):
    more = f"seven.{end}{user}And then?{model}Eight."
    rows = [{"prompt": f"{user}Tell {i}{model}", "chosen": more, "rejected": "No."} for i in range(2)]
    open_rows(Dataset.from_list(rows), "train")
    assert "in 2 of 2 rows a completion holds" in caplog.text
    caplog.clear()
    open_rows(Dataset.from_list([{**row, "chosen": "seven. The user: and so on."} for row in rows]), "train")
    assert not caplog.text


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Sum it.\n\nInput: [1]\nOutput: 1\n", "def f(x): return x\n\nInput: [1]\nOutput: 1"),
        ("Draft it.\n\nCustomer: Ann\nIssue: no light", "Summary\n\nCustomer: Ann\nNext step: call"),
        ("Write yaml with\nuser: x\npassword: y", "```yaml\nuser: x\npassword: y\n```"),
        ("Rewrite it.\n\nQuestion: Who was he?", "Harder:\n\nQuestion: Who was his mother?"),
        ("The next scene.\nStudent: Sir?\nTeacher: Yes?", "Student: Late.\nTeacher: Why?\nStudent: Rain."),
        ("User: Draft it.\nCustomer: Ann\nAssistant:", "Ticket\nCustomer: Ann\nfor the User: none"),
        ("User: Ask for it.\nAssistant:", "Give me your\n- User: a name\n- Password: a word"),
        ("Patient: Ann\nDiagnosis: none\nLetter:", "Dear Dr\nPatient: Ms Ann\nDiagnosis: none"),
        ("Input: 3 4\nTask: add them.\nAnswer:", "Steps:\nInput: 3 and 4\nResult: 7"),
        ("Mend it.\nuser: x\npass word\nFixed:", "user: x\npass: word"),
        ("User: What is in it?\nAssistant:", "The log says\n> User: root logged in"),
    ],
)
def test_labels_that_are_no_turns(prompt, answer, caplog):
    open_rows(Dataset.from_list([{"prompt": prompt, "chosen": answer, "rejected": "no"}]), "train")
    assert not caplog.text


def test_a_completion_that_begins_with_the_model_s_turn(caplog):
    rows = [{"prompt": "USER: hi", "chosen": " ASSISTANT: yes USER: and?", "rejected": " ASSISTANT: no"}]
    open_rows(Dataset.from_list(rows), "train")
    assert "in 1 of 1 rows a completion holds 'USER:'" in caplog.text


def test_marks_in_long_lines_are_found_at_once():
    begun = time.monotonic()
    many = "".join(f"\nkey{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i}: value" for i in range(20_000))
    for text in (many, " " * 100_000, "#" * 50_000, "</s>" * 20_000, "a " * 50_000, "\nUser:" * 10_000):
        open_rows(Dataset.from_list([{"prompt": f"User: {text}\nA:", "chosen": text, "rejected": "b"}]), "train")
    assert time.monotonic() - begun < 20


def test_prompts_that_are_empty_in_some_rows(caplog):
    rows = [{"prompt": q, "chosen": "a", "rejected": "b"} for q in ("", "q ", "")]
    open_rows(Dataset.from_list([rows[0], rows[2]]), "train")
    assert not caplog.text  # a set without prompts
    open_rows(Dataset.from_list(rows), "train")
    assert "in 2 of 3 text rows the prompt is empty (the first is row 0)" in caplog.text


def test_two_system_messages():
    """One in the prompt, another in the column that is named; in pairs and in lists."""
    prompt = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    pair = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    lists = {"responses": ["a", "b"], "scores": [1, 2]}

    def read(answers, system):
        rows = Dataset.from_list([{"prompt": prompt, **answers, "system": system}])
        if answers is lists:
            return list(ScoredLists.of(rows, "x", None, None, "system"))
        return list(open_rows(rows, "x", system_column="system"))

    for answers in (pair, lists):
        for system in ("own", "own\n", None):
            (found,) = read(answers, system)
            assert found.prompt == prompt
        prompt[0]["content"] = ""
        (found,) = read(answers, "other")
        assert found.prompt == [{"role": "system", "content": "other"}, prompt[1]]
        prompt[0]["content"] = "own"
        said = r"column 'system', .*row 0.*other.* is another system message than the prompt's own, .*own"
        with pytest.raises(RowError, match=said):
            read(answers, "other")


@pytest.mark.parametrize("role", ["alice", "function_call"])
def test_an_unknown_role_in_sharegpts_messages(role):
    turns = [{"from": "human", "value": "q"}, {"from": role, "value": "x"}]
    sides = {name: {"from": "gpt", "value": name} for name in ("chosen", "rejected")}
    with pytest.raises(RowError, match=rf"column 'conversations', row 0 .*is from '{role}'; known: human, gpt"):
        list(open_rows(Dataset.from_list([{"conversations": turns, **sides}]), "x"))


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_a_date_that_a_template_would_be_given(column):
    """It would write `<datetime>`."""
    value = {"a": [{"day": datetime(2026, 1, 1)}]}
    row = {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": name}]
        for name in ("prompt", "chosen", "rejected")
    }
    rows = Dataset.from_list([{**row, column: [value] if column == "tools" else value}])
    with pytest.raises(
        RowError, match=rf"column '{column}', row 0 .*datetime.datetime\(2026, 1, 1, 0, 0\) is a datetime"
    ):
        list(open_rows(rows, "x"))
