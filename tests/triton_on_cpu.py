"""Triton's kernels without a GPU; run by test_kernels.py as a process of its own, because Triton decides when it is imported whether it interprets or compiles.

python triton_on_cpu.py interpret     with TRITON_INTERPRET=1: training steps through the kernels, against the same steps through PyTorch's operations
python triton_on_cpu.py compile       without it: every kernel to machine code for a T4 and an H200, no GPU needed
"""

import os
import sys

import torch
from test_kernels import BATCHES, fused, make_batch, make_model

from medibuddy.kernels import forward, loss, projection, triton_ops
from medibuddy.kernels.lora import fuse_lora


def interpreted_steps():
    "Losses and gradients of whole models, uninitialised memory filled with NaN"
    assert os.environ["TRITON_INTERPRET"] == "1"
    calls = []
    for family, sizes, batch in (
        ("llama", {}, BATCHES["a row without labels"]),
        ("qwen2", {"num_key_value_heads": 1, "intermediate_size": 1100, "num_hidden_layers": 2}, make_batch(rows=2, length=9, answer=3)),
        ("llama", {"vocab_size": 4500, "hidden_size": 25, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 1}, make_batch(rows=2, length=7, answer=2, vocabulary=4500)),
    ):
        model = make_model(family=family, dtype=torch.float32, **sizes)
        fuse_lora(model)
        expected_loss, expected = fused(model, batch)
        for module in (forward, loss, projection):
            module.use_triton = lambda x: calls.append(x.shape) or True
        torch.use_deterministic_algorithms(True)
        found_loss, found = fused(model, batch)
        torch.use_deterministic_algorithms(False)
        for module in (forward, loss, projection):
            module.use_triton = lambda x: False
        torch.testing.assert_close(found_loss, expected_loss, rtol=1e-5, atol=1e-6)
        scale = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(scale), msg=lambda text, name=name, family=family: f"{family} {name}: {text}")
    assert len(calls) > 30, "the kernels ran"


KERNELS = {
    "rms_norm_forward_kernel": ({"x_pointer": "*fp16", "weight_pointer": "*fp16", "y_pointer": "*fp16", "reciprocal_pointer": "*fp32", "width": "i32", "epsilon": "fp32"}, {"BLOCK": 4096}),
    "rms_norm_backward_kernel": ({"gradient_pointer": "*fp16", "x_pointer": "*fp16", "weight_pointer": "*fp16", "reciprocal_pointer": "*fp32", "result_pointer": "*fp16", "width": "i32"}, {"BLOCK": 4096}),
    "rotate_kernel": ({"heads_pointer": "*fp16", "cosine_pointer": "*fp16", "sine_pointer": "*fp16", "stride": "i32", "heads": "i32", "half": "i32", "sign": "fp32"}, {"HEADS": 64, "HALF": 64}),
    "gated_kernel": ({"gate_up_pointer": "*fp16", "result_pointer": "*fp16", "inner": "i32"}, {"BLOCK": 1024}),
    "gated_backward_kernel": ({"gradient_pointer": "*fp16", "gate_up_pointer": "*fp16", "hidden_pointer": "*fp16", "result_pointer": "*fp16", "inner": "i32"}, {"BLOCK": 1024}),
    "cross_entropy_kernel": ({"logits_pointer": "*fp16", "target_pointer": "*i64", "figures_pointer": "*fp32", "vocabulary": "i32"}, {"BLOCK": 4096}),
}


def compiled_kernels():
    "Machine code for the oldest and the newest card that is served"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert set(KERNELS) == {name for name in vars(triton_ops) if name.endswith("_kernel")}
    for name, (arguments, constants) in KERNELS.items():
        kernel = getattr(triton_ops, name)
        assert kernel.arg_names == [*arguments, *constants], name
        source = ASTSource(kernel, signature=arguments | dict.fromkeys(constants, "constexpr"), constexprs={(kernel.arg_names.index(constant),): value for constant, value in constants.items()})
        for capability in (75, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_ops.warps_for(max(constants.values()))})
            assert len(made.asm["cubin"]) > 1000, name


if __name__ == "__main__":
    interpreted_steps() if sys.argv[1] == "interpret" else compiled_kernels()
