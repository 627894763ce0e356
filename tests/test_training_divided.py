"""FSDP2 and DeepSpeed's ZeRO-2 and ZeRO-3 with their real code on two processes of a CPU: really divided, the adapter that one process trains, and the same after an interruption.

DeepSpeed is not in the lock: `pip install deepspeed==0.19.8 && pytest tests/test_training_divided.py` (about five minutes; it needs a C++ compiler at its first start. A first start that is
killed leaves ~/.cache/torch_extensions/*/deepspeed_shm_comm/lock, and every later one waits for it: remove that folder).
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from safetensors.torch import load_file

import medibuddy.training.launch as launcher
from medibuddy import flow
from medibuddy.recipe import Recipe
from medibuddy.run import RunError, read_json, read_jsonl, sha256_file

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
KINDS = [pytest.param("fsdp"), *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero2", "zero2-offload", "zero3", "zero3-offload"))]


@pytest.fixture(autouse=True)
def processors_for_gpus(monkeypatch):
    "Start the workers through the script that makes processors look like GPUs"
    real = launcher.launch_command

    def command(launch, run_dir):
        words = real(launch, run_dir)
        i = words.index("medibuddy.training.worker")
        return [*words[: i - 1], str(Path(__file__).with_name("divided_on_cpu.py")), *words[i + 1 :]]

    monkeypatch.setattr(launcher, "launch_command", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def recipe(rows_file, **overrides):
    "Four full steps"
    return Recipe.load("tiny", **{"source": "pubmedqa", "path": str(rows_file), "test_fraction": 0.3, "backend": "peft", "max_steps": 4, "checkpoint_every": 2, "batch_size": 4, "r": 4, "learning_rate": 1e-3} | overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divided_model_trains_the_adapter_that_one_process_trains_and_goes_on_exactly(tmp_path, rows_file, kind):
    launch = launcher.Launch(kind, 2)
    flow.train(recipe(rows_file), tmp_path / "one")
    facts = flow.train(recipe(rows_file), tmp_path / "two", launch=launch)  # `check_spread` in the workers stops what is not divided
    assert (facts["launch"], facts["processes"], facts["steps"]) == (kind, 2, 4)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(one[name].shape == two[name].shape for name in one)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5

    cut = tmp_path / "cut"  # as a kill after the first checkpoint leaves it
    shutil.copytree(tmp_path / "two", cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    assert flow.train(recipe(rows_file), cut, launch=launch)["resumed_at_step"] == 2
    assert sha256_file(cut / "adapter" / "adapter_model.safetensors") == sha256_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")


@needs_deepspeed
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_trains_a_half_precision_copy_and_the_run_says_so(tmp_path, rows_file, kind):
    "On a GPU that is fp16; a processor has bf16"
    flow.train(recipe(rows_file, precision="bf16", max_steps=3), tmp_path / "one")
    facts = flow.train(recipe(rows_file, precision="bf16", max_steps=3), tmp_path / "two", launch=launcher.Launch(kind, 2))
    assert facts["dtypes"] == {"base": "bfloat16", "lora": "bfloat16", "activations": "bfloat16", "optimizer": "float32"}
    one, two = ([row["loss"] for row in read_jsonl(tmp_path / name / "log.jsonl") if "loss" in row] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=5e-3)


@needs_deepspeed
@pytest.mark.parametrize("kind", ["zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_deepspeed_reads_the_shipped_configurations(kind, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    given = read_json(launcher.CONFIGURATIONS / f"{kind}.json")
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}

    def settled(part):  # what the Trainer puts in for "auto"
        return {key: settled(value) if isinstance(value, dict) else sizes.get(key, False if key == "enabled" else 1000) if value == "auto" else value for key, value in part.items()}

    read = DeepSpeedConfig(settled(given))
    zero, offload = read.zero_config, kind.endswith("offload")
    assert int(zero.stage) == int(kind[4]) and read.gradient_clipping == 1.0
    assert (zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu") is offload
    assert (zero.offload_param is not None) is (offload and kind.startswith("zero3"))


def test_a_model_that_was_not_divided_stops_the_training(tmp_path, rows_file, monkeypatch):
    monkeypatch.undo()  # without the stand-in Accelerate silently takes FSDP on a CPU for DDP
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(RunError, match="--launch fsdp was asked for, but the model was wrapped as DistributedDataParallel"):
        flow.train(recipe(rows_file, max_steps=1), tmp_path / "run", launch=launcher.Launch("fsdp", 2))
    assert not (tmp_path / "run" / "adapter").exists()
