"""Change one byte anywhere and `verify` names the file; mend the hashes and it is still found."""

import json
import random
import shutil

import pytest

from medibuddy.run import Run, read_json, read_jsonl, write_json, write_jsonl
from medibuddy.verification import verify


@pytest.fixture
def run(finished_run, tmp_path):
    "A copy of a finished run"
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def mend(run, *names):
    "Bring the manifest's hashes up to date, as a careful forger would"
    manifest = Run(run)
    manifest.record_files(names)
    manifest.save()


def files_named(run):
    "Files that verify finds fault with"
    return {problem.file for problem in verify(run).problems}


def test_an_untouched_run_verifies(run, call):
    outcome = verify(run)
    assert outcome.ok and outcome.files > 20 and outcome.numbers > 50
    status, out, _ = call("verify", run)
    assert status == 0 and "files match their hashes" in out


def test_one_changed_byte_in_any_file_is_named(run):
    rng = random.Random(7)
    names = [*read_json(run / "manifest.json")["files"], "manifest.json"]
    assert {"recipe.yaml", "log.jsonl", "metrics.json", "comparison.json", "report.md", "report.html", "data/test.jsonl", "generations/base.jsonl", "adapter/adapter_model.safetensors"} <= set(names)
    for name in names:
        content = (run / name).read_bytes()
        if not content:  # no row was left out: nothing to change
            continue
        place = rng.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        (run / name).write_bytes(changed)
        assert name in files_named(run), f"byte {place} of {name}"
        (run / name).write_bytes(content)
    assert verify(run).ok


def test_a_missing_file_is_named_with_exit_status_one(run, call):
    (run / "figures" / "loss.png").unlink()
    status, out, _ = call("verify", run)
    assert status == 1 and "figures/loss.png: is missing" in out


@pytest.mark.parametrize("name", ["metrics.json", "comparison.json"])
def test_an_altered_number_is_found_behind_mended_hashes(run, name):
    original = read_json(run / name)

    def places(value, path=()):
        if isinstance(value, dict):
            return [p for key, item in value.items() for p in places(item, (*path, key))]
        if isinstance(value, list):
            return [p for i, item in enumerate(value) for p in places(item, (*path, i))]
        return [path] if isinstance(value, (int, float)) and not isinstance(value, bool) else []

    found = places(original)
    assert len(found) > 20
    for path in random.Random(7).sample(found, 12):
        forged = json.loads(json.dumps(original))
        target = forged
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] += 1
        write_json(run / name, forged)
        mend(run, name)
        assert name in files_named(run), path


def test_a_decision_that_the_text_does_not_say_is_found(run):
    rows = read_jsonl(run / "generations" / "tuned.jsonl")
    for row in rows:
        row["decision"] = row["gold"]
    write_jsonl(run / "generations" / "tuned.jsonl", rows)
    mend(run, "generations/tuned.jsonl")
    assert "generations/tuned.jsonl" in files_named(run)


def test_an_answer_to_another_prompt_is_found(run):
    rows = read_jsonl(run / "generations" / "base.jsonl")
    rows[0]["prompt"] += " "
    write_jsonl(run / "generations" / "base.jsonl", rows)
    mend(run, "generations/base.jsonl")
    assert "generations/base.jsonl" in files_named(run)


def test_a_test_row_copied_into_the_training_rows_is_found(run):
    train, test = (read_jsonl(run / "data" / f"{name}.jsonl") for name in ("train", "test"))
    train[0] = test[0]
    write_jsonl(run / "data" / "train.jsonl", train)
    mend(run, "data/train.jsonl")
    assert any("stands in the train rows too" in problem.what for problem in verify(run).problems)


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_an_altered_report_is_found_behind_mended_hashes(run, name):
    text = (run / name).read_text(encoding="utf-8")
    n = read_json(run / "comparison.json")["n"]
    assert str(n) in text
    (run / name).write_text(text.replace(str(n), str(n + 400), 1), encoding="utf-8")
    mend(run, name)
    assert name in files_named(run)


def test_the_stages_refuse_to_build_on_an_altered_file(run, call):
    rows = read_jsonl(run / "data" / "test.jsonl")
    write_jsonl(run / "data" / "test.jsonl", rows[1:])
    status, _, err = call("compare", run)
    assert status == 1 and "data/test.jsonl changed since it was written" in err


def test_without_the_text_libraries_the_rest_is_still_recomputed(run, monkeypatch):
    from medibuddy.evaluation import texts

    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    outcome = verify(run)
    assert outcome.ok, outcome.problems
    assert any("rougeL" in note and "could not be recomputed" in note for note in outcome.notes)
    metrics = read_json(run / "metrics.json")
    metrics["tuned"]["texts"]["token_f1"] += 0.1
    write_json(run / "metrics.json", metrics)
    mend(run, "metrics.json")
    assert "metrics.json" in files_named(run)


@pytest.mark.parametrize(("name", "keys"), [("metrics.json", ("tuned", "texts", "bleu")), ("metrics.json", ("base", "errors", "truncated")), ("metrics.json", ("base", "perplexity", "value")), ("comparison.json", ("measures", "rougeL", "p_holm"))])
def test_an_altered_new_number_is_found_behind_mended_hashes(run, name, keys):
    content = read_json(run / name)
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] += 1
    write_json(run / name, content)
    mend(run, name)
    assert name in files_named(run)
