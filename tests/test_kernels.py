"""The fused kernels against PEFT: same losses, same gradients, nothing else changed."""

import copy
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from medibuddy.kernels import projection
from medibuddy.kernels.graph import capture_steps, fix_rows, fixed_loss
from medibuddy.kernels.lora import fuse_lora, unfuse_lora
from medibuddy.kernels.rows import attend_rows, pack_rows, repeat_heads, varlen_arguments, xformers_arguments
from medibuddy.models.memory import recompute_layers
from medibuddy.run import UsageError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture()
def double_norms(monkeypatch):
    "Transformers normalises float64 in float32; the comparison needs the reference to be exact"

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


def make_model(family="llama", dtype=torch.float64, lora=None, **config):
    "A small model whose adapter does something"
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6, vocab_size=61, tie_word_embeddings=False)
    sizes.update(config)
    kind, base = (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    model = base(kind(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model = get_peft_model(model.to(dtype), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ALL, **(lora or {})}), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_batch(rows=3, length=13, answer=5, padding=(4, 0, 2), vocabulary=61, seed=1):
    "Right-padded rows with labels at their end"
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        stop = length - padding[row % len(padding)]
        mask[row, stop:] = 0
        labels[row, stop:] = -100
        labels[row, : max(0, stop - answer)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def reference(model, batch):
    "Loss in the model's own format through PEFT, and gradients"
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), gradients(model)


def fused(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(model, batch, tolerance=1e-10):
    "Fuse, compare with PEFT, and return the report"
    expected_loss, expected = reference(model, batch)
    report = fuse_lora(model)
    loss, found = fused(model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}")
    return report


SHAPES = {
    "odd sizes": {},
    "an odd hidden size": {"hidden_size": 25, "num_attention_heads": 5, "num_key_value_heads": 5, "vocab_size": 67, "lora": {"r": 3}},
    "as many key heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2"},
    "rank 1": {"lora": {"r": 1}},
    "rank 128": {"lora": {"r": 128, "lora_alpha": 16}},
    "ranks by module": {"lora": {"rank_pattern": {"k_proj": 7, "up_proj": 2}, "alpha_pattern": {"down_proj": 3}}},
    "rank stabilised": {"lora": {"use_rslora": True}},
    "q and v": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "q, k and v": {"lora": {"target_modules": ["q_proj", "k_proj", "v_proj"]}},
    "gate and o": {"lora": {"target_modules": ["gate_proj", "o_proj"]}},
    "only down": {"lora": {"target_modules": ["down_proj"]}},
    "some layers": {"lora": {"layers_to_transform": [1]}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_peft_in_float64(shape, double_norms):
    report = assert_same(make_model(**SHAPES[shape]), make_batch())
    assert report.packed and not report.left


BATCHES = {
    "one row": make_batch(rows=1, padding=(0,)),
    "padded single row": make_batch(rows=1, padding=(6,)),
    "longer than a block": make_batch(rows=2, length=150, answer=40, padding=(0, 71)),
    "a row without labels": {**make_batch(), "labels": torch.cat([torch.full((1, 13), -100), make_batch()["labels"][1:]])},
    "everything is a label": make_batch(answer=100),
    "one label": make_batch(answer=1),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_equals_peft_on_batches(kind, double_norms):
    assert_same(make_model(), BATCHES[kind])


def test_a_batch_without_labels_is_a_zero_as_in_trl():
    from trl.trainer.sft_trainer import _patch_chunked_ce_lm_head

    model = make_model(dtype=torch.float32)
    _patch_chunked_ce_lm_head(model.get_base_model(), chunk_size=8)
    fuse_lora(model)
    loss, found = fused(model, {**make_batch(), "labels": torch.full((3, 13), -100)})
    assert loss == 0 and all((gradient == 0).all() for gradient in found.values())


def test_labels_of_several_turns(double_norms):
    batch = make_batch()
    batch["labels"][:, 2:4] = batch["input_ids"][:, 2:4]
    assert_same(make_model(), batch)


def test_left_padding_goes_the_old_way(double_norms):
    batch = {name: part.flip(1) for name, part in make_batch().items()}
    model = make_model()
    _, expected = reference(model, batch)
    fuse_lora(model)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    model.zero_grad()
    loss = F.cross_entropy(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "down_proj"]])
def test_dropout_with_the_same_mask(double_norms, targets):
    "PEFT's masks depend on the seed and the shape of the padded batch, so this takes the unpacked path"
    model, batch = make_model(lora={"lora_dropout": 0.3, "target_modules": targets}), make_batch()
    torch.manual_seed(7)
    _, expected = reference(model, batch)
    fuse_lora(model)
    torch.manual_seed(7)
    _, found = reference(model, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)
    torch.manual_seed(8)
    assert not torch.allclose(reference(model, batch)[0], fused(model, batch)[0]), "another mask gives another loss"


def test_dropout_in_packed_rows_by_finite_differences(double_norms):
    "PEFT cannot draw the masks of packed rows; with the same seed at every evaluation the loss is a smooth function all the same"
    model = make_model(num_hidden_layers=2, hidden_size=8, intermediate_size=5, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=11, lora={"r": 1, "lora_dropout": 0.4})
    fuse_lora(model)
    batch = make_batch(rows=2, length=5, answer=2, padding=(1, 0), vocabulary=11)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(*_):
        torch.manual_seed(3)
        return model(**batch).loss

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


def test_hundred_steps_follow_peft():
    curves = []
    for fuse in (False, True):
        model = make_model(dtype=torch.float32, hidden_size=32, intermediate_size=48, head_dim=8)
        if fuse:
            fuse_lora(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for step in range(100):
            loss = model(**make_batch(seed=step % 7)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    worst = max(abs(a - b) / a for a, b in zip(*curves))
    assert curves[0][-1] < curves[0][0] - 0.3, "the model must learn something for the comparison to mean anything"
    assert worst < 1e-3


def saved_bytes(model, batch):
    "Bytes that autograd keeps for the backward, parameters apart, each storage once"
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(size for size, _ in kept.values())
    loss.backward()
    return total


def test_less_is_saved_for_the_backward():
    model, batch = make_model(dtype=torch.float32, hidden_size=64, intermediate_size=176, head_dim=16), make_batch(length=60, answer=15, padding=(20, 0, 9))
    before = saved_bytes(model, batch)
    fuse_lora(model)
    packed = saved_bytes(model, batch)
    full = saved_bytes(model, make_batch(length=60, answer=59, padding=(0,)))
    assert packed < 0.5 * before
    assert full < 0.7 * before, "also where there is no padding and everything is an answer"


def test_layers_that_recompute_save_memory_and_change_nothing(double_norms):
    "Any number of layers, bit for bit"
    model, batch = make_model(num_hidden_layers=4), make_batch(length=40, answer=15, padding=(11, 0, 3))
    fuse_lora(model)
    expected_loss, expected = fused(model, batch)
    kept = []
    for count in range(5):
        recompute_layers(model, count)
        loss, found = fused(model, batch)
        assert loss == expected_loss and all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        kept.append(saved_bytes(model, batch))
    saved = [before - after for before, after in zip(kept, kept[1:])]
    assert min(saved) > 0 and max(saved[:3]) < 1.2 * min(saved[:3]), "each layer saves about as much as the next; the last one has only its answers"
    assert kept[-1] < 0.3 * kept[0]


def test_uninitialised_memory_does_not_leak(double_norms):
    "torch fills fresh memory with NaN here"
    model, batch = make_model(), make_batch(length=150, answer=20, padding=(0, 71, 90))
    expected_loss, expected = reference(model, batch)
    fuse_lora(model)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        loss, found = fused(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_no_gradient_below_the_first_adapted_layer(monkeypatch):
    calls, original = [], projection.input_gradient
    monkeypatch.setattr(projection, "input_gradient", lambda *arguments: calls.append(1) or original(*arguments))
    model = make_model(num_hidden_layers=3)
    fuse_lora(model)
    fused(model, make_batch())
    # a layer has qkv, o, down and gate/up; the last one q and kv apart; the first has nobody below qkv
    assert len(calls) == 4 * 3 + 1 - 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, double_norms):
    model, batch = make_model(), make_batch()
    expected_loss, expected = reference(model, batch)
    fuse_lora(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss, found = fused(model, batch)
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


LEFT = {
    "DoRA": ({"use_dora": True}, "LoRA variant (DoraLinearVariant)", 7 * 3),
    "LoRA bias": ({"lora_bias": True}, "bias", 7 * 3),
    "a trained base bias": ({"bias": "all"}, "its base bias is trained", None),
}


@pytest.mark.parametrize("kind", ["DoRA", "LoRA bias"])
def test_what_is_left_to_peft_is_named_and_trains_the_same(kind, double_norms):
    lora, reason, count = LEFT[kind]
    report = assert_same(make_model(attention_bias=True, mlp_bias=True, lora=lora), make_batch(), tolerance=1e-7)
    assert len(report.left) == count and all(reason in why for _, why in report.left)
    assert ("model.layers.0.self_attn.q_proj", report.left[0][1]) in report.left


def test_one_projection_left_to_peft(double_norms):
    model = make_model()
    layer = model.get_base_model().model.layers[1]
    handles = [part.register_forward_hook(lambda *_: None) for part in (layer.self_attn.k_proj, layer.mlp.up_proj)]
    report = assert_same(model, make_batch())
    assert report.left == (("model.layers.1.self_attn.k_proj", "it has forward hooks"), ("model.layers.1.mlp.up_proj", "it has forward hooks"))
    for handle in handles:
        handle.remove()


def test_trained_base_biases_are_left_to_peft(double_norms):
    report = assert_same(make_model(family="qwen2", lora={"bias": "all"}), make_batch())
    assert len(report.left) == 9 and all(why == "its base weight is trained" for _, why in report.left)


def test_several_active_adapters(double_norms):
    model = make_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    report = assert_same(model, make_batch())
    assert len(report.left) == 3 and "several adapters are active (default, second)" == report.left[0][1]


def test_modules_to_save_disables_packing(double_norms):
    model, batch = make_model(lora={"modules_to_save": ["lm_head"]}), make_batch()
    report = fuse_lora(model)
    assert not report.packed and "ModulesToSaveWrapper" in report.packed_reason
    _, found = reference(model, batch)
    unfuse_lora(model)
    _, expected = reference(model, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_adapter_changes_between_steps(double_norms):
    "Disabling, merging, switching and moving the model are noticed at the next step"
    model, batch = make_model(), make_batch()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]), autocast_adapter_dtype=False)
    plain = copy.deepcopy(model)
    fuse_lora(model)

    def both():
        return fused(model, batch)[0], reference(plain, batch)[0]

    for name in ("second", "default"):
        model.set_adapter(name)
        plain.set_adapter(name)
        torch.testing.assert_close(*both())
    with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        loss = F.cross_entropy(plain(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        torch.testing.assert_close(model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, loss)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(*both())
    for either in (model, plain):
        either.float().double()
        weight = either.get_base_model().model.layers[1].self_attn.k_proj.base_layer.weight
        weight.data = weight.data * 1.5  # as quantisation or a safe merge would, in a tensor of its own
    torch.testing.assert_close(*both())


def test_a_cache_is_filled_in_training_mode_too():
    model = make_model(dtype=torch.float32)
    ids = make_batch()["input_ids"]
    expected = model(ids, use_cache=True)
    fuse_lora(model)
    found = model(ids, use_cache=True)
    assert found.past_key_values.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(model(ids[:, :1], past_key_values=found.past_key_values).logits, model(ids[:, :1], past_key_values=expected.past_key_values).logits)


def test_weights_and_files_stay_pefts_own(tmp_path):
    plain, model = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    names, memory = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    fuse_lora(model)
    assert list(model.state_dict()) == names and sum(p.numel() for p in model.parameters()) == memory
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fused")
    assert (tmp_path / "plain/adapter_model.safetensors").read_bytes() == (tmp_path / "fused/adapter_model.safetensors").read_bytes()
    plain.eval(), model.eval()
    ids = make_batch()["input_ids"]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_fused_model_can_be_copied_and_pickled(double_norms):
    model, batch = make_model(), make_batch()
    fuse_lora(model)
    expected = fused(model, batch)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(fused(other, batch)[0], expected)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.zero_() if "lora_B" in name else None
        assert not torch.allclose(fused(other, batch)[0], expected), "the copy uses its own adapter"
    torch.testing.assert_close(fused(model, batch)[0], expected)


def test_unfusing_leaves_nothing_behind():
    model = make_model(dtype=torch.float32)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    fuse_lora(model)
    fuse_lora(model)
    unfuse_lora(model)
    unfuse_lora(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    for name, part in model.state_dict().items():
        assert torch.equal(part, before[name])
        assert part.untyped_storage().nbytes() == part.nbytes, f"{name} is still part of a stack"


def test_fusing_before_trl_is_built_still_trains(double_norms):
    "TRL then puts its own loss over ours; layers stay fused"
    from trl.trainer.sft_trainer import _patch_chunked_ce_lm_head

    model, batch = make_model(), make_batch()
    expected_loss, expected = reference(model, batch)
    fuse_lora(model)
    _patch_chunked_ce_lm_head(model.get_base_model(), chunk_size=8)
    loss, found = fused(model, batch)
    torch.testing.assert_close(loss, expected_loss, check_dtype=False)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    ids = batch["input_ids"][:1, :6]
    assert model.eval().generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] == 8
    with pytest.raises(UsageError, match="replaced again"):
        unfuse_lora(model)


def test_generate_runs_on_a_fused_model():
    model = make_model(dtype=torch.float32)
    ids = make_batch()["input_ids"][:1, :6]
    model.eval()
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    fuse_lora(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)


def test_loss_and_logged_sums_are_trls():
    from trl.trainer.sft_trainer import _patch_chunked_ce_lm_head

    model, batch = make_model(dtype=torch.float32), make_batch()
    _patch_chunked_ce_lm_head(model.get_base_model(), chunk_size=8)
    for items in (None, torch.tensor(23)):
        unfuse_lora(model)
        expected = model(**batch, num_items_in_batch=items)
        fuse_lora(model)
        found = model(**batch, num_items_in_batch=items)
        for name in ("loss", "num_correct_tokens", "entropy_sum", "num_valid_tokens"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), check_dtype=False)
    unfuse_lora(model)
    assert model.get_base_model().forward.__name__ == "_chunked_ce_forward"


def test_bf16_and_foreign_models_are_refused():
    with pytest.raises(UsageError, match="bfloat16"):
        fuse_lora(make_model(dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="Linear"):
        fuse_lora(torch.nn.Linear(2, 2))
    model = make_model(dtype=torch.float32)
    fuse_lora(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UsageError, match="bf16=False"):
        model(**make_batch())


def test_fp16_base_with_fp32_adapter():
    "Half weights, fp32 LoRA weights and autocast, as on a GPU; CPUs emulate it slowly"
    exact = make_model(dtype=torch.float32)
    expected_loss, expected = reference(exact, make_batch())
    model = make_model(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.half()
    fuse_lora(model)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**make_batch()).loss
    (loss * 1024).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=5e-3, atol=5e-3)
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad / 1024
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 0.02 * gradient.norm() + 1e-6, name


def test_all_gradients_by_finite_differences(double_norms):
    model = make_model(num_hidden_layers=2, hidden_size=8, intermediate_size=5, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=11, lora={"r": 1})
    fuse_lora(model)
    batch = make_batch(rows=2, length=5, answer=2, padding=(1, 0), vocabulary=11)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: model(**batch).loss, parameters, fast_mode=True)


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_filled_up_to_a_budget_is_the_same_batch(kind, double_norms):
    "What a CUDA graph would be captured from: rows, filler rows and filler answers, in sizes that many batches share"
    model, batch = make_model(family="qwen2", tie_word_embeddings=True), BATCHES[kind]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected_loss, expected = reference(model, batch)
    fuse_lora(model)
    rows = pack_rows(batch["attention_mask"], batch["labels"])
    for budget in (64, 51):
        fixed = fix_rows(batch["input_ids"].flatten()[rows.tokens], rows, budget=budget, longest=150)
        assert fixed.ids.numel() % budget == 0 and fixed.kept.numel() % (budget // 4) == 0
        sums = fixed_loss(model.get_base_model(), fixed)
        torch.testing.assert_close(sums[0].detach() / rows.targets.numel(), expected_loss)
        for found, gradient in zip(torch.autograd.grad(sums[0] / rows.targets.numel(), trained), expected.values()):
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)


def test_steps_are_not_captured_where_that_cannot_be():
    model = make_model(dtype=torch.float32)
    with pytest.raises(UsageError, match="not packed"):
        capture_steps(model)
    fuse_lora(model)
    with pytest.raises(UsageError, match="flash attention"):
        capture_steps(model)
    recompute_layers(model, 1)
    with pytest.raises(UsageError, match="recompute"):
        capture_steps(model)


def heads_of_rows(lengths):
    "q, k and v of packed rows, the rows, and what attention must give"
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    rows = pack_rows(mask, torch.where(mask.bool(), 1, -100))
    query, key, value = (torch.randn(sum(lengths), heads, 8) for heads in (6, 2, 2))
    return query, key, value, rows, attend_rows(query, key, value, rows, 8**-0.5, 0.0, False)


@pytest.mark.skipif(find_spec("xformers") is None, reason="xformers is not installed")
@pytest.mark.parametrize("lengths", [(5, 1, 9), (7,), (4, 0, 3)])
def test_xformers_is_given_rows_that_do_not_see_each_other(lengths):
    "Its kernels run on GPUs only; its mask can be written out anywhere"
    query, key, value, rows, expected = heads_of_rows(lengths)
    q, k, v, mask = xformers_arguments(query, key, value, rows)
    dense = mask.materialize((1, 1, sum(lengths), sum(lengths)))
    found = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), attn_mask=dense)
    torch.testing.assert_close(found.transpose(1, 2)[0].flatten(1), expected)


@pytest.mark.parametrize("lengths", [(5, 1, 9), (7,), (4, 0, 3)])
def test_flash_attention_is_given_rows_that_do_not_see_each_other(lengths):
    "varlen_attn runs on GPUs only; its documentation says what it computes"
    query, key, value, rows, expected = heads_of_rows(lengths)
    (q, k, v, q_offsets, k_offsets, q_longest, k_longest), keywords = varlen_arguments(query, key, value, rows)
    assert q_longest == k_longest == max(lengths) and q_offsets is k_offsets and q_offsets.dtype == torch.int32
    assert keywords.get("is_causal") or keywords["window_size"] == (-1, 0)
    offsets, k, v = q_offsets.tolist(), repeat_heads(k, 6), repeat_heads(v, 6)
    parts = [F.scaled_dot_product_attention(*(part[a:b].transpose(0, 1) for part in (q, k, v)), is_causal=True).transpose(0, 1) for a, b in zip(offsets, offsets[1:]) if b > a]
    torch.testing.assert_close(torch.cat(parts).flatten(1), expected)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("job", ["interpret", "compile"])
def test_triton_kernels(job):
    "Whole training steps in Triton's interpreter against PyTorch's operations, and machine code for a T4 and an H200"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ({"TRITON_INTERPRET": "1"} if job == "interpret" else {})
    done = subprocess.run([sys.executable, Path(__file__).parent / "triton_on_cpu.py", job], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_fp16_base_with_fp32_adapter is its twin")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fp16_on_a_gpu_follows_an_fp32_reference(family, graph):
    "Losses within 2e-3 relative, gradients within 2 % of their norm: fp16 has 11 bits, and a gradient is a sum of thousands of products"
    sizes = dict(family=family, dtype=torch.float32, hidden_size=128, intermediate_size=300, num_attention_heads=8, num_key_value_heads=2, head_dim=16, vocab_size=1031)
    batch = make_batch(rows=4, length=130, answer=40, padding=(50, 0, 9, 71), vocabulary=1031)
    expected_loss, expected = reference(make_model(**sizes), batch)
    model = make_model(**sizes).cuda()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.half()
    fuse_lora(model)
    if graph:
        capture_steps(model, budget=256, longest=160)
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(**{name: part.cuda() for name, part in batch.items()}).loss
        (loss * 65536).backward()
        torch.testing.assert_close(loss.detach().cpu(), expected_loss, rtol=2e-3, atol=2e-3)
        for name, gradient in expected.items():
            found = model.get_parameter(name).grad.cpu() / 65536
            assert (found - gradient).norm() < 0.02 * gradient.norm() + 1e-6, name


def quantized_model(bnb, bias=False):
    "A model with 4-bit base layers, and a twin whose base holds the same numbers dense"
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=61, attention_bias=bias, mlp_bias=bias)
    quantized = LlamaForCausalLM(LlamaConfig(**sizes))
    for name, parameter in quantized.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    dense = copy.deepcopy(quantized)
    for layer, twin in zip(quantized.model.layers, dense.model.layers):
        for parent, other, names in ((layer.self_attn, twin.self_attn, ALL[:4]), (layer.mlp, twin.mlp, ALL[4:])):
            for name in names:
                old = getattr(parent, name)
                new = Linear4bit(old.in_features, old.out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
                new.bias = old.bias
                setattr(parent, name, new.to("cpu"))
                getattr(other, name).weight.data = dequantize_4bit(new.weight.data, new.weight.quant_state).view_as(old.weight)
    models = []
    for base in (quantized, dense):
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=ALL))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        models.append(model.train())
    return models


@pytest.mark.parametrize("bias", [False, True])
def test_four_bit_base_equals_its_dense_twin(bias):
    bnb = pytest.importorskip("bitsandbytes")
    quantized, dense = quantized_model(bnb, bias)
    batch = make_batch()
    expected_loss, expected = reference(dense, batch)
    report = fuse_lora(quantized)
    assert not report.left
    for evaluated in (False, True):
        if evaluated:  # repacks the weights on AVX512-BF16 processors unless that is forbidden
            quantized.eval()
            with torch.no_grad():
                quantized(batch["input_ids"])
            quantized.train()
        loss, found = fused(quantized, batch)
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    largest = max(sum(layer.out_features for layer in group.base_layers()) * group.base_layers()[0].in_features for group in quantized.get_base_model()._medibuddy_fusion.groups)
    assert projection.DENSE_BUFFERS[torch.device("cpu"), torch.float32].numel() == largest, "one buffer, as large as the widest group"
    unfuse_lora(quantized)
