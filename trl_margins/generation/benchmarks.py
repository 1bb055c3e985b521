"""AlpacaEval 2, Arena-Hard and MT-Bench: their questions, the decoding of the papers, and the files that their judges read.

The judging is theirs: `docs/benchmarks.md` has the commands.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checks import shown, unknown
from ..data.loading import load_splits, pick_split

logger = logging.getLogger(__name__)

Message = Mapping[str, str]


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


# SimPO's repository, eval/alpacaeval2/configs; Gemma's is in AlpacaEval's models_configs. Keys are folders of recipes.
SIMPO_DECODING: Mapping[str, Decoding] = MappingProxyType(
    {
        "mistral-7b-base": Decoding(0.7, 2048),
        "mistral-7b-instruct": Decoding(0.5, 2048),
        "llama-3-8b-base": Decoding(0.9, 4096),
        "llama-3-8b-instruct": Decoding(0.9, 4096),
        "gemma-2-9b-it": Decoding(0.5, 4096),
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

    key: Any  # by which the judge finds the answer
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
    decoding: Callable[[Question], Decoding] | None  # None: the benchmark says nothing, SimPO's table does
    hub: tuple[str, str] | None = None  # data set and file

    def path(self, folder: str | Path, model: str) -> Path:
        """Where the judge looks for the answers of a model."""
        return Path(folder) / self.file.format(model=model)


def load_questions(name: str, file: str | None = None) -> list[Question]:
    """The questions of a benchmark in their order, from a file or, AlpacaEval's, from the Hub.

    Raises:
        ValueError: no file where there must be one, an incomplete row, or two questions with one key.
    """
    benchmark = benchmark_of(name)
    rows = pick_split(load_splits(file or _downloaded(benchmark)), None, file or benchmark.title)
    questions: dict[Any, Question] = {}
    for number, row in enumerate(rows, 1):
        try:
            question = benchmark.read(row)
            if question.key in questions:
                raise ValueError(f"the question {shown(question.key)} is asked twice: remove one of the rows")
        except ValueError as error:
            raise ValueError(f"{file or benchmark.title}, row {number}: {error}") from None
        questions[question.key] = question
    if not questions:
        raise ValueError(f"{file} has no rows: it is {benchmark.questions}")
    return list(questions.values())


def decoding_of(name: str, questions: Sequence[Question], family: str | None, **own: float | None) -> list[Decoding]:
    """How each question is answered: the benchmark's settings, else SimPO's for a model family.

    Args:
        name: of the benchmark.
        questions: of the benchmark.
        family: a key of `SIMPO_DECODING`, or a recipe of such a model.
        own: values of `Decoding`'s fields that take their place.

    Raises:
        ValueError: a family without settings, or AlpacaEval with neither family nor values.
    """
    benchmark = benchmark_of(name)
    given = {field: value for field, value in own.items() if value is not None}
    of_family = None
    if family is not None:
        of_family = SIMPO_DECODING.get(family.split("/")[0])
        if of_family is None:
            raise unknown("model family of SimPO's decoding settings", family, SIMPO_DECODING)
    if benchmark.decoding is None and of_family is None and not {"temperature", "max_new_tokens"} <= given.keys():
        raise ValueError(
            f"{benchmark.title} has no decoding settings of its own: name the model family with --decoding "
            f"({', '.join(SIMPO_DECODING)}), whose settings are SimPO's, or give --temperature and --max_new_tokens"
        )
    settings = []
    for question in questions:
        usual = of_family or Decoding(0.0, 1) if benchmark.decoding is None else benchmark.decoding(question)
        settings.append(Decoding(**{**vars(usual), **given}))  # type: ignore[arg-type]
    counted = {setting: settings.count(setting) for setting in dict.fromkeys(settings)}
    for setting, count in counted.items():
        logger.info(
            "%s: %d of %d questions with temperature %g, top_p %g, at most %d new tokens",
            *(benchmark.title, count, len(settings), setting.temperature, setting.top_p, setting.max_new_tokens),
        )
    return settings


def ask(
    questions: Sequence[Question],
    settings: Sequence[Decoding],
    answer: Callable[[list[list[Message]], Decoding], Sequence[str]],
) -> list[list[str]]:
    """All answers, turn by turn: a later turn follows the model's own answer to the turn before.

    Args:
        questions: [N]
        settings: [N]
        answer: conversations that end with a question, and their common decoding → the answers.
    """
    answers: list[list[str]] = [[] for _ in questions]
    for setting in dict.fromkeys(settings):
        alike = [i for i, each in enumerate(settings) if each == setting]
        for turn in range(max(len(questions[i].turns) for i in alike)):
            asked = [i for i in alike if turn < len(questions[i].turns)]
            conversations = [_conversation(questions[i].turns[: turn + 1], answers[i]) for i in asked]
            for i, text in zip(asked, answer(conversations, setting), strict=True):
                answers[i].append(text.strip())  # as AlpacaEval and FastChat do
    return answers


def write_answers(
    name: str, folder: str | Path, model: str, questions: Sequence[Question], answers: Sequence[Sequence[str]]
) -> Path:
    """Writes the file that the judge reads, and returns its path."""
    benchmark = benchmark_of(name)
    path = benchmark.path(folder, model)
    records = [benchmark.record(*each, model) for each in zip(questions, answers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=2)
    else:
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def benchmark_of(name: str) -> Benchmark:
    """
    Raises:
        ValueError: no such benchmark.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def _conversation(turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if i < len(answers):
            messages.append({"role": "assistant", "content": answers[i]})
    return messages


def _downloaded(benchmark: Benchmark) -> str:
    if benchmark.hub is None:
        raise ValueError(
            f"{benchmark.title} needs its questions: name the file with --dataset_name; it is {benchmark.questions}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    data_set, file = benchmark.hub
    try:
        return hf_hub_download(data_set, file, repo_type="dataset")
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(
            f"the questions of {benchmark.title} cannot be downloaded ({' '.join(str(error).split())[:200]}): where "
            f"there is a network, run `hf download {data_set} {file} --repo-type dataset --local-dir .`, and name "
            "the file with --dataset_name"
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


def _read_alpaca_eval(row: Mapping[str, Any]) -> Question:
    instruction = _text(row, "instruction", row.get("instruction"))
    return Question(instruction, (instruction,), row)


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


def _mt_bench(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    return _fast_chat(question.key, list(answers), model)


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
            "The answers have no token counts (%s). Arena-Hard's style control needs them: add them with its own "
            "utils/add_markdown_info.py before show_result.py.",
            reason,
        )
        return None


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "alpaca-eval": Benchmark(
            title="AlpacaEval",
            file="model_outputs.json",
            questions="alpaca_eval_gpt4_baseline.json of tatsu-lab/alpaca_eval",
            read=_read_alpaca_eval,
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
            decoding=lambda question: Decoding(0.0, 4096),
        ),
        "mt-bench": Benchmark(
            title="MT-Bench",
            file="model_answer/{model}.jsonl",
            questions="fastchat/llm_judge/data/mt_bench/question.jsonl of FastChat",
            read=_read_mt_bench,
            record=_mt_bench,
            decoding=lambda question: Decoding(MT_BENCH_TEMPERATURES.get(question.row["category"], 0.7), 1024),
        ),
    }
)
