"""BERTScore: the numbers of the library itself, with its model named, and a reason where there is none.

bert-score is part of `medibuddy[eval]`. The scoring models here are small ones with random weights.
"""

import json
import shutil
from pathlib import Path

import pytest

from medibuddy import flow
from medibuddy.evaluation.bertscore import scored_answers
from medibuddy.run import Run, read_json, read_jsonl, write_jsonl
from medibuddy.verification import verify

bert_score = pytest.importorskip("bert_score", reason="no bert-score; pip install 'medibuddy[eval]'")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    "A BERT of two layers with random weights"
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("scorer") / "little-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,:;()-%", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789")]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(finished_run, scorer, tmp_path_factory):
    "A run with BERTScore; most of its answers are given words, since a model tuned for four steps writes none"
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("scored") / "run"))
    manifest = Run(run)
    for which, words in (("base", "It cannot be said."), ("tuned", "The drug lowered the risk in both groups.")):
        rows = read_jsonl(run / "generations" / f"{which}.jsonl")
        write_jsonl(run / "generations" / f"{which}.jsonl", [rows[0], *(row | {"text": f"\n</think>\n\n{words} {row['id']}"} for row in rows[1:])])
        manifest.record_files([f"generations/{which}.jsonl"])
    manifest.save()
    flow.evaluate(run, bertscore=str(scorer), bertscore_layers=2)
    flow.compare(run)
    flow.report(run)
    return run


def test_every_answer_has_the_librarys_own_value(scored, scorer):
    from medibuddy.data.example import Example
    from medibuddy.evaluation.texts import answer_pairs

    references = {row["id"]: Example.from_dict(row) for row in read_jsonl(scored / "data" / "test.jsonl")}
    for which in ("base", "tuned"):
        rows = scored_answers(scored, which)
        pairs = answer_pairs(rows, references)
        written = [place for place, (answer, _) in enumerate(pairs) if answer.strip()]  # an empty answer has 0, as in the library
        answers, texts = ([pairs[place][side] for place in written] for side in (0, 1))
        found = bert_score.score(answers, texts, model_type=str(scorer), num_layers=2, lang=None, device="cpu", batch_size=32)
        for number, values in enumerate(found):
            wanted = [0.0] * len(rows)
            for place, value in zip(written, values.tolist(), strict=True):
                wanted[place] = value
            assert 0 < len(written) < len(rows) and [row["bertscore"][number] for row in rows] == pytest.approx(wanted, abs=1e-9)
            mean = read_json(scored / "metrics.json")[which]["bertscore"][("precision", "recall", "f1")[number]]
            assert mean == pytest.approx(sum(wanted) / len(wanted), abs=1e-9)


def test_the_report_names_the_model_the_layer_and_the_library_and_verifies(scored, scorer):
    text = (scored / "report.md").read_text(encoding="utf-8")
    assert "BERTScore F1" in text and "little-bert_L2" in text and "layer 2" in text and read_json(scored / "bertscore.json")["sha256"][:16] in text
    assert "not computed" not in text and str(scorer) not in text
    family = read_json(scored / "comparison.json")["measures"]
    assert family["bertscore"]["difference_ci"] and "p_holm" in family["bertscore"]
    outcome = verify(scored)
    assert outcome.ok and any("bertscore.json" in note for note in outcome.notes)


def test_an_altered_score_is_found(scored, tmp_path):
    run = Path(shutil.copytree(scored, tmp_path / "run"))
    found = read_json(run / "bertscore.json")
    first = next(iter(found["tuned"]))
    found["tuned"][first][2] = 0.999
    (run / "bertscore.json").write_text(json.dumps(found), encoding="utf-8")
    problems = {problem.file for problem in verify(run).problems}
    assert "bertscore.json" in problems and "metrics.json" in problems


def test_without_a_model_it_is_said_and_never_counted_as_nought(finished_run):
    text = (finished_run / "report.md").read_text(encoding="utf-8")
    assert "BERTScore: not computed, because no scoring model was named" in text and "BERTScore F1" not in text


def test_offline_it_is_not_computed_and_the_rest_is(call, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = shutil.copytree(finished_run, tmp_path / "run")
    status, output, errors = call("evaluate", run, "--bertscore", "nobody/no-such-model")
    assert status == 0, errors
    assert "BERTScore: not computed, because" in output and "nobody/no-such-model" in output
    assert read_json(run / "metrics.json")["tuned"]["bertscore"] is None
    flow.compare(run)
    flow.report(run)
    assert "BERTScore: not computed, because" in (run / "report.html").read_text(encoding="utf-8") and verify(run).ok


@pytest.mark.parametrize(("arguments", "reason"), [(["--bertscore-layers", "9"], "has 2 layers"), ([], "--bertscore-layers"), ])
def test_a_layer_that_is_not_there_or_not_known_is_an_error(call, finished_run, scorer, tmp_path, arguments, reason):
    run = shutil.copytree(finished_run, tmp_path / "run")
    status, _, errors = call("evaluate", run, "--bertscore", scorer, *arguments)
    assert status == 2 and reason in errors


def test_a_folder_that_is_not_there_is_an_error(call, finished_run, tmp_path):
    status, _, errors = call("evaluate", shutil.copytree(finished_run, tmp_path / "run"), "--bertscore", "./no-such-folder")
    assert status == 2 and "no-such-folder" in errors
