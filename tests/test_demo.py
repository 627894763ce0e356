"""The outcome that the README promises, from the command that it names."""

import json

import pytest
from conftest import medibuddy


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The whole demo, on one thread: another test runs beside it, and threads that wait for each other are slower than one"
    run = tmp_path_factory.mktemp("demo") / "run"
    done = medibuddy("demo", "--run", run, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return run, json.loads(done.stdout), json.loads((run / "metrics.json").read_text())


def test_tuned_beats_base_by_thirty_points_and_not_by_chance(demo):
    _, comparison, _ = demo
    assert comparison["n"] >= 300
    assert comparison["tuned"]["accuracy"] - comparison["base"]["accuracy"] >= 0.30
    assert comparison["mcnemar_p"] < 0.001 and comparison["verdict"] == "better"


def test_every_class_is_predicted_and_answers_end(demo):
    _, _, metrics = demo
    tuned = metrics["tuned"]
    assert tuned["rows"] == 384 and tuned["macro_f1"] >= 0.60 and tuned["stop_rate"] >= 0.98
    assert all(scores["predicted"] > 0 for scores in tuned["per_class"].values())


def test_new_wording_is_reported_apart(demo):
    run, _, metrics = demo
    new = metrics["tuned"]["by_source"]["embedded-pubmedqa-new-wording"]
    assert new["n"] >= 100
    assert "new-wording" in (run / "report.md").read_text()


def test_base_and_tuned_were_asked_the_same(demo):
    run, _, _ = demo
    base, tuned = ([json.loads(line) for line in (run / "generations" / f"{which}.jsonl").read_text().splitlines()] for which in ("base", "tuned"))
    assert [(r["id"], r["prompt"], r["gold"]) for r in base] == [(r["id"], r["prompt"], r["gold"]) for r in tuned]


def test_the_run_verifies_and_the_adapter_loads_with_plain_peft(demo):
    run, _, _ = demo
    assert medibuddy("verify", run).returncode == 0

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from medibuddy.models.loaders import EMBEDDED_MODEL

    row = next(r for r in map(json.loads, (run / "generations" / "tuned.jsonl").read_text().splitlines()) if r["stop_reason"] == "stop")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32), run / "adapter").eval()
    ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
    output = model.generate(**ids, max_new_tokens=128, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(output).removesuffix(tokenizer.eos_token) == row["text"]
