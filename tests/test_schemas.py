"""Rows as published sets have them: every command reads the same prompt, completions, scores and tokens, or says the
same. What is right is written out by hand here; the texts are our own.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import load, quiet
from datasets import Dataset

from trl_margins import GapPOConfig, GapPODPOConfig, GapPOTrainer, MarginDPOTrainer
from trl_margins.cli.inspect import in_tokens_of
from trl_margins.data.audit import audit
from trl_margins.data.evaluation_factors import add_evaluation_factor, compute
from trl_margins.evaluation.scorer import completion_logps
from trl_margins.evaluation.sets import evaluation_set
from trl_margins.rows import open_rows, tokenize
from trl_margins.rows.mixed import mixed

Row = dict[str, Any]
# rendered prompt, chosen and rejected, by the tests' template and by hand; and the two scores
Right = tuple[str, str, str, float, float]

Q, A, B = ("why", "how", "who"), ("because", "so", "bees"), ("no", "hm", "me")
SCORES = ((5.0, 1.0), (4.0, 3.5), (3.0, 1.0))
EACH = list(zip(Q, A, B, SCORES, strict=True))


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def bot(text: str) -> Row:
    return {"role": "assistant", "content": text}


def chat(q: str, a: str, b: str, system: str = "") -> tuple[str, str, str]:
    before = f"<s>system:{system}</s>" if system else ""
    return f"{before}<s>user:{q}</s><s>assistant:", f"{a}</s>", f"{b}</s>"


CHATS: list[Right] = [(*chat(q, a, b), *s) for q, a, b, s in EACH]
TEXTS: list[Right] = [(f"{q} ", f"{a}</s>", f"{b}</s>", *s) for q, a, b, s in EACH]


@dataclass(frozen=True)
class Schema:
    """Rows under their columns' names, and what they mean or why they are refused."""

    rows: list[Row]
    right: list[Right] | None = None
    refused: str | None = None  # by every command
    log: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def each(make: Any, **more: Any) -> list[Row]:
    return [{**make(q, a, b), **(more if not callable(s) else {}), **_scored(make, s)} for q, a, b, s in EACH]


def _scored(make: Any, scores: tuple[float, float]) -> Row:
    names = getattr(make, "scores", ("score_chosen", "score_rejected"))
    return dict(zip(names, scores, strict=True)) if names else {}


def named(*names: str) -> Any:
    """Other names of the score columns."""

    def decorate(make: Any) -> Any:
        make.scores = names
        return make

    return decorate


def text_rows(q: str, a: str, b: str) -> Row:
    return {"prompt": f"{q} ", "chosen": a, "rejected": b}


# messages as text, in ways that are neither JSON nor a list of Python
PRINTED: dict[str, Any] = {
    "an ordered dict": lambda part: f"[{', '.join(f'OrderedDict({list(m.items())})' for m in part)}]",
    "a default dict": lambda part: f"[{', '.join(f'defaultdict({str}, {m})' for m in part)}]",
    "dict()": lambda part: f"[{', '.join('dict(role={role!r}, content={content!r})'.format(**m) for m in part)}]",
    "a class of its own": lambda part: str([SimpleNamespace(content=m["content"], role=m["role"]) for m in part]),
    "a list with an ellipsis": lambda part: str([*part, ...]),
    "a list with a null": lambda part: json.dumps([*part, None]),
    "a list with None": lambda part: str([*part, None]),
    "a tuple": lambda part: str(tuple(part)),
    "a list in capitals": lambda part: str([{key.title(): value for key, value in m.items()} for m in part]),
    "CSV twice": lambda part: json.dumps(part).replace('"', '""'),
    "bytes": lambda part: str(json.dumps(part).encode()),
}


def conversations(q: str, a: str, b: str) -> Row:
    return {"chosen": [user(q), bot(a)], "rejected": [user(q), bot(b)]}


def beside_prompt(q: str, a: str, b: str) -> Row:
    return {"prompt": q, **conversations(q, a, b)}


def with_names(make: Any, *names: str) -> Any:
    return named(*names)(lambda q, a, b: make(q, a, b))


