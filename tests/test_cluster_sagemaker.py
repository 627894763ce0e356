"""Runs and whole batches as SageMaker training jobs: the real SDK against a local moto server, and the container's entry point to its end.

The SDK is not in the lock (and large):  pip install 'sagemaker==3.27.*' 'moto[server]' s3fs && python -m pytest tests/test_cluster_sagemaker.py
moto checks requests and runs nothing; so the test does what SageMaker would: it downloads the job's channels and starts what was sent.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from batch_notebooks import light_notebook
from conftest import environment, medibuddy

from medibuddy.run import UsageError, read_json, write_json

pytest.importorskip("sagemaker.train")
pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
ROLE = "arn:aws:iam::123456789012:role/medibuddy"


class Platform:
    """moto's server with what it lacks in front of it: while `folder` is set, a job that was created is run, and is "InProgress" until its container has ended.

    With `interrupt` set, the machine of the first job is taken away as soon as a checkpoint of its run lies in S3.
    """

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.moto, self.folder, self.interrupt = DomainDispatcherApplication(create_backend_app), None, False
        self.status: dict[str, str] = {}  # job -> as SageMaker would say
        self.failures: list[str] = []  # of threads

    def __call__(self, environ, start_response):
        import io

        action = environ.get("HTTP_X_AMZ_TARGET", "").partition(".")[2]
        if action not in ("CreateTrainingJob", "DescribeTrainingJob"):
            return self.moto(environ, start_response)
        body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        environ["wsgi.input"], name, begun = io.BytesIO(body), json.loads(body)["TrainingJobName"], []
        answer = b"".join(self.moto(environ, lambda status, headers, *more: begun.append((status, headers))))
        (status, headers), = begun
        if action == "CreateTrainingJob" and status.startswith("200") and self.folder:
            self.status[name] = "InProgress"
            threading.Thread(target=self.work, args=(name,), daemon=True).start()
        if action == "DescribeTrainingJob" and name in self.status:
            answer = json.dumps(json.loads(answer) | {"TrainingJobStatus": self.status[name]}).encode()
            headers = [(key, value) for key, value in headers if key.lower() != "content-length"] + [("Content-Length", str(len(answer)))]
        start_response(status, headers)
        return [answer]

    def work(self, name):
        "Run a job's container to its end, or until the machine is taken away"
        import boto3

        try:
            taken, self.interrupt = self.interrupt, False
            job = boto3.client("sagemaker").describe_training_job(TrainingJobName=name)
            process = start_container(job, self.folder / name)
            task = next(channel["DataSource"]["S3DataSource"]["S3Uri"] for channel in job["InputDataConfig"] if channel["ChannelName"] == "task")
            bucket, _, key = task.removeprefix("s3://").partition("/")
            checkpoint = key.replace("/tasks/", "/runs/").rstrip("/").rpartition("/")[0] + "/run/checkpoint.json"
            while process.poll() is None:
                if taken and boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=checkpoint).get("KeyCount"):
                    for part in [*psutil.Process(process.pid).children(recursive=True), process]:
                        part.kill()
                    process.wait()
                    self.status[name] = "Stopped"
                    return
                time.sleep(0.2)
            self.status[name] = "Completed" if process.returncode == 0 else "Failed"
        except Exception as error:  # a thread's exception would be printed and forgotten
            self.failures.append(repr(error))
            self.status[name] = "Failed"


@pytest.fixture(scope="module")
def aws():
    "A local server that answers as AWS does, and an environment that knows no other"
    from moto.server import MotoRequestHandler
    from werkzeug.serving import make_server

    platform = Platform()
    server = make_server("127.0.0.1", 0, platform, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "eu-central-1", "AWS_EC2_METADATA_DISABLED": "true", "SAGEMAKER_VALIDATE_ROLE": "false"}
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    boto3.client("secretsmanager").create_secret(Name="medibuddy/token", SecretString="kept secret")
    yield platform
    server.shutdown()
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


def start_container(job: dict, root: Path) -> subprocess.Popen:
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
    with open(root / "container.log", "wb") as log:
        return subprocess.Popen([sys.executable, "-c", command, str(root)], cwd=code, env=environment(PYTHONPATH=""), stdout=log, stderr=log)


def as_sagemaker_does(job: dict, root: Path) -> int:
    "Run a job's container to its end; its exit status"
    return start_container(job, root).wait(120)


def test_a_run_as_a_training_job(aws, tmp_path):
    plan = make_plan(tmp_path)
    place, handle = start(plan, tmp_path / "batch")
    job = place.client.describe_training_job(TrainingJobName=handle["job"])
    assert job["RoleArn"] == ROLE and job["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge" and job["ResourceConfig"]["VolumeSizeInGB"] == 50
    assert job["EnableManagedSpotTraining"] is True and job["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200, "MaxWaitTimeInSeconds": 14400}
    assert job["HyperParameters"] == {"rate": "0.1", "rank": "2"} and job["OutputDataConfig"]["S3OutputPath"].startswith("s3://bucket/batch/")
    assert {channel["ChannelName"] for channel in job["InputDataConfig"]} == {"task", "code", "sm_drivers"}
    assert "kept secret" not in json.dumps(job, default=str)
    assert as_sagemaker_does(job, tmp_path / "ml") == 0, (tmp_path / "ml" / "container.log").read_text()
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
    assert as_sagemaker_does(job, tmp_path / "ml") == 1
    assert "AssertionError" in (tmp_path / "ml" / "output" / "failure").read_text()
    boto3.client("secretsmanager").put_secret_value(SecretId="medibuddy/token", SecretString="kept secret")
    assert as_sagemaker_does(job, tmp_path / "again") == 0
    outcome = place.poll(handle)
    seen = (tmp_path / "batch" / "runs" / outcome["id"] / "run" / "seen.txt").read_text()
    assert outcome["state"] == "done" and seen.count("begin train") == 1  # nothing finished was done again


def test_a_plan_without_role_or_with_a_secret_is_refused(aws, tmp_path, monkeypatch):
    from medibuddy.cluster.on_sagemaker import SageMakerPlace

    monkeypatch.delenv("SAGEMAKER_ROLE", raising=False)
    with pytest.raises(UsageError, match="sagemaker.role"):
        SageMakerPlace(make_plan(tmp_path, role=None), tmp_path / "batch")
    assert not (tmp_path / "batch").exists()


def batch_command(plan, folder: Path) -> list:
    return ["batch", plan.path, "--folder", folder, "--on", "sagemaker", "--json"]


def test_a_whole_batch_of_training_jobs(aws, tmp_path):
    """`medibuddy batch PLAN --on sagemaker` to its end: one machine is taken away, the batch itself is killed, and started again.

    Every run ends once, with the numbers that it has on this machine.
    """
    plan = make_plan(tmp_path, storage="s3://bucket/whole", jobs=2, instance_type="ml.m5.large")
    plan.path.write_text(plan.path.read_text().replace("{rate: 0.1, rank: 2}", "{rate: [0.05, 0.1], rank: 2, pause: 0.8}"))
    aws.folder, aws.interrupt = tmp_path / "platform", True
    try:
        first = subprocess.Popen([sys.executable, "-m", "medibuddy", *map(str, batch_command(plan, tmp_path / "batch"))], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        limit = time.monotonic() + 120
        while len(list((tmp_path / "batch").glob("runs/*/attempts/1/job.json"))) < 2 and time.monotonic() < limit and first.poll() is None:
            time.sleep(0.1)
        assert first.poll() is None, first.stderr.read()
        first.kill()
        first.communicate()
        done = medibuddy(*batch_command(plan, tmp_path / "batch"))
    finally:
        aws.folder = None
    assert done.returncode == 0 and not aws.failures, (done.stderr, aws.failures)
    runs = json.loads(done.stdout)["runs"]
    assert [run["state"] for run in runs] == ["done"] * 2
    # two jobs, which the second call took up instead of sending them again, and one more for the machine that was lost
    assert sorted(aws.status.values()) == ["Completed", "Completed", "Stopped"]
    outcomes = {run["id"]: [read_json(file) for file in sorted((tmp_path / "batch" / "runs" / run["id"] / "attempts").glob("*/outcome.json"))] for run in runs}
    assert sorted([outcome["state"] for outcome in part] for part in outcomes.values()) == [["done"], ["failed", "done"]]
    lost = next(id for id, part in outcomes.items() if len(part) == 2)
    assert outcomes[lost][0]["cause"] == "machine" and "is Stopped" in outcomes[lost][0]["error"]
    seen = (tmp_path / "batch" / "runs" / lost / "run" / "seen.txt").read_text()
    assert seen.count("begin prepare") == 1 and seen.count("begin train") == 2  # it went on from what had been copied to S3
    os.environ["HF_TOKEN"] = "kept secret"
    here = medibuddy("batch", plan.path, "--folder", tmp_path / "here")
    del os.environ["HF_TOKEN"]
    assert here.returncode == 0, here.stderr
    for run in runs:
        folders = [tmp_path / name / "runs" / run["id"] / "run" for name in ("batch", "here")]
        assert len({(folder / "adapter" / "weights.json").read_bytes() for folder in folders}) == 1 == len({(folder / "metrics.json").read_bytes() for folder in folders})
    kept = "".join(path.read_text(errors="replace") for folder in ("batch", "platform") for path in (tmp_path / folder).rglob("*") if path.is_file())
    assert "kept secret" not in kept.replace("== 'kept secret'", "")  # the notebook's own line names it
    again = medibuddy(*batch_command(plan, tmp_path / "batch"))
    assert again.returncode == 0 and len(aws.status) == 3, "nothing is sent again"
