"""Each fused operation beside PEFT's, forward and backward, with its share of what the machine can do at all.

    python benchmarks/kernels.py                  # CPU sizes (tiny and 30m), or 8b on a GPU
    python benchmarks/kernels.py --size tiny --repeats 30

The two ceilings are measured first: a large matrix product, and a copy. Old and new take turns inside every repeat; medians are reported.
Writes results/kernels-<size>-<device>.json beside this file and prints the table.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

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


def cases(size: str, device: str, dtype: torch.dtype) -> list[Case]:
    "Every fused operation at one size"
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from medibuddy.kernels.forward import FrozenRmsNorm, FusedMlp
    from medibuddy.kernels.group import ProjectionGroup, run_group
    from medibuddy.kernels.loss import AnswerLoss
    from medibuddy.kernels.projection import Rotary
    from medibuddy.kernels.rows import attend_padded, attend_rows, pack_rows

    sizes, lengths = SIZES[size], LENGTHS[size]
    hidden, inner, vocabulary, width = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"], sizes["head_dim"]
    heads, key_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    tokens, batch, longest, item = sum(lengths), len(lengths), max(lengths), torch.finfo(dtype).bits // 8
    old, new = adapted_layer(size, device, dtype), adapted_layer(size, device, dtype)
    old, new = (model.get_base_model().model.layers[0] for model in (old, new))
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    outputs = (heads + 2 * key_heads) * width
    wide_outer, outer = torch.randn(tokens, outputs, device=device, dtype=dtype), torch.randn(tokens, hidden, device=device, dtype=dtype)
    angle = torch.rand(tokens, width // 2, device=device)
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    group = ProjectionGroup([new.self_attn.q_proj, new.self_attn.k_proj, new.self_attn.v_proj])
    mlp = FusedMlp(new.mlp, ProjectionGroup([new.mlp.gate_proj, new.mlp.up_proj]), ProjectionGroup([new.mlp.down_proj]))

    def peft_qkv(x):
        q, k, v = (part(x).view(1, tokens, -1, width).transpose(1, 2) for part in (old.self_attn.q_proj, old.self_attn.k_proj, old.self_attn.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cosine.repeat(1, 2)[None], sine.repeat(1, 2)[None])
        return torch.cat([part.transpose(1, 2).reshape(tokens, -1) for part in (q, k, v)], dim=1)

    mask = (torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]).long()
    labels = torch.where(mask.bool(), 1, -100)
    rows = pack_rows(mask, labels)
    padded = torch.randn(batch, longest, outputs, device=device, dtype=dtype)
    allowed = mask.bool()[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    padded_outer = torch.randn(batch, heads, longest, width, device=device, dtype=dtype)

    def masked_attention(x):
        q, k, v = (part.transpose(1, 2) for part in x.unflatten(-1, (-1, width)).split([heads, key_heads, key_heads], dim=2))
        k, v = (part.repeat_interleave(heads // key_heads, dim=1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    def packed_attention(x):
        q, k, v = x.unflatten(-1, (-1, width)).split([heads, key_heads, key_heads], dim=1)
        return (attend_rows if device == "cpu" else attend_padded)(q, k, v, rows, width**-0.5, 0.0, False)

    norm = old.input_layernorm.requires_grad_(False)
    head = torch.randn(vocabulary, hidden, device=device, dtype=dtype) * hidden**-0.5
    answers = x[: tokens // 4]
    targets = torch.randint(0, vocabulary, (answers.shape[0],), device=device)
    one = torch.ones((), device=device)
    squares = sum(length**2 for length in lengths)
    return [
        Case("q, k, v and RoPE", gradient_step(peft_qkv, x, wide_outer), gradient_step(lambda x: run_group(group, x, rotary=Rotary(cosine, sine, heads + key_heads)), x, wide_outer),
             lora_operations(tokens, [(hidden, outputs)]), 2 * item * tokens * (hidden + outputs)),
        Case("gate, up, SwiGLU, down", gradient_step(old.mlp, x, outer), gradient_step(mlp, x, outer),
             lora_operations(tokens, [(hidden, inner)] * 2 + [(inner, hidden)]), 2 * item * tokens * (2 * hidden + 4 * inner)),
        Case("attention of a padded batch", gradient_step(masked_attention, padded, padded_outer), gradient_step(packed_attention, padded.flatten(0, 1)[rows.tokens], outer[:, : heads * width].contiguous()),
             6 * squares * heads * width, 2 * item * tokens * (outputs + heads * width)),
        Case("RMSNorm", gradient_step(norm, x, outer), gradient_step(lambda x: FrozenRmsNorm.apply(x, norm.weight, 1e-6), x, outer), 0, 5 * item * tokens * hidden),
        Case("LM head and loss", gradient_step(lambda x: F.cross_entropy((x @ head.t()).float(), targets, reduction="sum"), answers, one),
             gradient_step(lambda x: AnswerLoss.apply(x, head, targets, 512)[0], answers, one), 4 * answers.shape[0] * hidden * vocabulary, 2 * item * answers.shape[0] * hidden),
    ]


def main() -> int:
    "Measure and print"
    from medibuddy.hardware import describe_environment
    from medibuddy.kernels.allocator import keep_freed_memory
    from medibuddy.run import write_json

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["8b"] if device == "cuda" else ["tiny", "30m"])
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    dtype = torch.float16 if device == "cuda" else torch.float32
    keep_freed_memory()  # for both sides, so that what is compared is the operations
    load = os.getloadavg()[0]
    gemm, copy = ceilings(device, dtype)
    print(f"{device}: product {gemm / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s, load at the start {load:.2f}")
    for size in options.size:
        found = []
        print(f"\n{size}\n\n| operation, forward and backward | PEFT ms | fused ms | faster | of the product ceiling | floor ms |\n|---|---|---|---|---|---|")
        for case in cases(size, device, dtype):
            case.peft(), case.fused()
            pairs = [(seconds_of(case.peft, device), seconds_of(case.fused, device)) for _ in range(options.repeats)]
            old, new = (statistics.median(side) for side in zip(*pairs))
            floor = max(case.operations / gemm, case.bytes / copy)
            found.append({"operation": case.name, "peft_ms": old * 1e3, "fused_ms": new * 1e3, "floor_ms": floor * 1e3, "operations": case.operations, "bytes": case.bytes})
            print(f"| {case.name} | {old * 1e3:.2f} | {new * 1e3:.2f} | {old / new:.2f}× | {case.operations / new / gemm:.0%} | {floor * 1e3:.2f} |", flush=True)
        path = HERE / "results" / f"kernels-{size}-{device}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"size": size, "settings": SIZES[size], "lengths": LENGTHS[size], "device": device, "load_at_start": load, "gemm_flops": gemm, "copy_bytes_per_second": copy,
                          "environment": describe_environment(), "results": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
