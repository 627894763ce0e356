"""Killed, interrupted, out of space, damaged: the same command goes on and ends with the same adapter."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, medibuddy

from medibuddy.run import sha256_file

STEPS = 12
OPTIONS = ["--set", f"max_steps={STEPS}", "--set", "checkpoint_every=2", "--set", "test_fraction=0.3", "--set", "batch_size=4", "--set", "r=4", "--set", "dropout=0.1"]


def command(rows: Path, run: Path) -> list[str]:
    "The training command, the same each time"
    return ["train", "--data", str(rows), "--shape", "pubmedqa", "--run", str(run), *OPTIONS]


def start(rows: Path, run: Path) -> subprocess.Popen:
    "Start the training command"
    # started in the background, these tests would hand on that Ctrl-C is ignored; a user's terminal does not
    listen = {} if sys.platform == "win32" else {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([sys.executable, "-m", "medibuddy", *command(rows, run)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **listen)


def adapter_hash(run: Path) -> str:
    "The adapter's weights, as a hash"
    return sha256_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[tuple]:
    "What the log says of each step, without times"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [tuple(v for k, v in row.items() if k != "seconds") for row in rows]


def logged(run: Path) -> int:
    "Whole lines in the log"
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").exists() else 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, Path]:
    "Rows, and a run on them that nothing disturbed"
    from conftest import pubmedqa_rows

    folder = tmp_path_factory.mktemp("straight")
    rows = folder / "rows.json"
    rows.write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    done = medibuddy(*command(rows, folder / "run"))
    assert done.returncode == 0, done.stderr
    return rows, folder / "run"


def kill_after(process: subprocess.Popen, run: Path, lines: int, delay: float, sent: int) -> bool:
    "Send a signal once the log has grown by `lines` and `delay` seconds more have passed; False when the process ended first"
    before, limit = logged(run), time.monotonic() + 120
    while process.poll() is None and lines and logged(run) < before + lines and time.monotonic() < limit:
        time.sleep(0.005)
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(sent)
        process.wait()
        return True


def test_killed_at_ten_random_moments_gives_the_same_adapter_bit_for_bit(straight, tmp_path):
    rows, undisturbed = straight
    run, chance, kills = tmp_path / "run", random.Random(20), 0
    # some while libraries load or rows are prepared (no log line yet), most between two steps or while a checkpoint is written
    moments = [(0, chance.uniform(0.5, 12)) for _ in range(3)] + [(chance.randint(1, 2), chance.uniform(0, 0.4)) for _ in range(7)]
    chance.shuffle(moments)
    for lines, delay in moments:
        if (run / "adapter").exists():
            shutil.rmtree(run)  # it was quicker than the killer: begin again, so that all ten kills fall into a training
        kills += kill_after(start(rows, run), run, lines, delay, signal.SIGKILL)
        partial = [p for p in run.glob("adapter/*")] if run.exists() else []
        assert not partial or (run / "adapter" / "adapter_model.safetensors").exists()
    assert kills >= 8
    done = medibuddy(*command(rows, run))
    assert done.returncode == 0, done.stderr
    assert adapter_hash(run) == adapter_hash(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert not list(run.rglob("*.tmp"))
    assert medibuddy("verify", run).returncode == 0


def test_control_c_says_how_to_go_on_and_the_run_goes_on(straight, tmp_path):
    rows, undisturbed = straight
    for attempt in range(5):  # on a busy machine the training may end before the signal is read
        run = tmp_path / f"run-{attempt}"
        process = start(rows, run)
        kill_after(process, run, 4, 0, signal.SIGINT)
        if process.returncode != 0:
            break
    assert process.returncode == 130
    message = process.stderr.read()
    assert "run the same command again" in message and "Traceback" not in message
    done = medibuddy(*command(rows, run), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_at_step"] >= 2
    assert adapter_hash(run) == adapter_hash(undisturbed)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(straight, tmp_path):
    rows, undisturbed = straight
    run = tmp_path / "run"
    assert kill_after(start(rows, run), run, 10, 0, signal.SIGKILL)
    newest = max((run / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    weights = newest / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = medibuddy(*command(rows, run))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert newest.name in said and "altered after it was written" in said
    assert adapter_hash(run) == adapter_hash(undisturbed)


def limit_file_size(megabytes: float):
    "Let the child process write no file larger than this: what a full disk looks like, without filling one"
    size = int(megabytes * 1e6)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_said_plainly_and_the_run_goes_on(straight, tmp_path):
    rows, undisturbed = straight
    run = tmp_path / "run"
    done = medibuddy(*command(rows, run), preexec_fn=limit_file_size(0.3))
    assert done.returncode == 1, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: could not write") and "free some space" in message
    assert not list((run / "checkpoints").glob("checkpoint-*")) and not (run / "adapter").exists()
    done = medibuddy(*command(rows, run))
    assert done.returncode == 0, done.stderr
    assert adapter_hash(run) == adapter_hash(undisturbed)


def test_two_commands_on_one_run_directory_do_not_mix(straight, tmp_path):
    rows, _ = straight
    run = tmp_path / "run"
    first = start(rows, run)
    try:
        while first.poll() is None and logged(run) < 1:
            time.sleep(0.01)
        second = medibuddy(*command(rows, run))
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "another medibuddy process is working in" in second.stderr


def test_answers_go_on_after_a_kill(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    whole = (run / "generations" / "tuned.jsonl").read_text()
    (run / "generations" / "tuned.jsonl").unlink()
    process = subprocess.Popen([sys.executable, "-m", "medibuddy", "evaluate", str(run)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((run / "generations").glob(".tuned-*")):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert medibuddy("evaluate", run).returncode == 0
    strip = lambda text: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
    assert strip((run / "generations" / "tuned.jsonl").read_text()) == strip(whole)
    assert not list((run / "generations").glob(".*"))
