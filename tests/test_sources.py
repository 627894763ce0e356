"""Reading rows of the published shapes from files of every kind, and saying plainly what is wrong with the others."""

import csv
import json
import random

import pytest
from real_rows import FILES, real_path

from medibuddy.data.example import Example
from medibuddy.data.files import iterate_rows, read_rows
from medibuddy.data.sources import OFFICIAL_TEST_IDS, load_examples, load_with_report, named_splits
from medibuddy.run import UsageError

HUB = {"pubid": 11, "question": "Is it safe?", "context": {"contexts": ["We looked.", "It was."], "labels": ["METHODS", "RESULTS"], "meshes": ["Humans"]}, "long_answer": "It is safe.", "final_decision": "yes"}
OFFICIAL = {"QUESTION": "Is it safe?", "CONTEXTS": ["We looked.", "It was."], "LABELS": ["METHODS", "RESULTS"], "MESHES": ["Humans"], "LONG_ANSWER": "It is safe.", "final_decision": "yes"}
EXPECTED = Example(id="pubmedqa-11", question="Is it safe?", context="METHODS: We looked.\nRESULTS: It was.", answer="It is safe.", decision="yes", source="pubmedqa")
O1 = {"Question": "What is gout?", "Complex_CoT": "Crystals in joints.", "Response": "A disease of the joints."}
HCM = {"instruction": "If you are a doctor", "input": "My toe hurts.", "output": "It may be gout."}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in row.items()} for row in rows)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_both_spellings_of_pubmedqa_give_the_same_example(tmp_path, suffix):
    assert load_examples("pubmedqa", write(tmp_path / f"hub{suffix}", [HUB])) == [EXPECTED]
    assert load_examples("pubmedqa", write(tmp_path / f"official{suffix}", [{"pmid": 11, **OFFICIAL}])) == [EXPECTED]


def test_the_official_file_is_keyed_by_pmid(tmp_path):
    path = tmp_path / "ori_pqal.json"
    path.write_text(json.dumps({"11": OFFICIAL}))
    assert load_examples("pubmedqa", path) == [EXPECTED]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("shape, row", [("medical-o1", O1), ("healthcaremagic", HCM)])
def test_other_shapes_in_every_format(tmp_path, suffix, shape, row):
    examples = load_examples(shape, write(tmp_path / f"rows{suffix}", [row]))
    assert len(examples) == 1 and examples[0].source == shape and examples[0].decision is None
    assert examples == load_examples(shape, write(tmp_path / "other.json", [row]))


def test_pandas_csv_with_numpy_arrays_inside_a_dictionary(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = write(tmp_path / "rows.parquet", [HUB] * 1)
    pandas.read_parquet(path).to_csv(tmp_path / "rows.csv", index=False)
    assert load_examples("pubmedqa", tmp_path / "rows.csv") == [EXPECTED]


def test_a_row_keeps_its_own_id_source_specialty_and_group(tmp_path):
    row = {**HCM, "id": "e-7", "source": "embedded-healthcaremagic", "specialty": "rheumatology", "group": "gout"}
    example = load_examples("healthcaremagic", write(tmp_path / "rows.jsonl", [row]))[0]
    assert (example.id, example.source, example.specialty, example.group) == ("e-7", "embedded-healthcaremagic", "rheumatology", "gout")


def test_ids_do_not_depend_on_order_or_neighbours(tmp_path):
    rows = [{**HCM, "input": f"My toe {n} hurts."} for n in range(40)]
    ids = {example.question: example.id for example in load_examples("healthcaremagic", write(tmp_path / "a.json", rows))}
    random.Random(1).shuffle(rows)
    assert all(ids[example.question] == example.id for example in load_examples("healthcaremagic", write(tmp_path / "b.jsonl", rows[:20])))


def test_byte_order_mark_and_unicode(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**HCM, "input": "Jeg har vondt i tåa – hva nå?"}, ensure_ascii=False).encode())
    assert load_examples("healthcaremagic", path)[0].question == "Jeg har vondt i tåa – hva nå?"


