"""Notebooks for the batch tests: a light one with stages of the real kind and no torch, and one that trains."""

from pathlib import Path

import nbformat

LIGHT_PARAMETERS = '''run_dir = "runs/light"
rate = 0.1  # of the descent
rank = 1
seed = 0
pause = 0.0  # seconds a step'''

# Four stages in the order of a run; a step appends to the log, and a killed training goes on from its checkpoint.
# `seen.txt` has a line when a stage's work begins and one when it is recorded: what shows a stage that was done twice.
LIGHT_STAGES = '''import json
import time
from pathlib import Path

import numpy as np

from medibuddy.run import Run, append_jsonl, locked, read_json, stage, write_atomic, write_json, write_jsonl
from medibuddy.sharing import shared_stage

path = Path(run_dir)


def note(text):
    with open(path / "seen.txt", "a") as file:
        file.write(text + "\\n")


def prepare(run):
    with shared_stage(run, "prepare", [seed], [], ["data/rows.json"]) as facts:
        if facts is not None:
            note("begin prepare")
            time.sleep(pause)
            random = np.random.default_rng(seed)
            write_json(path / "data" / "rows.json", {"x": random.normal(size=(40, 4)).tolist(), "w": random.normal(size=4).tolist()})
    note("end prepare")


def train(run):
    with shared_stage(run, "train", [rate, rank, seed], ["data/rows.json"], ["adapter/", "log.jsonl"]) as facts:
        if facts is not None:
            note("begin train")
            rows, checkpoint = read_json(path / "data" / "rows.json"), path / "checkpoint.json"
            x, target = np.array(rows["x"]), np.array(rows["x"]) @ np.array(rows["w"])
            start = read_json(checkpoint) if checkpoint.exists() else {"step": 0, "w": [0.0] * 4}
            w = np.array(start["w"])
            log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()[: start["step"]]] if start["step"] else []
            write_jsonl(path / "log.jsonl", log)
            for step in range(start["step"] + 1, 13):
                error = x @ w - target
                w = w - rate / rank * x.T @ error / len(x)
                time.sleep(pause)
                append_jsonl(path / "log.jsonl", [{"step": step, "epoch": step / 12, "loss": float(np.mean(error**2))}])
                if step % 4 == 0:
                    write_json(checkpoint, {"step": step, "w": w.tolist()})
            append_jsonl(path / "log.jsonl", [{"step": 12, "eval_loss": float(np.mean((x @ w - target) ** 2))}])
            write_json(path / "adapter" / "weights.json", w.tolist())
    note("end train")'''

LIGHT_RUN = '''with locked(path):
    run = Run(path)
    prepare(run)
    train(run)'''

LIGHT_SCORE = '''with locked(path):
    run = Run(path)
    with stage(run, "score", [], ["adapter/weights.json"], ["metrics.json"]) as facts:
        if facts is not None:
            note("begin score")
            time.sleep(pause)
            write_json(path / "metrics.json", {"norm": float(np.linalg.norm(read_json(path / "adapter" / "weights.json")))})
    note("end score")'''

TRAINING_PARAMETERS = '''run_dir = "runs/one"
recipe = "tiny"
rows = "rows.json"
learning_rate = 2e-3
seed = 42
batch_size = 4
eval_batch_size = 64
gradient_accumulation = 1'''

TRAINING_RUN = '''from medibuddy import Recipe, compare, evaluate, train

settings = Recipe.load(
    recipe, source="pubmedqa", path=rows, learning_rate=learning_rate, seed=seed, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
    eval_batch_size=eval_batch_size, max_steps=6, checkpoint_every=2, test_fraction=0.3, max_new_tokens=16, r=4,
)
train(settings, run_dir)'''


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    "A notebook with a tagged cell of parameters and these cells"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (parameters, *cells)])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def light_notebook(path: Path, *more: str) -> Path:
    "The light notebook, with further cells"
    return write_notebook(path, LIGHT_PARAMETERS, LIGHT_STAGES, LIGHT_RUN, LIGHT_SCORE, *more)


def training_notebook(path: Path) -> Path:
    "The notebook that trains"
    return write_notebook(path, TRAINING_PARAMETERS, TRAINING_RUN, "evaluate(run_dir)", "compare(run_dir)")
