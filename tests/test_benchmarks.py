"""Files for the benchmarks' judges: their formats, and the judges themselves where they are installed."""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from datasets import Dataset
from peft import LoraConfig
from said import word_for_word  # noqa: F401 - its messages are held against said/

from trl_margins import GapPOConfig, GapPOTrainer
from trl_margins.cli import generate as cli
from trl_margins.cli import main
from trl_margins.cli.setup import load_model
from trl_margins.evaluation.scorer import completion_logps
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.generation import benchmarks, local
from trl_margins.generation.benchmarks import Question, ask, decoding_of, load_questions, write_answers
from trl_margins.generation.sampling import Sampling

pytestmark = pytest.mark.rehearsal

ROOT = Path(__file__).parents[1]
ALPACA_EVAL = [
    {"instruction": f"Question {i}?", "output": "reference", "generator": "gpt4_1106_preview", "dataset": "koala"}
    for i in range(4)
]
ARENA_HARD = [{"uid": f"{i:016x}", "category": "hard_prompt", "prompt": f"Question {i}?"} for i in range(3)]
ARENA_HARD_V01 = [
    {
        "question_id": f"{i:032x}",
        "category": "arena-hard-v0.1",
        "cluster": "c",
        "turns": [{"content": f"Question {i}?"}],
    }
    for i in range(3)
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
    {"question_id": 111, "category": "math", "turns": ["Add.", "Subtract."], "reference": ["3", "5"]},
    {"question_id": 131, "category": "extraction", "turns": ["Extract.", "Again."]},
    {"question_id": 141, "category": "stem", "turns": ["Explain.", "Why?"]},
    {"question_id": 161, "category": "another", "turns": ["What?", "And?"]},
]


def drawn(temperature: float, max_new_tokens: int, top_p: float = 1.0) -> Sampling:
    return Sampling(n=1, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=max_new_tokens)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """tiktoken's, which the tests cannot download: one token is one character."""
    asked = []

    def encoding_for_model(model: str) -> Any:
        asked.append(model)
        return types.SimpleNamespace(encode=lambda text, disallowed_special: list(text))

    tiktoken = types.SimpleNamespace(encoding_for_model=encoding_for_model, Encoding=type("Encoding", (), {}))
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    benchmarks._encoding.cache_clear()
    yield asked
    benchmarks._encoding.cache_clear()


def answered(name: str, file: str, out: Path, answer: str = " Answer. ") -> Any:
    questions = load_questions(name, file)
    settings = decoding_of(name, questions, "llama-3-8b-instruct")
    answers = ask(questions, settings, lambda conversations, _: [answer] * len(conversations))
    return write_answers(name, out, "mine", questions, answers)


# The files, key by key: those of the projects' own answers


def test_alpaca_evals_file_is_a_list_in_the_order_of_the_questions(tmp_path):
    file = written(tmp_path / "questions.json", ALPACA_EVAL[::-1])
    path = answered("alpaca-eval", file, tmp_path / "out")
    assert path == tmp_path / "out/model_outputs.json"
    assert json.loads(path.read_text()) == [
        {"instruction": f"Question {i}?", "output": "Answer.", "generator": "mine", "dataset": "koala"}
        for i in (3, 2, 1, 0)
    ]


MARKDOWN = """\
# Title
### Part
#no title
1. one
 2. **two** and **three**
- four
* __five__
```
# code
- **code**
```
"""


def test_arena_hards_file_has_messages_and_style(tmp_path, encodings):
    file = written(tmp_path / "question.jsonl", ARENA_HARD)
    path = answered("arena-hard", file, tmp_path / "out", MARKDOWN)
    assert path == tmp_path / "out/model_answer/mine.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["uid"] for record in records] == [row["uid"] for row in ARENA_HARD]
    assert len({record["ans_id"] for record in records}) == 3
    assert set(encodings) == {"gpt-4o"}
    record = records[0]
    assert list(record) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
    assert record["model"] == "mine"
    assert isinstance(record["tstamp"], float)
    assert record["messages"] == [
        {"role": "user", "content": "Question 0?"},
        {"role": "assistant", "content": {"answer": MARKDOWN.strip()}},
    ]
    assert record["metadata"] == {  # counted by hand
        "token_len": len(MARKDOWN.strip()),
        "header_count": {"h1": 1, "h2": 0, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 2, "__": 1},
    }


