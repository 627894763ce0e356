"Specialties: the row's own label, else MeSH, else the lexicon; never a guess between two."

import pytest
from conftest import REAL_ROWS

from medibuddy.data.example import Example
from medibuddy.data.shapes import SHAPES
from medibuddy.data.sources import load_examples
from medibuddy.data.specialties import LEXICON, name_specialty, specialty_of

ROW = {"pubid": 7, "question": "Does it help?", "long_answer": "It does.", "final_decision": "yes"}
MESH = ["Adult", "Asthma", "Humans"]


@pytest.mark.parametrize("columns", [
    {"context": {"contexts": ["Forty were asked."], "meshes": MESH}}, {"CONTEXTS": ["Forty were asked."], "MESHES": MESH}, {"context.contexts": ["Forty were asked."], "context.meshes": str(MESH)},
])
def test_mesh_headings_are_read_in_every_layout_and_give_way_to_a_label(columns):
    assert SHAPES["pubmedqa"].adapt(ROW | columns).specialty == "respiratory medicine"
    assert SHAPES["pubmedqa"].adapt(ROW | columns | {"specialty": "paediatrics"}).specialty == "paediatrics"


@pytest.mark.parametrize("odd", [None, "", 7, [3], {"a": 1}, "Asthma"])
def test_odd_headings_are_no_fault(odd):
    assert SHAPES["pubmedqa"].adapt(ROW | {"context": {"contexts": ["Forty were asked."], "meshes": odd}}).specialty is None


@pytest.mark.parametrize(("text", "specialty"), [
    ("Does early cardiac rehabilitation after myocardial infarction pay?", "cardiology"), ("Asthma?", None), ("Asthma and lung function in psoriasis and eczema?", None),
    ("Is the hippocampus larger?", None), ("Earlier and nearer years", None), ("Do glaucoma drops harm the cornea?", "ophthalmology"),
])
def test_words_name_a_specialty_only_where_one_stands_out(text, specialty):
    assert specialty_of(Example(id="1", question=text)) == specialty


def test_a_rows_own_label_wins_over_its_words():
    assert specialty_of(Example(id="1", question="Do glaucoma drops harm the cornea?", specialty="pharmacology")) == "pharmacology"


def test_every_stem_names_its_specialty_or_nothing():
    for specialty, stems in LEXICON.items():
        for stem in stems.split(" "):
            assert name_specialty(f"{stem.replace(chr(160), ' ')} {stem.replace(chr(160), ' ')}") in (specialty, None), (specialty, stem)


@pytest.mark.skipif(not REAL_ROWS.exists(), reason="published rows are not here")
def test_text_and_headings_agree_on_published_rows():
    rows = load_examples("pubmedqa", REAL_ROWS / "pubmedqa_pqal_250.json")
    pairs = [(row.specialty, specialty_of(Example(id="1", question=row.question, context=row.context))) for row in rows]
    both = [pair for pair in pairs if all(pair)]
    assert len(both) >= 130 and sum(a == b for a, b in both) / len(both) >= 0.9
