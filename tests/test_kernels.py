"""The fused kernels against PEFT: same losses, same gradients, nothing else changed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from medibuddy.kernels import projection
from medibuddy.kernels.lora import fuse_lora, unfuse_lora
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


def quantized_model(bnb):
    "A model with 4-bit base layers, and a twin whose base holds the same numbers dense"
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=61)
    quantized = LlamaForCausalLM(LlamaConfig(**sizes))
    dense = copy.deepcopy(quantized)
    for layer, twin in zip(quantized.model.layers, dense.model.layers):
        for parent, other, names in ((layer.self_attn, twin.self_attn, ALL[:4]), (layer.mlp, twin.mlp, ALL[4:])):
            for name in names:
                old = getattr(parent, name)
                new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
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


def test_four_bit_base_equals_its_dense_twin():
    bnb = pytest.importorskip("bitsandbytes")
    quantized, dense = quantized_model(bnb)
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
    assert len({buffer.data_ptr() for buffer in projection.DENSE_BUFFERS.values()}) == len(projection.DENSE_BUFFERS)
    unfuse_lora(quantized)
