"""GAPO's analyses: the same pairs at several checkpoints, subsets and KL drift, the LM head's Hessian."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, byte_tokenizer, load, preference_rows, saved
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from trl_margins.cli import main, select
from trl_margins.data.noise import flip_labels
from trl_margins.evaluation import drift
from trl_margins.evaluation.hessian import head_spectrum
from trl_margins.evaluation.scorer import completion_tokens
from trl_margins.probes.selection import subsets
from trl_margins.rows import open_rows

pytestmark = pytest.mark.rehearsal

SOFTCAP = 3.0  # so small that it changes the tiny model's logits


def small_model(kind, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, **sizes}
    sizes |= {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "initializer_range": 0.5, "pad_token_id": 0}
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**{"head_dim": 8, **sizes}, final_logit_softcapping=SOFTCAP)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")).eval()


def moved(model, noise=0.05):
    """Another model of the same architecture."""
    other, generator = type(model)(model.config).eval().to(model.dtype), torch.Generator().manual_seed(1)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return other


def texts(n, **options):
    """Prompt and two completions, as rows of our reader and as plain tokens of the byte-level tokenizer."""
    rows = preference_rows(n, "conversational", **options)
    return rows, [plain_tokens(byte_tokenizer(), row) for row in rows]


def plain_tokens(tokenizer, row):
    """(prompt's length, ids of prompt and chosen, of prompt and rejected), by transformers alone."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    both = [tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")]
    assert all(ids[: len(prompt)] == prompt for ids in both)
    return len(prompt), *both


# KL drift


@pytest.mark.parametrize("kind", ["untied", "tied", "gemma2"])
@pytest.mark.parametrize("few", [2**28, 8 * VOCABULARY * 3])  # the second: three tokens at a time
def test_kl_is_that_of_the_whole_logits(kind, few, monkeypatch):
    monkeypatch.setattr(drift, "FEW_LOGITS", few)
    model = small_model(kind)
    other = moved(model)
    rows, plain = texts(5, seed=3)
    tokens = completion_tokens(model, byte_tokenizer(), list(open_rows(rows, "train")))
    for (start, *both), kls in zip(plain, drift.completion_kl(model, other, tokens, batch_size=4), strict=True):
        for ids, kl in zip(both, kls, strict=True):
            with torch.no_grad():
                ours, theirs = (
                    each(torch.tensor([ids])).logits[0, start - 1 : -1].double() for each in (model, other)
                )
            assert len(ours) == len(ids) - start
            expected = F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), reduction="sum", log_target=True)
            assert expected > 1e-2
            assert kl == pytest.approx(expected.item(), rel=1e-4)


def test_kl_of_an_encoder_decoder_model(tiny_encoder_decoder):
    model, other = load(tiny_encoder_decoder).eval(), load(tiny_encoder_decoder, noise=0.05).eval()
    tokenizer = byte_tokenizer()
    rows = list(open_rows(preference_rows(3), "train"))
    tokens = completion_tokens(model, tokenizer, rows, max_length=64)
    for row, kls in zip(tokens, drift.completion_kl(model, other, tokens), strict=True):
        for ids, kl in zip(row.ids, kls, strict=True):
            inputs = {"input_ids": torch.tensor([row.prompt]), "labels": torch.tensor([ids])}
            with torch.no_grad():
                ours, theirs = (each(**inputs).logits[0].double().log_softmax(-1) for each in (model, other))
            assert kl == pytest.approx((ours.exp() * (ours - theirs)).sum().item(), rel=1e-4)


