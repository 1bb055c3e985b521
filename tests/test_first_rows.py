"""Training says where the tokens of its first rows do not spell their text."""

from __future__ import annotations

import json
import logging

import pytest
from conftest import byte_tokenizer
from datasets import Dataset
from tokenizers import normalizers

from trl_margins.rows import open_rows
from trl_margins.rows.counts import count_rows
from trl_margins.rows.notes import notes, why_refused
from trl_margins.rows.opened import reader_for
from trl_margins.rows.tokenized import look_at_first_rows

LETTERS = "Ärger mit  Öl, ﬁn\n\n e\u0301 漢字 🙂 </s> <s> {{ x }} I'm 3.5%"


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


TEXT = {"prompt": f"q: {LETTERS}", "chosen": f" a {LETTERS}", "rejected": "no"}
CHAT = {
    "prompt": [{"role": "system", "content": "no sheep"}, user("old"), bot("<think>hm</think>older"), user(LETTERS)],
    "chosen": [bot(f"yes {LETTERS}")],
    "rejected": [bot("no")],
}
MESSAGE = "[{{ m.role }}]{{ m.content }}{{ eos_token }}"
TEMPLATES = {
    "whole": "{% for m in messages %}" + MESSAGE + "{% endfor %}",
    "trims": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "no system": "{% for m in messages if m.role != 'system' %}" + MESSAGE + "{% endfor %}",
    "no user": "{% for m in messages if m.role == 'assistant' %}" + MESSAGE + "{% endfor %}",
    "last turn": "{% for m in messages[-2:] %}" + MESSAGE + "{% endfor %}",
    "cut": "{% for m in messages %}[{{ m.role }}]{{ m.content[:9] }}{{ eos_token }}{% endfor %}",
}


def said_of(rows, tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "trl_margins"):
        look_at_first_rows(open_rows(Dataset.from_list(rows), "train"), tokenizer)
    return [line for line in caplog.messages if "do not spell the text" in line]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template(template, caplog):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    said = said_of([CHAT] * 3, tokenizer, caplog)
    assert len(said) == (template in ("no system", "no user", "last turn", "cut"))
    if said:
        assert "in 3 of the first 3 rows" in said[0]
        assert f"such as '{'older' if template == 'cut' else 'no sheep'}', which" in said[0]


TOOL = {"role": "tool", "content": '{"wind": "a 5\n"}'}
AGENT = {
    "prompt": [user("old"), TOOL, bot("<think>hm</think>older"), user("new")],
    "chosen": [bot("<think>so</think>call"), TOOL, bot("<think>yes</think>it blows")],
    "rejected": [bot("call"), TOOL, bot("no")],
}
OF_AGENTS = {
    "as JSON": ("{% set c = m.content | tojson if m.role == 'tool' else m.content %}[{{ m.role }}]{{ c }}", None),
    "no earlier thoughts": (
        "[{{ m.role }}]{{ m.content if loop.last else m.content.split('</think>')[-1] }}",
        None,
    ),
    "no tools": ("{% if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}{% endif %}", '{"wind": "a 5'),
    "no calls": ("{% if m.content != 'call' %}[{{ m.role }}]{{ m.content }}{% endif %}", "call"),
    "no thoughts": ("[{{ m.role }}]{{ m.content.split('</think>')[-1] }}", "<think>yes</think>it blows"),
}


@pytest.mark.parametrize("case", OF_AGENTS)
def test_every_message_of_a_completion(case, caplog):
    """Thoughts of earlier turns may be left out, and what a tool says may be written as JSON."""
    template, lost = OF_AGENTS[case]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}{{ eos_token }}"
    said = said_of([AGENT] * 2, tokenizer, caplog)
    assert len(said) == (lost is not None)
    assert lost is None or lost in said[0]


def test_a_letter_whose_marks_are_the_completions(caplog):
    """Where the prompt is what both begin with, it may end between a letter and its mark."""
    rows = [{"chosen": f"{q} x A: e\u0301", "rejected": f"{q} x A: e\u0300"} for q in ("Who", "What", "Why")]
    assert said_of(rows, byte_tokenizer(), caplog) == []


