"""Every check, as `make test` and CI run them; the last line is `N passed, N failed`.

python .ci/check.py            all
python .ci/check.py clean ...  only the named: clean, export, lint, readme, ruff, notebooks, pytest
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# Two notebooks or tests at a time on two cores: one thread each, or torch's threads fight over them
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0",
}
WORKERS = max(1, min(4, os.cpu_count() or 1))


def run(*command: str) -> tuple[bool, str]:
    "Run a command in the project's folder"
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode == 0, done.stdout


def snapshot() -> dict[Path, bytes]:
    "Contents of notebooks and package code"
    files = [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("medibuddy/**/*.py")]
    return {file: file.read_bytes() for file in files if ".ipynb_checkpoints" not in file.parts}


def changes_nothing(*command: str) -> tuple[bool, str]:
    "Run a command that must leave notebooks and package as they are (they are put back when it does not)"
    before = snapshot()
    ok, output = run(*command)
    after = snapshot()
    changed = sorted(str(f.relative_to(ROOT)) for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    for file, content in before.items():
        if after.get(file) != content:
            file.write_bytes(content)
    for file in after.keys() - before.keys():
        file.unlink()
    return ok and not changed, output + (f"{command[0].name} changes {', '.join(changed)}; run it and commit the result" if changed else "")


def test_notebook(path: Path) -> tuple[str, bool, str, float]:
    "Run one notebook's cells"
    started = time.perf_counter()
    ok, output = run(BIN / "nbdev_test", "--path", path, "--n_workers", "1")
    return str(path.relative_to(ROOT)), ok, output, time.perf_counter() - started


def notebooks() -> list[tuple[str, bool, str, float]]:
    "Run all notebooks that are not in a folder marked .notest"
    paths = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and not p.name.startswith("_")]
    paths = [p for p in paths if not any((folder / ".notest").exists() for folder in p.parents)]
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(test_notebook, paths))


def pytest() -> tuple[int, int, int, str]:
    "Run pytest and count from its own record"
    with TemporaryDirectory() as folder:
        record = Path(folder) / "pytest.xml"
        ok, output = run(sys.executable, "-m", "pytest", "-q", "--numprocesses", WORKERS, "--dist", "loadfile", "--durations=10", f"--junitxml={record}", "tests")
        if not record.exists():
            return 0, 1, 0, output
        suite = ET.parse(record).getroot().find("testsuite")
        total, failed, skipped = (int(suite.get(key)) for key in ("tests", "failures", "skipped"))
        failed += int(suite.get("errors"))
        if not ok and not failed:
            failed = 1  # pytest itself failed, or ran no test
        return total - failed - skipped, failed, skipped, output


def main() -> int:
    "Run the checks and print the count"
    chosen, started, passed, failed, skipped = set(sys.argv[1:]), time.perf_counter(), 0, 0, 0
    single = {
        "clean": lambda: changes_nothing(BIN / "nbdev_clean"),
        "export": lambda: changes_nothing(BIN / "nbdev_export"),
        "lint": lambda: run(sys.executable, ".ci/lint_notebooks.py"),
        "readme": lambda: run(sys.executable, ".ci/readme.py", "--check"),
        "ruff": lambda: run(sys.executable, "-m", "ruff", "check", "."),
    }
    results = [(name, *check(), 0.0) for name, check in single.items() if not chosen or name in chosen]
    results += notebooks() if not chosen or "notebooks" in chosen else []
    for name, ok, output, seconds in results:
        print(f"{'ok  ' if ok else 'FAIL'} {name}{f' ({seconds:.0f} s)' if seconds else ''}" + ("" if ok else f"\n{output[-6000:]}"), flush=True)
        passed, failed = passed + ok, failed + (not ok)
    if not chosen or "pytest" in chosen:
        more, broken, skipped, output = pytest()
        print(output[-12000:])
        passed, failed = passed + more, failed + broken
    print(f"{time.perf_counter() - started:.0f} s")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
