"""`trl-margins generate`: answers of a model to prompts."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.loading import load_splits, pick_split
from ..disk import check_writable
from .options import DTYPES, OptionsParser, RowOptions, option, usage, warn_of_unread
from .setup import (
    base_of,
    check_files,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    weights_of,
)

if TYPE_CHECKING:
    from ..generation.answers import Answering
    from ..generation.local import Answers
    from ..generation.sampling import Sampling
    from ..generation.store import Store
    from ..rows import PreferenceRow
    from ..rows.messages import Message

logger = logging.getLogger(__name__)

BENCHMARKS = ("alpaca-eval", "arena-hard", "mt-bench")
OR_THE_BENCHMARKS = ", or the benchmark's with --for"
ENGINES = ("auto", "vllm", "continuous", "generate")


@dataclass(kw_only=True)
class GenerateArguments(RowOptions):
    """Model, prompts, and how answers are sampled."""

    model_name_or_path: str = option("Folder (also an adapter's), Hub id, or bundled:smollm2-135m-instruct.")
    dataset_name: str = option(
        "A file, a saved data set, a folder of files or a Hub id: prompts, pairs, lists or conversations."
    )
    dataset_split: str | None = option("Split; by default the only one there is.", None)
    out: str = option(
        "File for the answers, .jsonl or .jsonl.gz; with --for, a folder. If it has some of this run already, they "
        "are kept."
    )
    benchmark: str | None = option(
        f"{', '.join(BENCHMARKS)}: writes the file that its judge reads. The data set is its questions.",
        None,
        aliases=["--for"],
    )
    decoding: str | None = option(
        "With --for alpaca-eval, as SimPO decodes which family of models: that of a recipe, such as "
        "llama-3-8b-instruct.",
        None,
    )
    model_id: str | None = option("With --for, the model's name for the judge. By default that of its folder.", None)
    n: int | None = option("Answers per prompt. Default: 5, or 1 with --for.", None)
    temperature: float | None = option(f"0 takes the most probable token. Default: 0.8{OR_THE_BENCHMARKS}.", None)
    top_p: float | None = option(
        f"Share of the probability from which tokens are drawn. Default: 0.95{OR_THE_BENCHMARKS}.", None
    )
    top_k: int | None = option("Number of tokens from which they are drawn; 0 for all, the default.", None)
    max_new_tokens: int | None = option(f"Longest answer. Default: 2048{OR_THE_BENCHMARKS}.", None)
    seed: int = option("Seed of all draws.", 0)
    as_chat: bool | None = option(
        "Whether a prompt in text is the user's message. By default where the tokenizer has a chat template, but "
        "not in pairs, which keep the form that training has.",
        None,
    )
    chat_template_kwargs: dict | str | None = option(
        "Variables of the chat template, in JSON. Those of a row come first.", None
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
    from ..generation.answers import answer
    from ..generation.sampling import Sampling

    if args.benchmark is not None:
        return answer_benchmark(args, args.benchmark)
    with usage():
        for name in ("decoding", "model_id"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} is for a benchmark: name one with --for, or leave it out")
        sampling, shard = Sampling(**given(args)), shard_of(args)
    check_files([args.out], [args.dataset_name], continues=True)
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    rows = prompts_of(args, tokenizer)
    engine = engine_of(args.engine)
    _warn_of_unread(args, engine, [sampling])
    store = store_of(args, engine, args.out, sampling, weights_of(args.model_name_or_path))
    answer(rows, answering(args, engine, tokenizer), sampling, store, Path(args.dataset_name).name, shard)
    print(args.out)
    return 0


def _warn_of_unread(args: GenerateArguments, engine: str, settings: Sequence[Sampling]) -> None:
    draws = any(each.draws_tokens for each in settings)
    unread = (
        ("batch_size", engine == "generate", "the engine generate, and this is " + engine),
        ("top_p top_k seed", draws, "a temperature above 0"),
    )
    warn_of_unread(unread, args)


def given(args: GenerateArguments) -> dict[str, Any]:
    """Fields of Sampling that have a value."""
    names = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "seed")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def store_of(
    args: GenerateArguments, engine: str, out: str | Path, sampling: Sampling, weights: Mapping[str, str]
) -> Store:
    """The file of answers that are drawn in this way; `weights` are the model's `weights_of`."""
    from ..generation.store import Store

    family = "vllm" if engine == "vllm" else "transformers"  # whose engines give the same answers
    settings = {"model": args.model_name_or_path, "engine": family, "dtype": args.dtype, **asdict(sampling)}
    settings |= {"chat_template_kwargs": _mapping(args, "chat_template_kwargs") or None}
    return Store(out, {**settings, **weights})


