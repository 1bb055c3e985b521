"""`anchor_diagnostics`: the file against plain PyTorch, one pair at a time, and what the report says about it."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from scipy.stats import spearmanr
from test_anchor import gapo_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from trl_margins.cli import main
from trl_margins.probes.selection import dataset_anchor_gaps
from trl_margins.report import figures
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

pytestmark = pytest.mark.rehearsal

RADIUS = 0.05
FILE = "anchor_diagnostics.csv"
PICTURES = ("anchor_ranking", "anchor_parts", "gradient_norm")
FLIPS = [int(i % 3 == 0) for i in range(24)]


def diagnosed(folder):
    return pd.read_csv(folder / FILE)


def margin_of(model, row):
    """Δ of one row, without padding and without this package."""
    tokenizer, means = byte_tokenizer(), []
    for side in ("chosen", "rejected"):
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], row[side]))
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        means.append(logps[len(prompt) - 1 :].mean())
    return means[0] - means[1]


def parts_of(folder, rows):
    """Gap, gradient norm, cos φ, first order and curvature of rows that are one group, under a saved policy."""
    model = load(str(folder)).double()
    parameters = list(model.parameters())
    here, gradients = [], []
    for row in rows:
        gap = margin_of(model, row)
        gradients.append(torch.cat([each.flatten() for each in torch.autograd.grad(gap, parameters)]))
        here.append(gap.item())
    direction = torch.stack(gradients).mean(0)
    direction /= direction.norm()
    with torch.no_grad():
        moved = torch.nn.utils.parameters_to_vector(parameters) - RADIUS * direction
        torch.nn.utils.vector_to_parameters(moved, parameters)
        there = [margin_of(model, row).item() for row in rows]
    found = []
    for gap, at_the_anchor, gradient in zip(here, there, gradients, strict=True):
        norm, along = gradient.norm().item(), (gradient @ direction).item()
        found.append((gap - at_the_anchor, norm, along / norm, RADIUS * along, gap - at_the_anchor - RADIUS * along))
    return np.array(found)


class Text(HTMLParser):
    """The text of a page."""

    def __init__(self, page):
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run by the command line, its rows, and its report."""
    folder = tmp_path_factory.mktemp("diagnosed")
    rows = preference_rows(24, seed=3).add_column("is_flipped", FLIPS)
    rows.to_json(folder / "pairs.jsonl")
    tiny = ["--bf16", "false", "--report_to", "none", "--gradient_checkpointing", "false", "--disable_tqdm", "true"]
    steps = ["--max_steps", "3", "--save_steps", "2", "--save_strategy", "steps", "--logging_steps", "1"]
    sizes = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "3e-3"]
    named = ["--model_name_or_path", tiny_model, "--dataset_name", str(folder / "pairs.jsonl")]
    method = ["--method", "geometric-anchor", "--anchor_diagnostics", "2", "--anchor_batch_multiplier", "1"]
    assert main(["train", *method, *named, "--output_dir", str(folder / "out"), *tiny, *steps, *sizes]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "PICTURES", [draw for draw in figures.PICTURES if draw.__name__ in PICTURES])
        assert main(["report", str(folder / "out")]) == 0
    return folder / "out", rows.to_list()


def test_the_file_holds_what_plain_pytorch_computes(run, tiny_model):
    """Of the first step under the model that was given, of the third under the checkpoint of the second; each group,
    here a mini-batch of four, with a direction of its own.
    """
    folder, rows = run
    table = diagnosed(folder)
    assert table.groupby("step").size().to_dict() == {1: 8, 3: 8}
    assert table["is_flipped"].tolist() == [FLIPS[row] for row in table["row_number"]]
    for step, policy in ((1, tiny_model), (3, folder / "checkpoint-2")):
        of_step = table[table["step"] == step]
        of_group = [[rows[row] for row in of_step["row_number"][i : i + 4]] for i in (0, 4)]
        expected = np.concatenate([parts_of(policy, group) for group in of_group])
        names = ["anchor_gap", "gradient_norm", "alignment", "first_order", "curvature"]
        np.testing.assert_allclose(of_step[names], expected, rtol=2e-4, atol=2e-5)
    trained = pd.read_csv(folder / "pair_log.csv").set_index(["step", "row_number"])["anchor_gap"]
    recorded = table.set_index(["step", "row_number"])["anchor_gap"]
    np.testing.assert_allclose(recorded, trained[recorded.index], atol=1e-5)  # of the same update


