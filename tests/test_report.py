"The report: every number in it comes from the run, nothing of a model's answer becomes part of the page."

import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from medibuddy.data.example import Example
from medibuddy.evaluation.extract import extract_decision
from medibuddy.evaluation.metrics import metrics
from medibuddy.evaluation.paired import compare_paired
from medibuddy.evaluation.report import NOTICE, choose_answers, collect, render_run, write_report
from medibuddy.recipe import Recipe
from medibuddy.run import Run, UsageError, write_atomic, write_json, write_jsonl

LABELS = ("yes", "no", "maybe")
HOSTILE = "<script>alert('x')</script> <img src=x onerror=alert(1)> | `code` ``` {{ 7 * 7 }} \u202e </p></main>"


def answer(example, decision, extra=""):
    text = f"Thinking.\n</think>\n\n{example.answer} {extra}" + (f"\n\nFinal decision: {decision}" if decision else "")
    read = extract_decision(text, LABELS, inside_reasoning=True).decision if example.decision else None
    return {"id": example.id, "prompt": f"{example.question}<think>\n", "text": text, "decision": read, "gold": example.decision, "stop_reason": "stop", "prompt_tokens": 9, "new_tokens": 12, "seconds": 0.1}


def make_run(folder, rows=90, graded=True, seed=0):
    rng = random.Random(seed)
    examples = [
        Example(id=f"row-{i}", question=f"Does drug {i} help? {HOSTILE if i == 3 else ''}", answer=f"Drug {i} was compared.", decision=rng.choice(LABELS) if graded else None, source="new-wording" if i % 3 == 0 else "seen", specialty="cardiology")
        for i in range(rows)
    ]
    base = [answer(e, rng.choice([*LABELS, None]) if graded else None, HOSTILE if i == 3 else "") for i, e in enumerate(examples)]
    tuned = [answer(e, e.decision if rng.random() < 0.8 else "no", "more") for e in examples]
    references = {example.id: example for example in examples}
    write_jsonl(folder / "data/test.jsonl", [example.to_dict() for example in examples])
    write_jsonl(folder / "generations/base.jsonl", base)
    write_jsonl(folder / "generations/tuned.jsonl", tuned)
    write_json(folder / "metrics.json", {"base": metrics(base, references=references), "tuned": metrics(tuned, references=references)})
    write_json(folder / "comparison.json", compare_paired(base, tuned, references))
    write_jsonl(folder / "log.jsonl", [{"step": s, "loss": 2 / s} for s in range(1, 20)] + [{"step": 19, "eval_loss": 0.5}])
    write_atomic(folder / "recipe.yaml", Recipe.load("tiny", learning_rate=0.002).to_yaml())  # a value of its own, whatever the preset says
    run = Run(folder)
    run.manifest |= {
        "stages": {"train": {"seconds": 61.5, "peak_memory_mb": 1300.2, "tokens": 200_000, "tokens_per_second": 3251.7}, "report": {"seconds": 98765}},
        "data": {"source": "pubmedqa", "path": "/home/somebody/secret/rows.json", "rows_in": 100, "rows_out": 95, "dropped": {"exact duplicate": 5}, "train": 5, "validation": 0, "test": rows, "leaks": 0},
        "environment": {"python": "3.11.9", "libraries": {"torch": "2.10.0"}},
        "base_model": {"name": "/home/somebody/models/base", "sha256": "ab" * 32},
    }
    run.record_files(["metrics.json", "comparison.json"])
    run.save()
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("report") / "run")
    write_report(folder)
    return folder


class Page(HTMLParser):
    "Collects what a browser would see"

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.stack, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br", "input", "link"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"unbalanced </{tag}>"

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(run_dir):
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_page_is_balanced_self_contained_and_says_not_for_care_twice(page, run_dir):
    assert page.stack == []
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert html.count(NOTICE) == 2 and (run_dir / "report.md").read_text(encoding="utf-8").count(NOTICE) == 2
    for tag, attributes in page.attributes:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:image/png;base64,") or name not in attributes
    assert not re.search(r"https?://|url\(|@import", html)


def test_what_a_model_says_cannot_become_part_of_the_page(page):
    assert page.tags.count("script") == 1  # our own
    assert not any("onerror" in attributes for _, attributes in page.attributes)
    assert "alert('x')" in "".join(page.text) and "{{ 7 * 7 }}" in "".join(page.text)


def test_figures_have_texts_and_exist_on_the_disk(page, run_dir):
    images = [attributes for tag, attributes in page.attributes if tag == "img"]
    assert len(images) == 4 and all(len(image["alt"]) > 20 for image in images)
    names = sorted(path.name for path in (run_dir / "figures").iterdir())
    assert names == ["accuracy.png", "confusion.png", "flips.png", "loss.png"]
    markdown = (run_dir / "report.md").read_text(encoding="utf-8")
    assert all(f"(figures/{name})" in markdown for name in names)


def test_headings_are_in_order(page):
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))


