"""With no term set, the Margin trainers are TRL's: the same loss and the same gradients for every loss TRL knows."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import (
    VOCABULARY,
    assert_same_gradients,
    first_batch,
    load,
    loss_and_gradients,
    preference_rows,
    quiet,
    saved,
)
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.links import TRLS

CPO_CASES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.0},
    {"loss_type": "ipo", "alpha": 0.25},
    {"loss_type": "hinge", "beta": 0.05},
    {"loss_type": "ipo", "cpo_alpha": 0.0},
    {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
    {"loss_type": "simpo", "label_smoothing": 0.2},
    {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.5},
]
# exo_pair needs label smoothing; robust is sigmoid without it
DPO_CASES = [
    {"loss_type": [name], "label_smoothing": 0.1 if name in ("exo_pair", "robust", "aot", "aot_unpaired") else 0.0}
    for name in sorted(TRLS["dpo"])
] + [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["sigmoid"], "label_smoothing": 0.3},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence", "loss_type": ["hinge"]},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"ld_alpha": 0.4},
    {"ld_alpha": 0.0, "loss_type": ["ipo"]},
    {"use_weighting": True},
    {"use_weighting": True, "loss_type": ["sigmoid", "ipo"]},
    {"precompute_ref_log_probs": True},
]


def label(case: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


# the shared-prompt pass rounds differently, which steep losses of summed log-ratios show
SHARING = {"never": 1e-5, "always": 1e-4}


def compare(ours, theirs, share: str) -> None:
    batch = first_batch(ours)
    their_loss, their_gradients = loss_and_gradients(theirs, first_batch(theirs))
    # DiscoPOP divides the log-ratios, and their rounding, by its temperature of 0.05
    steep = 5 if "discopop" in ours.args.loss_type else 1
    our_loss, our_gradients = loss_and_gradients(ours, batch)
    if share == "never":  # TRL's own method, to the last bit
        assert ours.runs_trl
        assert torch.equal(our_loss, their_loss)
        assert all(torch.equal(our_gradients[name], value) for name, value in their_gradients.items())
        ours.options.share_prompt = "auto"  # and ours, which computes the same loss beside a term
        assert not ours.runs_trl
        our_loss, our_gradients = loss_and_gradients(ours, batch)
    assert torch.isclose(our_loss, their_loss, rtol=1e-5), (our_loss, their_loss)
    assert_same_gradients(our_gradients, their_gradients, rtol=steep * SHARING[share])


def test_every_loss_is_covered():
    assert {case["loss_type"] for case in CPO_CASES} == TRLS["cpo"]


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("case", CPO_CASES, ids=label)
def test_cpo(case, share, tiny_model, tokenizer, tmp_path):
    common = {"train_dataset": preference_rows(6), "processing_class": tokenizer}
    settings = quiet(output_dir=str(tmp_path), **case)
    ours = MarginCPOTrainer(
        load(tiny_model), MarginCPOConfig(**settings, share_prompt=share, tokenization="cpo"), **common
    )
    theirs = CPOTrainer(load(tiny_model), CPOConfig(**settings), **common)
    compare(ours, theirs, share)


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("case", DPO_CASES, ids=label)
def test_dpo(case, share, tiny_model, tokenizer, tmp_path):
    common = {"train_dataset": preference_rows(6), "processing_class": tokenizer}
    settings = quiet(output_dir=str(tmp_path), **case)

    def models():
        return {"model": load(tiny_model, noise=0.02), "ref_model": load(tiny_model)}

    ours = MarginDPOTrainer(**models(), args=MarginDPOConfig(**settings, share_prompt=share), **common)
    theirs = DPOTrainer(**models(), args=DPOConfig(**settings), **common)
    compare(ours, theirs, share)


@pytest.fixture(scope="module")
def tiny_mixture(tmp_path_factory) -> str:
    """Folder of a one-layer mixture of experts that reports its router's logits."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return saved(MixtralForCausalLM(config), tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("share", SHARING)
