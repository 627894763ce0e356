"""What the memory planner predicts, beside what a training and an evaluation then take.

    python benchmarks/memory.py                    # on a GPU: every case; writes results/memory-cuda.json
    python benchmarks/memory.py --case qwen-0.5b   # one of them
    python benchmarks/memory.py --device cpu       # the embedded model: shows that the script works; a process's resident memory is no measure of its tensors

Each case trains a few steps on rows as long as its recipe allows and then answers its test questions, through `medibuddy.flow` as a user's run does, every stage in a process of its own.
Models have their true shapes and random weights. A large card is made as small as the one predicted for: PyTorch may reserve no more than that, and is told that there is no more.
A measurement is what PyTorch reserved at most plus what the driver holds beside it. The aim is 10 %, and no plan that says "fits" may run out of memory.
"""

import argparse
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # as in train_speed.py: the checkout's package, and no `kernels` of ours in the way of Hugging Face's
    sys.path[0] = str(HERE.parent)
NEW_TOKENS = 64
CASES = {  # workload of train_speed.py, bytes of the card, settings of the recipe
    "qwen-0.5b": ("qwen-0.5b", 15e9, dict(backend="medibuddy", batch_size=8, max_seq_length=1024)),
    "qwen-0.5b-peft": ("qwen-0.5b", 15e9, dict(backend="peft", batch_size=8, max_seq_length=1024)),
    "8b-4bit": ("deepseek-8b-qlora", 15e9, dict(backend="medibuddy", quantization="4bit", batch_size=2, max_seq_length=2048)),
    "8b-4bit-peft": ("deepseek-8b-qlora", 15e9, dict(backend="peft", quantization="4bit", batch_size=1, max_seq_length=1024)),
    "8b": ("deepseek-8b", 40e9, dict(backend="medibuddy", batch_size=4, max_seq_length=1024)),
}
CPU_CASES = {"embedded": (None, 0, dict(backend="medibuddy", batch_size=4, max_seq_length=512)), "embedded-peft": (None, 0, dict(backend="peft", batch_size=4, max_seq_length=512))}


def make_model(workload: str | None, folder: Path, device: str) -> str:
    "Name of the model; one with random weights is written to `folder` by a process of its own"
    if workload is None:
        return "embedded"
    if not folder.exists():
        command = [sys.executable, HERE / "train_speed.py", "--child", "save", "--workload", workload, "--device", device, "--folder", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(folder)


def make_rows(path: Path, count: int, length: int) -> None:
    "PubMedQA rows of `length` tokens or just less, template and answer included"
    from medibuddy.data.chat import encode_all
    from medibuddy.data.sources import adapt_rows
    from medibuddy.models.loaders import load_tokenizer

    tokenizer, chance = load_tokenizer("embedded"), random.Random(0)

    def row(number: int, words: list[str], answer: str) -> dict:
        return {"pubid": str(number), "question": f"Is finding {number} caused by it?", "context": {"contexts": [" ".join(words)], "labels": ["RESULTS"], "meshes": []}, "long_answer": answer, "final_decision": ("yes", "no")[number % 2]}

    def fits(made: dict) -> bool:
        return bool(encode_all(adapt_rows([("row", made)], "pubmedqa", "made rows")[0], tokenizer, length)[0])

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            *words, answer = (" ".join("".join(chance.choices("abcdefghijklmnoprstuvwy", k=chance.randint(3, 8))) for _ in range(many)) for many in [1] * length + [NEW_TOKENS // 4])
            low, high = 1, length
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(row(number, words[:middle], answer)) else (low, middle)
            file.write(json.dumps(row(number, words[:low], answer)) + "\n")


def shrink(cap: float) -> None:
    "Make PyTorch believe in a card of `cap` bytes, and hold it to that"
    import torch

    whole = torch.cuda.get_device_properties(0)
    torch.cuda.set_per_process_memory_fraction(cap / whole.total_memory)
    small = SimpleNamespace(**{name: getattr(whole, name) for name in dir(whole) if not name.startswith("_")} | {"total_memory": int(cap)})
    torch.cuda.get_device_properties = lambda *_, **__: small


def measure(stage: str, recipe_file: str, run: str, cap: float, device: str) -> dict:
    "Do one stage in this process; returns bytes"
    if device == "cuda":
        shrink(cap)
    from medibuddy import flow
    from medibuddy.recipe import Recipe
    from medibuddy.run import peak_memory_mb

    if stage == "train":
        flow.train(Recipe.load(recipe_file), run)
    else:
        flow.evaluate(run, "tuned")
    if device != "cuda":
        return {"measured": int(peak_memory_mb() * 1e6)}
    import torch

    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return {"measured": torch.cuda.max_memory_reserved() + beside, "reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated(), "beside": beside}


def run_case(name: str, case: tuple, folder: Path, device: str) -> dict:
    "Predict, then measure, one case"
    from medibuddy.models.memory import plan
    from medibuddy.recipe import Recipe

    workload, cap, settings = case
    rows = folder / f"rows-{settings['max_seq_length']}.jsonl"
    if not rows.exists():
        make_rows(rows, 60, settings["max_seq_length"])
    model = make_model(workload, folder / str(workload).removesuffix("-qlora"), device)
    recipe = Recipe.load("tiny", **{"source": "pubmedqa", "path": str(rows), "model.name": model, "test_fraction": 0.2, "max_steps": 3, "max_new_tokens": NEW_TOKENS, "eval_batch_size": 4} | settings)
    memory = int(cap) or int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    plans = plan(recipe, memory, device=device)
    recipe_file = folder / f"{name}.yaml"
    recipe_file.write_text(recipe.to_yaml())
    result = {"settings": settings, "card": memory, "verdict": plans.verdict, "layers_recomputed": plans.recomputed, "stages": {}}
    for stage in ("train", "evaluate"):
        command = [sys.executable, __file__, "--child", stage, "--recipe", str(recipe_file), "--run", str(folder / f"run-{name}"), "--cap", str(memory), "--device", device]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        found = next((json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        predicted = max(sum(plans.stages[part].values()) for part in (("load", "train") if stage == "train" else ("evaluate",)))
        result["stages"][stage] = {"predicted": predicted} | (found | {"predicted_of_measured": round(predicted / found["measured"], 3)} if found else {"failed": done.stderr[-1500:]})
        print(f"{name:15} {stage:9} predicted {predicted / 1e9:6.2f} GB, " + (f"measured {found['measured'] / 1e9:6.2f} GB" if found else f"failed (plan: {plans.verdict}): {done.stderr.strip().splitlines()[-1:]}"), flush=True)
    return result


def main() -> int:
    "Every case; 1 where a plan was wrong by more than 10 % or its run failed"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=[*CASES, *CPU_CASES])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    for name in ("--child", "--recipe", "--run", "--cap"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("RESULT " + json.dumps(measure(options.child, options.recipe, options.run, float(options.cap), options.device)))
        return 0
    cases = CASES if options.device == "cuda" else CPU_CASES
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run_case(name, cases[name], Path(folder), options.device) for name in options.case or cases}
    stages = [stage for result in results.values() for stage in result["stages"].values()]
    if options.device == "cpu":
        return int(any("failed" in stage for stage in stages))
    machine = runpy.run_path(str(HERE / "kernels.py"))["machine"](options.device)
    (HERE / "results" / "memory-cuda.json").write_text(json.dumps({"machine": machine, "cases": results}, indent=1) + "\n")
    return int(any("failed" in stage or not 0.9 <= stage["predicted_of_measured"] <= 1.1 for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
