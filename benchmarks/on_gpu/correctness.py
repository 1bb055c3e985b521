"""Correctness on a device: every method's steps against the same steps in float64 on the CPU.

The tolerances are what the types allow, about three times what a CPU shows. float32: sums of a few hundred terms in
another order, 1e-5 of the gradient (transformers' norms compute in float32 also in a float64 model, so the reference
itself is no better). bfloat16 has 8 bits, 4e-3 a rounding: over four layers 2e-2 of the gradient under autocast, and
weights in bfloat16 do not take a small update at all, so that there the update is not compared.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_margins.distributed import local, reshard

from . import subjects
from .ledger import Ledger, Values, table
from .subjects import THEIRS, Case, Outcome, Rig, make_trainer, one_process, read_rows, shard, steps_of, tiny_llama
from .synchronisations import SynchronisationsOfSteps

_SHARDED = Path(__file__).parents[1] / "anchor_sharded.py"
METHODS = ("gappo", "gap-aware", "gamma-po", "amapo", "geometric-anchor", "gradient-norm", "simpo-sam")
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
LOG_RATIO, NORMALIZED = {"reward": "log-ratio"}, {"reward": "length-normalized"}
HEAD = ["item", "ok", "loss", "gap/β", "gradient norm", "update", "peak GB", "seconds", "note"]


@dataclass(frozen=True)
class Precision:
    """The dtype of weights and products, and how far results may be from float64."""

    dtype: torch.dtype
    autocast: bool
    loss: float  # relative
    gap: float  # nats per token
    gradient_norm: float  # relative
    update: float | None  # relative, by norm


PRECISIONS = {
    "float32": Precision(torch.float32, False, 1e-4, 1e-4, 1e-4, 1e-4),
    "bf16": Precision(torch.float32, True, 2e-2, 1e-2, 1e-2, 6e-2),
    "bf16 weights": Precision(torch.bfloat16, False, 4e-2, 2e-2, 3e-2, None),
}
TOKENS = 60  # per completion


def run(rig: Rig, ledger: Ledger) -> str:
    """All items, then their table."""
    references: dict[Any, Outcome] = {}
    done = {key: ledger.do(key, work, kind, guess) for key, kind, guess, work in items(rig, references)}
    rows = [
        [
            key,
            "error" if "error" in item else "yes" if item["ok"] else "NO",
            *(item.get(name) for name in ("loss", "gap", "gradient_norm", "update", "gigabytes")),
            item["seconds"],
            item.get("error", item.get("note", "")),
        ]
        for key, item in done.items()
        if item is not None
    ]
    wrong = [row[0] for row in rows if row[1] != "yes"]
    said = (
        f"{len(rows) - len(wrong)} of {len(rows)} items are right; {len(ledger.left)} are left for another call.\n\n"
    )
    return said + table(HEAD, rows)


Item = tuple[str, str, float, Callable[[], Values]]


def items(rig: Rig, references: dict[Any, Outcome]) -> Iterator[Item]:
    """Key, kind, seconds at first, and what does it; the quick and telling ones first."""
    against = partial(_against, rig, references)
    precisions = ["float32", "bf16"] if rig.tiny else list(PRECISIONS)
    simpo, dpo = Case("cpo", None, SIMPO), Case("dpo")
    both = {"SimPO": simpo, "DPO": dpo}

    for precision in precisions[1:]:
        yield f"anchor gaps, real model/{precision}", "anchor", 30, partial(_anchor_gaps, rig, precision)
    for precision in list(PRECISIONS)[1:]:
        work = partial(_anchor_gaps, rig, precision, sharded=True)
        yield f"anchor gaps, real model, FSDP2/{precision}", "anchor", 30, work
    for precision in list(PRECISIONS)[1:]:
        work = partial(_restored, rig, precision, sharded=True)
        yield f"weights after the anchor's pass, FSDP2/{precision}", "quick", 5, work
    yield "gradient norms of pairs, FSDP2", "quick", 5, partial(_sharded_norms, rig)
    if find_spec("deepspeed"):
        yield "anchor gaps, real model, ZeRO-3/bf16", "anchor", 90, partial(_under_zero3, rig)
    for precision in precisions:
        yield f"weights after the anchor's pass/{precision}", "quick", 5, partial(_restored, rig, precision)
        yield f"weights after a broken anchor's pass/{precision}", "quick", 5, partial(_broken_off, rig, precision)
    for method in ("geometric-anchor",) if rig.tiny else ("geometric-anchor", "gamma-po", "gappo"):
        yield f"half and half/{method}", "resume", 15, partial(_resumed, rig, Case("cpo", method))
    yield from _waits(rig)

    for precision in precisions:
        for name, case in ({"SimPO": simpo} if rig.tiny and precision != "float32" else both).items():
            theirs = replace(case, method=THEIRS)
            yield f"TRL's own/{name}/{precision}", "step", 5, partial(against, theirs, case, precision)
            yield f"ours/{name}/{precision}", "step", 5, partial(against, case, theirs, precision)
        for name, case in _methods(rig, precision):
            yield f"ours/{name}/{precision}", "step", 5, partial(against, case, case, precision)
    narrow = precisions[: 1 if rig.tiny else 2]
    for precision in narrow:
        for attention in ("eager",) if rig.tiny else ("sdpa", "eager"):
            for share in ("always",) if rig.tiny else ("always", "never"):
                work = partial(against, replace(simpo, attention=attention), simpo, precision, share_prompt=share)
                yield f"{attention}, share_prompt={share}/{precision}", "step", 5, work
        logits = replace(simpo, logits=True)
        yield f"whole logits/{precision}", "step", 5, partial(against, logits, simpo, precision)
        gapo = Case("cpo", "geometric-anchor", {"anchor_batch_multiplier": 2})
        for name, case in ({"GAPO": gapo} if rig.tiny else {"SimPO": simpo, "GAPO": gapo, "DPO": dpo}).items():
            work = partial(against, case, case, precision, gradient_checkpointing=True)
            yield f"gradient checkpointing/{name}/{precision}", "step", 5, work

    # what is compiled takes most of the time
    backend = {"torch_compile": True, "torch_compile_backend": "eager" if rig.tiny else "inductor"}
    for precision in narrow:
        for share in ("always",) if rig.tiny else ("always", "never"):
            work = partial(against, simpo, simpo, precision, share_prompt=share, **backend)
            yield f"torch.compile, share_prompt={share}/{precision}", "inductor", 30, work
    for precision in () if rig.tiny else narrow:
        for share in ("always", "never"):
            work = partial(against, replace(simpo, attention="flex_attention"), simpo, precision, share_prompt=share)
            yield f"flex_attention, share_prompt={share}/{precision}", "flex", 65, work
    # these kernels take the place of transformers' for the rest of the process: last
    if find_spec("liger_kernel") and rig.on_cuda:
        for precision in narrow:
            for name, case in {"SimPO": simpo, "GAPO": gapo}.items():
                work = partial(against, case, case, precision, use_liger_kernel=True)
                yield f"Liger kernels/{name}/{precision}", "Liger", 15, work


def _waits(rig: Rig) -> Iterator[Item]:
    """Where a step waits: once with shared prompts; the standard forward pass adds what transformers and TRL read (the
    mask, the labels), which is not counted against us.
    """
    for base in ("cpo", "dpo"):
        fields = SIMPO if base == "cpo" else {}
        cases = {"no term": Case(base, None, {**fields, "share_prompt": "always"})}
        if not rig.tiny:
            for method in ("gamma-po", "geometric-anchor"):
                cases[method] = Case(base, method, {"share_prompt": "always"})
            cases["no term, share_prompt=never"] = Case(base, None, {**fields, "share_prompt": "never"})
        cases["TRL's own"] = Case(base, THEIRS, fields)
        for name, case in cases.items():
            yield f"waits/{base}/{name}", "quick", 5, partial(_synchronisations, rig, case)


def _methods(rig: Rig, precision: str) -> Iterator[tuple[str, Case]]:
    """On both bases and with both rewards of the second in float32; what 16 bits change does not depend on those."""
    for method in ("geometric-anchor",) if rig.tiny else METHODS:
        short = {"anchor_batch_multiplier": 2} if method == "geometric-anchor" else {}
        yield f"{method} on CPO", Case("cpo", method, short)
        if precision == "bf16 weights" or (rig.tiny and precision == "bf16"):
            continue
        if precision == "float32" and not rig.tiny:
            yield f"{method} on DPO, length-normalized", Case("dpo", method, NORMALIZED | short)
        if precision == "float32":
            # summed log-ratios fall by tens of nats at GAPO's radius: no gradient would be left to compare
            near = {"anchor_radius": 1e-3} if short else {}
            yield f"{method} on DPO, log-ratio", Case("dpo", method, LOG_RATIO | short | near)
            continue
        # A bf16 forward pass is off by 0.2 nats in the sum over a completion's tokens, however the anchor is measured.
        # At that radius, where the gap falls by 0.4 nats, or at length-normalized rewards' β of 2.5, a pair's loss
        # consists of that rounding. Hence GAPO's own radius, where the gap falls by 18, and the usual β of log-ratios.
        yield f"{method} on DPO, log-ratio, β = 0.1", Case("dpo", method, LOG_RATIO | short | {"beta": 0.1})


def _against(
    rig: Rig, references: dict[Any, Outcome], case: Case, reference: Case, precision: str, **fields: Any
) -> Values:
    """Two steps here, and two of the reference in float64 on the CPU, by standard forward pass and eager attention."""
    cpu = replace(rig, device="cpu")
    known = (reference.base, reference.method, str(reference.fields))
    if known not in references:
        own = {} if reference.method == THEIRS else {"share_prompt": "never"}
        references[known] = steps_of(replace(reference, attention="eager", logits=False), cpu, torch.float64, **own)
    right, kept = references[known], PRECISIONS[precision]
    found = steps_of(case, rig, kept.dtype, autocast=kept.autocast, **fields)
    summed = subjects.needs_reference(case)
    tokens = TOKENS if summed else 1
    errors = {
        "loss": _relative(found.loss, right.loss),
        "gap": max(abs(a - b) for a, b in zip(found.gap, right.gap, strict=True)) / tokens,
        "gradient_norm": _relative(found.gradient_norm, right.gradient_norm),
        "update": ((found.update - right.update).norm() / right.update.norm()).item(),
    }
    allowed = {name: getattr(kept, name) for name in errors}
    if summed and precision != "float32":  # β times a gap that is off by tenths of a nat goes into every loss
        allowed |= {name: 3 * allowed[name] for name in ("loss", "gradient_norm")}
    ok = all(limit is None or error <= limit for error, limit in zip(errors.values(), allowed.values(), strict=True))
    return {"ok": ok, **errors, "allowed": allowed, "gigabytes": found.gigabytes}


def _relative(found: list[float], right: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, right, strict=True))


def _synchronisations(rig: Rig, case: Case) -> Values:
    """How often a step waits for the device when no log is due, and where. A copy to it from memory that is not pinned
    waits too.
    """
    counted = SynchronisationsOfSteps(rig.device, first=3, last=6)
    fields = {"max_steps": 7, "logging_steps": 100, "windows": 1}
    found = steps_of(
        case, rig, torch.float32, autocast=True, callback=counted, rows=subjects.short_pairs(rig, 32), **fields
    )
    del found
    reads, copies = counted.per_step()
    wanted = 1 if case.fields.get("share_prompt") == "always" else None
    return {
        "ok": wanted is None or sum(reads.values()) <= wanted,
        "note": f"{sum(reads.values()):g} reads and {sum(copies.values()):g} copies a step",
        "reads": reads,
        "copies": copies,
    }


def _gapo(rig: Rig, precision: str, folder: str, sharded: bool = False, **fields: Any) -> Any:
    kept = PRECISIONS[precision]
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.0,
        "bf16": kept.autocast,
        "max_length": 512,
        **fields,
    }
    model = tiny_llama(rig, kept.dtype, noise=0.01)
    if sharded:
        shard(model, rig, kept.autocast)
    rows = subjects.short_pairs(rig, 8)
    return make_trainer(
        Case("cpo", "geometric-anchor"), rig, folder, model, rows, subjects.word_tokenizer(), **settings
    )


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [local(parameter.detach()).clone() for parameter in model.parameters()]


def _same(before: list[torch.Tensor], model: torch.nn.Module) -> bool:
    reshard(model)
    pairs = zip(before, map(local, model.parameters()), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _restored(rig: Rig, precision: str, sharded: bool = False) -> Values:
    """Whether the weights come back bit for bit: a whole step at learning rate 0."""
    with tempfile.TemporaryDirectory() as folder, one_process(rig) if sharded else nullcontext():
        trainer = _gapo(rig, precision, folder, sharded)
        before = _weights(trainer.model)
        trainer.train()
        return {"ok": _same(before, trainer.model)}


def _broken_off(rig: Rig, precision: str) -> Values:
    """The same if the forward pass at the anchor raises."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _gapo(rig, precision, folder)
        before = _weights(trainer.model)

        def anchor_pass_breaks(*_: Any) -> None:
            if not _same(before, trainer.model):
                raise InterruptedError

        trainer.model.get_decoder().register_forward_pre_hook(anchor_pass_breaks)
        try:
            trainer.train()
        except InterruptedError:
            return {"ok": _same(before, trainer.model)}
        return {"ok": False, "note": "no pass found the weights elsewhere"}


