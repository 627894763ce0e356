"""Runs for the tests of servers and GGUF files."""

import os
import shutil

from conftest import medibuddy

from medibuddy.run import Run, read_jsonl, write_jsonl


def make_tuned_run(path):
    "A run tuned long enough that it answers otherwise than its base model: a minute, or a copy of the finished run that MEDIBUDDY_TUNED_RUN names"
    if os.environ.get("MEDIBUDDY_TUNED_RUN"):
        shutil.copytree(os.environ["MEDIBUDDY_TUNED_RUN"], path, ignore=shutil.ignore_patterns("checkpoints"))
        return path
    settings = [part for setting in ("max_steps=120", "max_new_tokens=48", "max_seq_length=256", "perplexity=false") for part in ("--set", setting)]
    for command in (["train", "--run", path, *settings], ["evaluate", path], ["export", path, "--form", "merged"]):
        done = medibuddy(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    return path


def with_other_answers(run):
    "A short run as if tuning had changed its answers (four steps change none)"
    rows = read_jsonl(run / "generations/tuned.jsonl")
    write_jsonl(run / "generations/tuned.jsonl", [row | {"text": "Something else."} for row in rows])
    manifest = Run(run)
    manifest.record_files(["generations/tuned.jsonl"])
    manifest.save()
    return run
