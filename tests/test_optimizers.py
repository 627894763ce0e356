"""Every optimizer and scheduler that the Transformers Trainer knows trains and goes on exactly after an interruption, or says before anything is loaded why it does not.

Some optimizers come from packages that are not in the lock: `pip install bitsandbytes schedulefree torchao && pytest tests/test_optimizers.py` (about three minutes; torchao needs a C++ compiler).
"""

import math
import os
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from medibuddy.data.chat import encode_chat
from medibuddy.data.example import Example
from medibuddy.hardware import detect_hardware
from medibuddy.models.loaders import add_lora, check_machine, load_adapter, load_base, load_tokenizer
from medibuddy.recipe import NEEDED_OPTIONS, OPTIMIZER_PACKAGES, OPTIMIZERS, SCHEDULE_FREE_OPTIMIZERS, SCHEDULERS, UNUSABLE_OPTIMIZERS, Recipe
from medibuddy.run import UsageError, read_jsonl

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def test_all_that_the_trainer_knows_are_known():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert not set(OPTIMIZERS) & set(UNUSABLE_OPTIMIZERS)
    assert {*OPTIMIZERS, *UNUSABLE_OPTIMIZERS} == {name.value for name in OptimizerNames}
    assert set(SCHEDULERS) == {name.value for name in SchedulerType}


@pytest.mark.parametrize("name", UNUSABLE_OPTIMIZERS)
def test_an_optimizer_that_cannot_be_used_says_why_and_what_instead(name):
    with pytest.raises(UsageError, match=f"`train.optimizer` is '{name}': .* Use `train.optimizer=") as refused:
        Recipe.load("tiny", optimizer=name)
    remedy = str(refused.value).rpartition("`train.optimizer=")[2].partition("`")[0]
    assert Recipe.load("tiny", optimizer=remedy)


@pytest.mark.parametrize("name", OPTIMIZER_PACKAGES)
def test_an_optimizer_whose_package_is_missing_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setattr("medibuddy.models.loaders.find_spec", lambda package: None)
    monkeypatch.setattr("medibuddy.models.loaders.sys", SimpleNamespace(modules={}))
    recipe = Recipe.load("tiny", optimizer=name, scheduler="constant")
    with pytest.raises(UsageError, match=rf"`train.optimizer` is '{name}': this needs {OPTIMIZER_PACKAGES[name]}, which is not installed here: pip install \S+"):
        check_machine(recipe, detect_hardware())


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in NEEDED_OPTIONS])
def test_an_option_that_a_scheduler_does_not_take_is_refused_before_anything_is_loaded(call, tmp_path, monkeypatch, name):
    monkeypatch.setattr("medibuddy.flow.load_base", lambda *a, **k: pytest.fail("loaded"))
    status, _, err = call("train", "--run", tmp_path / "run", "--set", f"scheduler={name}", "--set", "scheduler_options=min_lr_ratio_of_mine=0.1")
    assert status == 2 and err.count("error: ") == 1 and "train.scheduler_options" in err and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SCHEDULE_FREE_OPTIMIZERS)
def test_schedule_free_optimizers_take_no_schedule(name):
    with pytest.raises(UsageError, match="Use `train.scheduler=constant`"):
        Recipe.load("tiny", optimizer=name)


@pytest.fixture(scope="module")
def rows():
    tokenizer = load_tokenizer("embedded")
    return [encode_chat(Example(id=str(i), question=f"What is item {i}?", answer=f"It is number {i}.", source="demo"), tokenizer, 256) for i in range(8)]


def available(name):
    "Mark a case that is skipped where its package is missing"
    package = OPTIMIZER_PACKAGES.get(name, "torch")
    missing = find_spec(package) is None or (name == "stable_adamw" and not torch.cuda.is_available())
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed, or needs a GPU"))


@pytest.mark.parametrize("name", [available(name) for name in ("adafactor", *OPTIMIZER_PACKAGES)])
def test_it_trains_and_goes_on_exactly(tmp_path, rows, name):
    from medibuddy.training import sft

    rate = 0.3 if "sgd" in name else 1e-3
    recipe = Recipe.load("tiny", max_steps=6, batch_size=2, r=16, checkpoint_every=3, optimizer=name, scheduler="constant", learning_rate=rate, warmup_ratio=0.2, weight_decay=0.01, dropout=0.1, backend="peft")

    def train(run):
        model = add_lora(load_base("embedded"), recipe.lora, seed=1)
        return sft.train_adapter(recipe, model, load_tokenizer("embedded"), rows, rows[:2], run, "key")

    facts = train(tmp_path / "straight")
    assert facts["final_loss"] < facts["first_loss"], facts
    assert facts["dtypes"]["optimizer"] == ("uint8" if name.endswith(("8bit", "4bit")) else "float32")
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    assert train(tmp_path / "cut")["resumed_at_step"] == 3
    straight, cut = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("straight", "cut"))
    assert straight.keys() == cut.keys() and all(torch.equal(straight[key], cut[key]) for key in straight)
    # what was saved is what was evaluated last: schedule-free optimizers train on other weights than they end with
    log = [row["eval_loss"] for row in read_jsonl(tmp_path / "straight" / "log.jsonl") if "eval_loss" in row]
    loss = sft.evaluate_loss(recipe, load_adapter(load_base("embedded"), tmp_path / "straight" / "adapter"), load_tokenizer("embedded"), rows[:2])
    assert math.isclose(loss, log[-1], rel_tol=1e-5)
