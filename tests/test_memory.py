"""What the planner predicts, against exact counting of real tensors, and what it says of the published models on published GPUs."""

import json
import os
import shutil

import pytest
import torch

from medibuddy.models.loaders import EMBEDDED_MODEL, add_lora, load_base, load_tokenizer, skeleton, train_all
from medibuddy.models.memory import LiveBytes, mixed_bytes, optimizer_bytes, plan, plan_stages, recompute_layers, step_bytes, weight_bytes
from medibuddy.recipe import Recipe

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

# Shapes as published in each model's config.json; parameters as counted from its weights.
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, "model_type": "llama"}
QWEN_05B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True, "model_type": "qwen2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Model folders of the true shapes, without weights worth the name"
    made = {}
    for name, config in (("llama-8b", LLAMA_8B), ("qwen-0.5b", QWEN_05B)):
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
        made[name] = str(folder)
    return made


def test_weights_of_true_size_models_are_counted_exactly(folders):
    assert weight_bytes(skeleton(folders["llama-8b"]), None, 2) == pytest.approx(2 * 8_030_261_248, abs=1e6)  # the published parameter count
    assert weight_bytes(skeleton(folders["qwen-0.5b"]), None, 2) == pytest.approx(2 * 494_032_768, abs=1e6)
    four = weight_bytes(skeleton(folders["llama-8b"]), "4bit", 2)
    assert 5.5e9 < four < 5.9e9  # 6,979,321,856 weights of linear layers at 4.127 bits, the rest whole


@pytest.mark.parametrize("overrides", [{}, {"batch_size": 3, "max_seq_length": 192, "gradient_checkpointing": True}, {"backend": "medibuddy", "max_seq_length": 160, "batch_size": 4}], ids=["plain", "checkpointing", "fused"])
def test_a_step_is_predicted_as_it_is_counted(overrides):
    recipe = Recipe.load("tiny", **{"max_seq_length": 256, "batch_size": 2, "max_new_tokens": 16} | overrides)
    model = add_lora(load_base("embedded"), recipe.lora, seed=1).train()
    checkpointing = bool(recipe.train.gradient_checkpointing)
    inner = model.get_base_model().model
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": True})
    if recipe.model.backend == "medibuddy":
        from medibuddy.kernels.lora import fuse_lora

        fuse_lora(model)
    ids = torch.zeros((recipe.train.batch_size, recipe.model.max_seq_length), dtype=torch.long)
    embedded = inner.embed_tokens(ids).detach().requires_grad_(True)
    live = LiveBytes()
    live.ignore([*model.parameters(), *model.buffers(), embedded])
    with live:
        out = inner(inputs_embeds=embedded, use_cache=False)[0]
        out.backward(torch.empty_like(out))
    counted = live.peak + embedded.untyped_storage().nbytes()
    predicted = step_bytes(recipe, 4, "float32", checkpointing)
    assert counted <= predicted * 1.02  # never less than what is needed
    if recipe.model.backend == "peft":
        assert predicted <= counted * 1.1


def test_a_step_of_full_fine_tuning_is_predicted_with_its_gradients():
    recipe = Recipe.load("tiny", backend="peft", full_finetuning=True, precision="fp32", max_seq_length=128, batch_size=2, max_new_tokens=16)
    model, ids = train_all(load_base("embedded")).train(), torch.randint(0, 4096, (2, 128))
    live = LiveBytes()
    live.ignore([*model.parameters(), *model.buffers()])
    with live:
        hidden = model.model(ids, use_cache=False)[0]
        model.lm_head(hidden[:, -2:]).sum().backward()  # logits are counted apart
    parts = plan_stages(recipe, skeleton("embedded"), "float32", device="cpu")["train"]
    predicted = sum(size for part, size in parts.items() if part not in ("weights", "optimizer", "logits", "libraries"))
    assert live.peak <= predicted <= 1.2 * live.peak, (live.peak, parts)
    halved = plan_stages(recipe, skeleton("embedded"), "float16", device="cpu")["train"]
    assert halved["weights"] == parts["weights"] and halved["cast weights"] > 0  # trained weights are fp32 whatever the products are in


@pytest.mark.parametrize("backend", ["peft", "medibuddy"])
def test_memory_is_predicted_for_every_number_of_layers_that_recompute(backend):
    from medibuddy.kernels.forward import packed_hidden
    from medibuddy.kernels.lora import fuse_lora
    from medibuddy.kernels.rows import pack_rows

    recipe = Recipe.load("tiny", backend=backend, max_seq_length=192, batch_size=3, max_new_tokens=16)
    model = add_lora(load_base("embedded"), recipe.lora, seed=1).train()
    inner, ids = model.get_base_model().model, torch.zeros((3, 192), dtype=torch.long)
    if backend == "medibuddy":
        fuse_lora(model)
    rows, predicted, found = pack_rows(None, ids), mixed_bytes(recipe, skeleton("embedded"), "float32"), []
    for count in range(len(predicted)):
        recompute_layers(model, count)
        model.zero_grad()
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        with live:
            out = packed_hidden(inner, ids.flatten(), rows) if backend == "medibuddy" else inner(ids, use_cache=False)[0]
            out.backward(torch.empty_like(out))
        found.append(live.peak)
    assert all(counted <= 1.02 * size <= 1.5 * counted for counted, size in zip(found, predicted)), (found, predicted)


