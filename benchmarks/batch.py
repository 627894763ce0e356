"""What runs of one batch save by sharing finished stages: the same runs in one batch, and each in a batch of its own.

python benchmarks/batch.py [--runs 3] [--max-steps 20]    prints both times and writes benchmarks/results/batch.json
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from medibuddy.hardware import describe_environment

RESULTS = Path(__file__).parent / "results" / "batch.json"
NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "recipes" / "quickstart.ipynb"


def run_batch(folder: Path, rates: list[float], max_steps: int) -> dict:
    "Run the quickstart notebook at some learning rates, one run at a time; seconds and the report's runs"
    folder.mkdir()
    (folder / "plan.yaml").write_text(f"notebooks: [{json.dumps(str(NOTEBOOK))}]\nparameters: {{recipe: tiny, max_steps: {max_steps}, learning_rate: {rates}}}\n")
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "medibuddy", "batch", str(folder / "plan.yaml"), "--folder", str(folder / "batch"), "--jobs", "1", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": round(time.perf_counter() - started, 2), "runs": json.loads(done.stdout)["runs"]}


def scores(found: dict) -> dict:
    "Rate -> what the run ended with"
    return {run["parameters"]["learning_rate"]: (run["tuned"], run["difference"], run["p"], run["validation_loss"]) for run in found["runs"]}


def main() -> None:
    "Run both ways, and refuse a result that differs"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="learning rates")
    parser.add_argument("--max-steps", type=int, default=20, help="of each run's training")
    arguments = parser.parse_args()
    rates = [round(0.001 * (number + 1), 3) for number in range(arguments.runs)]
    with TemporaryDirectory() as work:
        together = run_batch(Path(work) / "together", rates, arguments.max_steps)
        alone = [run_batch(Path(work) / f"alone{rate}", [rate], arguments.max_steps) for rate in rates]
    if scores(together) != {rate: score for found in alone for rate, score in scores(found).items()}:
        raise SystemExit(f"the runs ended with other scores when they shared stages: {scores(together)} against {[scores(found) for found in alone]}")
    facts = {
        "runs": len(rates), "max_steps": arguments.max_steps, "seconds_in_one_batch": together["seconds"], "seconds_each_alone": [found["seconds"] for found in alone],
        "stages_taken_over": sum(run["taken_over"] for run in together["runs"]), "seconds_of_those_stages": round(sum(run["taken_over_seconds"] for run in together["runs"]), 1),
    }
    print(f"{len(rates)} runs: {together['seconds']:.0f} s in one batch, {sum(facts['seconds_each_alone']):.0f} s each alone; {facts['stages_taken_over']} stages taken over, worth {facts['seconds_of_those_stages']:.0f} s; the same scores")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": describe_environment(), **facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
