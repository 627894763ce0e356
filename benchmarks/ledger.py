"""What the fp16 ledger costs: steps with it and steps without it take turns within one training, on the same rows, so whatever disturbs the machine hits both alike.

    python benchmarks/ledger.py                    # the embedded model (small steps, where the ledger weighs most) and one of 30 million weights
    python benchmarks/ledger.py --workload tiny --steps 400

On a CPU there is no loss scale to read; gradient norms by kind of layer and their log rows are the cost. On a GPU the scale is read too. Writes results/ledger-<device>.json.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from medibuddy.data.chat import EncodedChat
from medibuddy.hardware import describe_environment, detect_hardware
from medibuddy.models.loaders import add_lora, load_base, load_tokenizer
from medibuddy.recipe import Recipe
from medibuddy.training import sft

RESULTS = Path(__file__).parent / "results"
ORDER = (True, False, False, True)  # with, without, without, with: a drift of the machine's speed cancels out
WARM_UP = 8  # steps that are not counted
TOKENS = 128  # a row
WORKLOADS = {
    "tiny": (8, None),  # rows a batch, model; None is the embedded one
    "30m": (4, {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": True}),
}


class Turns(TrainerCallback):
    "Says whether a step keeps its ledger, and times it from its beginning to the next one's"

    def __init__(self):
        self.begun, self.on = [], True

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(time.perf_counter())
        self.on = ORDER[state.global_step % len(ORDER)]


def train(workload: str, steps: int, device: str) -> tuple[list[float], list[float]]:
    "Seconds of the steps with and without the ledger"
    batch, config = WORKLOADS[workload]
    recipe = Recipe.load("tiny", backend="medibuddy", batch_size=batch, max_steps=steps, checkpoint_every=10**6, max_seq_length=256, max_new_tokens=64, learning_rate=1e-4)
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    base = load_base("embedded", dtype=str(dtype).removeprefix("torch."), device=device) if config is None else LlamaForCausalLM(LlamaConfig(**config)).to(device, dtype)
    chance, turns, build, clip = random.Random(0), Turns(), sft.build_trainer, sft.AdapterTrainer._clip_grad_norm
    ids = [[chance.randrange(10, 2000) for _ in range(TOKENS)] for _ in range(4 * batch)]
    rows = [EncodedChat(input_ids=row, labels=[-100] * (TOKENS - 40) + row[-40:], id=str(i)) for i, row in enumerate(ids)]

    def with_turns(*args):
        trainer = build(*args)
        trainer.add_callback(turns)
        return trainer

    def by_turns(self, model):
        if turns.on:
            return clip(self, model)
        self.ledger = {}
        return Trainer._clip_grad_norm(self, model)

    sft.build_trainer, sft.AdapterTrainer._clip_grad_norm = with_turns, by_turns
    try:
        with tempfile.TemporaryDirectory() as folder:
            sft.train_adapter(recipe, add_lora(base, recipe.lora, seed=0), load_tokenizer("embedded"), rows, rows[:2], Path(folder), "key", dtype=str(dtype).removeprefix("torch."))
    finally:
        sft.build_trainer, sft.AdapterTrainer._clip_grad_norm = build, clip
    seconds = [b - a for a, b in zip(turns.begun, turns.begun[1:])]
    kept = [[s for i, s in enumerate(seconds) if i >= WARM_UP and ORDER[i % len(ORDER)] is on] for on in (True, False)]
    return kept[0], kept[1]


def overhead(on: list[float], off: list[float]) -> dict:
    "Ratio of the medians less one, with a bootstrap interval"
    chance = random.Random(0)
    draws = sorted(statistics.median(chance.choices(on, k=len(on))) / statistics.median(chance.choices(off, k=len(off))) - 1 for _ in range(2000))
    return {
        "steps_each": [len(on), len(off)], "median_ms_with": round(1e3 * statistics.median(on), 3), "median_ms_without": round(1e3 * statistics.median(off), 3),
        "overhead": round(statistics.median(on) / statistics.median(off) - 1, 5), "overhead_95": [round(draws[50], 5), round(draws[1949], 5)],
    }


def main() -> None:
    "Measure, print, write"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=300, help="training steps of each workload")
    options = parser.parse_args()
    hardware, load, found = detect_hardware(), os.getloadavg()[0], {}
    if hardware.device == "cuda":
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
    for workload in options.workload:
        found[workload] = overhead(*train(workload, options.steps if workload == "tiny" else options.steps // 3, hardware.device))
        print(f"{workload:<5} {found[workload]['median_ms_with']:.1f} ms with, {found[workload]['median_ms_without']:.1f} ms without: {100 * found[workload]['overhead']:+.2f} % (95 % {100 * found[workload]['overhead_95'][0]:+.2f} to {100 * found[workload]['overhead_95'][1]:+.2f})")
    RESULTS.mkdir(exist_ok=True)
    result = {"environment": describe_environment(), "device": hardware.name, "threads": torch.get_num_threads(), "load_at_start": load, "order": "with, without, without, with", "workloads": found}
    (RESULTS / f"ledger-{hardware.device}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
