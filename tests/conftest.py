"""Tiny models, a byte-level tokenizer and small preference sets, all built in code."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# argparse asks for the terminal's size with each of some two hundred options
os.environ.setdefault("COLUMNS", "80")
os.environ.setdefault("LINES", "24")

import copy
import functools
import gc
import logging
import random
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import jinja2
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_margins import MarginCPOConfig, MarginCPOTrainer, MarginDPOConfig, MarginDPOTrainer
from trl_margins.methods import METHODS
from trl_margins.trainers import card

# The same examples on every machine; HYPOTHESIS_PROFILE=random looks for new ones
settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Every model card is made from the same few templates, which Jinja compiles for each; and accelerate looks several
# times a batch for what is installed
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]
accelerate.utils.imports._is_package_available = functools.cache(accelerate.utils.imports._is_package_available)
# Cards have no pictures, nor have those of the processes that tests fork: drawing takes several times as long as a run
drawn_pictures = card.pictures
card.pictures = lambda trainer: []

# tests in the background of a script, where Ctrl-C is ignored, send it, too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
WORDS = ("red", "blue", "small", "large", "round", "cat", "dog", "bird", "runs", "sings", "over", "near", "the", "a")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def rest_rehearsed(cases: Iterable[Any], at_once: int) -> list[Any]:
    """The cases of a test that takes long: all but the first few are left to `make rehearsal`."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.rehearsal] * (i >= at_once)) for i, case in enumerate(values)]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# tests with many cases of one kind: `make test` has every n-th of them, and `make rehearsal` the others
MANY = {
    "test_anchor.test_a_window_shorter_than_k_has_a_direction_of_its_own": 3,
    "test_anchor_groups.test_select_has_the_same_groups": 5,
    "test_anchor_groups.test_the_scope_is_what_moves_and_not_what_trains": 3,
    "test_arguments.test_a_collator_that_changes_which_pairs_there_are": 3,
    "test_arguments.test_the_dtype_of_a_model_by_name": 5,
    "test_bad_data.test_a_data_set": 8,
    "test_best.test_a_best_that_does_not_count_any_more": 3,
    "test_best.test_one_tracker_run_and_no_number_twice": 3,
    "test_best.test_the_peak_is_delivered": 3,
    "test_best.test_what_it_is_chosen_by_is_said_before_training": 4,
    "test_checked.test_healthy_passes_agree": 4,
    "test_checkpoints.test_half_and_half_is_a_whole": 3,
    "test_damaged.test_each_file_of_a_checkpoint": 4,
    "test_distributed.test_loss_margins_weights_and_gradients_are_the_same": 3,
    "test_equals_trl.test_cpo": 4,
    "test_equals_trl.test_dpo": 4,
    "test_expansion.test_what_expands_too_far": 4,
    "test_files.test_a_column_of_a_table_that_begins_late": 5,
    "test_files.test_a_column_that_is_empty_in_one_table": 3,
    "test_finite.test_training_stops_and_names_the_rows": 5,
    "test_folder.test_a_new_run_has_its_folder_for_itself": 3,
    "test_folder.test_a_trainer_that_trains_again_is_a_new_run": 3,
    "test_inspect.test_truncation_is_the_trainers": 4,
    "test_loaded.test_a_damaged_model": 2,
    "test_methods.test_every_method_trains_on_both_bases": 4,
    "test_migration.test_what_is_published_resolves": 3,
    "test_pair_log.test_a_line_a_pair": 3,
    "test_pairing.test_k_pairs": 3,
    "test_printed.test_commands": 2,
    "test_printed.test_flags": 2,
    "test_printed.test_flags_in_a_run": 6,
    "test_printed.test_names": 2,
    "test_probes.test_logits_of_all_tokens_are_never_built": 3,
    "test_probes.test_the_heads_own_step_is_felt": 3,
    "test_ranking.test_every_reward_is_ranked_by_eq_9": 3,
    "test_recipes.test_the_command_runs_dry": 6,
    "test_report.test_a_run_has_the_pictures_it_has_numbers_for": 2,
    "test_reproduce.test_each_method_of_a_table_is_trained_on_each_model": 3,
    "test_row_tokens.test_what_the_template_reads": 3,
    "test_run_checks.test_a_gappo_recipe_without_its_weight_is_simpo": 6,
    "test_run_checks.test_a_recipe_is_right": 6,
    "test_run_checks.test_an_empty_value_is_unsaid": 2,
    "test_run_checks.test_losses": 2,
    "test_run_checks.test_numbers": 6,
    "test_run_checks.test_values_that_are_right": 6,
    "test_run_checks.test_values_that_are_wrong": 6,
    "test_schemas.test_a_schema_means_the_same_to_every_command": 8,
    "test_screen.test_before_the_first_step": 2,
    "test_secrets.test_train_and_resume_write_and_print_none": 2,
    "test_shared_prompt.test_equals_the_standard_pass": 2,
    "test_sharing.test_a_head_that_is_wrong_is_not_used": 2,
    "test_syncs.test_a_step_reads_one_value": 2,
    "test_tokenization.test_both_bases_have_dpo_trainers_tokens": 2,
    "test_trl_features.test_adapters": 4,
    "test_trl_features.test_gradient_checkpointing": 3,
    "test_trl_features.test_methods_on_images": 4,
    "test_trl_features.test_options": 4,
}
VOCABULARY = len(SPECIAL) + 256
# of Llama's config, and of those like it
TINY: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
}
BASES = {"cpo": (MarginCPOTrainer, MarginCPOConfig), "dpo": (MarginDPOTrainer, MarginDPOConfig)}


