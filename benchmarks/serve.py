"""Requests a second and time to the first token: `medibuddy serve` (base and adapter, guard, key) against plain `vllm serve` of the base model, in turns.

    python benchmarks/serve.py RUN --python PYTHON_THAT_HAS_VLLM          # RUN: an evaluated run; its test questions are asked
    python benchmarks/serve.py RUN --requests 200 --at-once 32 --turns 3

Every turn starts a server, asks each question once to warm up, then measures. Both servers get the same questions, the same length, greedy decoding and
the same flags (precision, longest sequence, prefix caching). Run it on an idle machine. Writes results/serve-<device>.json.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import openai

from medibuddy.data.chat import user_text
from medibuddy.data.example import Example
from medibuddy.deploy.serve import OFFLINE, plan_server
from medibuddy.flow import reopen_run
from medibuddy.hardware import describe_environment, detect_hardware
from medibuddy.run import read_jsonl

RESULTS = Path(__file__).parent / "results"
# options that medibuddy adds and a plain server has not
OURS = {"--enable-lora": 0, "--max-loras": 1, "--max-lora-rank": 1, "--lora-modules": 1, "--middleware": 1}


def plain_command(command: list[str]) -> list[str]:
    "The same `vllm serve` without adapter and guard"
    kept, skip = [], 0
    for part in command:
        if skip:
            skip -= 1
        elif part in OURS:
            skip = OURS[part]
        else:
            kept.append(part)
    return kept


def free_port() -> int:
    "A port that nobody listens on"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(command: list[str], environment: dict, ready: callable, log) -> tuple[subprocess.Popen, float]:
    "Start a server and wait until it is ready; seconds that took"
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
    while not ready():
        if process.poll() is not None or time.perf_counter() - started > 1800:
            raise SystemExit(f"the server did not start; its messages are in {log.name}")
        time.sleep(0.5)
    return process, time.perf_counter() - started


def stop(process: subprocess.Popen) -> None:
    "End a server"
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def load(url: str, key: str, model: str, questions: list[str], at_once: int, tokens: int) -> dict:
    "Ask all questions, so many at once, streaming"
    client, gate, firsts, counts = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600), asyncio.Semaphore(at_once), [], []

    async def one(content: str) -> None:
        async with gate:
            asked, first, count = time.perf_counter(), None, 0
            stream = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True})
            async for part in stream:
                if part.choices and part.choices[0].delta.content:
                    first, count = first or time.perf_counter() - asked, count + 1
            firsts.append(first), counts.append(count)

    started = time.perf_counter()
    await asyncio.gather(*(one(content) for content in questions))
    seconds = time.perf_counter() - started
    firsts.sort()
    return {"requests_per_second": len(questions) / seconds, "chunks_per_second": sum(counts) / seconds, "first_token_median_s": statistics.median(firsts), "first_token_p95_s": firsts[int(0.95 * (len(firsts) - 1))]}


def main() -> None:
    "Measure both servers in turns"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer; the end of an answer is ignored, so that all are as long")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    run, recipe = reopen_run(options.run)
    texts = [user_text(Example.from_dict(row)) for row in read_jsonl(run.path / "data" / "test.jsonl")]
    questions = [texts[i % len(texts)] for i in range(options.requests)]
    measured: dict[str, list[dict]] = {"vllm base": [], "medibuddy base": [], "medibuddy tuned": []}
    for turn in range(options.turns):
        for kind in ("vllm", "medibuddy") if turn % 2 == 0 else ("medibuddy", "vllm"):
            port = free_port()
            server = plan_server(run, recipe, engine="vllm", port=port, python=options.python)
            log = open(Path(tempfile.gettempdir()) / f"serve-{kind}-{turn}.log", "w+")
            if kind == "vllm":
                def ready(url=server.url):
                    try:
                        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
                    except httpx.HTTPError:
                        return False
                process, seconds = start(plain_command(server.command), OFFLINE | {"VLLM_API_KEY": server.environment["VLLM_API_KEY"]}, ready, log)
            else:
                command = [sys.executable, "-m", "medibuddy", "serve", options.run, "--engine", "vllm", "--python", options.python, "--port", str(port)]
                process, seconds = start(command, {}, lambda name=log.name: "ready: " in Path(name).read_text(errors="replace"), log)
            try:
                for model in ("base",) if kind == "vllm" else ("base", "tuned"):
                    ask = lambda some, name=model, where=server: asyncio.run(load(where.url, where.environment["VLLM_API_KEY"], name, some, options.at_once, options.tokens))
                    ask(questions[: 2 * options.at_once])  # warms up kernels and the prefix cache's template part
                    found = ask(questions) | {"start_s": seconds}
                    measured[f"{kind} {model}"].append({name: round(value, 4) for name, value in found.items()})
                    print(turn, kind, model, measured[f"{kind} {model}"][-1], flush=True)
            finally:
                stop(process)
    medians = {name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in measured.items()}
    version = subprocess.run([options.python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True).stdout.strip()
    settings = {"requests": options.requests, "at_once": options.at_once, "tokens": options.tokens, "turns": options.turns, "model": recipe.model.name, "rank": recipe.lora.r}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"serve-{detect_hardware().device}.json"
    path.write_text(json.dumps({"environment": describe_environment() | {"vllm": version}, "load_at_start": os.getloadavg()[0], "settings": settings, "medians": medians, "turns": measured}, indent=2) + "\n")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
