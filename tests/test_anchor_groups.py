"""GAPO's groups of k mini-batches: against its equations, one row at a time, in plain transformers and float64."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, load, preference_rows, quiet
from test_distributed import pair_log
from transformers import LlamaForCausalLM

from trl_margins.probes.anchor import in_groups
from trl_margins.probes.selection import dataset_anchor_gaps
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.named import trainer_class

BETA, GAMMA = 2.0, 0.1
SIZE = 2  # pairs in a mini-batch


def trainer_with(folder, out, rows, n=1, model=None, **options):
    """In float64, with windows of n mini-batches."""
    settings = {
        "beta": BETA,
        "gamma_beta_ratio": GAMMA,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": n,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        **options,
    }
    trainer = trainer_class("geometric-anchor")(
        load(folder).double() if model is None else model,
        args=config_class("geometric-anchor")(**quiet(output_dir=str(out), **settings)),
        train_dataset=rows,
        processing_class=byte_tokenizer(),
    )
    trainer._fused = False  # TRL's fused head computes in float32, whatever the model does
    return trainer


# The equations, by hand


def delta(model, row):
    """Δ of one pair: a sequence at a time, without padding."""
    encode = byte_tokenizer().encode
    prompt, means = encode(row["prompt"]), []
    for completion in (row["chosen"], row["rejected"]):
        answer = [*encode(completion), 2]  # </s>
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        means.append(logits.log_softmax(-1)[torch.arange(len(answer)), answer].mean())
    return means[0] - means[1]


def gradient_of(value, model, scope=""):
    """Of the parameters whose names have `scope` in them; 0 of the others."""
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return [each * (scope in name) for each, (name, _) in zip(found, model.named_parameters(), strict=True)]


def norm_of(gradient):
    return torch.cat([each.flatten() for each in gradient]).norm()


def anchor_gaps(model, rows, gradient, radius):
    """Δ(θ) − Δ(θ − ρ · gradient/‖gradient‖) of every row."""
    with torch.no_grad():
        here, before = [delta(model, row) for row in rows], [p.clone() for p in model.parameters()]
        for parameter, along in zip(model.parameters(), gradient, strict=True):
            parameter -= radius * along / norm_of(gradient)
        there = [delta(model, row) for row in rows]
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    return torch.stack(here) - torch.stack(there)


def first_order_gaps(model, rows, gradient, radius):
    unit = torch.cat([each.flatten() for each in gradient]) / norm_of(gradient)
    own = [torch.cat([each.flatten() for each in gradient_of(delta(model, row), model)]) for row in rows]
    return radius * torch.stack([each @ unit for each in own])


def groups_by_hand(window, k):
    """Rows of a window, by groups of k mini-batches."""
    n = max(len(window) // SIZE // k, 1)
    cuts = [i * k * SIZE for i in range(n)] + [len(window)]
    return [window[start:end] for start, end in pairwise(cuts)]


def train_by_hand(model, rows, n, k, radius, rate, steps, instance_wise=False, first_order=False, scope=""):
    """Eqs. 3 to 9 with plain gradient descent: the gaps and the weights of every step."""
    gaps, weights = [], []
    for step in range(steps):
        window = rows[step * n * SIZE : (step + 1) * n * SIZE]
        of_step = []
        for group in [[row] for row in window] if instance_wise else groups_by_hand(window, k):
            gradient = gradient_of(torch.stack([delta(model, row) for row in group]).mean(), model, scope)
            if first_order:
                of_step.append(first_order_gaps(model, group, gradient, radius))
            else:
                of_step.append(anchor_gaps(model, group, gradient, radius))
        gap = torch.cat(of_step)
        weight = BETA * torch.sigmoid(BETA * (GAMMA - gap))
        update = gradient_of(sum(w * delta(model, row) for w, row in zip(weight, window, strict=True)), model)
        with torch.no_grad():
            for parameter, along in zip(model.parameters(), update, strict=True):
                parameter += rate * along / len(window)
        gaps.append(gap)
        weights.append(weight)
    return torch.cat(gaps), torch.cat(weights)


@pytest.mark.rehearsal
@pytest.mark.parametrize(
    ("k", "keep", "n"), [(1, 0, 5), (1, 1, 5), (2, 0, 5), (2, 3, 5), (5, 5, 5), (8, 0, 5)], ids=str
)
def test_training_is_by_the_equations(k, keep, n, tiny_model, tmp_path):
    """Three steps, with n > k, n = k and n < k; forward passes kept for the update or not."""
    rows, radius, rate = preference_rows(3 * n * SIZE, seed=2), 0.05, 0.3
    options = {"anchor_batch_multiplier": k, "anchor_keep_graphs": keep, "anchor_radius": radius}
    trainer = trainer_with(tiny_model, tmp_path, rows, n, max_steps=3, learning_rate=rate, **options)
    trainer.train()
    model = load(tiny_model).double()
    gaps, weights = train_by_hand(model, list(rows), n, k, radius, rate, steps=3)
    logged = pair_log(tmp_path)
    np.testing.assert_allclose(logged["anchor_gap"], gaps, atol=1e-5)
    np.testing.assert_allclose(logged["anchor_weight"], weights, atol=1e-5)
    for (name, ours), plain in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6, msg=name)
    assert (model.get_input_embeddings().weight - load(tiny_model).double().get_input_embeddings().weight).norm() > 0.1


@pytest.mark.parametrize("estimator", ["difference", "per-pair"])
def test_instance_wise_anchors(estimator, tiny_model, tmp_path):
    """Each pair falls along its own gradient; to first order by ρ times that gradient's norm."""
    rows, radius, rate = preference_rows(12, seed=2), 0.05, 0.3
    options = {"anchor_direction": "pair", "anchor_estimator": estimator, "anchor_radius": radius}
    trainer = trainer_with(tiny_model, tmp_path, rows, n=2, max_steps=3, learning_rate=rate, **options)
    trainer.train()
    model = load(tiny_model).double()
    gaps, weights = train_by_hand(model, list(rows), 2, 1, radius, rate, 3, True, estimator == "per-pair")
    logged = pair_log(tmp_path)
    np.testing.assert_allclose(logged["anchor_gap"], gaps, atol=1e-5)
    np.testing.assert_allclose(logged["anchor_weight"], weights, atol=1e-5)
    for ours, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
    start = load(tiny_model).double()
    first = np.mean([norm_of(gradient_of(delta(start, row), start)).item() for row in list(rows)[:4]])
    assert trainer.state.log_history[0]["anchor/gradient_norm"] == pytest.approx(first)


