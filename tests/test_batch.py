"""Batches of notebooks: killed at random moments, with bugs, without disk, without memory, twice at once; and what they report.

The whole kill test with real trainings:  MEDIBUDDY_SLOW=1 python -m pytest tests/test_batch.py -k whole --timeout 3000
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from batch_notebooks import LIGHT_PARAMETERS, light_notebook, training_notebook, write_notebook
from conftest import environment, medibuddy, pubmedqa_rows

from medibuddy.run import read_json, read_jsonl

MARK = "MEDIBUDDY_BATCH_RUN"
GRID = "parameters: {{rate: [0.05, 0.1], rank: [1, 2], pause: {pause}}}\nseeds: [1, 2, 3]\nretries: 5\n"


def write_plan(folder: Path, text: str, name: str = "plan.yaml") -> Path:
    "A plan beside the light notebook"
    if not (folder / "light.ipynb").exists():
        light_notebook(folder / "light.ipynb")
    (folder / name).write_text("notebooks: [light.ipynb]\n" + text)
    return folder / name


def batch(plan: Path, folder: Path, *more, **options) -> subprocess.CompletedProcess:
    "Run the batch command to its end"
    return medibuddy("batch", plan, "--folder", folder, *more, **options)


def start(plan: Path, folder: Path, *more) -> subprocess.Popen:
    "Start the batch command"
    return subprocess.Popen([sys.executable, "-m", "medibuddy", "batch", str(plan), "--folder", str(folder), *map(str, more)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def processes(folder: Path) -> list[psutil.Process]:
    "Workers and kernels of a batch"
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(folder.resolve())):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kernels(folder: Path) -> list[psutil.Process]:
    "Kernels of a batch"
    found = []
    for process in processes(folder):
        try:
            if "ipykernel_launcher" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def results(folder: Path, names: tuple[str, ...]) -> dict[str, list]:
    "What each run ended with, without times"
    found = {}
    for run in sorted((folder / "runs").iterdir()):
        log = [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(run / "run" / "log.jsonl")]
        found[run.name] = [log, *(read_json(run / "run" / name) for name in names)]
    return found


def check_once(folder: Path, count: int) -> None:
    "Every run is done exactly once, and no stage was begun again after it was recorded"
    runs = sorted((folder / "runs").iterdir())
    assert len(runs) == count
    for run in runs:
        ends = [read_json(path)["state"] for path in run.glob("attempts/*/outcome.json")]
        assert ends.count("done") == 1, (run.name, ends)
        seen = (run / "run" / "seen.txt").read_text().splitlines() if (run / "run" / "seen.txt").exists() else []
        for stage in ("prepare", "train", "score"):
            marks = [line for line in seen if line.endswith(stage)]
            if f"end {stage}" in marks:
                assert f"begin {stage}" not in marks[marks.index(f"end {stage}") :], (run.name, marks)


def makers(folder: Path, stage: str) -> dict[str, list[str]]:
    "Which runs did a stage themselves, by the hash of what they made"
    found = {}
    for file in sorted(folder.glob("runs/*/*/manifest.json")):
        manifest = read_json(file)
        record = manifest["stages"][stage]
        if "taken_from" not in record:
            found.setdefault(json.dumps([manifest["files"][name]["sha256"] for name in record["files"] if name.endswith("jsonl") or name.endswith("json")]), []).append(file.parents[1].name)
    return found


def work_done(folder: Path) -> int:
    "Lines and files that the runs of a batch have written so far"
    total = 0
    for place, _, names in os.walk(folder / "runs"):  # unlike glob it bears folders that vanish meanwhile
        if "attempts" not in place and "checkpoints" not in place:
            total += len(names) + sum(Path(place, name).read_bytes().count(b"\n") for name in names if name in ("log.jsonl", "seen.txt"))
    return total


def disturb(plan: Path, folder: Path, kills: int, jobs: int, most: int, chance: random.Random) -> tuple[int, int]:
    "Run a batch, killing its driver or a kernel each time after up to `most` more lines and files; how many of each"
    killed = {"driver": 0, "kernel": 0}
    process = start(plan, folder, "--jobs", jobs)
    while sum(killed.values()) < kills and (process.poll() is None or process.returncode != 0):
        if process.poll() is not None:  # a run was killed more often than `retries`
            process = start(plan, folder, "--jobs", jobs)
        wanted, limit = work_done(folder) + chance.randint(0, most), time.monotonic() + 30
        while process.poll() is None and time.monotonic() < limit and (work_done(folder) < wanted or not kernels(folder)):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        alive = kernels(folder)
        if chance.random() < 0.5 and alive:
            chance.choice(alive).kill()
            killed["kernel"] += 1
        elif process.poll() is None:
            process.kill()
            process.wait()
            killed["driver"] += 1
            process = start(plan, folder, "--jobs", jobs)
    for _ in range(10):
        if process.wait() == 0:
            break
        process = start(plan, folder, "--jobs", jobs)
    assert process.returncode == 0
    return killed["driver"], killed["kernel"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Path, dict]:
    "A plan of twelve runs, the folder of the batch, and what it printed"
    folder = tmp_path_factory.mktemp("undisturbed")
    plan = write_plan(folder, GRID.format(pause=0.0))
    done = batch(plan, folder / "batch", "--jobs", 3, "--json")
    assert done.returncode == 0, done.stderr
    return plan, folder / "batch", json.loads(done.stdout)


def test_twelve_runs_killed_twenty_times_end_once_and_alike(undisturbed, tmp_path):
    _, calm, _ = undisturbed
    plan = write_plan(tmp_path, GRID.format(pause=0.05))
    # `pause` is a parameter, so the runs have other names: compare by what varies
    driver, kernel = disturb(plan, tmp_path / "batch", 20, 3, 14, random.Random(7))
    assert driver + kernel == 20 and driver >= 4 and kernel >= 4
    check_once(tmp_path / "batch", 12)
    name = lambda id: re.sub(r"-[0-9a-f]{8}$", "", id)
    expected, found = ({name(id): values for id, values in results(folder, ("metrics.json", "adapter/weights.json")).items()} for folder in (calm, tmp_path / "batch"))
    assert len(expected) == 12 and found == expected
    for folder in (calm, tmp_path / "batch"):  # the rows of each of the three seeds were made by one run, and taken over by three
        assert [len(runs) for runs in makers(folder, "prepare").values()] == [1, 1, 1]
    assert not processes(tmp_path / "batch")


def test_a_finished_batch_repeats_nothing_and_a_grown_plan_only_adds(undisturbed, tmp_path):
    plan, calm, first = undisturbed
    assert [run["state"] for run in first["runs"]] == ["done"] * 12 and first["failed"] == 0
    folder = shutil.copytree(calm, tmp_path / "batch")
    grown = write_plan(tmp_path, GRID.format(pause=0.0).replace("[1, 2]", "[1, 2, 4]").replace("[1, 2, 3]", "[1]"))
    shutil.copy(plan.parent / "light.ipynb", tmp_path / "light.ipynb")
    listed = batch(grown, folder, "--dry-run", "--json")
    assert sorted(row["state"] for row in json.loads(listed.stdout)) == ["done"] * 4 + ["waiting"] * 2
    done = batch(grown, folder, "--jobs", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(run["attempts"] for run in json.loads(done.stdout)["runs"]) == [1] * 6
    check_once(folder, 14)


def test_a_changed_plan_repeats_no_stage_that_the_change_leaves_alone(undisturbed, tmp_path):
    plan, calm, _ = undisturbed
    folder = shutil.copytree(calm, tmp_path / "batch")
    before = results(folder, ("metrics.json", "adapter/weights.json"))
    changed = write_plan(tmp_path, GRID.format(pause=0.001).replace("[1, 2, 3]", "[1]"))  # another parameter, so other runs; but no stage depends on it
    shutil.copy(plan.parent / "light.ipynb", tmp_path / "light.ipynb")
    broken = next(run for run in sorted((folder / "runs").iterdir()) if "rate=0.1-rank=2-seed=1" in run.name)
    (broken / "run" / "adapter" / "weights.json").write_text("[1, 2]")  # what was altered is not taken
    done = batch(changed, folder, "--jobs", 2, "--json")
    assert done.returncode == 0, done.stderr
    new = {run["id"]: folder / "runs" / run["id"] for run in json.loads(done.stdout)["runs"]}
    began = {name: [line for line in (run / "run" / "seen.txt").read_text().splitlines() if line.startswith("begin")] for name, run in new.items()}
    again = [name for name in new if "rate=0.1-rank=2" in name]
    assert len(new) == 4 and not set(new) & set(before) and len(again) == 1
    assert began == {name: ["begin train", "begin score"] if name in again else ["begin score"] for name in new}
    after = {name.rpartition("-")[0]: values for name, values in results(folder, ("metrics.json", "adapter/weights.json")).items() if name in new}
    assert after == {name.rpartition("-")[0]: values for name, values in before.items() if "seed=1-" in name}
    assert {run["taken_over"] for run in json.loads(done.stdout)["runs"]} == {1, 2}


def test_code_that_raises_is_kept_and_not_tried_again_until_it_changes(tmp_path):
    notebook = light_notebook(tmp_path / "light.ipynb", "assert rate < 0.1, 'this rate is a bug'")
    plan = write_plan(tmp_path, "parameters: {rate: [0.05, 0.1]}\n")
    done = batch(plan, tmp_path / "batch", "--jobs", 2, "--json")
    assert done.returncode == 1
    runs = {run["parameters"]["rate"]: run for run in json.loads(done.stdout)["runs"]}
    assert (runs[0.05]["state"], runs[0.1]["state"], runs[0.1]["attempts"]) == ("done", "failed", 1)
    assert "this rate is a bug" in runs[0.1]["error"]
    kept = tmp_path / "batch" / "runs" / runs[0.1]["id"] / "attempts" / "1" / "notebook.ipynb"
    assert "this rate is a bug" in kept.read_text()
    again = batch(plan, tmp_path / "batch", "--json")
    assert again.returncode == 1 and {run["attempts"] for run in json.loads(again.stdout)["runs"]} == {1}
    light_notebook(notebook, "print('mended')")  # the code changed, so both run again; their stages are not repeated
    mended = batch(plan, tmp_path / "batch", "--jobs", 2, "--json")
    assert mended.returncode == 0, mended.stderr
    for run in (tmp_path / "batch" / "runs").iterdir():
        assert (run / "run" / "seen.txt").read_text().count("begin train") == 1


def test_a_kernel_that_always_dies_fails_honestly(tmp_path):
    write_notebook(tmp_path / "light.ipynb", LIGHT_PARAMETERS, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    done = batch(write_plan(tmp_path, "retries: 1\n"), tmp_path / "batch", "--json")
    assert done.returncode == 1
    run = json.loads(done.stdout)["runs"][0]
    assert (run["state"], run["attempts"]) == ("failed", 2) and "DeadKernelError" in run["error"]


def limit_file_size(megabytes: float):
    "Let processes write no file larger than this: what a full disk looks like"
    size = int(megabytes * 1e6)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_stops_the_batch_and_the_next_call_goes_on(tmp_path):
    light_notebook(tmp_path / "light.ipynb", "from medibuddy.run import write_atomic\nwrite_atomic(path / 'large.bin', b'0' * 3_000_000)")
    plan = write_plan(tmp_path, "parameters: {rate: [0.05, 0.1]}\n")
    done = batch(plan, tmp_path / "batch", preexec_fn=limit_file_size(2))
    assert done.returncode == 1
    assert "free some space and run the same command again" in done.stderr.splitlines()[-1]
    assert len(list((tmp_path / "batch" / "runs").iterdir())) == 1  # nothing else was begun
    done = batch(plan, tmp_path / "batch", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    check_once(tmp_path / "batch", 2)


def test_two_batches_on_one_folder_and_control_c(tmp_path):
    plan = write_plan(tmp_path, "parameters: {pause: 0.3}\nseeds: [1, 2]\n")
    # a shell's background job is told to ignore Ctrl-C; a terminal's command is not
    first = subprocess.Popen([sys.executable, "-m", "medibuddy", "batch", str(plan), "--folder", str(tmp_path / "batch"), "--jobs", "2"], env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    limit = time.monotonic() + 60
    while not list((tmp_path / "batch").glob("runs/*/run/log.jsonl")) and time.monotonic() < limit:
        time.sleep(0.05)
    second = batch(plan, tmp_path / "batch")
    assert second.returncode == 2 and "another medibuddy process is working in" in second.stderr
    first.send_signal(signal.SIGINT)
    said = first.communicate()[1]
    assert first.returncode == 130 and "run the same command again" in said and "Traceback" not in said
    assert not processes(tmp_path / "batch")
    done = batch(plan, tmp_path / "batch", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    check_once(tmp_path / "batch", 2)


@pytest.mark.parametrize("text, said", [
    ("parameters: {rates: [1, 2]}", "has no parameter `rates`. Did you mean `rate`?"),
    ("parameters: {rate: fast}", "give a number"),
    ("seeds: 3", "`seeds` is 3"),
    ("parameters: [rate]", "give a mapping"),
])
def test_a_wrong_plan_is_refused_before_anything_runs(tmp_path, call, text, said):
    status, _, err = call("batch", write_plan(tmp_path, text), "--folder", tmp_path / "batch")
    assert status == 2 and said in err
    assert not (tmp_path / "batch").exists()


def test_a_search_is_the_same_search_after_kills(tmp_path):
    pytest.importorskip("optuna")
    text = "parameters: {{pause: {pause}}}\nsearch:\n  trials: 6\n  at_once: 3\n  startup: 3\n  space: {{rate: {{low: 1e-3, high: 0.5, log: true}}, rank: [1, 2]}}\n"
    calm = batch(write_plan(tmp_path, text.format(pause=0.0)), tmp_path / "calm", "--jobs", 3, "--json")
    assert calm.returncode == 0, calm.stderr
    disturb(write_plan(tmp_path, text.format(pause=0.02), "slow.yaml"), tmp_path / "killed", 5, 2, 20, random.Random(3))
    trials = [read_json(tmp_path / name / "ledger" / "search.json") for name in ("calm", "killed")]
    assert len(trials[0]) == 6 and trials[0] == trials[1]
    assert len({trial["parameters"]["rate"] for trial in trials[0]}) == 6


def test_out_of_memory_goes_on_with_a_cheaper_recipe_where_that_is_allowed(tmp_path):
    cell = "from medibuddy import Recipe\nfrom medibuddy.run import write_atomic\nfrom pathlib import Path\nsettings = Recipe.load(recipe, batch_size=batch_size, gradient_accumulation=gradient_accumulation, eval_batch_size=1, gradient_checkpointing=True)\nwrite_atomic(Path(run_dir) / 'recipe.yaml', settings.to_yaml())\nif batch_size > 2:\n    raise MemoryError('CUDA out of memory')"
    write_notebook(tmp_path / "light.ipynb", 'run_dir = "r"\nrecipe = "tiny"\nbatch_size = 4\ngradient_accumulation = 1\nseed = 1', cell)
    done = batch(write_plan(tmp_path, "cheaper: true\n"), tmp_path / "batch", "--json")
    run = json.loads(done.stdout)["runs"][0]
    assert done.returncode == 0, done.stderr
    assert (run["attempts"], run["changes"]) == (2, {"batch_size": 2, "gradient_accumulation": 2})
    refused = batch(write_plan(tmp_path, "cheaper: false\n"), tmp_path / "other", "--json")
    assert refused.returncode == 1 and json.loads(refused.stdout)["runs"][0]["attempts"] == 1


TRAINED = ("metrics.json", "comparison.json")


def without_times(values):
    "Metrics without the seconds in them"
    if isinstance(values, dict):
        return {key: without_times(value) for key, value in values.items() if "second" not in key}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def training_plan(folder: Path, text: str) -> Path:
    "A plan over the notebook that trains"
    training_notebook(folder / "train.ipynb")
    (folder / "rows.json").write_text(json.dumps(pubmedqa_rows()))
    (folder / "plan.yaml").write_text(f"notebooks: [train.ipynb]\n{text}")
    return folder / "plan.yaml"


def test_real_trainings_share_their_stages_and_killed_ones_end_with_the_same_metrics(tmp_path):
    """Of two runs that differ in the learning rate, the second takes over rows and base answers; the same run alone, killed twice, does all itself.

    Both ways end with the same numbers, and every run verifies.
    """
    text = "parameters: {{learning_rate: {rates}}}\nseeds: [1]\n"
    plan = training_plan(tmp_path, text.format(rates="[1e-3, 2e-3]"))
    done = batch(plan, tmp_path / "calm", "--json")
    assert done.returncode == 0, done.stderr
    driver, kernel = disturb(training_plan(tmp_path / "alone", text.format(rates="2e-3")), tmp_path / "killed", 2, 1, 9, random.Random(1))
    hashed = lambda values: {id.rpartition("-")[2]: value for id, value in values.items()}
    calm, killed = (hashed(without_times(results(tmp_path / name, TRAINED))) for name in ("calm", "killed"))
    assert driver + kernel == 2 and len(calm) == 2 and len(killed) == 1
    assert killed == {id: value for id, value in calm.items() if id in killed}
    check_once(tmp_path / "killed", 1)
    for stage in ("prepare", "generate-base"):
        assert [len(runs) for runs in makers(tmp_path / "calm", stage).values()] == [1], stage
    assert len(makers(tmp_path / "calm", "train")) == 2 and {run["taken_over"] for run in json.loads(done.stdout)["runs"]} == {0, 2}
    for run in (tmp_path / "calm" / "runs").iterdir():
        assert medibuddy("verify", run / "run").returncode == 0
    report = read_json(tmp_path / "killed" / "report.json")
    assert report["groups"][0]["n"] == next(iter(killed.values()))[2]["n"] and "2 stages were taken over" in (tmp_path / "calm" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MEDIBUDDY_SLOW"), reason="many minutes: MEDIBUDDY_SLOW=1 python -m pytest tests/test_batch.py -k whole --timeout 3000")
def test_the_whole_twelve_trainings_killed_twenty_times(tmp_path):
    plan = training_plan(tmp_path, "parameters: {learning_rate: [1e-3, 2e-3]}\nseeds: [1, 2, 3, 4, 5, 6]\nretries: 5\n")
    done = batch(plan, tmp_path / "calm", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    driver, kernel = disturb(plan, tmp_path / "killed", 20, 2, 12, random.Random(11))
    assert driver + kernel == 20
    calm, killed = (without_times(results(tmp_path / name, TRAINED)) for name in ("calm", "killed"))
    assert len(calm) == 12 and calm == killed
    check_once(tmp_path / "killed", 12)
