"""The whole job with sockets blocked: no account, no network, no question asked."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import medibuddy

# Loaded by the child's interpreter before anything else: any attempt to reach out is an error that names itself.
BLOCKER = '''
import socket

def blocked(*args, **kwargs):
    raise RuntimeError(f"the network was used: {args}")

socket.socket.connect = socket.socket.connect_ex = blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = blocked
'''

OPTIONS = ["--set", "max_steps=2", "--set", "checkpoint_every=2", "--set", "max_new_tokens=8"]


@pytest.fixture
def blocked(tmp_path):
    "An environment without network, account or home directory"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    (tmp_path / "home").mkdir()
    keep = {key: "" for key in os.environ if key.startswith(("HF_", "WANDB", "HUGGING"))}
    return keep | {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}


def test_the_blocker_blocks(blocked):
    done = subprocess.run([sys.executable, "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9/')"], env=os.environ | blocked, capture_output=True, text=True)
    assert done.returncode != 0 and "the network was used" in done.stderr


def test_the_demo_runs_without_network_and_twice(blocked, tmp_path):
    run = tmp_path / "a folder with spaces" / "demo"
    first = medibuddy("demo", "--run", run, *OPTIONS, env=blocked, stdin=subprocess.DEVNULL)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "accuracy" in first.stdout and "report.html" in first.stdout and "verdict" in first.stdout
    assert "answers of the base model" in first.stderr and "training" in first.stderr  # progress
    page = (run / "report.html").read_bytes()
    second = medibuddy("demo", "--run", run, *OPTIONS, "--json", env=blocked, stdin=subprocess.DEVNULL)
    assert second.returncode == 0, second.stderr[-3000:]
    assert json.loads(second.stdout)["report"] == str(run / "report.html")
    assert (run / "report.html").read_bytes() == page
    assert medibuddy("verify", run, env=blocked).returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to take the network away from a process")
def test_the_kernel_agrees_that_no_network_is_needed(tmp_path):
    probe = subprocess.run(["unshare", "-rn", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("this machine does not let processes have a network namespace of their own")
    command = ["unshare", "-rn", sys.executable, "-m", "medibuddy", "prepare", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
