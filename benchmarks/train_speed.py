"""How fast LoRA training runs: medibuddy's fused kernels beside TRL + PEFT (and Unsloth on a GPU).

    python benchmarks/train_speed.py                  # the CPU workloads, every CPU backend
    python benchmarks/train_speed.py --workload tiny --repeats 5
    python benchmarks/train_speed.py --gpu            # on a GPU: every GPU workload, and kernels.py after them

Every measurement is a process of its own; backends take turns within each repeat. All train the same rows in the
same batches with the same LoRA weights and optimizer. A backend whose loss curve leaves that of its reference is rejected, whatever its speed.
The machine's rates for a large product and a copy are measured first; from them come the two floors of a step.
Writes results/train_speed-<workload>-<device>.json and .png beside this file and prints the table.
"""

import argparse
import functools
import json
import math
import os
import random
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:  # the package of this checkout is found without installing it, and kernels.py does not pass for Hugging Face's package of that name
    sys.path[0] = str(HERE.parent)
WARM_UP = 3  # steps that are not timed
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Workload:
    "A model and rows to train it on"

    batch_size: int  # rows a step
    steps: int  # steps a measurement, warm-up included
    learning_rate: float
    config: dict | None  # Llama or Qwen2 config; None for the embedded model
    lengths: tuple[int, int, int] | None  # shortest, mean and longest synthetic row in tokens; None for the embedded rows
    family: str = "llama"
    quantization: str | None = None  # "4bit" or None
    memory_cap: float | None = None  # bytes that PyTorch may reserve, so that a large card behaves like a small one
    backends: tuple[str, ...] = ()  # the only ones worth running; empty for all


LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
    max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
QWEN_05B = dict(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, rms_norm_eps=1e-6,
    max_position_embeddings=4096, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
)
LLAMA_30M = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=8192,
    tie_word_embeddings=True, max_position_embeddings=1024,
)
WORKLOADS = {
    "tiny": Workload(4, 80, 2e-3, None, None),  # the recipe `tiny` as it ships
    "tiny-16": Workload(16, 25, 2e-3, None, None),
    "30m": Workload(8, 8, 5e-4, LLAMA_30M, (128, 380, 512)),
    "qwen-0.5b": Workload(16, 33, 2e-4, QWEN_05B, (128, 420, 1024), "qwen2"),
    "deepseek-8b": Workload(8, 23, 2e-4, LLAMA_8B, (256, 600, 2048)),
    "deepseek-8b-qlora": Workload(2, 13, 2e-4, LLAMA_8B, (2048, 4096, 2048), quantization="4bit", memory_cap=15e9, backends=("medibuddy", "peft", "unsloth")),
}
GPU_WORKLOADS = ["qwen-0.5b", "deepseek-8b", "deepseek-8b-qlora"]


@dataclass(frozen=True)
class Backend:
    "One way to train"

    what: str  # for the table
    order: str  # "shuffled" or "grouped" (rows of like length share a batch)
    reference: str | None = None  # backend whose loss curve it must match; None for a reference
    tolerance: float = 1e-3  # largest relative difference of a step's loss
    fused: bool = False  # medibuddy's kernels
    checkpointing: bool = False  # TRL's default is True
    half: bool = False  # TRL's default: bf16 autocast (fp16 for the GPU rows, where all compute in fp16)
    keep_memory: bool = False  # glibc keeps freed memory (the fused kernels set this themselves)
    unsloth: bool = False
    recompute: bool = False  # every layer recomputes its activations, as TRL's default has it
    give_back: bool = False  # freed memory goes back to the system, as glibc has it by default: slower, and smaller by what lies about unused
    graph: int = 0  # the step is captured in CUDA graphs for batches filled up to multiples of so many tokens; 0 is without
    only: tuple[str, ...] = ()  # workloads it makes sense for; empty for all
    device: str = "any"  # "cpu" or "cuda" for a backend that makes sense on one of them only


