"""The shipped recipes, recipes in other tools' words, and recipes that cannot work."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from conftest import medibuddy

from medibuddy.recipe import PRESETS, PROJECTIONS, Recipe

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


def test_every_preset_loads_and_says_where_its_numbers_come_from():
    assert set(NAMES) == {"tiny", "medibuddy", "deepseek-r1-cot", "qwen-medqa", "pubmedqa-llama3", "healthcaremagic-llama31"}
    for name in NAMES:
        assert Recipe.load(name).name == name
        text = (PRESETS / f"{name}.yaml").read_text()
        values = [line for line in text.splitlines() if line.startswith("  ") and not line.strip().startswith("#")]
        if name != "tiny":
            assert not [line for line in values if "#" not in line and "source:" not in line], name


def test_the_published_settings_are_kept():
    cot = Recipe.load("deepseek-r1-cot")
    assert (cot.lora.r, cot.lora.alpha, cot.lora.targets, cot.data.limit, cot.train.max_steps) == (16, 16, PROJECTIONS, 500, 60)
    assert (cot.train.batch_size, cot.train.gradient_accumulation, cot.train.learning_rate, cot.train.optimizer) == (2, 4, 2e-4, "adamw_8bit")
    assert -int(-cot.train.max_steps * cot.train.warmup_ratio // 1) == 5
    pubmedqa = Recipe.load("pubmedqa-llama3")
    assert (pubmedqa.lora.targets, pubmedqa.lora.dropout, pubmedqa.train.max_grad_norm, pubmedqa.train.optimizer) == (("q_proj", "v_proj"), 0.1, 0.3, "paged_adamw_32bit")
    patients = Recipe.load("healthcaremagic-llama31")
    assert (patients.lora.r, patients.lora.alpha, patients.lora.dropout, patients.train.epochs, patients.train.warmup_ratio, patients.model.max_seq_length) == (16, 32, 0.05, 3, 0.1, 4096)


def test_a_training_script_s_json_is_a_recipe(tmp_path, capsys):
    script = {
        "model": {"model_name": "meta-llama/Meta-Llama-3.1-8B", "tokenizer_name": None, "cache_dir": None, "trust_remote_code": True, "use_local_model": True, "precision": "bf16"},
        "lora": {"use_lora": True, "r": 16, "alpha": 32, "dropout": 0.05, "bias": "none", "target_modules": list(PROJECTIONS)},
        "data": {"data_dir": "data/processed", "max_seq_length": 4096, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
        "train": {"output_dir": "out", "learning_rate": 2e-4, "num_train_epochs": 3, "warmup_ratio": 0.1, "gradient_accumulation_steps": 4, "logging_steps": 10, "eval_steps": 200, "save_steps": 500,
                  "deepspeed": "ds.json", "fp16": False, "bf16": True},
    }
    path = tmp_path / "train_config.json"
    path.write_text(json.dumps(script))
    recipe, preset = Recipe.load(path), Recipe.load("healthcaremagic-llama31")
    assert recipe.lora == preset.lora
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.gradient_accumulation, recipe.train.evaluate_every, recipe.train.checkpoint_every) == (3, 2, 4, 200, 500)
    assert (recipe.model.precision, recipe.model.full_finetuning, recipe.eval.eval_batch_size) == ("bf16", False, 2)
    said = capsys.readouterr().err
    assert "`model.trust_remote_code` is left out: code from a model's repository is never run" in said and "train.deepspeed" in said
    # a resolved recipe is JSON too, and comes back as it was
    path.write_text(json.dumps(preset.to_dict()))
    assert Recipe.load(path) == preset


REFUSED = {
    "bf16 with fused kernels": (["backend=medibuddy", "precision=bf16"], "model.backend=peft"),
    "fp32 with Unsloth": (["backend=unsloth", "precision=fp32"], "model.precision=fp16"),
    "4-bit with full fine-tuning": (["quantization=4bit", "full_finetuning=true"], "model.full_finetuning=false"),
    "full fine-tuning with kernels": (["backend=medibuddy", "full_finetuning=true"], "model.backend=peft"),
    "dropout with Unsloth": (["backend=unsloth", "dropout=0.1"], "lora.dropout=0"),
    "DoRA with kernels": (["backend=medibuddy", "dora=true"], "lora.dora=false"),
    "biases with kernels": (["backend=medibuddy", "bias=all"], "lora.bias=none"),
    "8-bit with our kernels": (["backend=medibuddy", "quantization=8bit"], "model.quantization=4bit"),
    "Unsloth's checkpointing elsewhere": (["gradient_checkpointing=unsloth"], "Use true"),
    "rank 0": (["r=0"], "at least 1"),
    "a target the model lacks": (["targets=q_proj,v_prj"], "Did you mean `v_proj`?"),
    "a layer the model lacks": (["layers=2-9"], "the layers 0 to 3"),
    "more tokens than the model knows": (["max_seq_length=100000"], "at most 2048 tokens"),
    "Unsloth without a GPU": (["backend=unsloth"], "model.backend=medibuddy"),
    "a scheduler without what it needs": (["scheduler=cosine_with_min_lr"], "needs `min_lr` or `min_lr_rate`"),
    "a scheduler's option that is no number": (["scheduler=cosine_with_min_lr", "scheduler_options=min_lr_rate=low"], "min_lr_rate=0.1"),
    "an unknown optimizer": (["optimizer=adamw8bit"], "Did you mean `adamw_8bit`?"),
    "the best of checkpoints that were not evaluated": (["keep_best=true", "evaluate_every=40"], "multiples of `train.evaluate_every`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_loaded_or_written(call, tmp_path, monkeypatch, name):
    import torch

    monkeypatch.setattr("medibuddy.flow.load_base", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings, remedy = REFUSED[name]
    status, _, err = call("train", "--run", tmp_path / "run", *[part for setting in settings for part in ("--set", setting)])
    assert status == 2 and err.count("error: ") == 1 and remedy in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("packed, settings, remedy", [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, [], "holds 4bit weights. Use `model.quantization=4bit`"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ["quantization=4bit", "optimizer=adamw_torch"], "Use `model.quantization=8bit`"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, ["quantization=4bit"], "packed as 4-bit fp4"),
    ({"quant_method": "gptq", "bits": 4}, [], "packed as gptq"),
], ids=["4-bit", "8-bit", "fp4", "gptq"])
def test_packed_weights_are_recognised_before_they_are_loaded(call, tmp_path, monkeypatch, packed, settings, remedy):
    from medibuddy.models.loaders import EMBEDDED_MODEL

    monkeypatch.setattr("medibuddy.flow.load_base", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr("medibuddy.models.loaders.require_package", lambda *a: None)
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    status, _, err = call("train", "--run", tmp_path / "run", "--set", f"model.name={tmp_path / 'model'}", "--set", "backend=peft", *[part for setting in settings for part in ("--set", setting)])
    assert status == 2 and err.count("error: ") == 1 and remedy in err, err
    assert not (tmp_path / "run").exists()


def test_a_model_folder_without_tokenizer_or_with_pickles_only_is_named(call, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    status, _, err = call("train", "--run", tmp_path / "run", "--set", f"model.name={folder}")
    assert status == 2 and "lacks a tokenizer" in err and "never opened" in err


class Gated(BaseHTTPRequestHandler):
    "What the hub answers about a model whose licence was not accepted"

    def answer(self):
        self.send_response(403)
        for key, value in (("X-Error-Code", "GatedRepo"), ("X-Error-Message", "Access to model is restricted."), ("Content-Length", "0")):
            self.send_header(key, value)
        self.end_headers()

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *args):
        pass


def test_a_gated_model_says_which_page_to_accept_and_which_variable_to_set(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = medibuddy("train", "--run", tmp_path / "run", "--set", "model.name=meta-llama/Llama-3.1-8B", env=hub)
    finally:
        server.shutdown()
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "accept its licence at https://huggingface.co/meta-llama/Llama-3.1-8B" in message and "HF_TOKEN" in message, done.stderr
    assert not (tmp_path / "run").exists()