def test_arena_hard_v01s_questions_get_its_own_format(tmp_path, encodings):
    file = written(tmp_path / "question.jsonl", ARENA_HARD_V01)
    path = answered("arena-hard", file, tmp_path / "out")
    record = json.loads(path.read_text().splitlines()[0])
    assert list(record) == ["question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"]
    assert record["question_id"] == ARENA_HARD_V01[0]["question_id"]
    assert record["model_id"] == "mine"
    assert record["choices"] == [{"index": 0, "turns": [{"content": "Answer.", "token_len": 7}]}]
    assert record["conv_metadata"]["token_len"] == 7
    assert set(encodings) == {"gpt-3.5-turbo"}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("rows", [ARENA_HARD, ARENA_HARD_V01])
def test_without_token_counts_there_is_no_style_and_the_log_says_so_once(
    rows, installed, tmp_path, monkeypatch, caplog, encodings
):
    questions = load_questions("arena-hard", written(tmp_path / "question.jsonl", rows))

    def no_network(model):
        raise ConnectionError

    tiktoken = types.SimpleNamespace(encoding_for_model=no_network) if installed else None
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    path = write_answers("arena-hard", tmp_path, "mine", questions, [["Answer."]] * len(questions))
    assert not {"metadata", "conv_metadata"} & json.loads(path.read_text().splitlines()[0]).keys()
    assert "token_len" not in path.read_text()
    assert caplog.text.count("add_markdown_info.py") == 1


def test_mt_benchs_file_has_both_turns(tmp_path):
    file = written(tmp_path / "question.jsonl", MT_BENCH)
    path = answered("mt-bench", file, tmp_path / "out")
    assert path == tmp_path / "out/model_answer/mine.jsonl"
    record = json.loads(path.read_text().splitlines()[1])
    assert list(record) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert record["question_id"] == 111
    assert record["choices"] == [{"index": 0, "turns": ["Answer.", "Answer."]}]


def test_a_later_turn_follows_the_models_own_answer(tmp_path):
    questions = load_questions("mt-bench", written(tmp_path / "question.jsonl", MT_BENCH))
    settings = decoding_of("mt-bench", questions, None)
    calls = []

    def answer(conversations, setting):
        calls.append((setting.temperature, conversations))
        return [f"  {turns[-1]['content']} ({len(calls)})\n" for turns in conversations]

    answers = ask(questions, settings, answer)
    # by temperature, so that the engine has large batches
    assert [(temperature, len(turns)) for temperature, turns in calls] == [
        *[(0.7, 2), (0.7, 2), (0.0, 2), (0.0, 2), (0.1, 1), (0.1, 1)],
    ]
    assert answers[1] == ["Add. (3)", "Subtract. (4)"]
    assert calls[3][1][0] == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Add. (3)"},
        {"role": "user", "content": "Subtract."},
    ]


def test_questions_of_one_and_of_two_turns_are_asked_together():
    questions = [Question(i, turns, {}) for i, turns in enumerate([("a",), ("b", "c"), ("d",)])]
    asked = []

    def answer(conversations, _):
        asked.append([turns[-1]["content"] for turns in conversations])
        return [text.upper() for text in asked[-1]]

    assert ask(questions, [drawn(0.7, 9)] * 3, answer) == [["A"], ["B", "C"], ["D"]]
    assert asked == [["a", "b", "d"], ["c"]]


def test_the_judge_does_not_see_the_thinking(tmp_path, caplog):
    questions = load_questions("mt-bench", written(tmp_path / "q.jsonl", MT_BENCH[:1]))
    asked = []

    def answer(conversations, _):
        asked.extend(conversations)
        # with and without the first mark, which some templates put into the prompt
        return [f"{'<think>' * (len(asked) == 1)}\nHm.\n</think>\n\nAnswer {len(asked)}.\n"]

    with caplog.at_level(logging.INFO, "trl_margins"):
        assert ask(questions, [drawn(0.7, 9)], answer) == [["Answer 1.", "Answer 2."]]
    assert asked[1][1] == {"role": "assistant", "content": "Answer 1."}
    assert "2 answers begin with the model's thinking, which the judge does not see" in caplog.text


# Decoding