def test_drift_from_the_command_line(tiny_model, tokenizer, tmp_path, capsys):
    """The mean over all tokens of both completions; from a model to itself there is none."""
    rows = preference_rows(6, "conversational", seed=3)
    rows.to_json(tmp_path / "pairs.jsonl")
    torch.manual_seed(0)
    adapted = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    reports = {}
    for name in (str(tmp_path / "adapter"), tiny_model):
        argv = ["evaluate", "--model_name_or_path", name, "--dataset_name", str(tmp_path / "pairs.jsonl")]
        argv += ["--drift_from", tiny_model, "--json", str(tmp_path / "n.json"), "--bootstrap", "50"]
        assert main([*argv, "--max_length", "128"]) == 0
        reports[name] = json.loads((tmp_path / "n.json").read_text())["sets"]["pairs"]
        assert "KL drift (nats per token)" in capsys.readouterr().out
    tokens = completion_tokens(adapted, tokenizer, list(open_rows(rows, "train")), max_length=128)
    kls = drift.completion_kl(adapted, load(tiny_model), tokens)
    found, none = reports.values()
    total = np.sum(kls) / sum(label != -100 for row in tokens for labels in row.labels for label in labels)
    assert found["kl_drift"] == pytest.approx(total, rel=1e-4)
    assert found["intervals"]["kl_drift"][0] < total < found["intervals"]["kl_drift"][1]
    assert none["kl_drift"] == pytest.approx(0, abs=1e-6)


