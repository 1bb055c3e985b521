"""Every bad data set gets the right result, or an error that names what is wrong, where, and what to do."""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import load, preference_rows, quiet, trainer_of
from datasets import Dataset, DatasetDict, IterableDataset, Value
from said import word_for_word  # noqa: F401 - its messages are held against said/
from test_schemas import bot, user
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from trl_margins.cli import main
from trl_margins.cli.mixture import mixture_splits
from trl_margins.data.loading import load_splits, pick_split
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

GAPS = (4.0, 2.0, 1.0, 0.5)  # mean 1.875
ROOM = 128  # tokens a row, by `quiet`
NAN, INF = float("nan"), float("inf")


# Four good pairs, in three forms, to spoil


def texts(n: int = 4) -> list[dict[str, Any]]:
    return preference_rows(n, scores=lambda i: (2.0 + GAPS[i], 2.0)).to_list()


def chats(n: int = 4) -> list[dict[str, Any]]:
    return preference_rows(n, "conversational", scores=lambda i: (2.0 + GAPS[i], 2.0)).to_list()


def transcripts(n: int = 4) -> list[dict[str, Any]]:
    return preference_rows(n, "implicit", scores=lambda i: (2.0 + GAPS[i], 2.0)).to_list()


def one(rows: list[dict[str, Any]], number: int = 1, **values: Any) -> list[dict[str, Any]]:
    """The rows with other values in one of them."""
    return [{**row, **values} if i == number else row for i, row in enumerate(rows)]


