"""Whatever is typed wrongly ends with status 2 and one message that names it; nothing else is touched."""

import json
import os

import pytest
from conftest import pubmedqa_rows


def train(call, data, run, *more, shape="pubmedqa"):
    "Train on a file; the run must end before anything is loaded"
    return call("train", "--data", data, "--shape", shape, "--run", run, *more)


def one_message(err):
    "The message: a single error, no traceback"
    assert err.count("error: ") == 1 and "Traceback" not in err, err
    return err[err.index("error: ") :]


FILES = {
    "empty.json": ("", ["empty.json", "empty"]),
    "no rows.json": ("[]", ["no rows.json"]),
    "broken.json": ('[{"question": "a"},\n {"question": "b",,}]', ["broken.json", "line 2"]),
    "broken.jsonl": ('{"question": "a"}\n{"question": \n', ["broken.jsonl", "line 2"]),
    "other.csv": ("quesion,context,long_answer,final_decision\na,b,c,yes\n", ["other.csv", "question", "quesion"]),
    "decision.json": (json.dumps([{**row, "final_decision": "perhaps"} for row in pubmedqa_rows()]), ["decision.json", "perhaps"]),
    "latin.json": (b'[{"question": "caf\xe9"}]', ["latin.json", "UTF-8"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(call, tmp_path, name):
    content, words = FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = train(call, path, tmp_path / "run")
    assert status == 2
    message = one_message(err)
    assert all(word in message for word in words), message


def test_a_missing_file_offers_the_nearest(call, tmp_path, rows_file):
    status, _, err = train(call, tmp_path / "row.json", tmp_path / "run")
    assert status == 2 and "row.json" in err and "rows.json" in one_message(err)


def test_the_corrected_command_may_use_the_same_folder(call, tmp_path, rows_file):
    assert train(call, tmp_path / "row.json", tmp_path / "run")[0] == 2
    status, _, err = call("prepare", "--data", rows_file, "--shape", "pubmedqa", "--run", tmp_path / "run", "--set", "test_fraction=0.3")
    assert status == 0, err
    assert str(rows_file) in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
    status, _, err = train(call, tmp_path / "row.json", tmp_path / "run")  # now it holds rows
    assert status == 2 and "belongs to another recipe" in one_message(err)


def test_the_wrong_shape_suggests_the_right_one(call, tmp_path, rows_file):
    status, _, err = train(call, rows_file, tmp_path / "run", shape="healthcaremagic")
    assert status == 2 and "pubmedqa" in one_message(err)
    status, _, err = train(call, rows_file, tmp_path / "run", shape="pubmedqaa")
    assert status == 2 and "pubmedqa" in one_message(err)


def test_a_file_without_its_shape_says_so(call, tmp_path, rows_file):
    status, _, err = call("train", "--data", rows_file, "--run", tmp_path / "run")
    assert status == 2 and "--shape" in one_message(err)


@pytest.mark.parametrize("setting, words", [
    ("learning_rat=1", ["learning_rat", "Did you mean `learning_rate`?"]),
    ("lora.seed=1", ["lora.seed"]),
    ("r=0", ["lora.r", "0", "at least 1"]),
    ("epochs=many", ["train.epochs", "many", "a number"]),
    ("max_new_tokens=1000000", ["max_new_tokens"]),
    ("learning_rate", ["key=value"]),
    ("targets=q_prj", ["q_prj", "q_proj"]),
])
def test_a_wrong_recipe_value_is_named(call, tmp_path, rows_file, setting, words):
    status, _, err = train(call, rows_file, tmp_path / "run", "--set", "max_steps=1", "--set", "test_fraction=0.3", "--set", setting)
    assert status == 2
    message = one_message(err)
    assert all(word in message for word in words), message


def test_an_unknown_recipe_offers_the_nearest(call, tmp_path, rows_file):
    status, _, err = train(call, rows_file, tmp_path / "run", "--recipe", "tinny")
    assert status == 2 and "Did you mean `tiny`?" in one_message(err)


def test_a_run_of_another_recipe_is_left_alone(call, finished_run):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file() and p.name != ".lock"}
    status, _, err = call("train", "--run", finished_run)
    assert status == 2 and "belongs to another recipe" in one_message(err) and "data.source" in err
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_folder_of_other_files_is_left_alone(call, tmp_path, rows_file):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    status, _, err = train(call, rows_file, tmp_path / "thesis")
    assert status == 2 and "chapter.txt" in one_message(err)


def test_an_unwritable_place_is_named(call, tmp_path, rows_file):
    (tmp_path / "file").write_text("x")
    status, _, err = train(call, rows_file, tmp_path / "file" / "run")
    assert status == 2 and "Choose a folder you can write to" in one_message(err)
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        status, _, err = train(call, rows_file, tmp_path / "locked" / "run")
        assert status == 2 and "Permission denied" in one_message(err)


@pytest.mark.parametrize("command", ["evaluate", "compare", "report", "verify"])
def test_a_path_that_is_no_run_is_named(call, tmp_path, command):
    status, _, err = call(command, tmp_path / "nowhere")
    assert status == 2 and "nowhere does not exist" in one_message(err)
    assert not (tmp_path / "nowhere").exists()
    status, _, err = call(command, tmp_path)
    assert status == 2 and "no manifest.json" in one_message(err)
    status, _, err = call(command)
    assert status == 2 and "give the run directory once" in one_message(err)


def test_stages_out_of_order_say_which_comes_first(call, tmp_path, rows_file):
    status, _, err = call("prepare", "--data", rows_file, "--shape", "pubmedqa", "--run", tmp_path / "run", "--set", "test_fraction=0.3")
    assert status == 0, err
    for command in ("evaluate", "compare", "report"):
        status, _, err = call(command, tmp_path / "run")
        assert status == 2 and "no stage has written yet" in one_message(err), command


def test_errors_are_json_for_scripts(call, tmp_path):
    status, out, _ = call("verify", tmp_path / "nowhere", "--json")
    assert status == 2
    answer = json.loads(out)
    assert answer["exit_status"] == 2 and "does not exist" in answer["error"]


def test_a_leak_stops_the_run_and_can_be_taken_out(call, tmp_path):
    rows = pubmedqa_rows()
    rows += [{**row, "pubid": row["pubid"] + "-copy", "question": row["question"] + " "} for row in rows]
    for row in rows:  # long enough to identify: a leak is the same text, not the same template
        row["context"] = {"contexts": [row["context"]["contexts"][0] + f" The leaflet of {row['pubid'].split('-')[0]} was last printed in spring and is kept in the drawer of ward seven beside the scales."], "labels": ["LEAFLET"], "meshes": []}
        row["group"] = row["pubid"]  # claims that the copies are unrelated, so that the split may part them
        row["long_answer"] += f" See {row['pubid']}."
    path = tmp_path / "leaky.json"
    path.write_text(json.dumps(rows))
    options = ["--data", path, "--shape", "pubmedqa", "--set", "test_fraction=0.3"]
    status, _, err = call("prepare", *options, "--run", tmp_path / "run")
    assert status == 2 and "--drop-leaks" in one_message(err) and "in training ~" in err
    status, out, err = call("prepare", *options, "--drop-leaks", "--json", "--run", tmp_path / "other")
    assert status == 0, err
    account = json.loads(out)
    assert account["leaks"] > 0 and account["rows_in"] == account["rows_out"] + sum(account["dropped"].values())