def answer_benchmark(args: GenerateArguments, name: str) -> int:
    """Answers a benchmark's questions, writes the file for its judge."""
    from ..generation.answers import answer, prompt_columns
    from ..generation.benchmarks import ask, decoding_of, load_questions, write_answers
    from ..generation.store import key_of
    from ..rows import PreferenceRow
    from ..rows.tokens import prepare_tokenizer

    for other in ("shard", "as_chat", "prompt_column", "system_column", "dataset_config", "dataset_split"):
        if getattr(args, other) is not None:
            raise ValueError(f"--{other} is for prompts, not for a benchmark: leave it out, or leave out --for")
    if args.n not in (None, 1):
        raise ValueError(f"the judge reads one answer to each question: leave out --n, which is {args.n}")
    if Path(args.out).suffix in (".json", ".jsonl", ".gz"):
        raise ValueError(f"with --for, --out is a folder, in which the judge finds the file; it is {args.out}")
    model = args.model_id or Path(args.model_name_or_path).resolve().name
    if model != Path(model).name:
        raise ValueError(f"model_id is also the name of a file, so it has no slash; it is {model!r}")
    questions = load_questions(name, args.dataset_name)[: args.max_prompts]
    settings = decoding_of(name, questions, args.decoding, **given(args))
    made = Path(args.out) / "generated" / model
    check_writable(made)
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    prepare_tokenizer(tokenizer, [name])
    engine = engine_of(args.engine)
    _warn_of_unread(args, engine, settings)
    asked, template = answering(args, engine, tokenizer), template_of(args, tokenizer)
    weights = weights_of(args.model_name_or_path)  # which takes a while, so once for all turns

    def replies(conversations: list[list[Message]], sampling: Sampling) -> list[str]:
        # one file for the answers to one turn with one temperature
        part = f"turn-{(len(conversations[0]) + 1) // 2}-temperature-{sampling.temperature:g}"
        rows = [PreferenceRow(messages, [], template) for messages in conversations]
        store = store_of(args, engine, made / f"{part}.jsonl", sampling, weights)
        texts = {key_of(row): row["responses"][0] for row in answer(rows, asked, sampling, store, part)}
        return [texts.get(key_of(prompt_columns(row)), "") for row in rows]  # "" where there was no room

    print(write_answers(name, args.out, model, questions, ask(questions, settings, replies)))
    return 0


def prompts_of(args: GenerateArguments, tokenizer: Any) -> list[PreferenceRow]:
    """The rows to answer."""
    from ..rows import open_prompts
    from ..rows.tokens import prepare_tokenizer
    from ..rows.turns import chat_turns, unsplit_note

    dataset = pick_split(load_splits(args.dataset_name, args.dataset_config), args.dataset_split, args.dataset_name)
    as_chat = tokenizer.chat_template is not None if args.as_chat is None else args.as_chat
    name = Path(args.dataset_name).name
    rows = open_prompts(dataset, name, args.prompt_column, args.system_column, as_chat)[: args.max_prompts]
    if args.as_chat:  # of pairs, too, where that is said
        texts = {i: chat_turns(str(row.prompt)) for i, row in enumerate(rows) if not row.is_conversational}
        rows = [replace(row, prompt=texts[i]) if i in texts else row for i, row in enumerate(rows)]
        if note := unsplit_note((prompt, i) for i, prompt in texts.items()):
            logger.warning("%s: %s", name, note)
    are_chat = any(row.is_conversational for row in rows)
    warn_of_unread([("as_chat", args.as_chat or not are_chat, "prompts in text, and these are messages")], args)
    prepare_tokenizer(tokenizer, [name] if are_chat else [])
    if args.chat_template_kwargs is not None and not are_chat:
        raise ValueError(
            "chat_template_kwargs are for prompts in messages, and these are text: set as_chat (--as_chat true), or "
            "leave them out"
        )
    template = template_of(args, tokenizer)
    return [replace(row, template={**template, **row.template}) if row.is_conversational else row for row in rows]