def _resumed(rig: Rig, case: Case) -> Values:
    """Two steps, a checkpoint and two more, against four in one go, twice: some of CUDA's kernels add in an order that
    changes from run to run.
    """

    def trained(folder: str, resume: bool = False, **fields: Any) -> Any:
        settings = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "bf16": True,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "max_length": 512,
            "save_strategy": "steps",
            "save_steps": 2,
            **fields,
        }
        model, rows = tiny_llama(rig, torch.float32, noise=0.01), subjects.short_pairs(rig, 32)
        trainer = make_trainer(case, rig, folder, model, rows, subjects.word_tokenizer(), **settings)
        trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint-2")) if resume else None)
        return subjects.flat(trainer.model)

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole, again = trained(one), trained(two)
        halves = trained(one, resume=True)
    off, noise = (halves - whole).abs().max().item(), (again - whole).abs().max().item()
    return {"ok": off <= 2 * noise, "note": f"largest difference {off:.1e}; of two whole runs {noise:.1e}"}


def _sharded_norms(rig: Rig) -> Values:
    """The norms of pairs' own gradients, by autograd and where FSDP2 gathers the parameters, in float32."""

    def relative(sharded: bool) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder, one_process(rig) if sharded else nullcontext():
            model = tiny_llama(rig, torch.float32, noise=0.01)
            if sharded:
                shard(model, rig, mixed=False)
            settings = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0, "max_length": 512}
            case, rows = Case("cpo", "gradient-norm"), subjects.short_pairs(rig, 4)
            trainer = make_trainer(case, rig, folder, model, rows, subjects.word_tokenizer(), **settings)
            trainer.train()
            return torch.tensor(_logged(folder, "margin"))

    right, found = relative(False), relative(True)
    off = ((found - right).abs().max() / right.abs().max()).item()
    return {"ok": off <= 1e-4, "note": f"margins are off by {off:.1e} of the largest"}