@pytest.mark.parametrize("direction", ["gradient", "pair"])
@pytest.mark.parametrize("estimator", ["difference", "per-pair"])
def test_the_scope_is_what_moves_and_not_what_trains(direction, estimator, tiny_model, tmp_path):
    rows, radius, rate = preference_rows(8, seed=2), 0.05, 0.3
    options = {
        "anchor_direction": direction,
        "anchor_estimator": estimator,
        "anchor_radius": radius,
        "anchor_scope": ["mlp"],
    }
    trainer = trainer_with(tiny_model, tmp_path, rows, n=2, max_steps=2, learning_rate=rate, **options)
    trainer.train()
    model = load(tiny_model).double()
    how = {"instance_wise": direction == "pair", "first_order": estimator == "per-pair", "scope": ".mlp."}
    gaps, _ = train_by_hand(model, list(rows), 2, 2, radius, rate, 2, **how)
    np.testing.assert_allclose(pair_log(tmp_path)["anchor_gap"], gaps, atol=1e-5)
    for ours, plain in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["difference", "float32"])
def test_sams_step_is_no_part_of_the_gaps(estimator, tiny_model, tmp_path):
    """The gap is measured at the policy, wherever the update's forward pass is made."""
    rows, found = preference_rows(8, seed=2), []
    for radius in (0.0, 0.3):
        options = {"sam_radius": radius, "anchor_estimator": estimator, "anchor_radius": 0.05, "max_steps": 1}
        trainer_with(tiny_model, tmp_path / str(radius), rows, n=2, learning_rate=0.0, **options).train()
        found.append(pair_log(tmp_path / str(radius))["anchor_gap"])
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("recorded", [0, 1])
def test_dropout_that_disable_dropout_leaves_on_is_no_part_of_the_gaps(recorded, tiny_model, tmp_path):
    """Attention's is a number that a function is given: no module to turn off. What is recorded changes nothing."""
    rows, trained = preference_rows(8, seed=2), []
    for diagnostics in (0, recorded):
        model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, attention_dropout=0.4)
        options = {"anchor_radius": 1e-6, "anchor_diagnostics": diagnostics, "max_steps": 2, "learning_rate": 0.3}
        out = tmp_path / str(diagnostics)
        trainer = trainer_with(tiny_model, out, rows, n=2, model=model, share_prompt="never", **options)
        trainer.train()
        assert np.abs(pair_log(out)["anchor_gap"]).max() < 1e-4
        trained.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*trained)


