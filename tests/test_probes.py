"""What the probes compute in which precision, what they copy, and what is refused before the first pass."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from conftest import VOCABULARY, load, preference_rows, quiet
from operators import Operators
from test_anchor import anchor_gaps, gapo_trainer, gaps, prepared, window
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import chunked_logprob

from trl_margins import MarginCPOConfig, MarginCPOTrainer, Term
from trl_margins.distributed import reduce_tensors
from trl_margins.probes import pair_gradients, perturbation
from trl_margins.probes.direction import Direction, GradientSum, gradient_direction, momentum_direction, total_norm
from trl_margins.probes.perturbation import Product, cannot_displace, displaced, fused_head_moves, perturbed
from trl_margins.trainers import cpo
from trl_margins.trainers.configs import config_class
from trl_margins.trainers.model_checks import check_one_device
from trl_margins.trainers.named import trainer_class

ONE_PROCESS = SimpleNamespace(scaler=None, distributed_type=DistributedType.NO, num_processes=1)


def model_with(folder, **settings):
    """The tiny model with other settings."""
    return AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder, **settings), dtype=torch.float32
    )


# float32 that is float32


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def passes(trainer):
    """Of every forward pass: whether for a gradient, and how float32 is multiplied."""
    seen, forward = [], trainer.pair_logps

    def look(*args):
        seen.append((torch.is_grad_enabled(), torch.get_float32_matmul_precision()))
        return forward(*args)

    trainer.pair_logps = look
    return seen


@pytest.mark.parametrize(("estimator", "n"), [("difference", 4), ("float32", 4)])
def test_under_tf32_both_ends_of_a_difference_are_ieee(estimator, n, tf32, tiny_model, tokenizer, tmp_path):
    """The update's pass, in TF32, gives neither."""
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_estimator=estimator))
    seen = passes(trainer)
    measured, _ = trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    assert seen == [(True, "high")] * 2 + [(False, "highest")] * n
    assert all("anchor_gap" in batch["pair_columns"] for batch in measured)
    assert torch.get_float32_matmul_precision() == "high"


def test_without_tf32_the_updates_pass_is_one_end(tiny_model, tokenizer, tmp_path):
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path))
    seen = passes(trainer)
    measured, _ = trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    assert seen == [(True, "highest")] * 2 + [(False, "highest")] * 2
    assert all("anchor_score_gap" in batch["pair_columns"] for batch in measured)


# The anchor in 16 bits


@pytest.mark.parametrize("share_prompt", ["always", "never"])
@pytest.mark.parametrize("regime", ["bfloat16", "autocast"])
def test_logits_of_all_tokens_are_never_built(regime, share_prompt, tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 16)
    monkeypatch.setattr(trainer_class("geometric-anchor"), "_plain_head_will_do", False)
    model = load(tiny_model) if regime == "autocast" else load(tiny_model).bfloat16()
    options = {"share_prompt": share_prompt, "bf16": regime == "autocast"}
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=model, **options))
    if regime == "autocast":
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
    # which compares one pair with the model's own logits, once
    trainer._sharing.check(trainer, trainer._prepare_inputs(window(trainer)[0]))
    with Operators() as seen:
        trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    logits = [made for made in seen.made if made.shape and made.shape[-1] == VOCABULARY]
    assert logits
    assert max(np.prod(made.shape[:-1]) for made in logits) <= 16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("plain_head", [True, False])