def each(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows with other values in all of them; a function makes a value from the row."""
    return [{**row, **{k: v(row) if callable(v) else v for k, v in values.items()}} for row in rows]


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """Without length, and without types: any row may be anything."""
    return IterableDataset.from_generator(lambda: iter(rows))


def mixed(rows: list[dict[str, Any]]) -> Dataset:
    """A column may have values of several types, as `datasets` reads them from JSON."""
    return Dataset.from_list(rows, on_mixed_types="use_json")


def says(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@dataclass(frozen=True)
class Case:
    """One row of the table. `rows` gives a data set, or a list that becomes one. Either `error`, or `right`: numbers
    of the last step's log, of an evaluation, and `pairs` and `tokens` of the prepared set; `log`: words of the log."""

    id: str
    rows: Callable[[], Any]
    error: str | None = None
    right: Mapping[str, Any] = field(default_factory=dict)
    log: str | None = None
    method: str | None = "gappo"
    base: str = "cpo"
    evaluated: Callable[[], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


ADD = {"name": "add", "parameters": {}}
USUAL = {"pairs": 4, "weights/mean": 1.875}
DROP = "drop the row"
DPO = {"base": "dpo"}
FACTOR = "evaluation_factor"

COLUMNS = [
    Case("no prompt, and answers that begin differently", lambda: without(texts(), "prompt"),
         r"'chosen' and 'rejected', row 0 of the train.*no prompt.*'dog the a round' and .*Add a prompt column"),
    Case("no prompt, and answers that begin with it", transcripts, right=USUAL),
    Case("no chosen", lambda: without(texts(), "chosen"), r"train data set has no column 'chosen', only \['prompt'"),
    Case("no rejected", lambda: without(texts(), "rejected"), "no column 'rejected'.*rename_column"),
    Case("no rejected, dpo", lambda: without(texts(), "rejected"), "no column 'rejected'.*rename_column", **DPO),
    Case("only messages", lambda: [{"messages": row["prompt"] + row["chosen"]} for row in chats()],
         r"no column 'chosen' and no column 'rejected', only \['messages'\]"),
    Case("messages beside text", lambda: each(texts(), messages=lambda r: says("user", r["prompt"])), right=USUAL),
    Case("a label beside chats", lambda: each(chats(), label=True), right=USUAL),
    Case("a completion beside chats, dpo", lambda: each(chats(), completion=None), right=USUAL, **DPO),
    Case("a mark in a name", lambda: [{"\u200bprompt": "a", "chosen": "b", "rejected": "c"}] * 4,
         r"the train data set: the column '\\u200bprompt' looks like 'prompt', and is not, since .* is ZERO WIDTH"),
    Case("a blank in a name", lambda: [{"prompt ": "a", "chosen": "b", "rejected": "c"}] * 4,
         r"the column 'prompt ' looks like 'prompt', and is not, since it has a blank or a control"),
    Case("a letter of another alphabet", lambda: [{"pr\u03bfmpt": "a", "chosen": "b", "rejected": "c"}] * 4,
         r"the column 'pr\\u03bfmpt' looks like 'prompt', and is not, since '\u03bf' is GREEK SMALL LETTER OMICRON"),
    Case("a score in letters of another alphabet", lambda: [{**r, "score_\u0441hosen": 1.0} for r in without(
         texts(), "score_chosen")], r"column 'score_\\u0441hosen' looks like 'score_chosen', and is not"),
    *(Case(f"a name like {name}", lambda name=name: each(texts(), **{f"{name}\xa0": 1}), right=USUAL,
           log=rf"column '{name}\\xa0', which 4 of 4 rows have, is not read as '{name}', since .* is NO-BREAK SPACE")
      for name in ("tools", "chat_template_kwargs", "system", "is_flipped", "evaluation_factor")),
    Case("tools in capitals", lambda: each(texts(), Tools=["x"]), right=USUAL,
         log="column 'Tools', which 4 of 4 rows have, is not read as 'tools', since its name is written otherwise"),
    *(Case(f"tools as {name}", lambda name=name: each(texts(), **{name: [ADD]}), right=USUAL,
           log=f"column '{name}', which 4 of 4 rows have, is not read as 'tools', since its name is written otherwise")
      for name in ("tool", "Functions", "available_tools")),
    Case("what is not tools", lambda: each(texts(), tool="hammer", n_tools="[]", tool_used={"name": "search"}),
         right=USUAL, log="(?s)^(?!.*is not read as)"),
    Case("an empty column of a name like another", lambda: each(texts(), **{"system ": ""}), right=USUAL),
    Case("a name like that of scores, which nothing reads", lambda: each(texts(), **{"margin ": 5.0}), right=USUAL),
    Case("a capital", lambda: [{"Prompt": "a", "chosen": "b", "rejected": "c"}] * 4,
         r"Add a prompt column.*there are the columns \['Prompt'\]: name the prompt with prompt_column='Prompt'"),
    Case("a letter that looks like another", lambda: [{"prompt": "a", "\u0441hosen": "b", "rejected": "c"}] * 4,
         r"column '\\u0441hosen' looks like 'chosen', and is not, since '\u0441' is CYRILLIC SMALL LETTER ES"),
    Case("tokens alone", lambda: [{"chosen_input_ids": [1], "rejected_input_ids": [2]}] * 4,
         "the train data set is tokenized already .chosen_input_ids, rejected_input_ids."),
    Case("columns by the names of tokens", lambda: each(texts(), chosen_input_ids="x", topic_labels=None, labels="y"),
         right=USUAL, log="leaving out chosen_input_ids and topic_labels and labels"),
    Case("columns by the names of log-probabilities",
         lambda: each(texts(), chosen_logps=-1.0, x_logps="x", ref_logps=-1.0),
         right=USUAL, log="leaving out chosen_logps and x_logps and ref_logps, which TRL would misread"),
    Case("columns of odd types", lambda: each(texts(), raw=b"\xff", deep=[[1], []], nothing=None, when={"x": None}),
         right=USUAL),
    Case("columns of odd types, dpo", lambda: each(texts(), prompt_ids="x", raw=b"\xff", nothing=None), right=USUAL,
         **DPO),
    Case("no scores", lambda: without(texts(), "score_chosen", "score_rejected"),
         r"'score-gap' needs annotation scores, and the train data set has none: .*name yours with score_columns"),
    Case("no scores where none are needed", lambda: without(texts(), "score_chosen", "score_rejected"),
         method="gamma-po", right={"pairs": 4, "target_margins/mean": 4.0}),
    Case("one score", lambda: without(texts(), "score_rejected"),
         "score_chosen and score_rejected would be scores, but only one of them is there"),
    Case("two pairs of scores", lambda: each(texts(), chosen_rating=9.0, rejected_rating=None), right=USUAL,
         log="score_chosen/score_rejected, chosen_rating/rejected_rating.*: score_chosen/score_rejected are used"),
    Case("two pairs of scores, one named", lambda: each(texts(), chosen_rating=9.0, rejected_rating=6.0),
         right={"weights/mean": 3.0}, options={"score_columns": ["chosen_rating", "rejected_rating"]}),
    Case("named scores that are not there", texts, r"score_columns names \['quality'\].*only the columns",
         options={"score_columns": ["quality"]}),
    Case("a mark of flipped labels without a value", lambda: one(each(texts(), is_flipped=True), is_flipped=None),
         "column 'is_flipped', row 1 of the train data set: the value None is None: fill it with 0, or remove the"),
]  # fmt: skip

SCORES = [
    Case("None", lambda: one(texts(), 2, score_rejected=None),
         f"column 'score_rejected', row 2 of the train data set: the score None is None: {DROP}"),
    Case("None, dpo", lambda: one(texts(), 2, score_rejected=None), "'score_rejected', row 2.* is None", **DPO),
    Case("all None", lambda: each(texts(), score_chosen=None), r"'score_chosen', row 0.* is None.*\(4 such rows"),
    Case("NaN", lambda: one(texts(), 3, score_chosen=NAN), f"'score_chosen', row 3.*the score nan is NaN: {DROP}"),
    Case("NaN that no term reads", lambda: one(texts(), 3, score_chosen=NAN), method="gamma-po",
         right={"target_margins/mean": 4.0}, log="row 3.*is NaN.*count in pwa_all alone"),
    Case("+inf", lambda: one(texts(), score_chosen=INF), "row 1.*the score inf is infinite: clip it or drop the row"),
    Case("-inf", lambda: one(texts(), score_rejected=-INF), "'score_rejected', row 1.*the score -inf is infinite"),
    Case("1e30", lambda: one(texts(), score_chosen=1e30),
         r"'score_chosen', row 1.*score 1e\+30 is too large to train with \(more than 1e\+06\): divide the column"),
    Case("1e308 and -1e308", lambda: one(texts(), score_chosen=1e308, score_rejected=-1e308), "row 1.*too large"),
    Case("1e308 that no term reads", lambda: one(texts(), score_chosen=1e308), method="gamma-po",
         right={"target_margins/mean": 4.0, "eval_n_pairs": 4, "eval_n_pairs_gap": 3},
         options={"eval_min_score_gap": 0.0}, evaluated=lambda: one(texts(), score_chosen=1e308)),
    Case("an integer that no float holds", lambda: stream(one(texts(), 0, score_chosen=10**400)),
         "column 'score_chosen', row 0 of the train.*too large", **DPO),
    Case("as large as scores may be", lambda: each(texts(), score_chosen=1e6, score_rejected=-1e6),
         right={"weights/mean": 4e12}, options={"score_gap_transform": "quadratic"}),
    Case("words", lambda: each(texts(), score_chosen="high"),
         "'score_chosen', row 0.*the score 'high' is not a number: replace such words by numbers with dataset.map"),
    Case("another minus", lambda: each(texts(), score_chosen="\u22121"),
         "column 'score_chosen'.*the score '\u22121' is not a number, for its minus is no hyphen"),
    Case("a word among numbers", lambda: mixed(one(texts(), 2, score_chosen="high")),
         "'score_chosen', row 2.*the score 'high' is not a number"),
    Case("numbers that were text once", lambda: mixed(one(texts(), 3, score_chosen="x")).select(range(3)),
         right={"pairs": 3, "weights/mean": 7 / 3}),
    Case("numbers as text", lambda: each(texts(), score_chosen="4.5"),
         right={"weights/mean": 2.5}),
    Case("numbers as text, cast", lambda: Dataset.from_list(each(texts(), score_chosen="4.5")).cast_column(
         "score_chosen", Value("float64")), right={"weights/mean": 2.5}),
    Case("truth values", lambda: each(texts(), score_chosen=True), "the score True is not a number: give each row"),
    Case("integers", lambda: each(texts(), score_chosen=5, score_rejected=2), right={"weights/mean": 3.0}),
    Case("lists", lambda: each(texts(), score_chosen=lambda r: [1.0, 2.0]), r"the score \[1.0, 2.0\] is not a number"),
    Case("reversed", lambda: one(texts(), 0, score_chosen=2.0, score_rejected=6.0), right=USUAL,
         log=r"4 pairs \(0 ties, 1 reversed\)"),
    Case("ties", lambda: one(one(texts(), 1, score_chosen=2.0), 2, score_chosen=2.0),
         right={"weights/mean": 1.125, "weights/zero": 0.5}, log=r"4 pairs \(2 ties, 0 reversed\)"),
    Case("ties only", lambda: each(texts(), score_chosen=2.0),
         r"all 4 train pairs would have weight 0: .* gap other than 0; score_chosen − score_rejected is from 0 to 0"),
    Case("ties only, where nothing is weighed", lambda: each(texts(), score_chosen=2.0), method="gamma-po",
         right={"target_margins/mean": 4.0}),
    Case("no gap that reaches the threshold", texts,
         r"all 4 train pairs would have weight 0: .* of at least 5 \(score_gap_threshold\); .* is from .* to 4\.",
         options={"score_gap_threshold": 5.0}),
    Case("no gap that the hard filter keeps", texts, "leaves out all 4 train pairs: the largest score gap is 4, and",
         options={"score_gap_transform": "hard", "score_gap_threshold": 5.0}),
]  # fmt: skip

ANSWERS = [
    Case("None prompt", lambda: one(texts(), prompt=None), f"column 'prompt', row 1.*the value is None: {DROP}"),
    Case("None chosen", lambda: one(texts(), chosen=None), f"column 'chosen', row 1.*the value is None: {DROP}"),
    Case("None rejected", lambda: one(texts(), 3, rejected=None), "column 'rejected', row 3.*the value is None"),
    Case("None chosen, dpo", lambda: one(texts(), chosen=None), "column 'chosen', row 1.*the value is None", **DPO),
    Case("None chosen, gap-aware", lambda: one(texts(), chosen=None), "column 'chosen', row 1", method="gap-aware"),
    Case("None in the evaluation set", texts, "column 'rejected', row 0 of the eval data set: the value is None",
         evaluated=lambda: one(texts(), 0, rejected=None)),
    Case("empty prompt", lambda: one(texts(), prompt=""), right=USUAL),
    Case("empty prompts", lambda: each(texts(), prompt=""), right=USUAL),
    Case("empty chosen", lambda: one(texts(), chosen="", rejected="ab"), right={"tokens": (1, 3), **USUAL}),
    Case("empty rejected, dpo", lambda: one(texts(), chosen="ab", rejected=""), right={"tokens": (3, 1), **USUAL},
         **DPO),
    Case("all answers empty", lambda: each(texts(), chosen="", rejected=""), right={"rewards/margins": 0.0},
         log="train: 4 of 4 pairs have the same completion twice"),
    Case("the same answer twice", lambda: one(texts(), chosen="ab", rejected="ab"), right={"tokens": (3, 3), **USUAL},
         log="train: 1 of 4 pairs have the same completion twice"),
    Case("the same answer always, gap-aware", lambda: each(texts(), chosen="ab", rejected="ab"), method="gap-aware",
         right={"target_margins/mean": 3.0, "rewards/margins": 0.0}),
    Case("the same transcript twice", lambda: each(transcripts(), rejected=lambda r: r["chosen"]),
         right={"tokens": (2, 2), "rewards/margins": 0.0}),
    Case("empty transcripts", lambda: each(transcripts(), chosen="", rejected=""), "row 0.*both begin with.*are none"),
    Case("a transcript that begins otherwise", lambda: one(transcripts(), 2, chosen="Hm "),
         "row 2.*characters that both begin with.*are none: 'Hm ' and 'Q: .*with '' where there is no prompt"),
    Case("emoji", lambda: one(texts(), chosen="👩‍👩‍👧🙂", rejected="🙂"), right={"tokens": (23, 5), **USUAL}),
    Case("right to left", lambda: one(texts(), chosen="שלום", rejected="مرحبا"), right={"tokens": (9, 11), **USUAL}),
    Case("combining marks", lambda: one(texts(), chosen="e\u0301\u0301", rejected="\u0301"),
         right={"tokens": (6, 3), **USUAL}),
    Case("NUL, U+2028, U+FFFF", lambda: one(texts(), chosen="a\0b", rejected="\u2028\uffff"),
         right={"tokens": (4, 7), **USUAL}),
    Case("Unicode, gap-aware", lambda: each(texts(), chosen="שלום 🙂", rejected="مرحبا"), method="gap-aware",
         right={"target_margins/mean": 3.0, "target_margins/std": 0.0}),
    Case("half of a surrogate pair", lambda: stream(one(texts(), 1, chosen="ab\ud83d")),
         r"'chosen', row 1.*character 2 of 'ab\\ud83d' is half of a surrogate pair.*errors='replace'", **DPO),
    Case("a very long answer", lambda: one(texts(), prompt="ab", chosen="word " * 30_000, rejected="x"),
         right={"tokens": (ROOM - 2, 2), **USUAL}),
    Case("a prompt longer than max_length", lambda: one(texts(), prompt="word " * 60),
         right={"pairs": 3, "weights/mean": 5.5 / 3}, log="1 of 4 train pairs were dropped"),
    Case("a prompt longer than max_length, dpo", lambda: one(texts(), prompt="word " * 60),
         right={"pairs": 3, "weights/mean": 5.5 / 3}, log="1 of 4 train pairs were dropped", **DPO),
    Case("prompts longer than max_length", lambda: each(texts(), prompt="word " * 60),
         "a completion empty in every one of the 4 train pairs.*max_length=128: raise max_length"),
    Case("prompts longer than max_length, dpo", lambda: each(texts(), prompt="word " * 60),
         "a completion empty in every one of the 4 train pairs.*max_length=128: raise max_length", **DPO),
    Case("long prompts in the evaluation set", texts, "every one of the 4 eval pairs.*raise max_length",
         evaluated=lambda: each(texts(), prompt="word " * 60)),
    Case("numbers for text", lambda: each(texts(), chosen=3), "'chosen', row 0.*should be an str.* of type int: 3"),
    Case("a list of texts", lambda: each(texts(), chosen=lambda r: ["a"]), "row 0.*message 0 is 'a': a message is a"),
    Case("bytes", lambda: each(texts(), prompt=b"ab"), "'prompt', row 0.*should be an str.* of type bytes: b'ab'"),
]  # fmt: skip

CHATS = [
    Case("chats", chats, right=USUAL),
    Case("no messages in prompt", lambda: one(chats(), prompt=[]), f"'prompt', row 1.*an empty list of mess.*{DROP}"),
    Case("no messages in chosen", lambda: one(chats(), chosen=[]), "'chosen', row 1.*an empty list of messages"),
    Case("no messages in chosen, dpo", lambda: one(chats(), chosen=[]), "'chosen', row 1.*an empty list", **DPO),
    Case("None for messages", lambda: one(chats(), 2, rejected=None), "'rejected', row 2.*the value is None"),
    Case("content None", lambda: one(chats(), chosen=says("assistant", None)),
         "'chosen', row 1.*message 0 has no content, only {'role': 'assistant'}: add them"),
    Case("empty content", lambda: one(chats(), chosen=says("assistant", "")), right={"tokens": (1, None), **USUAL}),
    Case("role None", lambda: one(chats(), rejected=says(None, "x")), "'rejected', row 1.*message 0 has no role"),
    Case("no role", lambda: each(chats(), chosen=lambda r: [{"content": "x"}]), "'chosen', row 0.*has no role, only"),
    Case("another project's keys", lambda: each(chats(), chosen=lambda r: [{"from": "gpt", "value": "x"}]),
         right=USUAL),
    Case("a role that nobody knows", lambda: each(chats(), chosen=lambda r: [{"from": "bee", "value": "x"}]),
         "'chosen', row 0.*message 0 is from 'bee'; known: human, gpt, chatgpt"),
    Case("content in OpenAI's parts", lambda: each(chats(), chosen=lambda r: [{"role": "assistant", "content":
         [{"type": "output_text", "text": r["chosen"][0]["content"]}]}]), right=USUAL),
    Case("content that is a list of texts", lambda: each(chats(), chosen=[{"role": "assistant", "content": ["yes"]}]),
         "'chosen', row 0.*has the content part 'yes': a part that is text is {'type': 'text'"),
    Case("content that is a number", lambda: each(chats(), chosen=lambda r: says("assistant", 3)),
         "'chosen', row 0.*message 0 is {.*content is text or a list of parts"),
    Case("a list in the list", lambda: each(chats(), chosen=lambda r: [r["chosen"]]),
         r"'chosen', row 0.*message 0 is \[{.*in one list, not nested"),
    Case("a dict for the list", lambda: each(chats(), rejected=lambda r: r["rejected"][0]),
         right=USUAL),
    Case("an answer that ends with the user",
         lambda: one(chats(), chosen=says("assistant", "x") + says("user", "why?")),
         "'chosen', row 1.*last message, 'why[?]', is of the role 'user'.*remove what follows it"),
    Case("an answer that ends with the user, dpo", lambda: one(chats(), rejected=says("user", "why?")),
         "'rejected', row 1.*is of the role 'user'", **DPO),
    Case("a prompt that ends with the assistant",
         lambda: one(chats(), prompt=says("user", "a") + says("assistant", "b")), right=USUAL),
    Case("text prompts, chats that begin with them", lambda: each(chats(), prompt="hi", chosen=lambda r: r["prompt"] +
         r["chosen"], rejected=lambda r: r["prompt"] + r["rejected"]), right=USUAL,
         log="in 4 of 4 rows the text in column 'prompt' is not what the conversations .* begin with"),
    Case("text prompts, chats that do not", lambda: each(chats(), prompt="hi"), right=USUAL),
    Case("empty text prompts, chats that do not", lambda: each(chats(), prompt=""),
         "row 0.*have no turn in common before their last, and column 'prompt' has no messages to put before them"),
    Case("chat prompts, text answers", lambda: each(chats(), chosen="yes", rejected="no"), right=USUAL),
    Case("chosen as chat, rejected as text", lambda: each(chats(), rejected="no"),
         "column 'rejected', row 0.*'no' is text, but chosen is a list of messages"),
    Case("text in some rows, chats in others", lambda: mixed(one(texts(), 3, chosen=says("assistant", "x"))),
         "column 'rejected', row 3.*is text, but chosen is a list of messages"),
    Case("chats that begin with no prompt", lambda: without(chats(), "prompt"), "row 0.*messages that both begin"),
    Case("a chat without its answer", lambda: each(without(chats(), "prompt"), rejected=says("user", "why?"),
         chosen=lambda r: says("user", "why?") + r["chosen"]),
         "column 'rejected', row 0.*all its messages, 1, are what the other .* begins with.*add the assistant's"),
    Case("a chat with fewer turns", lambda: without(each(chats(), chosen=lambda r: r["prompt"] + r["chosen"] +
         says("user", "and?") + says("assistant", "so"), rejected=lambda r: r["prompt"] + r["rejected"]), "prompt"),
         right=USUAL),
    Case("chats that are all prompt", lambda: each(without(chats(), "prompt"), chosen=lambda r: says("assistant", "x"),
         rejected=lambda r: says("assistant", "x")), "row 0.*messages that both begin with.*are none"),
]  # fmt: skip

SETS = [
    Case("no rows", lambda: Dataset.from_list(texts()).select([]), "the train data set has no rows"),
    Case("no rows, dpo", lambda: Dataset.from_list(texts()).select([]), "the train data set has no rows", **DPO),
    Case("no columns", lambda: Dataset.from_dict({}), "the train data set has no rows"),
    Case("no rows to evaluate", texts, "the eval data set has no rows",
         evaluated=lambda: Dataset.from_list(texts()).select([])),
    Case("no rows in one of the evaluation sets", texts, "the hard data set has no rows",
         evaluated=lambda: {"easy": texts(), "hard": Dataset.from_list(texts()).select([])}),
    Case("evaluation set without scores", texts, right={"eval_n_pairs": 4, "weights/mean": 1.875},
         log="the eval data set has no scores, which 'score-gap' needs: its loss is that without 'score-gap'",
         evaluated=lambda: without(texts(), "score_chosen", "score_rejected")),
    Case("evaluation set without scores where none are needed", texts, method="gamma-po",
         right={"target_margins/mean": 4.0, "eval_n_pairs": 4},
         evaluated=lambda: without(texts(), "score_chosen", "score_rejected")),
    Case("one pair", lambda: texts(1), right={"pairs": 1, "weights/mean": 4.0, "weights/std": 0.0}),
    Case("one pair, gamma-po", lambda: texts(1), method="gamma-po",
         right={"target_margins/mean": 4.0, "target_margins/std": 0.0}),
    Case("one pair, amapo", lambda: texts(1), method="amapo", right={"target_margins/mean": 0.0},
         options={"max_steps": 1}),
    Case("one pair, gap-aware", lambda: texts(1), method="gap-aware", right={"target_margins/mean": 3.0}),
    Case("one pair, geometric-anchor", lambda: texts(1), method="geometric-anchor", right={"pairs": 1}),
    Case("one pair, normalized", lambda: texts(1), right={"weights/mean": 1.0}, options={"score_gap_normalize": True}),
    Case("one pair a batch, amapo", texts, method="amapo", right={"target_margins/mean": 0.0},
         options={"max_steps": 1, "per_device_train_batch_size": 1}),
    Case("one pair a batch, dpo", texts, right={"weights/std": 0.0},
         options={"per_device_train_batch_size": 1}, **DPO),
    Case("a selection", lambda: Dataset.from_list(texts()).select([3, 0]), right={"pairs": 2, "weights/mean": 2.25}),
    Case("a bad row of a selection", lambda: Dataset.from_list(one(texts(), 0, chosen=None)).select([3, 1, 0]),
         "column 'chosen', row 2 of the train data set"),
    Case("shuffled", lambda: Dataset.from_list(texts()).shuffle(seed=1), right=USUAL),
    Case("a torch format", lambda: Dataset.from_list(texts()).with_format("torch"), right=USUAL),
    Case("a format that hides columns, dpo", lambda: Dataset.from_list(texts()).with_format("np", ["score_chosen"]),
         right=USUAL, **DPO),
    Case("all splits", lambda: DatasetDict({"train_prefs": Dataset.from_list(texts())}),
         r"is a DatasetDict, with the keys \['train_prefs'\]: give one .* dataset\['train_prefs'\]"),
    Case("a tuple of rows", lambda: tuple(texts()), "is a tuple, not a datasets.Dataset: Dataset.from_list makes one"),
    Case("a path", lambda: "pairs.jsonl", "the train data set is a str, 'pairs.jsonl': load it first, with"),
    Case("a path to evaluate on", texts, "the eval data set is a str, 'pairs.jsonl'", evaluated=lambda: "pairs.jsonl"),
    Case("nothing", lambda: None, "train_dataset` is required"),
]  # fmt: skip

STREAMS = [
    Case("a stream", lambda: stream(texts()), right={"weights/mean": 1.875}, **DPO),
    Case("shorter than max_steps", lambda: stream(texts(2)), right={"weights/mean": 3.0}, options={"max_steps": 5},
         **DPO),
    Case("without max_steps", lambda: stream(texts()), "does not implement __len__.*max_steps has to be specified",
         options={"max_steps": -1}, **DPO),
    Case("on the CPO base", lambda: stream(texts()), right={"weights/mean": 1.875}),
    Case("gap-aware", lambda: stream(texts()), "load the data set instead of streaming it", method="gap-aware", **DPO),
    Case("no rows", lambda: stream([]), "the train data set has no rows", **DPO),
    Case("no chosen", lambda: stream(without(texts(), "chosen")), "no column 'chosen'", **DPO),
    Case("no chosen in a later row", lambda: stream(texts(2) + without(texts(), "chosen")[2:]),
         "column 'chosen', row 2 of the train data set: the value is None", **DPO),
    Case("a chat in a later row", lambda: stream(texts(2) + chats()[2:]),
         right={"weights/mean": 1.875}, log="2 rows are text .the first is row 0. and 2 are messages", **DPO),
    Case("a word for a score", lambda: stream(one(texts(), 2, score_chosen="high")),
         "column 'score_chosen', row 2 of the train data set: the score 'high' is not a number", **DPO),
    Case("no score in a later row", lambda: stream(texts(2) + without(texts(), "score_chosen")[2:]),
         "column 'score_chosen', row 2 of the train data set: the score None is None", **DPO),
]  # fmt: skip

FACTORS = [
    Case("a column", lambda: [{**row, FACTOR: 0.5 if i < 2 else 0.25} for i, row in enumerate(texts())],
         right={"target_margins/min": 2.0, "target_margins/mean": 3.0, "target_margins/max": 4.0}),
    Case("None", lambda: one(each(texts(), **{FACTOR: 0.5}), **{FACTOR: None}),
         f"column {FACTOR!r}, row 1 of the train data set: the evaluation factor None is None: {DROP}"),
    Case("NaN", lambda: one(each(texts(), **{FACTOR: 0.5}), **{FACTOR: NAN}), "row 1.*evaluation factor nan is NaN"),
    Case("above 1", lambda: one(each(texts(), **{FACTOR: 0.5}), 2, **{FACTOR: 50.0}),
         r"row 2.*the evaluation factor 50.0 is outside \[0, 1\]: divide percentages by 100"),
    Case("below 0", lambda: one(each(texts(), **{FACTOR: 0.5}), **{FACTOR: -0.1}), "row 1.*-0.1 is outside"),
    Case("text", lambda: each(texts(), **{FACTOR: "0.5"}), "row 0.*'0.5' is not a number: compute the column"),
    Case("0 in all", lambda: each(texts(), **{FACTOR: 0.0}),
         right={"target_margins/mean": 3.0, "target_margins/std": 0.0}, log="4 below the floor"),
    Case("bad in the evaluation set", lambda: each(texts(), **{FACTOR: 0.5}), "row 3 of the eval data set.*is None",
         evaluated=lambda: one(each(texts(), **{FACTOR: 0.5}), 3, **{FACTOR: None})),
]  # fmt: skip
FACTORS = [Case(**{**case.__dict__, "method": "gap-aware"}) for case in FACTORS]

TABLES = {
    "columns": COLUMNS,
    "scores": SCORES,
    "answers": ANSWERS,
    "chats": CHATS,
    "sets": SETS,
    "streams": STREAMS,
    "factors": FACTORS,
}
TABLE = [pytest.param(case, id=f"{name}: {case.id}") for name, cases in TABLES.items() for case in cases]


def as_dataset(given: Any) -> Any:
    if isinstance(given, dict) and not isinstance(given, DatasetDict):
        return {name: as_dataset(part) for name, part in given.items()}
    return Dataset.from_list(given) if isinstance(given, list) else given


def tokens_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Answer tokens of a prepared row, chosen and rejected; the last is the end of text."""
    if "chosen_ids" in row:
        return len(row["chosen_ids"]), len(row["rejected_ids"])
    return tuple(sum(label != -100 for label in row[f"{side}_labels"]) for side in ("chosen", "rejected"))


def trained(case: Case, folder: str, tokenizer: Any, out: Any) -> Any:
    rows, evaluated = as_dataset(case.rows()), case.evaluated and as_dataset(case.evaluated())
    settings = {"max_steps": 2, "learning_rate": 1e-4, **case.options}
    trainer = trainer_class(case.method, case.base)(
        load(folder),
        args=config_class(case.method, case.base)(**quiet(output_dir=str(out), **settings)),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def rounding(name):
    """What float32 makes of a logged number that is 0: a difference of two rewards of 10 · 6 nats, each with an error
    of some last digits (4e-6); in a standard deviation, which is that of a mean square and a squared mean, the root of
    the error of 4² (2e-6).
    """
    return {"rewards/margins": 1e-4, "weights/std": 5e-3, "target_margins/std": 5e-3}.get(name, 1e-6)


@pytest.mark.parametrize("case", TABLE)
def test_a_data_set(case, tiny_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trl_margins"):
        if case.error is not None:
            with pytest.raises((ValueError, TypeError)) as caught:
                trained(case, tiny_model, tokenizer, tmp_path)
            assert re.search(case.error, str(caught.value)), str(caught.value)
            return
        trainer = trained(case, tiny_model, tokenizer, tmp_path)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == trainer.args.max_steps
    for entry in steps:
        assert all(math.isfinite(value) for value in entry.values()), entry
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    found = dict(steps[-1])
    if hasattr(trainer.train_dataset, "__len__"):
        found["pairs"] = len(trainer.train_dataset)
    if case.evaluated is not None:
        found |= trainer.evaluate()
    wanted = dict(case.right)
    if "tokens" in wanted:
        counts = tokens_of(trainer.train_dataset[1])
        assert all(b in (a, None) for a, b in zip(counts, wanted.pop("tokens"), strict=True)), counts
    assert case.right
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=rounding(name)), name
    if case.log is not None:
        assert re.search(case.log, caplog.text), caplog.text


@pytest.mark.parametrize("dispatch", [None, True])
def test_an_evaluation_stream_beside_a_data_set(dispatch, tiny_model, tokenizer, tmp_path, caplog):
    """accelerate would cut the tensors of its batches, and with them the rows in which two answers share a prompt."""
    options = {"accelerator_config": {"dispatch_batches": dispatch}}
    losses = [
        trained(
            Case("", texts, evaluated=evaluated, options=options, **DPO), tiny_model, tokenizer, tmp_path
        ).evaluate()["eval_loss"]
        for evaluated in (texts, lambda: stream(texts()))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert ("dispatch_batches=True is not used" in caplog.text) == bool(dispatch)


def test_the_table_is_long_enough():
    assert len({param.id for param in TABLE}) == len(TABLE) >= 40


# Files

ROW = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0}
LINE = json.dumps(ROW) + "\n"
HEAD = "prompt,chosen,rejected\n"

FILES = [
    ("broken.jsonl", LINE * 5 + '{"prompt": "a", "chosen": \n' + LINE, r"broken.jsonl, line 6: not JSON .*'{.prompt"),
    ("first.jsonl", "hello\n" + LINE, "first.jsonl, line 1: not JSON .*: 'hello'"),
    ("code.jsonl", LINE.replace("2.0", "02") + "\n", "code.jsonl, line 1: not JSON .*'{.prompt"),
    ("cut.jsonl", (LINE * 3)[:-30], "cut.jsonl, line 3: not JSON"),
    ("list.jsonl", LINE + "[1, 2]\n", "list.jsonl, line 2: not an object with a value for each column"),
    ("twice.jsonl", LINE * 2 + '{"prompt": "a", "prompt": "b"}\n', "twice.jsonl, line 3: the key 'prompt' more than"),
    ("inner.jsonl", LINE + LINE.replace('"a"', '[{"role": "a", "role": "c"}]'), "line 2: the key 'role' more than"),
    ("list.json", json.dumps([ROW])[:-2] + ', "tools": [{"a": {"b": 1, "b": 2}}]}]', "line 1: the key 'b' more than"),
    ("rows.json", json.dumps([["a", "b", 1]]), "rows.json: row 0 is a list, and a row is an object with a value"),
    ("large.jsonl", LINE * 2 + LINE.replace("1.0", "1e400"), "large.jsonl, line 3: the number 1e400 is too large"),
    ("mixed.json", json.dumps([ROW, "a"]), "mixed.json: row 1 is a str, and a row is an object with a value"),
    ("marks.csv", "\ufeff\ufeff" + HEAD + "a,b,c\n", "marks.csv begins with a byte-order mark twice"),
    ("half.jsonl", LINE + LINE.replace('"b"', r'"\ud800"'), "half.jsonl, line 2: half of a surrogate pair"),
    ("wide.jsonl", (LINE * 2).encode("utf-16"), "wide.jsonl is written in UTF-16 or UTF-32: write it in UTF-8"),
    ("object.json", json.dumps([ROW, ROW])[:-5], "object.json, line 1, character 18[0-9]: not JSON"),
    ("lines.json", LINE + "{\n", "lines.json, line 2: not JSON"),
    ("tab.json", LINE.replace('"b"', '["b\t", "c"]'), "tab.json, line 1, character [0-9]+: not JSON .Invalid control"),
    ("infinite.json", LINE.replace("2.0", "1e999"), "infinite.json: the number 1e999 is too large"),
    ("comma.json", LINE.replace("}", ",}"), "comma.json, line 1, character [0-9]+: not JSON"),
    ("zero.ndjson", LINE.replace("2.0", "02"), "zero.ndjson, line 1, character [0-9]+: not JSON"),
    ("point.json", json.dumps(ROW, indent=1).replace("2.0", "2."), "point.json, line 5, character [0-9]+: not JSON"),
    ("digits.json", f'[{LINE.strip()[:-1]}, "n": {"9" * 5000}}}]', "digits.json: an integer of thousands"),
    ("none.json", "[]", "none.json has no rows"),
    ("empty.jsonl", "", "empty.jsonl is empty"),
    ("blank.jsonl", "\n\n", "blank.jsonl has no rows"),
    ("empty.csv", "", "empty.csv is empty"),
    ("head.csv", HEAD, "head.csv has no rows"),
    ("twice.csv", "prompt,chosen,chosen\na,b,c\n", "twice.csv: its header has the column 'chosen' more than once"),
    ("ragged.csv", HEAD + "a,b,c\na,b,c,d\n", "ragged.csv, line 3: 4 fields, but the header has 3"),
    ("blank.csv", HEAD + 'a, "b, c", d\n', "4 fields, .* 3 columns: remove the blanks between ',' and a double quote"),
    ("quote.csv", HEAD + 'a,"b,c\n', "quote.csv, in the row after line 1: unexpected end of data"),
    ("notes.txt", LINE, r"notes.txt: a data file is one of .jsonl, .json, .csv, .parquet, .*, not '.txt'"),
    ("pairs", LINE, r"pairs: a data file is one of .jsonl.*, not ''"),
    ("bad.parquet", b"PAR1xxxx", "bad.parquet cannot be read: .*not a parquet file"),
    ("cut.jsonl.gz", gzip.compress((LINE * 4000).encode())[:-400], "cut.jsonl.gz, after line [0-9]+: .*to its end"),
    ("not.jsonl.gz", LINE, "not.jsonl.gz, after line 0: .*the file is damaged"),
    ("cut.csv.gz", gzip.compress((HEAD + "a,b,c\n" * 99).encode())[:-20], "cut.csv.gz, after line 0: .*to its end"),
    ("folder/train.jsonl", LINE + "{\n", "train.jsonl, line 2: not JSON"),
    ("folder/train.csv", "prompt,chosen,chosen\na,b,c\n", "train.csv: its header has the column 'chosen' more"),
]  # fmt: skip


def written(folder: Any, name: str, content: str | bytes) -> str:
    """What to load: the file, or the folder that it is in."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path.parent if "/" in name else path)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("name", "content", "error"), FILES, ids=[name for name, *_ in FILES])
def test_a_bad_file(name, content, error, tmp_path, fresh_cache):
    with pytest.raises(ValueError, match=error):
        load_splits(written(tmp_path, name, content))


_WITHOUT_ROWS = ("none.json", "blank.jsonl", "head.csv")


@pytest.mark.parametrize("name", [name for name, *_ in FILES])
def test_a_bad_file_is_no_stream(name, tmp_path, fresh_cache):
    """No form of it is read otherwise than as a whole."""
    content = next(content for each, content, _ in FILES if each == name)
    if name in _WITHOUT_ROWS:
        assert not list(load_splits(written(tmp_path, name, content), streaming=True)["train"])
        return
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        load_splits(written(tmp_path, name, content), streaming=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("half.json", json.dumps([ROW]).replace('"b"', r'"\ud83d x"')),
        ("again.json", json.dumps([ROW])[:-2] + ', "chosen": "c"}]'),
        ("large.jsonl", LINE.replace("1.0", "1e400")),
        ("large.json", json.dumps([ROW]).replace("1.0", "1e400")),
        ("dates.json", json.dumps([{**ROW, "prompt": "2024-01-01"}] * 2)),
        ("columns.json", json.dumps({name: [value] * 2 for name, value in ROW.items()})),
        ("inside.json", json.dumps({"data": [ROW, ROW]})),
    ],
)
def test_a_bad_file_is_no_part_of_a_mixture_of_streams(name, content, tmp_path, fresh_cache):
    part = DatasetConfig(written(tmp_path, name, content))
    with pytest.raises(ValueError, match=name):
        mixture_splits(DatasetMixtureConfig(datasets=[part], streaming=True))


@pytest.mark.parametrize(
    ("name", "content", "rows", "last"),
    [
        ("mark.jsonl", b"\xef\xbb\xbf" + (LINE * 2).encode(), 2, ROW),
        ("UPPER.JSONL", LINE, 1, ROW),
        ("gaps.jsonl", LINE + "\n\n" + LINE, 2, ROW),
        ("lines.jsonl", json.dumps(ROW, indent=1) + "\n" + json.dumps(ROW, indent=1), 2, ROW),
        ("separator.jsonl", LINE + LINE.replace('"b"', '"\u2028\\u0000"'), 2, {**ROW, "chosen": "\u2028\0"}),
        ("infinite.jsonl", LINE + LINE.replace("2.0", "Infinity"), 2, {**ROW, "score_chosen": INF}),
        ("whole.jsonl.gz", gzip.compress((LINE * 3).encode()), 3, ROW),
        ("array.json", json.dumps([ROW, ROW]), 2, ROW),
        ("quoted.csv", HEAD + 'a,"b, ""c""\nd",e\n', 1, {"prompt": "a", "chosen": 'b, "c"\nd', "rejected": "e"}),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 20 else "",
)
def test_a_file_that_only_looks_bad(name, content, rows, last, tmp_path, fresh_cache):
    path = written(tmp_path, name, content)
    loaded = load_splits(path)["train"]
    assert len(loaded) == rows
    assert loaded[rows - 1] == last
    assert [*load_splits(path, streaming=True)["train"]] == [*loaded]


_ODD_NUMBERS = [{**ROW, "n": math.nan, "score_chosen": INF}, {**ROW, "n": 0.5, "score_chosen": -INF}]


@pytest.mark.parametrize("beside", [{}, {"tools": [{"a": 1}]}, {"of several types": 1}], ids=["", "tools", "mixed"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_numbers_that_are_not_finite_are_read_as_they_are_written(suffix, beside, tmp_path, fresh_cache):
    """Where `datasets` has None: in a list of rows, and beside a column that it holds as JSON."""
    rows = [{**row, **beside} for row in _ODD_NUMBERS]
    if "of several types" in beside:
        rows[1]["of several types"] = "a"
    content = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    # which Arrow refuses
    content = content.replace("-Infinity", "-1e400") if suffix == ".json" else content
    path = written(tmp_path, f"odd{suffix}", content)
    assert repr(load_splits(path)["train"].to_list()) == repr(rows)
    if suffix == ".jsonl" and not beside:
        assert repr([*load_splits(path, streaming=True)["train"]]) == repr(rows)
        return
    with pytest.raises(
        ValueError, match=r"odd.json.*(row 0|line 1): column '\w+' has (nan|inf), where the stream has"
    ):
        load_splits(path, streaming=True)


def test_a_stream_of_lines_and_of_a_document(tmp_path, fresh_cache):
    """Whose words are no numbers, and whose lines are no rows."""
    rows = [{**ROW, "prompt": "Is NaN a number?", "tools": [{"a": 1}]}, {**ROW, "tools": [{"b": 1}]}]
    written(tmp_path, "all/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "all/test.json").write_text(json.dumps(rows, indent=1))
    loaded = load_splits(str(tmp_path / "all"), streaming=True)
    assert {split: [*rows] for split, rows in loaded.items()} == {"train": rows, "test": rows}


def test_nan_within_a_column_of_several_types_is_said(tmp_path, fresh_cache, caplog):
    rows = [{**ROW, "a": [1, math.nan]}, {**ROW, "a": "b"}]
    loaded = load_splits(written(tmp_path, "odd.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert loaded["train"]["a"][:] == [[1, None], "b"]
    assert "NaN in 1 rows of column 'a' becomes null: what has several types, or keys of its own" in caplog.text


def test_nan_beside_what_has_several_types_is_kept(tmp_path, fresh_cache, caplog):
    rows = [{**ROW, "meta": {"a": a, "b": b}} for a, b in ((1, math.nan), ("x", 0.5))]
    loaded = load_splits(written(tmp_path, "odd.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))["train"]
    assert [str(each["b"]) for each in loaded["meta"]] == ["nan", "0.5"]
    assert "NaN" not in caplog.text


def test_nothing_but_nan_beside_what_has_several_types(tmp_path, fresh_cache, caplog):
    """Which `datasets` takes for null."""
    rows = [{**ROW, "meta": {"a": a, "b": math.nan}} for a in (1, "x")]
    loaded = load_splits(written(tmp_path, "odd.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))["train"]
    assert loaded["meta"][:] == [{"a": 1, "b": None}, {"a": "x", "b": None}]
    assert "NaN in 2 rows of column 'meta' becomes null" in caplog.text


def test_nan_among_texts_is_no_word(tmp_path, fresh_cache, caplog):
    """As pandas' to_dict writes a text that is missing."""
    rows = [{**ROW, "chosen": math.nan}, ROW]
    loaded = load_splits(written(tmp_path, "odd.json", json.dumps(rows)))["train"]
    assert loaded["chosen"][:] == [None, "b"]
    assert "NaN in 1 rows of column 'chosen' becomes null" in caplog.text


def test_text_that_spells_no_number_is_text(tmp_path, fresh_cache):
    rows = [{**ROW, "prompt": "Is NaN 1e999, or Infinity?"}]
    path = written(tmp_path, "odd.json", json.dumps(rows))
    assert [*load_splits(path, streaming=True)["train"]] == load_splits(path)["train"].to_list() == rows


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set at .*missing.jsonl"):
        load_splits(str(tmp_path / "missing.jsonl"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} doesn't contain any data files"):
        load_splits(str(tmp_path))
    splits = DatasetDict({"train_prefs": Dataset.from_list(texts())})
    with pytest.raises(
        ValueError,
        match=r"'pairs' has the splits \['train_prefs'\], not 'train': name one of them with --dataset_split",
    ):
        pick_split(splits, "train", "pairs")


def test_a_saved_set_whose_file_is_damaged(tmp_path):
    Dataset.from_list(texts()).save_to_disk(tmp_path / "saved")
    (data,) = (tmp_path / "saved").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:2])
    with pytest.raises(ValueError, match="saved cannot be read: "):
        load_splits(str(tmp_path / "saved"))


def test_a_file_in_another_encoding_is_named_by_its_row(tiny_model, tokenizer, tmp_path, fresh_cache):
    """`datasets` reads it without a word, and stumbles over the row."""
    lines = LINE * 3 + LINE.replace('"b"', '"é"')
    rows = load_splits(written(tmp_path, "latin.jsonl", lines.encode("latin-1")))["train"]
    with pytest.raises(ValueError, match=r"row 3 of the train data set is not UTF-8 .*0xe9.*: convert its file"):
        trained(Case("latin", lambda: rows), tiny_model, tokenizer, tmp_path)


def test_mixed_types_of_a_file(tiny_model, tokenizer, tmp_path, fresh_cache):
    """A misspelt column and a word among numbers, as `datasets` makes one set of them."""
    for changed, error in {
        LINE.replace("chosen", "choosen", 1): "column 'chosen', row 2 of the train data set: the value is None",
        LINE.replace("2.0", '"high"'): "column 'score_chosen', row 2 .*: the score 'high' is not a number",
    }.items():
        rows = load_splits(written(tmp_path, "pairs.jsonl", LINE * 2 + changed))["train"]
        with pytest.raises(ValueError, match=error):
            trained(Case("mixed", lambda rows=rows: rows), tiny_model, tokenizer, tmp_path)


# What every command says of a file


def test_a_text_that_is_no_utf_8(tiny_model, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(
        b'{"prompt": "a", "chosen": "caf\xe9", "rejected": "x", "score_chosen": 2, "score_rejected": 1}\n'
    )
    given = ["--model_name_or_path", tiny_model, "--dataset_name", str(file)]
    for argv in (["train", *given, "--output_dir", str(tmp_path / "out"), "--bf16", "false"], ["evaluate", *given]):
        with pytest.raises(ValueError, match=r"row 0 of the .* is not UTF-8 .*: convert its file"):
            main(argv)


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_lists_within_lists_without_end(name, tmp_path):
    (tmp_path / name).write_text(f'{{"prompt": "a", "more": {"[" * 1500}{"]" * 1500}}}\n')
    with pytest.raises(ValueError, match=rf"{name}, line 1: lists .* more than 1,000 deep"):
        load_splits(str(tmp_path / name))


def test_a_parquet_file_without_rows(tmp_path):
    Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match=r"none\.parquet is empty"):
        load_splits(str(tmp_path / "none.parquet"))


def test_an_answer_without_messages_is_no_rm_bench():
    rows = [{"prompt": [user("q")], "chosen": [], "rejected": [bot("b")]}]
    with pytest.raises(ValueError, match=r"column 'chosen', row 0 .* an empty list of messages"):
        evaluation_set(Dataset.from_list(rows), "here")


def test_pairs_do_not_replace_their_lists(tmp_path):
    file = tmp_path / "lists.jsonl"
    file.write_text('{"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}\n')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"lists.jsonl is read, and would be lost"):
        main(["pairs", str(file), "--out", str(file)])
    assert file.read_bytes() == before


@pytest.mark.parametrize(("trained", "evaluated", "warns"), [(0, 1, True), (1, 0, True), (0, 0, False), (1, 1, False)])
def test_sets_of_which_one_has_no_template(trained, evaluated, warns, tiny_model, tokenizer, tmp_path, caplog):
    text = [{"prompt": f"q {i} ", "chosen": "a", "rejected": "b"} for i in range(2)]
    chats = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": x}] for name, x in row.items()}
        for row in text
    ]
    train, evals = (Dataset.from_list([text, chats][form]) for form in (trained, evaluated))
    trainer_of("cpo", tiny_model, tokenizer, tmp_path, train, evals)
    said = [text for text in caplog.messages if "another kind of input than it trains on" in text]
    assert [text.split(":")[0] for text in said] == ["eval"] * warns


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """`datasets` blames the file, or names its folder alone."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    said = r"file/cache cannot be written to \(Not a directory\): set the environment variable HF_DATASETS_CACHE"
    with pytest.raises(OSError, match=said):
        load_splits(written(tmp_path, "new.jsonl", LINE))