@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_mixture_of_experts(base, share, tiny_mixture, tokenizer, tmp_path):
    """The load-balancing loss is part of the loss."""
    common = {"train_dataset": preference_rows(6), "processing_class": tokenizer}
    ours_cls, ours_config, theirs_cls, theirs_config = {
        "cpo": (MarginCPOTrainer, MarginCPOConfig, CPOTrainer, CPOConfig),
        "dpo": (MarginDPOTrainer, MarginDPOConfig, DPOTrainer, DPOConfig),
    }[base]
    settings, own = quiet(output_dir=str(tmp_path)), {"tokenization": "cpo"} if base == "cpo" else {}
    ours = ours_cls(load(tiny_mixture), args=ours_config(**settings, share_prompt=share, **own), **common)
    theirs = theirs_cls(load(tiny_mixture), args=theirs_config(**settings), **common)
    assert ours.aux_loss_enabled
    compare(ours, theirs, share)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(MarginCPOConfig, CPOConfig), (MarginDPOConfig, DPOConfig)], ids=["cpo", "dpo"]
)
def test_same_defaults(ours, theirs, tmp_path):
    config, reference = ours(str(tmp_path), use_cpu=True), theirs(str(tmp_path), use_cpu=True)
    for name in reference.__dataclass_fields__:
        # the NaN filter waits for the device in every step: tests/test_syncs.py
        if name not in ("logging_dir", "accelerator_config", "logging_nan_inf_filter"):
            assert getattr(config, name) == getattr(reference, name), name


@pytest.mark.parametrize("base", ["cpo", "dpo"])
def test_same_logged_names(base, tiny_model, tokenizer, tmp_path):
    """Also with TRL's own config: only the import was swapped."""
    trainers = {"cpo": (MarginCPOTrainer, CPOTrainer, CPOConfig), "dpo": (MarginDPOTrainer, DPOTrainer, DPOConfig)}
    rows = preference_rows(8, "conversational")  # whose tokens are the same to CPOTrainer
    logged = []
    for cls in trainers[base][:2]:
        # steps that move the rewards well beyond the rounding of the 150 nats that they are differences of
        options = {"eval_strategy": "epoch", "num_train_epochs": 1, "learning_rate": 1e-4}
        args = trainers[base][2](**quiet(output_dir=str(tmp_path), **options))
        model = tiny_model if base == "dpo" else load(tiny_model)
        trainer = cls(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
        trainer.train()
        logged.append(trainer.state.log_history)
    for ours, theirs in zip(*logged, strict=True):
        extra = {"eval_pwa", "eval_pwa_all", "eval_spearman", "eval_n_pairs", "eval_n_pairs_gap"}
        assert ours.keys() - extra == theirs.keys()
        for name, value in theirs.items():
            measured = any(word in name for word in ("time", "per_second", "logits/"))
            if not measured or (base == "dpo" and "logits/" in name):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_fused_head_that_fails_with_router_logits(tokenizer, tmp_path, caplog):
    """TRL asks GraniteMoe's config for an entry that it does not have; the whole logits take its place."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = GraniteMoeForCausalLM(GraniteMoeConfig(**small, **experts, vocab_size=VOCABULARY, pad_token_id=0))
    trainer = MarginDPOTrainer(
        load(saved(model, tmp_path / "model")),
        args=MarginDPOConfig(**quiet(output_dir=str(tmp_path / "out"), max_steps=1, router_aux_loss_coef=0.1)),
        train_dataset=preference_rows(4),
        processing_class=tokenizer,
    )
    tokens = {key: first_batch(trainer)[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        right = model(**tokens, output_router_logits=True).aux_loss
    trainer.train()
    assert "TRL's fused LM head fails" in caplog.text
    (entry,) = (entry for entry in trainer.state.log_history if "aux_loss" in entry)
    assert entry["aux_loss"] == pytest.approx(right.item(), rel=1e-4)
    assert entry["loss"] == pytest.approx(math.log(2) + 0.1 * right.item(), rel=1e-4)


@pytest.mark.parametrize("coefficient", [0.5, 0.0, None])
def test_experts_without_an_auxiliary_loss(coefficient, tokenizer, tmp_path, caplog):
    """A coefficient of it has no effect, which is said of one's own."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Glm4MoeConfig(**small, **experts, head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1)
    config.vocab_size, config.pad_token_id = VOCABULARY, 0
    trainer = MarginDPOTrainer(
        load(saved(Glm4MoeForCausalLM(config), tmp_path / "model")),
        args=MarginDPOConfig(**quiet(output_dir=str(tmp_path / "out"), max_steps=2, router_aux_loss_coef=coefficient)),
        train_dataset=preference_rows(8),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert caplog.text.count("no effect of router_aux_loss_coef") == bool(coefficient)
