"""What a training does beside lowering the loss: its ledger, its number formats, its options, its adapters."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from medibuddy.data.chat import encode_chat
from medibuddy.data.example import Example
from medibuddy.models.loaders import add_lora, load_base, load_tokenizer
from medibuddy.recipe import Recipe
from medibuddy.run import RunError, read_jsonl
from medibuddy.training import sft

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [encode_chat(Example(id=str(i), question=f"What is item {i}?", answer=f"It is number {i}.", source="demo"), tokenizer, 256) for i in range(8)]


def train(run_dir, tokenizer, rows, change=None, **overrides):
    "Train a few steps; `change(trainer)` may interfere before they begin"
    recipe = Recipe.load("tiny", **{"max_steps": 6, "batch_size": 2, "r": 4, "checkpoint_every": 2} | overrides)
    real = sft.build_trainer

    def build(*args):
        trainer = real(*args)
        if change:
            change(trainer)
        return trainer

    sft.build_trainer = build
    try:
        model = add_lora(load_base("embedded"), recipe.lora, seed=recipe.train.seed)
        return sft.train_adapter(recipe, model, tokenizer, rows, rows[:2], run_dir, "key")
    finally:
        sft.build_trainer = real


def with_scaler(trainer, scale=1024.0):
    "Give a trainer on a CPU the loss scaling that it has on a GPU: PyTorch's own scaler, on Accelerate's own path"
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.autocast_handler = None


class Overflow(TrainerCallback):
    "Makes the gradients of chosen steps infinite"

    def __init__(self, steps):
        self.steps, self.handles = steps, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            self.handles.append(parameter.register_hook(lambda gradient: gradient * float("inf")))

    def on_step_end(self, args, state, control, **kwargs):
        while self.handles:
            self.handles.pop().remove()


@pytest.fixture
def no_autocast(monkeypatch):
    "fp16 products on a CPU take minutes; the scaler's work does not depend on them"
    import contextlib

    import accelerate.accelerator

    class Nothing(contextlib.ContextDecorator, contextlib.nullcontext):
        "Changes nothing, as a context or as a decorator"

    monkeypatch.setattr(accelerate.accelerator, "get_mixed_precision_context_manager", lambda *a, **k: Nothing())


def overflowing(steps, scale=1024.0):
    def change(trainer):
        with_scaler(trainer, scale)
        trainer.add_callback(Overflow(steps))

    return change


def test_a_skipped_step_is_in_the_ledger_and_training_goes_on(tmp_path, tokenizer, rows, no_autocast):
    facts = train(tmp_path, tokenizer, rows, overflowing({2, 3}))
    log = [row for row in read_jsonl(tmp_path / "log.jsonl") if "loss" in row]
    assert [row["skipped"] for row in log] == [False, True, True, False, False, False]
    assert [row["loss_scale"] for row in log] == [1024, 1024, 512, 256, 256, 256]
    assert [row["grad_norm"] is None for row in log] == [False, True, True, False, False, False]
    assert set(log[0]["grad_norms"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert math.isclose(math.hypot(*log[0]["grad_norms"].values()), log[0]["grad_norm"], rel_tol=1e-3)
    assert facts["health"] == {"skipped_steps": 2, "skipped_share": 0.3333, "lowest_loss_scale": 256.0, "last_loss_scale": 256.0}
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


def test_too_many_skipped_steps_stop_the_run_with_cause_and_remedies(tmp_path, tokenizer, rows, no_autocast):
    with pytest.raises(RunError) as stopped:
        train(tmp_path, tokenizer, rows, overflowing(range(3, 99)), max_skipped_steps=3)
    message = str(stopped.value)
    assert "overflowed in 3 steps in a row" in message and "Three ways on" in message and "model.precision=fp32" in message
    assert not (tmp_path / "adapter").exists()
    assert read_jsonl(tmp_path / "log.jsonl")[-1]["step"] == 5


def test_infinite_gradients_without_a_scaler_stop_the_run(tmp_path, tokenizer, rows):
    with pytest.raises(RunError, match="training step 3: .*gradient norm (nan|inf)"):
        train(tmp_path, tokenizer, rows, lambda trainer: trainer.add_callback(Overflow({3})))
    assert not (tmp_path / "adapter").exists()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2"]


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, tokenizer, rows):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("inf")

    with pytest.raises(RunError, match="is not finite, so nothing was saved"):
        train(tmp_path, tokenizer, rows, lambda trainer: trainer.add_callback(Poison()), evaluate_every=6, checkpoint_every=2)
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*")) and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_the_disk_changed_never_gets_its_name(tmp_path, tokenizer, rows, monkeypatch, name):
    real = sft.Trainer._save_checkpoint

    def on_a_bad_disk(self, model, trial):
        real(self, model, trial)
        if self.state.global_step == 4:
            file = self.staging / "checkpoint-4" / name
            content = bytearray(file.read_bytes())
            content[len(content) * 3 // 4] ^= 1
            file.write_bytes(content)

    monkeypatch.setattr(sft.Trainer, "_save_checkpoint", on_a_bad_disk)
    with pytest.raises(RunError, match=f"{name}: what is on the disk"):
        train(tmp_path, tokenizer, rows)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"] and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("part, spoil", {
    "lora": lambda model: [setattr(p, "data", p.data.bfloat16()) for p in model.parameters() if p.requires_grad],
    "base": lambda model: [setattr(p, "data", p.data.half()) for n, p in model.named_parameters() if "embed_tokens" in n],
}.items(), ids=["lora", "base"])
def test_a_number_format_that_a_library_changed_stops_the_run(part, spoil):
    from medibuddy.training.precision import check_dtypes, expected_dtypes, weight_dtypes

    recipe = Recipe.load("tiny")
    model = add_lora(load_base("embedded"), recipe.lora, seed=1)
    found = {"activations": "float32", "optimizer": "float32"}
    check_dtypes(expected_dtypes(recipe, "float32"), weight_dtypes(model) | found)
    spoil(model)
    with pytest.raises(RunError, match=f"changed the number format of {part}: the recipe means float32"):
        check_dtypes(expected_dtypes(recipe, "float32"), weight_dtypes(model) | found)


def test_the_trainer_is_watched_for_number_formats(tmp_path, tokenizer, rows):
    def half(trainer):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    with pytest.raises(RunError, match="changed the number format of lora"):
        train(tmp_path, tokenizer, rows, half)
    assert not (tmp_path / "adapter").exists()


def test_options_reach_the_trainer(tmp_path, tokenizer, rows, capsys):
    facts = train(tmp_path / "a", tokenizer, rows, neftune_noise_alpha=5, scheduler="cosine_with_restarts", optimizer="rmsprop", weight_decay=0.1, gradient_checkpointing=True, evaluate_every=1, max_grad_norm=0.5)
    log = read_jsonl(tmp_path / "a" / "log.jsonl")
    assert [row["step"] for row in log if "eval_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert facts["dtypes"] == {"base": "float32", "lora": "float32", "activations": "float32", "optimizer": "float32"}
    assert "precision: base float32, LoRA float32, activations float32, optimizer float32" in capsys.readouterr().err
    plain = train(tmp_path / "b", tokenizer, rows, scheduler="cosine_with_restarts", optimizer="rmsprop", weight_decay=0.1, evaluate_every=1, max_grad_norm=0.5)
    assert plain["final_loss"] != facts["final_loss"]  # NEFTune's noise


@pytest.mark.parametrize("scheduler, options, last", [("cosine_with_min_lr", "min_lr_rate=0.5", 0.5), ("warmup_stable_decay", "num_decay_steps=2,min_lr_ratio=0.25", 0.25), ("reduce_lr_on_plateau", "patience=0,threshold=9,factor=0.1", None)])
def test_schedulers_take_their_options(tmp_path, tokenizer, rows, scheduler, options, last):
    train(tmp_path, tokenizer, rows, scheduler=scheduler, scheduler_options=options, warmup_ratio=0, learning_rate=1e-3, evaluate_every=1)
    rates = [row["learning_rate"] for row in read_jsonl(tmp_path / "log.jsonl") if "loss" in row]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-4 if last is None else last * 1e-3 <= rates[-1] < 0.7e-3, rates


def test_the_best_checkpoint_is_what_is_saved(tmp_path, tokenizer, rows):
    facts = train(tmp_path, tokenizer, rows, learning_rate=3.0, warmup_ratio=0, scheduler="constant", checkpoint_every=1, checkpoints_kept=1, keep_best=True)
    losses = {row["step"]: row["eval_loss"] for row in read_jsonl(tmp_path / "log.jsonl") if "eval_loss" in row}
    assert facts["best_step"] == min(losses, key=losses.get) < facts["steps"] == 6
    best = tmp_path / "checkpoints" / f"checkpoint-{facts['best_step']}"
    assert best.is_dir() and len(list(best.parent.iterdir())) == 2  # the best and the newest
    kept, saved = (load_file(folder / "adapter_model.safetensors") for folder in (best, tmp_path / "adapter"))
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)


def test_full_fine_tuning_saves_a_whole_model_that_loads(tmp_path, tokenizer, rows):
    from medibuddy.models.loaders import load_adapter, train_all

    recipe = Recipe.load("tiny", max_steps=3, batch_size=2, full_finetuning=True, backend="peft", learning_rate=1e-4)
    base = load_base("embedded")
    facts = sft.train_adapter(recipe, train_all(load_base("embedded")), tokenizer, rows, rows[:2], tmp_path, "key", dtype="float32")
    assert facts["trainable_parameters"] == facts["total_parameters"] and facts["dtypes"]["lora"] == "none"
    tuned = load_adapter(base, tmp_path / "adapter")
    assert not any("lora" in name for name, _ in tuned.named_parameters())
    assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


def test_fused_and_plain_backends_load_each_other_s_adapters(tmp_path, tokenizer, rows):
    from peft import PeftModel

    ids, logits = torch.tensor([rows[0].input_ids]), {}
    for backend in ("peft", "medibuddy"):
        facts = train(tmp_path / backend, tokenizer, rows, backend=backend, rslora=True, layers=(1, 3))
        logits[backend] = PeftModel.from_pretrained(load_base("embedded"), tmp_path / backend / "adapter")(input_ids=ids).logits
        assert facts["final_loss"] < facts["first_loss"]
    assert (logits["peft"] - logits["medibuddy"]).abs().max() < 1e-3 * logits["peft"].abs().max()


def test_eval_only_trains_nothing_and_agrees_with_the_log(call, rows_file, tmp_path):
    run = tmp_path / "run"
    settings = ["max_steps=2", "checkpoint_every=2", "test_fraction=0.3", "validation_fraction=0.3", "max_new_tokens=24"]
    options = ["--data", rows_file, "--shape", "pubmedqa", "--run", run, *[part for setting in settings for part in ("--set", setting)]]
    status, out, err = call("train", "--eval-only", "--json", *options)
    assert status == 0, err
    base = json.loads(out)
    assert base["tuned"] is None and not (run / "adapter").exists() and not (run / "log.jsonl").exists()
    status, _, err = call("train", *options)
    assert status == 0, err
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    status, out, err = call("train", "--eval-only", "--json", *options)
    assert status == 0, err
    losses = json.loads(out)
    logged = [row["eval_loss"] for row in read_jsonl(run / "log.jsonl") if "eval_loss" in row]
    assert math.isclose(losses["tuned"], logged[-1], rel_tol=1e-5) and losses["tuned"] != losses["base"] == base["base"]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_what_waits_for_validation_losses_is_refused_without_validation_rows(call, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("medibuddy.flow.load_for_training", lambda *a: pytest.fail("loaded"))
    status, _, err = call("train", "--data", rows_file, "--shape", "pubmedqa", "--run", tmp_path / "run", "--set", "test_fraction=0.3", "--set", "early_stopping=2")  # these few rows leave none
    assert status == 2 and "`train.early_stopping` is 2" in err and "Raise `data.validation_fraction`" in err, err


def test_what_is_trained_is_shown_before_the_first_step(call, rows_file, tmp_path):
    status, _, err = call("train", "--data", rows_file, "--shape", "pubmedqa", "--run", tmp_path / "run", "--set", "max_steps=1", "--set", "test_fraction=0.3")
    assert status == 0, err
    shown = err[err.index("tokens are trained, between [[ and ]]"):].partition("\n")[2]
    assert "Final decision:" in shown[shown.index("[["):shown.index("recipe tiny:")]  # the answer is trained, the question is not
    assert "parameters train" in shown and "1 steps of 4 x 1 rows" in shown and shown.index("parameters train") < shown.index("precision: base float32")
