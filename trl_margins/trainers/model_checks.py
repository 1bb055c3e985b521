"""Model, tokenizer, data and config must fit each other. What does not is an error before training, with the fix.

On a GPU, a token or a position beyond its table is an assertion on the device: it ends the process and names nothing.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftType
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.trainer_utils import SaveStrategy, align_special_tokens

from ..checks import shown
from ..disk import is_of_the_disk, writing_to
from ..distributed import local
from ..forward.head import causal_model
from ..forward.positions import positions_of, trained_positions
from ..pairs import ROW
from ..rows.tokenized import arrow_columns
from ..rows.tokens import tokenizer_of
from .base import MarginTrainer
from .fingerprints import place_of
from .loaded import why_not_loaded
from .weights import broken_names

logger = logging.getLogger(__name__)

_PROMPT, _COMPLETIONS = "prompt_ids", ("chosen_ids", "rejected_ids")  # apart, as DPOTrainer has them
_LABELS = ("chosen_labels", "rejected_labels")
_WHOLE = ("chosen_input_ids", "rejected_input_ids", "prompt_input_ids", *_LABELS)
_RESIZE = "resize_token_embeddings(len(tokenizer))"


def check_before_training(trainer: MarginTrainer) -> None:
    """Checks a trainer that is ready to train.

    Raises:
        ValueError: model, tokenizer, data and config do not fit each other; with what was found, and the fix.
        OSError: the output folder cannot be written to.
    """
    model, limits = causal_model(trainer.model), TokenLimits.of(trainer)
    _check_kind(model, trainer)
    if is_peft_model(trainer.model):
        _check_adapter(trainer.model, trainer.args)
        _check_computed(trainer)
    check_weights(trainer.model)
    _check_trains(trainer.model, trainer.args)
    limits.check_padding()
    _check_end_token(model, limits.tokenizer)
    _warn_of_lone_pairs(trainer)
    _warn_of_dropout(trainer)
    max_length = getattr(trainer, "max_length", None) or trainer.args.max_length
    evals = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for split, dataset in {"train": trainer.train_dataset, **evals}.items():
        if isinstance(dataset, Dataset):
            limits.check_dataset(dataset, split, max_length)
        elif isinstance(dataset, IterableDataset):
            limits.check_stream(split, max_length)
    check_savable(trainer)


def _warn_of_lone_pairs(trainer: MarginTrainer) -> None:
    compares = [part.name for _, part in trainer.objective.reading if part.compares_pairs]
    if compares and trainer.args.train_batch_size * trainer.accelerator.num_processes == 1:
        logger.warning(
            "%s compares the pairs of a mini-batch, and here each has one pair alone: raise "
            "per_device_train_batch_size, and lower gradient_accumulation_steps as much",
            " and ".join(map(repr, compares)),
        )


def _warn_of_dropout(trainer: MarginTrainer) -> None:
    """TRL switches off modules, and some models drop out in their own functions."""
    if not trainer.args.disable_dropout:
        return
    kept = {
        f"{name} of {type(module).__name__}": value
        for module in trainer.model.modules()
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float) and value
    }
    if kept:
        found = ", ".join(f"{name} ({value:g})" for name, value in kept.items())
        logger.warning(
            "disable_dropout=True leaves what is not a module: %s. Load the model with 0 for them (model_init_kwargs, "
            "or from_pretrained), else every forward pass is another",
            found,
        )


# Kinds of models


@contextmanager
def refusing_what_cannot_write() -> Iterator[None]:
    """Around a TRL trainer's construction, which loads a model by its name, and reads its generation config.

    Raises:
        ValueError: it has none, as no model without a language-model head has; or a name of another kind of model.
    """
    try:
        yield
    except ValueError as error:
        found = re.search(r"^Unrecognized configuration class <class '(?:\S*\.)?(\w+)'>", str(error))
        if found is None:
            raise
        raise ValueError(
            f"AutoModelForCausalLM loads no model that has a {found[1]}. One with an encoder and a decoder trains on "
            "the CPO base, as a model that AutoModelForSeq2SeqLM.from_pretrained has loaded; one that reads "
            "images on the DPO base, by its name"
        ) from error
    except AttributeError as error:
        if error.name != "generation_config" or not isinstance(error.obj, nn.Module):
            raise
        raise ValueError(
            f"a {type(error.obj).__name__} writes no text: it has no language-model head, or one that does not work "
            "from left to right. Load the model with AutoModelForCausalLM.from_pretrained, or, on the CPO base, "
            "AutoModelForSeq2SeqLM"
        ) from error


def _check_kind(model: PreTrainedModel, trainer: MarginTrainer) -> None:
    config = model.config
    if config.is_encoder_decoder:
        if not getattr(trainer, "is_encoder_decoder", False):
            raise ValueError(
                f"a {type(model).__name__} has an encoder and a decoder, which DPOTrainer does not take: train it on "
                "the CPO base (trl-margins train --base cpo; or MarginCPOTrainer, with a model that "
                "AutoModelForSeq2SeqLM.from_pretrained loads, not its name)"
            )
        return
    sees_the_end = not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and sees_the_end:
        raise ValueError(
            f"this {type(model).__name__} is an encoder: each token sees those after it, so no log-probability would "
            "be that of the completion. Use a decoder, or load it with "
            "AutoModelForCausalLM.from_pretrained(..., is_decoder=True)"
        )


# Adapters


def check_task(task: str | None) -> None:
    """
    Raises:
        ValueError: an adapter of this task cannot be loaded on a model that writes text.
    """
    if task not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(
            f"the adapter's task type is {shown(task)}, which does not write text: set lora_task_type to CAUSAL_LM "
            "(from Python: task_type, in the peft_config)"
        )


def _check_adapter(model: Any, args: Any) -> None:
    """Warns of a name in `target_modules` that no module has, where PEFT does not, and of an adapter that will not be
    loaded as it was trained.

    Raises:
        ValueError: a module to save that the model has not, another task, or an adapter that cannot train.
    """
    names = [name for name, _ in model.named_modules()]
    adapted = getattr(model.base_model, "targeted_module_names", None)
    for config in model.peft_config.values():
        check_task(config.task_type and str(getattr(config.task_type, "value", config.task_type)))
        if config.peft_type in (PeftType.MULTITASK_PROMPT_TUNING, PeftType.POLY):
            raise ValueError(
                f"the adapter is a {config.peft_type.value} one, which asks for the task of each row, and no "
                "preference trainer gives it: take PromptTuningConfig or LoraConfig"
            )
        # the second is not in the oldest PEFT
        if config.peft_type.value in ("PREFIX_TUNING", "CARTRIDGE") and args.gradient_checkpointing:
            raise ValueError(
                f"the adapter is a {config.peft_type.value} one, whose keys and values come in the cache, and "
                "gradient_checkpointing=True turns the cache off: set gradient_checkpointing=False"
            )
        if str(start := getattr(config, "init_lora_weights", "")).startswith("pissa_niter"):
            logger.warning(
                "init_lora_weights=%r draws the adapter's first values at random, and out of the model under it, "
                "wherever the adapter is loaded: that may then be another model than was trained. Set it to 'pissa', "
                "which draws nothing",
                start,
            )
        targets, kept = getattr(config, "target_modules", None), getattr(config, "modules_to_save", None) or ()
        for each in sorted(kept):
            if not any(name.endswith(each) for name in names):
                raise ValueError(
                    f"modules_to_save (--lora_modules_to_save) names {each!r}, which the model does not have. It has "
                    f"{', '.join(_leaves(model))}"
                )
        targeted = [*(adapted or ())]
        if getattr(config, "target_parameters", None):  # which are no modules; for experts, PEFT sets them
            targeted += [name for name, _ in model.named_parameters()]
        for option in ("rank_pattern", "alpha_pattern"):
            for each in sorted(getattr(config, option, None) or ()):
                if adapted and not any(get_pattern_key([each], name) == each for name in targeted):
                    logger.warning(
                        "%s names %r, which no module with an adapter is called: it has no effect. There are %s",
                        *(option, each, ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))),
                    )
        for each in sorted(targets if isinstance(targets, set | list) else ()):
            if adapted and not any(name == each or name.endswith(f".{each}") for name in adapted):
                logger.warning(
                    "target_modules (--lora_target_modules) names %r, which the model does not have: it has %s",
                    *(each, ", ".join(_leaves(model))),
                )


def _check_computed(trainer: MarginTrainer) -> None:
    """Warns that no checkpoint will be resumed.

    Raises:
        ValueError: nor can one be loaded at the end.
    """
    if (why := why_not_loaded(trainer.model)) is None:
        return
    if trainer.args.load_best_model_at_end:
        raise ValueError(
            f"the best checkpoint cannot be loaded at the end: {why}. Set load_best_model_at_end=False: "
            "each checkpoint is complete for evaluation and use"
        )
    logger.warning("no checkpoint of this run can be resumed: %s", why)


def _leaves(model: nn.Module) -> list[str]:
    """The last names of the modules that have weights, an adapter's own left out."""
    wrapped = re.compile(r"\.(base_layer|original_module|modules_to_save\..*|lora_.*)(?=\.)")
    owners = (wrapped.sub("", name).rpartition(".")[0] for name, _ in model.named_parameters() if ".lora_" not in name)
    return sorted({owner.rpartition(".")[2] for owner in owners})