def test_malformed_rows_are_named_and_none_is_lost(tmp_path):
    rows = [O1, {**O1, "Question": ""}, {**O1, "Response": None}, {**O1, "Question": 5}, "text", {**O1, "Complex_CoT": ["a"]}, {**O1, "Question": "What is sepsis?"}, {"Question": "What else?", "Complex_CoT": "x"}]
    examples, dropped = load_with_report("medical-o1", write(tmp_path / "rows.jsonl", rows))
    assert len(examples) + len(dropped) == len(rows)
    assert [(row.id_or_row, row.reason) for row in dropped] == [
        ("line 2", "empty question"), ("line 3", "no response"), ("line 4", "question is not text"), ("line 5", "not an object"), ("line 6", "complex_cot is not text"), ("line 8", "no response"),
    ]


def test_a_dropped_row_shows_its_id(tmp_path):
    _, dropped = load_with_report("pubmedqa", write(tmp_path / "rows.json", [HUB, {**HUB, "pubid": 12, "question": None}]))
    assert dropped[0].id_or_row == "row 2 (id 12)"


def test_csv_rows_with_missing_or_surplus_fields(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("input,output\nMy toe hurts.,It may be gout.\nMy toe\nMy toe,is,red\n")
    examples, dropped = load_with_report("healthcaremagic", path)
    assert len(examples) == 1
    assert [(row.id_or_row, row.reason) for row in dropped] == [("line 3", "no output"), ("line 4", "more fields than the header has columns")]


def test_semicolons_and_quoted_newlines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('input;output\n"My toe\nhurts, badly.";It may be gout.\n')
    assert load_examples("healthcaremagic", path)[0].question == "My toe\nhurts, badly."


def test_an_open_quote_does_not_swallow_the_rest(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('input,output\nMy toe hurts.,"It may be gout.\nMy ear hurts.,It may be an infection.\n')
    with pytest.raises(UsageError, match="rows.csv: broken CSV in the record that starts at line 2"):
        load_examples("healthcaremagic", path)


def test_not_a_number_is_an_empty_cell(tmp_path):
    # pandas writes empty cells as NaN, into JSON too
    path = tmp_path / "rows.jsonl"
    path.write_text('{"Question": "What is gout?", "Complex_CoT": NaN, "Response": "A joint disease."}\n{"Question": NaN, "Complex_CoT": "a", "Response": "b b"}\n')
    examples, dropped = load_with_report("medical-o1", path)
    assert examples[0].reasoning is None and [row.reason for row in dropped] == ["no question"]


def test_limit_counts_examples_not_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**HCM, "input": ""}, *({**HCM, "input": f"Toe {n} hurts."} for n in range(5))])
    assert [example.question for example in load_examples("healthcaremagic", path, limit=2)] == ["Toe 0 hurts.", "Toe 1 hurts."]