def test_the_heads_own_step_is_felt(tied, plain_head, tiny_model, tokenizer, tmp_path, monkeypatch):
    """By TRL's fused head, too, which reads the weight itself. A tied embedding is float32 meanwhile."""
    monkeypatch.setattr(trainer_class("geometric-anchor"), "_plain_head_will_do", plain_head)
    options = {"rows": preference_rows(32, seed=5), "anchor_scope": "lm-head", "anchor_batch_multiplier": 8}

    def trainer(dtype):
        model = load(tiny_model).to(dtype)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=model, **options))

    exact, ours = trainer(torch.float32), trainer(torch.bfloat16)
    batches = window(ours, n=4, size=8)
    expected, measured = (anchor_gaps(t, batches, 0.05, "difference") for t in (exact, ours))
    assert measured.mean().item() == pytest.approx(expected.mean().item(), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("along", ["narrow", "float32"])
def test_a_step_below_the_rounding_of_the_output_is_felt(dtype, along):
    """As the slope of what came out over the exact step: 1. Rounded before the sum, the step would be lost: 0."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 512, bias=False, dtype=dtype)
    direction = torch.randn(512, 256).to(torch.float32 if along == "float32" else dtype)
    x, radius = torch.randn(2000, 256).to(dtype), torch.tensor(1e-5 if dtype == torch.bfloat16 else 2e-6)
    product = Product(linear, direction, radius, dtype)
    with torch.no_grad():
        moved = product(x).double() - x.double() @ linear.weight.double().T
    step = x.double() @ (radius.double() * direction.double()).T
    assert step.abs().mean() < 0.5 * torch.finfo(dtype).eps * linear(x).abs().float().mean()
    assert ((moved * step).sum() / step.square().sum()).item() == pytest.approx(1, abs=0.05)


def test_the_direction_is_cast_once_or_not_at_all():
    linear = nn.Linear(48, 40, dtype=torch.bfloat16)
    narrow = torch.randn(40, 48).bfloat16()
    assert Product(linear, narrow, 0.1, torch.bfloat16).along is narrow
    assert Product(linear.to(torch.float16), half := narrow.half(), 0.1, torch.float16).along is half
    linear = linear.bfloat16()
    wide = narrow.float()
    with Operators() as seen:
        product = Product(linear, wide, 0.1, torch.bfloat16)
    assert [made.dtype for made in seen.of_shape((40, 48))] == [torch.bfloat16]
    with torch.no_grad(), Operators() as seen:
        for _ in range(3):
            product(torch.randn(5, 48).bfloat16())
    # a CPU multiplies in float32, for which it widens both factors; a GPU takes them as they are
    assert torch.bfloat16 not in {made.dtype for made in seen.of_shape((40, 48))}
    assert not [made for made in seen.made if made.shape[-1] == 96]


@contextmanager
def _patched(module, forward):
    module.forward = forward
    yield
    del module.forward


def test_replaced_norms_are_displaced_and_replaced_matrices_are_not(tiny_model):
    """Liger's and the Hub's kernels take the place of norms' forward passes, in the module itself."""
    model = load(tiny_model).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    norm, linear, embedding = model.model.norm, model.model.layers[0].mlp.up_proj, model.model.embed_tokens
    with _patched(norm, type(norm).forward.__get__(norm)):
        assert cannot_displace(model, names) is None
    for module in (linear, embedding):
        with _patched(module, type(module).forward.__get__(module)):
            assert "is wrapped" in cannot_displace(model, names)


def test_matrices_that_a_kernel_reads_itself_are_named(tiny_model, tokenizer, tmp_path, caplog):
    model = load(tiny_model).bfloat16()
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=model))
    mlp = model.model.layers[1].mlp

    def kernel(x):
        up = x.to(mlp.up_proj.weight.dtype) @ mlp.up_proj.weight.T
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

    with _patched(mlp, kernel):
        for _ in range(2):
            trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    said = [record.getMessage() for record in caplog.records if "were not called at the anchor" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(
        "1 of 15 linear layers were not called at the anchor (for example model.layers.1.mlp.up_proj.weight)"
    )


def test_a_head_that_cannot_take_a_step_beside_it_gets_none(tiny_model):
    model = load(tiny_model)
    names = [name for name, _ in model.named_parameters()]
    assert fused_head_moves(model, names)
    assert fused_head_moves(model, [name for name in names if "mlp" in name])
    model.lm_head = nn.Linear(32, VOCABULARY)  # with a bias, which TRL's head adds in 16 bits
    assert not fused_head_moves(model, [*names, "lm_head.bias"])
    assert fused_head_moves(model, ["lm_head.weight"])


def test_a_displaced_pass_that_fails_leaves_no_trace(tiny_model):
    model = load(tiny_model).bfloat16()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), displaced(model, direction, 0.1, torch.bfloat16, fused=True):
        raise model.__dict__["get_output_embeddings"] and KeyError
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not module._forward_hooks
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Copies


