"""A batch over a Ray cluster of two nodes, one of which is lost, with results in shared storage.

Ray is not in the lock:  pip install 'ray[default]==2.60.*' && python -m pytest tests/test_cluster_ray.py
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from batch_notebooks import light_notebook
from conftest import environment, medibuddy

from medibuddy.run import read_json, read_jsonl

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    "A head without processors and two nodes with one each"
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    made.nodes = [made.add_node(num_cpus=1, **small) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    made.shutdown()


def plan_file(folder: Path, pause: float, extra: str = "") -> Path:
    "A plan of four runs and its notebook, which reads a file beside it"
    light_notebook(folder / "light.ipynb", "assert Path('rows.txt').read_text() == 'rows'")
    (folder / "rows.txt").write_text("rows")
    (folder / "plan.yaml").write_text(f"notebooks: [light.ipynb]\nparameters: {{rate: [0.05, 0.1], pause: {pause}}}\nseeds: [1, 2]\nray: {{storage: shared, files: [rows.txt], every: 0.5, cpus: 1{extra}}}\n")
    return folder / "plan.yaml"


def end_node(node) -> None:
    "Lose a node as a spot instance is lost: all its processes at once, without a farewell"
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def trained(run: Path) -> list:
    "What a run learned, without times"
    return [read_json(run / "run" / "adapter" / "weights.json"), read_json(run / "run" / "metrics.json"), read_jsonl(run / "run" / "log.jsonl")]


def test_a_lost_node_costs_steps_and_no_run(cluster, tmp_path):
    plan = plan_file(tmp_path, 0.3)
    command = [sys.executable, "-m", "medibuddy", "batch", str(plan), "--folder", str(tmp_path / "batch"), "--on", f"ray:{cluster.address}", "--json"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while len(list((tmp_path / "shared" / "runs").glob("*/run/checkpoint.json"))) < 2 and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None, process.stderr.read()
    end_node(cluster.nodes[0])
    said, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    runs = json.loads(said)["runs"]
    assert [run["state"] for run in runs] == ["done"] * 4 and sorted(run["attempts"] for run in runs) == [1, 1, 1, 2]
    lost = next(run for run in runs if run["attempts"] == 2)
    first, second = (read_json(tmp_path / "batch" / "runs" / lost["id"] / "attempts" / n / "outcome.json") for n in "12")
    assert first["cause"] == "machine" and second["state"] == "done"
    seen = (tmp_path / "shared" / "runs" / lost["id"] / "run" / "seen.txt").read_text()
    assert seen.count("begin prepare") == 1 and seen.count("begin train") == 2  # prepared rows and checkpoint came along
    assert medibuddy("batch", plan_file(tmp_path / "home", 0.0), "--folder", tmp_path / "calm").returncode == 0
    calm = {run.name.rpartition("-")[0]: trained(run) for run in (tmp_path / "calm" / "runs").iterdir()}
    assert {run.name.rpartition("-")[0]: trained(run) for run in (tmp_path / "batch" / "runs").iterdir()} == calm


def test_finished_runs_are_not_sent_again_and_bad_plans_are_refused(cluster, tmp_path):
    plan = plan_file(tmp_path, 0.0)
    for _ in range(2):
        done = medibuddy("batch", plan, "--folder", tmp_path / "batch", "--on", f"ray:{cluster.address}", "--json")
        assert done.returncode == 0, done.stderr
        assert {run["attempts"] for run in json.loads(done.stdout)["runs"]} == {1}
    refused = medibuddy("batch", plan_file(tmp_path / "bad", 0.0, ", gpu_kind: A100"), "--folder", tmp_path / "other", "--on", f"ray:{cluster.address}")
    assert refused.returncode == 2 and "how many of them" in refused.stderr and not (tmp_path / "other").exists()