@pytest.mark.rehearsal
@pytest.mark.parametrize("k", [1, 4, 8, 16])
def test_a_pairs_place_in_the_window_changes_nothing(k, tiny_model, tmp_path):
    """The same group first, then last, at learning rate 0."""
    rows = preference_rows(16 * SIZE, seed=3)
    own, others = list(range(k * SIZE)), list(range(k * SIZE, 16 * SIZE))
    means = []
    for name, order in {"first": own + others, "last": others + own}.items():
        options = {"anchor_batch_multiplier": k, "learning_rate": 0.0, "max_steps": 1}
        trainer_with(tiny_model, tmp_path / name, rows.select(order), n=16, **options).train()
        gaps = pair_log(tmp_path / name)["anchor_gap"]
        means.append((gaps[: k * SIZE] if name == "first" else gaps[-k * SIZE :]).mean())
    assert means[0] == pytest.approx(means[1], abs=1e-6)
    assert abs(means[0]) > 1e-3


@pytest.mark.parametrize(("direction", "estimator"), [("pair", "per-pair"), ("pair", "difference")])
def test_pairs_of_an_encoder_decoder(direction, estimator, tiny_encoder_decoder, tmp_path):
    """Each pair's own gradient is that of its own rows by plain transformers; what is recorded says the same."""
    rows, radius = preference_rows(4, seed=2), 1e-4
    options = {"anchor_direction": direction, "anchor_estimator": estimator, "anchor_radius": radius, "max_steps": 1}
    model = load(tiny_encoder_decoder).double()
    trainer = trainer_with("", tmp_path, rows, n=2, model=model, learning_rate=0.0, anchor_diagnostics=1, **options)
    plain, norms = load(tiny_encoder_decoder).double(), []
    for row in trainer.train_dataset:
        means = []
        for side in ("chosen", "rejected"):
            labels = torch.tensor([row[f"{side}_labels"]])
            logits = plain(input_ids=torch.tensor([row["prompt_input_ids"]]), labels=labels).logits
            means.append(logits.log_softmax(-1).gather(-1, labels[..., None]).mean())
        norms.append(norm_of(gradient_of(means[0] - means[1], plain)).item())
    trainer.train()
    np.testing.assert_allclose(pair_log(tmp_path)["anchor_gap"], radius * np.array(norms), rtol=2e-2, atol=1e-7)
    np.testing.assert_allclose(pair_log(tmp_path, "anchor_diagnostics.csv")["gradient_norm"], norms, rtol=1e-4)


def test_proposition_5_1(tiny_model, tmp_path):
    """A group's mean gap is ρ‖∇M̄‖ up to O(ρ²): half the radius leaves a quarter of the difference."""
    rows, model = preference_rows(6 * SIZE, seed=4), load(tiny_model).double()
    groups = groups_by_hand(list(rows), 2)
    norms = [norm_of(gradient_of(torch.stack([delta(model, r) for r in group]).mean(), model)) for group in groups]
    left = []
    for radius in (2e-3, 1e-3):
        options = {"anchor_batch_multiplier": 2, "learning_rate": 0.0, "max_steps": 1, "anchor_radius": radius}
        trainer = trainer_with(tiny_model, tmp_path / str(radius), rows, n=6, **options)
        trainer.train()
        means = torch.tensor(pair_log(tmp_path / str(radius))["anchor_gap"]).view(3, -1).mean(1)
        assert trainer.state.log_history[0]["anchor/gradient_norm"] == pytest.approx(torch.stack(norms).mean().item())
        left.append(means - radius * torch.stack(norms).detach())
    torch.testing.assert_close(left[0] / left[1], torch.full((3,), 4.0, dtype=torch.float64), rtol=0.1, atol=0)


