"""A run tuned long enough that it answers otherwise than its base model, for the tests of servers and GGUF files."""

from conftest import medibuddy


def make_tuned_run(path):
    "Train, evaluate and export the merged model: half a minute"
    settings = [part for setting in ("max_steps=120", "limit=900", "max_new_tokens=48", "max_seq_length=256", "perplexity=false") for part in ("--set", setting)]
    for command in (["train", "--run", path, *settings], ["evaluate", path], ["export", path, "--form", "merged"]):
        done = medibuddy(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    return path
