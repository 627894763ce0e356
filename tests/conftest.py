"""Shared rows, runs and ways to call the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Real published rows live outside the project (their licences differ); tests that read them skip where they are absent.
REAL_ROWS = ROOT.parent / "shared" / "data"

DRUGS = "aspirin ibuprofen colchicine metformin insulin heparin warfarin digoxin atenolol salbutamol prednisolone amoxicillin".split()
USES = "pain fever gout diabetes thirst clots stroke flutter pressure wheeze swelling infection".split()


def pubmedqa_rows() -> list[dict]:
    "Two dozen short rows in PubMedQA's shape"
    rows = []
    for i, drug in enumerate(DRUGS):
        for use in (USES[i], USES[(i + 5) % len(USES)]):
            rows.append({
                "pubid": f"{drug}-{use}", "group": drug, "question": f"Is {drug} used for {use}?",
                "context": {"contexts": [f"The leaflet of {drug} says that it is used for {USES[i]}."], "labels": ["LEAFLET"], "meshes": []},
                "long_answer": f"The leaflet says {USES[i]}.", "final_decision": "yes" if use == USES[i] else "no",
            })
    return rows


def environment(**more: str) -> dict:
    "A child process's environment: one torch thread, no hub"
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def medibuddy(*arguments, **more) -> subprocess.CompletedProcess:
    "Run the command line as a process of its own"
    return subprocess.run([sys.executable, "-m", "medibuddy", *map(str, arguments)], capture_output=True, text=True, env=environment(**more.pop("env", {})), timeout=560, **more)


@pytest.fixture
def rows_file(tmp_path) -> Path:
    "A file of rows in PubMedQA's shape"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    return path


@pytest.fixture
def call(capsys):
    "Call the command line in this process: call('verify', 'RUN') -> (exit status, stdout, stderr)"
    from medibuddy.cli import main

    def run(*arguments):
        status = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    "A whole small run, from rows to report; tests copy it before they change anything"
    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.json"
    rows.write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    run = folder / "run"
    options = ["--set", "max_steps=4", "--set", "checkpoint_every=2", "--set", "test_fraction=0.3", "--set", "max_new_tokens=24", "--set", "perplexity=true"]
    for command in (["train", "--data", rows, "--shape", "pubmedqa", "--run", run, *options], ["evaluate", run], ["compare", run], ["report", run]):
        done = medibuddy(*command)
        assert done.returncode == 0, done.stderr
    return run