def check_one_device(model: Any, what: str = "the model") -> None:
    """Checks that one device holds the whole model.

    TRL loads a model that is given by name with `device_map="auto"`, which spreads it over all GPUs of the process.

    Raises:
        ValueError: its parts are on several devices.
    """
    # not a set: devices are numbers, strings or torch.device
    devices = list(dict.fromkeys(map(str, (getattr(model, "hf_device_map", None) or {}).values())))
    if len(devices) > 1:
        raise ValueError(
            f"{what} is spread over several devices ({', '.join(devices)}), as device_map='auto' does where one "
            "process sees several GPUs. Start the run with `accelerate launch`, which gives every GPU a process with "
            "the whole model (FSDP2 shards one that is too large), or set CUDA_VISIBLE_DEVICES to one GPU"
        )


# Weights


def check_weights(model: nn.Module, whose: str = "the model") -> None:
    parameters = dict(model.named_parameters())
    if not (names := broken_names(parameters)):
        return
    broken, rows = parameters[names[0]].detach(), ""
    if any(module.weight is parameters[names[0]] for module in model.modules() if isinstance(module, nn.Embedding)):
        found = (~local(broken).isfinite()).any(dim=-1).nonzero().flatten().tolist()
        rows = f" (in the rows of {len(found)} tokens, from {found[0]} on: set them to 0 if no text needs them)"
    raise ValueError(
        f"{len(names)} of {whose}'s {len(parameters)} weight tensors hold NaN or infinity before training, "
        f"{names[0]} among them{rows}: its files are damaged or do not fit the class, or a cast overflowed (bfloat16 "
        "weights in float16). Load it again, in float32"
    )


