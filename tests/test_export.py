"""Exports of a trained run, read by the libraries that users have, and exports that must not leave: each fault is put in and has to be refused."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import environment, medibuddy
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from medibuddy.deploy import export as room
from medibuddy.deploy.export import export
from medibuddy.models.loaders import EMBEDDED_MODEL
from medibuddy.run import RunError, UsageError


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    "A run with adapter and merged model exported"
    run = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(finished_run, run)
    done = medibuddy("export", run, "--json")
    assert done.returncode == 0, done.stderr
    return run, json.loads(done.stdout)


@pytest.fixture
def run(exported, tmp_path):
    "A copy of it, for changes"
    return Path(shutil.copytree(exported[0], tmp_path / "run"))


def logits(model, tokenizer, question="Is colchicine used for gout?"):
    "What a plain Transformers user computes"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        return model.eval()(ids).logits


def trained(run):
    "The trained model by plain PEFT"
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32), run / "adapter"), AutoTokenizer.from_pretrained(run / "adapter")


def test_plain_peft_and_transformers_read_the_exports(exported):
    run, records = exported
    expected = logits(*trained(run))
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32), run / "export/adapter")
    assert torch.equal(logits(adapter, AutoTokenizer.from_pretrained(run / "export/adapter")), expected)
    merged = AutoModelForCausalLM.from_pretrained(run / "export/merged", dtype=torch.float32)
    assert (logits(merged, AutoTokenizer.from_pretrained(run / "export/merged")) - expected).abs().max() < 0.02
    stored = load_file(run / "export/merged/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert stored.keys() == load_file(EMBEDDED_MODEL / "model.safetensors").keys()
    adapter, merged = (records[form]["parity"] for form in ("adapter", "merged"))
    assert adapter["texts_equal"] == adapter["texts"] > 0 and adapter["lost"] == 0
    assert merged["lost"] < 0.01 and merged["agree"] > 0.95 * merged["tokens"]  # four steps of training leave ties
    assert str(EMBEDDED_MODEL.parent) not in "".join(file.read_text(errors="replace") for file in (run / "export").rglob("*") if file.suffix in (".json", ".md"))


def test_the_run_still_verifies(exported):
    done = medibuddy("verify", exported[0])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_second_export_changes_nothing_and_a_damaged_one_is_made_again(run):
    files = {file: file.stat().st_mtime_ns for file in (run / "export").rglob("*")}
    export(run)
    assert {file: file.stat().st_mtime_ns for file in (run / "export").rglob("*")} == files
    weights = run / "export/merged/model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"\x00" if good[-1:] != b"\x00" else good[:-1] + b"\x01")
    export(run, ["merged"])
    assert weights.read_bytes() == good
    assert (run / "export/adapter/export.json").stat().st_mtime_ns == files[run / "export/adapter/export.json"]


def test_the_card_says_what_the_manifest_says(exported):
    run, _ = exported
    text = (run / "export/merged/README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    comparison = json.loads((run / "comparison.json").read_text())
    assert head["license"] == "other" and head["library_name"] == "transformers"  # Apache-2.0 base, MIT rows
    for part in ("Not for care", comparison["verdict_text"], "MIT", "apache-2.0", "rank 16", "95 %", "## Limits", "rows to train", json.loads((run / "manifest.json").read_text())["data"]["sha256"][:16]):
        assert part in text, part
    assert str(run) not in text


def inject(monkeypatch, change):
    "Let `change` spoil the folder of a merged model after it was written and before it is read back"
    whole = room.merge_model

    def spoilt(base, adapter, folder, *more):
        facts = whole(base, adapter, folder, *more)
        change(folder)
        return facts

    monkeypatch.setattr(room, "merge_model", spoilt)


def zeroed(folder):
    "The base model's weights: an adapter that was lost on the way"
    save_file(load_file(EMBEDDED_MODEL / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})


def scrambled(folder):
    "The tuned weights of one layer in another"
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".1.", ".2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def half_scaled(folder):
    "Half of what training changed, as with a wrong alpha"
    base, tuned = load_file(EMBEDDED_MODEL / "model.safetensors"), load_file(folder / "model.safetensors")
    save_file({name: (base[name].float() + tuned[name].float()).div(2).half() for name in tuned}, folder / "model.safetensors", metadata={"format": "pt"})


def other_template(folder):
    "The template of another family"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:")


def doubled_bos(folder):
    "A second beginning-of-sequence token"
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text(encoding="utf-8"), encoding="utf-8")


FAULTS = [(zeroed, "the tuning is not in it"), (scrambled, "differs from the trained model"), (half_scaled, "differs from the trained model"), (other_template, "another template"), (doubled_bos, "2 beginning-of-sequence tokens")]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_the_gate_refuses(run, monkeypatch, fault, reason):
    shutil.rmtree(run / "export")
    inject(monkeypatch, fault)
    with pytest.raises(RunError, match=reason):
        export(run, ["merged"])
    assert not (run / "export/merged").exists() and not list(run.rglob("*.tmp"))


def test_an_adapter_that_does_nothing_is_refused(run):
    shutil.rmtree(run / "export")
    path = run / "adapter/adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(RunError, match="changed since it was written"):
        export(run)
    manifest = room.Run(run)
    manifest.record_files(["adapter/adapter_model.safetensors"])
    manifest.save()
    with pytest.raises(RunError, match="nothing to export"):
        export(run)


def test_a_full_disk_leaves_nothing(run):
    shutil.rmtree(run / "export")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))  # bytes; the merged file has 6.8 MB
    done = subprocess.run([sys.executable, "-m", "medibuddy", "export", str(run), "--form", "merged"], capture_output=True, text=True, env=environment(), preexec_fn=limit)
    assert done.returncode == 1 and "free some space" in done.stderr, done.stderr
    assert not list((run / "export").rglob("*.safetensors"))


def test_a_killed_export_leaves_nothing_half_written(run):
    shutil.rmtree(run / "export")
    started = subprocess.Popen([sys.executable, "-m", "medibuddy", "export", str(run), "--form", "merged"], stderr=subprocess.PIPE, env=environment())
    end = time.monotonic() + 120
    while not list((run).rglob("export/.merged.*.tmp/*")):
        assert started.poll() is None and time.monotonic() < end, started.stderr.read()
        time.sleep(0.002)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    started.stderr.close()
    assert not (run / "export/merged").exists()
    assert export(run, ["merged"])["merged"]["parity"]["lost"] < 0.01
    assert [file.name for file in (run / "export").iterdir()] == ["merged"]


def test_two_exports_at_once_do_not_meet(call, run):
    from medibuddy.run import locked

    with locked(run):
        status, _, errors = call("export", run)
    assert status == 2 and "another medibuddy process" in errors


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="no bitsandbytes: pip install bitsandbytes==0.50.2")
def test_an_adapter_trained_on_four_bits_is_merged_onto_sixteen(tmp_path, rows_file):
    run = tmp_path / "run"
    settings = [part for setting in ("max_steps=30", "quantization=4bit", "backend=peft", "test_fraction=0.3", "max_new_tokens=24") for part in ("--set", setting)]
    done = medibuddy("train", "--data", rows_file, "--shape", "pubmedqa", "--run", run, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    record = export(run, ["merged"])["merged"]
    assert record["parity"]["lost"] < 0.1 and 0 < record["parity"]["lost_to_quantised"] < 5
    base, merged = load_file(EMBEDDED_MODEL / "model.safetensors"), load_file(run / "export/merged/model.safetensors")
    adapter, config = load_file(run / "adapter/adapter_model.safetensors"), json.loads((run / "adapter/adapter_config.json").read_text())
    name = "model.layers.2.mlp.up_proj"
    delta = config["lora_alpha"] / config["r"] * adapter[f"base_model.model.{name}.lora_B.weight"].float() @ adapter[f"base_model.model.{name}.lora_A.weight"].float()
    assert delta.abs().max() > 1e-4 and torch.allclose(merged[f"{name}.weight"].float(), base[f"{name}.weight"].float() + delta, atol=1e-3)
    assert "quantization_config" not in json.loads((run / "export/merged/config.json").read_text())
    assert "quantised base weights" in (run / "export/merged/README.md").read_text(encoding="utf-8")


BIG = """
import re, sys
from pathlib import Path
from medibuddy.deploy.merge import merge_model
# of this process alone: what getrusage tells begins with the size of the process that started it
memory = lambda name: int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
folders = [Path(argument) for argument in sys.argv[1:]]
merge_model(*folders[:3])  # a small one first, so that everything is imported
Path("/proc/self/clear_refs").write_text("5")  # the highest size is counted anew
before = memory("VmRSS")
facts = merge_model(*folders[3:], shard_bytes=40_000_000)
print(facts["bytes"] / 1e6, memory("VmHWM") - before)
"""


def big_and_small(folder, **size):
    "A base model in several files and an adapter for it"
    from peft import LoraConfig, get_peft_model

    base, adapter, out = (folder / name for name in ("base", "adapter", "merged"))
    out.mkdir(parents=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=16, vocab_size=512, **size)).half()
    model.save_pretrained(base, max_shard_size="200MB")
    shutil.copyfile(EMBEDDED_MODEL / "tokenizer.json", base / "tokenizer.json")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(adapter)
    return tuned, [base, adapter, out]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_memory_is_bounded_by_a_shard(tmp_path):
    small = big_and_small(tmp_path / "small", hidden_size=64, intermediate_size=96, num_hidden_layers=2)[1]
    tuned, big = big_and_small(tmp_path / "big", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16)  # 540 MB in three files
    name, out = "base_model.model.model.layers.3.mlp.down_proj", big[2]
    expected = tuned.get_submodule(name).base_layer.weight.float() + tuned.get_submodule(name).get_delta_weight("default").float()
    del tuned
    done = subprocess.run([sys.executable, "-c", BIG, *small, *big], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split())
    assert size > 500 and 10 < grown < size / 2, (size, grown)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    found = load_file(out / index["model.layers.3.mlp.down_proj.weight"])["model.layers.3.mlp.down_proj.weight"]
    assert torch.allclose(found.float(), expected, atol=1e-3)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"bias": "lora_only"}], ids=["dora", "rslora", "bias"])
def test_every_kind_of_lora_is_merged_as_peft_merges_it(tmp_path, changes):
    from peft import LoraConfig, get_peft_model

    from medibuddy.deploy.merge import merge_model

    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "merged"))
    out.mkdir()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, attention_bias=True)).save_pretrained(base)
    shutil.copyfile(EMBEDDED_MODEL / "tokenizer.json", base / "tokenizer.json")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **changes))
    for name, parameter in tuned.named_parameters():
        if changes.get("bias") and name.endswith("q_proj.base_layer.bias"):
            torch.nn.init.normal_(parameter)  # as if it had been trained
    tuned.save_pretrained(adapter)
    merge_model(base, adapter, out, "float16")
    expected, found = tuned.merge_and_unload().state_dict(), load_file(out / "model.safetensors")
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), expected[name].float(), atol=2e-3), name


def test_base_weights_in_four_bits_need_the_whole_model(run, tmp_path):
    base = tmp_path / "base-4bit"
    shutil.copytree(EMBEDDED_MODEL, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UsageError, match="--base"):
        export(run, ["merged"], base=str(base))


@pytest.mark.parametrize(("arguments", "reason"), [(["--form", "gguf"], "Valid choices"), (["--dtype", "int4"], "float16 or bfloat16"), (["--push", "me/model"], "one --form"), (["--public", "--form", "merged"], "give --push")])
def test_bad_arguments(call, exported, arguments, reason):
    status, _, errors = call("export", exported[0], *arguments)
    assert status == 2 and reason in errors, errors
