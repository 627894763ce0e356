"""The PHI gate on a labelled synthetic set (fixtures/phi.jsonl) and on real rows."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_rows import real_path

from medibuddy.data.phi import find_phi, scrub_phi
from medibuddy.data.sources import load_examples

FIXTURES = Path(__file__).parent / "fixtures"
ROWS = [json.loads(line) for line in (FIXTURES / "phi.jsonl").read_text(encoding="utf-8").splitlines()]


def measured():
    "Labelled, found and missed pieces by kind; a piece is found when all of it is replaced"
    labelled, found, missed, lost = Counter(), Counter(), [], []
    for row in ROWS:
        spans = find_phi(row["text"])
        for start, end, kind in row["spans"]:
            piece = row["text"][start:end]
            covered = {place for span in spans for place in range(span.start, span.end)}
            inside = [place for place in range(start, end) if row["text"][place].isalnum()]
            labelled[kind] += 1
            if kind == "KEEP":
                if any(place in covered for place in inside):
                    lost.append((piece, row["text"]))
            elif all(place in covered for place in inside):
                found[kind] += 1
            else:
                missed.append((kind, piece, row["text"]))
    return labelled, found, missed, lost


def test_the_set_is_large_and_reproducible(tmp_path, monkeypatch):
    assert len(ROWS) >= 500
    labelled = measured()[0]
    assert min(labelled[kind] for kind in ("NAME", "DATE", "PHONE", "EMAIL", "ADDRESS", "RECORD")) >= 100, labelled
    monkeypatch.syspath_prepend(FIXTURES)
    import make_phi

    again = [json.loads(json.dumps(make_phi.message())) for _ in range(20)]
    assert again == ROWS[:20]
    sys.modules.pop("make_phi")


def test_recall_and_clinical_numbers():
    labelled, found, missed, lost = measured()
    structured = [kind for kind in labelled if kind not in ("NAME", "KEEP")]
    recall = sum(found[kind] for kind in structured) / sum(labelled[kind] for kind in structured)
    assert recall >= 0.99, (recall, [row for row in missed if row[0] != "NAME"][:10])
    assert found["NAME"] / labelled["NAME"] >= 0.95, (found["NAME"] / labelled["NAME"], [row for row in missed if row[0] == "NAME"][:10])
    assert len(lost) / labelled["KEEP"] <= 0.005, (len(lost) / labelled["KEEP"], lost[:10])


def test_kinds_are_right():
    wrong = [(kind, span.kind, row["text"][start:end]) for row in ROWS for start, end, kind in row["spans"] if kind != "KEEP" for span in find_phi(row["text"]) if span.start <= start and span.end >= end and span.kind != kind]
    assert len(wrong) <= 0.01 * sum(len(row["spans"]) for row in ROWS), wrong[:10]


def by_hand(file):
    "The messages of a fixture by section: text and where its names stand, titles left out"
    sections = {}
    for line in (FIXTURES / file).read_text(encoding="utf-8").splitlines():
        if re.fullmatch(r"\[\w+\]", line):
            current = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            text, places = "", []
            for piece in re.split(r"(\{[^}]*\})", line.replace("\\n", "\n")):
                if piece.startswith("{"):
                    title = re.match(r"{(?:(?:Dr|Mrs?|Ms|Professor|Nurse|Sister|Grandma|Grandpa)\b\.? )?", piece).end() - 1
                    places.append((len(text) + title, len(text) + len(piece) - 2))
                text += piece.strip("{}") if piece.startswith("{") else piece
            current.append((text, places))
    return sections


# These hold what has been reached. Only `final` and `newest` were never mended for; the notebook gives what each section first measured. `wrong`: spans that touch no name, brands and places among them
@pytest.mark.parametrize("file, section, names, least, wrong", [
    ("phi_names.txt", "seen", 45, 1, 0), ("phi_names.txt", "unseen", 45, 1, 0), ("phi_names.txt", "fresh", 34, 0.95, 0),
    ("phi_messages.txt", "mended", 91, 0.98, 3), ("phi_messages.txt", "held", 85, 0.98, 2), ("phi_messages.txt", "last", 65, 0.98, 3), ("phi_messages.txt", "final", 48, 0.93, 0), ("phi_messages.txt", "newer", 56, 0.98, 0), ("phi_messages.txt", "newest", 38, 0.97, 1), ("phi_messages.txt", "nobody", 0, 1, 0)])
def test_names_in_text_that_no_generator_made(file, section, names, least, wrong):
    found = total = false = 0
    for text, places in by_hand(file)[section]:
        spans = [span for span in find_phi(text) if span.kind == "NAME"]
        covered = {place for span in spans for place in range(span.start, span.end)}
        total += len(places)
        found += sum(all(place in covered for place in range(start, end) if text[place].isalnum()) for start, end in places)
        false += sum(not any(span.start < end and span.end > start for start, end in places) for span in spans)
    assert total == names and found >= least * total and false <= wrong, (found, total, false)


KEPT = [
    "BP 130/85 mmHg, HR 72, RR 18, SpO2 98%, temp 37.2", "Creatinine 1.1 mg/dL (0.6-1.2), eGFR > 60 mL/min/1.73 m2", "Amoxicillin 500 mg 1-0-1 for 5-7 days",
    "G2P1 at 12 weeks, beta hCG 25000 mIU/ml", "power 4/5, reflexes 2+, GCS 15/15, visual acuity 20/20", "CD4 350, viral load 100000 copies/ml, HLA-B27 negative",
    "Parkinson's disease, Hodgkin's lymphoma, Addison disease, Down syndrome, Crohn's disease", "ICD-10 code, COVID-19, B12 200 pg/ml, L4-L5, T2DM for 10 years", "I may 2 times a day feel dizzy; the march of time",
    "Tab Crocin 650 mg and Augmentin 625 thrice daily", "platelets 150000-400000 per microlitre", "Serum Creatinine, 1, Total Cholesterol, 210, is high; Berlin's edema and Crohn's pain", "Only Avil gives me sleep. Radiologist said so. Biopsy showed nothing. The Ultrasound says normal", "my sister rose to leave, my son will rest", "Since 2015, aged 45, 3-4 years ago, 24/7, a 2-3 cm cyst, 1:80 titre", "trial NCT01234567, n=120, p=0.03, 95% CI 1.2-3.4",
    "I am Diabetic, 45, and my wife is Pregnant. My son is Hyperactive.", "i am worried, 22 and unmarried; im single 30 and i smoke", "Hello Doctor, My Period Was Due On Friday. I Took Postinor On The 14th Day", "My Friend Took Postinor And My Sister Took Zerodol On Sunday",
    "I eat Greek yogurt. Now Dumping Syndrome.", "Apply Betadine, Neosporin or Soframycin", "my doctor in Chennai says I need a Doppler", "whether Metformin should be stopped; if Lipitor can harm",
    "Crohn's pain, Baker's cyst, Athlete's foot, Mean age 56", "German measles and French fries; Burns heal slowly", "it showed Barrett oesophagus and an Anders reflex", "vision went from 20/25 to 20/30",
]


@pytest.mark.parametrize("text", KEPT)
def test_clinical_text_is_kept(text):
    assert scrub_phi(text).text == text


FOUND = {
    "My name is rahul sharma and I am 25 years old": "My name is [NAME] and I am 25 years old",
    "JOHN SMITH, DOB 12/03/1985, MRN#4456712": "JOHN SMITH, DOB [DATE], MRN#[RECORD]",
    "Call me at 555-0123 today": "Call me at [PHONE] today",
    "john dot doe at gmail dot com": "john dot [EMAIL]",
    "seen by dr. patel on 4/5/2020": "seen by dr. [NAME] on [DATE]",
    "I am Will Turner, my son Mark is ill": "I am [NAME], my son [NAME] is ill",
    "hello doctor, my self anjali rao from pune, 27 yrs": "hello doctor, my self [NAME] from pune, 27 yrs",
    "I fell on March 3rd and was seen in April 2019": "I fell on [DATE] and was seen in [DATE]",
    "It began on 4/5": "It began on [DATE]",
    "They operated on Ravi 2 days ago": "They operated on [NAME] 2 days ago",
    "I rely on Sunita 24 hours a day; tab Telma 40 mg": "I rely on [NAME] 24 hours a day; tab Telma 40 mg",
    "My Son Arjun Had Epstein Barr": "My Son [NAME] Had Epstein Barr",
    "My GP, Alan Thwaite, saw Farouk's wife": "My GP, [NAME], saw [NAME]'s wife",
    "Dr. A. K. Srivastava and his nurse Ines": "Dr. [NAME] and his nurse [NAME]",
    "Thanks and regards\nHemalatha R": "Thanks and regards\n[NAME]",
    "B/o Sunita, w/o Md. Aslam, 33/F": "B/o [NAME], w/o [NAME], 33/F",
    "My lab sheet: RAO, Chinyere; sodium 129": "My lab sheet: [NAME]; sodium 129",
    "Wambui, you should rest. Does Yusra need a scan?": "[NAME], you should rest. Does [NAME] need a scan?",
    "Reach us: +1 (555) 123-4567 ext 89.": "Reach us: [PHONE].",
}


@pytest.mark.parametrize("text", FOUND)
def test_hard_cases(text):
    assert scrub_phi(text).text == FOUND[text]


@given(st.lists(st.sampled_from(["My name is John", "12/05/2019", "5 mg", "Call 555-123-4567", "a@b.com", "12 Oak Street", "MRN 123456", "\n", " ", "Dr.", "[NAME]", "March"]), max_size=8).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_scrubbing_is_exact_and_stable(text):
    scrubbed = scrub_phi(text)
    rebuilt, end = "", 0
    for span in scrubbed.spans:
        assert end <= span.start < span.end
        rebuilt += text[end:span.start] + f"[{span.kind}]"
        end = span.end
    assert rebuilt + text[end:] == scrubbed.text
    assert scrub_phi(scrubbed.text).text.count("[") >= scrubbed.text.count("[")


@pytest.mark.parametrize("shape", ["healthcaremagic", "medical-o1"])
def test_real_rows_lose_no_clinical_number(shape):
    numbers = lost = 0
    for row in load_examples(shape, real_path(shape)):
        for text in (row.question, row.answer):
            before, after = (len(re.findall(r"\d+", part)) for part in (text, scrub_phi(text).text))
            numbers, lost = numbers + before, lost + before - after
    assert lost <= 0.005 * numbers + 1, (lost, numbers)


@pytest.mark.parametrize("text", ["a" * 200_000, "1-" * 50_000, "A. " * 50_000, "Call " + "1 " * 50_000, "John " * 20_000, "12 Oak " * 20_000, "x@" * 50_000, "John " * 20_000 + "sir s/o d/o", "1" + "a" * 100_000 + "1 MRN", "my son is (" + "A" * 100_000, "Thanks " + "anna " * 20_000])
@pytest.mark.timeout(60)
def test_no_text_takes_forever(text):
    find_phi(text)
