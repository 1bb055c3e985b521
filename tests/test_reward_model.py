"""`score --reward_model`: the scores are those of plain transformers on one row at a time."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, VOCABULARY, byte_tokenizer, load, preference_rows
from datasets import Dataset
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from said import word_for_word  # noqa: F401 - its messages are held against said/
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from trl_margins.cli import main
from trl_margins.generation import reward_model
from trl_margins.generation.reward_model import reward_scores

pytestmark = pytest.mark.rehearsal

ANSWERS = [
    {"prompt": [{"role": "user", "content": "a red cat?"}], "responses": ["no", "yes, a large one", ""]},
    {
        "prompt": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "and a bird?"},
        ],
        "responses": [" it sings\n", "over there", "the bird runs near the dog"],
    },
]


def config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**TINY, **{"num_labels": 1, **options})


def saved(model: Any, folder: Path, side: str = "right", **tokens: Any) -> str:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return saved(LlamaForSequenceClassification(config(pad_token_id=0)), tmp_path_factory.mktemp("rm"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(path, "rt")]


def alone(folder: str, messages: list[dict[str, str]], label: int = 0) -> float:
    """As a model card says: one conversation, by the tokenizer's template."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return float(model(ids["input_ids"]).logits[0, label])


def expected(folder: str) -> list[list[float]]:
    said = [[row["prompt"] + [{"role": "assistant", "content": text}] for text in row["responses"]] for row in ANSWERS]
    return [[alone(folder, messages) for messages in some] for some in said]