def _check_trains(model: nn.Module, args: Any) -> None:
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        fix = "set requires_grad, give a peft_config, or name what trains with train_only"
        if is_peft_model(model):
            fix = "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
            fix += ", or set inference_mode to False in a new one's peft_config"
        raise ValueError(f"none of the model's {len(list(model.parameters()))} weight tensors trains: {fix}")
    name = next((name for name, dtype in trained.items() if dtype == torch.float16), None)
    if name and args.fp16:
        raise ValueError(
            f"fp16=True trains float32 weights with float16 forward passes, and {name} is float16 itself: load the "
            "model with dtype=torch.float32 (trl-margins train has --dtype float32), or use bf16=True"
        )
    if name:
        logger.warning(
            "%s trains in float16, in which small gradients and steps are lost, or come out too large: load the model "
            "in float32 or bfloat16",
            name,
        )


@contextmanager
def naming_dtypes(model: nn.Module) -> Iterator[None]:
    """Within the block, what PyTorch says of weights whose dtypes do not go together names them."""
    try:
        yield
    except RuntimeError as error:
        by_dtype: dict[torch.dtype, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                by_dtype.setdefault(parameter.dtype, name)
        if "same dtype" not in str(error) or len(by_dtype) < 2:
            raise
        found = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in by_dtype.items())
        raise ValueError(
            f"the model's weights have several dtypes ({found}), which its layers do not take together: load it with "
            "one dtype (dtype=torch.float32), or call model.float(); bf16=True trains float32 weights in bfloat16"
        ) from error