def test_a_reference_model_with_other_tokens(tiny_model, tmp_path, caplog):
    """Refused where most ids are others, warned of where some are, as of a model that has named reserved tokens."""
    preference_rows(2).to_json(tmp_path / "pairs.jsonl")
    argv = ["evaluate", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    argv += ["--reward", "log-ratio", "--ref_model"]
    for name, n_turned in {"some": 2, "most": 200}.items():
        folder = shutil.copytree(tiny_model, tmp_path / name)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        of_ids = [token for token in tokenizer["model"]["vocab"] if len(token) == 1][:n_turned]
        for at, token in enumerate(of_ids):
            tokenizer["model"]["vocab"][token] += 1 if at < len(of_ids) - 1 else 1 - len(of_ids)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main([*argv, str(tmp_path / "some")]) == 0
    assert re.search(r"2 of \d+ ids of .* are other tokens to the reference model .*some \(id \d+ is ", caplog.text)
    with pytest.raises(ValueError, match=r"200 of \d+ ids of .*: it would score other texts. Give --ref_model"):
        main([*argv, str(tmp_path / "most")])
    shutil.copytree(tiny_model, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    assert main([*argv, str(tmp_path / "bare")]) == 0
    assert "bare has no tokenizer: is it one with the tokens of" in caplog.text


@pytest.mark.parametrize("of_reference", [False, True])
def test_a_token_without_a_row_in_the_embedding(of_reference, tiny_model, tmp_path):
    Dataset.from_list([{"prompt": "q ", "chosen": "a", "rejected": "b<new>"}]).to_json(tmp_path / "pairs.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<new>"])
    wider = load(tiny_model)
    wider.resize_token_embeddings(VOCABULARY + of_reference)
    saved(wider, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, rows = str(tmp_path / "model"), str(tmp_path / "pairs.jsonl")
    argv = ["evaluate", "--model_name_or_path", model, "--dataset_name", rows]
    argv += ["--reward", "log-ratio", "--ref_model", str(tiny_model)] if of_reference else []
    named = tiny_model if of_reference else model
    said = rf"row 0 of pairs has the token {VOCABULARY}, and the embedding of {named} has {VOCABULARY} rows"
    with pytest.raises(ValueError, match=said):
        main(argv)


def test_drift_from_another_vocabulary_is_refused(tiny_model, tmp_path):
    preference_rows(2).to_json(tmp_path / "pairs.jsonl")
    wider = load(tiny_model)
    wider.resize_token_embeddings(VOCABULARY + 5)
    saved(wider, tmp_path / "wider")
    shuffled = shutil.copytree(tiny_model, tmp_path / "shuffled")
    file = shuffled / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":'))
    argv = ["evaluate", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    for name, why in {
        "wider": f"has {VOCABULARY} ids and the other {VOCABULARY + 5}",
        "shuffled": r"id \d+ is '[ab]' in",
    }.items():
        with pytest.raises(
            ValueError, match=f"cannot have drifted from .*{why}.*Give --drift_from the model that its"
        ):
            main([*argv, "--drift_from", str(tmp_path / name)])


def test_an_infinite_drift_is_an_error(tiny_model, tmp_path):
    preference_rows(2).to_json(tmp_path / "pairs.jsonl")
    broken = load(tiny_model)
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    saved(broken, tmp_path / "broken")
    argv = ["evaluate", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    with pytest.raises(ValueError, match="KL divergence is NaN or infinite in 2 of 2 rows, first in row 0"):
        main([*argv, "--drift_from", str(tmp_path / "broken")])


# The LM head's Hessian

BETA, GAMMA = 2.0, 0.8


def dense_spectrum(model, plain):
    """All eigenvalues, of the whole matrix: SimPO's loss in plain torch."""
    hidden, target = [], []
    for start, *both in plain:
        for ids in both:
            with torch.no_grad():
                hidden.append(model.model(torch.tensor([ids])).last_hidden_state[0, start - 1 : -1])
            target.append(torch.tensor(ids[start:]))

    def loss(weight):
        means = []
        for states, ids in zip(hidden, target, strict=True):
            logits = states @ weight.T
            if getattr(model.config, "final_logit_softcapping", None):
                logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
            means.append(-F.cross_entropy(logits, ids))
        means = torch.stack(means)
        return F.softplus(GAMMA - BETA * (means[::2] - means[1::2])).mean()

    weight = model.lm_head.weight.detach()
    matrix = torch.autograd.functional.hessian(loss, weight, vectorize=True).reshape(weight.numel(), -1)
    return np.linalg.eigh(matrix.numpy())[0]


@pytest.mark.parametrize("kind", ["untied", "tied", "gemma2"])
def test_eigenvalues_are_those_of_the_dense_hessian(kind):
    model = small_model(kind, hidden_size=2, head_dim=2).double()
    rows, plain = texts(3, seed=5)
    tokens = completion_tokens(model, byte_tokenizer(), list(open_rows(rows, "train")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = head_spectrum(model, tokens, BETA, GAMMA)
    expected = dense_spectrum(model, plain)
    assert expected.size < 2000
    assert expected[0] < -1e-3
    np.testing.assert_allclose(found, [*expected[:-6:-1], expected[0]], rtol=1e-6)
    in_float32 = head_spectrum(model.float(), tokens, BETA, GAMMA)
    np.testing.assert_allclose(in_float32, found, rtol=1e-4)
    assert all(torch.equal(value, before[name].float()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptEncoderConfig])
def test_an_adapter_of_virtual_tokens_neither_merges_nor_trains_on(kind, tiny_model, tmp_path):
    adapted = get_peft_model(load(tiny_model), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    adapted.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    preference_rows(4).to_json(tmp_path / "pairs.jsonl")
    argv = ["--model_name_or_path", str(tmp_path / "adapter"), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    for command, said in (
        (["hessian"], "cannot be merged into the weights of its base model"),
        (["generate", "--out", str(tmp_path / "a.jsonl")], "cannot be merged into the weights of its base model"),
        (
            ["select", "--output_dir", str(tmp_path / "x")],
            rf"go on with: train a new one on its base model, {tiny_model}",
        ),
        (["train", "--output_dir", str(tmp_path / "x"), "--use_cpu", "true"], "whose training PEFT cannot go on with"),
    ):
        with pytest.raises(ValueError, match=said):
            main([*command, *argv])


def test_hessian_from_the_command_line(tiny_model, tmp_path, capsys):
    """Several models, the same pairs; an adapter as what it is merged to."""
    torch.manual_seed(0)
    preference_rows(9, "conversational", seed=5).to_json(tmp_path / "pairs.jsonl")
    adapted = get_peft_model(
        load(tiny_model), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    saved(adapted.merge_and_unload(), tmp_path / "merged")
    models = [tiny_model, str(tmp_path / "adapter"), str(tmp_path / "merged")]
    argv = ["hessian", "--model_name_or_path", *models, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    assert main([*argv, "--max_pairs", "4", "--batch_size", "2", "--json", str(tmp_path / "h.json")]) == 0
    table = capsys.readouterr().out
    written = json.loads((tmp_path / "h.json").read_text())["eigenvalues"]
    plain, adapter, merged = written.values()
    assert [len(values) for values in plain.values()] == [2, 2, 2]
    assert np.mean(plain["lambda_max"]) > np.mean(plain["top_5_mean"]) > 0 > np.mean(plain["lambda_min"])
    assert f"{np.mean(plain['lambda_max']):.4g} ±" in table
    assert adapter["lambda_max"] == pytest.approx(merged["lambda_max"], rel=1e-3)
    assert adapter["lambda_max"] != pytest.approx(plain["lambda_max"], rel=1e-3)
    lists = [{"prompt": "say ", "responses": ["one", "two"], "scores": [1, 2]}]
    Dataset.from_list(lists).to_json(tmp_path / "lists.jsonl")
    with pytest.raises(ValueError, match="holds no pairs: it needs the columns prompt, chosen and rejected"):
        main([*argv[:-1], str(tmp_path / "lists.jsonl")])


# The same pairs at several checkpoints


def run_with_checkpoints(tiny_model, folder, beta=3.0, ratio=0.2):
    """A run's folder, whose checkpoints would come in another order by their names."""
    for step in (9, 10):
        checkpoint = folder / f"checkpoint-{step}"
        saved(load(tiny_model, noise=0.01 * step), checkpoint)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "checkpoint-11").mkdir()  # a run that was killed left it incomplete
    config = {"beta": beta, "gamma_beta_ratio": ratio, "max_length": 128, "anchor_radius": 0.5}
    info = {"config": config, "margin": "geometric-anchor", "reward": "length-normalized"}
    (folder / "margin_run.json").write_text(json.dumps(info))
    return folder


def independent_gaps(model, plain, size, radius):
    """Γ of every pair under the direction of its group, with plain transformers."""

    def delta(start, *both):
        means = [
            -F.cross_entropy(model(torch.tensor([ids])).logits[0, start - 1 : -1], torch.tensor(ids[start:]))
            for ids in both
        ]
        return means[0] - means[1]

    found = []
    for at in range(0, len(plain), size):
        group = plain[at : at + size]
        gradient = torch.autograd.grad(torch.stack([delta(*pair) for pair in group]).mean(), list(model.parameters()))
        norm = torch.stack([each.square().sum() for each in gradient]).sum().sqrt()
        with torch.no_grad():
            here = [delta(*pair) for pair in group]
            for parameter, each in zip(model.parameters(), gradient, strict=True):
                parameter -= radius * each / norm
            found += [(before - delta(*pair)).item() for before, pair in zip(here, group, strict=True)]
            for parameter, each in zip(model.parameters(), gradient, strict=True):
                parameter += radius * each / norm
    return np.array(found)


def test_anchors_at_two_checkpoints(tiny_model, tmp_path, capsys):
    """Gaps by an independent loop over the same flips; weights, means and thirds by NumPy."""
    rows = preference_rows(12, "conversational", seed=4)
    rows.to_json(tmp_path / "pairs.jsonl")
    run = run_with_checkpoints(tiny_model, tmp_path / "run")
    argv = ["anchors", "--checkpoints", str(run), "--dataset_name", str(tmp_path / "pairs.jsonl")]
    argv += ["--output_dir", str(tmp_path / "out"), "--noise", "random:0.4", "--noise_seed", "7"]
    assert main([*argv, "--batch_size", "2", "--anchor_batch_multiplier", "3"]) == 0
    printed = capsys.readouterr().out
    marked = np.zeros(12, bool)
    marked[np.random.default_rng(7).permutation(12)[:5]] = True
    plain = [plain_tokens(byte_tokenizer(), row) for row in rows]
    plain = [
        (start, *both[::-1]) if flip else (start, *both) for (start, *both), flip in zip(plain, marked, strict=True)
    ]
    with (tmp_path / "out" / "anchors.csv").open() as file:
        lines = list(csv.DictReader(file))
    written = json.loads((tmp_path / "out" / "anchors.json").read_text())
    assert (written["beta"], written["gamma_beta_ratio"]) == (3.0, 0.2)  # the run's
    assert [each["model"] for each in written["at"]] == [str(run / "checkpoint-9"), str(run / "checkpoint-10")]
    for step, at in zip((9, 10), written["at"], strict=True):
        of_step = [line for line in lines if line["model"].endswith(f"-{step}")]
        assert [int(line["row_number"]) for line in of_step] == list(range(12))
        assert [line["is_flipped"] == "1" for line in of_step] == marked.tolist()
        gaps = independent_gaps(load(str(run / f"checkpoint-{step}")), plain, 6, 0.5)
        np.testing.assert_allclose([float(line["anchor_gap"]) for line in of_step], gaps, rtol=1e-3, atol=1e-5)
        weights = 3.0 / (1 + np.exp(3.0 * (gaps - 0.2)))
        np.testing.assert_allclose([float(line["anchor_weight"]) for line in of_step], weights, rtol=1e-3)
        assert at["weight_clean"][0] == pytest.approx(weights[~marked].mean(), rel=1e-3)
        assert at["weight_flipped"][0] == pytest.approx(weights[marked].mean(), rel=1e-3)
        thirds = marked[np.argsort(weights)].reshape(3, 4).mean(1)
        assert [at[f"flip_rate_{tier}"][0] for tier in ("low", "mid", "high")] == thirds.tolist()
        assert f"checkpoint-{step}" in printed
        assert f"{weights[marked].mean():.3f}"[:4] in printed
    assert (tmp_path / "out" / "anchors.png").read_bytes().startswith(b"\x89PNG")


def test_anchors_of_a_drawn_part_of_a_marked_set(tiny_model, tokenizer, tmp_path):
    """With an adapter beside its base; a draw keeps the rows' numbers and their marks."""
    rows = preference_rows(12, seed=4).add_column("is_flipped", [i % 2 == 0 for i in range(12)])
    rows.to_json(tmp_path / "pairs.jsonl")
    adapted = get_peft_model(load(tiny_model), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    argv = ["anchors", "--checkpoints", tiny_model, str(tmp_path / "adapter"), "--max_pairs", "6"]
    argv += ["--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path), "--max_length", "128"]
    assert main(argv) == 0
    with (tmp_path / "anchors.csv").open() as file:
        lines = list(csv.DictReader(file))
    numbers = [int(line["row_number"]) for line in lines]
    assert numbers[:6] == numbers[6:] == sorted(set(numbers))
    assert all(int(line["is_flipped"]) == (number % 2 == 0) for line, number in zip(lines, numbers, strict=True))
    assert {float(line["anchor_gap"]) for line in lines[:6]}.isdisjoint(
        float(line["anchor_gap"]) for line in lines[6:]
    )


def trained_at_rate_0(tiny_model, out, rows, *more, method="geometric-anchor"):
    """A run of one window, after which the weights are what they were; with its checkpoint."""
    rows.to_json(out.parent / "pairs.jsonl")
    argv = ["train", "--method", method, "--model_name_or_path", tiny_model, "--output_dir", str(out)]
    argv += ["--dataset_name", str(out.parent / "pairs.jsonl"), "--learning_rate", "0", "--max_steps", "1"]
    argv += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3", "--max_length", "128"]
    argv += ["--train_sampling_strategy", "sequential", "--save_strategy", "steps", "--save_steps", "1"]
    assert main([*argv, "--report_to", "none", "--use_cpu", "true", "--eval_strategy", "no", *more]) == 0


@pytest.mark.parametrize("options", [(), ("--train_only", "mlp"), ("--anchor_direction", "pair")], ids=str)
def test_anchors_are_those_of_the_run(options, tiny_model, tmp_path):
    """What trained, and the direction: the gaps are those that the run has logged of the same weights."""
    rows = preference_rows(12, seed=4).add_column("is_flipped", [i % 2 == 0 for i in range(12)])
    run = tmp_path / "run"
    trained_at_rate_0(tiny_model, run, rows, "--anchor_batch_multiplier", "2", *options)
    argv = [
        "anchors",
        "--checkpoints",
        str(run),
        "--dataset_name",
        str(tmp_path / "pairs.jsonl"),
    ]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    found = Dataset.from_csv(str(tmp_path / "out" / "anchors.csv"))
    logged = Dataset.from_csv(str(run / "pair_log.csv"))
    np.testing.assert_allclose(found["anchor_gap"], logged["anchor_gap"], atol=1e-4)
    np.testing.assert_allclose(found["anchor_weight"], logged["anchor_weight"], atol=1e-4)


def test_another_methods_beta_is_no_weight_s(tiny_model, tmp_path, caplog):
    """A DPO run's, first among the models, beside a GAPO run's; and alone."""
    rows = preference_rows(12, seed=4).add_column("is_flipped", [i % 2 == 0 for i in range(12)])
    trained_at_rate_0(tiny_model, tmp_path / "dpo", rows, "--beta", "0.01", method="dpo")
    gapo = run_with_checkpoints(tiny_model, tmp_path / "gapo")
    argv = ["anchors", "--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path), "--checkpoints"]
    for runs, expected in (((str(tmp_path / "dpo"), str(gapo)), (3.0, 0.2)), ((str(tmp_path / "dpo"),), (2.5, 0.1))):
        assert main([*argv, *runs]) == 0
        written = json.loads((tmp_path / "anchors.json").read_text())
        assert (written["beta"], written["gamma_beta_ratio"]) == expected
    assert (
        "no model is of a GAPO run with the length-normalized reward: the weight has β 2.5 and γ/β 0.1" in caplog.text
    )


@pytest.mark.parametrize(
    ("run", "is_gapo"),
    [
        ({"margin": "geometric-anchor", "reward": "length-normalized"}, True),
        ({"margin": "geometric-anchor, odpo", "reward": "length-normalized"}, True),
        ({"margin": "geometric-anchor", "reward": "log-ratio"}, False),
        ({"margin": None, "reward": "length-normalized"}, False),
        ({}, False),
    ],
)
def test_runs_of_gapo(run, is_gapo):
    assert select._is_gapo(run) == is_gapo


def test_drawn_pairs_and_random_parts_are_flipped_at_the_noise_s_rate(tiny_model, tmp_path):
    """All seeds are 0 by default: draws with the same numbers as the flips would take the flipped pairs first."""
    rows = preference_rows(60, seed=4)
    rows.to_json(tmp_path / "pairs.jsonl")
    argv = ["anchors", "--checkpoints", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl"), "--max_length"]
    argv += ["128", "--output_dir", str(tmp_path), "--noise", "random:0.3", "--max_pairs", "30"]
    assert main(argv) == 0
    drawn = Dataset.from_csv(str(tmp_path / "anchors.csv"))["is_flipped"]
    assert 4 <= sum(drawn) <= 14  # of 9 that are expected
    flipped = flip_labels(preference_rows(1000), 0.3, "random", seed=0)["is_flipped"]
    random = subsets(np.zeros(1000), 0.2, seed=0)["random"]
    assert np.asarray(flipped)[random].mean() == pytest.approx(0.3, abs=0.1)


def test_anchors_of_nothing_to_compare_are_refused(tiny_model, tmp_path):
    preference_rows(4).to_json(tmp_path / "pairs.jsonl")
    argv = ["anchors", "--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out")]
    for more, words in {
        (tiny_model,): r"has no column 'is_flipped': give --noise and --noise_seed as in the training",
        (tiny_model, "--noise", "random:0"): "none of the 4 pairs are flipped: there is nothing to compare",
        (tiny_model, "--noise", "often:0.2"): "noise is written KIND:RATE",
        (str(tmp_path / "missing"),): "there is no model folder",
        (tiny_model, "--noise", "random:0.5", "--anchor_radius", "0"): "anchor_radius must be above 0",
    }.items():
        with pytest.raises(ValueError, match=words):
            main([*argv, "--checkpoints", *more])


# Subsets of several sizes


def test_several_fractions_are_measured_once(tiny_model, tmp_path, capsys, caplog):
    preference_rows(10, seed=9).to_json(tmp_path / "pairs.jsonl")
    argv = ["select", "--model_name_or_path", tiny_model, "--dataset_name", str(tmp_path / "pairs.jsonl")]
    argv += ["--batch_size", "2", "--anchor_batch_multiplier", "2", "--max_length", "128"]
    assert main([*argv, "--fraction", "0.3", "0.5", "--output_dir", str(tmp_path / "both")]) == 0
    assert "stable         3 pairs" in capsys.readouterr().out
    assert main([*argv, "--fraction", "0.5", "--output_dir", str(tmp_path / "one")]) == 0
    for name in ("stable", "unstable", "random"):
        assert (tmp_path / "both" / f"{name}-50.jsonl").read_text() == (tmp_path / "one" / f"{name}.jsonl").read_text()
        few, many = ((tmp_path / "both" / f"{name}-{n}.jsonl").read_text().splitlines() for n in (30, 50))
        assert set(few) < set(many)
    assert (
        main([*argv, "--dataset_name", str(tmp_path / "one" / "all.jsonl"), "--output_dir", str(tmp_path / "2")]) == 0
    )
    again, first = (Dataset.from_json(str(tmp_path / name / "all.jsonl"))["anchor_gap"] for name in ("2", "one"))
    assert list(again) == list(first)  # ranked anew, in the place of the earlier ranking
    assert "all.jsonl has a column anchor_gap: what is measured now takes its place" in caplog.text
    assert main([*argv, "--fraction", "0.3", "--output_dir", str(tmp_path / "both")]) == 0
    assert "of an earlier call, and not of this one: random-30.jsonl, random-50.jsonl" in capsys.readouterr().out
    for read, out in (("both/stable-50.jsonl", "both"), ("one/all.jsonl", "one"), ("one", "one"), ("", "one")):
        before = {file: file.read_bytes() for file in (tmp_path / out).iterdir()}
        more = ["--fraction", "0.3", "0.5"] if out == "both" else []
        with pytest.raises(ValueError, match="is read, and would be lost: name another"):
            main([*argv, "--dataset_name", str(tmp_path / read), "--output_dir", str(tmp_path / out), *more])
        assert before == {file: file.read_bytes() for file in (tmp_path / out).iterdir()}
    with pytest.raises(ValueError, match=r"fraction has a share twice \(\[0.3, 0.3\]\): name each once"):
        main([*argv, "--fraction", "0.3", "0.3", "--output_dir", str(tmp_path / "none")])
    shutil.copytree(tmp_path / "one", tmp_path / "beside")
    (tmp_path / "beside" / "all.jsonl").rename(tmp_path / "beside" / "train.jsonl")
    for name in ("stable", "unstable", "random"):
        (tmp_path / "beside" / f"{name}.jsonl").unlink()
    assert main([*argv, "--dataset_name", str(tmp_path / "beside"), "--output_dir", str(tmp_path / "beside")]) == 0
    with pytest.raises(ValueError, match=r"leave a row of 10, not 0\.01"):
        main([*argv, "--fraction", "0.5", "0.01", "--output_dir", str(tmp_path / "none")])


def test_the_random_part_is_a_fair_draw():
    drawn = np.bincount(np.concatenate([subsets(np.zeros(10), 0.3, seed)["random"] for seed in range(400)]))
    assert drawn.sum() == 1200
    assert np.abs(drawn - 120).max() < 40  # four standard deviations