HUB = {
    "HuggingFaceH4/ultrafeedback_binarized": Schema(
        each(lambda q, a, b: {**beside_prompt(q, a, b), "prompt_id": "0", "messages": [user(q), bot(a)]}), CHATS
    ),
    "trl-lib/ultrafeedback_binarized": Schema(each(conversations), CHATS),
    "RLHFlow/UltraFeedback-preference-standard": Schema(
        each(with_names(conversations, "chosen_score", "rejected_score")), CHATS
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": Schema(
        each(with_names(beside_prompt, "chosen-rating", "rejected-rating"), source="x"), CHATS
    ),
    "argilla/dpo-mix-7k": Schema(each(with_names(conversations, "chosen_rating", "rejected_rating")), CHATS),
    "argilla/distilabel-capybara-dpo-7k-binarized": Schema(
        each(
            with_names(
                lambda q, a, b: {**beside_prompt(q, a, b), "conversation": [{"input": q, "output": a}]},
                "rating_chosen",
                "rating_rejected",
            )
        ),
        CHATS,
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": Schema(
        [
            {**beside_prompt(q, a, b), "all_generated_responses": [b, a, "x"], "all_rm_scores": [s[1], s[0], s[1]]}
            for q, a, b, s in EACH
        ],
        CHATS,
        options={"score_columns": ["all_rm_scores"]},
    ),
    "snorkelai/Snorkel-Mistral-PairRM-DPO": Schema(
        [{**beside_prompt(q, a, b), "all_rm_scores": [str(s[0]), str(s[1])]} for q, a, b, s in EACH],
        CHATS,
        options={"score_columns": ["all_rm_scores"]},
    ),
    "openai/webgpt_comparisons, as a preference set": Schema(
        [{**beside_prompt(q, a, b), "margin": s[0] - s[1]} for q, a, b, s in EACH],
        [(*right[:3], right[3] - right[4], 0.0) for right in CHATS],
    ),
    "Anthropic/hh-rlhf, scored": Schema(
        each(
            lambda q, a, b: {
                "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
                "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}",
            }
        ),
        # TRL leaves the space before the answers to them
        [(f"\n\nHuman: {q}\n\nAssistant:", f" {a}</s>", f" {b}</s>", *s) for q, a, b, s in EACH],
    ),
    "Anthropic/hh-rlhf, answers that begin alike": Schema(
        each(
            lambda q, a, b: {
                "chosen": f"\n\nHuman: x\n\nAssistant: y\n\nHuman: {q}\n\nAssistant: I {a}",
                "rejected": f"\n\nHuman: x\n\nAssistant: y\n\nHuman: {q}\n\nAssistant: I {b}",
            }
        ),
        [
            (f"\n\nHuman: x\n\nAssistant: y\n\nHuman: {q}\n\nAssistant:", f" I {a}</s>", f" I {b}</s>", *s)
            for q, a, b, s in EACH
        ],
    ),
    "CarperAI/openai_summarize_comparisons": Schema(each(text_rows), TEXTS),
    "trl-lib/hh-rlhf-helpful-base": Schema(
        each(lambda q, a, b: {"prompt": [user(q)], "chosen": [bot(a)], "rejected": [bot(b)]}), CHATS
    ),
    "Skywork/Skywork-Reward-Preference-80K": Schema(each(conversations, source="x"), CHATS),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": Schema(each(beside_prompt, id="7", source="x"), CHATS),
    "allenai/reward-bench": Schema(each(text_rows, chosen_model="m", subset="alpacaeval-easy"), TEXTS),
    "mlabonne/orpo-dpo-mix-40k": Schema(
        each(lambda q, a, b: {**beside_prompt(q, a, b), "question": q, "source": "x"}), CHATS
    ),
    "LLaMA-Factory, ShareGPT": Schema(
        each(
            lambda q, a, b: {
                "conversations": [{"from": "human", "value": q}],
                "chosen": {"from": "gpt", "value": a},
                "rejected": {"from": "gpt", "value": b},
            }
        ),
        CHATS,
        log="column 'conversations' holds the prompts",
    ),
    "LLaMA-Factory, Alpaca": Schema(
        each(lambda q, a, b: {"instruction": q, "input": "", "chosen": a, "rejected": b}),
        refused=r"columns 'chosen' and 'rejected', row 0.*prompt_column='instruction'",
    ),
    "LLaMA-Factory, Alpaca, named": Schema(
        each(lambda q, a, b: {"instruction": f"{q} ", "input": "", "chosen": a, "rejected": b}),
        TEXTS,
        log="column 'instruction' holds the prompts",
        options={"prompt_column": "instruction"},
    ),
    "Intel/orca_dpo_pairs": Schema(
        each(lambda q, a, b: {"system": "", "question": q, "chosen": a, "rejected": b}),
        refused=r"row 0.*prompt_column='question' .--prompt_column question. and system_column='system'",
    ),
    "Intel/orca_dpo_pairs, named": Schema(
        each(lambda q, a, b: {"system": "Be kind" if q == "how" else "", "question": q, "chosen": a, "rejected": b}),
        [(*chat(q, a, b, "Be kind" if q == "how" else ""), *s) for q, a, b, s in EACH],
        options={"prompt_column": "question", "system_column": "system"},
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": Schema(
        [{"system": "Be kind", "input": q, "chosen": a, "rejected": b, "rating": list(s)} for q, a, b, s in EACH],
        [(*chat(q, a, b, "Be kind"), *s) for q, a, b, s in EACH],
        options={"prompt_column": "input", "system_column": "system", "score_columns": ["rating"]},
    ),
    "a system message beside texts that begin alike": Schema(
        each(lambda q, a, b: {"system": "Be kind", "chosen": f"{q} The {a}", "rejected": f"{q} The {b}"}),
        options={"system_column": "system"},
        refused="(letters that both begin with, which may cut a word, .*|3 such rows.. )Add a prompt column",
    ),
    "numbers of responses": Schema(
        each(lambda q, a, b: {"prompt": f"{q} ", "responses": [a, b], "chosen": "0", "rejected": "1"}),
        refused=r"only say which text of the columns \['responses'\] they are, in all its 3 rows",
    ),
    "letters of responses": Schema(
        each(lambda q, a, b: {"prompt": q, "response_a": a, "response_b": b, "chosen": "A", "rejected": "Response B"}),
        refused=r"only say which text of the columns \['response_a', 'response_b'\] they are",
    ),
    "names of responses": Schema(
        each(
            lambda q, a, b: {
                "prompt": q,
                "completions": [{"id": "c1", "text": a}, {"id": "c2", "text": b}],
                "chosen": "c1",
                "rejected": "c2",
            }
        ),
        refused=r"only say which text of the columns \['completions'\] they are",
    ),
    "names of models": Schema(
        each(lambda q, a, b: {"prompt": q, "model_a": "x", "model_b": "y", "chosen": "x", "rejected": "y"}),
        refused=r"only say which text of the columns \['model_a', 'model_b'\] they are",
    ),
    "jondurbin/truthy-dpo": Schema(
        each(lambda q, a, b: {"system": "Be kind", "prompt": f"{q} ", "chosen": a, "rejected": b}),
        TEXTS,
        log=r"column 'system' is not used, and in 3 of 3 rows .* set system_column='system'",
    ),
    "a set of queries": Schema(
        [
            {
                "schema": "bees(name)",
                "chosen": f"SELECT name {a}",
                "rejected": f"SELECT name {b}",
                "score_chosen": 2.0,
                "score_rejected": 1.0,
            }
            for _, a, b, _ in EACH
        ],
        refused="column 'schema', row 0 of the .* data set: there is no prompt column.*3 such rows",
    ),
    "queries that begin alike": Schema(
        [
            {"chosen": f"SELECT name {a}", "rejected": f"SELECT name {b}", "score_chosen": 2.0, "score_rejected": 1.0}
            for _, a, b, _ in EACH
        ],
        refused="begin alike in all 3 rows, with the same text: that looks like chance",
    ),
    "messages with more keys": Schema(
        each(
            lambda q, a, b: {
                side: [{**user(q), "name": None, "tool_calls": None}, {**bot(x), "name": None, "tool_calls": None}]
                for side, x in (("chosen", a), ("rejected", b))
            }
        ),
        CHATS,
    ),
    "saved by pandas as CSV": Schema(
        each(lambda q, a, b: {"prompt": q, "chosen": str([user(q), bot(a)]), "rejected": str([user(q), bot(b)])}),
        CHATS,
    ),
    "messages as JSON": Schema(
        each(lambda q, a, b: {name: json.dumps(part) for name, part in conversations(q, a, b).items()}), CHATS
    ),
    "messages that are no JSON any more": Schema(
        each(lambda q, a, b: dict.fromkeys(("chosen", "rejected"), f"[{{'role': 'user', 'content': '{q}'}} {{'role'")),
        refused="column 'chosen', row 0.*looks like messages stored as text, but is neither JSON nor a Python list",
    ),
    **{
        f"messages as {name} prints them": Schema(
            each(
                lambda q, a, b, shown=shown: {
                    name: shown(part) for name, part in conversations(q, a, b).items() if name != "prompt"
                }
            ),
            refused="column 'chosen', row 0.*looks like messages stored as text, but ",
        )
        for name, shown in PRINTED.items()
    },
    "messages as JSON, with a byte-order mark": Schema(
        each(lambda q, a, b: {name: "\ufeff" + json.dumps(part) for name, part in conversations(q, a, b).items()}),
        CHATS,
    ),
    "messages as JSON, with a key twice": Schema(
        each(
            lambda q, a, b: {
                name: json.dumps(part).replace('"role": "user"', '"role": "user", "role": "assistant"')
                for name, part in conversations(q, a, b).items()
            }
        ),
        refused="column 'chosen', row 0.*looks like messages stored as text, but has the key 'role' twice: save",
    ),
    "content in parts of text": Schema(
        each(
            lambda q, a, b: {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": q}]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": a}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": b}]}],
            }
        ),
        CHATS,
    ),
    "content in parts with an image": Schema(
        each(
            lambda q, a, b: {
                "prompt": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": q}]}
                ],
                "chosen": [bot(a)],
                "rejected": [bot(b)],
            }
        ),
        refused="column 'prompt', row 0.*message 0 has a content part that is not text",
    ),
    "single messages": Schema(
        each(lambda q, a, b: {"prompt": [user(q)], "chosen": bot(a), "rejected": bot(b)}), CHATS
    ),
    "messages for the prompt, text for the answers": Schema(
        each(lambda q, a, b: {"prompt": [user(q)], "chosen": a, "rejected": b}), CHATS
    ),
    "text for the prompt, messages for the answers": Schema(
        each(lambda q, a, b: {"prompt": q, "chosen": [bot(a)], "rejected": [bot(b)]}), CHATS
    ),
    "whole conversations beside their prompt": Schema(
        each(lambda q, a, b: {"prompt": [user(q)], **conversations(q, a, b)}), CHATS
    ),
    "whole conversations with a system message beside the prompt": Schema(
        each(
            lambda q, a, b: {
                "prompt": [user(q)],
                "chosen": [{"role": "system", "content": "Be kind"}, user(q), bot(a)],
                "rejected": [{"role": "system", "content": "Be kind"}, user(q), bot(b)],
            }
        ),
        [(*chat(q, a, b, "Be kind"), *s) for q, a, b, s in EACH],
    ),
    "text that repeats its prompt": Schema(
        each(lambda q, a, b: {"prompt": f"{q} ", "chosen": f"{q} {a}", "rejected": f"{q} {b}"}),
        TEXTS,
        log="chosen and rejected repeat their prompt in all 3 text rows",
    ),
    "text that ends with the end token": Schema(
        each(lambda q, a, b: {"prompt": f"{q} ", "chosen": f"{a}</s>", "rejected": b}), TEXTS
    ),
    "scores as text": Schema(
        [{**text_rows(q, a, b), "score_chosen": str(s[0]), "score_rejected": str(s[1])} for q, a, b, s in EACH], TEXTS
    ),
    "a prompt within a word": Schema(
        each(lambda q, a, b: {"chosen": f"{q}: communication", "rejected": f"{q}: community"}),
        [(f"{q}: communi", "cation</s>", "ty</s>", *s) for q, a, b, s in EACH],
    ),
    "a prompt within a special token": Schema(
        each(lambda q, a, b: {"chosen": f"{q}<s>x", "rejected": f"{q}<pad>x"}),
        [(q, "<s>x</s>", "<pad>x</s>", *s) for q, a, b, s in EACH],
    ),
    "letters behind a special token": Schema(
        each(lambda q, a, b: {"chosen": f"{q}<s>A", "rejected": f"{q}<s>B"}),
        [(f"{q}<s>", "A</s>", "B</s>", *s) for q, a, b, s in EACH],
    ),
    "an answer that begins the other": Schema(
        each(lambda q, a, b: {"prompt": f"{q} ", "chosen": f"{a} indeed", "rejected": a}),
        [(f"{q} ", f"{a} indeed</s>", f"{a}</s>", *s) for q, a, b, s in EACH],
    ),
    "a prompt that ends with the assistant": Schema(
        each(lambda q, a, b: {"prompt": [user(q), bot("Well,")], "chosen": [bot(a)], "rejected": [bot(b)]}),
        [(f"<s>user:{q}</s><s>assistant:Well,</s><s>assistant:", f"{a}</s>", f"{b}</s>", *s) for q, a, b, s in EACH],
        log="3 of 3 prompts end with the assistant's turn",
    ),
    "turns of the user in the answers": Schema(
        each(
            lambda q, a, b: {
                "prompt": [user(q)],
                "chosen": [bot(a), user("and"), bot("ok")],
                "rejected": [bot(b), user("and"), bot("no")],
            }
        ),
        [
            (
                f"<s>user:{q}</s><s>assistant:",
                f"{a}</s><s>user:and</s><s>assistant:ok</s>",
                f"{b}</s><s>user:and</s><s>assistant:no</s>",
                *s,
            )
            for q, a, b, s in EACH
        ],
        log="in 3 of 3 rows a completion holds turns of the user",
    ),
    "a mixture's other set": Schema(each(text_rows, further="x"), TEXTS),
    "openbmb/UltraFeedback": Schema(
        [{"instruction": q, "completions": [{"response": a}, {"response": b}]} for q, a, b, _ in EACH],
        refused="no column 'chosen' and no column 'rejected'",
    ),
    "PKU-Alignment/PKU-SafeRLHF": Schema(
        [{"prompt": q, "response_0": a, "response_1": b, "better_response_id": 0} for q, a, b, _ in EACH],
        refused="no column 'chosen' and no column 'rejected'",
    ),
    "berkeley-nest/Nectar": Schema(
        [{"prompt": q, "answers": [{"answer": a, "rank": 1.0}, {"answer": b, "rank": 2.0}]} for q, a, b, _ in EACH],
        refused="no column 'chosen' and no column 'rejected'",
    ),
    "stanfordnlp/SHP": Schema(
        [{"history": q, "human_ref_A": a, "human_ref_B": b, "labels": 1} for q, a, b, _ in EACH],
        refused="no column 'chosen' and no column 'rejected'",
    ),
}


