"""`generate`: answers are those of plain `model.generate`, and draws depend on nothing but prompt, number and seed."""

from __future__ import annotations

import gzip
import json
import logging
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, VOCABULARY, byte_tokenizer, chat_tokenizer, load, preference_rows, sentence
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from said import word_for_word  # noqa: F401 - its messages are held against said/
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from trl_margins.cli import generate as command
from trl_margins.cli import main
from trl_margins.generation import continuous, local
from trl_margins.generation.answers import Answering, answer, turn_end
from trl_margins.generation.sampling import Prompt, Sampling
from trl_margins.generation.store import Store
from trl_margins.rows import PreferenceRow, open_prompts

pytestmark = pytest.mark.rehearsal

STOP = [2, 30, 40, 50, 60]
ENGINES = {
    "one by one": partial(local.generate, pad=0, batch_size=1),
    "small batches": partial(local.generate, pad=0, batch_size=7),
    "one batch": partial(local.generate, pad=0, batch_size=64),
    "continuous": partial(continuous.generate, options={"max_batch_tokens": 256, "num_blocks": 48}),
}


def prompts_of(n: int, room: int = 40) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(rng.integers(3, VOCABULARY, rng.integers(1, 40)).tolist(), room) for _ in range(n)]


def plain(model: Any, ids: list[int], new: int, stop: list[int] = STOP) -> list[int]:
    """transformers' own greedy answer to one prompt."""
    made = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        generation_config=GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=0),
    )
    return made[0, len(ids) :].tolist()


def run(data: Any, model: str, out: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ["--model_name_or_path", model, "--dataset_name", str(data), "--out", str(out), "--dtype", "float32"]
    assert main(["generate", *arguments, *options]) == 0
    opened = gzip.open if out.suffix == ".gz" else open
    with opened(out, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    rows = [{"prompt": [{"role": "user", "content": sentence(rng, 1, 6)}]} for _ in range(7)]
    return write(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


# The engines of transformers


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_answers_are_those_of_plain_generate(engine, tiny_model):
    model, prompts = load(tiny_model), prompts_of(9)
    model.generation_config.repetition_penalty = 5.0  # the model's own settings are not those of `sampling`
    own = model.generation_config
    found = dict(ENGINES[engine](model, prompts, Sampling(1, 0.0, 1.0), STOP))
    assert model.generation_config is own
    model.generation_config = GenerationConfig()
    assert found == {i: [plain(model, prompt.ids, 40)] for i, prompt in enumerate(prompts)}
    lengths = [len(answer) for (answer,) in found.values()]
    assert min(lengths) < 32 < max(lengths) == 40  # some end within a segment, others at the limit


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 5), (0.8, 20)])
def test_draws_do_not_depend_on_engine_or_batch(top_p, top_k, tiny_model):
    model, prompts = load(tiny_model), prompts_of(6)
    sampling = Sampling(3, 1.0, top_p, top_k, 40)
    first, *others = [dict(engine(model, prompts, sampling, STOP)) for engine in ENGINES.values()]
    assert len({tuple(answer) for answers in first.values() for answer in answers}) == 18
    assert all(other == first for other in others)
    alone = dict(ENGINES["one batch"](model, prompts[4:5], sampling, STOP))
    assert alone == {0: first[4]}
    assert dict(ENGINES["one batch"](model, prompts, replace(sampling, seed=1), STOP)) != first


def test_another_seed_or_number_is_another_draw():
    sampling = Sampling(seed=3)
    draws = [sampling.draws([1, 2], 0, 4), sampling.draws([1, 2], 1, 4), sampling.draws([1, 3], 0, 4)]
    draws += [replace(sampling, seed=4).draws([1, 2], 0, 4)]
    assert len({tuple(each) for each in draws}) == 4
    assert (sampling.draws([1, 2], 0, 4) == draws[0]).all()
    many = np.concatenate([sampling.draws([i], k, 100) for i in range(50) for k in range(4)])
    assert many.min() >= 0
    assert many.max() < 1
    shares, _ = np.histogram(many, 10, (0, 1))
    assert np.abs(shares / len(many) - 0.1).max() < 4 * np.sqrt(0.09 / len(many))


