"""Killed at random moments with an 8-bit optimizer, on a 4-bit base, in one process and in two: the losses and the adapter of an undisturbed training, bit for bit.

bitsandbytes is not in the lock: `pip install bitsandbytes && pytest tests/test_resume_quantised.py` (about a quarter of an hour on two cores).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import environment, medibuddy, pubmedqa_rows
from test_resume import adapter_hash, losses

from medibuddy.run import read_json

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent"),
]
KILLS = int(os.environ.get("MEDIBUDDY_KILLS", "3"))  # of each case
SETTINGS = ["max_steps=10", "checkpoint_every=2", "test_fraction=0.3", "batch_size=4", "r=16", "dropout=0.1", "backend=peft", "optimizer=adamw_8bit"]
CASES = {"8-bit optimizer": [], "4-bit base": ["quantization=4bit"], "8-bit base": ["quantization=8bit"]}


def command(rows, run, case, processes):
    "The training command, the same each time"
    options = [part for setting in [*SETTINGS, *CASES[case]] for part in ("--set", setting)]
    return ["train", "--data", str(rows), "--shape", "pubmedqa", "--run", str(run), *options, *(["--launch", "ddp", "--processes", str(processes)] if processes > 1 else [])]


def start(words) -> subprocess.Popen:
    "Start a command"
    return subprocess.Popen([sys.executable, "-m", "medibuddy", *words], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_step(process: subprocess.Popen, run: Path, step: int, since: float) -> None:
    "Wait until this process (not one before it) has logged a step, or has ended"
    log, limit = run / "log.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and log.stat().st_mtime > since:  # a continued training writes its log anew first
            rows = log.read_text().splitlines()
            if len(rows) > 1 and json.loads(rows[-2])["step"] >= step:
                return
        time.sleep(0.005)


def kill(process: subprocess.Popen, chance: random.Random, one_worker: bool) -> bool:
    "Kill the command, or one of its training processes alone, after which it ends by itself; False when it was done before"
    time.sleep(chance.uniform(0, 0.3))
    target = psutil.Process(process.pid) if process.poll() is None else None
    if target and one_worker:
        workers = [child for child in target.children(recursive=True) if "medibuddy.training.worker" in child.cmdline() and "torch.distributed.run" not in child.cmdline()]
        target = chance.choice(workers) if workers else None
    if target:
        target.send_signal(signal.SIGKILL)
    return process.wait(120) != 0


@pytest.mark.parametrize(("case", "processes"), [(case, processes) for case in CASES for processes in (1, 2)])
def test_killed_at_random_moments_gives_the_same_adapter_bit_for_bit(tmp_path, case, processes):
    rows, straight, run, chance, kills = tmp_path / "rows.json", tmp_path / "straight", tmp_path / "run", random.Random(f"{case}{processes}"), 0
    rows.write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    done = medibuddy(*command(rows, straight, case, processes))
    assert done.returncode == 0, done.stderr
    assert read_json(straight / "manifest.json")["stages"]["train"]["dtypes"]["optimizer"] == "uint8"
    for number, step in enumerate(sorted(chance.sample(range(1, 9), KILLS))):
        begun = time.time()
        process = start(command(rows, run, case, processes))
        wait_for_step(process, run, step, begun)
        kills += kill(process, chance, one_worker=processes > 1 and number % 2 == 1)
    assert kills >= KILLS - 1
    done = medibuddy(*command(rows, run, case, processes))
    assert done.returncode == 0, done.stderr
    assert adapter_hash(run) == adapter_hash(straight)
    assert losses(run) == losses(straight)
    assert medibuddy("verify", run).returncode == 0
