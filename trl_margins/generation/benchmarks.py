"""AlpacaEval, Arena-Hard and MT-Bench: their questions, the papers' decoding, and the files that their judges read.

The judging is theirs: `docs/benchmarks.md` has the commands.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checks import shown, unknown
from ..data.loading import load_splits, pick_split
from ..disk import write
from ..rows.messages import Message, says
from .sampling import Sampling

logger = logging.getLogger(__name__)

_THOUGHT = "</think>"  # ends the thinking of Qwen3, DeepSeek-R1 and others


def _decoding(temperature: float, max_new_tokens: int) -> Sampling:
    return Sampling(n=1, temperature=temperature, top_p=1.0, max_new_tokens=max_new_tokens)


# SimPO's repository, eval/alpacaeval2/configs; Gemma's is in AlpacaEval's models_configs. Keys are folders of recipes.
SIMPO_DECODING: Mapping[str, Sampling] = MappingProxyType(
    {
        "mistral-7b-base": _decoding(0.7, 2048),
        "mistral-7b-instruct": _decoding(0.5, 2048),
        "llama-3-8b-base": _decoding(0.9, 4096),
        "llama-3-8b-instruct": _decoding(0.9, 4096),
        "gemma-2-9b-it": _decoding(0.5, 4096),
    }
)
# FastChat's llm_judge/common.py
MT_BENCH_TEMPERATURES: Mapping[str, float] = MappingProxyType(
    {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }
)


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn."""

    key: Any  # by which the judge finds the answer; None if it goes by the text
    turns: tuple[str, ...]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What is particular about one of them."""

    title: str
    file: str  # of the answers, in the output folder
    questions: str  # where they are, if no file is named
    read: Callable[[Mapping[str, Any]], Question]
    record: Callable[[Question, Sequence[str], str], dict[str, Any]]
    decoding: Callable[[Question], Sampling] | None  # None: the benchmark says nothing, SimPO's table does
    hub: tuple[str, str] | None = None  # data set and file


def load_questions(name: str, file: str) -> list[Question]:
    """The questions of a benchmark in their order, from a file or, AlpacaEval's, from the Hub.

    Raises:
        ValueError: a file that cannot be had, an incomplete row, or two questions with one key.
    """
    benchmark = benchmark_of(name)
    splits = load_splits(_downloaded(*benchmark.hub) if benchmark.hub and file == benchmark.hub[0] else file)
    questions, keys = [], set()
    for number, row in enumerate(pick_split(splits, None, file), 1):
        try:
            question = benchmark.read(row)
            if question.key in keys:
                raise ValueError(f"a row before has the same key {shown(question.key)}: remove one of the two")
        except ValueError as error:
            message = f"{file}, row {number}: {error}; {benchmark.title}'s file is {benchmark.questions}"
            raise ValueError(message) from None
        questions.append(question)
        keys |= {question.key} - {None}
    return questions


def decoding_of(name: str, questions: Sequence[Question], family: str | None, **own: float | None) -> list[Sampling]:
    """How each question is answered: as the benchmark says, else as SimPO's table says for a model family.

    Args:
        name, questions: of the benchmark.
        family: a key of `SIMPO_DECODING`, or a recipe of such a model.
        own: values of Sampling's fields that take their place, where they are not None.

    Raises:
        ValueError: a family without settings, or AlpacaEval with neither family nor values.
    """
    benchmark = benchmark_of(name)
    given: Any = {field: value for field, value in own.items() if value is not None}
    of_family = None if family is None else SIMPO_DECODING.get(family.split("/")[0])
    if family is not None and of_family is None:
        raise unknown("model family of SimPO's decoding settings", family, SIMPO_DECODING)
    if benchmark.decoding is None and of_family is None and not {"temperature", "max_new_tokens"} <= given.keys():
        raise ValueError(
            f"{benchmark.title} has no decoding settings of its own: name the model family with --decoding "
            f"({', '.join(SIMPO_DECODING)}), whose settings are SimPO's, or give --temperature and --max_new_tokens"
        )
    if family is not None and benchmark.decoding is not None:
        logger.warning("no effect of decoding: %s says itself how its questions are answered", benchmark.title)
    settings = []
    for question in questions:
        usual = benchmark.decoding(question) if benchmark.decoding else of_family or _decoding(0.0, 1)
        settings.append(replace(usual, **given))
    for setting in dict.fromkeys(settings):
        logger.info(
            "%s: %d of %d questions with temperature %g, top_p %g, top_k %d, at most %d new tokens",
            *(benchmark.title, settings.count(setting), len(settings), setting.temperature),
            *(setting.top_p, setting.top_k, setting.max_new_tokens),
        )
    return settings


def ask(
    questions: Sequence[Question],
    settings: Sequence[Sampling],
    replies: Callable[[list[list[Message]], Sampling], Sequence[str]],
) -> list[list[str]]:
    """All answers, turn by turn: a later turn follows the model's own answer to the turn before.

    What a model thought before it answered, up to `</think>`, is left out.

    Args:
        questions, settings: [N]
        replies: conversations that end with a question, and their common sampling → the answers.
    """
    talks: list[list[Message]] = [[] for _ in questions]
    thought = 0
    for setting in dict.fromkeys(settings):
        alike = [i for i, each in enumerate(settings) if each == setting]
        for turn in range(max(len(questions[i].turns) for i in alike)):
            asked = [i for i in alike if turn < len(questions[i].turns)]
            conversations = [talks[i] + says("user", questions[i].turns[turn]) for i in asked]
            for i, talk, text in zip(asked, conversations, replies(conversations, setting), strict=True):
                _, mark, said = text.partition(_THOUGHT)
                thought += bool(mark)
                # AlpacaEval and FastChat strip it, too
                talks[i] = talk + says("assistant", (said if mark else text).strip())
    if thought:
        logger.info("%d answers begin with the model's thinking, which the judge does not see", thought)
    return [[message["content"] for message in talk[1::2]] for talk in talks]


def write_answers(
    name: str, folder: str | Path, model: str, questions: Sequence[Question], answers: Sequence[Sequence[str]]
) -> Path:
    """Writes the file that the judge reads, and returns its path."""
    benchmark = benchmark_of(name)
    path = Path(folder) / benchmark.file.format(model=model)
    records = [benchmark.record(*each, model) for each in zip(questions, answers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=2)
    else:
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write(path, text + "\n")
    return path


def benchmark_of(name: str) -> Benchmark:
    """
    Raises:
        ValueError: no such benchmark.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def _downloaded(data_set: str, file: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(data_set, file, repo_type="dataset")
    except OSError as error:
        raise ValueError(
            f"{file} of {data_set} cannot be downloaded ({' '.join(str(error).split())[:200]}): get it where there is "
            f"a network, from https://huggingface.co/datasets/{data_set}, and name it with --dataset_name {file}"
        ) from error


def _text(row: Mapping[str, Any], column: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} must be a text that is not empty; it is {shown(value)} (columns: {list(row)})")
    return value


def _named(row: Mapping[str, Any], column: str) -> Any:
    if isinstance(row.get(column), bool) or not isinstance(row.get(column), str | int):
        raise ValueError(f"{column} must be a text or a whole number; it is {shown(row.get(column))}")
    return row[column]


def _turns(row: Mapping[str, Any], number: int) -> list[Any]:
    turns = row.get("turns")
    if not isinstance(turns, list) or len(turns) != number:
        raise ValueError(f"turns must be a list of {number}; it is {shown(turns)} (columns: {list(row)})")
    return turns


def _read_arena_hard(row: Mapping[str, Any]) -> Question:
    if "uid" in row:  # since April 2025, also of the questions of v0.1
        return Question(_named(row, "uid"), (_text(row, "prompt", row.get("prompt")),), row)
    (turn,) = _turns(row, 1)
    content = turn.get("content") if isinstance(turn, Mapping) else None
    return Question(_named(row, "question_id"), (_text(row, "content of turns", content),), row)


def _read_mt_bench(row: Mapping[str, Any]) -> Question:
    _text(row, "category", row.get("category"))
    turns = _turns(row, 2)
    return Question(_named(row, "question_id"), tuple(_text(row, "turns", turn) for turn in turns), row)


def _alpaca_eval(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    record = {"instruction": question.turns[0], "output": answers[0], "generator": model}
    return record | ({"dataset": question.row["dataset"]} if question.row.get("dataset") else {})


def _arena_hard(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    (answer,) = answers
    if "uid" not in question.row:
        style = _style(answer, "gpt-3.5-turbo")
        # two ages of the judge look for the number of tokens in two places
        turn = {"content": answer, **({"token_len": style["token_len"]} if style else {})}
        return _fast_chat(question.key, [turn], model) | ({"conv_metadata": style} if style else {})
    style = _style(answer, "gpt-4o")
    messages = [{"role": "user", "content": question.turns[0]}, {"role": "assistant", "content": {"answer": answer}}]
    record = {"uid": question.key, "ans_id": uuid.uuid4().hex, "model": model, "messages": messages}
    return record | {"tstamp": time.time()} | ({"metadata": style} if style else {})


def _fast_chat(key: Any, turns: list[Any], model: str) -> dict[str, Any]:
    return {
        "question_id": key,
        "answer_id": uuid.uuid4().hex,
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def _style(answer: str, model: str) -> dict[str, Any]:
    """What Arena-Hard's style control compares: OpenAI's tokens, and Markdown outside code; {} if they are unknown."""
    encoding = _encoding(model)
    if encoding is None:
        return {}
    text = answer
    for code in re.findall("```([^`]*)```", answer):
        text = text.replace(code, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "token_len": len(encoding.encode(answer, disallowed_special=())),
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


@cache
def _encoding(model: str) -> Any:
    try:
        import tiktoken

        return tiktoken.encoding_for_model(model)
    except (ImportError, OSError) as error:  # no such package, or no network for the encoding
        reason = "tiktoken is not installed" if isinstance(error, ImportError) else "tiktoken cannot download them"
        logger.warning(
            "The answers have no token counts (%s), which Arena-Hard's show_result.py reads. Give the same command "
            "again where tiktoken is installed and has network: it only writes the file again. In the format of v2.0, "
            "Arena-Hard's own utils/add_markdown_info.py adds them, too.",
            reason,
        )
        return None


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "alpaca-eval": Benchmark(
            title="AlpacaEval",
            file="model_outputs.json",
            questions="alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval",
            read=lambda row: Question(None, (_text(row, "instruction", row.get("instruction")),), row),
            record=_alpaca_eval,
            decoding=None,
            # not as a data set: that has a loading script, which `datasets` no longer runs
            hub=("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"),
        ),
        "arena-hard": Benchmark(
            title="Arena-Hard",
            file="model_answer/{model}.jsonl",
            questions="data/arena-hard-v2.0/question.jsonl of arena-hard-auto, or that of v0.1",
            read=_read_arena_hard,
            record=_arena_hard,
            decoding=lambda question: _decoding(0.0, 4096),
        ),
        "mt-bench": Benchmark(
            title="MT-Bench",
            file="model_answer/{model}.jsonl",
            questions="fastchat/llm_judge/data/mt_bench/question.jsonl of FastChat",
            read=_read_mt_bench,
            record=lambda question, answers, model: _fast_chat(question.key, list(answers), model),
            decoding=lambda question: _decoding(MT_BENCH_TEMPERATURES.get(question.row["category"], 0.7), 1024),
        ),
    }
)