# Tokens and positions


@dataclass(frozen=True)
class TokenLimits:
    """The tokens and positions for which a model and its reference model have a row."""

    tokenizer: Any
    vocabulary: int | None  # rows of the smaller input embedding
    positions: int | None  # None where any number of them is computed
    trained_positions: int | None  # of rotary ones, which go on beyond it
    whose: str = "the model"  # has the smaller embedding
    pad_to_multiple_of: int | None = None
    head: int | None = None  # tokens that the smaller language-model head can write; what a prompt has may be more

    @classmethod
    def of(cls, trainer: MarginTrainer) -> TokenLimits:
        """Those of a trainer's models."""
        models, reference = [causal_model(trainer.model)], getattr(trainer, "ref_model", None)
        if reference is not None:
            models.append(causal_model(reference))
        vocabularies = [rows for rows in map(embedding_rows, models) if rows is not None]
        is_smaller = len(vocabularies) == 2 and vocabularies[1] < vocabularies[0]
        return cls(
            tokenizer=tokenizer_of(trainer.processing_class),
            vocabulary=min(vocabularies, default=None),
            head=min((rows for rows in map(_head_rows, models) if rows is not None), default=None),
            positions=min((table for table in map(positions_of, models) if table is not None), default=None),
            trained_positions=trained_positions(models[0]),
            whose="the reference model" if is_smaller else "the model",
            pad_to_multiple_of=getattr(trainer.args, "pad_to_multiple_of", None),
        )

    def check_padding(self) -> None:
        """
        Raises:
            ValueError: the padding token has no row in the embedding.
        """
        pad = self.tokenizer.pad_token_id
        if pad is not None and self.vocabulary is not None and not 0 <= pad < self.vocabulary:
            raise ValueError(
                f"the padding token {self._named(pad)} has no row in the embedding of {self.whose}, which has "
                f"{self.vocabulary}: {self._fix()}, or pad with a token that is there "
                "(tokenizer.pad_token = tokenizer.eos_token)"
            )

    def check_dataset(self, dataset: Dataset, split: str, max_length: int | None) -> None:
        """Checks all tokens of a data set, and the lengths of its rows.

        Raises:
            ValueError: a token or a position has no row.
        """
        columns = [name for name in (_PROMPT, *_COMPLETIONS, *_WHOLE) if _holds_tokens(dataset, name)]
        if not columns:
            return  # images among the text, say, or columns of a custom collator: its batches are checked
        numbered = [ROW] if ROW in dataset.column_names else []
        first, longest, longest_row, n_long = 0, 0, 0, 0
        for arrays in arrow_columns(dataset, *columns, *numbered):
            rows = arrays[-1].to_numpy() if numbered else range(first, first + len(arrays[0]))
            lists = dict(zip(columns, arrays, strict=False))
            for name, tokens in lists.items():
                self._check_tokens(tokens, rows, split, is_completion=name in (*_COMPLETIONS, *_LABELS))
            lengths = _lengths(lists)
            if max_length is not None and columns[0] == _PROMPT:  # else they have been cut already
                lengths = np.minimum(lengths, max_length)
            if lengths.max() > longest:
                longest, longest_row = int(lengths.max()), rows[lengths.argmax()]
            if self.trained_positions is not None:
                n_long += int((lengths > self.trained_positions).sum())
            first += len(arrays[0])
        self._check_length(longest, self.pad_to_multiple_of or 1, f"row {longest_row} of the {split} data set")
        if n_long:
            logger.warning(
                "%d of %d %s rows are longer than the %d positions that the model was made for "
                "(max_position_embeddings; the longest has %d tokens): max_length=%d would cut them",
                *(n_long, len(dataset), split, self.trained_positions, longest, self.trained_positions),
            )

    def check_stream(self, split: str, max_length: int | None) -> None:
        """
        Raises:
            ValueError: a row of this length, should there be one, has no position.
        """
        if self.positions is not None and (max_length is None or max_length > self.positions):
            raise ValueError(
                f"the {split} data set is a stream, of which max_length={max_length} lets rows through that the model "
                f"has no positions for (it has {self.positions}): set max_length={self.positions} or less"
            )

    def check_batch(self, batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Checks a batch before it goes to the device: those of streams, and of sets that come later.

        Raises:
            ValueError: a token or a position has no row.
        """
        for name in ("input_ids", *_WHOLE):
            tokens = batch.get(name)
            if not isinstance(tokens, torch.Tensor) or not tokens.numel() or tokens.device.type != "cpu":
                continue
            if self.vocabulary is not None and (largest := int(tokens.max())) >= self.vocabulary:
                position = int((tokens == largest).nonzero()[0, 0]) % len(rows)
                raise self._no_row(largest, f"row {rows[position].get(ROW, position)} of a batch")
            self._check_length(tokens.shape[-1], 1, "a row of a batch")

    def _check_tokens(self, tokens: pa.Array, rows: Sequence[int], split: str, is_completion: bool) -> None:
        flat = tokens.flatten()
        largest = pc.max(flat).as_py()
        limits = [each for each in (self.vocabulary, self.head if is_completion else None) if each is not None]
        if largest is None or all(largest < each for each in limits):
            return
        position = pc.list_parent_indices(tokens)[pc.index(flat, largest).as_py()].as_py()
        where = f"row {rows[position]} of the {split} data set"
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise self._no_row(largest, where)
        raise ValueError(
            f"{where} has the token {self._named(largest)} in a completion, and the language-model head has "
            f"{self.head} rows: call model.{_RESIZE} before training, which resizes it, too"
        )

    def _check_length(self, length: int, multiple: int, where: str) -> None:
        padded = -(-length // multiple) * multiple
        if self.positions is not None and padded > self.positions:
            raise ValueError(
                f"{where} takes {padded} tokens, and the model has learned {self.positions} positions: set "
                f"max_length={self.positions} or less, or filter out long rows"
            )

    def _named(self, token: int) -> str:
        return f"{token} ({self.tokenizer.convert_ids_to_tokens(token)!r})"

    def _fix(self) -> str:
        if self.whose == "the model":
            return f"call model.{_RESIZE} before training, or use the model's own tokenizer"
        return (
            f"give a reference model as large as the model: load it, call ref_model.{_RESIZE} and pass it as ref_model"
        )

    def _no_row(self, token: int, where: str) -> ValueError:
        return ValueError(
            f"{where} has the token {self._named(token)}, and the embedding of {self.whose} has {self.vocabulary} "
            f"rows (the tokenizer has {len(self.tokenizer)} tokens): {self._fix()}"
        )


def embedding_rows(model: PreTrainedModel) -> int | None:
    embedding: Any = model.get_input_embeddings()
    while not isinstance(embedding, nn.Embedding):  # PEFT wraps those that it trains
        wrapped = getattr(embedding, "base_layer", None)
        embedding = getattr(embedding, "original_module", None) if wrapped is None else wrapped
        if embedding is None:
            return None
    return embedding.num_embeddings


def _head_rows(model: PreTrainedModel) -> int | None:
    head: Any = model.get_output_embeddings()
    return getattr(getattr(head, "base_layer", head), "out_features", None)


def _holds_tokens(dataset: Dataset, name: str) -> bool:
    if name not in dataset.column_names:
        return False
    kind = dataset.data.schema.field(name).type
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)


def _lengths(lists: Mapping[str, pa.Array]) -> np.ndarray:
    """[N] tokens of each pair's longer row."""
    lengths = {name: pc.list_value_length(tokens).to_numpy(zero_copy_only=False) for name, tokens in lists.items()}
    completions = [lengths[name] for name in _COMPLETIONS if name in lengths]
    if not completions:
        return np.max([*lengths.values()], axis=0)
    return np.max(completions, axis=0) + lengths.get(_PROMPT, 0)


# Two models, or a model and a tokenizer, of different kinds


def _check_end_token(model: PreTrainedModel, tokenizer: Any) -> None:
    """Warns where the token that ends the model's texts is an ordinary one of the tokenizer, or none."""
    rows, ends = embedding_rows(model), getattr(model.config.get_text_config(), "eos_token_id", None)
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None and 0 <= end < (rows or 0)]
    if not ends or any(end in tokenizer.added_tokens_decoder or end in tokenizer.all_special_ids for end in ends):
        return
    logger.warning(
        "the model's config ends texts with token %d, which in the tokenizer is %r and not a special token: is it "
        "another model's tokenizer? It has %d tokens, the model's embedding %d rows",
        ends[0],
        tokenizer.convert_ids_to_tokens(ends[0]) if ends[0] < len(tokenizer) else None,
        len(tokenizer),
        rows,
    )


