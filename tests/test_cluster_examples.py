"The SLURM and Kubernetes examples say what the command line understands."

import os
import stat
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from medibuddy.training.launch import Launch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def parse(arguments: list[str]) -> dict:
    "The options of a medibuddy command, as the real command line reads them; fails for one that it does not know"
    import medibuddy.commands.batch  # noqa: F401
    from medibuddy.cli import app

    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:])).params


def shim(folder: Path, name: str, text: str) -> None:
    "A program of this name that stands in for the cluster's"
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


def test_the_slurm_job_starts_one_launcher_a_machine_and_evaluates_once(tmp_path):
    shim(tmp_path, "scontrol", '[ "$1 $2" = "show hostnames" ] && printf "node-a\\nnode-b\\n"')
    shim(tmp_path, "srun", 'shift; for rank in 0 1; do SLURM_NODEID=$rank "$@" || exit 1; done')
    shim(tmp_path, "medibuddy", f'printf "%s\\x1f" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls')
    cluster = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    done = subprocess.run(["bash", EXAMPLES / "slurm-train.sbatch", "tiny", "/shared/my run"], env=os.environ | cluster | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\x1f")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == ["train", "train", "evaluate", "compare", "report"]
    parsed = [parse(call) for call in calls]
    for rank, options in enumerate(parsed[:2]):
        assert (options["recipe"], options["run"]) == ("tiny", "/shared/my run")
        assert Launch(options["launch"], options["processes"], options["nodes"], options["node_rank"], options["main_address"], options["main_port"]) == Launch("ddp", 4, 2, rank, "node-a", 23456)
    assert all(options["run"] == "/shared/my run" for options in parsed[2:])


def test_the_slurm_job_asks_for_what_it_uses():
    text = (EXAMPLES / "slurm-train.sbatch").read_text()
    directives = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH"))
    assert directives["ntasks-per-node"] == "1" and "requeue" in directives and int(directives["gpus-per-node"]) > 0
    lines = text.splitlines()
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < min(i for i, line in enumerate(lines) if line and not line.startswith("#"))  # SLURM stops reading at the first command


def test_the_kubernetes_job_runs_a_batch_and_takes_secrets_from_the_cluster():
    job = yaml.safe_load((EXAMPLES / "kubernetes-batch.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # a Job admits no other
    container = pod["containers"][0]
    options = parse(container["command"][1:])
    assert container["command"][0] == "medibuddy" and str(options["jobs"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert all(str(options[name]).startswith(mounts["work"] + "/") for name in ("plan", "folder"))
    assert all("valueFrom" in entry for entry in container["env"] if "TOKEN" in entry["name"])


@pytest.mark.parametrize("arguments", [["train", "--run", "x", "--node-rnak", "1"]])
def test_a_misspelt_option_would_be_found(arguments):
    with pytest.raises(Exception, match="No such option"):
        parse(arguments)