def _logged(folder: str, name: str) -> list[float]:
    with Path(folder, "pair_log.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def _anchor_gaps(rig: Rig, precision: str, sharded: bool = False) -> Values:
    """The anchor gaps of 64 pairs, real ones with `--data`, in 16 bits, against those of the same model in float32."""
    from trl_margins.data.bundled import resolve_model

    kept = PRECISIONS[precision]
    n, k = (8, 2) if rig.tiny else (64, 8)
    made = rig.tiny or not rig.data
    if made:
        rows = subjects.short_pairs(rig, n)
    else:
        rows = [row for row in read_rows(rig.data / "train.jsonl.gz") if len(str(row)) < 3000][:n]

    def gaps(dtype: torch.dtype, autocast: bool, sharded: bool = False) -> list[float]:
        if rig.tiny:
            model, tokenizer = tiny_llama(rig, dtype, noise=0.01), subjects.word_tokenizer()
        else:
            path = resolve_model(rig.model)
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(path, dtype=dtype),
                AutoTokenizer.from_pretrained(path),
            )
        with tempfile.TemporaryDirectory() as folder, one_process(rig) if sharded else nullcontext():
            if sharded:
                shard(model, rig, autocast)
            settings = {
                "per_device_train_batch_size": n // k,
                "gradient_accumulation_steps": k,
                "anchor_batch_multiplier": k,
                "max_steps": 1,
                "optim": "sgd",
                "learning_rate": 0.0,
                "bf16": autocast,
                "max_length": 1024,
                "logging_steps": 1,
            }
            trainer = make_trainer(Case("cpo", "geometric-anchor"), rig, folder, model, rows, tokenizer, **settings)
            trainer.train()
            return _logged(folder, "anchor_gap")

    here = kept.dtype, kept.autocast, sharded
    right, found = (torch.tensor(gaps(*how)) for how in ((torch.float32, False), here))
    return _agreement(right, found, f"{len(right)} {'made-up' if made else 'real'} pairs")