# Saving


def check_savable(trainer: MarginTrainer) -> None:
    """Saves everything but the weights, into a folder that is then removed: what cannot be saved is an error now.

    Raises:
        ValueError: a config or a tokenizer that cannot be saved, or tied weights that would be lost.
        OSError: the output folder cannot be written to.
    """
    args = trainer.args
    if not args.should_save:
        return
    with (
        writing_to(f"output_dir {args.output_dir}"),
        tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".trial-") as folder,
    ):
        if not is_peft_model(trainer.model):
            _check_ties(trainer.model)
            _try_to_save(trainer.model.config, folder, "config")
            _try_to_save(_aligned(trainer), folder, "generation_config")
        _try_to_save(trainer.processing_class, folder, "tokenizer")
    needed, free = _checkpoint_size(trainer), shutil.disk_usage(args.output_dir).free
    if SaveStrategy(args.save_strategy) != SaveStrategy.NO and free < needed:
        logger.warning(
            "a checkpoint takes at least %.1f GB, and %s has %.1f GB left: make room, or save less "
            "(save_only_model, save_total_limit)",
            *(needed / 1e9, args.output_dir, free / 1e9),
        )


def _check_ties(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: two names are one tensor, and what is saved would not say so.
    """
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    names: dict[Any, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        here = place_of(weight)
        names.setdefault((here, weight.shape) if here else id(weight), []).append(name)
    for same in names.values():
        loose = [name for name in same if tied.get(name) not in same]
        if len(loose) < 2:
            continue
        known = getattr(model, "_tied_weights_keys", None) or ()
        fix = "set model.config.tie_word_embeddings = True, or " if any(name in known for name in loose) else ""
        module = loose[1].rpartition(".")[0]
        raise ValueError(
            f"{loose[0]} and {loose[1]} are one tensor, which the model's config does not say: the saved model could "
            f"not be loaded as it was trained. Before training, {fix}give {module} weights of its own (copy.deepcopy)"
        )


def _aligned(trainer: MarginTrainer) -> GenerationConfig:
    """The model's generation config as `train` will leave it. One that was loaded is always saved; but `train` gives
    it the tokenizer's special tokens, and a changed one is saved only if it is valid."""
    generation: GenerationConfig = trainer.model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:
        copy: Any = SimpleNamespace(config=deepcopy(trainer.model.config), generation_config=deepcopy(generation))
        align_special_tokens(copy, trainer.processing_class)
        generation = copy.generation_config
    return generation


def _try_to_save(part: Any, folder: str, name: str) -> None:
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split())
        if is_of_the_disk(error):
            raise OSError(reason) from error
        fix = {
            "generation_config": "set model.generation_config.do_sample = True, or the options named to None; for "
            "trl-margins train, in the generation_config.json of the model's folder",
            "config": "correct model.config",
            "tokenizer": "use a tokenizer that can be saved",
        }[name]
        raise ValueError(
            f"the model's {name} cannot be saved, so that training would end without a model: {reason} Before "
            f"training, {fix}"
        ) from error


def _checkpoint_size(trainer: MarginTrainer) -> int:
    """Bytes of weights, and of AdamW's two numbers for each that trains."""
    model, args = trainer.model, trainer.args
    sizes = [(p.requires_grad, p.numel() * p.element_size()) for p in model.parameters()]
    trained = sum(size for trains, size in sizes if trains)
    weights = trained if is_peft_model(model) else sum(size for _, size in sizes)
    return weights + (0 if args.save_only_model or "adamw_torch" not in args.optim else 2 * trained)