def trainer_of(base: str, folder: str, tokenizer: Any, out: Any, rows: Any, options: Mapping[str, Any]) -> Any:
    cls, config_cls = {"cpo": (GapPOTrainer, GapPOConfig), "dpo": (MarginDPOTrainer, GapPODPOConfig)}[base]
    more = {} if isinstance(rows, Dataset) else {"max_steps": 1}
    config = config_cls(**quiet(output_dir=str(out), max_length=256, per_device_train_batch_size=3, **options, **more))
    return cls(load(folder), args=config, train_dataset=rows, processing_class=tokenizer)


def seen_by_trainer(base: str, trainer: Any) -> list[Right]:
    """Prompt, completions and scores of the first batch, as text."""
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    scores = [batch["pair_columns"][name].tolist() for name in ("score_chosen", "score_rejected")]
    decode = trainer.processing_class.decode
    found = []
    for row, *pair in zip(rows, *scores, strict=True):
        if base == "dpo":
            parts = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
        else:
            parts = [row["prompt_input_ids"]]
            for side in ("chosen", "rejected"):
                n_prompt = sum(label == -100 for label in row[f"{side}_labels"])
                assert list(row[f"{side}_input_ids"][:n_prompt]) == list(row["prompt_input_ids"])
                parts.append(row[f"{side}_input_ids"][n_prompt:])
        found.append((*map(decode, parts), *pair))
    return found