def shard_of(args: GenerateArguments) -> tuple[int, int]:
    """I and N."""
    try:
        first, total = (int(part) for part in (args.shard or "1/1").split("/"))
        if not 1 <= first <= total:
            raise ValueError
    except ValueError:
        raise ValueError(f"shard must be I/N with I from 1 to N, such as 1/4; it is {args.shard!r}") from None
    return first, total


def template_of(args: GenerateArguments, tokenizer: Any) -> dict[str, Any]:
    """Variables of the chat template, which uses each of them."""
    given = _mapping(args, "chat_template_kwargs")
    if unused := [name for name in given if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template))]:
        raise ValueError(
            f"chat_template_kwargs has {unused[0]!r}, which the chat template of {args.model_name_or_path} does not "
            "use: correct it, or leave it out"
        )
    return given


def engine_of(asked: str) -> str:
    """The engine: the one asked for, or the fastest that this machine has."""
    import torch

    from ..generation import continuous

    installed = find_spec("vllm") is not None
    if asked == "vllm" and not installed:
        raise ImportError("vLLM is not installed: run `pip install vllm`, or use another engine (--engine generate)")
    if asked != "auto":
        return asked
    if installed and torch.cuda.is_available():
        return "vllm"
    return "continuous" if continuous.is_fast(device()) else "generate"


def device() -> Any:
    """The accelerator, or the CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def answering(args: GenerateArguments, name: str, tokenizer: Any) -> Answering:
    """The model, which is loaded when the first answer is asked for."""
    from ..generation.answers import Answering

    options = _mapping(args, "engine_options")
    if options and name == "generate":
        raise ValueError("engine_options are for vllm and continuous: leave them out, or name the engine (--engine)")
    path = find_model(args.model_name_or_path)

    @cache  # the turns of a benchmark ask several times
    def loaded() -> Any:
        from ..forward.head import merged
        from ..generation import vllm

        code = args.trust_remote_code
        if name == "vllm":
            return vllm.load(path, args.dtype, code, options)
        model = load_model(args.model_name_or_path, dtype=args.dtype, device_map=None, trust_remote_code=code)
        return merged(model, args.model_name_or_path).to(device())

    def answers(**asked: Any) -> Answers:
        from ..generation import continuous, local, vllm

        if name == "vllm":
            yield from vllm.generate(*loaded(), **asked)
        elif name == "continuous":
            yield from continuous.generate(loaded(), **asked, options=options)
        else:
            yield from local.generate(loaded(), **asked, pad=tokenizer.pad_token_id, batch_size=args.batch_size)

    return Answering(args.model_name_or_path, tokenizer, answers, *_limits(path, args.trust_remote_code))


def _mapping(args: GenerateArguments, name: str) -> dict[str, Any]:
    given = getattr(args, name)
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a mapping, in JSON; it is {given!r}")
    return found


def _limits(path: str, code: bool) -> tuple[list[int], int | None]:
    """The tokens that end an answer by the model's own account, and the longest text that it takes."""
    from transformers import GenerationConfig

    path = base_of(path)
    config = load_config(path, trust_remote_code=code)
    if config.is_encoder_decoder:
        raise ValueError(f"{path} is an encoder-decoder model, and generate takes causal models")
    try:
        end = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # not every model has one
        end = config.get_text_config().eos_token_id
    ends = end if isinstance(end, list) else [end]
    return [id for id in ends if id is not None], getattr(config.get_text_config(), "max_position_embeddings", None)