def bases_of(method: str) -> tuple[str, ...]:
    """Those that can carry it, its own first."""
    return tuple(getattr(METHODS[method], "bases", BASES))


# What trains takes the five papers' own methods on both bases, and each of their baselines on one
OWN_METHODS = [id for id, row in METHODS.items() if not getattr(row, "baseline", False)]
METHODS_AND_BASES = [(id, base) for id in METHODS for base in bases_of(id)]
TRAINED = [(id, base) for id, base in METHODS_AND_BASES if id in OWN_METHODS or base == bases_of(id)[0]]


# Those whose tests start processes or take longest: two that are left for the end would keep one core waiting
FIRST = (
    *("test_notebook", "test_gpu_benchmark", "test_distributed", "test_site", "test_docs", "test_checkpoints"),
    *("test_launch", "test_screen", "test_plugin", "test_safety", "test_sharded", "test_zero3", "test_compare"),
    *("test_folder", "test_ieee", "test_trl_features"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is rehearsed
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In this order: pytest-xdist starts one worker with the first half, where one server forks for all of them."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    seen: Counter[str] = Counter()
    for item in items:
        name = f"{item.path.stem}.{getattr(item, 'originalname', '')}"
        if name in MANY and seen[name] % MANY[name]:
            item.add_marker("rehearsal")
        seen[name] += 1


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect() -> None:
    """accelerate collects garbage at every start and end of a training, over all that is imported: of a run of a tiny
    model, that is most of the time. What is there before a module's tests is no garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)  # and there is much to go through


@pytest.fixture(autouse=True)
def log_of_warnings() -> None:
    """A test that looks at INFO asks for it, whatever level a command of an earlier one has left."""
    logger = logging.getLogger("trl_margins")
    if logger.level != logging.WARNING:  # setting a level takes longer than many a test
        logger.setLevel("WARNING")


@pytest.fixture(scope="module")
def pictures_of_cards() -> Iterator[None]:
    """For the tests that look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "pictures", drawn_pictures)
        yield


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    from trl_margins import registry
    from trl_margins.links import CPO_LINKS, DPO_LINKS
    from trl_margins.methods import MARGINS, METHODS, WEIGHTS
    from trl_margins.rewards import REWARDS
    from trl_margins.trainers import configs

    tables = (WEIGHTS, MARGINS, METHODS, REWARDS, CPO_LINKS, DPO_LINKS, registry.OPTIONS, configs._CONFIGS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    configs._EXTENDED.clear()


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    """FSDP2 over a single process: it gathers, casts and reshards as it does over several. A fake group of PyTorch's
    will do for one, and has no threads, which FSDP2 would keep alive.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer Llama with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, pad_token_id=0)
    return saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a one-layer T5 with its tokenizer."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return saved(T5ForConditionalGeneration(config), tmp_path_factory.mktemp("t5"))


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder: str, noise: float = 0.0) -> Any:
    """The model in fp32; with noise, a policy that has left its reference."""
    model = copy.deepcopy(_loaded(folder, max(file.stat().st_mtime_ns for file in Path(folder).iterdir())))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


@functools.lru_cache(maxsize=32)
def _loaded(folder: str, changed: int) -> Any:
    """Reading takes six times as long as copying, and there are thousands."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32)


def sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def preference_rows(n: int, form: str = "standard", scores: Any = None, seed: int = 0) -> Dataset:
    """n pairs; `form` is standard, conversational, or implicit (whole transcripts without a prompt column)."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        prompt, chosen, rejected = sentence(rng, 2, 5), sentence(rng, 1, 6), sentence(rng, 1, 6)
        if form == "standard":
            row = {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected}
        elif form == "conversational":
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        else:
            row = {"chosen": f"Q: {prompt} A: {chosen}", "rejected": f"Q: {prompt} A: {rejected}"}
        low = rng.randint(1, 6)
        pair = (low + rng.randint(0, 12) / 4, float(low)) if scores is None else scores(i)
        rows.append({**row, "score_chosen": float(pair[0]), "score_rejected": float(pair[1])})
    return Dataset.from_list(rows)


def quiet(**overrides: Any) -> dict[str, Any]:
    """Config fields of a small, silent CPU run."""
    return {
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "max_length": 128,
        "disable_tqdm": True,
        "save_strategy": "no",
        **overrides,
    }


def first_batch(trainer: Any, n: int = 4) -> Any:
    """The collated first n rows of the training set, as a step gets them."""
    collated = trainer.data_collator([trainer.train_dataset[i] for i in range(n)])
    (batch,), _ = trainer.get_batch_samples(iter([collated]), 1, trainer.args.device)
    return trainer._prepare_inputs(batch)


def loss_and_gradients(trainer: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    """Relative to each tensor's largest entry."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error < rtol, f"{name}: relative error {error:.2e}"


def trainer_of(base: str, folder: str, tokenizer: Any, out: Any, rows: Any, evals: Any = None, **options: Any) -> Any:
    """The trainer of a base, without a term unless `options` name one; of a stream, for one step."""
    cls, config_cls = BASES[base]
    if not isinstance(rows, Dataset):
        options["max_steps"] = 1
    config = config_cls(**quiet(output_dir=str(out), **{"max_length": 256, **options}))
    return cls(load(folder), args=config, train_dataset=rows, eval_dataset=evals, processing_class=tokenizer)