def test_the_report_says_what_scipy_finds_in_the_file(run):
    folder, _ = run
    table, page = diagnosed(folder), Text((folder / "report" / "report.html").read_text()).text
    cos, norm = table["alignment"], table["gradient_norm"]
    assert f"lowers {100 * (cos > 0).mean():.3g} % of the gaps to first order" in page
    assert f"median {cos.median():.3f})" in page
    assert f"Spearman's ρ = {spearmanr(RADIUS * norm * cos, RADIUS * norm)[0]:.3f}" in page
    for share in (0.1, 0.2, 0.3):
        n = round(share * 16)
        same = set(table["first_order"].nlargest(n).index) & set(norm.nlargest(n).index)
        assert f"{100 * len(same) / n:.3g} % of the top {100 * share:.3g} %" in page
    assert f"standard deviation of {np.log(norm).std():.2f}" in page
    assert f"one of {np.log(cos[cos > 0]).std():.2f}: " in page
    for step in (1, 3):
        means = table[table["step"] == step][["curvature", "first_order"]].mean()
        curvature, first = (f"{value:+.3g}".replace("-", "−") for value in means)
        assert f"{curvature} to a first order of {first} in step {step}" in page
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    norms = np.array([entry["grad_norm"] for entry in history if "grad_norm" in entry])
    assert norms.size == 3
    assert f"the greatest is {norms.max():.4g}, in step {norms.argmax() + 1}" in page
    assert f"The dashed line is at {2 * np.median(norms):.4g}" in page
    assert f"{(norms > 2 * np.median(norms)).sum()} of 3 (" in page
    for name in PICTURES:
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_goes_on_with_the_file(run, tmp_path):
    """Lines after its checkpoint are of steps that it takes again."""
    folder, _ = run
    out = shutil.copytree(folder, tmp_path / "out")
    trained = json.loads((out / "margin_run.json").read_text())["config"]
    shutil.rmtree(out / "checkpoint-3", ignore_errors=True)
    pairs = str(folder.parent / "pairs.jsonl")
    kept = ("max_steps", "logging_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    kept += ("learning_rate", "anchor_diagnostics", "anchor_batch_multiplier", "bf16")
    settings = {name: trained[name] for name in kept}
    settings |= {"method": "geometric-anchor", "output_dir": str(out), "dataset_name": pairs, "report_to": "none"}
    settings |= {"model_name_or_path": json.loads((out / "margin_run.json").read_text())["model"]}
    settings |= {"gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--resume_from_checkpoint", "true"]) == 0
    again, before = diagnosed(out), diagnosed(folder)
    assert again["step"].tolist() == before["step"].tolist()
    np.testing.assert_allclose(again, before, rtol=1e-4, atol=1e-6)


def test_a_new_run_moves_the_file_of_an_earlier_one_aside(run, tmp_path, tiny_model, tokenizer):
    out = shutil.copytree(run[0], tmp_path / "out")
    trainer = gapo_trainer(tiny_model, tokenizer, out, max_steps=1, anchor_diagnostics=5)
    trainer.train()
    assert diagnosed(out)["step"].tolist() == [1] * 8
    assert diagnosed(out / "_previous-1")["step"].tolist() == [1] * 8 + [3] * 8


