"""Small byte-level tokenizers with the special tokens and chat templates of the model families that medibuddy tunes."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The patient has a hot swollen toe and early morning stiffness.",
    "Joint fluid microscopy is the first investigation for gout.",
    "Final decision: yes. Final decision: no. Final decision: maybe.",
    "RESULTS: Eighty-three elderly patients underwent appendectomy.",
]
# family: (template in TRL's folder or None, beginning, end of turn, padding, other special tokens, plain added tokens)
FAMILIES = {
    "deepseek": ("deepseek_r1_distill", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", ["<｜User｜>", "<｜Assistant｜>"], ["<think>", "</think>"]),
    "llama3": ("llama3", "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"], []),
    "llama3.1": ("llama3_1", "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"], []),
    "qwen2.5": ("qwen2_5", None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>"], []),
    "base": (None, "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", [], []),
    "gpt": (None, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>", [], []),
}


def trl_template(name: str) -> str:
    folder = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache(None)
def _trained(special: tuple[str, ...], plain: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer.to_str()


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    "A fresh tokenizer of one family; change its template at will"
    template, beginning, end, padding, special, plain = FAMILIES[family]
    names = tuple(dict.fromkeys(name for name in (beginning, end, padding, *special) if name))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(names, tuple(plain))),
        bos_token=beginning, eos_token=end, pad_token=padding, additional_special_tokens=special, clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = trl_template(template) if template else None
    return tokenizer
