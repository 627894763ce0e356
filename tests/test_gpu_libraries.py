"""Rehearsals on a CPU with the libraries that a GPU run uses: bitsandbytes and Unsloth themselves, small models. Skipped where they are not installed (`pip install 'medibuddy[gpu]'`)."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import environment
from safetensors.torch import load_file

from medibuddy.data.chat import encode_chat
from medibuddy.data.example import Example
from medibuddy.models.loaders import EMBEDDED_MODEL, add_lora, count_parameters, load_adapter, load_base, load_model, load_tokenizer, save_adapter
from medibuddy.recipe import LoraConfig, Recipe
from medibuddy.run import read_jsonl
from medibuddy.training.precision import weight_dtypes

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
needs_unsloth = pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [encode_chat(Example(id=str(i), question=f"What is item {i}?", answer=f"It is number {i}.", source="demo"), tokenizer, 128) for i in range(10)]


def gradients(model, row) -> dict:
    "Gradients of the adapter for one row"
    model.train()
    model.zero_grad()
    ids, labels = (torch.tensor([values]) for values in (row.input_ids, row.labels))
    model(input_ids=ids, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stir(model):
    "Give the adapter weights that matter: a fresh one is zero on one side, which hides wrong gradients"
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def dequantised(model):
    "The same model with whole weights that equal the quantised ones"
    import bitsandbytes as bnb

    whole = add_lora(load_base("embedded"), LoraConfig(r=4), seed=1)
    weights = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            weights[name].data = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state).float()
        elif parameter.dtype == torch.int8:
            weights[name].data = parameter.data.float() * parameter.SCB[:, None].float() / 127
        elif parameter.is_floating_point():
            weights[name].data = parameter.data.clone()
    return whole


@needs_bitsandbytes
def test_4bit_gradients_equal_the_dequantised_model_s_after_an_evaluation(rows):
    model = stir(add_lora(load_base("embedded", quantization="4bit"), LoraConfig(r=4), seed=1))
    assert weight_dtypes(model) == {"base": "nf4 with float32", "lora": "float32"}
    assert count_parameters(model)[1] == count_parameters(add_lora(load_base("embedded"), LoraConfig(r=4), seed=1))[1]
    whole = dequantised(model)
    with torch.no_grad():  # on some processors this repacks the weights unless it is forbidden, and the gradients below go wrong
        model.eval()(input_ids=torch.tensor([rows[0].input_ids]))
        model.generate(input_ids=torch.tensor([rows[0].input_ids[:8]]), max_new_tokens=2, do_sample=False)
    ours, theirs = gradients(model, rows[1]), gradients(whole, rows[1])
    assert ours.keys() == theirs.keys() and len(ours) == 56
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-7), name


@needs_bitsandbytes
def test_8bit_gradients_are_near_the_dequantised_model_s(rows):
    model = stir(add_lora(load_base("embedded", quantization="8bit"), LoraConfig(r=4), seed=1))
    assert weight_dtypes(model)["base"].startswith("int8 with float")
    whole = dequantised(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([rows[0].input_ids]))
    ours, theirs = (torch.cat([g.flatten() for _, g in sorted(gradients(m, rows[1]).items())]) for m in (model, whole))
    # the activations are rounded to 8 bits too, so the two agree in direction and size, not digit for digit
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert abs(ours.norm() / theirs.norm() - 1) < 0.05


@needs_bitsandbytes
def test_a_4bit_run_with_8bit_adamw_trains_saves_and_loads(tmp_path, tokenizer, rows):
    from medibuddy.training import sft

    recipe = Recipe.load("tiny", max_steps=4, batch_size=2, quantization="4bit", optimizer="adamw_8bit", checkpoint_every=2)

    def run(folder):
        model = add_lora(load_base("embedded", quantization="4bit"), recipe.lora, seed=42)
        return sft.train_adapter(recipe, model, tokenizer, rows, rows[:2], folder, "key", dtype="float32")

    facts = run(tmp_path / "a")
    # r=16 on 256 columns makes tensors of 4,096 elements and more, which is where 8-bit state begins
    assert facts["dtypes"] == {"base": "nf4 with float32", "lora": "float32", "activations": "float32", "optimizer": "uint8"}
    assert facts["final_loss"] < facts["first_loss"]
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoints" / "checkpoint-2", tmp_path / "b" / "checkpoints" / "checkpoint-2")
    shutil.copy(tmp_path / "a" / "log.jsonl", tmp_path / "b" / "log.jsonl")
    assert run(tmp_path / "b")["resumed_at_step"] == 2
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole = load_adapter(load_base("embedded"), tmp_path / "a" / "adapter")  # on the base that was not quantised
    assert torch.isfinite(whole(input_ids=torch.tensor([rows[0].input_ids])).logits).all()


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory) -> Path:
    "The embedded model as `unsloth/*-bnb-4bit` are given out: packed by bitsandbytes, with products in bf16"
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("packed") / "tiny-bnb-4bit"
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16, quantization_config=packing, device_map={"": "cpu"}).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED_MODEL / file, folder)
    return folder


@needs_bitsandbytes
def test_a_folder_of_packed_weights_trains_and_its_adapters_are_plain_peft(tmp_path, call, packed_model, rows_file, rows):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert "quantization_config" in json.loads((packed_model / "config.json").read_text())
    settings = [f"model.name={packed_model}", "quantization=4bit", "max_steps=2", "checkpoint_every=2", "test_fraction=0.3", "learning_rate=1e-3", "warmup_ratio=0", "r=4"]
    losses, ids = {}, torch.tensor([rows[0].input_ids])
    for backend in ("peft", "medibuddy"):
        run = tmp_path / backend
        words = [part for setting in [*settings, f"backend={backend}"] for part in ("--set", setting)]
        status, out, err = call("train", "--data", rows_file, "--shape", "pubmedqa", "--run", run, "--json", *words)
        assert status == 0, err
        facts = json.loads(out)
        # the folder says bf16; the recipe means this machine's fp32
        assert facts["dtypes"] == {"base": "nf4 with float32", "lora": "float32", "activations": "float32", "optimizer": "float32"}
        losses[backend] = facts["first_loss"], facts["final_loss"]
        base = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32, device_map={"": "cpu"}).eval()
        with torch.no_grad():
            before = base(input_ids=ids).logits
            after = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
            ours = load_model(packed_model, run / "adapter", dtype="float32", device="cpu")[0](input_ids=ids).logits  # the folder says that it is packed
        assert torch.isfinite(after).all() and not torch.equal(after, before)
        assert (ours - after).norm() < 0.02 * after.norm()  # the same adapter on the same weights, whose products are bf16 in the one and fp32 in the other
    assert losses["peft"] == pytest.approx(losses["medibuddy"], rel=1e-4)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    "A Llama of two layers with the embedded tokenizer, in fp16"
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256, bos_token_id=1, eos_token_id=0, pad_token_id=2)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED_MODEL / file, folder)
    return folder


@needs_unsloth
def test_unsloth_trains_as_peft_does_and_they_exchange_adapters(tmp_path, small_model, tokenizer, rows):
    from medibuddy.training import sft

    overrides = {"max_steps": 5, "batch_size": 2, "r": 4, "alpha": 8, "learning_rate": 1e-3, "checkpoint_every": 5, "max_seq_length": 128, "max_new_tokens": 16, "weight_decay": 0.01, "warmup_ratio": 0, "gradient_checkpointing": False}
    recipe = Recipe.load("tiny", **overrides)
    model = stir(add_lora(load_base(str(small_model)), recipe.lora, seed=42))
    (tmp_path / "start").mkdir()
    save_adapter(model, tokenizer, tmp_path / "start")
    job = {"model": str(small_model), "adapter": str(tmp_path / "start"), "rows": [asdict(row) for row in rows], "run": str(tmp_path / "unsloth"), "overrides": overrides}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run([sys.executable, Path(__file__).with_name("unsloth_on_cpu.py"), tmp_path / "job.json"], env=environment(), capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads((tmp_path / "unsloth" / "seen.json").read_text())
    # with fp32 weights, dropout or biases these counts would be 0 and nothing else would tell
    assert "2 QKV layers, 2 O layers and 2 MLP layers" in " ".join([*seen["said"], done.stdout, done.stderr])
    assert "memory, predicted:" in done.stderr and "fits: " in done.stderr
    assert seen["facts"]["dtypes"] == {"base": "float16", "lora": "float32", "activations": "float16", "optimizer": "float32"}

    sft.train_adapter(recipe, model, tokenizer, rows, rows[:2], tmp_path / "peft", "key")
    theirs, ours = ([row for row in read_jsonl(tmp_path / name / "log.jsonl") if "loss" in row] for name in ("unsloth", "peft"))
    assert len(theirs) == len(ours) == 5
    for a, b in zip(theirs, ours, strict=True):  # fp16 kernels against fp32: losses within 0.5 %, gradients of each kind of layer within 3 %
        assert abs(a["loss"] / b["loss"] - 1) < 5e-3, (a, b)
        assert all(abs(a["grad_norms"][name] / b["grad_norms"][name] - 1) < 3e-2 for name in b["grad_norms"]), (a, b)

    ids = torch.tensor([rows[0].input_ids])
    base = load_base(str(small_model))(input_ids=ids).logits
    logits = [load_adapter(load_base(str(small_model)), tmp_path / name / "adapter")(input_ids=ids).logits for name in ("unsloth", "peft")]
    moved = (logits[1] - base).norm()
    assert (logits[0] - logits[1]).norm() < 0.05 * moved  # Unsloth's adapter in PEFT is the adapter that PEFT trained, but for fp16