@pytest.mark.parametrize("keep", [0, 2])
def test_one_process_copies_no_gradient(keep, tiny_model, tokenizer, tmp_path):
    """Each mini-batch makes its gradients, and nothing else is as large as the largest of the parameters."""
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_keep_graphs=keep, share_prompt="never"))
    batches = [trainer.before_measuring(batch) for batch in window(trainer)]
    with Operators() as seen:
        direction, _ = trainer._probes[0]._direction(batches)
    shape = trainer.model.lm_head.weight.shape
    assert shape == trainer.model.model.embed_tokens.weight.shape
    made = [made.by for made in seen.of_shape(shape)]
    assert made.count("embedding_dense_backward") == 2
    assert not {"clone", "neg", "add", "mul", "div", "_to_copy"} & set(made)
    assert all(direction.vectors[name].shape == p.shape for name, p in trainer.model.named_parameters())


def test_what_has_gathered_is_handed_over():
    weight = nn.Parameter(torch.randn(3))
    gradients = GradientSum(ONE_PROCESS, {"w": weight})
    gradients.add(weight.sum())
    gathered = weight.grad
    assert gradients.take()["w"] is gathered
    assert weight.grad is None


def test_kept_graphs_need_no_second_set_of_gradients(monkeypatch):
    """They add to what has gathered, parameter by parameter; asked for by themselves, all would be there at once."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    gradients = GradientSum(ONE_PROCESS, {"w": weight})
    monkeypatch.setattr(torch.autograd, "grad", None)
    value = weight.square().sum()
    for _ in range(2):  # the graph is still there
        gradients.add(value, retain_graph=True)
    assert torch.equal(gradients.take()["w"], torch.tensor([4.0, 8.0]))


def test_several_ranks_copy_one_tensor_at_a_time():
    tensors = {name: torch.ones(3) for name in "abc"}
    originals, alive = {name: weakref.ref(tensor) for name, tensor in tensors.items()}, []

    def reduce(tensor, how):
        gc.collect()
        alive.append([name for name, original in originals.items() if original() is not None])
        return 2 * tensor

    found = reduce_tensors(SimpleNamespace(num_processes=2, reduce=reduce), tensors, "sum")
    assert alive == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert all(torch.equal(tensor, torch.full((3,), 2.0)) for tensor in found.values())


def test_the_momentum_is_pointed_to_and_not_copied():
    weight = nn.Parameter(torch.randn(5, 7))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    with Operators() as seen:
        direction = momentum_direction(optimizer, {"w": weight})
    assert not seen.of_shape((5, 7))
    pointed = direction.per_unit * direction.vectors["w"]
    assert (pointed * weight.grad).sum() < 0
    assert pointed.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_move_needs_little_beside_the_backup(dtype, cast, monkeypatch):
    """What it computes on the way is of a part of a tensor at a time; the parts together are the move of the whole."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 30, bias=False, dtype=dtype)
    along, computed_in = torch.randn(30, 40), {"weight": cast} if cast else {}
    with perturbed(linear, {"weight": along}, 0.1, computed_in):
        whole = linear.weight.detach().clone()
    monkeypatch.setattr(perturbation, "_PART", 64)
    with Operators() as seen, perturbed(linear, {"weight": along}, 0.1, computed_in):
        parts = linear.weight.detach().clone()
    assert {made.by for made in seen.made if np.prod(made.shape) > 64} == {"clone"}
    assert len(seen.of_shape((30, 40))) == 2  # the backup, and the clone of this test
    assert torch.equal(whole, parts)