def plain_logps(model: Any, tokenizer: Any, right: Right) -> list[float]:
    """Of each completion, by a forward of the model on that row alone."""
    found = []
    start = tokenizer(right[0], add_special_tokens=False)["input_ids"]
    for completion in right[1:3]:
        end = tokenizer(completion, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([start + end])).logits[0, :-1].log_softmax(-1)
        found.append(sum(logps[len(start) + i - 1, token].item() for i, token in enumerate(end)))
    return found


@pytest.mark.parametrize("name", HUB)
def test_a_schema_means_the_same_to_every_command(name, tiny_model, tokenizer, tmp_path, caplog):
    schema = HUB[name]
    options = dict(schema.options)
    columns = {key: value for key, value in options.items() if key != "score_columns"}
    dataset = Dataset.from_list(schema.rows)
    sets = {
        (base, kind): dataset if kind == "loaded" else dataset.to_iterable_dataset()
        for base in ("cpo", "dpo")
        for kind in ("loaded", "streamed")
    }
    if schema.refused:
        for (base, _), rows in sets.items():
            with pytest.raises(ValueError, match=schema.refused):
                trainer_of(base, tiny_model, tokenizer, tmp_path, rows, options)
        if "chosen" in dataset.column_names:
            with pytest.raises(ValueError, match=schema.refused):
                evaluation_set(dataset, "here", **options)
            found = audit({"train": dataset}, **options).splits["train"]
            assert not found.n_read or found.refused
            with pytest.raises(ValueError, match=schema.refused):
                add_evaluation_factor(dataset)
            with pytest.raises(ValueError, match=schema.refused):
                mixed([("first", dataset), ("second", Dataset.from_list(HUB["a mixture's other set"].rows))])
        return
    with caplog.at_level(logging.INFO, "trl_margins"):
        for (base, kind), rows in sets.items():
            trainer = trainer_of(base, tiny_model, tokenizer, tmp_path, rows, options)
            assert seen_by_trainer(base, trainer) == schema.right, (base, kind)
    if schema.log:
        assert any(re.search(schema.log, message) for message in caplog.messages)
    model = load(tiny_model)
    evaluated = evaluation_set(dataset, "here", **options)
    scored = completion_logps(model, tokenizer, evaluated.rows, max_length=256)
    assert [tuple(pair) for pair in evaluated.scores] == [right[3:] for right in schema.right]
    for right, found in zip(schema.right, scored, strict=True):
        torch.testing.assert_close(found.logps.tolist(), plain_logps(model, tokenizer, right), rtol=1e-5, atol=1e-5)
    if not columns:  # which the other commands do not name
        together = mixed([("first", dataset), ("second", Dataset.from_list(HUB["a mixture's other set"].rows))])
        tokens = tokenize(list(open_rows(together, "together"))[:3], tokenizer)
        assert [tuple(map(tokenizer.decode, (row.prompt, *row.completions))) for row in tokens] == [
            right[:3] for right in schema.right
        ]
        said = [[part.removesuffix("</s>") for part in right[1:3]] for right in schema.right]
        if all("</s>" not in text for pair in said for text in pair) and "word" not in name:
            factors = compute([pair[0] for pair in said], [pair[1] for pair in said])
            assert add_evaluation_factor(dataset)["evaluation_factor"][:] == factors
    inspected = audit({"train": dataset}, measure=in_tokens_of(tokenizer), **options).splits["train"]
    assert inspected.n_read == 3
    assert not inspected.refused
    assert inspected.methods == {}
    lengths = [
        [len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in right[:3]] for right in schema.right
    ]
    assert [d.mean for d in (inspected.lengths.prompt, inspected.lengths.chosen, inspected.lengths.rejected)] == [
        pytest.approx(sum(column) / 3) for column in zip(*lengths, strict=True)
    ]
