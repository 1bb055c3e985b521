"""What is said of the rows of a data set, word for word: columns, rows, counts and fixes are those of the rows.

`row_messages.txt` has those of each case. `python tests/test_row_messages.py` writes it anew: read what has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import byte_tokenizer, chat_tokenizer
from datasets import Dataset, Features, Json
from said import blocks_of

from trl_margins.rows import open_rows
from trl_margins.rows.lists import ScoredLists
from trl_margins.rows.mixed import mixed
from trl_margins.rows.prompts import open_prompts
from trl_margins.rows.scores import (
    ScoreColumns,
    ScoreSummary,
    check_numbers,
    check_scores,
    find_score_columns,
    report_scores,
    require_score_columns,
)
from trl_margins.rows.tokenized import DPO_COLUMNS, _differences, finish_tokenized, look_at_first_rows
from trl_margins.rows.tokens import prepare_tokenizer

MESSAGES = Path(__file__).with_name("row_messages.txt")
Row = dict[str, Any]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def model(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def data(*rows: Row) -> Dataset:
    as_they_are = all(isinstance(value, str | None) for row in rows for value in row.values())
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list(list(rows), features=None if as_they_are else Features({name: Json() for name in names}))


def pairs(*rows: Row, **options: Any) -> Callable[[], Any]:
    return lambda: open_rows(data(*rows), "dev", **options)


def lists(*rows: Row, **options: Any) -> Callable[[], Any]:
    return lambda: list(ScoredLists.of(Dataset.from_list(list(rows)), "the lists", **options))


def asked(*rows: Row, **options: Any) -> Callable[[], Any]:
    return lambda: open_prompts(Dataset.from_list(list(rows)), "dev", **options)


def scores(*values: Any, least: float = 0.0) -> Callable[[], Any]:
    columns = ScoreColumns("margin")
    return lambda: report_scores(
        check_scores(Dataset.from_dict({"margin": list(values)}), columns, "dev", least), columns, "dev"
    )


def numbers(*values: Any, least: float | None = None) -> Callable[[], Any]:
    return lambda: check_numbers(Dataset.from_dict({"mine": list(values)}), "mine", "dev", least)


def tokens(*rows: tuple[int, str, str], **options: Any) -> Callable[[], Any]:
    """Of prompts of so many tokens, with completions whose tokens are their characters."""

    def run() -> None:
        texts = [{"prompt": "p" * n, "chosen": f"{one} ", "rejected": f"{other}-"} for n, one, other in rows]
        made = [[[0] * n, list(map(ord, one)), list(map(ord, other))] for n, one, other in rows]
        dataset = Dataset.from_list([dict(zip(DPO_COLUMNS, row, strict=True)) for row in made])
        finish_tokenized(dataset, open_rows(Dataset.from_list(texts), "dev"), DPO_COLUMNS, **options)

    return run


def looked_at(tokenizer: Any, *rows: Row, **options: Any) -> Callable[[], Any]:
    return lambda: look_at_first_rows(open_rows(data(*rows), "dev"), tokenizer, **options)


def tokenizer_with(**parts: Any) -> Any:
    tokenizer = byte_tokenizer()
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


OK = {"prompt": "q ", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("q")], "chosen": [model("a")], "rejected": [model("b")]}
L = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}
SCORED = {"score_chosen": 2.0, "score_rejected": 1.0}
# renders the question only where it is the last message
MOVES = (
    "{% for m in messages %}{% if m['role'] == 'user' and loop.last %}[{{ m['content'] }}]"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)

CASES: dict[str, Callable[[], Any]] = {
    "no such prompt column": pairs(OK, prompt_column="ask"),
    "no such system column": pairs(OK, system_column="sys"),
    "None": pairs(OK, {**OK, "rejected": None}),
    "no prompt value": pairs(OK, {**OK, "prompt": None}),
    "two forms": pairs(CHAT, {**CHAT, "rejected": "b"}),
    "two forms, other way": pairs(CHAT, {**CHAT, "chosen": "a"}),
    "user last": pairs(CHAT, {**CHAT, "rejected": [model("b"), user("and?"), model("c"), user("so?")]}),
    "rendered prompts": pairs(
        {**CHAT, "prompt": "<s>[INST] q [/INST]"},
        CHAT | {"prompt": [user("What is <|im_start|>?")]},
        CHAT | {"prompt": [user("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")]},
        *(CHAT | {"prompt": [user(f"<{word}> q </{word}> <{word}> q")]} for word in ("user", "system", "div")),
    ),
    "rendered prompts, of text": pairs(
        *(CHAT | {"prompt": [user(text)]} for text in ("Make an Assistant:", "Q: x\nAnswer:")),
        CHAT | {"prompt": [user("A chat. USER: q ASSISTANT:")]},
        CHAT | {"prompt": [user("Below is a task.\n\n### Instruction:\nq\n\n### Response:\n")]},
        CHAT | {"prompt": [user("GPT4 Correct User: q<|end_of_turn|>GPT4 Correct Assistant:")]},
    ),
    "a play": pairs(CHAT | {"prompt": [user("Go on.\nPATIENT: Ah.\nNURSE: Oh?\nASSISTANT:")]}),
    "a number": pairs(CHAT, {**CHAT, "chosen": 7}),
    "empty list": pairs(CHAT, {**CHAT, "chosen": []}),
    "no content": pairs(CHAT, {**CHAT, "chosen": [model("x"), {"role": "assistant"}]}),
    "no role": pairs(CHAT, {**CHAT, "chosen": [model("x"), {"content": "y"}]}),
    "neither": pairs(CHAT, {**CHAT, "chosen": [model("x"), {"name": "y"}]}),
    "nested": pairs(CHAT, {**CHAT, "chosen": [model("x"), [model("y")]]}),
    "from whom": pairs(CHAT, {**CHAT, "chosen": [{"from": "gpt", "value": "x"}, {"from": "bing", "value": "y"}]}),
    "role no text": pairs(CHAT, {**CHAT, "chosen": [{"role": 3, "content": "y"}]}),
    "content number": pairs(CHAT, {**CHAT, "chosen": [{"role": "assistant", "content": 3}]}),
    "image": pairs(CHAT, {**CHAT, "chosen": [model([{"type": "text", "text": "x"}, {"type": "image"}])]}),
    "begin unlike": pairs({"chosen": "ab", "rejected": "ac"}, {"chosen": "a b", "rejected": "c d"}),
    "begin unlike, columns": pairs(
        {"chosen": "ab", "rejected": "ac", "question": "", "system": ""},
        {"chosen": "x b", "rejected": "c d", "question": "", "system": ""},
    ),
    "messages unlike": pairs(
        {"chosen": [user("q"), model("a")], "rejected": [user("q"), model("b")]},
        {"chosen": [user("q"), model("a")], "rejected": [user("r"), model("b")]},
    ),
    "text beside conversations": pairs(
        {"prompt": "q", "chosen": [user("q"), model("a")], "rejected": [user("q"), model("b")]},
        {"prompt": "q", "chosen": [user("q"), model("a")], "rejected": [user("r"), model("b")]},
    ),
    "tools no JSON": pairs(CHAT | {"tools": "[]"}, CHAT | {"tools": "[x"}),
    "tools no list": pairs(CHAT | {"tools": "[]"}, CHAT | {"tools": "{}"}),
    "variables no mapping": pairs(CHAT | {"chat_template_kwargs": "{}"}, CHAT | {"chat_template_kwargs": "[1]"}),
    "trainer's variables": pairs(
        CHAT | {"chat_template_kwargs": "{}"}, CHAT | {"chat_template_kwargs": '{"tokenize": 1, "messages": []}'}
    ),
    "no columns": pairs({"text": "a"}),
    "one column": pairs({"chosen": "a", "worse": "b"}),
    "upper": pairs({"Chosen": "a", "rejected": "b"}),
    "unscored": pairs({"prompt": "a", "responses": ["x"]}),
    "stored broken": pairs(
        {"chosen": '[{"role": "user", "content": "x"}]', "rejected": '[{"role": "user", "content": "x"}]'},
        {"chosen": '[{"role": "user", "content"', "rejected": '[{"role": "user", "content": "x"}]'},
    ),
    "column says more": pairs(
        {"chosen": "Q a", "rejected": "Q b", "question": "Q"},
        {"chosen": "ab", "rejected": "ac", "question": "why"},
        {"chosen": "ab", "rejected": "ac", "question": "how"},
    ),
    "system says more": pairs(
        {"chosen": "Q a", "rejected": "Q b", "system": "Q"}, {"chosen": "ab", "rejected": "ac", "system": "kind"}
    ),
    "chance": pairs(*({"chosen": f"The {x}", "rejected": f"The not {x}"} for x in "abc")),
    "notes": pairs(
        OK, {**OK, "chosen": "same", "rejected": "same"}, {"prompt": "r ", "chosen": "r x", "rejected": "r y"}
    ),
    "repeats alike": pairs(
        {"prompt": "Say “a\r\nb”, please. ", "chosen": 'Say "a\nb",  please. x', "rejected": 'say "a\nb", please. y'},
        {
            "prompt": "Why is it ever so … ",
            "chosen": "WHY IS IT EVER SO ... x",
            "rejected": "why is it ever\nso ...\ny",
        },
        {"prompt": "Why? ", "chosen": "WHY? Since.", "rejected": "why?\nSo."},
    ),
    "begins alike": pairs(
        {"prompt": "A prompt for one", "chosen": "A prompt for Ones", "rejected": "A Prompt for ones"}
    ),
    "is corrected": pairs(
        {
            "prompt": "it's number 7 isn’t it",
            "chosen": "It's number 7, isn't it?",
            "rejected": "It's number 7 isn't it?",
        }
    ),
    "repeats one alike": pairs(
        {"prompt": 'Say the word "a"', "chosen": 'Say the word "a": x', "rejected": "Say the word “a”: y"}
    ),
    "asks again": pairs(
        {"prompt": "USER: why? ASSISTANT:", "chosen": " So. USER: and?", "rejected": " No."},
        {"prompt": "### Instruction:\nq\n### Response:\n", "chosen": "a", "rejected": "b\n### Instruction:\nr"},
        {"prompt": "Q: why?\nA:", "chosen": " So.", "rejected": " The Q: so.\nQ: and?"},
        {"prompt": "Q: why?\nA:", "chosen": " So.", "rejected": " The Q: so."},
        {"prompt": "Q: why?\nA:", "chosen": "Q: why?\nA: So.", "rejected": "Q: why?\nA: No."},
    ),
    "begins the answer": pairs({**OK, "initial_reason_steps": "Step 1: a."}),
    "repeats all": pairs(
        {"prompt": "r ", "chosen": "r x", "rejected": "r y"}, {"prompt": "s ", "chosen": "s x", "rejected": "s y"}
    ),
    "user turns": pairs(
        CHAT,
        {**CHAT, "chosen": [model("a"), user("and"), model("b")]},
        {"prompt": [user("q"), model("I")], "chosen": [model("a")], "rejected": [model("b")]},
    ),
    "turns of a dialogue": pairs(
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman:", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": "\n\nHuman: q\n\nHuman: r", "rejected": "\n\nHuman: q\n\nHuman: s"},
    ),
    "a dialogue in other lines": pairs(
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": "Human: q\nAssistant: a", "rejected": "Human: q\nAssistant: an"},
    ),
    "blank": pairs(
        OK,
        {**OK, "chosen": " \n"},
        {**CHAT, "rejected": [model("")]},
        {**CHAT, "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
    ),
    "blank behind prompts": pairs(
        {"prompt": "r ", "chosen": "r x", "rejected": "r y"}, {"prompt": "s ", "chosen": "s ", "rejected": "s y"}
    ),
    "one repeats": pairs(
        {"prompt": "r ", "chosen": "r x", "rejected": "y"}, {"prompt": "s ", "chosen": "s x", "rejected": "y"}, OK
    ),
    "names of columns": pairs(
        *({"prompt": "p", "answer_a": "x", "b": "y", "chosen": one, "rejected": "b"} for one in ("a", "answer_a"))
    ),
    "names of columns once": pairs(
        {**OK, "answer_a": "x", "b": "y"}, {**OK, "answer_a": "x", "b": "y", "chosen": "A"}
    ),
    "messages in a mapping": pairs(
        {
            f"{side}": f'{{"messages": [{{"role": "assistant", "content": "{side}"}}], "tools": []}}'
            for side in ("chosen", "rejected")
        }
    ),
    "few messages as text": pairs(OK, OK, {**OK, "chosen": '[{"role": "assistant", "content": "x"}]'}),
    "most messages as text": pairs(OK, *[{**OK, "rejected": '[{"role": "assistant", "content": "x"}]'}] * 2),
    "text behind messages as text": pairs({**OK, "chosen": '[{"role": "assistant", "content": "x"}]'}, OK),
    "mixed kinds": pairs(CHAT, OK, OK),
    "contradicted": pairs(
        {"prompt": "q", "chosen": [user("q"), model("a")], "rejected": [user("q"), model("b")]},
        {"prompt": "other", "chosen": [user("q"), model("a")], "rejected": [user("q"), model("b")]},
    ),
    "unused": pairs(
        {**OK, "context": "q"}, {**OK, "context": "more", "system": "kind"}, {**OK, "context": "still", "system": ""}
    ),
    "system instruction": pairs({**OK, "system_instruction": "q"}, {**OK, "system_instruction": "be kind"}),
    "other prompt column": pairs({"ask": "q ", "chosen": "a", "rejected": "b"}, prompt_column="ask"),
    # lists
    "L no column": lists(L, prompt_column="x"),
    "L no system": lists(L, system_column="y"),
    "L no prompts": lists({"q": "p", "responses": ["a"], "scores": [1.0]}),
    "L no scores": lists({"prompt": "p", "responses": ["a"]}),
    "L pairs": lists(OK),
    "L pairs alone": lists({"chosen": "a", "rejected": "b"}),
    "L other": lists({"text": "x"}),
    "L score columns": lists({"prompt": "p", "responses": ["a"], "scores": [1.0]}, score_columns=["mine"]),
    "L third": lists(
        {"prompt": "p", "response_1": "a", "response_2": "b", "response_3": "c", "score_1": 1.0, "score_2": 2.0}
    ),
    "L sizes": lists(L, {**L, "scores": [1.0]}),
    "L sizes of models": lists({**L, "models": ["x", "y"]}, {**L, "models": ["x", "y", "z"]}),
    "L bad score": lists(L, {**L, "scores": [1.0, float("inf")]}),
    "L word": lists({**L, "scores": ["1", "2"]}, {**L, "scores": ["1", "good"]}),
    "L no list": lists({**L, "responses": "['a', 'b']"}, {**L, "responses": "a"}),
    "L empty": lists({**L}, {**L, "responses": []}, strict=True),
    "L none": lists({**L}, {**L, "responses": ["a", None]}, strict=True),
    "L prompt none": lists(L, {**L, "prompt": None}),
    "L one": lists(
        {"prompt": "p", "response": "a", "helpfulness": 1}, {"prompt": "", "response": "a", "helpfulness": 1}
    ),
    "L struct": lists({"prompt": "p", "completions": [{"said": "x", "overall_score": 1.0}]}),
    "L rating": lists({"prompt": "p", "completions": [{"response": "x", "stars": 1.0, "likes": 3}]}),
    "L rating named": lists(
        {"prompt": "p", "completions": [{"response": "x", "stars": 1.0, "likes": 3}]}, score_columns=["rated"]
    ),
    "L winner": lists(
        *({"prompt": "p", "response_a": "x", "response_b": "y", "winner": w} for w in ("model_a", "nobody"))
    ),
    "L better": lists(
        *({"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": b} for b in (1, -1))
    ),
    "L vote": lists(
        *(
            {
                "prompt": "p",
                "response_a": "x",
                "response_b": "y",
                "winner_model_a": w,
                "winner_model_b": 0,
                "winner_tie": 0,
            }
            for w in (1, 0)
        )
    ),
    "L labels": lists(
        *(
            {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "score_A": 3, "score_B": 2, "labels": w}
            for w in (1, 0)
        )
    ),
    "L input": lists(
        *(
            {"instruction": "p", "input": i, "output": "o", "responses": ["a", "b"], "scores": [1.0, 2.0]}
            for i in ("", "more")
        )
    ),
    "L mapping prompt": lists({"prompt": {"a": "b"}, "responses": ["a"], "scores": [1.0]}),
    "L conversations": lists({"conversation_a": "x", "conversation_b": "y", "winner": "model_a"}),
    "L counts": lists(
        {"prompt": "p", "responses": ["a", None, "c"], "scores": ["1", "2", None]},
        {"prompt": "q", "responses": ["x"], "scores": ["nan"]},
        {"prompt": "p", "responses": ["a", "d"], "scores": ["3", "1"]},
    ),
    "L ranks": lists({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}),
    "L unused": lists({**L, "context": "more"}, {**L, "context": "p"}),
    # prompts
    "P none": lambda: open_prompts(Dataset.from_dict({"prompt": []}), "dev"),
    "P no column": asked({"text": "x"}),
    "P empty": asked({"prompt": "x"}, {"prompt": " "}, {"prompt": ""}),
    "P pairs": asked(OK, {**OK, "prompt": ""}),
    "P pairs without prompts": asked({"chosen": "Q: a", "rejected": "Q: b"}, {"chosen": "R: a", "rejected": "R: b"}),
    "P named": asked({"question": "x"}),
    "P named by hand": asked({"mine": "x"}, prompt_column="mine"),
    "P no such": asked({"mine": "x"}, prompt_column="yours"),
    "P turns": asked({"question": ["x", "y"]}, {"question": ["z"]}, {"question": ["v", "w"]}),
    "P prefilled": asked({"prompt": [user("x")]}, {"prompt": [user("y"), model("I")]}),
    "P answered": asked({"messages": [user("x"), model("a")]}, {"messages": [user("y")]}),
    "P only answer": asked({"messages": [user("x"), model("a")]}, {"messages": [model("y")]}),
    "P unused": asked({"question": "x", "context": "x"}, {"question": "y", "context": "more"}),
    "P input": asked({"instruction": "x", "input": ""}, {"instruction": "x", "input": "z"}),
    # sets put together
    "M some without scores": lambda: mixed(
        [("one", data({**OK, "margin": "1"})), ("two", data(OK)), ("three", data(OK))]
    ),
    "M other columns": lambda: mixed([("one", data({**OK, "b": "1", "a": "1"})), ("two", data({**OK, "c": "1"}))]),
    # scores
    "S None": scores(1.0, 2.0, None),
    "S several": scores(1.0, float("nan"), float("inf")),
    "S large": scores(1.0, 1.1e6),
    "S words": scores("1", "2", "high"),
    "S booleans": scores(True, False),
    "S reversed": scores(-1.0, -2.0, 0.0, 1.0),
    "S swapped": lambda: report_scores(ScoreSummary(9, 2, 4, 1.0, 0, 3), ScoreColumns("good", "bad"), "dev"),
    "S missing": lambda: find_score_columns(["a", "b"], ["a", "c"]),
    "S three": lambda: find_score_columns(["a", "b"], ["a", "b", "a"]),
    "S ranks": lambda: doubted(["a", "my_rank"], ["a", "my_rank"]),
    "S alone": lambda: doubted(["chosen_score", "rejected_score"], ["rejected_score"]),
    "S required": lambda: require_score_columns(["text", "chosen_score"], None, "weight 'mine'", "dev"),
    "S too small": numbers(1.0, -1.0, -2.0, least=0.5),
    "S too large": numbers(1.0, 3.5e38),
    # tokens
    "T filled": tokens((4, "a", "b"), (5, "a", "b"), (6, "a", "b"), (1, "a", "b"), max_length=5),
    "T all filled": tokens((4, "a", "b"), (5, "a", "b"), max_length=4),
    "T alike": tokens(
        (1, "a", "b"), (1, "a", "a"), (1, "abc", "abd"), (1, "ab", "abc"), max_length=9, completion_cut=3
    ),
    "T all alike": tokens((1, "a", "a"), (1, "abc", "abd"), max_length=9, completion_cut=3),
    "T end token": lambda: prepare_tokenizer(tokenizer_with(eos_token=None, name_or_path="folder/of"), []),
    "T padding": lambda: prepare_tokenizer(tokenizer_with(pad_token=None, name_or_path="folder/of"), []),
    "T template": lambda: prepare_tokenizer(tokenizer_with(chat_template=None, name_or_path="folder/of"), ["dev"]),
    "T template and text": lambda: prepare_tokenizer(tokenizer_with(chat_template=None), []),
    "T moves": looked_at(chat_tokenizer(MOVES), CHAT, {**CHAT, "prompt": [user("z")]}),
    "T two begin tokens": looked_at(tokenizer_with(), OK, {**OK, "prompt": "<s><s>"}, {**OK, "prompt": "<s><s>x"}),
    "T as CPOTrainer": looked_at(tokenizer_with(), OK, OK, cpo_max_length=64),
}


def doubted(names: list[str], given: list[str]) -> None:
    for doubt in ScoreColumns(*given).doubts(names):
        raise ValueError(doubt)


def said_by(case: Callable[[], Any]) -> list[str]:
    said: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("trl_margins")
    handler.emit = lambda record: said.append(f"{record.levelname}: {record.getMessage()}")  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        case()
    except ValueError as error:
        said.append(f"{type(error).__name__}: {error}")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return said


def test_every_case_is_written():
    assert list(blocks_of(MESSAGES)) == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_rows(case):
    assert said_by(CASES[case]) == blocks_of(MESSAGES)[case]


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [
        ([3, 4], [3, 5], set()),
        ([3, 4, 2], [3, 5], {"one more end token"}),
        ([1, 3, 4], [1, 3, 5], {"one more begin token"}),
        ([1, 3, 4, 2], [3, 5], {"one more begin token and one more end token"}),
        ([9, 4], [3, 5, 2], {"other tokens", "one more end token"}),
    ],
)
def test_how_cpo_trainers_tokens_differ(chosen, rejected, said):
    def row(**sides: list[int]) -> dict[str, np.ndarray]:
        ids = {f"{side}_input_ids": np.array(values) for side, values in sides.items()}
        return ids | {f"{side}_labels": np.array([-100, *values[1:]]) for side, values in sides.items()}

    ours = row(chosen=[3, 4], rejected=[3, 5])
    assert _differences(ours, row(chosen=chosen, rejected=rejected)) == said
    moved = {**ours, "rejected_labels": np.array([-100, -100])}
    assert _differences(ours, moved) == {"the completion begins at another token"}


def test_a_stream_is_not_read_ahead():
    """As a set of this process is."""
    look_at_first_rows(SimpleNamespace(dataset=data(OK).to_iterable_dataset()), byte_tokenizer())
    with pytest.raises(TypeError, match="not iterable"):
        look_at_first_rows(SimpleNamespace(dataset=data(OK), reader=SimpleNamespace(split="dev")), byte_tokenizer())


if __name__ == "__main__":
    MESSAGES.write_text("\n\n".join("\n".join([name, *said_by(case)]) for name, case in CASES.items()) + "\n")