@pytest.mark.parametrize(
    ("family", "temperature", "tokens"),
    [  # SimPO's eval/alpacaeval2/configs, and AlpacaEval's own for Gemma
        ("mistral-7b-base", 0.7, 2048),
        ("mistral-7b-instruct", 0.5, 2048),
        ("llama-3-8b-base", 0.9, 4096),
        ("llama-3-8b-instruct/gap-aware", 0.9, 4096),
        ("gemma-2-9b-it/gamma-po/full", 0.5, 4096),
    ],
)
def test_alpaca_eval_is_answered_as_simpo_did(family, temperature, tokens, tmp_path, caplog):
    caplog.set_level(logging.INFO, "trl_margins")
    questions = load_questions("alpaca-eval", written(tmp_path / "questions.json", ALPACA_EVAL))
    assert decoding_of("alpaca-eval", questions, family) == [drawn(temperature, tokens, 1.0)] * 4
    said = f"4 of 4 questions with temperature {temperature:g}, top_p 1, top_k 0, at most {tokens} new tokens"
    assert said in caplog.text
    own = decoding_of("alpaca-eval", questions, family, temperature=0.3, max_new_tokens=None, top_p=0.9)
    assert own == [drawn(0.3, tokens, 0.9)] * 4


def test_alpaca_eval_wants_a_family_or_values(tmp_path):
    questions = load_questions("alpaca-eval", written(tmp_path / "questions.json", ALPACA_EVAL))
    for given in ({}, {"temperature": 1.0}, {"max_new_tokens": 8}):
        with pytest.raises(ValueError, match=r"AlpacaEval has no decoding .* --decoding \(mistral-7b-base, .*or give"):
            decoding_of("alpaca-eval", questions, None, **given)
    both = {"temperature": 1.0, "max_new_tokens": 8}
    assert decoding_of("alpaca-eval", questions, None, **both) == [drawn(1.0, 8)] * 4


def test_the_family_is_one_of_simpos_table():
    for family in ("qwen2.5-7b-instruct/gamma-po", "llama-3-8b-instuct"):
        with pytest.raises(
            ValueError, match=r"unknown model family of SimPO's decoding settings .*; known: mistral-7b"
        ):
            decoding_of("arena-hard", [], family)


def test_arena_hard_is_greedy_and_mt_bench_goes_by_category(tmp_path):
    questions = load_questions("arena-hard", written(tmp_path / "arena.jsonl", ARENA_HARD))
    assert decoding_of("arena-hard", questions, "mistral-7b-base") == [drawn(0.0, 4096)] * 3
    questions = load_questions("mt-bench", written(tmp_path / "mt.jsonl", MT_BENCH))
    found = decoding_of("mt-bench", questions, None)
    assert [each.temperature for each in found] == [0.7, 0.0, 0.0, 0.1, 0.7]
    assert {each.max_new_tokens for each in found} == {1024}


# Questions that are none


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("alpaca-eval", [{"prompt": "a"}], r"row 1: instruction must be a text .* None \(columns: \['prompt'\]\)"),
        ("alpaca-eval", [{"instruction": "a"}, {"instruction": " "}], "row 2: instruction must be a text that is not"),
        ("arena-hard", [{"uid": "a", "prompt": text} for text in "bc"], "row 2: a row before has the same key 'a'"),
        ("arena-hard", [{"uid": "a", "text": "b"}], "row 1: prompt must be a text"),
        ("arena-hard", [{"question_id": "a", "turns": ["b"]}], "row 1: content of turns must be a text"),
        ("arena-hard", [{"question_id": "a"}], "row 1: turns must be a list of 1; it is None"),
        ("arena-hard", [{"prompt": "a", "turns": [{"content": "b"}]}], "row 1: question_id must be a text or a whole"),
        ("mt-bench", [{"question_id": 1, "turns": ["a", "b"]}], "row 1: category must be a text"),
        ("mt-bench", [{"question_id": 1, "category": "c", "turns": ["a"]}], "row 1: turns must be a list of 2; it is"),
        (
            "mt-bench",
            [{"question_id": 1.5, "category": "c", "turns": ["a", "b"]}],
            "question_id .*whole number; it is",
        ),
    ],
)
def test_a_row_that_is_no_question_is_named(name, rows, message, tmp_path):
    file = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"{re.escape(file)}, {message}" if message[0] == "r" else message):
        load_questions(name, file)


def test_questions_that_cannot_be_had_come_with_the_way_to_them():
    with pytest.raises(
        ValueError, match=r"cannot be downloaded .*, from https://\S+, and name it with --dataset_name"
    ):
        load_questions("alpaca-eval", "tatsu-lab/alpaca_eval")
    with pytest.raises(ValueError, match=r"unknown benchmark 'alpaca_eval'; .*did you mean 'alpaca-eval'\?"):
        load_questions("alpaca_eval", "tatsu-lab/alpaca_eval")