def test_a_step_starts_from_what_the_forward_pass_casts():
    """Values that no step moves are those of the cast: a step of 0 is none, and a small one reaches few of them."""
    torch.manual_seed(0)
    linear = nn.Linear(400, 300, bias=False)
    cast, along = linear.weight.detach().bfloat16().float(), torch.ones(300, 400)
    assert not torch.equal(cast, linear.weight)
    before = linear.weight.detach().clone()
    for radius in (0.0, 1e-6):
        with perturbed(linear, {"weight": along}, radius, {"weight": torch.bfloat16}):
            moved = linear.weight.detach().clone()
        assert torch.equal(moved, moved.bfloat16().float())
        assert (moved != cast).float().mean() <= 5e4 * radius
        # five standard errors: one value in forty jumps, by 2^-12 or less
        assert (moved - cast).mean().item() == pytest.approx(radius, abs=0.25e-6)
    assert torch.equal(linear.weight, before)


# Refused before the first pass


@pytest.mark.parametrize("kind", ["weight", "margin"])
def test_a_probe_that_does_not_exist_is_refused(kind, tiny_model, tokenizer, tmp_path):
    """With the name of the term that asks for it; it would otherwise train without what it asked for."""

    class Curious(Term):
        name = "curious"
        probes = ("hessian_trace", "anchor_gap")

        def __call__(self, view):
            return torch.ones_like(view.reward_gap)

    config = MarginCPOConfig(**quiet(output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=0.0))
    message = (
        "term 'curious' asks for hessian_trace, which no probe measures; known: anchor_gap, anchor_score_gap, "
        "relative_gradient_norm"
    )
    with pytest.raises(ValueError, match=message):
        MarginCPOTrainer(
            load(tiny_model),
            config,
            train_dataset=preference_rows(4),
            processing_class=tokenizer,
            **{f"{kind}_term": Curious()},
        )


def test_a_model_on_several_devices_is_refused(tiny_model, tokenizer, tmp_path):
    model = load(tiny_model)
    check_one_device(model)
    for whole in ({"": 0}, {"model": 0, "lm_head": 0}):
        model.hf_device_map = whole
        check_one_device(model)
    model.hf_device_map = {"model": 0, "lm_head": torch.device("cuda", 1)}
    with pytest.raises(ValueError, match=r"the model is spread over .* \(0, cuda:1\).*`accelerate launch`"):
        gapo_trainer(tiny_model, tokenizer, tmp_path, model=model)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, None),
        ({"bf16": True}, None),
        (
            {"anchor_estimator": "float32"},
            r"FSDP2 casts the weights itself: use anchor_estimator='difference', or DDP",
        ),
        ({"anchor_estimator": "per-pair"}, r"takes every pair's own gradient.*use anchor_estimator='difference'"),
    ],
)
def test_what_sharding_does_not_allow_is_refused(options, refused, tiny_model, tokenizer, tmp_path, monkeypatch):
    """accelerate shards when training begins, and says before that it will."""
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match=refused) if refused else nullcontext():
        gapo_trainer(tiny_model, tokenizer, tmp_path, **options)


def test_sharding_that_comes_later_is_refused_before_the_first_pass(tiny_model, tokenizer, tmp_path, monkeypatch):
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, model=load(tiny_model).half()))
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    seen = passes(trainer)
    with pytest.raises(ValueError, match=r"not measured in float16.*set fp16 to false and bf16 to true, or use DDP"):
        trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    assert not seen


# A pair's gradient in fp16


def test_small_gradients_of_a_pair_survive_fp16(tiny_model, tokenizer, tmp_path, monkeypatch):
    """Gaps so small that fp16 rounds a part of their gradients to 0, as it does where answers are long."""

    def found(dtype, scale):
        monkeypatch.setattr(pair_gradients, "_FP16_SCALE", scale)
        config = config_class("gradient-norm")(**quiet(output_dir=str(tmp_path)))
        model, rows = load(tiny_model).to(dtype), preference_rows(8, seed=2)
        trainer = trainer_class("gradient-norm")(model, config, train_dataset=rows, processing_class=tokenizer)
        monkeypatch.setattr(trainer, "score_gap", lambda pairs: 1e-4 * type(trainer).score_gap(trainer, pairs))
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
        pairs = pair_gradients.pair_gradients(trainer, batch, dict(model.named_parameters()))
        return torch.stack([torch.cat([g.flatten().float() for g in pair.gradient.values()]) for pair in pairs])

    ours = pair_gradients._FP16_SCALE
    exact, unscaled, scaled = (
        found(*way) for way in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, ours))
    )

    def lost(gradients):
        return ((gradients == 0) & (exact != 0)).float().mean().item()

    assert lost(unscaled) > 0.02
    assert lost(scaled) < 0.02 * lost(unscaled)
    np.testing.assert_allclose(scaled.norm(dim=1), exact.norm(dim=1), rtol=0.02)