@pytest.mark.parametrize("estimator", ["difference", "float32", "per-pair"])
def test_training_is_the_same_with_and_without(estimator, tokenizer, tmp_path):
    """Also where the model has dropout, of which a look at the pairs takes no random number."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    weights = {}
    for every in (0, 1):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, attention_dropout=0.3, **sizes))
        options = {"disable_dropout": False, "anchor_estimator": estimator, "anchor_diagnostics": every}
        trainer = gapo_trainer(None, tokenizer, tmp_path / str(every), model=model, max_steps=2, **options)
        trainer.train()
        weights[every] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_to_first_order_alone_nothing_is_left_for_curvature(tiny_model, tokenizer, tmp_path):
    gapo_trainer(
        tiny_model, tokenizer, tmp_path, max_steps=1, anchor_estimator="per-pair", anchor_diagnostics=1
    ).train()
    table = diagnosed(tmp_path)
    np.testing.assert_allclose(table["anchor_gap"], table["first_order"], rtol=1e-4)
    assert table["curvature"].abs().max() < 1e-5


def test_along_a_pair_s_own_direction_every_alignment_is_1(tiny_model, tokenizer, tmp_path):
    """The first order is then the greatest that a step of this length can have."""
    found, radius = {}, 0.005  # small, for little curvature
    for direction in ("gradient", "pair"):
        options = {"anchor_direction": direction, "anchor_radius": radius, "anchor_diagnostics": 1, "max_steps": 1}
        gapo_trainer(tiny_model, tokenizer, tmp_path / direction, **options).train()
        found[direction] = diagnosed(tmp_path / direction)
    shared, own = found["gradient"], found["pair"]
    assert own["alignment"].tolist() == [1.0] * 8
    np.testing.assert_allclose(own["gradient_norm"], shared["gradient_norm"], rtol=1e-4)
    np.testing.assert_allclose(own["first_order"], radius * shared["gradient_norm"], rtol=1e-4)
    assert (shared["first_order"] < own["first_order"]).all()
    assert (own["curvature"].abs() < 0.1 * own["first_order"]).all()  # the gap is measured, and near its first order


def test_selecting_pairs_records_nothing(tiny_model, tokenizer, tmp_path):
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_diagnostics=1)
    assert dataset_anchor_gaps(trainer).shape == (16,)
    trainer.log({})
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (
            "gappo",
            {},
            r"anchor_diagnostics=5 takes anchor gaps apart, and none is measured \(score-gap\): leave",
        ),
        ("simpo", {}, r"none is measured \(no term\)"),
        ("gradient-norm", {}, r"none is measured \(gradient-norm\)"),
        ("geometric-anchor", {"log_pairs": False}, "writes a line for each pair, and log_pairs is off: turn"),
    ],
)
def test_diagnostics_of_nothing_are_refused(method, settings, words, tiny_model, tokenizer, tmp_path, capsys):
    """From Python before training; from the command line before the model is loaded, which here is none."""
    config = config_class(method)(**quiet(output_dir=str(tmp_path), anchor_diagnostics=5, **settings))
    with pytest.raises(ValueError, match=words):
        trainer_class(method)(load(tiny_model), config, train_dataset=preference_rows(4), processing_class=tokenizer)
    argv = ["train", "--method", method, "--model_name_or_path", "nowhere", "--dataset_name", "nowhere.jsonl"]
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value).lower())]
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=words):
            main([*argv, "--output_dir", str(tmp_path), "--anchor_diagnostics", "5", *flags, *more])


def test_compare_gives_it_to_the_methods_that_have_an_anchor(run, tiny_model, capsys):
    folder = run[0].parent
    argv = ["compare", "--methods", "simpo", "gradient-norm", "geometric-anchor", "--anchor_diagnostics", "10"]
    named = ["--model_name_or_path", tiny_model, "--dataset_name", str(folder / "pairs.jsonl"), "--seeds", "1"]
    evaluated = ["--eval_dataset_name", str(folder / "pairs.jsonl"), "--out", str(folder / "compared"), "--dry_run"]
    assert main([*argv, *named, *evaluated]) == 0
    printed = capsys.readouterr().out
    assert "anchor_diagnostics 10, " in printed
    assert "Left out for methods that do not have it: anchor_diagnostics (simpo, gradient-norm)." in printed