def test_alpaca_evals_questions_are_downloaded_as_a_file(tmp_path, monkeypatch):
    """The data set has a script, which `datasets` does not run."""
    asked = []
    file = written(tmp_path / "alpaca_eval_gpt4_baseline.json", ALPACA_EVAL)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: asked.append((a, k)) or file)
    assert len(load_questions("alpaca-eval", "tatsu-lab/alpaca_eval")) == 4
    assert asked == [(("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json"), {"repo_type": "dataset"})]


# The command


@pytest.fixture
def generate(tiny_model, tmp_path):
    def run(name: str, file: str, *flags: str) -> int:
        command = ["generate", "--model_name_or_path", tiny_model, "--dataset_name", file, "--for", name]
        return main([*command, "--out", str(tmp_path / "out"), "--max_new_tokens", "6", *flags])

    return run


def test_the_models_files_are_looked_at_once(generate, tmp_path, monkeypatch):
    """However many turns and temperatures there are: reading a large model's weights takes a while."""
    asked = []
    monkeypatch.setattr(cli, "weights_of", lambda name: asked.append(name) or {})
    generate("mt-bench", written(tmp_path / "mt.jsonl", MT_BENCH))
    assert len(list((tmp_path / "out/generated").glob("*/turn-*.jsonl"))) == 6
    assert len(asked) == 1


def test_the_command_answers_every_benchmark(generate, tiny_model, tmp_path, capsys, encodings):
    """Greedily, so that plain transformers has the same answers: also to the second turn."""
    model, tokenizer = load(tiny_model), byte_tokenizer()

    def plain(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True).strip()

    def user(text):
        return {"role": "user", "content": text}

    out = tmp_path / "out"
    assert generate("alpaca-eval", written(tmp_path / "a.json", ALPACA_EVAL), "--temperature", "0") == 0
    assert capsys.readouterr().out == f"{out}/model_outputs.json\n"
    records = json.loads((out / "model_outputs.json").read_text())
    assert [record["output"] for record in records] == [plain([user(row["instruction"])]) for row in ALPACA_EVAL]
    assert {record["generator"] for record in records} == {Path(tiny_model).name}

    assert generate("arena-hard", written(tmp_path / "b.jsonl", ARENA_HARD), "--model_id", "tiny") == 0
    records = [json.loads(line) for line in (out / "model_answer/tiny.jsonl").read_text().splitlines()]
    answers = [record["messages"][1]["content"]["answer"] for record in records]
    assert answers == [plain([user(row["prompt"])]) for row in ARENA_HARD]
    assert [path.name for path in (out / "model_answer").iterdir()] == ["tiny.jsonl"]  # the judge reads all of them

    greedy = [row for row in MT_BENCH if row["category"] in ("math", "extraction")]
    assert generate("mt-bench", written(tmp_path / "c.jsonl", greedy), "--model_id", "mt") == 0
    records = [json.loads(line) for line in (out / "model_answer/mt.jsonl").read_text().splitlines()]
    for record, row in zip(records, greedy, strict=True):
        first, second = record["choices"][0]["turns"]
        assert first == plain([user(row["turns"][0])])
        assert second == plain([user(row["turns"][0]), {"role": "assistant", "content": first}, user(row["turns"][1])])


def test_the_help_names_every_benchmark():
    assert set(cli.BENCHMARKS) == set(benchmarks.BENCHMARKS)


def test_the_help_has_both_names_of_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "  --benchmark, --for BENCHMARK\n" in capsys.readouterr().out


