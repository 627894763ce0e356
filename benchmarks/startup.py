"""How long `import medibuddy` and `medibuddy --help` take, against a bare interpreter, interleaved.

python benchmarks/startup.py        prints the medians and writes benchmarks/results/startup.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from medibuddy.hardware import describe_environment

RESULTS = Path(__file__).parent / "results" / "startup.json"
COMMANDS = {
    "bare interpreter": [sys.executable, "-c", "pass"],
    "import medibuddy": [sys.executable, "-c", "import medibuddy"],
    "medibuddy --help": [str(Path(sys.executable).with_name("medibuddy")), "--help"],
}


def main() -> None:
    "Time each command in turn"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="runs of each command")
    repeats = parser.parse_args().repeats
    seconds = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first turn warms the caches
                seconds[name].append(round(time.perf_counter() - started, 4))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<18} median {median:.3f} s   (min {min(seconds[name]):.3f}, max {max(seconds[name]):.3f}, n = {repeats})")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": describe_environment(), "medians": medians, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