def nucleus(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The distribution that the options describe, by their definition."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    kept = 1 + int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-9))  # the fewest that reach top_p
    p[order[kept:]] = 0
    return p / p.sum()


SAMPLINGS = [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 0.7, 0), (0.8, 0.95, 0), (1.0, 1.0, 3), (1.5, 0.8, 4)]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SAMPLINGS)
def test_tokens_have_the_frequencies_of_their_distribution(temperature, top_p, top_k):
    n, logits = 40_000, np.array([1.2, -0.3, 0.4, 2.0, -1.5, 0.9, -0.2])
    draws = np.concatenate([Sampling().draws([i], 0, 100) for i in range(n // 100)])
    sampling = Sampling(1, temperature, top_p, top_k)
    tokens = sampling.pick(torch.tensor(logits, dtype=torch.float32).expand(n, -1), torch.from_numpy(draws))
    shares = np.bincount(tokens.numpy(), minlength=len(logits)) / n
    p = nucleus(logits, temperature, top_p, top_k)
    assert (shares[p == 0] == 0).all()
    assert np.abs(shares - p).max() < 4 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_lowest_temperature_takes_the_most_probable_token(top_p):
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    draws = torch.linspace(0, 0.999, 64)
    for temperature in (1e-5, 1e-40, 5e-324):
        picked = Sampling(1, temperature=temperature, top_p=top_p).pick(logits, draws)
        assert torch.equal(picked, logits.argmax(1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("engine", [["generate"], ["continuous", "--engine_options", '{"num_blocks": 48}']])
def test_a_model_without_finite_logits_is_an_error(engine, temperature, data, tiny_model, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "broken")
    options = ("--n", "1", "--temperature", str(temperature), "--max_new_tokens", "4", "--engine", *engine)
    with pytest.raises((ValueError, RuntimeError), match="logits are NaN or infinite"):
        run(data, str(tmp_path / "broken"), tmp_path / "a.jsonl", *options)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.3, 0.9), (1.0, 0.5), (3.0, 0.95)])
def test_a_large_vocabulary_is_not_sorted_in_vain(temperature, top_p):
    """The nucleus of some rows is among the first 256 tokens, that of others is not: the tokens are the same."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(12, 3000)) * np.array([8, 1] * 6)[:, None]
    draws = rng.random(12).astype(np.float32)
    found = Sampling(1, temperature, top_p).pick(torch.tensor(logits, dtype=torch.float32), torch.tensor(draws))
    for row, draw, token in zip(logits, draws, found.tolist(), strict=True):
        p = nucleus(row, temperature, top_p, 0)
        order = np.argsort(-p)
        assert np.cumsum(p[order])[list(order).index(token)] == pytest.approx(draw, abs=p[token] + 1e-4)
        assert p[token] > 0


def test_first_tokens_of_a_model_have_its_probabilities(tiny_model):
    model, n = load(tiny_model), 3000
    prompt = Prompt(list(range(10, 20)), 1)
    (answers,) = dict(ENGINES["one batch"](model, [prompt], Sampling(n, 0.7, 0.9, 0, 1), STOP)).values()
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0, -1].double().numpy()
    p = nucleus(logits, 0.7, 0.9, 0)
    shares = np.bincount([token for (token,) in answers], minlength=VOCABULARY) / n
    assert (shares[p == 0] == 0).all()
    assert np.abs(shares - p).max() < 4 * np.sqrt(p.max() / n)


def test_an_answer_has_no_more_room_than_its_prompt_leaves(tiny_model):
    model, prompts = (
        load(tiny_model),
        [prompt._replace(room=room) for prompt, room in zip(prompts_of(3), (3, 40, 33), strict=True)],
    )
    for engine in ENGINES.values():
        found = dict(engine(model, prompts, Sampling(1, 0.0, 1.0, 0, 40), [2]))
        assert found == {i: [plain(model, p.ids, p.room, [2])] for i, p in enumerate(prompts)}


def test_a_sliding_window(tmp_path):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=8))
    prompts = prompts_of(5)
    for sampling in (Sampling(1, 0.0, 1.0, 0, 40), Sampling(2, 1.0, 1.0, 0, 40)):
        one, batch = (dict(ENGINES[name](model, prompts, sampling, STOP)) for name in ("one by one", "one batch"))
        assert one == batch
        if sampling.n == 1:
            assert one == {i: [plain(model, prompt.ids, 40)] for i, prompt in enumerate(prompts)}


def test_a_cache_that_cannot_be_cut_is_computed_again(tiny_model, monkeypatch):
    model, prompts, sampling = load(tiny_model), prompts_of(4), Sampling(2, 1.0, 1.0, 0, 40)
    first = dict(ENGINES["one batch"](model, prompts, sampling, STOP))
    monkeypatch.setattr(local, "_can_select", lambda cache: False)
    assert dict(ENGINES["one batch"](model, prompts, sampling, STOP)) == first


# The end of an answer, and its text

LLAMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|h|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>model\n' }}{% endif %}"
)


def with_turns(template: str) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|h|>", "<|/h|>", "<|eot|>"]})
    return tokenizer


@pytest.mark.parametrize(("template", "end"), [(LLAMA, "<|eot|>"), (GEMMA, "<|eot|>"), (None, "</s>")])
def test_the_end_of_a_turn(template, end):
    tokenizer = byte_tokenizer() if template is None else with_turns(template)
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == [end]


def test_a_template_without_an_end_of_turn():
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
    assert turn_end(tokenizer) == []


def test_answers_end_with_the_turn(tiny_model, tmp_path):
    """As plain `generate` with all of these tokens, on the template's own tokens: no second begin token."""
    model, tokenizer = load(tiny_model), with_turns(LLAMA)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    with torch.no_grad():  # so that turns end
        model.lm_head.weight[eot] = 6 * model.lm_head.weight[101]
    model.generation_config.eos_token_id = [2, 77]
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    messages = [[{"role": "user", "content": text}] for text in ("a cat?", "who?", "the bird sings over")]
    made = run(
        write(tmp_path / "p.jsonl", [{"prompt": each} for each in messages]),
        str(folder),
        tmp_path / "o.jsonl",
        "--n",
        "1",
        "--temperature",
        "0",
        "--max_new_tokens",
        "40",
    )
    ends = []
    for row, prompt in zip(made, messages, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids.count(1) == 1
        expected = plain(load(str(folder)), ids, 40, [2, 77, eot])
        ends.append(expected[-1])
        assert row["responses"] == [tokenizer.decode(expected, skip_special_tokens=True)]
        assert row["truncated"] == [expected[-1] not in (2, 77, eot)]
    assert eot in ends


@dataclass
class Says:
    """An engine whose answers are given, and that keeps the prompts."""

    answers: list[list[list[int]]]
    prompts: list[Prompt] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)

    def __call__(self, prompts: Any, sampling: Any, stop: Any) -> Iterator[tuple[int, list[list[int]]]]:
        self.prompts, self.stop = prompts, stop
        yield from enumerate(self.answers)


def said(tokenizer: Any, prompt: Any, answers: list[list[int]], tmp_path: Path) -> dict[str, Any]:
    sampling = Sampling(len(answers))
    store = Store(tmp_path / "answers.jsonl", {})
    row = PreferenceRow(prompt, [])
    (made,) = answer([row], Answering("m", tokenizer, Says([answers])), sampling, store)
    return made


def test_the_text_of_an_answer_keeps_its_white_space(tokenizer, tmp_path):
    texts = [" \n a  cat\t\n\n", "", "x</s>", "ü — 猫"]
    ids = [[*tokenizer(text)["input_ids"], 2] for text in texts]
    ids[2] = [1, *tokenizer("x")["input_ids"], 0, 2]  # other special tokens within it
    made = said(tokenizer, [{"role": "user", "content": "a"}], ids, tmp_path)
    assert made["responses"] == [" \n a  cat\t\n\n", "", "x", "ü — 猫"]
    (line,) = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == made


def test_a_first_word_keeps_the_space_in_front_of_it(tmp_path):
    """SentencePiece's decoders drop it where nothing is in front: a text goes on, a message begins."""
    vocab = {"<unk>": 0, "</s>": 1, "▁a": 2, "▁cat": 3, "s": 4, "▁": 5}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", chat_template="{{ 'a' }}")
    tokenizer.add_tokens(["▁a", "▁cat"])
    row = PreferenceRow("a", [])
    from trl_margins.generation.answers import text_of_answer

    assert tokenizer.decode([2, 3, 4]) == "a cats"
    assert text_of_answer(tokenizer, row, [2], [3, 4, 1]) == " cats"
    chat = PreferenceRow([{"role": "user", "content": "a"}], [])
    assert text_of_answer(tokenizer, chat, [2], [3, 4, 1]) == "cats"


def test_what_is_cut_or_empty_is_counted(tokenizer, tmp_path, caplog):
    word = tokenizer("cat")["input_ids"]
    with caplog.at_level(logging.INFO, "trl_margins"):
        made = said(tokenizer, "a ", [[2], [*word, 2], word, [*tokenizer(" \n")["input_ids"], 2]], tmp_path)
    assert made == {
        "prompt": "a ",
        "responses": ["", "cat", "cat", " \n"],
        "models": ["m"] * 4,
        "truncated": [False, False, True, False],
    }
    assert caplog.messages == [
        "an answer ends with ['</s>']",
        "4 answers to 1 prompts",
        "1 of 4 answers are cut at 2048 tokens or the model's limit",
        "2 of 4 answers are empty",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trl_margins"):
        for n in (1, 2):
            (tmp_path / f"{n}").mkdir()
            said(tokenizer, "b ", [[*word, 2]] * n, tmp_path / f"{n}")
    assert caplog.messages == ["1 of 1 prompts have the same answer 2 times"]


# The prompts


@pytest.mark.parametrize("form", ["standard", "conversational", "implicit"])
def test_prompts_of_pairs_have_the_tokens_of_training(form, tiny_model, tokenizer, tmp_path):
    from conftest import trainer_of

    rows = preference_rows(6, form)
    if form == "implicit":
        rows = rows.map(lambda row: {"chosen": row["chosen"] + "!", "rejected": "Q" + row["rejected"][1:] + "?"})
    trained = trainer_of("dpo", tiny_model, tokenizer, tmp_path, rows).train_dataset["prompt_ids"][:]
    engine = Says([[[2]]] * 6)
    answer(
        open_prompts(rows, "train"), Answering("m", tokenizer, engine), Sampling(1), Store(tmp_path / "o.jsonl", {})
    )
    assert [prompt.ids for prompt in engine.prompts] == [list(ids) for ids in trained]


USER, ASSISTANT = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}
FORMS = {
    "text": ({"prompt": "a?"}, {}, "a?"),
    "text as chat": ({"prompt": "a?"}, {"as_chat": True}, [USER]),
    "messages": ({"prompt": [USER]}, {"as_chat": True}, [USER]),
    "several turns": ({"prompt": [USER, ASSISTANT, USER]}, {}, [USER, ASSISTANT, USER]),
    "conversation": ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, {}, [USER, ASSISTANT, USER]),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}, {}, [USER]),
    "instruction": ({"instruction": "a?", "input": "", "output": "b"}, {}, "a?"),
    "named": ({"asked": "a?", "prompt": "no"}, {"prompt_column": "asked"}, "a?"),
    "with a system message": (
        {"prompt": "a?", "system": "s"},
        {"system_column": "system"},
        [{"role": "system", "content": "s"}, USER],
    ),
    "list": ({"prompt": "a?", "responses": ["b", "c"], "scores": [1.0, 2.0]}, {}, "a?"),
    "pair in text": ({"prompt": "a?", "chosen": "b", "rejected": "c"}, {"as_chat": True}, "a?"),
    "whole conversations": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "c"}]},
        {},
        [USER],
    ),
    "RM-Bench": ({"prompt": "a?", "chosen": ["b"] * 3, "rejected": ["c"] * 3}, {}, "a?"),
    "stored as text": ({"prompt": json.dumps([USER])}, {}, [USER]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_prompts(form):
    row, options, prompt = FORMS[form]
    (found,) = open_prompts(Dataset.from_list([row]), "set", **options)
    assert found == PreferenceRow(prompt, [])


@pytest.mark.parametrize("spelled", [json.dumps, repr, lambda turns: turns])
def test_the_first_of_the_users_turns_is_the_prompt(spelled, caplog):
    """Kaggle's votes have them as JSON in a CSV file; pandas writes lists as Python does."""
    turns = [["What is 2+2?", "And 3+3?"], ['Say ["hi"]']]
    rows = Dataset.from_list([{"prompt": spelled(each), "winner_tie": 1} for each in turns])
    with caplog.at_level(logging.INFO, "trl_margins"):
        found = open_prompts(rows, "set", as_chat=True)
    assert [row.prompt for row in found] == [[{"role": "user", "content": each[0]}] for each in turns]
    said = [record.getMessage() for record in caplog.records]
    assert "set: column 'prompt' holds lists of the user's turns, of which the first is the prompt" in said
    assert any(
        "set: 1 of 2 prompts have further turns (the first is row 0), which are left out" in each for each in said
    )


def test_an_answer_at_the_end_is_no_part_of_the_prompt(caplog):
    """Of any conversation but `prompt`, which is asked as it is."""
    rows = Dataset.from_list([{"prompt": [USER], "conversation_a": [USER, ASSISTANT]}, {"prompt": [USER, ASSISTANT]}])
    (row,) = open_prompts(rows.select([0]), "set", "conversation_a")
    assert row.prompt == [USER]
    assert [row.prompt for row in open_prompts(rows, "set")] == [[USER], [USER, ASSISTANT]]
    assert "set: 1 of 2 prompts end with the assistant's turn (the first is row 1): the answer" in caplog.text


def test_a_prompt_that_only_looks_like_turns_is_a_prompt():
    rows = Dataset.from_list([{"prompt": '["b", "a"]'}, {"prompt": "Sort the list above."}])
    assert [row.prompt for row in open_prompts(rows, "set")] == ['["b", "a"]', "Sort the list above."]


def test_half_of_a_surrogate_pair_in_the_users_turns_is_replaced():
    (row,) = open_prompts(Dataset.from_list([{"prompt": '["a \\ud83d?", "b"]'}]), "set")
    assert row.prompt == "a ??"


def test_what_the_template_refuses_is_named(tmp_path):
    """As Gemma's refuses system messages."""
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    rows = [PreferenceRow([USER], []), PreferenceRow([{"role": "system", "content": "Be brief."}, USER], [])]
    model = Answering("m", chat_tokenizer(refuses + GEMMA), Says([]))
    message = r"row 1 of the train data set: the chat template refuses .*Be brief.*: System role not supported. Change"
    for shard in ((1, 1), (2, 2)):
        with pytest.raises(ValueError, match=message):
            answer(rows, model, Sampling(1), Store(tmp_path / "o.jsonl", {}), shard=shard)


THINKS = GEMMA + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"


def test_template_variables_for_all_prompts(tiny_model, tmp_path, monkeypatch):
    """As for Qwen3: the prompts are transformers' own with that variable, which the answers keep for training."""
    tokenizer, model = with_turns(THINKS), tmp_path / "model"
    load(tiny_model).save_pretrained(model)
    tokenizer.save_pretrained(model)
    engine = Says([[[2]], [[2]], [[2]]])
    monkeypatch.setattr(local, "generate", lambda _, prompts, sampling, stop, **__: engine(prompts, sampling, stop))
    own = {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": True}}
    data = write(tmp_path / "p.jsonl", [{"prompt": [USER]}, {"prompt": [USER, ASSISTANT, USER]}, own])
    options = ["--n", "1", "--engine", "generate", "--chat_template_kwargs"]
    made = run(data, str(model), tmp_path / "o.jsonl", *options, '{"enable_thinking": false}')
    thinking = [False, False, True]
    assert [row["chat_template_kwargs"] for row in made] == [{"enable_thinking": each} for each in thinking]
    assert [prompt.ids for prompt in engine.prompts] == [
        tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True, enable_thinking=each
        )["input_ids"]
        for row, each in zip(made, thinking, strict=True)
    ]
    with pytest.raises(
        ValueError, match=r"made with chat_template_kwargs=.*'enable_thinking': False.*this run has None"
    ):
        run(data, str(model), tmp_path / "o.jsonl", *options[:-1])
    with pytest.raises(ValueError, match=r"has 'enable_thinkin', which the chat template of .* does not use"):
        run(data, str(model), tmp_path / "b.jsonl", *options, '{"enable_thinkin": false}')
    texts = write(tmp_path / "t.jsonl", [{"prompt": "a?"}])
    with pytest.raises(ValueError, match="are for prompts in messages, and these are text: set as_chat"):
        run(texts, str(model), tmp_path / "b.jsonl", *options, '{"enable_thinking": false}', "--as_chat", "false")


def test_pairs_in_text_keep_their_form_unless_said_otherwise(tiny_model, tmp_path):
    data = write(tmp_path / "pairs.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    options = ("--n", "1", "--max_new_tokens", "1")
    for said, prompt in (((), "a?"), (("--as_chat", "true"), [{"role": "user", "content": "a?"}])):
        (made,) = run(data, tiny_model, tmp_path / f"{len(said)}.jsonl", *options, *said)
        assert made["prompt"] == prompt


def test_template_variables_stay_with_their_prompt(tokenizer, tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = Dataset.from_list(
        [
            {"prompt": [USER], "tools": json.dumps(tools), "chat_template_kwargs": {"thinking": True}},
            {"prompt": [USER], "tools": None, "chat_template_kwargs": None},
        ]
    )
    engine = Says([[[2]], [[2]]])
    made = answer(
        open_prompts(rows, "s"), Answering("m", tokenizer, engine), Sampling(1), Store(tmp_path / "o.jsonl", {})
    )
    assert made[0] == {
        "prompt": [USER],
        "tools": tools,
        "chat_template_kwargs": {"thinking": True},
        "responses": [""],
        "models": ["m"],
        "truncated": [False],
    }
    assert made[1].keys() == {"prompt", "responses", "models", "truncated"}


def test_equal_prompts_are_answered_once(tokenizer, tmp_path, caplog):
    rows = [PreferenceRow(text, []) for text in ("a", "b", "a")]
    with caplog.at_level(logging.INFO, "trl_margins"):
        made = answer(
            rows, Answering("m", tokenizer, Says([[[2]], [[2]]])), Sampling(1), Store(tmp_path / "o.jsonl", {})
        )
    assert [row["prompt"] for row in made] == ["a", "b"]
    assert "train: 1 of 3 prompts occur before, and are answered once" in [r.getMessage() for r in caplog.records]


def test_what_the_template_leaves_out_of_prompts_is_said(tokenizer, tmp_path, caplog):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    asked = [{"role": "system", "content": "in French"}, {"role": "user", "content": "a cat?", "name": "Bob"}]
    for prompt, is_said in ((asked, True), (asked[1:], False), ("a cat?", False)):
        caplog.clear()
        model = Answering("m", chat_tokenizer(template), Says([[[2]]]))
        answer([PreferenceRow(prompt, [])], model, Sampling(1), Store(tmp_path / f"{len(prompt)}.jsonl", {}))
        assert ("the tokens do not spell the text, such as 'in French'" in caplog.text) == is_said
        assert ("'name' is in 1 rows (the first is row 0)" in caplog.text) == (prompt != "a cat?")


def test_prompts_without_room_are_left_out(tokenizer, tmp_path, caplog):
    rows = [PreferenceRow(text, []) for text in ("a" * 20, "b")]
    engine = Says([[[2]]])
    made = answer(rows, Answering("m", tokenizer, engine, limit=20), Sampling(1), Store(tmp_path / "o.jsonl", {}))
    assert [row["prompt"] for row in made] == ["b"]
    assert engine.prompts == [Prompt(tokenizer("b")["input_ids"], 19)]
    assert any("1 of 2 prompts leave no room for an answer in the 20 tokens" in r.getMessage() for r in caplog.records)


BAD = {
    "no rows": ([], {}, "the set data set has no rows"),
    "no prompts": (
        [{"text": "a"}],
        {},
        r"none of prompt, .*: name the one with the prompts .* \(--prompt_column NAME\)",
    ),
    "no such column": ([{"prompt": "a"}], {"prompt_column": "x"}, r"prompt_column names 'x', but .* \['prompt'\]"),
    "images": (
        [{"prompt": "a", "image": "x.png"}],
        {},
        "are answered by their text alone, and there is the column 'image'",
    ),
    "no such system": ([{"prompt": "a"}], {"system_column": "x"}, "system_column names 'x'"),
    "None": ([{"prompt": "a"}, {"prompt": None}], {}, "column 'prompt', row 1 of the set data set: the value is None"),
    "empty": ([{"prompt": "a"}, {"prompt": " "}], {}, "1 of 2 rows of the set data set have an empty prompt.*row 1"),
    "a number": ([{"prompt": 3}], {}, "column 'prompt', row 0 of the set data set: it should be an str or a list"),
    "an input": ([{"instruction": "a", "input": "b"}], {}, "column 'input', row 0 .*: 'b' is not part of"),
    "an answer alone": ([{"messages": [ASSISTANT]}], {}, "before the assistant's answer there is no message"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_prompts(case):
    rows, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        open_prompts(Dataset.from_list(rows), "set", **options)


# The file


def test_a_stopped_run_is_continued_to_the_byte(data, tiny_model, tmp_path, monkeypatch):
    options = ("--n", "3", "--max_new_tokens", "40", "--batch_size", "6")
    whole, stopped = tmp_path / "whole.jsonl.gz", tmp_path / "stopped.jsonl.gz"
    rows = run(data, tiny_model, whole, *options)
    assert len(rows) == 7
    assert all(len(row["responses"]) == 3 == len(row["models"]) for row in rows)
    prompts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts

    engine, asked = local.generate, []

    def stops(model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(len(prompts))
        for count, made in enumerate(engine(model, prompts, *args, **kwargs)):
            if count == 2 and len(asked) < 3:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(local, "generate", stops)
    partial = tmp_path / "stopped.jsonl.gz.partial"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(data, tiny_model, stopped, *options)
        assert not stopped.exists()
        with partial.open("a") as file:
            file.write('{"prompt": [{"role": "user", "con')
    run(data, tiny_model, stopped, *options)
    assert asked == [7, 5, 3]
    assert stopped.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    run(data, tiny_model, stopped, *options)  # nothing is left to do
    assert asked == [7, 5, 3]

    with pytest.raises(ValueError, match=r"stopped.jsonl.gz was made with temperature=0.8, and this run has 0.9: go"):
        run(data, tiny_model, stopped, *options, "--temperature", "0.9")
    longer = write(tmp_path / "longer.jsonl", [{"prompt": each} for each in [[USER], *prompts]])
    more = run(longer, tiny_model, stopped, *options)  # further prompts are answered, and come in their place
    assert asked == [7, 5, 3, 1]
    assert more[1:] == rows
    with pytest.raises(ValueError, match=r"has 1 prompts that are not among those to answer now: name another file"):
        run(data, tiny_model, stopped, *options)
    (tmp_path / "stopped.jsonl.gz.settings.json").unlink()
    with pytest.raises(ValueError, match=r"is there, and .*settings.json, which says how it was made, is not"):
        run(data, tiny_model, stopped, *options)


def test_another_model_in_the_same_folder_is_another_model(data, tiny_model, tmp_path):
    model, out = tmp_path / "model", tmp_path / "answers.jsonl"
    shutil.copytree(tiny_model, model)
    run(data, str(model), out, "--n", "1", "--max_new_tokens", "4")
    (model / "eval_results.json").write_text("{}")  # as an evaluation leaves it
    run(data, str(model), out, "--n", "1", "--max_new_tokens", "4")
    trained = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        trained.get_input_embeddings().weight[0, 0] += 1
    trained.save_pretrained(model)
    with pytest.raises(ValueError, match=r"answers\.jsonl was made with weights="):
        run(data, str(model), out, "--n", "1", "--max_new_tokens", "4")


def test_shards_are_parts_of_the_whole(data, tiny_model, tmp_path):
    options = ("--n", "2", "--max_new_tokens", "20")
    whole = run(data, tiny_model, tmp_path / "whole.jsonl", *options)
    parts = [run(data, tiny_model, tmp_path / f"{i}.jsonl", *options, "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert [part for i, part in enumerate(parts, 1)] == [whole[0::3], whole[1::3], whole[2::3]]
    assert run(data, tiny_model, tmp_path / "some.jsonl", *options, "--max_prompts", "2") == whole[:2]


def test_engines_give_the_same_file(data, tiny_model, tmp_path):
    options = ("--n", "2", "--max_new_tokens", "20")
    run(data, tiny_model, tmp_path / "a.jsonl", *options, "--engine", "generate")
    small = json.dumps({"max_batch_tokens": 256, "num_blocks": 48})
    run(data, tiny_model, tmp_path / "b.jsonl", *options, "--engine", "continuous", "--engine_options", small)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_an_adapter(data, tiny_model, tokenizer, tmp_path):
    torch.manual_seed(0)
    peft = get_peft_model(load(tiny_model), LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    peft.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    options = ("--n", "1", "--temperature", "0", "--max_new_tokens", "20", "--max_prompts", "2")
    made = run(data, str(tmp_path / "adapter"), tmp_path / "o.jsonl", *options)
    for row in made:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        expected = plain(peft.eval(), ids, 20, [2])
        assert row["responses"] == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_shards_of_prompts_that_are_there_twice(tiny_model, tmp_path):
    """As pairs of one prompt are, side by side: no shard answers what another one does, and all answers are there."""
    rows = [{"prompt": f"question {i // 2} "} for i in range(8)]
    data = tmp_path / "twice.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--n", "2", "--max_new_tokens", "4")
    whole = run(data, tiny_model, tmp_path / "o.jsonl", *options)
    shards = [run(data, tiny_model, tmp_path / f"{i}.jsonl", *options, "--shard", f"{i}/2") for i in (1, 2)]
    assert [len(shard) for shard in shards] == [2, 2]
    assert sorted(map(str, shards[0] + shards[1])) == sorted(map(str, whole))


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_message_beside_the_prompt_is_said(name, tiny_model, tmp_path, caplog):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"prompt": "a question", name: "Be brief."}))
    options = ("--n", "1", "--temperature", "0", "--max_new_tokens", "2")
    run(data, tiny_model, tmp_path / "o.jsonl", *options)
    said = f"column {name!r} is not used, and in 1 of 1 rows it holds text that the prompt does not"
    assert said in caplog.text
    caplog.clear()
    (row,) = run(data, tiny_model, tmp_path / "with.jsonl", *options, "--system_column", name)
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a question"}]
    assert said not in caplog.text


def test_answers_are_read_as_lists(data, tiny_model, tmp_path):
    from trl_margins.generation.reward_model import rows_to_score

    run(data, tiny_model, tmp_path / "o.jsonl", "--n", "2", "--max_new_tokens", "5")
    rows, are_lists = rows_to_score(Dataset.from_json(str(tmp_path / "o.jsonl")), "set")
    assert are_lists
    assert [len(row.completions) for row in rows] == [2] * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "0"), "temperature 0 gives the same answer 5 times: set n to 1, or raise temperature"),
        (("--n", "0"), "n must be a whole number, at least 1"),
        (("--top_p", "0"), "top_p must be a number, above 0 and at most 1"),
        (("--top_k", "-1"), "top_k must be a whole number, at least 0"),
        (("--shard", "4/3"), "shard must be I/N with I from 1 to N, such as 1/4; it is '4/3'"),
        (("--shard", "half"), "shard must be I/N"),
        (("--engine_options", "4"), "engine_options must be a mapping"),
        (("--chat_template_kwargs", "thinking"), "chat_template_kwargs must be a mapping, in JSON; it is 'thinking'"),
        (("--engine", "vllm"), "vLLM is not installed: run `pip install vllm`, or use another engine"),
        (("--out", "answers.csv"), "answers.csv: the file is one of .jsonl, .jsonl.gz"),
    ],
)
def test_bad_options(options, message, data, tiny_model, tmp_path):
    with pytest.raises((ValueError, ImportError), match=message):
        run(data, tiny_model, tmp_path / "o.jsonl", *options)


def test_an_encoder_decoder_model_is_refused(data, tiny_encoder_decoder, tmp_path):
    with pytest.raises(ValueError, match="is an encoder-decoder model, and generate takes causal models"):
        run(data, tiny_encoder_decoder, tmp_path / "o.jsonl")


def test_an_engine_that_stops_says_why(tiny_model):
    model = load(tiny_model)
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(RuntimeError, match=r"continuous batching has stopped: division by zero. Use another engine"):
        list(ENGINES["continuous"](model, prompts_of(2), Sampling(1), STOP))


# vLLM, which is not installed: a stand-in with the documented arguments, and a model of one rule behind them


@dataclass(kw_only=True)
class SamplingParams:
    """Those of vLLM's arguments that are used."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    stop_token_ids: list[int]
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Counts down from the last token of the prompt, to 1 at least."""

    made: Any = None

    def __init__(self, model: str, *, dtype: str = "auto", trust_remote_code: bool = False, **kwargs: Any) -> None:
        LLM.made, self.model, self.dtype, self.kwargs, self.calls = self, model, dtype, kwargs, []

    def generate(self, prompts: Any, sampling_params: Any, *, lora_request: Any = None) -> list[Any]:
        self.calls.append((prompts, sampling_params, lora_request))
        return [SimpleNamespace(outputs=[self._one(*each)]) for each in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt: dict[str, list[int]], params: SamplingParams) -> Any:
        assert type(params.seed) is int
        assert 0 <= params.seed < 2**63
        ids = list(range(prompt["prompt_token_ids"][-1] - 1, 0, -1))[: params.max_tokens]
        end = next((i for i, token in enumerate(ids) if token in params.stop_token_ids), None)
        if end is None:
            return SimpleNamespace(token_ids=tuple(ids), finish_reason="length", stop_reason=None)
        return SimpleNamespace(token_ids=tuple(ids[:end]), finish_reason="stop", stop_reason=ids[end])


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.machinery import ModuleSpec

    module, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
    for each in (module, lora, request):
        monkeypatch.setitem(sys.modules, each.__name__, each)


@pytest.mark.parametrize("new", [10, 200])  # which cuts answers, or lets them end
def test_vllm_gets_the_documented_arguments(new, vllm, data, tiny_model, tokenizer, tmp_path):
    options = ("--engine", "vllm", "--n", "2", "--max_new_tokens", str(new), "--top_k", "7", "--seed", "5")
    more = json.dumps({"tensor_parallel_size": 4})
    made = run(data, tiny_model, tmp_path / "o.jsonl", *options, "--engine_options", more)
    llm = LLM.made
    assert (llm.model, llm.dtype) == (tiny_model, "float32")
    assert llm.kwargs == {"enable_prefix_caching": True, "tensor_parallel_size": 4}
    ((prompts, params, lora),) = llm.calls
    assert lora is None
    ids = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in made
    ]
    assert prompts == [{"prompt_token_ids": each} for each in ids for _ in range(2)]
    expected = {"n": 1, "temperature": 0.8, "top_p": 0.95, "top_k": 7, "max_tokens": new, "stop_token_ids": [2]}
    assert all({**vars(each), "seed": 0} == {**expected, "detokenize": False, "seed": 0} for each in params)
    assert len({each.seed for each in params}) == 14
    assert params[0].seed == Sampling(seed=5).seed_of(ids[0], 0)
    last = ids[0][-1]
    assert made[0]["responses"][0] == tokenizer.decode(list(range(last - 1, 2, -1))[:new], skip_special_tokens=True)
    assert made[0]["truncated"] == [new == 10] * 2
    with pytest.raises(ValueError, match="was made with engine='vllm', and this run has 'transformers'"):
        run(data, tiny_model, tmp_path / "o.jsonl", *options[2:], "--engine", "generate")


def test_vllm_gets_an_adapter(vllm, data, tiny_model, tokenizer, tmp_path):
    folder = tmp_path / "adapter"
    get_peft_model(load(tiny_model), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run(data, str(folder), tmp_path / "o.jsonl", "--engine", "vllm", "--n", "1")
    assert LLM.made.model == tiny_model
    assert LLM.made.kwargs == {"enable_prefix_caching": True, "enable_lora": True, "max_lora_rank": 4}
    assert LLM.made.calls[0][2] == LoRARequest("adapter", 1, str(folder))


def test_vllm_is_taken_where_it_is_and_a_gpu_is(vllm, monkeypatch):
    assert command.engine_of("auto") == "generate"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.engine_of("auto") == "vllm"