def test_groups():
    assert [list(in_groups(range(n), 2)) for n in (1, 2, 3, 4, 5)] == [
        [[0]],
        [[0, 1]],
        [[0, 1, 2]],
        [[0, 1], [2, 3]],
        [[0, 1], [2, 3, 4]],
    ]
    assert list(in_groups([], 3)) == []


@pytest.mark.parametrize(("n_rows", "k"), list(product([7, 12], [1, 2, 3])))
def test_select_has_the_same_groups(n_rows, k, tiny_model, tmp_path):
    """A last group that is not full, and a last mini-batch that is not, are measured with those before them."""
    rows, model = preference_rows(n_rows, seed=5), load(tiny_model).double()
    trainer = trainer_with(tiny_model, tmp_path, rows, anchor_batch_multiplier=k, anchor_radius=0.05)
    trainer.create_optimizer()
    found = dataset_anchor_gaps(trainer)
    n = -(-n_rows // SIZE)
    cuts = [i * k * SIZE for i in range(max(n // k, 1))] + [n_rows]
    expected = []
    for start, end in pairwise(cuts):
        group = list(rows)[start:end]
        gradient = gradient_of(torch.stack([delta(model, row) for row in group]).mean(), model)
        expected.append(anchor_gaps(model, group, gradient, 0.05))
    np.testing.assert_allclose(found, torch.cat(expected), atol=1e-5)


def test_a_radius_that_moves_no_weight_is_said(tiny_model, tmp_path, caplog):
    trainer = trainer_with(tiny_model, tmp_path, preference_rows(4, seed=5), anchor_radius=1e-40)
    trainer.create_optimizer()
    assert not dataset_anchor_gaps(trainer).any()
    assert "the anchor gaps of all 4 pairs are 0: raise anchor_radius" in caplog.text


@pytest.mark.parametrize(
    ("n", "k", "keep", "passes"),
    [(4, 2, 0, 4 + 4 + 4), (4, 2, 2, 4 + 4), (4, 4, 4, 4 + 4), (4, 1, 1, 4 + 4), (5, 2, 2, 5 + 5 + 3)],
)
def test_a_groups_forward_passes_serve_the_update(n, k, keep, passes, tiny_model, tmp_path):
    """Counted in rows of the model: direction, anchor and update, or direction and anchor. The last group of five is
    of three.
    """
    options = {"anchor_batch_multiplier": k, "anchor_keep_graphs": keep, "max_steps": 1, "share_prompt": "never"}
    trainer = trainer_with(tiny_model, tmp_path, preference_rows(n * SIZE, seed=6), n=n, **options)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    trainer.train()
    assert sum(seen) == passes * 2 * SIZE


def test_kept_graphs_are_those_of_one_group(tiny_model, tmp_path):
    """The next group's are made when this one's have served."""
    options = {"anchor_batch_multiplier": 2, "anchor_keep_graphs": 2, "max_steps": 1}
    trainer = trainer_with(tiny_model, tmp_path, preference_rows(6 * SIZE, seed=6), n=6, **options)
    events, forward, step = [], trainer.forward_pairs, trainer.training_step
    trainer.forward_pairs = lambda *a, **k: events.append("look") or forward(*a, **k)
    trainer.training_step = lambda *a, **k: events.append("update") or step(*a, **k)
    trainer.train()
    assert events == ["look"] * 4 + ["update"] * 2 + ["look"] * 4 + ["update"] * 2 + ["look"] * 4 + ["update"] * 2
