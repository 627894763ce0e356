"""Each fused operation beside PEFT's (and Unsloth's on a GPU), forward and backward, with its share of what the machine can do at all.

    python benchmarks/kernels.py                  # CPU sizes (tiny and 30m), or 8b on a GPU
    python benchmarks/kernels.py --size tiny --repeats 30

The two ceilings are measured first: a large matrix product, and a copy. Old and new take turns inside every repeat; medians are reported.
Unsloth changes the libraries it is imported with, so its operations run in a process of their own afterwards.
Writes results/kernels-<size>-<device>.json beside this file and prints the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "tiny": dict(hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=2048),
    "30m": dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=8192),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256),
}
LENGTHS = {"tiny": [150, 163, 138, 171, 155, 149, 160, 144] * 2, "30m": [380, 290, 512, 450, 333, 401, 275, 420], "8b": [600, 420, 1024, 810, 512, 377, 930, 700]}


@dataclass(frozen=True)
class Case:
    "One operation, done the old way and the fused way"

    name: str
    peft: Callable[[], None]
    fused: Callable[[], None]
    operations: float  # floating-point operations of one forward and backward, LoRA included
    bytes: float  # bytes that any implementation has to read and write
    unsloth: Callable[[], None] | None = None  # Unsloth's, in its own process on a GPU


def synchronised_clock(device: str) -> float:
    "Seconds, with the GPU's queue empty"
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], None], device: str) -> float:
    "Time one call"
    start = synchronised_clock(device)
    run()
    return synchronised_clock(device) - start


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    "Best measured rate of a large product (operations a second) and of a copy (bytes a second, read and written)"
    side = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(15))
    source = torch.randn(64 * 2**20 if device == "cuda" else 16 * 2**20, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(15))
    return 2 * side**3 / product, 2 * source.nbytes / copy


def gradient_step(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, outer: torch.Tensor) -> Callable[[], None]:
    "Forward and backward of a function of one activation"

    def step():
        probe = x.detach().requires_grad_()
        run(probe).backward(outer)

    return step


def adapted_layer(size: str, device: str, dtype: torch.dtype) -> nn.Module:
    "A one-layer PEFT model"
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, max_position_embeddings=4096, **SIZES[size])).to(dtype)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    return model.train()


def lora_operations(tokens: int, shapes: list[tuple[int, int]], rank: int = 16) -> float:
    "Operations of projections [inputs, outputs] with LoRA: forward, gradient of the input, gradients of A and B"
    return sum(tokens * (4 * i * o + 6 * rank * (i + o)) for i, o in shapes)


class Bench:
    "Activations, an adapted layer for each side, and the cases made of them"

    def __init__(self, size: str, device: str, dtype: torch.dtype, unsloth: bool = False):
        self.with_unsloth = unsloth
        sizes, self.lengths, self.device = SIZES[size], LENGTHS[size], device
        self.hidden, self.inner, self.vocabulary, self.width = (sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
        self.heads, self.key_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.outputs, self.tokens = (self.heads + 2 * self.key_heads) * self.width, sum(self.lengths)
        self.old, self.new = (adapted_layer(size, device, dtype).get_base_model().model.layers[0] for _ in range(2))
        self.make = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
        self.item = torch.finfo(dtype).bits // 8
        self.x, self.outer = self.make(self.tokens, self.hidden), self.make(self.tokens, self.hidden)
        angle = torch.rand(self.tokens, self.width // 2, device=device)
        self.cosine, self.sine = angle.cos().to(dtype), angle.sin().to(dtype)

    def query_key_value(self) -> Case:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        from medibuddy.kernels.group import ProjectionGroup, run_group
        from medibuddy.kernels.projection import Rotary

        names, outer = ("q_proj", "k_proj", "v_proj"), self.make(self.tokens, self.outputs)
        group = ProjectionGroup([getattr(self.new.self_attn, name) for name in names])
        rotary = Rotary(self.cosine, self.sine, self.heads + self.key_heads)

        def peft(x):
            q, k, v = (getattr(self.old.self_attn, name)(x).view(1, self.tokens, -1, self.width).transpose(1, 2) for name in names)
            q, k = apply_rotary_pos_emb(q, k, self.cosine.repeat(1, 2)[None], self.sine.repeat(1, 2)[None])
            return torch.cat([part.transpose(1, 2).reshape(self.tokens, -1) for part in (q, k, v)], dim=1)

        def unsloth(x):
            from unsloth.kernels import apply_lora_qkv, fast_rope_embedding

            q, k, v = apply_lora_qkv(self.old.self_attn, x[None])
            q, k, v = (part.view(1, self.tokens, -1, self.width).transpose(1, 2) for part in (q, k, v))
            q, k = fast_rope_embedding(q, k, self.cosine.repeat(1, 2), self.sine.repeat(1, 2))
            return torch.cat([part.transpose(1, 2).reshape(self.tokens, -1) for part in (q, k, v)], dim=1)

        operations = lora_operations(self.tokens, [(self.hidden, self.outputs)])
        moved = 2 * self.item * self.tokens * (self.hidden + self.outputs)
        steps = gradient_step(peft, self.x, outer), gradient_step(lambda x: run_group(group, x, rotary=rotary), self.x, outer)
        return Case("q, k, v and RoPE", *steps, operations, moved, self.theirs(unsloth, self.x, outer))

    def theirs(self, run, x, outer) -> Callable[[], None] | None:
        "Unsloth's way of doing it, where it is measured"
        return gradient_step(run, x, outer) if self.with_unsloth else None

    def mlp(self) -> Case:
        from medibuddy.kernels.forward import FusedMlp
        from medibuddy.kernels.group import ProjectionGroup

        part = self.new.mlp
        fused = FusedMlp(part, ProjectionGroup([part.gate_proj, part.up_proj]), ProjectionGroup([part.down_proj]))
        operations = lora_operations(self.tokens, [(self.hidden, self.inner)] * 2 + [(self.inner, self.hidden)])
        moved = 2 * self.item * self.tokens * (2 * self.hidden + 4 * self.inner)

        def unsloth(x):
            from unsloth.kernels import apply_lora_mlp_swiglu

            return apply_lora_mlp_swiglu(self.old.mlp, x[None])[0]

        steps = gradient_step(self.old.mlp, self.x, self.outer), gradient_step(fused, self.x, self.outer)
        return Case("gate, up, SwiGLU, down", *steps, operations, moved, self.theirs(unsloth, self.x, self.outer))

    def attention(self) -> Case:
        from medibuddy.kernels.rows import attend_packed, pack_rows

        batch, longest = len(self.lengths), max(self.lengths)
        mask = (torch.arange(longest, device=self.device) < torch.tensor(self.lengths, device=self.device)[:, None]).long()
        rows = pack_rows(mask, torch.where(mask.bool(), 1, -100))
        allowed = mask.bool()[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        padded, padded_outer = self.make(batch, longest, self.outputs), self.make(batch, self.heads, longest, self.width)

        def peft(x):
            q, k, v = (part.transpose(1, 2) for part in x.unflatten(-1, (-1, self.width)).split([self.heads, self.key_heads, self.key_heads], dim=2))
            k, v = (part.repeat_interleave(self.heads // self.key_heads, dim=1) for part in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

        def fused(x):
            q, k, v = x.unflatten(-1, (-1, self.width)).split([self.heads, self.key_heads, self.key_heads], dim=1)
            return attend_packed(q, k, v, rows, self.width**-0.5, 0.0, False)

        packed = padded.flatten(0, 1)[rows.tokens]
        operations = 6 * sum(length**2 for length in self.lengths) * self.heads * self.width
        moved = 2 * self.item * self.tokens * (self.outputs + self.heads * self.width)
        steps = gradient_step(peft, padded, padded_outer), gradient_step(fused, packed, self.make(self.tokens, self.heads * self.width))
        return Case("attention of a padded batch", *steps, operations, moved)

    def norm(self) -> Case:
        from medibuddy.kernels.forward import FrozenRmsNorm

        norm = self.old.input_layernorm.requires_grad_(False)
        steps = gradient_step(norm, self.x, self.outer), gradient_step(lambda x: FrozenRmsNorm.apply(x, norm.weight, 1e-6), self.x, self.outer)

        def unsloth(x):
            from unsloth.kernels import fast_rms_layernorm

            return fast_rms_layernorm(norm, x[None])[0]

        return Case("RMSNorm", *steps, 0, 5 * self.item * self.tokens * self.hidden, self.theirs(unsloth, self.x, self.outer))

    def loss(self) -> Case:
        from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_cross_entropy_loss

        from medibuddy.kernels.loss import answer_loss

        head, answers, one = self.make(self.vocabulary, self.hidden) * self.hidden**-0.5, self.x[: self.tokens // 4], torch.ones((), device=self.device)
        targets = torch.randint(0, self.vocabulary, (answers.shape[0],), device=self.device)
        old = gradient_step(lambda x: _chunked_cross_entropy_loss(x, head, _CHUNKED_LM_HEAD_CHUNK_SIZE, shift_labels=targets)[0], answers, one)
        new = gradient_step(lambda x: answer_loss(x, head, targets).loss, answers, one)

        def unsloth(x):
            from unsloth_zoo.fused_losses import unsloth_fused_ce_loss

            return unsloth_fused_ce_loss(None, x[None], head, None, targets[None], shift_labels=False)

        moved = 2 * self.item * (answers.shape[0] * self.hidden + head.numel())
        return Case("LM head and loss (TRL's chunked)", old, new, 4 * answers.shape[0] * self.hidden * self.vocabulary, moved, self.theirs(unsloth, answers, one))

    def cases(self) -> list[Case]:
        "All of them"
        return [self.query_key_value(), self.mlp(), self.attention(), self.norm(), self.loss()]


def unsloth_seconds(size: str, repeats: int) -> dict[str, float | str]:
    "Median time of each of Unsloth's operations, or why there is none; runs in the process that imported Unsloth first"
    found = {}
    for case in Bench(size, "cuda", torch.float16, unsloth=True).cases():
        if case.unsloth is not None:
            try:
                case.unsloth()
                found[case.name] = statistics.median(seconds_of(case.unsloth, "cuda") for _ in range(repeats))
            except Exception as error:  # another version of Unsloth names or shapes things otherwise: the other operations are still of use
                found[case.name] = f"{type(error).__name__}: {error}"[:200]
    return found


def ask_unsloth(size: str, repeats: int) -> dict[str, float | str]:
    "The same from a process of its own"
    done = subprocess.run([sys.executable, __file__, "--size", size, "--repeats", str(repeats), "--unsloth"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("UNSLOTH ")]
    return json.loads(lines[-1].removeprefix("UNSLOTH ")) if lines else {"error": (done.stderr or done.stdout)[-500:]}


def machine(device: str) -> dict:
    "What it ran on"
    from medibuddy.hardware import describe_environment

    gpu = {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return describe_environment() | gpu | {"threads": torch.get_num_threads()}


def compare(case: Case, device: str, repeats: int, gemm: float, copy: float, theirs: float | str | None) -> dict:
    "Measure one case and print its row"
    case.peft(), case.fused()
    pairs = [(seconds_of(case.peft, device), seconds_of(case.fused, device)) for _ in range(repeats)]
    old, new = (statistics.median(side) for side in zip(*pairs))
    by_operations, by_bytes = case.operations / gemm, case.bytes / copy
    floor = max(by_operations, by_bytes)
    shown = f" {theirs * 1e3:.2f} |" if isinstance(theirs, float) else " |" if device == "cuda" else ""
    print(f"| {case.name} | {old * 1e3:.2f} |{shown} {new * 1e3:.2f} | {old / new:.2f}× | {by_operations * 1e3:.2f} | {by_bytes * 1e3:.2f} | {floor / new:.0%} |", flush=True)
    return {
        "operation": case.name, "peft_ms": old * 1e3, "fused_ms": new * 1e3, "unsloth": theirs, "operations": case.operations, "bytes": case.bytes,
        "floor_by_operations_ms": by_operations * 1e3, "floor_by_bytes_ms": by_bytes * 1e3, "repeats_ms": [[1e3 * part for part in pair] for pair in pairs],
    }


def main() -> int:
    "Measure and print"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["8b"] if device == "cuda" else ["tiny", "30m"])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--unsloth", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.unsloth:
        import unsloth  # noqa: F401  before Transformers and PEFT, as it demands

        print("UNSLOTH " + json.dumps(unsloth_seconds(options.size[0], options.repeats)))
        return 0
    from medibuddy.kernels.allocator import keep_freed_memory
    from medibuddy.run import write_json

    dtype = torch.float16 if device == "cuda" else torch.float32
    keep_freed_memory()  # for both sides, so that what is compared is the operations
    load = os.getloadavg()[0]
    gemm, copy = ceilings(device, dtype)
    print(f"{device}: product {gemm / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s, load at the start {load:.2f}")
    for size in options.size:
        theirs = ask_unsloth(size, options.repeats) if device == "cuda" else {}
        column, line = (" Unsloth ms |", "---|") if device == "cuda" else ("", "")
        print(f"\n{size}\n\n| operation, forward and backward | PEFT ms |{column} fused ms | faster than PEFT | floor by operations ms | floor by bytes ms | of the floor |\n|---|---|{line}---|---|---|---|---|")
        found = [compare(case, device, options.repeats, gemm, copy, theirs.get(case.name)) for case in Bench(size, device, dtype).cases()]
        path = HERE / "results" / f"kernels-{size}-{device}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"size": size, "settings": SIZES[size], "lengths": LENGTHS[size], "device": device, "dtype": str(dtype), "load_at_start": load, "gemm_flops": gemm,
                          "copy_bytes_per_second": copy, "environment": machine(device), "unsloth_error": theirs.get("error"), "results": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
