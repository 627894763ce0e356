"""What a script that imports medibuddy, and a packager, rely on."""

import configparser
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, environment


def in_python(code: str) -> str:
    "Run a line of Python in a fresh interpreter"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["medibuddy", "medibuddy.cli", "medibuddy.recipe", "medibuddy.run"])
def test_importing_loads_no_model_library(module):
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "unsloth", "numpy", "pandas", "matplotlib", "scipy", "sklearn"]
    loaded = in_python(f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_every_public_name_can_be_had():
    out = in_python("import medibuddy; print([getattr(medibuddy, name).__name__ for name in medibuddy.__all__ if name != '__version__'])")
    for name in ("Recipe", "load_examples", "load_model", "prepare", "train", "evaluate", "compare", "report", "verify"):
        assert name in out
    assert "AttributeError" in in_python("import medibuddy\ntry: medibuddy.trian\nexcept AttributeError as e: print(type(e).__name__)")


def test_the_version_is_one():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    version = settings["DEFAULT"]["version"]
    assert in_python("import medibuddy; print(medibuddy.__version__)").strip() == version
    assert re.search(rf"^## {re.escape(version)}", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_lock_pins_what_was_run_together():
    lock = dict(line.split(";")[0].strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert lock["torch"] == "2.10.0" and lock["trl"] == "1.14.2" and lock["nbdev"] == "2.4.14"
    assert not re.search(r"https?://", (ROOT / "constraints.txt").read_text())


def test_a_wheel_holds_everything_that_the_demo_needs(tmp_path):
    done = subprocess.run([sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--no-build-isolation", "--out-dir", str(tmp_path), str(ROOT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    # everything of the package that is in the repository is in the wheel
    tracked = subprocess.run(["git", "ls-files", "medibuddy"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert len(tracked) > 20
    assert [name for name in tracked if name not in names] == []


def test_nothing_in_the_project_may_run_remote_code_or_unpickle():
    files = [p for pattern in ("medibuddy/**/*.py", "nbs/**/*.ipynb", "benchmarks/**/*.py") for p in ROOT.glob(pattern)]
    assert files
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        assert not re.search(r"\bpickle\.loads?\(", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_notebooks_hold_no_machine_paths():
    for path in ROOT.glob("nbs/**/*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not re.search(r"/(home|root|Users|work)/\w", "".join(cell["source"]) + json.dumps(cell.get("outputs", []))), path
