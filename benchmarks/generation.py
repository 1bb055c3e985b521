"""Answers per second of `trl-margins generate` beside plain `model.generate`, on the same prompts in one run.

python benchmarks/generation.py [MODEL] [--prompts 6] [--n 4] [--max_new_tokens 64] [--precision bfloat16]

Plain `generate` gets what a careful script gives it: batches of the same size, prompts of similar length together, and
`num_return_sequences`. Both sample at temperature 0.8 and top-p 0.95, so that lengths are alike, and not equal.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_margins.data.bundled import resolve_model
from trl_margins.generation import continuous, local
from trl_margins.generation.sampling import Prompt, Sampling

TOPICS = (
    "the sea",
    "a red cat",
    "prime numbers",
    "bread",
    "the moon",
    "chess",
    "old maps",
    "rain",
    "a small town",
    "tea",
)
TASKS = (
    "Write one sentence about {}.",
    "Say yes or no: is {} nice?",
    "List five facts about {}.",
    "Tell a story of {}.",
)

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="bundled:smollm2-135m-instruct")
parser.add_argument("--prompts", type=int, default=6)
parser.add_argument("--n", type=int, default=4)
parser.add_argument("--max_new_tokens", type=int, default=64)
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--precision", default="float32")
parser.add_argument("--repeats", type=int, default=1, help="each way, in turns; the best of them counts")
parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching too")
args = parser.parse_args()

device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
folder = resolve_model(args.model)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.precision).to(device)
asked = [TASKS[i % len(TASKS)].format(TOPICS[i % len(TOPICS)]) for i in range(args.prompts)]
prompts = [
    Prompt(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"],
        args.max_new_tokens,
    )
    for text in asked
]
sampling = Sampling(args.n, max_new_tokens=args.max_new_tokens)
end = tokenizer.eos_token_id


def plain():
    """[B] lengths of answers, by `model.generate` alone."""
    torch.manual_seed(0)
    settings = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        num_return_sequences=args.n,
        eos_token_id=end,
        pad_token_id=end,
    )
    lengths = []
    order, size = sorted(prompts, key=lambda prompt: len(prompt.ids)), max(args.batch_size // args.n, 1)
    for begin in range(0, len(order), size):
        some = order[begin : begin + size]
        width = max(len(prompt.ids) for prompt in some)
        ids = torch.tensor([[end] * (width - len(p.ids)) + p.ids for p in some], device=device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in some], device=device)
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        lengths += [row.index(end) + 1 if end in row else len(row) for row in made]
    return lengths


def ours():
    made = local.generate(model, prompts, sampling, [end], end, args.batch_size)
    return [len(answer) for _, answers in made for answer in answers]


def batched():
    made = continuous.generate(model, prompts, sampling, [end], {})
    return [len(answer) for _, answers in made for answer in answers]


ways = {"plain model.generate": plain, "trl-margins generate": ours}
if args.continuous:
    ways["continuous"] = batched
rates = dict.fromkeys(ways, 0.0)
for _ in range(args.repeats):
    for name, way in ways.items():
        start = time.perf_counter()
        lengths = way()
        seconds = time.perf_counter() - start
        tokens = sum(lengths)
        rates[name] = max(rates[name], tokens / seconds)
        print(f"{name:<22}{tokens:>7} tokens in {seconds:6.1f} s, {tokens / seconds:7.1f} tokens/s", end=" ")
        print(f"({len(lengths)} answers of {min(lengths)} to {max(lengths)} tokens)")
print(f"ratio: {rates['trl-margins generate'] / rates['plain model.generate']:.2f}")
