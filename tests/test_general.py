"General skill: lost skill shows in the run's files and its report, and an altered answer is found."

import json

import pytest
from conftest import pubmedqa_rows

from medibuddy import flow
from medibuddy.evaluation.general import compare_general, general_tasks, passes
from medibuddy.recipe import Recipe
from medibuddy.run import Run, read_json, read_jsonl, write_jsonl
from medibuddy.verification import verify

TASKS = general_tasks()
# for each task an answer that does it, in the words of a model that does
DONE = {
    "lines": {"3": "Apple\nPear\nPlum", "5": "- Dog\n- Cat\n- Cow\n- Hen\n- Pig"}, "json list": {"2": '["Nile", "Rhine"]'}, "json keys": {"name age": '{"name": "Ada", "age": 36}'}, "words at most": {"10": "Wide, blue and salty."},
    "sentences at most": {"1": "Air scatters blue light more than red."}, "ends with": {"?": "Do dogs dream?", "!": "I love tea!"}, "begins with": {"Tonight": "Tonight the moon is full."},
    "capitals": {"ROME": "ROME"}, "small letters": {"madrid": "madrid"},
}


def row(task, text, stop_reason="stop"):
    return {"id": task.id, "prompt": "?", "text": text, "stop_reason": stop_reason}


def done(task):
    return DONE[task.check][task.want] if task.check in DONE else task.want.split("|")[0] if task.check == "exactly" else f"It is {task.want.split('|')[0]}."


def test_every_task_can_be_done_and_a_doctors_answer_does_none():
    for task in TASKS:
        assert passes(task, row(task, done(task))), task
        assert passes(task, row(task, f"<think>\nEasy.\n</think>\n\n{done(task)}")), task
        for text in ("", "Hello, thanks for your question. Please see a doctor, and take paracetamol twice a day. Do rest well. Regards.", "<think>\nIt is " + done(task)):
            assert not passes(task, row(task, text)), (task, text)
        assert not passes(task, row(task, done(task), "length"))


@pytest.mark.parametrize(("number", "wrong"), [(13, "It is 560."), (19, "9.11 is larger."), (16, "It is 450."), (0, "Parisian"), (13, " ".join(str(i) for i in range(80)))])
def test_a_near_miss_is_a_miss(number, wrong):
    assert not passes(TASKS[number], row(TASKS[number], wrong))


def test_lost_skill_is_counted_by_task():
    base, tuned = [row(task, done(task)) for task in TASKS], [row(task, done(task) if number % 3 else "Hello, thanks for your question. Please see a doctor, and take paracetamol twice a day.") for number, task in enumerate(TASKS)]
    found = compare_general(base, tuned)
    assert (found["base"], found["tuned"], found["gained"]) == (60, 40, []) and found["lost"] == sorted(task.id for number, task in enumerate(TASKS) if not number % 3)
    assert found["mcnemar_p"] == pytest.approx(2 * 0.5**20)


def test_a_run_with_general_tasks_tells_and_verifies(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    recipe = Recipe.load("tiny", path=str(tmp_path / "rows.json"), source="pubmedqa", max_steps=1, test_fraction=0.3, max_new_tokens=6, eval_batch_size=64, general=True, perplexity=False)
    run = tmp_path / "run"
    flow.train(recipe, run)
    for stage in (flow.evaluate, flow.compare, flow.report):
        stage(run)
    found = read_json(run / "general.json")
    assert found["n"] == 60 and "General skill" in (run / "report.md").read_text(encoding="utf-8") and verify(run).ok
    rows = read_jsonl(run / "generations" / "general-tuned.jsonl")
    write_jsonl(run / "generations" / "general-tuned.jsonl", [row | {"text": f"\n</think>\n\n{done(task)}", "stop_reason": "stop"} for row, task in zip(rows, TASKS, strict=True)])
    manifest = Run(run)
    manifest.record_files(["generations/general-tuned.jsonl"])
    manifest.save()
    assert any("general.json" in str(problem) for problem in verify(run).problems)
