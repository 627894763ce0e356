"""A run as a SageMaker training job: the real SDK against a local moto server, and the container's entry point to its end.

The SDK is not in the lock (and large):  pip install 'sagemaker==3.27.*' 'moto[server]' s3fs && python -m pytest tests/test_cluster_sagemaker.py
moto checks requests and runs nothing; so the test does what SageMaker would: it downloads the job's channels and starts what was sent.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from batch_notebooks import light_notebook

from medibuddy.run import UsageError, read_json, write_json

pytest.importorskip("sagemaker.train")
pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
ROLE = "arn:aws:iam::123456789012:role/medibuddy"


@pytest.fixture(scope="module")
def aws():
    "A local server that answers as AWS does, and an environment that knows no other"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    before = dict(os.environ)
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "eu-central-1", "AWS_EC2_METADATA_DISABLED": "true", "SAGEMAKER_VALIDATE_ROLE": "false"}
    for _ in range(200):
        try:
            urllib.request.urlopen(url + "/moto-api/", timeout=1)
            break
        except OSError:
            time.sleep(0.1)
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    boto3.client("secretsmanager").create_secret(Name="medibuddy/token", SecretString="kept secret")
    yield url
    server.kill()
    server.wait()
    os.environ.clear()
    os.environ.update(before)


def make_plan(folder: Path, **settings):
    "A plan of one run, whose notebook wants a file beside it and a secret"
    from medibuddy.batch.plan import load_plan

    light_notebook(folder / "light.ipynb", "import os\nassert os.environ['HF_TOKEN'] == 'kept secret' and Path('rows.txt').read_text() == 'rows'")
    (folder / "rows.txt").write_text("rows")
    known = {"storage": "s3://bucket/batch", "role": ROLE, "image": "763104351884.dkr.ecr.eu-central-1.amazonaws.com/pytorch-training:2.10", "instance_type": "ml.g5.2xlarge", "spot": True, "hours": 2, "volume_gb": 50, "files": ["rows.txt"], "secrets": {"HF_TOKEN": "medibuddy/token"}}
    (folder / "plan.yaml").write_text(f"notebooks: [light.ipynb]\nparameters: {{rate: 0.1, rank: 2}}\nsagemaker: {json.dumps(known | settings)}\n")
    return load_plan(folder / "plan.yaml")


def start(plan, folder: Path, number: int = 1):
    "Start an attempt at the plan's run as the batch does"
    from medibuddy.batch.driver import Batch
    from medibuddy.batch.plan import expand
    from medibuddy.batch.progress import Board
    from medibuddy.cluster.on_sagemaker import SageMakerPlace

    place = SageMakerPlace(plan, folder)
    batch, run = Batch(plan, folder, place, Board(False)), expand(plan)[0]
    attempt = batch.run_folder(run) / "attempts" / str(number)
    spec = batch.specify(run)
    write_json(attempt / "spec.json", spec)
    return place, place.start(spec, attempt, 0)


def as_sagemaker_does(job: dict, root: Path) -> subprocess.CompletedProcess:
    "Put channels and hyperparameters where a container finds them, and start the entry point that was sent"
    import boto3

    s3 = boto3.client("s3")
    for channel in job["InputDataConfig"]:
        bucket, _, prefix = channel["DataSource"]["S3DataSource"]["S3Uri"].removeprefix("s3://").partition("/")
        for found in s3.list_objects_v2(Bucket=bucket, Prefix=prefix.rstrip("/") + "/")["Contents"]:
            target = root / "input" / "data" / channel["ChannelName"] / found["Key"].removeprefix(prefix.rstrip("/") + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, found["Key"], str(target))
    write_json(root / "input" / "config" / "hyperparameters.json", job["HyperParameters"])
    code = root / "input" / "data" / "code"
    assert "run.py" in (root / "input" / "data" / "sm_drivers" / "sourcecode.json").read_text()
    command = "import sys; sys.path.insert(0, '.'); from medibuddy.cluster.container import main; sys.exit(main(sys.argv[1]))"  # run.py, with another folder than /opt/ml
    return subprocess.run([sys.executable, "-c", command, str(root)], cwd=code, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True, timeout=120)


def test_a_run_as_a_training_job(aws, tmp_path):
    plan = make_plan(tmp_path)
    place, handle = start(plan, tmp_path / "batch")
    job = place.client.describe_training_job(TrainingJobName=handle["job"])
    assert job["RoleArn"] == ROLE and job["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge" and job["ResourceConfig"]["VolumeSizeInGB"] == 50
    assert job["EnableManagedSpotTraining"] is True and job["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    assert job["HyperParameters"] == {"rate": "0.1", "rank": "2"} and job["OutputDataConfig"]["S3OutputPath"].startswith("s3://bucket/batch/")
    assert {channel["ChannelName"] for channel in job["InputDataConfig"]} == {"task", "code", "sm_drivers"}
    assert "kept secret" not in json.dumps(job, default=str)
    done = as_sagemaker_does(job, tmp_path / "ml")
    assert done.returncode == 0, done.stderr
    pins = (tmp_path / "ml" / "input" / "data" / "code" / "requirements.txt").read_text().split()
    assert all("==" in pin for pin in pins) and any(pin.startswith("papermill==2.7") for pin in pins)
    outcome = place.poll(handle)
    assert (outcome["state"], outcome["id"]) == ("done", handle["spec"]["id"])
    run = tmp_path / "batch" / "runs" / outcome["id"] / "run"
    assert read_json(run / "metrics.json")["norm"] > 0 and (run / "log.jsonl").exists()


def test_a_job_that_left_nothing_failed_whatever_its_status(aws, tmp_path):
    place, handle = start(make_plan(tmp_path, storage="s3://bucket/empty"), tmp_path / "batch")
    outcome = place.poll(handle)  # moto calls every job completed
    assert (outcome["state"], outcome["cause"]) == ("failed", "machine") and "is Completed: it left no outcome" in outcome["error"]


def test_a_killed_batch_takes_its_job_up_again(aws, tmp_path):
    plan = make_plan(tmp_path, storage="s3://bucket/left")
    _, first = start(plan, tmp_path / "batch")
    place, second = start(plan, tmp_path / "batch", 2)
    assert second["job"] == first["job"] and second["folder"] == first["folder"]


def test_an_interrupted_job_goes_on_where_it_was(aws, tmp_path):
    plan = make_plan(tmp_path, storage="s3://bucket/spot")
    place, handle = start(plan, tmp_path / "batch")
    job = place.client.describe_training_job(TrainingJobName=handle["job"])
    import boto3

    boto3.client("secretsmanager").put_secret_value(SecretId="medibuddy/token", SecretString="wrong")  # the last cell fails, after all stages are done
    assert as_sagemaker_does(job, tmp_path / "ml").returncode == 1
    assert "AssertionError" in (tmp_path / "ml" / "output" / "failure").read_text()
    boto3.client("secretsmanager").put_secret_value(SecretId="medibuddy/token", SecretString="kept secret")
    assert as_sagemaker_does(job, tmp_path / "again").returncode == 0
    outcome = place.poll(handle)
    seen = (tmp_path / "batch" / "runs" / outcome["id"] / "run" / "seen.txt").read_text()
    assert outcome["state"] == "done" and seen.count("begin train") == 1  # nothing finished was done again


def test_a_plan_without_role_or_with_a_secret_is_refused(aws, tmp_path, monkeypatch):
    from medibuddy.cluster.on_sagemaker import SageMakerPlace

    monkeypatch.delenv("SAGEMAKER_ROLE", raising=False)
    with pytest.raises(UsageError, match="sagemaker.role"):
        SageMakerPlace(make_plan(tmp_path, role=None), tmp_path / "batch")
    assert not (tmp_path / "batch").exists()