# The direction and its norm


def test_the_norm_is_of_more_than_16_bits():
    """As large as this, it has no value in float16, and three digits in bfloat16."""
    tensors = [torch.full((300, 200), 1000.0, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]
    assert total_norm(tensors).item() == pytest.approx(1000 * (2 * 300 * 200) ** 0.5, rel=1e-4)
    assert total_norm(tensors).dtype == torch.float32
    assert total_norm([tensors[0].double()]).dtype == torch.float64


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_a_direction_that_overflowed_moves_nothing(wrong, tiny_model):
    """As fp16's first ones do, until the scaler has found its scale."""
    model = load(tiny_model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    vectors = {name: torch.ones_like(parameter) for name, parameter in before.items()}
    vectors["model.norm.weight"][3] = wrong
    direction = gradient_direction(SimpleNamespace(scaler=torch.amp.GradScaler("cpu")), vectors)
    assert direction.per_unit == 0
    with perturbed(model, direction.vectors, 0.05 * direction.per_unit):
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("method", ["geometric-anchor", "simpo-sam"])
def test_fp16s_overflow_is_no_direction(method, tiny_model, tokenizer, tmp_path):
    radius = {"sam_radius": 0.3} if method == "simpo-sam" else {}
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path, method=method, **radius))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    measured, _ = trainer.get_batch_samples(iter(window(trainer)), 2, trainer.args.device)
    if method == "geometric-anchor":
        found = torch.cat([batch["pair_columns"]["anchor_score_gap"] for batch in measured])
        assert torch.equal(found, torch.cat([gaps(trainer, batch).detach() for batch in measured]))
    else:
        assert trainer._probes[-1]._direction.per_unit == 0
        assert not any(vector.any() for vector in trainer._probes[-1]._direction.vectors.values())


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "RMSprop"])
def test_the_direction_is_against_the_momentum_of_any_optimizer_that_has_one(optimizer):
    settings = {} if optimizer == "AdamW" else {"momentum": 0.9}
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = getattr(torch.optim, optimizer)([weight], lr=1e-3, **settings)
    assert momentum_direction(optimizer, {"w": weight}) is None
    (weight**2).sum().backward()
    optimizer.step()
    direction = momentum_direction(optimizer, {"w": weight})
    assert torch.equal((direction.per_unit * direction.vectors["w"]).sign(), -weight.detach().sign())


def test_every_tensor_and_every_part_has_draws_of_its_own(monkeypatch):
    """Alike moves of alike values are rounded apart, and the same in every process."""
    monkeypatch.setattr(perturbation, "_PART", 512)
    model = nn.ModuleList(nn.Linear(32, 32, bias=False).bfloat16() for _ in range(2))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1.0)
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}

    def moved():
        with perturbed(model, direction, 1e-3):
            return [layer.weight.detach().clone() for layer in model]

    first, second = moved()
    assert not torch.equal(first, second)
    assert not torch.equal(first[:16], first[16:])
    assert all(torch.equal(once, again) for once, again in zip((first, second), moved(), strict=True))


@pytest.mark.parametrize("size", [2, 4])
def test_the_logged_gradient_norm_is_that_of_the_mean_gap(size, tiny_model, tokenizer, tmp_path):
    """Over all the window's pairs, however many there are."""
    trainer = prepared(gapo_trainer(tiny_model, tokenizer, tmp_path))
    batches = window(trainer, size=size)
    trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    logged = trainer._buffers["train"].drain(trainer.accelerator)["anchor/gradient_norm"]
    torch.cat([gaps(trainer, batch) for batch in batches]).mean().backward()
    expected = np.linalg.norm([p.grad.norm().item() for p in trainer.model.parameters()])
    assert logged == pytest.approx(expected, rel=1e-5)