def test_a_stopped_run_goes_on(generate, tmp_path, monkeypatch):
    file = written(tmp_path / "c.jsonl", MT_BENCH)
    assert generate("mt-bench", file, "--model_id", "whole", "--batch_size", "1") == 0
    whole, batches = local._batch, []

    def stops(*args):
        batches.append(1)
        if len(batches) > 3:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(local, "_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        generate("mt-bench", file, "--model_id", "parts", "--batch_size", "1")
    assert not (tmp_path / "out/model_answer/parts.jsonl").exists()
    batches = [-99]
    monkeypatch.setattr(local, "_batch", lambda *args: batches.append(1) or whole(*args))
    assert generate("mt-bench", file, "--model_id", "parts", "--batch_size", "1") == 0
    assert len(batches) - 1 == 2 * len(MT_BENCH) - 3
    one, other = (
        [
            json.loads(line)["choices"]
            for line in (tmp_path / f"out/model_answer/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    )
    assert one == other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", "5"], "reads one answer to each question: leave out --n, which is 5"),
        (["--shard", "1/2"], "--shard is for prompts, not for a benchmark"),
        (["--prompt_column", "prompt"], "--prompt_column is for prompts, not for a benchmark"),
        (["--model_id", "org/model"], "model_id is also the name of a file"),
        (["--out", "answers.jsonl"], "--out is a folder, in which the judge finds the file"),
        (["--for", "arena"], "unknown benchmark 'arena'; known: alpaca-eval, arena-hard, mt-bench"),
    ],
)
def test_what_is_no_benchmark_run_is_an_error(flags, message, generate, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate("arena-hard", written(tmp_path / "b.jsonl", ARENA_HARD), *flags)


@pytest.mark.parametrize("option", ["decoding", "model_id"])
def test_what_is_for_benchmarks_is_an_error_without_one(option, tiny_model, tmp_path):
    command = [
        "generate",
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "d",
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    with pytest.raises(ValueError, match=f"--{option} is for a benchmark: name one with --for, or leave it out"):
        main([*command, f"--{option}", "x"])


# The judges themselves


LENGTH_JUDGE = """\
longer:
  prompt_template: longer/prompt.txt
  fn_completions: test_completions
  fn_completion_parser: regex_parser
  completion_parser_kwargs: {outputs_to_match: {1: "^first", 2: "^second"}}
"""


def test_alpaca_eval_scores_our_file(tmp_path, monkeypatch):
    """With a judge that prefers the longer answer, so that everybody can count its win rate; length-controlled too."""
    alpaca_eval = pytest.importorskip("alpaca_eval", reason="alpaca-eval is not installed (extra: benchmarks)")
    import sklearn
    from alpaca_eval.decoders import test as decoder
    from alpaca_eval.metrics import glm_winrate

    rng = np.random.default_rng(0)
    ours, theirs = 2 * rng.integers(5, 30, 40), 2 * rng.integers(5, 20, 40) + 1  # never alike
    rows = [ALPACA_EVAL[0] | {"instruction": f"Q{i}?", "output": "r" * theirs[i]} for i in range(40)]
    questions = load_questions("alpaca-eval", written(tmp_path / "reference.json", rows))
    path = write_answers("alpaca-eval", tmp_path, "mine", questions, [["o" * n] for n in ours])

    def completions(prompts, **_):
        pairs = [prompt.split("|") for prompt in prompts]
        said = ["first" if len(one) > len(other) else "second" for one, other in pairs]
        return {"completions": said, "price_per_example": [0] * len(said), "time_per_example": [0] * len(said)}

    (tmp_path / "longer").mkdir()
    (tmp_path / "longer/configs.yaml").write_text(LENGTH_JUDGE)
    (tmp_path / "longer/prompt.txt").write_text("{output_1}|{output_2}")
    monkeypatch.setattr(decoder, "test_completions", completions)
    # what the regression has of the Hub: answers of other models, and how hard the instructions are
    gamed = {"model": np.repeat(["a", "b"], 40), "preference": np.repeat([0.9, 0.2], 40), "index": [*range(40)] * 2}
    gamed |= {"std_delta_len": np.repeat([1.0, -1.0], 40), "instruction_difficulty": np.sin(gamed["index"])}
    Dataset.from_dict(gamed | {"not_gamed_baseline": [False] * 80}).to_csv(tmp_path / "df_gamed.csv")
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(tmp_path / "df_gamed.csv"))

    with sklearn.config_context():  # it sets one of scikit-learn's for good
        board, annotations = alpaca_eval.evaluate(
            str(path),
            reference_outputs=str(tmp_path / "reference.json"),
            annotators_config=str(tmp_path / "longer"),
            metric_kwargs={"save_weights_dir": None},  # or it writes into its own package
            is_return_instead_of_print=True,
            caching_path=None,
        )
    found = board.loc["mine"]
    assert found["n_total"] == len(annotations) == 40
    assert found["win_rate"] == pytest.approx(100 * (ours > theirs).mean())
    assert found["avg_length"] == int(ours.mean())
    assert 0 < found["length_controlled_winrate"] < found["win_rate"]  # length is all that this judge looks at


def test_fastchat_judges_our_file(tmp_path, monkeypatch):
    pytest.importorskip("fastchat", reason="fschat is not installed (see docs/benchmarks.md)")
    for name in ("anthropic", "openai"):  # clients of judges that are not asked here
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from fastchat.llm_judge import common, gen_judgment

    rows = [row for row in MT_BENCH if row["category"] != "another"]
    path = answered("mt-bench", written(tmp_path / "question.jsonl", rows), tmp_path)
    questions = common.load_questions(str(tmp_path / "question.jsonl"), None, None)
    answers = common.load_model_answers(str(path.parent))
    common.check_data(questions, answers, {}, ["mine"], {})
    assert list(answers["mine"]) == [row["question_id"] for row in rows]
    assert common.temperature_config.items() >= benchmarks.MT_BENCH_TEMPERATURES.items()

    asked = []

    def completion(model, conversation, **_):
        asked.append(conversation.messages[0][1])
        return "Rating: [[7]]"

    monkeypatch.setattr(common, "chat_completion_openai", completion)
    prompt = {"type": "single", "name": "single-v1-multi-turn", "system_prompt": "", "output_format": "[[rating]]"}
    prompt["prompt_template"] = "{question_1}|{answer_1}|{question_2}|{answer_2}"
    judge = common.Judge("gpt-4", prompt, multi_turn=True)
    for match in gen_judgment.make_match_single(questions, ["mine"], answers, judge, multi_turn=True):
        common.play_a_match_single(match, output_file=str(tmp_path / "gpt-4_single.jsonl"))
    assert asked[0] == "Write.|Answer.|Rewrite.|Answer."
    scores = [json.loads(line)["score"] for line in (tmp_path / "gpt-4_single.jsonl").read_text().splitlines()]
    assert scores == [7] * len(rows)


# lm-evaluation-harness


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> dict[str, str]:
    """Folders of a model and of an adapter on the tiny one, saved by our trainer."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: benchmarks)")
    folder = tmp_path_factory.mktemp("trained")
    rows = preference_rows(24, form="conversational", seed=3)
    for name, lora in (("model", None), ("adapter", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))):
        config = GapPOConfig(**quiet(output_dir=str(folder / name), learning_rate=1e-2, max_steps=4))
        given = {"train_dataset": rows, "processing_class": byte_tokenizer(), "peft_config": lora}
        trainer = GapPOTrainer(tiny_model, config, **given)
        trainer.train()
        trainer.save_model()
    return {"model": str(folder / "model"), "adapter": str(folder / "adapter"), "base": tiny_model}


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_lm_eval_has_our_log_probabilities(kind, trained, tmp_path):
    """Of the same texts, by code that is not ours: completion by completion, and as accuracy of a preference set."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = preference_rows(30, form="conversational", seed=8)
    rows.to_json(tmp_path / "pairs.jsonl")
    task = (ROOT / "docs/preference_task.yaml").read_text().replace("pairs.jsonl", str(tmp_path / "pairs.jsonl"))
    (tmp_path / "preference_task.yaml").write_text(task.replace("<|im_end|>", "</s>"))
    where = {"pretrained": trained["model"]}
    if kind == "adapter":
        where = {"pretrained": trained["base"], "peft": trained["adapter"]}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=where | {"dtype": "float32", "device": "cpu"},
        tasks=["preference"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        batch_size=4,
        bootstrap_iters=0,
    )
    theirs = np.array([[r[0][0] for r in sample["resps"]] for sample in found["samples"]["preference"]])

    def ours_of(model):
        scored = completion_logps(model, byte_tokenizer(), evaluation_set(rows, "pairs").rows, max_length=256)
        return np.array([each.logps for each in scored])

    ours = ours_of(load_model(trained[kind], dtype=torch.float32))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    accuracy = found["results"]["preference"]["acc,none"]
    assert accuracy == (ours[:, 0] > ours[:, 1]).mean()
    assert abs(ours - ours_of(load(trained["base"]))).max() > 0.1  # what was trained is what was loaded


def test_lm_eval_has_the_tasks_of_the_page():
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: benchmarks)")
    from lm_eval.tasks import TaskManager

    named = re.findall(r"^\| [\w-]+ \| `(\w+)` \| \d+ \|", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE)
    assert len(named) == 10
    folders = [Path(lm_eval.__file__).parent / "tasks" / name.split("_")[0] for name in named]
    found = TaskManager(include_path=sorted({str(folder) for folder in folders}), include_defaults=False).all_tasks
    assert {*named, "leaderboard"} <= set(found)