def test_numbers_are_those_of_the_run(page, run_dir):
    text = " ".join("".join(page.text).replace("\u00a0", " ").split())
    markdown = " ".join((run_dir / "report.md").read_text(encoding="utf-8").replace("\u00a0", " ").split())
    comparison = json.loads((run_dir / "comparison.json").read_text())
    scores = json.loads((run_dir / "metrics.json").read_text())
    wanted = [
        f"{100 * comparison['base']['accuracy']:.1f} %", f"{100 * comparison['tuned']['accuracy']:.1f} %", f"{100 * scores['tuned']['macro_f1']:.1f} %", comparison["verdict_text"],
        f"{comparison['base']['unparseable']} of {comparison['n']}", f"{comparison['flips']['gained']} questions were answered wrong before", "new-wording", "1 min 02 s", "200,000", "3,252",
        "Dropped: exact duplicate", "No training row stands in the test set", "Always answering", "learning_rate", "2.10.0", "0.002",
    ]
    for number in wanted:
        assert number in text, number
        assert number in markdown, number


def test_nothing_of_this_machine_or_moment(run_dir):
    for name in ("report.html", "report.md"):
        text = (run_dir / name).read_text(encoding="utf-8")
        assert "/home/" not in text and str(run_dir) not in text and "27 h 26 min" not in text
        assert "rows.json" in text


def test_same_files_same_bytes_even_when_moved(run_dir, tmp_path):
    moved = shutil.copytree(run_dir, tmp_path / "elsewhere with a space")
    for name, text in render_run(moved).items():
        same = text == (run_dir / name).read_text(encoding="utf-8")  # compared outside `assert`, which would spell out a long difference
        assert same, name
    before = {path.name: path.read_bytes() for path in (run_dir / "figures").iterdir()}
    write_report(moved)
    assert [name for name, png in before.items() if (moved / "figures" / name).read_bytes() != png] == []


@pytest.mark.parametrize("name, old, new", [
    ("comparison.json", '"gained": ', '"gained": 1'), ("metrics.json", '"token_f1": 0.', '"token_f1": 0.9'), ("recipe.yaml", "learning_rate: 0.002", "learning_rate: 0.003"),
])
def test_an_altered_number_changes_the_report(run_dir, tmp_path, name, old, new):
    copy = shutil.copytree(run_dir, tmp_path / "run")
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new, 1))
    unchanged = render_run(copy)["report.html"] == (run_dir / "report.html").read_text(encoding="utf-8")
    assert not unchanged


def test_answers_are_chosen_by_rule(run_dir):
    facts = collect(run_dir)
    chosen = choose_answers(facts["answers"])
    order = {"lost": 0, "gained": 1, "still wrong": 2, "still right": 2}
    kinds = [order[row["change"]] for row in chosen]
    assert len(chosen) == 10 and kinds == sorted(kinds)
    assert [row["id"] for row in choose_answers(facts["answers"][::-1])] == [row["id"] for row in chosen]
    lost = json.loads((run_dir / "comparison.json").read_text())["flips"]["lost"]
    assert kinds.count(0) == min(4, lost) or kinds.count(0) > 4


def test_markdown_survives_hostile_text(run_dir):
    fence = None
    for line in (run_dir / "report.md").read_text(encoding="utf-8").split("\n"):
        if fence is None and (opened := re.match(r"(`{3,})text$", line)):
            fence = opened[1]
        elif fence is not None:
            fence = None if line == fence else fence
        else:
            assert "<script>" not in line
    assert fence is None


def test_without_graded_rows_texts_take_their_place(tmp_path):
    folder = make_run(tmp_path / "run", graded=False)
    html = write_report(folder).read_text(encoding="utf-8")
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == ["loss", "token_f1"]
    assert "Token F1 with the reference" in html and "McNemar</dt>" not in html
    Page(html)


def test_a_bare_run_says_what_was_not_recorded(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("log.jsonl", "recipe.yaml"):
        (folder / name).unlink()
    write_json(folder / "manifest.json", {})
    html = write_report(folder).read_text(encoding="utf-8")
    assert "not recorded" in html and "figcaption>Loss" not in html
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == ["accuracy", "confusion", "flips"]


def test_stale_figures_are_removed(tmp_path):
    folder = make_run(tmp_path / "run", rows=40)
    write_atomic(folder / "figures" / "old.png", b"x")
    write_report(folder)
    assert not (folder / "figures" / "old.png").exists()


def test_not_compared_yet(tmp_path):
    folder = make_run(tmp_path / "run", rows=40)
    (folder / "comparison.json").unlink()
    with pytest.raises(UsageError, match="medibuddy compare"):
        write_report(folder)


MEASURED = """
import re, sys, time
from pathlib import Path
from medibuddy.evaluation.report import write_report
write_report(sys.argv[1])
# not ru_maxrss: Linux hands a parent's peak on to the program it starts
print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_ten_thousand_rows_within_thirty_seconds_and_a_gigabyte(tmp_path):
    folder = make_run(tmp_path / "run", rows=10_000)
    # a process of its own: what other tests left in memory is not the report's
    measured = subprocess.run([sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=True)
    seconds, kibibytes = map(float, measured.stdout.split())
    assert seconds < 30 and kibibytes < 1_000_000
    assert (folder / "report.html").exists()