# What must not be in a difference


def _noise(module, args, output):
    return output + torch.rand_like(output) if module.training else output


def fixed_direction(trainer):
    generator = torch.Generator().manual_seed(3)
    parameters = trainer.model.named_parameters()
    return Direction.along({name: torch.randn(p.shape, generator=generator) for name, p in parameters})


@pytest.mark.parametrize("estimator", ["difference", "float32"])
@pytest.mark.parametrize("chance", ["NEFTune", "dropout"])
def test_chance_is_no_part_of_an_anchor_gap(chance, estimator, tiny_model, tokenizer, tmp_path):
    noisy = {"neftune_noise_alpha": 50.0} if chance == "NEFTune" else {"disable_dropout": False}
    dropout = {"attention_dropout": 0.5} if chance == "dropout" else {}
    found = []
    for options, settings in (({}, {}), (noisy, dropout), (noisy, dropout)):
        model = model_with(tiny_model, **settings)
        trainer = gapo_trainer(
            tiny_model, tokenizer, tmp_path, model=model, anchor_estimator=estimator, share_prompt="never", **options
        )
        batches = [trainer.before_measuring(batch) for batch in window(trainer)]
        quiet_gaps = [gaps(trainer, batch).detach() for batch in batches]
        trainer = prepared(trainer)
        if "neftune_noise_alpha" in options:  # what transformers does when training begins
            model.get_input_embeddings().register_forward_hook(_noise)
        trainer.model.train()
        if options:  # there is something that could come in
            once, again = (gaps(trainer, batches[0]).detach() for _ in range(2))
            assert not torch.equal(once, again)
        measured = trainer._probes[0].measure(batches, fixed_direction(trainer))
        found.append(
            torch.cat(
                [
                    columns["anchor_gap"] if "anchor_gap" in columns else here - columns["anchor_score_gap"]
                    for here, columns in zip(quiet_gaps, measured, strict=True)
                ]
            )
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], found[2])


# What a window allows


def test_per_pair_gradients_take_the_gap_alone(tiny_model, tokenizer, tmp_path):
    """Neither AlphaPO's reward nor a mixture of experts' auxiliary loss is one."""
    message = "'per-pair' makes the update from the gradients of the length-normalized"
    with pytest.raises(ValueError, match=message):
        gapo_trainer(tiny_model, tokenizer, tmp_path, anchor_estimator="per-pair", alpha=0.5)
    model = load(tiny_model)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.1
    with pytest.raises(ValueError, match=message):
        gapo_trainer(tiny_model, tokenizer, tmp_path, model=model, anchor_estimator="per-pair")


@pytest.mark.parametrize(
    ("kind", "waits"),
    [
        (DistributedType.NO, True),
        (DistributedType.MULTI_GPU, True),
        (DistributedType.MULTI_CPU, True),
        (DistributedType.DEEPSPEED, False),
        (DistributedType.FSDP, False),
    ],
)
def test_graphs_wait_where_the_update_may_come_later(kind, waits, tiny_model, tokenizer, tmp_path):
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path)
    trainer.accelerator = SimpleNamespace(distributed_type=kind)
    assert trainer.graphs_can_wait == waits


@pytest.mark.parametrize("here", [True, False])
def test_the_fused_head_is_used_where_both_want_it(here, tiny_model, tokenizer, tmp_path, monkeypatch):
    trainer = gapo_trainer(tiny_model, tokenizer, tmp_path, share_prompt="never")
    trainer._fused, batch = here, trainer.before_measuring(window(trainer)[0])
    trainer._sharing.check(trainer, batch)
    seen, forward = [], cpo.fused_token_logps
    monkeypatch.setattr(cpo, "fused_token_logps", lambda *args: seen.append("fused") or forward(*args))
    for wanted in (True, False):
        pairs = trainer.forward_pairs(batch, fused=wanted)
        assert pairs.chosen.shape == (4,)
        seen.append(wanted)
    assert seen == (["fused", True, False] if here else [True, False])