@pytest.mark.parametrize("batch_size", ["1", "4"])
@pytest.mark.parametrize(
    ("kind", "side", "pad", "padding"),
    [
        ("llama", "right", "<pad>", 0),
        ("llama", "left", "<pad>", 0),
        ("llama", "right", None, None),  # neither tokenizer nor model has a padding token
        ("llama", "left", "</s>", 2),  # which is the end token
        ("gpt2", "left", "<pad>", 0),  # with learned positions
    ],
)
def test_as_plain_transformers_on_one_row(kind, side, pad, padding, batch_size, tmp_path):
    torch.manual_seed(1)
    if kind == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=0
            )
        )
    else:
        model = LlamaForSequenceClassification(config(pad_token_id=padding))
    folder = saved(model, tmp_path / "rm", side, pad_token=pad)
    data, out = write(tmp_path / "answers.jsonl", ANSWERS), tmp_path / "scored.jsonl.gz"
    command = ["score", data, "--reward_model", folder, "--out", str(out), "--batch_size", batch_size]
    assert main([*command, "--dtype", "float32"]) == 0
    made = read(out)
    assert [row["responses"] for row in made] == [row["responses"] for row in ANSWERS]
    for row, scores in zip(made, expected(folder), strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert not list(tmp_path.glob("scored.jsonl.gz.*"))


def test_pairs(folder, tmp_path, capsys):
    rows = preference_rows(3, "conversational").remove_columns(["score_chosen", "score_rejected"])
    rows.to_json(tmp_path / "pairs.jsonl.gz")
    out = tmp_path / "scored.jsonl.gz"
    command = ["score", str(tmp_path / "pairs.jsonl.gz"), "--reward_model", folder, "--output", str(out)]
    assert main([*command, "--dtype", "float32"]) == 0
    for row, made in zip(rows, read(out), strict=True):
        for side in ("chosen", "rejected"):
            assert made[f"score_{side}"] == pytest.approx(alone(folder, row["prompt"] + row[side]), abs=1e-5)
            assert made[side] == row[side]
    assert capsys.readouterr().out.split("\n")[0].split() == (
        ["rewards", "rows", "answers", "mean", "25", "%", "median", "75", "%", "best", "−", "worst"]
    )
    with pytest.raises(ValueError, match=r"has a column 'score_chosen' already: .*--overwrite"):
        main(["score", str(out), "--reward_model", folder])


def test_text_is_the_users_message_where_there_is_a_template(folder, tmp_path):
    data = write(tmp_path / "text.jsonl", [{"prompt": "a cat?", "responses": ["yes", "no"]}])
    out = tmp_path / "scored.jsonl.gz"
    assert main(["score", data, "--reward_model", folder, "--out", str(out), "--dtype", "float32"]) == 0
    user = {"role": "user", "content": "a cat?"}
    scores = [alone(folder, [user, {"role": "assistant", "content": text}]) for text in ("yes", "no")]
    assert read(out)[0]["scores"] == pytest.approx(scores, abs=1e-5)


def test_what_the_template_leaves_out_is_said(folder, tmp_path, caplog):
    """A system message, and a key of a message."""
    shutil.copytree(folder, other := str(tmp_path / "other"))
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    (Path(other) / "chat_template.jinja").write_text(template)
    asked = [{"role": "system", "content": "in French"}, {"role": "user", "content": "a cat?"}]
    answers = [[{"role": "assistant", "content": text, "reasoning_content": "why"}] for text in ("yes", "no")]
    data = write(tmp_path / "chat.jsonl", [{"prompt": asked, "responses": answers}])
    assert (
        main(["score", data, "--reward_model", other, "--out", str(tmp_path / "s.jsonl"), "--dtype", "float32"]) == 0
    )
    assert "the tokens do not spell the text, such as 'in French'" in caplog.text
    assert "two end tokens" not in caplog.text
    assert (
        "'reasoning_content' is in 1 rows (the first is row 0), and the chat template does not read it" in caplog.text
    )


def test_two_end_tokens_are_said(folder, tmp_path, caplog):
    end = AutoTokenizer.from_pretrained(folder).eos_token
    shutil.copytree(folder, other := str(tmp_path / "other"))
    template = f"{{% for m in messages %}}{{{{ m['content'] + '{end}' }}}}{{% endfor %}}"
    (Path(other) / "chat_template.jinja").write_text(template)
    data = write(tmp_path / "a.jsonl", [{"prompt": "a cat?", "responses": ["yes", f"no{end}"]}])
    assert main(["score", data, "--reward_model", other, "--out", str(tmp_path / "s.jsonl")]) == 0
    assert "in 1 of the first 1 rows a completion ends with two end tokens (the first is row 0)" in caplog.text


def test_text_without_a_template_is_as_in_trls_reward_trainer(folder, tmp_path):
    """Tokenized together, with the end token."""
    plain = saved(LlamaForSequenceClassification(config(pad_token_id=0)), tmp_path / "rm", chat_template=None)
    data = write(tmp_path / "text.jsonl", [{"prompt": "a cat? ", "responses": ["yes", "no"]}])
    out = tmp_path / "scored.jsonl.gz"
    assert main(["score", data, "--reward_model", plain, "--out", str(out), "--dtype", "float32"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(plain, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(plain)
    with torch.no_grad():
        scores = [float(model(**tokenizer(f"a cat? {t}</s>", return_tensors="pt")).logits) for t in ("yes", "no")]
    assert read(out)[0]["scores"] == pytest.approx(scores, abs=1e-5)
    chat = write(tmp_path / "chat.jsonl", ANSWERS)
    with pytest.raises(ValueError, match=r"has messages, and the reward model's tokenizer has no chat template"):
        main(["score", chat, "--reward_model", plain, "--out", str(out)])


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SMALL |= {"vocab_size": VOCABULARY, "num_labels": 1, "initializer_range": 0.3, "max_position_embeddings": 64}
ENCODERS = {
    "bert": BertConfig(**SMALL, pad_token_id=0),
    "electra": ElectraConfig(**SMALL, pad_token_id=0, embedding_size=32),
    "roberta": RobertaConfig(**{**SMALL, "max_position_embeddings": 66}, pad_token_id=1, type_vocab_size=1),
    "deberta": DebertaV2Config(
        **SMALL, pad_token_id=0, type_vocab_size=0, relative_attention=True, pooler_hidden_size=32
    ),
    "distilbert": DistilBertConfig(
        vocab_size=VOCABULARY,
        num_labels=1,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "xlnet": XLNetConfig(
        vocab_size=VOCABULARY, num_labels=1, d_model=32, d_inner=64, n_layer=2, n_head=4, initializer_range=0.3
    ),
}


def encoder(kind: str, folder: Path) -> tuple[Any, Any]:
    """A classifier of this kind and a tokenizer that separates two texts, both saved."""
    torch.manual_seed(5)
    config, is_roberta = ENCODERS[kind], kind == "roberta"
    special = ["<s>", "<pad>", "</s>"] if is_roberta else ["[PAD]", "[CLS]", "[SEP]"]
    begin, pad, end = special if is_roberta else (special[1], special[0], special[2])
    words = [*special, "[UNK]", "why", "is", "the", "sky", "blue", "light", "scatters", "no", "yes", "good"]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokens.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}" if is_roberta else f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(each, words.index(each)) for each in (begin, end)],
    )
    names = ["input_ids", "attention_mask", *([] if is_roberta else ["token_type_ids"])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        cls_token=begin,
        sep_token=end,
        pad_token=pad,
        unk_token="[UNK]",
        model_input_names=names,
    )
    if kind == "xlnet":  # has no limit of its own
        tokenizer.model_max_length = 64
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_reads_prompt_and_answer_as_plain_transformers_does(kind, tmp_path, caplog):
    """With its token types, and no longer than its positions; OpenAssistant's ELECTRA and DeBERTa are such models."""
    model, tokenizer = encoder(kind, tmp_path / "rm")
    rows = [
        {"prompt": "why is the sky blue", "responses": ["light scatters", "no " * 90, "yes", "good " * 50]},
        {"prompt": "is the sky blue " * 15, "responses": ["yes " * 30]},
    ]
    data, out = write(tmp_path / "answers.jsonl", rows), tmp_path / "scored.jsonl.gz"
    command = ["score", data, "--reward_model", str(tmp_path / "rm"), "--dtype", "float32"]
    with caplog.at_level(logging.WARNING):
        assert main([*command, "--out", str(out)]) == 0
    scores, as_one = [], []
    for prompt, answer in [(row["prompt"], answer) for row in rows for answer in row["responses"]]:
        inputs = tokenizer(prompt, answer, truncation=True, max_length=64, return_tensors="pt")
        if kind == "distilbert":  # takes no token types
            del inputs["token_type_ids"]
        with torch.no_grad():
            scores.append(float(model(**inputs).logits))
            as_one.append(float(model(inputs["input_ids"]).logits))
    assert [score for row in read(out) for score in row["scores"]] == pytest.approx(scores, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 5
    if kind in ("bert", "electra"):
        assert all(abs(a - b) > 1e-3 for a, b in zip(scores, as_one, strict=True))
    assert "2 of 5 answers are cut, with their prompts, at 64 tokens (--max_length)" in caplog.text
    if kind not in ("deberta", "xlnet"):  # whose positions are relative
        with pytest.raises(
            ValueError, match="max_length must be at most 64, for which the reward model has positions"
        ):
            main([*command, "--max_length", "65"])


def test_messages_without_a_template_are_lines(tmp_path, caplog):
    model, tokenizer = encoder("bert", tmp_path / "rm")
    data, out = write(tmp_path / "chat.jsonl", ANSWERS), tmp_path / "scored.jsonl.gz"
    with caplog.at_level(logging.WARNING):
        main(["score", data, "--reward_model", str(tmp_path / "rm"), "--dtype", "float32", "--out", str(out)])
    lines = "\n".join(message["content"] for message in ANSWERS[1]["prompt"])
    with torch.no_grad():
        score = float(model(**tokenizer(lines, ANSWERS[1]["responses"][0], return_tensors="pt")).logits)
    assert read(out)[1]["scores"][0] == pytest.approx(score, abs=1e-5)
    assert "train: 1 of 2 prompts have several messages, and the reward model's tokenizer has no chat" in caplog.text


def test_the_tokenizers_limit_counts_too(tmp_path, caplog):
    _, tokenizer = encoder("bert", tmp_path / "rm")
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(tmp_path / "rm")
    data = write(tmp_path / "answers.jsonl", [{"prompt": "why", "responses": ["no " * 30]}])
    with caplog.at_level(logging.WARNING):
        main(["score", data, "--reward_model", str(tmp_path / "rm")])
    assert "1 of 1 answers are cut, with their prompts, at 20 tokens" in caplog.text


def test_a_head_without_weights_is_no_reward_model(tiny_model, tmp_path):
    data = write(tmp_path / "answers.jsonl", ANSWERS)
    with pytest.raises(ValueError, match=r"is no reward model: it has no weights for score.weight, so its scores"):
        main(["score", data, "--reward_model", tiny_model])


def test_an_adapter_with_a_head(folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(3)
    peft = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules="all-linear"))
    peft.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    data, out = write(tmp_path / "answers.jsonl", ANSWERS[:1]), tmp_path / "scored.jsonl.gz"
    adapter = str(tmp_path / "adapter")
    assert main(["score", data, "--reward_model", adapter, "--out", str(out), "--dtype", "float32"]) == 0
    messages = ANSWERS[0]["prompt"] + [{"role": "assistant", "content": "no"}]
    ids = byte_tokenizer().apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        assert read(out)[0]["scores"][0] == pytest.approx(float(peft.eval()(input_ids=ids).logits), abs=1e-4)
    assert read(out)[0]["scores"][0] != pytest.approx(alone(folder, messages), abs=1e-3)


def test_an_adapter_without_a_head_is_no_reward_model(tiny_model, tmp_path):
    get_peft_model(load(tiny_model), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "answers.jsonl", ANSWERS)
    with pytest.raises(ValueError, match=r"is no reward model: it has no weights for score\.weight"):
        main(["score", data, "--reward_model", str(tmp_path / "adapter")])


def test_an_adapter_of_virtual_tokens_is_no_reward_model(folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    peft = get_peft_model(base, PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    peft.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "answers.jsonl", ANSWERS)
    with pytest.raises(ValueError, match=r"adapter is an adapter of the kind P_TUNING, which cannot be merged into"):
        main(["score", data, "--reward_model", str(tmp_path / "adapter")])


def test_several_labels_need_one(tmp_path):
    torch.manual_seed(2)
    folder = saved(LlamaForSequenceClassification(config(pad_token_id=0, num_labels=3)), tmp_path / "rm")
    data, out = write(tmp_path / "answers.jsonl", ANSWERS[:1]), tmp_path / "scored.jsonl.gz"
    command = ["score", data, "--reward_model", folder, "--out", str(out), "--dtype", "float32"]
    with pytest.raises(ValueError, match=r"has 3 labels: say which .* \(--reward_label, from 0 to 2\)"):
        main(command)
    with pytest.raises(ValueError, match=r"reward_label must be below 3"):
        main([*command, "--reward_label", "3"])
    assert main([*command, "--reward_label", "1"]) == 0
    messages = ANSWERS[0]["prompt"] + [{"role": "assistant", "content": "no"}]
    assert read(out)[0]["scores"][0] == pytest.approx(alone(folder, messages, 1), abs=1e-5)


class WithScore(torch.nn.Module):
    """As ArmoRM: 19 objectives in `logits`, and `score`."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=None, vocab_size=300, get_text_config=lambda: self.config)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        assert self.config.pad_token_id is not None or len(input_ids) == 1
        ends = attention_mask.sum(1) - 1
        score = input_ids.gather(1, ends[:, None])[:, 0].float()
        return SimpleNamespace(logits=torch.zeros(len(score), 19), score=score)


def encoded(*rows: list[list[int]]) -> list[list[dict[str, list[int]]]]:
    return [[{"input_ids": ids} for ids in row] for row in rows]


def test_the_score_of_a_model_that_has_one():
    model = WithScore()
    found = dict(reward_scores(model, encoded([[5, 6, 7], [8]], [[1, 2, 3, 4]]), batch_size=2))
    assert found == {0: [7.0, 8.0], 1: [4.0]}
    assert model.config.pad_token_id is None
    model.config.vocab_size = 9  # no token is left for padding
    found = dict(reward_scores(model, encoded([list(range(9)), [8]]), batch_size=2))
    assert found == {0: [8.0, 8.0]}


def test_what_is_cut_is_counted(folder, tmp_path, caplog):
    data = write(tmp_path / "answers.jsonl", ANSWERS)
    with caplog.at_level(logging.WARNING):
        main(["score", data, "--reward_model", folder, "--max_length", "40"])
    (said,) = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
    assert said == "4 of 6 answers are cut, with their prompts, at 40 tokens (--max_length)"


def test_a_stopped_run_is_continued(folder, tmp_path, monkeypatch):
    data, out = write(tmp_path / "answers.jsonl", ANSWERS), tmp_path / "scored.jsonl.gz"
    command = ["score", data, "--reward_model", folder, "--out", str(out), "--batch_size", "1", "--dtype", "float32"]
    asked = []
    whole = reward_model._scores

    def scores(model: Any, rows: Any, label: Any) -> Any:
        asked.append(rows)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return whole(model, rows, label)

    monkeypatch.setattr(reward_model, "_scores", scores)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with pytest.raises(ValueError, match="max_length=512, and this run has 50"):
        main([*command, "--max_length", "50"])
    assert main(command) == 0
    assert len(asked) == 4 + 3  # three of the first row, whose scores were kept
    for row, scores_alone in zip(read(out), expected(folder), strict=True):
        assert row["scores"] == pytest.approx(scores_alone, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward_model", "FOLDER", "--metric", "jaccard"], "metric is for an evaluation factor: leave it out, or"),
        (["--max_length", "8"], "max_length is for a reward model: name one with --reward_model"),
        (["--reward_model", "FOLDER", "--reward_label", "-1"], "reward_label must be a whole number, at least 0"),
        (["--reward_model", "/no/such"], "there is no model folder /no/such"),
    ],
)
def test_bad_options(options, message, folder, tmp_path):
    data = write(tmp_path / "answers.jsonl", ANSWERS)
    with pytest.raises(ValueError, match=message):
        main(["score", data, *(folder if each == "FOLDER" else each for each in options)])


def test_bad_rows(folder, tmp_path):
    for bad, message in (
        ({"prompt": "a", "responses": []}, "column 'responses', row 1 of the train data set: .* is not a list of one"),
        (
            {"prompt": "a", "responses": ["b", None]},
            "column 'responses', row 1 of the train data set, response 1: the answer is None: take it out of the row",
        ),
        ({"prompt": None, "responses": ["b"]}, "column 'prompt', row 1 of the train data set: the prompt is None"),
    ):
        data = write(tmp_path / "bad.jsonl", [{"prompt": "a", "responses": ["b"]}, bad])
        with pytest.raises(ValueError, match=message):
            main(["score", data, "--reward_model", folder])


def user_says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def bot_says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("form", ["ultrafeedback", "nectar", "distilabel", "simpo"])
def test_lists_of_others(form, folder, tmp_path, caplog):
    """Each answer has the score that it has alone, and `pairs` goes by the new scores, not by the old ones."""
    texts = ["yes", "no", "maybe"]
    of_models = dict(zip("xyz", texts, strict=True))
    rows: dict[str, dict[str, Any]] = {
        "ultrafeedback": {
            "instruction": "a cat?",
            "completions": [{"response": t, "model": m, "overall_score": 1.0} for m, t in of_models.items()],
        },
        "nectar": {
            "prompt": "\n\nHuman: a cat? \n\nAssistant: ",
            "answers": [{"answer": t, "model": m, "rank": 1.0} for m, t in of_models.items()],
        },
        "distilabel": {
            "instruction": "a cat?",
            "generations": texts,
            "model_names": list("xyz"),
            "ratings": [1.0, 1.0, 1.0],
        },
        "simpo": {
            "prompt": "a cat?",
            "all_generated_responses": texts,
            "all_rm_scores": [1.0, 1.0, 1.0],
            "chosen": user_says("a cat?") + bot_says("an old one"),
            "rejected": user_says("a cat?") + bot_says("another old one"),
        },
    }
    data, out = write(tmp_path / "lists.jsonl", [rows[form]]), tmp_path / "scored.jsonl.gz"
    argv = ["score", data, "--reward_model", folder, "--dtype", "float32", "--out", str(out)]
    assert main(argv) == 0
    (row,) = read(out)
    scores = [alone(folder, user_says("a cat?") + bot_says(text)) for text in texts]
    assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert {name: row[name] for name in rows[form]} == rows[form]
    assert ("chosen and rejected stay as they are" in caplog.text) == (form == "simpo")
    assert main(["pairs", str(out), "--as_chat", "true", "--out", str(tmp_path / "pairs.jsonl.gz")]) == 0
    (pair,) = read(tmp_path / "pairs.jsonl.gz")
    best, worst = (texts[scores.index(end(scores))] for end in (max, min))
    assert (pair["chosen"], pair["rejected"]) == (bot_says(best), bot_says(worst))
    assert (pair["prompt"], pair["score_chosen"]) == (user_says("a cat?"), pytest.approx(max(scores), abs=1e-5))
    if form != "simpo":
        assert of_models[pair["chosen_model"]] == best


def test_dialogues_in_text(folder, tmp_path):
    """As HH has them: the blank between the mark and the answer is no part of the turn."""
    texts = ["yes", "no"]
    dialogues = [f"\n\nHuman: a cat? \n\nAssistant: {text}" for text in texts]
    data = write(tmp_path / "hh.jsonl", [dict(zip(("chosen", "rejected"), dialogues, strict=True))])
    out = tmp_path / "scored.jsonl.gz"
    assert main(["score", data, "--reward_model", folder, "--dtype", "float32", "--out", str(out)]) == 0
    (row,) = read(out)
    scores = [alone(folder, user_says("a cat?") + bot_says(text)) for text in texts]
    assert [row["score_chosen"], row["score_rejected"]] == pytest.approx(scores, abs=1e-5)


def test_a_list_without_answers_has_no_scores(folder, tmp_path):
    """As some rows of UltraFeedback."""
    rows = [{"instruction": "a cat?", "completions": some} for some in ([{"response": "yes"}], [])]
    out = tmp_path / "scored.jsonl.gz"
    data = write(tmp_path / "lists.jsonl", rows)
    assert main(["score", data, "--reward_model", folder, "--dtype", "float32", "--out", str(out)]) == 0
    assert [len(row["scores"]) for row in read(out)] == [1, 0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a cat?", "response_0": "yes", "response_1": "no", "better_response_id": 1},
        {"prompt": "a cat?", "response": "yes", "helpfulness": 4},
        {
            "conversation_a": user_says("a cat?") + bot_says("yes"),
            "conversation_b": user_says("a cat?") + bot_says("no"),
            "winner": "tie",
        },
    ],
)
def test_answers_that_are_in_no_list(row, folder, tmp_path):
    """Are refused by name; the advice is run as it is printed."""
    data = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"has its answers in '(response|response_0|conversation_a)'") as error:
        main(["score", data, "--reward_model", folder])
    advice = str(error.value)[str(error.value).index("dataset.map") :]
    made = eval(advice, {"dataset": Dataset.from_list([row])})
    rows, are_lists = reward_model.rows_to_score(made, "set")
    assert are_lists
    assert [each.texts for each in rows] == [("a cat?", ["yes", "no"][: 1 + ("response" not in row)])]


def test_a_score_that_is_no_number():
    model = WithScore()
    model.forward = lambda **_: SimpleNamespace(logits=torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match=r"scores the answers of row 1 with \[nan\]: try another precision"):
        list(reward_scores(model, encoded([[2]], [[1]]), some=[1]))


def test_a_token_that_the_reward_model_does_not_have(tmp_path):
    where = saved(LlamaForSequenceClassification(config(pad_token_id=0)), tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(where)
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "q ", "chosen": "a", "rejected": "b<new>"}])
    said = f"row 0 of train has the token {VOCABULARY}, and the embedding of {where} has {VOCABULARY} rows"
    with pytest.raises(ValueError, match=said):
        main(["score", rows, "--reward_model", where])