BACKENDS = {
    "medibuddy": Backend("fused kernels", "shuffled", reference="peft", fused=True),
    "peft": Backend("TRL defaults in fp32: gradient checkpointing", "shuffled", checkpointing=True),
    "peft-bf16": Backend("TRL defaults untouched: bf16 autocast, gradient checkpointing", "shuffled", reference="peft", tolerance=1e-2, checkpointing=True, half=True, device="cpu"),
    "medibuddy-grouped": Backend("fused kernels, rows grouped by length", "grouped", reference="peft-best", fused=True),
    "peft-best": Backend("grouped by length, no checkpointing, freed memory kept", "grouped", keep_memory=True),
    "peft-best-bf16": Backend("the same under bf16 autocast", "grouped", reference="peft-best", tolerance=1e-2, keep_memory=True, half=True, device="cpu"),
    "medibuddy-recompute": Backend("fused kernels, every layer recomputed as `peft` does, freed memory given back", "shuffled", reference="peft", fused=True, recompute=True, give_back=True, only=("tiny", "30m")),
    "medibuddy-graph": Backend("fused kernels, steps captured in CUDA graphs", "grouped", reference="peft-best", fused=True, graph=1024, only=("qwen-0.5b",), device="cuda"),
    "unsloth": Backend("FastLanguageModel as its notebooks ship", "shuffled", reference="peft", tolerance=2e-2, checkpointing=True, unsloth=True, device="cuda"),
    "unsloth-best": Backend("FastLanguageModel, grouped, no checkpointing", "grouped", reference="peft-best", tolerance=2e-2, unsloth=True, device="cuda"),
}


# ---------------------------------------------------------------- rows and models


def embedded_rows(count: int) -> list[dict]:
    "Rows of the embedded set as token ids and labels"
    from transformers import AutoTokenizer

    from medibuddy.data.chat import encode_all
    from medibuddy.data.sources import load_examples

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    examples = load_examples("embedded")
    random.Random(0).shuffle(examples)
    encoded = encode_all(examples[: 2 * count], tokenizer, 512)
    rows = encoded[0] if isinstance(encoded, tuple) else encoded.rows
    return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in rows[:count]]


def synthetic_rows(count: int, lengths: tuple[int, int, int], vocabulary: int) -> list[dict]:
    "Rows of random tokens: lengths spread log-normally, the last quarter of each is the answer"
    generator, rows = random.Random(0), []
    shortest, mean, longest = lengths
    for _ in range(count):
        length = min(longest, max(shortest, int(generator.lognormvariate(math.log(mean), 0.35))))
        ids = [generator.randrange(10, vocabulary) for _ in range(length)]
        answer = length // 4
        rows.append({"input_ids": ids, "labels": [-100] * (length - answer) + ids[-answer:]})
    return rows


def ordered(rows: list[dict], order: str, batch_size: int) -> list[dict]:
    "Rows as they come, or batches of like length in a fixed random order"
    if order == "shuffled":
        return rows
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    random.Random(1).shuffle(batches)
    return [row for batch in batches for row in batch]


def embedded_model() -> str:
    "Folder of the embedded base model"
    import medibuddy

    return str(Path(medibuddy.__file__).parent / "embedded" / "model")


def build_model(workload: Workload, dtype, device: str):
    "The base model: the embedded one, or random weights from a seed"
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if workload.config is None:
        return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=dtype).to(device)
    torch.manual_seed(0)
    config, model = (LlamaConfig, LlamaForCausalLM) if workload.family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # or 8 billion weights would exist in fp32 first
    try:
        with torch.device(device):
            return model(config(**workload.config))
    finally:
        torch.set_default_dtype(before)


def quantise(model):
    "Exchange every linear layer but the head for a 4-bit one, as Transformers does when it loads"
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if type(old) is torch.nn.Linear and old is not model.get_output_embeddings():
                new = Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=old.weight.dtype, quant_type="nf4", compress_statistics=True, device="meta")
                new.weight = Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=new)
                new.bias = old.bias
                setattr(parent, name, new.to(old.weight.device))
    return model