def _under_zero3(rig: Rig) -> Values:
    """The same in processes of their own, which DeepSpeed takes over: float32 without it, and bf16 with it."""
    n, size = (8, 4) if rig.tiny else (64, 8)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        model, data, out = rig.model, rig.data and rig.data / "train.jsonl.gz", Path(folder, "gaps.json")
        if rig.tiny:
            tiny_llama(rig, torch.float32, noise=0.01).save_pretrained(model := str(Path(folder, "model")))
            subjects.word_tokenizer().save_pretrained(model)
        if made := rig.tiny or data is None:
            data = Path(folder, "pairs.jsonl")
            data.write_text("".join(json.dumps(row) + "\n" for row in subjects.short_pairs(rig, n)))
        free.bind(("127.0.0.1", 0))
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone |= {"MASTER_PORT": str(free.getsockname()[1]), "DS_ACCELERATOR": rig.device}
        free.close()
        command = [sys.executable, str(_SHARDED), "--model", model, "--dataset", str(data), "--out", str(out)]
        command += ["--pairs", str(n), "--batch_size", str(size), "--max_length", "1024"]
        for way, more in (("float32", {}), ("zero3, bf16", alone)):
            done = subprocess.run([*command, "--way", way], env={**os.environ, **more}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
        right, found = (torch.tensor(row["gaps"]) for row in json.loads(out.read_text()).values())
    return _agreement(right, found, f"{n} {'made-up' if made else 'real'} pairs")


def _agreement(right: torch.Tensor, found: torch.Tensor, pairs: str) -> Values:
    from scipy.stats import spearmanr

    mean = (found.mean() / right.mean() - 1).item()
    rank = float(spearmanr(found, right)[0])
    return {
        "ok": abs(mean) <= 0.1 and rank >= 0.97,
        "note": f"mean {mean:+.1%} from {right.mean():.4f}, Spearman {rank:.3f}, {pairs}",
        "mean_off": mean,
        "spearman": rank,
    }
