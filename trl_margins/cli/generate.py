"""`trl-margins generate`: answers of a model to prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.loading import load_splits, pick_split
from .options import DTYPES, OptionsParser, RowOptions, option
from .setup import check_writable, load_model, load_tokenizer

if TYPE_CHECKING:
    from ..generation.answers import Answering
    from ..generation.sampling import Sampling

logger = logging.getLogger(__name__)

ENGINES = ("auto", "vllm", "continuous", "generate")


@dataclass(kw_only=True)
class GenerateArguments(RowOptions):
    """Model, prompts, and how answers are sampled."""

    model_name_or_path: str = option("Folder (also an adapter's), Hub id, or bundled:smollm2-135m-instruct.")
    dataset_name: str = option(
        "A file, a saved data set, a folder of files or a Hub id: prompts, pairs, lists or conversations."
    )
    dataset_split: str | None = option("Split; by default the only one there is.", None)
    out: str = option("File for the answers, .jsonl or .jsonl.gz. If it has some of this run already, they are kept.")
    n: int = option("Answers per prompt.", 5)
    temperature: float = option("0 takes the most probable token.", 0.8)
    top_p: float = option("Share of the probability from which tokens are drawn.", 0.95)
    top_k: int = option("Number of tokens from which they are drawn; 0 for all.", 0)
    max_new_tokens: int = option("Longest answer.", 2048)
    seed: int = option("Seed of all draws.", 0)
    as_chat: bool | None = option(
        "Whether a prompt in text is the user's message. By default where the tokenizer has a chat template, but "
        "not in pairs, which keep the form that training has.",
        None,
    )
    max_prompts: int | None = option("Only the first prompts.", None)
    shard: str | None = option("I/N: only every N-th prompt, from the I-th; for several devices.", None)
    engine: str = option(
        "vllm; continuous or generate, which are transformers'. By default vllm where it is installed and there is a "
        "GPU, else continuous where there is flash attention, else generate.",
        "auto",
        choices=ENGINES,
    )
    engine_options: dict | str | None = option("Further arguments of vLLM's LLM or of ContinuousBatchingConfig.", None)
    batch_size: int = option("Answers per forward pass of `generate`.", 64)
    dtype: str = option(f"Dtype of the weights: {', '.join(DTYPES)}.", "auto", choices=DTYPES)
    trust_remote_code: bool = option("Run the model's own code.", False)


def main(argv: Sequence[str]) -> int:
    """Answers, writes the file."""
    (args,) = OptionsParser("generate", GenerateArguments).parse(argv)
    from ..generation.answers import answer, settings_of
    from ..generation.sampling import Sampling
    from ..generation.store import Store

    sampling = Sampling(args.n, args.temperature, args.top_p, args.top_k, args.max_new_tokens, args.seed)
    check_writable(Path(args.out).parent)
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    rows = prompts_of(args, tokenizer)
    store = Store(args.out, settings_of(args.model_name_or_path, args.engine, args.dtype, sampling))
    answer(rows, answering(args, tokenizer, sampling), sampling, store, args.dataset_name)
    print(args.out)
    return 0


def prompts_of(args: GenerateArguments, tokenizer: Any) -> list[Any]:
    """The rows to answer."""
    from ..rows import open_prompts
    from ..rows.tokens import prepare_tokenizer

    dataset = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    as_chat = tokenizer.chat_template is not None if args.as_chat is None else args.as_chat
    name = Path(args.dataset_name).name
    rows = open_prompts(dataset, name, args.prompt_column, args.system_column, as_chat)[: args.max_prompts]
    prepare_tokenizer(tokenizer, [name] if any(row.is_conversational for row in rows) else [])
    if args.shard is None:
        return rows
    try:
        first, total = (int(part) for part in args.shard.split("/"))
        if not 1 <= first <= total:
            raise ValueError
    except ValueError:
        raise ValueError(f"shard must be I/N with I from 1 to N, such as 1/4; it is {args.shard!r}") from None
    return rows[first - 1 :: total]


def answering(args: GenerateArguments, tokenizer: Any, sampling: Sampling) -> Answering:
    """The model in an engine."""
    import torch

    from ..generation import local
    from ..generation.answers import Answering

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = load_model(
        args.model_name_or_path, dtype=args.dtype, device_map=None, trust_remote_code=args.trust_remote_code
    )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{args.model_name_or_path} is an encoder-decoder model: generate takes causal models")
    model = merged(model).to(device)

    def engine(prompts: Any, sampling: Any, stop: Any) -> Any:
        return local.generate(model, prompts, sampling, stop, tokenizer.pad_token_id, args.batch_size)

    end = model.generation_config.eos_token_id
    return Answering(
        args.model_name_or_path,
        tokenizer,
        engine,
        end if isinstance(end, list) else [end],
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


def merged(model: Any) -> Any:
    """The model with its adapter, if it has one, in its weights."""
    from accelerate.utils import is_peft_model

    return model.merge_and_unload() if is_peft_model(model) else model