def test_a_sign_of_private_use_is_text(caplog):
    """A font's, as of a brand; a byte-order mark is none."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": text} for text in ("\uf8ff", "\U000f0001", "\ufeff")]
    said_of(rows, byte_tokenizer(), caplog)
    with caplog.at_level(logging.WARNING, "trl_margins"):
        open_rows(Dataset.from_list(rows), "train")
    assert "1 of 3 rejected completions have no text of their own (the first is in row 2)" in caplog.text


ENDS = {
    "one": ("[{{ m.role }}]{{ m.content }}{{ eos_token }}\n", "a", None),
    "none": ("[{{ m.role }}]{{ m.content }}\n", "a", "3 rows a completion ends without a special token (the first is"),
    "another special token": ("<|user|>{{ m.content }}<|assistant|>\n", "a", None),
    "one in the text": (None, "a</s>", None),
    "one, and more behind it": ("[{{ m.role }}]{{ m.content }}{{ eos_token }}\n---\n", "a", None),
    "one behind each turn": ("[{{ m.role }}]{{ m.content }}{{ eos_token }}", "a</s>b", None),
    "two in the text, far from each other": (
        None,
        "a</s>\n\n\n\n\n\n\n",
        "3 rows a completion ends with two end tokens",
    ),
    "two in the text": (
        None,
        "a</s>\n",
        "3 rows a completion ends with two end tokens (the first is row 0): the text",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_where_a_completion_ends(case, caplog):
    template, text, said = ENDS[case]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    row = {"prompt": "q", "chosen": text, "rejected": "b"}
    if template is not None:
        tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
        row = {name: [user(value) if name == "prompt" else bot(value)] for name, value in row.items()}
    said_of([row] * 3, tokenizer, caplog)
    found = [line for line in caplog.messages if "a completion ends" in line]
    assert len(found) == (said is not None)
    if said is not None:
        assert said in found[0]


def test_tools_beside_text(caplog):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": "[{}]", "chat_template_kwargs": {"x": 1}}
    said_of([{**row, "tools": None, "chat_template_kwargs": None}, row], byte_tokenizer(), caplog)
    assert "1 rows of text (the first is row 1) have 'tools', 'x', which only a chat template reads" in caplog.text


@pytest.mark.parametrize("row", [TEXT, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize(
    ("normalizer", "is_said"),
    [
        (normalizers.Replace("e", ""), True),
        (normalizers.Replace("漢", "?"), True),
        (normalizers.NFKC(), False),
        (normalizers.Lowercase(), False),
        (normalizers.Replace("\n\n", " "), False),
    ],
    ids=repr,
)
def test_a_tokenizer(normalizer, is_said, row, caplog):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    assert bool(said_of([row], tokenizer, caplog)) == is_said


@pytest.mark.parametrize("name", ["post", "messages", "input_text", "source"])
def test_a_prompt_under_a_name_of_its_own(name, caplog):
    """Beside texts that begin alike, which would be the prompt."""
    asked = {"messages": [user("Who runs?")], "source": "web"}.get(name, "Who runs?")
    rows = [{name: asked, "chosen": "The cat", "rejected": "The dog"}] * 2
    with caplog.at_level(logging.WARNING, "trl_margins"):
        for note in notes(*counted(Dataset.from_list(rows))):
            logging.getLogger("trl_margins").log(note.level, note.text)
    said = f"column {name!r} is not used, and in 2 of 2 rows it holds text that the prompt does not"
    assert (said in caplog.text) == (name != "source")
    assert (f"--prompt_column {name}" in caplog.text) == (name != "source")


@pytest.mark.parametrize(
    ("name", "value", "is_said"),
    [
        ("chat_history", [user("Before?"), {"role": "assistant", "content": "Yes."}], True),
        ("chat_history", [user("Who runs?")], False),
        ("contexts", 4, True),
        ("Input", "The cat", True),
        ("Documents", "The cat", True),
        ("contexts", False, False),
        ("system", 1, False),
        ("chat_history", "[]", False),
        ("chat_history", '[["Before?", "Yes."]]', True),
        ("contexts", '["Who runs?"]', True),  # it may be the text that is meant
        ("contexts", 3.0, True),
        ("contexts", None, False),
        ("chat_history", json.dumps([{"from": "human", "value": "Who runs?"}]), False),
        ("documents", ["Cats run."], True),
        ("passage", "Who", False),
        ("functions", [{"name": "find"}], True),
        ("messages", [user("Before?"), user("Who runs?")], True),
        ("messages", [user("Who runs?"), {"role": "assistant", "content": "Cats"}], False),
        ("messages", None, False),
    ],
)
def test_what_lies_beside_a_prompt(name, value, is_said, caplog):
    rows = [{"prompt": "Who runs?", "chosen": "Cats", "rejected": "Dogs", name: value}] * 2
    (found,) = [note.text for note in notes(*counted(Dataset.from_list(rows)))] or [""]
    assert found.startswith(f"column {name!r} is not used, and in 2 of 2 rows") == is_said, found


def counted(dataset):
    reader = reader_for(dataset, "train")
    return reader, count_rows(dataset, reader)


def test_a_prompt_in_one_completion_is_said_where_most_rows_have_it():
    """Of half the rows, it may be chance."""
    once = {"prompt": "Who runs?", "chosen": "Who runs? Cats", "rejected": "Dogs"}
    rows = [once, {**once, "chosen": "Cats"}]
    said = "only one of chosen and rejected begins with the prompt"
    for given, is_said in ((rows, False), ([once, *rows], True)):
        found = [note.text for note in notes(*counted(Dataset.from_list(given)))]
        assert any(said in text for text in found) == is_said


def test_what_is_refused_is_not_said_again():
    """A column like a prompt, where there is none, is the reason of a refusal."""
    rows = [{"question": "Who runs?", "chosen": f"The cat {i}", "rejected": f"The dog {i}"} for i in range(3)]
    reader, counts = counted(Dataset.from_list(rows))
    assert "Set prompt_column='question'" in (why_refused(reader, counts) or "")
    assert not [note.text for note in notes(reader, counts) if "question" in note.text]
