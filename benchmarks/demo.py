"""What `medibuddy demo` takes from start to report, and what it reaches.

python benchmarks/demo.py [--repeats 3]     prints the medians and writes benchmarks/results/demo.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from medibuddy.hardware import describe_environment

RESULTS = Path(__file__).parent / "results" / "demo.json"


def run_once() -> dict:
    "One demo in a new folder: wall seconds, peak memory of the process, and its outcome"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "medibuddy", "demo", "--run", str(run), "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            raise SystemExit(f"the demo failed with status {os.waitstatus_to_exitcode(status)}")
        comparison, metrics, manifest = json.loads(output), json.loads((run / "metrics.json").read_text()), json.loads((run / "manifest.json").read_text())
    tuned, stages = metrics["tuned"], manifest["stages"]
    return {
        "seconds": round(seconds, 1), "peak_memory_mb": round(usage.ru_maxrss * 1024 / 1e6), "training_seconds": stages["train"]["seconds"], "training_tokens_per_second": stages["train"]["tokens_per_second"],
        "answer_seconds": round(stages["generate-base"]["seconds"] + stages["generate-tuned"]["seconds"], 1),
        "n": comparison["n"], "base_accuracy": comparison["base"]["accuracy"], "tuned_accuracy": comparison["tuned"]["accuracy"], "tuned_accuracy_ci": comparison["tuned"]["accuracy_ci"], "mcnemar_p": comparison["mcnemar_p"],
        "tuned_macro_f1": tuned["macro_f1"], "tuned_stop_rate": tuned["stop_rate"], "predicted": {label: scores["predicted"] for label, scores in tuned["per_class"].items()},
        "by_source": {source: {"n": s["n"], "accuracy": s["accuracy"]} for source, s in tuned["by_source"].items() if s["n"]},
    }


def main() -> None:
    "Repeat the demo and keep every run"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    runs = []
    for _ in range(parser.parse_args().repeats):
        runs.append(run_once())
        print(json.dumps(runs[-1]))
    medians = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "peak_memory_mb", "training_seconds", "answer_seconds")}
    print(json.dumps(medians))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": describe_environment(), "medians": medians, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
