"""One training on several processes: as many as asked for, the same rows a step, the same adapter, and the same after a kill."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import environment, medibuddy, pubmedqa_rows
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from medibuddy.run import RunError, UsageError, sha256_file
from medibuddy.training.launch import Launch, run_workers, share_batch

OPTIONS = [part for setting in ("max_steps=8", "checkpoint_every=2", "test_fraction=0.3", "batch_size=4", "gradient_accumulation=1", "r=4", "learning_rate=1e-3") for part in ("--set", setting)]
LAUNCH = ["--launch", "ddp", "--processes", "2"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    "Rows of which every step is full"
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    return path


def command(rows: Path, run: Path, *more) -> list[str]:
    "The training command"
    return ["train", "--data", str(rows), "--shape", "pubmedqa", "--run", str(run), *OPTIONS, *map(str, more)]


def adapter(run: Path) -> dict:
    "The trained weights"
    return load_file(run / "adapter" / "adapter_model.safetensors")


def log(run: Path) -> list[dict]:
    "What was logged, without times"
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(rows, tmp_path_factory) -> Path:
    "A training by two processes that nothing disturbed"
    run = tmp_path_factory.mktemp("straight") / "run"
    done = medibuddy(*command(rows, run, *LAUNCH, "--json"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["launch"], facts["processes"]) == ("ddp", 2)
    assert {path.name for path in (run / "checkpoints" / "checkpoint-8").glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}  # both were there
    assert "2 processes with 2 x 1 rows each, so a step still sees 4 rows" in done.stderr
    assert done.stderr.count("tokens are trained, between") == 1 and not list(run.glob(".job*")) and not list(run.glob(".result*"))
    return run


def test_two_processes_train_the_adapter_that_one_trains(rows, straight, tmp_path):
    done = medibuddy(*command(rows, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    one, two = adapter(tmp_path / "run"), adapter(straight)
    assert one.keys() == two.keys() and max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    for a, b in zip(log(tmp_path / "run"), log(straight), strict=True):
        assert (a["step"], a.get("tokens")) == (b["step"], b.get("tokens"))
        assert a.get("loss", a.get("eval_loss")) == pytest.approx(b.get("loss", b.get("eval_loss")), rel=1e-4)
    assert medibuddy("verify", straight).returncode == 0


def family(process: psutil.Process) -> list[psutil.Process]:
    "The processes that a process started"
    return process.children(recursive=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_a_killed_launch_leaves_no_worker_and_goes_on_bit_for_bit(rows, straight, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "medibuddy", *command(rows, run, *LAUNCH)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < limit and not (run / "checkpoints" / "checkpoint-6").exists():  # within the second epoch
        time.sleep(0.01)
    workers = family(psutil.Process(process.pid))
    assert len(workers) >= 3  # torchrun and two workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    done = medibuddy(*command(rows, run, *LAUNCH, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_at_step"] >= 6
    assert max(row["epoch"] for row in log(run)) > 1 > min(row["epoch"] for row in log(run))
    assert sha256_file(run / "adapter" / "adapter_model.safetensors") == sha256_file(straight / "adapter" / "adapter_model.safetensors")
    assert log(run) == log(straight)


def free_port() -> int:
    "A port that nobody listens on"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_machines_of_one_process_each(rows, straight, tmp_path):
    run, port = tmp_path / "run", free_port()
    options = ["--launch", "ddp", "--processes", 1, "--nodes", 2, "--main-address", "localhost", "--main-port", port]
    second = subprocess.Popen([sys.executable, "-m", "medibuddy", *command(rows, run, *options, "--node-rank", 1)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        first = medibuddy(*command(rows, run, *options, "--json"))
        said, _ = second.communicate(timeout=120)
    finally:
        second.kill()
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, said
    assert json.loads(first.stdout)["processes"] == 2 and "machine 1 is done" in said
    assert sha256_file(run / "adapter" / "adapter_model.safetensors") == sha256_file(straight / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("options, message", [
    (["--launch", "ddp", "--processes", "3", "--set", "batch_size=4"], "4 x 1 = 4 rows cannot be divided among 3 processes"),
    (["--launch", "zero-3"], "Did you mean `zero3`?"),
    (["--launch", "fsdp", "--set", "backend=medibuddy"], "divides the base weights, which the fused kernels read whole"),
    (["--launch", "fsdp", "--set", "backend=peft", "--set", "quantization=4bit"], "packed ones cannot be"),
    (["--launch", "ddp", "--nodes", "2"], "--nodes needs --main-address"),
    (["--processes", "2"], "Add --launch ddp"),
    (["--launch", "zero2", "--set", "optimizer=schedule_free_adamw", "--set", "scheduler=constant"], "train.optimizer=adamw_torch"),
    (["--launch", "zero3", "--set", "backend=peft"], "pip install deepspeed"),
], ids=["rows", "kind", "kernels", "packed", "address", "alone", "optimizer", "deepspeed"])
def test_what_cannot_be_spread_is_refused_before_anything_is_written(call, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("medibuddy.training.launch.find_spec", lambda name: None)
    status, _, err = call("train", "--run", tmp_path / "run", *options)
    assert status == 2 and message in err and not (tmp_path / "run").exists()


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_an_optimizer_step_sees_as_many_rows_on_any_number_of_processes(batch, accumulation, world):
    if batch * accumulation % world:
        with pytest.raises(UsageError, match="cannot be divided"):
            share_batch(batch, accumulation, world)
        return
    size, steps = share_batch(batch, accumulation, world)
    assert size * steps * world == batch * accumulation and 1 <= size <= batch  # never more memory a process than in one


def test_an_error_in_a_worker_is_the_command_s_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="ended with status"):  # a job that cannot be done
        run_workers(Launch("ddp", 1), tmp_path / "empty", {"nonsense": True})
    assert not list((tmp_path / "empty").glob(".*"))
