"""Requests a second and time to the first token: `medibuddy serve` (base and adapter, guard, key) against plain `vllm serve` of the base model, in turns.

    python benchmarks/serve.py RUN --python PYTHON_THAT_HAS_VLLM          # RUN: an evaluated run; questions of its rows are asked
    python benchmarks/serve.py RUN --requests 200 --at-once 32 --turns 3

Both servers run side by side and are asked in turns, the order changing from turn to turn: while one is measured, the other is idle. Each gets the same questions, each of them once (so that
no prompt but the template's part is in the prefix cache), answers of the same length, greedy decoding and the same flags (precision, longest sequence, prefix caching).
Run it on an idle machine. Writes results/serve-<device>.json. vLLM's CPU build needs VLLM_CPU_KVCACHE_SPACE=1 TORCHDYNAMO_DISABLE=1 VLLM_CPU_OMP_THREADS_BIND=nobind.
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
from medibuddy.deploy.serve import OFFLINE, Server, plan_server
from medibuddy.flow import reopen_run
from medibuddy.hardware import describe_environment, detect_hardware
from medibuddy.run import read_jsonl

RESULTS = Path(__file__).parent / "results"
EAGER = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
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
    # without compilation the server with an adapter runs eagerly by itself; a plain one has to be told
    return kept + (["--enforce-eager"] if EAGER else [])


def free_port() -> int:
    "A port that nobody listens on"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def is_up(url: str) -> bool:
    "Whether a server answers"
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def start(command: list[str], environment: dict, ready: callable, log) -> tuple[subprocess.Popen, float]:
    "Start a server and wait until it is ready; seconds that took"
    started = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
    while not ready():
        if process.poll() is not None or time.perf_counter() - started > 1800:
            stop(process)
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


async def load(server: Server, model: str, questions: list[str], at_once: int, tokens: int) -> dict:
    "Ask all questions, so many at once, streaming"
    client, gate, firsts, counts = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=600), asyncio.Semaphore(at_once), [], []

    async def one(content: str) -> None:
        async with gate:
            asked, first, count = time.perf_counter(), None, 0
            stream = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True, "skip_special_tokens": False})
            async for part in stream:
                if part.choices and part.choices[0].delta.content:
                    first, count = first or time.perf_counter() - asked, count + 1
            # an answer without any text counts with its whole time
            firsts.append(first or time.perf_counter() - asked), counts.append(count)

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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # who is ended ends the servers, too
    run, recipe = reopen_run(options.run)
    texts = list(dict.fromkeys(user_text(Example.from_dict(row)) for split in ("test", "train") for row in read_jsonl(run.path / "data" / f"{split}.jsonl")))
    warm, texts = texts[: 2 * options.at_once], texts[2 * options.at_once :]
    if len(texts) < options.turns * options.requests:
        raise SystemExit(f"the run has {len(texts)} questions beside the warm-up, and {options.turns * options.requests} are needed")
    servers, measured, busy = {}, {"vllm base": [], "medibuddy base": [], "medibuddy tuned": []}, os.getloadavg()[0]
    try:
        for kind in ("vllm", "medibuddy"):
            server, log = plan_server(run, recipe, engine="vllm", port=free_port(), python=options.python), open(Path(tempfile.gettempdir()) / f"serve-{kind}.log", "w+")
            if kind == "vllm":
                servers[kind] = (server, *start(plain_command(server.command), OFFLINE | {"VLLM_API_KEY": server.key}, lambda url=server.url: is_up(url), log))
            else:
                command = [sys.executable, "-m", "medibuddy", "serve", options.run, "--engine", "vllm", "--python", options.python, "--port", server.url.rpartition(":")[2]]
                servers[kind] = (server, *start(command, {}, lambda name=log.name: "ready: " in Path(name).read_text(errors="replace"), log))
        ask = lambda name, some: asyncio.run(load(servers[name.split()[0]][0], name.split()[1], some, options.at_once, options.tokens))
        for name in measured:
            ask(name, warm)  # warms up kernels and the prefix cache's template part
        for turn in range(options.turns):
            some = texts[turn * options.requests : (turn + 1) * options.requests]
            for name in [*measured][turn % 3 :] + [*measured][: turn % 3]:
                measured[name].append({key: round(value, 4) for key, value in ask(name, some).items()})
                print(turn, name, measured[name][-1], flush=True)
    finally:
        for _, process, _ in servers.values():
            stop(process)
    medians = {name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in measured.items()}
    code = "from importlib.metadata import version; import json; print(json.dumps({f'serving {name}': version(name) for name in ('vllm', 'torch', 'transformers')}))"
    versions = json.loads(subprocess.run([options.python, "-c", code], capture_output=True, text=True, check=True).stdout)
    settings = {"requests": options.requests, "at_once": options.at_once, "tokens": options.tokens, "turns": options.turns, "model": recipe.model.name, "rank": recipe.lora.r, "eager": EAGER}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"serve-{detect_hardware().device}.json"
    path.write_text(json.dumps({"environment": describe_environment() | versions, "load_at_start": busy, "settings": settings, "start_s": {kind: round(seconds, 1) for kind, (_, _, seconds) in servers.items()}, "medians": medians, "turns": measured}, indent=2) + "\n")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()