def adapted_model(workload: Workload, backend: Backend, dtype, device: str, folder: str | None):
    "The base model with LoRA r=16 on all seven projections; the same A for every backend"
    import torch
    from peft import LoraConfig, get_peft_model

    if backend.unsloth:
        return unsloth_model(workload, backend, folder)
    model = build_model(workload, dtype, device)
    if workload.quantization:
        model = quantise(model)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"))


def save_base(workload_name: str, folder: str, device: str) -> None:
    "Write the base model and a tokenizer to a folder, once for all processes that read them (Unsloth loads from a folder alone)"
    import torch
    from transformers import AutoTokenizer

    build_model(WORKLOADS[workload_name], torch.float16, device).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)


def unsloth_model(workload: Workload, backend: Backend, folder: str):
    "The same model through Unsloth, which reads it from a folder"
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(folder, dtype=torch.float16, load_in_4bit=workload.quantization == "4bit", max_seq_length=2048)
    checkpointing = "unsloth" if backend.checkpointing else False
    torch.manual_seed(0)
    return FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS, use_gradient_checkpointing=checkpointing, random_state=0)


# ---------------------------------------------------------------- one measurement (child process)


def measured_trainer(model, rows: list[dict], workload: Workload, backend: Backend, device: str, folder: str):
    "TRL's trainer over rows in their given order, with a clock"
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Measured(SFTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

        def training_step(self, model, inputs, *args, **kwargs):
            tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            if device == "cuda":
                import torch

                torch.cuda.synchronize()
            times.append(time.perf_counter())

    tokens, times = [], []
    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=workload.batch_size, max_steps=workload.steps, learning_rate=workload.learning_rate,
        lr_scheduler_type="constant", seed=0, max_length=None, completion_only_loss=False, use_cpu=device == "cpu", bf16=backend.half and device == "cpu",
        fp16=device == "cuda", gradient_checkpointing=backend.checkpointing and not backend.unsloth, dataloader_pin_memory=device == "cuda", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = Measured(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(embedded_model()), callbacks=[Clock()])
    for name, parameter in model.named_parameters():
        if name in trained and not backend.unsloth:
            parameter.data = trained[name]  # TRL rounds the adapter of a quantised model to bf16
    return trainer, tokens, times


def recomputed_layers(workload: Workload, memory: float) -> int:
    "How many layers the planner lets recompute on a GPU of that size"
    from transformers import LlamaConfig, Qwen2Config

    from medibuddy.models.memory import plan
    from medibuddy.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        (LlamaConfig if workload.family == "llama" else Qwen2Config)(**workload.config).save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text("{}")
        Path(folder, "model.safetensors").write_bytes(b"")
        settings = {"model.name": folder, "backend": "medibuddy", "quantization": workload.quantization, "batch_size": workload.batch_size, "max_seq_length": workload.lengths[2], "max_new_tokens": 64, "eval_batch_size": 1}
        return plan(Recipe.load("tiny", **settings), int(memory)).recomputed


def fuse(model, workload: Workload, backend: Backend, device: str) -> str:
    "Put the fused kernels under a trainer's model; returns what was done"
    import torch

    from medibuddy.kernels.lora import fuse_lora

    report = str(fuse_lora(model))
    if device == "cuda" or backend.recompute:
        from medibuddy.models.memory import recompute_layers

        every = model.config.num_hidden_layers
        layers = every if backend.recompute else recomputed_layers(workload, workload.memory_cap or torch.cuda.get_device_properties(0).total_memory)
        recompute_layers(model, layers)
        report += f"\n{layers} layers recomputed"
    if backend.give_back:
        from medibuddy.kernels.allocator import keep_freed_memory

        keep_freed_memory(False)
    if backend.graph:
        from medibuddy.kernels.graph import capture_steps

        capture_steps(model, backend.graph, workload.lengths[2])
    return report


def cap_memory(cap: float | None) -> None:
    "Make a large card behave like a small one from here on"
    import torch

    torch.cuda.empty_cache()
    if cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()


def measure(workload_name: str, backend_name: str, device: str, folder: str | None) -> dict:
    "Train once and return what was measured"
    backend, workload = BACKENDS[backend_name], WORKLOADS[workload_name]
    if backend.unsloth:
        import unsloth  # noqa: F401  before transformers and TRL, as it demands
    import torch
    from transformers import set_seed

    from medibuddy.kernels.allocator import keep_freed_memory

    keep_freed_memory(backend.keep_memory)
    set_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = adapted_model(workload, backend, dtype, device, folder)
    if device == "cuda":
        cap_memory(workload.memory_cap)
    count = workload.batch_size * workload.steps
    rows = embedded_rows(count) if workload.lengths is None else synthetic_rows(count, workload.lengths, model.config.vocab_size)
    rows = ordered(rows, backend.order, workload.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer, tokens, times = measured_trainer(model, rows, workload, backend, device, folder)
        report = fuse(trainer.model, workload, backend, device) if backend.fused else None
        joules = energy(device)
        trainer.train()
        joules = None if joules is None else energy(device) - joules
    seconds = times[-1] - times[WARM_UP]
    memory = torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    timed = [sizes_of(rows[step * workload.batch_size : (step + 1) * workload.batch_size]) for step in range(WARM_UP, workload.steps)]
    return {
        "operations": sum(needed_operations(model.config, batch) for batch in timed), "bytes": sum(needed_bytes(model.config, batch, dtype.itemsize, workload.quantization) for batch in timed),
        "tokens_per_second": sum(tokens[WARM_UP:]) / seconds, "tokens": sum(tokens[WARM_UP:]), "seconds": seconds, "peak_memory_mb": memory, "joules": joules,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads(), "report": report,
    }


# ---------------------------------------------------------------- what any implementation has to do


def sizes_of(rows: list[dict]) -> list[tuple[int, int]]:
    "(tokens, answer tokens) of each row"
    return [(len(row["input_ids"]), sum(label != -100 for label in row["labels"][1:])) for row in rows]


def layer_shapes(config) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    "[inputs, outputs] of a layer's projections: those that every token needs, and those that only answer tokens need in the last layer"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv, hidden, inner = config.num_attention_heads * head, config.num_key_value_heads * head, config.hidden_size, config.intermediate_size
    return [(hidden, kv), (hidden, kv)], [(hidden, q), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]


def needed_operations(config, rows: list[tuple[int, int]], rank: int = 16) -> float:
    "Floating-point operations of a LoRA training step on real tokens: nothing recomputed, no gradient below the first layer, only answer tokens in the last one"
    tokens, answers = sum(length for length, _ in rows), sum(count for _, count in rows)
    everywhere, pruned = layer_shapes(config)
    attended = pruned[0][1]

    def products(count: int, shapes: list[tuple[int, int]]) -> float:
        return sum(count * (4 * i * o + 6 * rank * (i + o)) for i, o in shapes)

    whole, layers = products(tokens, everywhere) + products(tokens, pruned), config.num_hidden_layers
    attention = 6 * sum(length**2 for length, _ in rows) * attended
    last = products(tokens, everywhere) + products(answers, pruned)
    below = sum(2 * tokens * i * o for i, o in [*everywhere, pruned[0]])  # no gradient of the embeddings
    return (layers - 1) * (whole + attention) + last - below + 4 * answers * config.hidden_size * config.vocab_size


def needed_bytes(config, rows: list[tuple[int, int]], itemsize: int, quantization: str | None, rank: int = 16) -> float:
    "Bytes of a step: base weights read in forward and backward, kept activations written and read, LoRA weights with AdamW's state read and written"
    from medibuddy.models.memory import fused_layer_bytes, matrix_bytes

    tokens, layers = sum(length for length, _ in rows), config.num_hidden_layers
    shapes = [shape for part in layer_shapes(config) for shape in part]
    weights = layers * sum(matrix_bytes(o, i, quantization, itemsize) for i, o in shapes) + config.vocab_size * config.hidden_size * itemsize
    adapter = layers * sum(rank * (i + o) for i, o in shapes)
    return 2 * weights + 2 * layers * fused_layer_bytes(config, 7 * rank, tokens, itemsize) + 4 * 8 * adapter


def energy(device: str) -> float | None:
    "Joules the GPU has used since its driver started; None where NVML is not there"
    if device != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000
    except Exception:
        return None


def measured_ceilings(device: str) -> dict:
    "The machine, and the rates it reaches for a large product (operations a second) and a copy (bytes a second)"
    import torch

    tools = runpy.run_path(str(HERE / "kernels.py"))
    gemm, copy = tools["ceilings"](device, torch.float16 if device == "cuda" else torch.float32)
    return {"gemm": gemm, "copy": copy, "machine": tools["machine"](device)}


# ---------------------------------------------------------------- all measurements (parent process)


def run_child(workload: str, backend: str, device: str, folder: str | None = None) -> dict:
    "One measurement in its own process; `backend` may be \"ceilings\" or \"save\""
    command = [sys.executable, __file__, "--child", backend, "--workload", workload, "--device", device, *(["--folder", folder] if folder else [])]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"error": (done.stderr or done.stdout)[-2000:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def curve_difference(losses: list[float], reference: list[float]) -> float:
    "Largest relative difference of two loss curves, step by step"
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def summarise(results: dict[str, list[dict]], ceilings: dict) -> dict[str, dict]:
    "Median and spread of every backend, and whether its losses are its reference's"
    summary = {}
    for name, repeats in results.items():
        good = [repeat for repeat in repeats if "error" not in repeat]
        if not good:
            summary[name] = {"error": repeats[0]["error"].strip().splitlines()[-1]}
            continue
        seconds = statistics.median(r["seconds"] for r in good)
        floors = {"by_operations": good[0]["operations"] / ceilings["gemm"], "by_bytes": good[0]["bytes"] / ceilings["copy"]} if "gemm" in ceilings else {}
        speeds, reference = [repeat["tokens_per_second"] for repeat in good], BACKENDS[name].reference
        compared = [repeat for repeat in results.get(reference, []) if "error" not in repeat]
        difference = max(curve_difference(repeat["losses"], compared[0]["losses"]) for repeat in good) if compared else None
        summary[name] = {
            "median": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds), "peak_memory_mb": statistics.median(r["peak_memory_mb"] for r in good),
            "joules": good[0]["joules"], "first_loss": good[0]["losses"][0], "last_loss": good[0]["losses"][-1], "loss_difference": difference,
            "seconds": seconds, "floor_seconds": floors, "of_product_ceiling": floors["by_operations"] / seconds if floors else None,
            "accepted": difference is None or difference <= BACKENDS[name].tolerance,
        }
    return summary


def table(summary: dict[str, dict]) -> str:
    "The summary as Markdown"
    base = summary.get("peft", {}).get("median")
    lines = ["| backend | real tokens/s, median (lowest–highest) | of `peft` | peak memory MB | last loss | largest loss difference | of the product ceiling | |", "|---|---|---|---|---|---|---|---|"]
    for name, row in summary.items():
        if "error" in row:
            lines.append(f"| `{name}` | failed: {row['error'][:80]} | | | | | | |")
            continue
        share = f"{row['median'] / base:.2f}×" if base else ""
        difference = "reference" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}"
        reached = "" if row["of_product_ceiling"] is None else f"{row['of_product_ceiling']:.0%}"
        verdict = "" if row["accepted"] else "REJECTED: other losses"
        lines.append(
            f"| `{name}` | {row['median']:,.0f} ({row['lowest']:,.0f}–{row['highest']:,.0f}) | {share} | {row['peak_memory_mb']:,.0f} | {row['last_loss']:.4f} | {difference} | {reached} | {verdict} |"
        )
    return "\n".join(lines)


def plot(summary: dict[str, dict], title: str, path: Path) -> None:
    "Bars with the spread of the repeats"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name, row in summary.items() if "error" not in row]
    medians = [summary[name]["median"] for name in names]
    spread = [[m - summary[n]["lowest"] for n, m in zip(names, medians)], [summary[n]["highest"] - m for n, m in zip(names, medians)]]
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ["#0072b2" if BACKENDS[name].fused else "#999999" for name in names]
    axes.barh(names, medians, xerr=spread, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("real (non-padding) tokens per second")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def run_workload(name: str, names: list[str], repeats: int, device: str, results_dir: Path) -> None:
    "Measure one workload with every backend and write what came out"
    from medibuddy.run import write_json

    names = [backend for backend in names if name in (BACKENDS[backend].only or [name]) and backend in (WORKLOADS[name].backends or [backend])]
    ceilings, folder = run_child(name, "ceilings", device), None
    if any(BACKENDS[backend].unsloth for backend in names):
        folder = tempfile.mkdtemp(prefix="base-")
        print(run_child(name, "save", device, folder).get("error", "base model written"), flush=True)
    load, results = os.getloadavg()[0], {backend: [] for backend in names}
    for repeat in range(repeats):
        for backend in names[repeat % len(names) :] + names[: repeat % len(names)]:  # take turns at going first
            results[backend].append(run_child(name, backend, device, folder))
            shown = results[backend][-1]
            print(f"{name} repeat {repeat + 1} {backend}: {shown.get('tokens_per_second', float('nan')):,.0f} tokens/s", flush=True)
            if "error" in shown:
                print(shown["error"], flush=True)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    summary = summarise(results, ceilings)
    threads = next((repeat["threads"] for repeats in results.values() for repeat in repeats if "threads" in repeat), None)
    print(f"\n{name} on {device}, {threads} threads, load at the start {load:.2f}\n\n{table(summary)}\n", flush=True)
    floors = next((row["floor_seconds"] for row in summary.values() if row.get("floor_seconds")), {})
    if floors:
        print(f"floors of the timed steps: {floors['by_operations']:.2f} s by operations at {ceilings['gemm'] / 1e9:,.0f} GFLOP/s, {floors['by_bytes']:.2f} s by bytes at {ceilings['copy'] / 1e9:,.1f} GB/s\n", flush=True)
    stem = results_dir / f"train_speed-{name}-{device}"
    backends = {backend: asdict(BACKENDS[backend]) for backend in names}
    write_json(
        stem.with_suffix(".json"),
        {"workload": name, "settings": asdict(WORKLOADS[name]), "lora": {"r": 16, "alpha": 32, "targets": TARGETS}, "warm_up_steps": WARM_UP, "device": device,
         "threads": threads, "load_at_start": load, "environment": ceilings.get("machine"), "ceilings": ceilings, "backends": backends, "summary": summary, "repeats": results},
    )
    plot(summary, f"LoRA training, {name} on {device}", stem.with_suffix(".png"))


def main() -> int:
    "Parse the command line and run"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["tiny", "tiny-16", "30m"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--gpu", action="store_true", help="every GPU workload, and the single operations after them")
    parser.add_argument("--child", choices=[*BACKENDS, "ceilings", "save"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.child:
        work = {"ceilings": lambda *_: measured_ceilings(options.device), "save": lambda *_: save_base(options.workload[0], options.folder, options.device)}
        run = work.get(options.child, functools.partial(measure, options.workload[0], options.child, options.device))
        print("RESULT " + json.dumps(run(options.folder) or {}))
        return 0
    names = options.backends or [name for name, backend in BACKENDS.items() if backend.device in ("any", options.device)]
    options.results.mkdir(parents=True, exist_ok=True)
    for workload in GPU_WORKLOADS if options.gpu else options.workload:
        run_workload(workload, names, options.repeats, options.device, options.results)
    return subprocess.run([sys.executable, str(HERE / "kernels.py")]).returncode if options.gpu else 0


if __name__ == "__main__":
    sys.exit(main())
