"""GGUF files by the real llama.cpp: its converter, its quantiser, its tokenizer; and files that must not be let out.

Of llama.cpp nothing is in the lock; the converter alone stands in the source distribution of llama-cpp-python, and llama-quantize in llama.cpp's programs:

    pip install gguf xllamacpp sentencepiece; pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    MEDIBUDDY_LLAMA_CPP=llama_cpp_python-0.3.36/vendor/llama.cpp python -m pytest tests/test_gguf.py
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tuned_run import make_tuned_run

from medibuddy.deploy import gguf as room
from medibuddy.deploy.export import export
from medibuddy.run import RunError, UsageError, read_jsonl

LLAMA_CPP = os.environ.get("MEDIBUDDY_LLAMA_CPP")
needs_llama = pytest.mark.skipif(not LLAMA_CPP or not find_spec("xllamacpp") or not find_spec("gguf"), reason="no llama.cpp; the docstring says how to get it")
needs_quantizer = pytest.mark.skipif(not shutil.which("llama-quantize"), reason="no llama-quantize on the PATH")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A tuned run with f16 and q8_0 exported"
    run = make_tuned_run(tmp_path_factory.mktemp("gguf") / "run")
    return run, export(run, ["f16", "q8_0"], llama_cpp=LLAMA_CPP)


@needs_llama
def test_llama_cpp_answers_as_evaluated(exported):
    run, records = exported
    file = run / "export/f16/model-f16.gguf"
    assert room.read_metadata(file, "tokenizer.ggml.pre") == "smollm" and not room.read_metadata(file, "tokenizer.ggml.add_bos_token")
    assert records["f16"]["parity"]["texts_equal"] >= 7 and records["q8_0"]["parity"]["lost"] < 0.25
    from medibuddy.data.chat import user_text
    from medibuddy.data.example import Example

    example = Example.from_dict(read_jsonl(run / "data/test.jsonl")[0])
    with room.llama_server(file, 1024) as client:  # the chat endpoint, as any OpenAI client would use it
        reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": user_text(example)}], "max_tokens": 128, "temperature": 0, "reasoning_format": "none"}).json()
    row = read_jsonl(run / "generations/tuned.jsonl")[0]
    assert reply["usage"]["prompt_tokens"] == row["prompt_tokens"]
    # llama.cpp hands back the "<think>" that the prompt ended in, too
    assert reply["choices"][0]["message"]["content"].removeprefix("<think>").strip() == row["text"].strip()


@needs_llama
@needs_quantizer
def test_four_bits(exported):
    run, _ = exported
    parity = export(run, ["q4_K_M"], llama_cpp=LLAMA_CPP)["q4_K_M"]["parity"]
    assert 0 < parity["lost"] < 0.75
    assert (run / "export/q4_K_M/model-q4_K_M.gguf").stat().st_size < 0.4 * (run / "export/f16/model-f16.gguf").stat().st_size


@needs_llama
def test_the_modelfile_renders_the_trained_prompts_in_go(exported, tmp_path):
    "Ollama's templates are Go's text/template: run by Go itself where there is one"
    import subprocess

    run, _ = exported
    text = (run / "export/q8_0/Modelfile").read_text(encoding="utf-8")
    assert text.startswith("# For trying") and "FROM ./model-q8_0.gguf" in text and 'PARAMETER stop "<｜end▁of▁sentence｜>"' in text
    if not shutil.which("go"):
        pytest.skip("no Go to run the template with")
    template = text.split('"""')[1]
    program = 'package main\nimport ("encoding/json"; "os"; "text/template")\nfunc main() { var d map[string]any; json.NewDecoder(os.Stdin).Decode(&d); template.Must(template.New("").Parse(d["template"].(string))).Execute(os.Stdout, d) }'
    (tmp_path / "main.go").write_text(program)
    from transformers import AutoTokenizer

    from medibuddy.deploy.parity import fixed_conversations

    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    for messages in fixed_conversations():
        data = json.dumps({"template": template, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]})
        done = subprocess.run(["go", "run", tmp_path / "main.go"], input=data, capture_output=True, text=True, check=True, env=os.environ | {"GOCACHE": str(tmp_path / "cache")})
        assert done.stdout == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def spoil(monkeypatch, change):
    "Convert a changed copy of the merged model instead of the model itself"
    whole = room.convert

    def spoilt(merged, file, kind, converter):
        copy = Path(shutil.copytree(merged, file.parent / "copy"))
        change(copy)
        whole(copy, file, kind, converter)
        shutil.rmtree(copy)

    monkeypatch.setattr(room, "convert", spoilt)


def rewrite(folder, change):
    "Change a merged model's weights"
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def untuned(folder):
    from medibuddy.models.loaders import EMBEDDED_MODEL

    shutil.copyfile(EMBEDDED_MODEL / "model.safetensors", folder / "model.safetensors")


def permuted(folder):
    "Rows of q and k in the other order of rotary embeddings, the classic mistake of a conversion"
    def change(tensors):
        return {name: tensor.view(-1, 2, 32, 256).transpose(1, 2).reshape(tensor.shape).contiguous() if "q_proj" in name or "k_proj" in name else tensor for name, tensor in tensors.items()}

    rewrite(folder, change)


def two_beginnings(folder):
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text(encoding="utf-8"), encoding="utf-8")


def other_template(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<think>\\n", ""), encoding="utf-8")


@needs_llama
@pytest.mark.parametrize(("fault", "reason"), [(untuned, "the tuning is not in it"), (permuted, "differs from the trained model"), (two_beginnings, "beginning-of-sequence tokens|another template"), (other_template, "another template")])
def test_the_gate_refuses(exported, tmp_path, monkeypatch, fault, reason):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    shutil.rmtree(run / "export/q8_0")
    spoil(monkeypatch, fault)
    with pytest.raises(RunError, match=reason):
        export(run, ["q8_0"], llama_cpp=LLAMA_CPP)
    assert not (run / "export/q8_0").exists() and not list((run / "export").glob(".*"))


@needs_llama
def test_an_unknown_rule_of_splitting_words_is_refused(exported, tmp_path, monkeypatch):
    run = Path(shutil.copytree(exported[0], tmp_path / "run"))
    shutil.rmtree(run / "export/q8_0")
    monkeypatch.setattr(room, "name_split", lambda tokenizer: None)
    with pytest.raises(RunError, match="pre-tokenizer was not recognized"):
        export(run, ["q8_0"], llama_cpp=LLAMA_CPP)


def test_without_llama_cpp_it_says_how_to_get_it(tmp_path):
    with pytest.raises(UsageError, match="git clone"):
        room.find_converter(tmp_path)
