"""Choices by likelihood: medibuddy.evaluation.choices beside lm-evaluation-harness, on the same texts, models and threads.

python benchmarks/eval_speed.py [--lm-eval PYTHON]      prints both rates and writes benchmarks/results/eval_speed.json

`--lm-eval` names the interpreter of an environment with `lm_eval[hf]`, torch and transformers; without it this one is used. Both sides score made-up questions of
PubMedQA's length with the same batch size, in processes of their own that take turns; the time is that of scoring, tokenising included, loading not. A first pass over
32 questions is not counted. A disagreement in more than 1 in 200 decisions stops the benchmark: it would not be the same work.

Three tasks, over the same passages: `labels` asks for yes, no or maybe; `three-shot` the same behind three worked examples, the same for every question, as a few-shot task
of the harness puts them there (`--num_fewshot 3` with a fixed sampler); `answer-texts` has five answers of several words each, as MedQA scored by its answer texts.

`--add` counts the new turns together with those of the results file, so that a long comparison can be made in short pieces.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "eval_speed.json"
LABELS = ("yes", "no", "maybe")
TEXTS = ("a lower risk of recurrence", "a higher risk of recurrence after twelve weeks", "no difference in blood pressure", "side effects in both groups", "none of these")
TASKS = ("labels", "three-shot", "answer-texts")
SIZES = {"tiny": None, "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}}
WORDS = "patients treated with the drug had a lower risk of recurrence than those given placebo and blood pressure fell in both groups after twelve weeks while side effects were rare".split()


def make_passages(count: int, seed: int = 0) -> list[str]:
    "Texts as long as PubMedQA's: 200 words of context on average, 40 at least, 400 at most"
    chance = random.Random(seed)
    lengths = [min(400, max(40, round(chance.gauss(200, 60)))) for _ in range(count)]
    return [f"{' '.join(chance.choices(WORDS, k=length))}.\n\n" for length in lengths]


def make_questions(task: str, count: int) -> tuple[list[str], tuple[str, ...]]:
    "The texts that are asked, and the choices of each"
    if task == "answer-texts":
        return [f"{passage}What did the trial show?\n\nAnswer:" for passage in make_passages(count)], TEXTS
    ask = "Does the drug lower the risk of recurrence?\n\nFinal decision:"
    shots = [f"{passage}{ask} {label}\n\n" for passage, label in zip(make_passages(3, seed=1), LABELS)] if task == "three-shot" else []
    return ["".join(shots) + passage + ask for passage in make_passages(count)], LABELS


def make_models(folder: Path) -> dict[str, Path]:
    "The embedded model, and a Llama of 30 million parameters with random weights and the same tokenizer"
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from medibuddy.models.loaders import EMBEDDED_MODEL, load_base, load_tokenizer

    tokenizer, found = load_tokenizer("embedded"), {}
    torch.manual_seed(0)
    for name, shape in SIZES.items():
        found[name] = folder / name
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=1, eos_token_id=0, pad_token_id=2, **shape)) if shape else load_base("embedded")
        model.float().save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    assert EMBEDDED_MODEL.exists()
    return found


def score_here(model_dir: str, texts: list[str], labels: tuple[str, ...], batch_size: int, repeats: int) -> tuple[list[float], list[int]]:
    "Seconds of each pass and the decisions, with medibuddy"
    from medibuddy.evaluation.choices import ChoicePrompt, score_choices, share_prefix, tokenise_choices
    from medibuddy.models.loaders import load_base, load_tokenizer

    model, tokenizer = load_base(model_dir), load_tokenizer(model_dir)

    def once(texts: list[str]) -> list[int]:
        questions = []
        for number, choices in enumerate(tokenise_choices([(text, labels) for text in texts], tokenizer)):
            prefix, tails = share_prefix(choices)
            questions.append(ChoicePrompt(str(number), labels, prefix + [token for tail in tails for token in tail[:-1]], len(prefix), tails))
        return [max(range(len(labels)), key=list(scores.values()).__getitem__) for scores in score_choices(model, questions, batch_size)]

    return timed(once, texts, repeats)


def score_there(model_dir: str, texts: list[str], labels: tuple[str, ...], batch_size: int, repeats: int) -> tuple[list[float], list[int]]:
    "The same with lm-evaluation-harness and its hf backend, as its multiple-choice tasks ask it"
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=model_dir, device="cpu", dtype="float32", batch_size=batch_size)

    def once(texts: list[str]) -> list[int]:
        requests = [Instance(request_type="loglikelihood", doc={}, arguments=(text, f" {label}"), idx=i) for text in texts for i, label in enumerate(labels)]
        scores = [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]
        return [max(range(len(labels)), key=scores[start : start + len(labels)].__getitem__) for start in range(0, len(scores), len(labels))]

    return timed(once, texts, repeats)


def timed(once, texts: list[str], repeats: int) -> tuple[list[float], list[int]]:
    "Run a pass several times, after a short one to warm up"
    once(texts[:32])
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        decisions = once(texts)
        seconds.append(round(time.perf_counter() - started, 3))
    return seconds, decisions


def main() -> None:
    "Time both sides in turn"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lm-eval", default=sys.executable, help="interpreter with lm_eval")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--repeats", type=int, default=1, help="counted passes a turn")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--add", action="store_true", help="count these turns together with those of the results file")
    parser.add_argument("--side", choices=("here", "there"), help=argparse.SUPPRESS)
    parser.add_argument("--model-dir", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        texts, labels = make_questions(args.tasks[0], args.questions)
        seconds, decisions = (score_here if args.side == "here" else score_there)(args.model_dir, texts, labels, args.batch_size, args.repeats)
        print("RESULT" + json.dumps({"seconds": seconds, "decisions": decisions}))
        return
    from medibuddy.hardware import describe_environment

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    versions = subprocess.run([args.lm_eval, "-c", "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('lm_eval', 'torch', 'transformers')), sep=', ')"], check=True, capture_output=True, text=True).stdout.strip()
    results = {"environment": describe_environment(), "lm_eval": versions, "load_at_start": os.getloadavg(), "batch_size": args.batch_size, "models": {}}
    if args.add and RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        if any(before[key] != results[key] for key in ("environment", "lm_eval", "batch_size")):
            raise SystemExit(f"{RESULTS} was measured with other settings or versions; run without --add.")
        results["models"] = before["models"]
    with tempfile.TemporaryDirectory() as folder:
        for name, model_dir in make_models(Path(folder)).items():
            for task in args.tasks if name in args.models else ():
                tasks = results["models"].setdefault(name, {})
                tasks[task] = compare(task, model_dir, args, environment, tasks.get(task, {}))
                print(f"{name}: {spell(task, tasks[task])}")
    results["load_at_end"] = os.getloadavg()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def spell(task: str, found: dict) -> str:
    "A comparison in a line"
    here, there = (statistics.median(found[side]) for side in ("medibuddy_seconds", "lm_eval_seconds"))
    return f"{task}, {found['questions']} questions: lm-eval {there:.2f} s, medibuddy {here:.2f} s: {found['times_faster']:.2f} times faster; {found['decisions_that_differ']} decisions differ"


def compare(task: str, model_dir: Path, args: argparse.Namespace, environment: dict, before: dict) -> dict:
    "Let both sides take turns on one model and task, and add the seconds to those measured before on as many questions"
    before = before if before.get("questions") == args.questions else {}
    found = {"here": {"seconds": before.get("medibuddy_seconds", [])}, "there": {"seconds": before.get("lm_eval_seconds", [])}}
    for _ in range(args.rounds):
        for side, python in (("there", args.lm_eval), ("here", sys.executable)):
            command = [python, __file__, "--side", side, "--model-dir", str(model_dir), "--tasks", task, "--questions", str(args.questions), "--batch-size", str(args.batch_size), "--repeats", str(args.repeats)]
            output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
            part = json.loads(output.split("RESULT")[-1])
            found[side]["seconds"] += part["seconds"]
            found[side]["decisions"] = part["decisions"]
    unlike = sum(a != b for a, b in zip(found["here"]["decisions"], found["there"]["decisions"], strict=True))
    if unlike > args.questions / 200:
        raise SystemExit(f"{task}: {unlike} of {args.questions} decisions differ; the two sides do not do the same work.")
    here, there = (statistics.median(found[side]["seconds"]) for side in ("here", "there"))
    return {"questions": args.questions, "medibuddy_seconds": found["here"]["seconds"], "lm_eval_seconds": found["there"]["seconds"], "times_faster": round(there / here, 2), "decisions_that_differ": unlike}


if __name__ == "__main__":
    main()
