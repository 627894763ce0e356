"""lm-evaluation-harness: a run's rows as its task, its results in the report.

The test with the real one runs where it is installed: `pip install 'lm_eval[hf]' && pytest tests/test_harness.py` (seen with 0.4.13), or with MEDIBUDDY_LM_EVAL set to an interpreter that has it.
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec

import pytest
import yaml

from medibuddy import flow
from medibuddy.evaluation.harness import TASK, export_task, harness_command, import_results, run_harness
from medibuddy.models.loaders import EMBEDDED_MODEL
from medibuddy.recipe import Recipe
from medibuddy.run import Run, UsageError, read_jsonl
from medibuddy.verification import verify

PYTHON = os.environ.get("MEDIBUDDY_LM_EVAL") or sys.executable  # an interpreter with lm_eval, which medibuddy does not install
RESULTS = {"lm_eval_version": "0.4.13", "results": {"pubmedqa": {"alias": "pubmedqa", "acc,none": 0.515625, "acc_stderr,none": 0.0223}}, "n-samples": {"pubmedqa": {"original": 500, "effective": 500}}}


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_the_task_asks_what_the_run_asked(run, tmp_path):
    path = export_task(run, tmp_path / "task")
    task, rows = yaml.safe_load(path.read_text(encoding="utf-8")), read_jsonl(tmp_path / "task" / f"{TASK}.jsonl")
    asked = {row["id"]: row for row in read_jsonl(run / "generations" / "base.jsonl")}
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "task" / f"{TASK}.jsonl") and {row["id"] for row in rows} == set(asked)
    for row in rows:
        assert row["prompt"].startswith(asked[row["id"]]["prompt"]) and row["prompt"].endswith("Final decision:")
        assert row["choices"][row["gold"]] == asked[row["id"]]["gold"]


def test_results_stand_in_the_report_and_an_altered_number_is_found(run, tmp_path):
    (tmp_path / "results_1.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    import_results(run, "base", tmp_path / "results_1.json")
    import_results(run, "tuned", tmp_path / "results_1.json")
    flow.report(run)
    assert "0.5156 ± 0.0223" in (run / "report.html").read_text(encoding="utf-8") and "lm-evaluation-harness 0.4.13" in (run / "report.md").read_text(encoding="utf-8")
    assert verify(run).ok
    (run / "harness.json").write_text((run / "harness.json").read_text(encoding="utf-8").replace("0.515625", "0.815625"), encoding="utf-8")
    assert any("harness.json" in str(problem) for problem in verify(run).problems)


def test_a_file_without_results_and_a_missing_harness_are_said(run, tmp_path, call):
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="results_"):
        import_results(run, "base", tmp_path / "other.json")
    status, _, message = call("harness", run, "--python", "/bin/false")
    assert status == 2 and "has no lm_eval" in message


def test_the_tuned_model_is_the_same_base_with_the_adapter(run):
    settings = []
    for which in ("base", "tuned"):
        words = harness_command(Run(run), Recipe.load(run / "recipe.yaml"), which, [TASK], run / "harness", "python")
        settings.append(words[words.index("--model_args") + 1].split(","))
    assert settings[1] == [*settings[0], f"peft={run.resolve() / 'adapter'}"] and f"pretrained={EMBEDDED_MODEL}" in settings[0]


@pytest.mark.skipif(PYTHON == sys.executable and find_spec("lm_eval") is None, reason="lm_eval is not installed here; MEDIBUDDY_LM_EVAL may name an interpreter that has it")
def test_the_real_harness_decides_as_the_choices_do(run):
    from medibuddy.data.chat import EncodedPrompt
    from medibuddy.data.example import Example
    from medibuddy.evaluation.calibration import calibration
    from medibuddy.evaluation.choices import add_choices
    from medibuddy.models.loaders import load_adapter, load_base, load_tokenizer

    found = run_harness(run, python=PYTHON)
    examples = [Example.from_dict(row) for row in read_jsonl(run / "data" / "test.jsonl")]
    for which in ("base", "tuned"):
        rows = read_jsonl(run / "generations" / f"{which}.jsonl")
        model = load_base("embedded") if which == "base" else load_adapter(load_base("embedded"), run / "adapter")
        scored = add_choices(rows, model, load_tokenizer("embedded"), examples, [EncodedPrompt(row["prompt"], [], 0, row["id"]) for row in rows])
        assert found[which]["tasks"][TASK]["acc"]["value"] == pytest.approx(calibration(scored)["accuracy"])
    flow.report(run)
    assert verify(run).ok
