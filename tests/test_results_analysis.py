"The results-analysis notebook runs as people run it: papermill, its parameters, one run and several."

import json
import shutil
from pathlib import Path

import papermill

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "recipes" / "results_analysis.ipynb"


def printed(notebook) -> str:
    "Everything that the cells show, as text"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") + json.dumps(output.get("data", {}).get("text/markdown", "")) for output in outputs)


def test_one_run_and_two_runs(finished_run, tmp_path):
    second = shutil.copytree(finished_run, tmp_path / "second")
    done = papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", {"runs": [str(finished_run), str(second)]}, progress_bar=False)
    text = printed(done)
    assert text.count(": verified,") >= 2 and "DOES NOT VERIFY" not in text and "p, adjusted for all pairs" in text and "Over 2 runs and" in text and "Every measure" in text
    assert any("image/png" in output.get("data", {}) for cell in done["cells"] for output in cell.get("outputs", []))


def test_ranking_and_pooling_refuse_what_cannot_be_compared(finished_run, tmp_path):
    import pytest

    from medibuddy.evaluation.runs import pool_runs, rank_runs
    from medibuddy.run import UsageError, read_json, read_jsonl, write_jsonl

    ranked = rank_runs([finished_run])[0]
    assert ranked["tuned"] == read_json(finished_run / "comparison.json")["tuned"]["accuracy"]
    other = shutil.copytree(finished_run, tmp_path / "other")
    for which in ("base", "tuned"):
        rows = read_jsonl(other / "generations" / f"{which}.jsonl")
        write_jsonl(other / "generations" / f"{which}.jsonl", [row | {"prompt": row["prompt"] + " "} for row in rows])
    with pytest.raises(UsageError, match="did not ask the same questions"):
        pool_runs([finished_run, other])
    with pytest.raises(UsageError, match="at least two"):
        pool_runs([finished_run])