def test_as_few_layers_recompute_as_fit(folders):
    "Two rows of 2,048 tokens on an 8B model in 4 bits: all layers on a card of 9 GB, some on one of 15, none on an A100"
    recipe = Recipe.load("deepseek-r1-cot", **{"model.name": folders["llama-8b"], "backend": "medibuddy", "batch_size": 2, "max_seq_length": 2048, "eval_batch_size": 1, "max_new_tokens": 256, "gradient_checkpointing": None})
    plans = [plan(recipe, int(size)) for size in (9e9, 15e9, 20e9, 85e9)]
    counts = [made.recomputed for made in plans]
    assert counts[0] == 32 and 32 > counts[1] > counts[2] > counts[3] == 0, counts
    assert plans[1].verdict == plans[2].verdict == "fits" and f"{counts[1]} layers recomputed" in str(plans[1])
    asked = plan(Recipe.load("deepseek-r1-cot", **{"model.name": folders["llama-8b"], "backend": "medibuddy", "gradient_checkpointing": True}), int(85e9))
    assert asked.recomputed == 32, "a recipe that asks for it gets it"


def test_optimizer_state_is_counted_exactly():
    model = add_lora(load_base("embedded"), Recipe.load("tiny").lora, seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values() if t.numel() > 1)
    assert optimizer_bytes([p.numel() for p in trained], "adamw_torch") == held


def test_the_published_recipes_are_judged_as_experience_says(folders):
    """An 8B model in 4 bits with r=16 and rows of 2,048 tokens, two at a time, trains on a T4 (that is how it was published); in 16 bits it does not even load there, and on an A100-40GB it does."""
    cot = Recipe.load("deepseek-r1-cot", **{"model.name": folders["llama-8b"], "eval_batch_size": 2})
    on_t4 = plan(cot, "T4")
    assert on_t4.verdict != "does not fit", str(on_t4)
    whole = Recipe.load("deepseek-r1-cot", **{"model.name": folders["llama-8b"], "quantization": None})
    assert plan(whole, "T4").verdict == "does not fit" and sum(plan(whole, "T4").stages["load"].values()) > 15.8e9
    assert plan(whole, "A100-80GB").verdict == "fits"
    assert plan(Recipe.load("qwen-medqa", **{"model.name": folders["qwen-0.5b"]}), "T4").verdict == "fits"


def test_the_ladder_ends_with_a_recipe_that_fits(folders):
    recipe = Recipe.load("deepseek-r1-cot", **{"model.name": folders["llama-8b"], "quantization": None, "backend": "peft", "gradient_checkpointing": False, "optimizer": "adamw_torch", "batch_size": 8})
    steps = plan(recipe, "T4", ladder=True)
    assert steps[0].verdict == "does not fit" and steps[-1].verdict == "fits"
    assert "gradient_checkpointing=true" in steps[-1].changes and "quantization=4bit" in steps[-1].changes
    peaks = [step.peak for step in steps]
    assert all(later <= earlier for earlier, later in zip(peaks, peaks[1:]))


def test_the_command_prints_the_plan_and_loads_no_weights(call, folders):
    status, out, err = call("plan", "--recipe", "qwen-medqa", "--gpu", "t4", "--set", f"model.name={folders['qwen-0.5b']}", "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert answer["verdict"] == "fits" and set(answer["stages"]) == {"load", "train", "evaluate", "merge"} and answer["gpu"] == "T4"
    status, _, err = call("plan", "--gpu", "T5")
    assert status == 2 and "Did you mean `T4`?" in err


def test_a_model_that_cannot_be_counted_is_trained_all_the_same(tmp_path, call, rows_file):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path / "neox"
    config = GPTNeoXConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=0)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED_MODEL / file, folder)
    words = [part for setting in (f"model.name={folder}", "backend=peft", "targets=query_key_value", "max_steps=1", "test_fraction=0.3") for part in ("--set", setting)]
    status, out, err = call("train", "--data", rows_file, "--shape", "pubmedqa", "--run", tmp_path / "run", "--json", *words)
    assert status == 0 and json.loads(out)["steps"] == 1 and "note: the memory cannot be predicted for this kind of model" in err, err
    status, _, err = call("plan", *words)
    assert status == 1 and "the memory cannot be predicted" in err and "Traceback" not in err, err


def test_every_stage_of_a_plan_adds_up():
    stages = plan_stages(Recipe.load("tiny"), skeleton("embedded"), "float16")
    assert all(size >= 0 for parts in stages.values() for size in parts.values())
    assert stages["train"]["weights"] == stages["evaluate"]["weights"] == weight_bytes(skeleton("embedded"), None, 2)


def test_the_plan_is_printed_before_a_run_on_a_gpu(capsys):
    from medibuddy.data.chat import encode_chat
    from medibuddy.data.example import Example
    from medibuddy.flow import announce
    from medibuddy.hardware import Hardware

    recipe, tokenizer = Recipe.load("tiny"), load_tokenizer("embedded")
    row = encode_chat(Example(id="a", question="What is gout?", answer="A disease.", source="demo"), tokenizer, 128)
    announce(recipe, Hardware("cuda", "Tesla T4", 15.8, 2, "float16", "fp16 on every GPU", 7.5), add_lora(load_base("embedded"), recipe.lora, seed=1), [row], tokenizer)
    said = capsys.readouterr().err
    assert "memory, predicted:" in said and "fits: " in said and "What is gout?" in said