# every message names the file, what was found there and what to do
BAD = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty (0 bytes)"),
    "blank": (b"\n\n", "nothing but blank lines"),
    "broken": (b'{"input": "a", "output": "b b"}\n{"input": "a" "output": "b"}\n', "broken JSON at line 2 (column 15)"),
    "cut": (b'[{"input": "a", "output": "b b"},\n {"input": "a", "out', "broken JSON at line 2"),
    "latin": ('{"input": "caf\u00e9", "output": "b b"}'.encode("latin-1"), "byte 14 (line 1) is 0xe9, which is not UTF-8"),
    "utf16": ('{"input": "a"}'.encode("utf-16"), "UTF-16"),
    "gzip": (b"\x1f\x8b\x08\x00....", "gzip"),
    "column": (b'{"input": "a", "ouput": "b b"}\n', "Did you mean `ouput`?"),
    "shape": (b'{"Question": "a", "Complex_CoT": "b", "Response": "c c"}\n', "fit the shape 'medical-o1'"),
    "nothing": (b'{"input": "", "output": "b b"}\n', "no usable row"),
    "list": (b"[]", "column"),
    "number": (b"[1, 2]", "column"),
    "scalar": (b"7", "expected a list of rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / f"{name}.{'json' if name in {'list', 'number', 'scalar', 'cut'} else 'jsonl'}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_examples("healthcaremagic", path)
    assert message in str(caught.value) and path.name in str(caught.value), str(caught.value)


def test_a_mistyped_name_gets_the_nearest_one(tmp_path):
    write(tmp_path / "chatdoctor.json", [HCM])
    with pytest.raises(UsageError, match="Did you mean `chatdoctor.json`"):
        load_examples("healthcaremagic", tmp_path / "chatdocter.json")
    with pytest.raises(UsageError, match="is a folder.*chatdoctor.json"):
        load_examples("healthcaremagic", tmp_path)


def test_unknown_shape_and_missing_path():
    with pytest.raises(UsageError, match="Did you mean `pubmedqa`"):
        load_examples("pubmed-qa", "rows.json")
    with pytest.raises(UsageError, match="--data FILE"):
        load_examples("pubmedqa")


@pytest.mark.parametrize("decision", ["perhaps", "yess", "1", "yes/no"])
def test_unknown_decision_names_the_row(tmp_path, decision):
    with pytest.raises(UsageError, match="row 2.*known are yes, no, maybe"):
        load_examples("pubmedqa", write(tmp_path / "rows.json", [HUB, {**HUB, "pubid": 12, "final_decision": decision}]))


def test_one_id_with_two_contents(tmp_path):
    with pytest.raises(UsageError, match="row 1 and row 3 have the same id 'pubmedqa-11'"):
        load_examples("pubmedqa", write(tmp_path / "rows.json", [HUB, {**HUB, "pubid": 12}, {**HUB, "question": "Is it dear?"}]))
    assert len(load_examples("pubmedqa", write(tmp_path / "same.json", [HUB, HUB]))) == 2


def test_suffix_that_contradicts_the_content(tmp_path):
    parquet = write(tmp_path / "rows.parquet", [HCM]).rename(tmp_path / "rows.csv")
    with pytest.raises(UsageError, match="Rename it to rows.parquet"):
        read_rows(parquet)
    lines = write(tmp_path / "rows.jsonl", [HCM, {**HCM, "input": "b"}]).rename(tmp_path / "rows.json")
    assert len(load_examples("healthcaremagic", lines)) == 2


def test_places_are_those_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert [place for place, _ in iterate_rows(path)] == ["line 2", "line 4"]


def test_official_test_ids(tmp_path):
    official = OFFICIAL_TEST_IDS.read_text().split()
    assert len(official) == len(set(official)) == 500 and all(pmid.isdigit() for pmid in official)
    complete = {pmid: {**OFFICIAL, "QUESTION": f"Is {pmid} safe?"} for pmid in [*official, *map(str, range(500))]}
    path = tmp_path / "ori_pqal.json"
    path.write_text(json.dumps(complete))
    assert len(named_splits("pubmedqa", path)["test"]) == 500
    del complete[official[3]]
    complete["500"] = OFFICIAL
    path.write_text(json.dumps(complete))
    with pytest.raises(UsageError, match="only 499 of its 500"):
        named_splits("pubmedqa", path)
    assert named_splits("medical-o1", path) is None


@pytest.mark.parametrize("shape, rows", [("pubmedqa", 250), ("medical-o1", 60), ("healthcaremagic", 500)])
def test_real_rows(shape, rows):
    examples, dropped = load_with_report(shape, real_path(shape))
    assert (len(examples), dropped) == (rows, [])
    assert len({example.id for example in examples}) == rows and FILES[shape]
    assert all(example.question and example.answer for example in examples)
    if shape == "pubmedqa":
        assert named_splits(shape, real_path(shape)) is None  # all 250 lie outside the official test set
        assert all(example.context and example.decision in {"yes", "no", "maybe"} for example in examples)
