"""Train a small model through the real Unsloth on a CPU; run by test_gpu_libraries.py as a process of its own, because Unsloth changes Transformers, TRL and PEFT for good.

python unsloth_on_cpu.py JOB.json      a job names model, adapter, rows, run and recipe overrides

Triton's interpreter runs Unsloth's kernels. What they ask of CUDA beside that (names, streams, memory) gets stand-ins with the values of a T4; tensors stay on the CPU.
"""

import contextlib
import json
import os
import sys
import types
from pathlib import Path

os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1", "UNSLOTH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
sys.modules["xformers"] = None  # its kernels refuse CPU tensors

import torch
from torch.overrides import TorchFunctionMode


class NoDevice:
    "A context that selects no device"

    idx = 0

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


def stand_in_for_cuda():
    "Answer what Unsloth asks of CUDA as a T4 would"
    t4 = types.SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, major=7, minor=5, multi_processor_count=40)
    answers = {
        "get_device_properties": lambda *a: t4, "get_device_capability": lambda *a: (7, 5), "get_device_name": lambda *a: t4.name, "device_count": lambda: 1, "current_device": lambda: 0,
        "mem_get_info": lambda *a: (t4.total_memory, t4.total_memory), "synchronize": lambda *a: None, "empty_cache": lambda: None, "device": NoDevice,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch._C._cuda_getCurrentRawStream = lambda *a: 0


def is_gpu(value):
    "Does this argument name a GPU?"
    return (isinstance(value, str) and value.startswith("cuda")) or (isinstance(value, torch.device) and value.type == "cuda")


class OnCpu(TorchFunctionMode):
    "Sends whatever is meant for a GPU to the CPU"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if is_gpu(device) or (isinstance(device, int) and not isinstance(device, bool)):
            kwargs["device"] = "cpu"
        if getattr(func, "__name__", "") == "to":
            args = tuple("cpu" if is_gpu(a) or (i == 1 and isinstance(a, int) and not isinstance(a, bool)) else a for i, a in enumerate(args))
        return func(*args, **kwargs)


def main(job):
    "Load, put the given adapter on, train, save; write what was seen"
    from medibuddy.models.loaders import add_lora, import_backend, load_base, load_tokenizer

    import_backend("unsloth")
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from medibuddy.data.chat import EncodedChat
    from medibuddy.flow import announce
    from medibuddy.hardware import detect_hardware
    from medibuddy.recipe import Recipe
    from medibuddy.training.sft import train_adapter

    recipe = Recipe.load("tiny", **job["overrides"], backend="unsloth", precision="fp16")
    rows = [EncodedChat(**row) for row in job["rows"]]
    base = load_base(job["model"], dtype="float16", device="cpu", backend="unsloth", max_seq_length=128)
    said = []
    import logging

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    for name in ("unsloth", "unsloth.models.llama", None):
        logging.getLogger(name).addHandler(handler)
    with contextlib.redirect_stdout(Printed(said)):
        model = add_lora(base, recipe.lora, recipe.train.seed, "unsloth")
    set_peft_model_state_dict(model, load_file(Path(job["adapter"]) / "adapter_model.safetensors"))
    Path(job["run"]).mkdir(parents=True, exist_ok=True)
    announce(recipe, detect_hardware(), model, rows, load_tokenizer(job["model"]))  # predicts the memory, which must not meet Unsloth's layers
    facts = train_adapter(recipe, model, load_tokenizer(job["model"]), rows, rows[:2], Path(job["run"]), "key", dtype="float16")
    Path(job["run"], "seen.json").write_text(json.dumps({"said": said, "facts": facts}))


class Printed:
    "Collects what is printed"

    def __init__(self, lines):
        self.lines = lines

    def write(self, text):
        self.lines.append(text)
        return len(text)

    def flush(self):
        pass


if __name__ == "__main__":
    stand_in_for_cuda()
    with OnCpu():
        main(json.loads(Path(sys.argv[1]).read_text()))
