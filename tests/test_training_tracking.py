"""Trackers through their real clients, offline; what a training uses, through the real NVML client against a small driver library made here."""

import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import environment, medibuddy

from medibuddy.recipe import Recipe, TrackConfig
from medibuddy.run import UsageError, read_json, read_jsonl
from medibuddy.training.tracking import check_tracking

SECRET = "a-key-that-must-not-be-written-anywhere"
SETTINGS = ["max_steps=2", "checkpoint_every=2", "test_fraction=0.3", "batch_size=4", "r=4"]


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def train(rows, run, *settings, **env):
    "Train two steps in a process of its own, as a user does"
    options = [part for setting in [*SETTINGS, *settings] for part in ("--set", setting)]
    done = medibuddy("train", "--data", rows, "--shape", "pubmedqa", "--run", run, *options, env={"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, **env})
    assert done.returncode == 0, done.stderr
    return done


def files_with(folder, secret):
    "Files that hold a text, compressed ones aside"
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def wandb_records(file):
    "The records of W&B's log: blocks of 32 KiB, each record behind checksum, length and whether it is whole (1), begins (2), goes on (3) or ends (4)"
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, held = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(held)
            held = b""


@needs("wandb")
def test_wandb_is_told_offline_and_nothing_of_the_machine(rows_file, tmp_path):
    run = tmp_path / "run"
    done = train(rows_file, run, "report_to=wandb", "tags=first,small", "run_name=try one")
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    seen, config, header = {}, {}, None
    for record in wandb_records(file):
        if record.HasField("run"):
            header = record.run
        for update in [*record.run.config.update, *record.config.update]:
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
        for item in record.history.item:
            seen.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
    logged = [row for row in read_jsonl(run / "log.jsonl") if "loss" in row]
    assert (header.display_name, sorted(header.tags), header.project) == ("try one", ["first", "small"], "medibuddy")
    assert seen["train/loss"] == pytest.approx([row["loss"] for row in logged])
    assert seen["train/grad_norm/q_proj"] == pytest.approx([row["grad_norms"]["q_proj"] for row in logged])
    assert config["lora"]["r"] == 4 and config["train"]["max_steps"] == 2
    assert not header.host and not header.HasField("git")
    assert not files_with(run, SECRET) and SECRET not in done.stderr
    assert not files_with(run, str(os.uname().nodename)) or len(os.uname().nodename) < 4
    manifest = read_json(run / "manifest.json")
    assert not any("wandb" in name for name in manifest["files"]) and medibuddy("verify", run).returncode == 0


@needs("tensorboard")
def test_tensorboard_reads_back_what_was_logged(rows_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(rows_file, run, "report_to=tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = [row for row in read_jsonl(run / "log.jsonl") if "loss" in row]
    assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars("train/loss")] == [(row["step"], row["loss"]) for row in logged]
    assert [e.value for e in events.Scalars("train/grad_norm/v_proj")] == pytest.approx([row["grad_norms"]["v_proj"] for row in logged])
    assert not files_with(run, SECRET)


@needs("trackio")
def test_trackio_reads_back_what_was_logged(rows_file, tmp_path):
    run, store = tmp_path / "run", tmp_path / "trackio"
    train(rows_file, run, "report_to=trackio", "project=trial", TRACKIO_DIR=str(store))
    import sqlite3

    (file,) = store.glob("trial*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(metrics) for (metrics,) in database.execute("select metrics from metrics order by id")]
    logged = [row["loss"] for row in read_jsonl(run / "log.jsonl") if "loss" in row]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(logged)
    assert not files_with(store, SECRET) and not files_with(run, SECRET)


def test_a_tracker_that_cannot_be_told_is_refused_before_anything_is_loaded(monkeypatch, call, tmp_path):
    monkeypatch.setattr("medibuddy.training.tracking.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="trackio is not installed here: pip install trackio"):
        check_tracking(TrackConfig(report_to=("trackio",)))
    status, _, err = call("train", "--run", tmp_path / "run", "--set", "report_to=tensorboard")
    assert status == 2 and "pip install tensorboard" in err and not (tmp_path / "run").exists()


def test_online_without_a_key_is_refused_and_asks_nobody(monkeypatch):
    monkeypatch.setattr("medibuddy.training.tracking.find_spec", lambda name: True)
    monkeypatch.setattr("medibuddy.training.tracking.wandb_key", lambda: None)
    with pytest.raises(UsageError, match="set WANDB_API_KEY"):
        check_tracking(TrackConfig(report_to=("wandb",), wandb_mode="online"))
    check_tracking(TrackConfig(report_to=("wandb",)))  # offline needs no key


def test_a_training_script_s_trackers_are_understood(tmp_path, capsys):
    for written, meant in (("wandb", ("wandb",)), (["tensorboard", "wandb"], ("tensorboard", "wandb")), ("none", ()), ([], ())):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"train": {"report_to": written, "run_name": "a"}}))
        recipe = Recipe.load(path)
        assert (recipe.track.report_to, recipe.track.run_name, recipe.track.wandb_mode) == (meant, "a", "offline")


NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } utilization_t;
static unsigned long long millijoules = 5000;
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { if (strcmp(uuid, "GPU-1")) return 6; *device = (void *)1; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned int length) { strncpy(name, "Tesla T4", length); return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned int *milliwatts) { *milliwatts = 70000; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, utilization_t *rates) { rates->gpu = 90; rates->memory = 40; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) { memory->total = 15000000000ULL; memory->used = 4000000000ULL; memory->free = 11000000000ULL; return 0; }
#ifdef COUNTER
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) { millijoules += 2500; *energy = millijoules; return 0; }
#endif
"""
READ = """
import json, time
from medibuddy.training.meter import GpuGauge
gauge = GpuGauge(["GPU-1"])
time.sleep(0.1)
print(json.dumps([gauge.names(), gauge.read()]))
"""


@needs("pynvml")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("counter", [True, False], ids=["energy-counter", "power-times-time"])
def test_a_gpu_is_read_through_nvml(tmp_path, counter):
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run(["cc", "-shared", "-fPIC", *(["-DCOUNTER"] if counter else []), "-o", tmp_path / "libnvidia-ml.so.1", tmp_path / "nvml.c"], check=True)
    done = subprocess.run([sys.executable, "-c", READ], env=environment(LD_LIBRARY_PATH=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, reading = json.loads(done.stdout)
    assert names == ["Tesla T4"] and (reading["gpu_power_w"], reading["gpu_utilisation"], reading["gpu_memory_mb"]) == (70.0, 0.9, 4000.0)
    assert reading["energy_j"] == 2.5 if counter else 5 < reading["energy_j"] < 70  # 70 W for a tenth of a second and what the machine adds


def test_what_a_training_used_is_recorded_verified_and_shown(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    used = read_json(run / "manifest.json")["stages"]["train"]["resources"]
    assert used["cpu_seconds"] > 0 and used["peak_memory_mb"] > 100 and "energy_kwh" not in used
    report = (run / "report.md").read_text()
    assert "Peak memory of the process" in report and "Number formats, read off the tensors" in report and (run / "figures" / "norms.png").exists()
    rows = (run / "resources.jsonl").read_text()
    (run / "resources.jsonl").write_text(rows.replace('"memory_mb": ', '"memory_mb": 1'))
    done = medibuddy("verify", run)
    assert done.returncode == 1 and "resources.jsonl" in done.stdout
