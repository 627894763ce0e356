"""The same flow on text that nobody here wrote, in each of the three published shapes."""

import json

import pytest
from conftest import REAL_ROWS, medibuddy

pytestmark = pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"no published rows beside the project ({REAL_ROWS.name})")

# at the 1,024 tokens of `tiny` more than half of the reasoning rows would be left out as too long (and counted)
OPTIONS = ["--set", "max_steps=2", "--set", "batch_size=4", "--set", "max_seq_length=2048", "--set", "max_new_tokens=16", "--set", "eval_batch_size=32"]


@pytest.mark.parametrize("file, shape, rows, graded", [
    ("pubmedqa_pqal_250.json", "pubmedqa", 250, True),
    ("medical_o1_60.json", "medical-o1", 60, False),
    ("chatdoctor_500.json", "healthcaremagic", 500, False),
])
def test_real_rows_go_from_file_to_report(tmp_path, file, shape, rows, graded):
    run = tmp_path / "run"
    done = medibuddy("train", "--data", REAL_ROWS / file, "--shape", shape, "--recipe", "tiny", "--run", run, *OPTIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    account = json.loads((run / "manifest.json").read_text())["data"]
    assert account["rows_in"] == rows
    assert account["rows_in"] == account["train"] + account["validation"] + account["test"] + sum(account["dropped"].values())
    assert account["train"] > 0.6 * rows
    for command in ("evaluate", "compare", "report", "verify"):
        done = medibuddy(command, run)
        assert done.returncode == 0, done.stderr[-3000:]
    comparison = json.loads((run / "comparison.json").read_text())
    assert (comparison["n"] > 0) == graded
    # two steps teach nothing: the report must not claim an improvement in decisions
    if graded:
        assert comparison["verdict"] in ("no difference shown", "too few questions to tell", "worse")
    assert comparison["verdict"] in (run / "report.md").read_text().lower()
