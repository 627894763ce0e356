"The recipe notebooks as people run them: papermill's command line, another folder, no network, wrong parameters, a killed kernel."

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import psutil
import pytest
from conftest import ROOT, environment, pubmedqa_rows
from test_offline import BLOCKER

from medibuddy.notebooks.parameters import INJECTED, TAGGED, assigned_names, read_parameters
from medibuddy.recipe import SECTION_OF, Recipe
from medibuddy.run import UsageError

FOLDER = ROOT / "nbs" / "recipes"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
TRAINING = ["medibuddy_assistant", "deepseek_r1_cot", "pubmedqa_llama3", "healthcaremagic_llama31", "quickstart"]  # one run each


def cells_of(name: str) -> list:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells


def tagged_cell(name: str):
    (cell,) = [cell for cell in cells_of(name) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def defaults(name: str) -> dict:
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(tagged_cell(name).source).body}


def papermill(notebook: Path, folder: Path, *options, wait: bool = True, **env):
    "Run a notebook in a folder of its own with papermill's command line and blocked sockets; it saves NAME.out.ipynb there"
    site = folder / ".site"
    site.mkdir(parents=True, exist_ok=True)
    # the kernel's messages go through ZeroMQ, not through Python's sockets, so only the network is gone
    (site / "sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), f"{notebook.stem}.out.ipynb", *map(str, options)]
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, cwd=folder, env=environment(PYTHONPATH=path, **env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def outputs_of(folder: Path, name: str) -> list:
    return [output for cell in nbformat.read(folder / f"{name}.out.ipynb", as_version=4).cells for output in cell.get("outputs", [])]


def shown(folder: Path, name: str) -> str:
    "Everything that a saved notebook shows, as text"
    outputs = outputs_of(folder, name)
    return "".join(output.get("text", "") + "".join(output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/markdown", "text/html")) for output in outputs)


def pictures(folder: Path, name: str) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(folder, name))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list:
    "Options that make a run of seconds: two dozen rows, a few steps, short answers"
    rows = tmp_path_factory.mktemp("rows") / "rows.json"
    rows.write_text(json.dumps(pubmedqa_rows()), encoding="utf-8")
    return ["-p", "source", "pubmedqa", "-p", "path", rows, "-p", "test_fraction", 0.3, "-p", "max_new_tokens", 12, "-p", "max_steps", 3]


def longer(options: list) -> list:
    "A training long enough to be killed in"
    return [*options, "-p", "max_steps", 12, "-p", "checkpoint_every", 2]


# What every notebook has, read without running it


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_header_badge_install_and_clean(name):
    cells = cells_of(name)
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert f"colab.research.google.com/github/medibuddy/medibuddy/blob/main/nbs/recipes/{name}.ipynb" in cells[0].source
    for row in ("| Task |", "| Data and licence |", "| Memory |", "| Minutes on T4 and A100 |", "| Command |"):
        assert row in cells[0].source, row
    assert f"papermill {name}.ipynb" in cells[0].source and "Never for care" in cells[0].source
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert "welcome()" in code[0].source and "pip" in code[0].source
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "outputs are not committed"
    assert re.search(r"show_(run|runs|splits|table)\(", code[-1].source), "ends with the comparison"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_library_calls_only(name):
    for cell in cells_of(name):
        if cell.cell_type == "code":
            assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            assert len(cell.source.split("\n")) <= 16


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_are_the_recipes_and_the_comments_say_its_values(name):
    source = tagged_cell(name).source
    assert source.startswith(TAGGED) and not source.split("\n")[0].strip() == INJECTED
    names = assigned_names(source)
    assert len(names) == len(set(names)) == len(source.split("\n")) - 1, "one parameter a line"
    assert "recipe" in names
    recipe = Recipe.load(defaults(name)["recipe"]).to_dict()
    for line in source.split("\n")[1:]:
        key, comment = re.match(r"(\w+) = [^#]*# (.*)", line).groups()
        if key in SECTION_OF and line.startswith(f"{key} = None") and key not in ("path", "source"):
            value = recipe[SECTION_OF[key]][key]
            assert comment.split()[0].rstrip(";") == ("null" if value is None else json.dumps(value) if isinstance(value, str) else repr(value)), line
    own = [key for key in names if key not in SECTION_OF]
    read = next(cell.source for cell in cells_of(name) if "read_parameters(" in cell.source and "import" not in cell.source)
    assert all(key in ("recipe", "model", "run_dir") or f'"{key}"' in read for key in own), own


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_runs_before_the_parameters_are_checked(name):
    code = [cell for cell in cells_of(name) if cell.cell_type == "code"]
    assert "welcome()" in code[0].source and "parameters" in code[1].metadata.get("tags", [])
    assert all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code[2].source).body)
    assert code[3].source.startswith("given = read_parameters(") or "read_parameters(" in code[3].source.split("\n")[0]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_text_for_review_and_back(name):
    "jupytext's text, as CONTRIBUTING.md makes it, holds everything that a notebook holds"
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    again = jupytext.reads(jupytext.writes(notebook, fmt="py:percent"), fmt="py:percent")
    assert [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in again.cells] == [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in notebook.cells]


@pytest.mark.parametrize("name", TRAINING)
def test_recipes_share_their_cells(name):
    code = [[cell.source for cell in cells_of(notebook) if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])] for notebook in (name, "quickstart")]
    assert code[0] == code[1]


# Wrong parameters


def test_an_unknown_name_fails_before_anything_runs(tmp_path):
    status, output = papermill(FOLDER / "deepseek_r1_cot.ipynb", tmp_path, "-p", "recipe", "tiny", "-p", "learning_rte", "2e-4")
    assert status == 1 and "Did you mean `learning_rate`?" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("given, message", [({"r": 0}, "rank of at least 1"), ({"learning_rate": "fast"}, "a number"), ({"seed": -1}, "train.seed"), ({"targest": ["q_proj"]}, "targets"), ({"recipe": "tinny"}, "tiny")])
def test_values_out_of_range_are_refused_by_every_notebook(name, given, message):
    call = next(node for cell in cells_of(name) if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "read_parameters")
    injected = INJECTED + "\n" + "\n".join(f"{key} = {value!r}" for key, value in given.items())
    read = eval(f"lambda history, values: read_parameters({', '.join([ast.unparse(part) for part in call.args + call.keywords] + ['history=history', 'values=values'])})", {"read_parameters": read_parameters})
    with pytest.raises(UsageError, match=message):
        read([tagged_cell(name).source, injected], defaults(name) | given)
    assert read([tagged_cell(name).source], defaults(name)).recipe.name


# Outputs


def test_secrets_and_names_do_not_get_into_the_saved_notebook(tmp_path):
    key = "hf_" + "Zq7" * 10
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (
        "from medibuddy.notebooks.outputs import guard_outputs\nassert guard_outputs() and guard_outputs()",
        "import os, sys\nprint('token', os.environ['HF_TOKEN'], 'and', 'hf_' + 'Zq7' * 10)\nprint('mail jane.roe' + '@example.org', file=sys.stderr)",
        "from IPython.display import HTML, display\ndisplay(HTML('<b>call 555-867-' + '5309</b>'))",
        "'born 12 March' + ' 1961, 5 mg daily'",
        "raise ValueError('no access with ' + os.environ['HF_TOKEN'])",
    )])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(notebook, tmp_path / "leaky.ipynb")
    status, output = papermill(tmp_path / "leaky.ipynb", tmp_path, HF_TOKEN="correct-horse-battery")
    saved = (tmp_path / "leaky.out.ipynb").read_text(encoding="utf-8")
    assert status == 1
    for secret in ("correct-horse-battery", key, "jane.roe@example.org", "867-5309", "12 March 1961"):
        assert secret not in saved and secret not in output, secret
    for kind in ("[SECRET]", "[EMAIL]", "[PHONE]", "[DATE]", "5 mg daily", "ValueError"):
        assert kind in saved, kind


def test_a_secret_as_a_parameter_is_refused(tmp_path):
    cell = tagged_cell("quickstart").source
    with pytest.raises(UsageError, match="environment"):
        read_parameters(history=[cell, "# Parameters\nrun_dir = '...'"], values=defaults("quickstart") | {"run_dir": "hf_" + "a" * 30})


# To the end


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small) -> Path:
    "The quickstart, from its first cell to its last"
    folder = tmp_path_factory.mktemp("a folder with spaces")
    status, output = papermill(FOLDER / "quickstart.ipynb", folder, *longer(small))
    assert status == 0, output[-3000:]
    return folder


def only_run(folder: Path) -> Path:
    (run,) = [path for path in (folder / "runs").iterdir() if path.is_dir()]
    return run


def test_the_quickstart_ends_with_the_comparison(undisturbed):
    text = shown(undisturbed, "quickstart")
    assert "recipe tiny with" in text and "verdict:" in text and ": verified," in text and "Never for care" in text
    assert pictures(undisturbed, "quickstart") >= 3 and (only_run(undisturbed) / "report.html").exists()
    assert only_run(undisturbed).name.startswith("tiny-")


def kill_kernel(process: subprocess.Popen, ready, seconds: float = 200) -> int:
    "Kill papermill's kernel without warning once `ready()`; returns papermill's exit status"
    until = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < until, "papermill ended before its kernel could be killed"
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return process.returncode


def test_a_killed_kernel_goes_on_where_it_was(undisturbed, small, tmp_path):
    options = longer(small)
    process = papermill(FOLDER / "quickstart.ipynb", tmp_path, *options, wait=False)
    assert kill_kernel(process, lambda: any(tmp_path.glob("runs/*/checkpoints/checkpoint-4"))) != 0
    assert not list(tmp_path.glob("runs/*/adapter/*.safetensors")), "the kernel was killed after its training"
    status, output = papermill(FOLDER / "quickstart.ipynb", tmp_path, *options)
    assert status == 0, output[-3000:]
    assert "in this session" in shown(tmp_path, "quickstart")
    manifests = [json.loads((only_run(folder) / "manifest.json").read_text()) for folder in (undisturbed, tmp_path)]
    assert manifests[0]["stages"]["train"]["resumed_at_step"] == 0 < manifests[1]["stages"]["train"]["resumed_at_step"]
    for name in ("adapter/adapter_model.safetensors", "comparison.json", "generations/tuned.jsonl"):
        if name.endswith("jsonl"):  # each answer carries the seconds it took
            rows = [[json.loads(line)["text"] for line in (only_run(folder) / name).read_text().splitlines()] for folder in (undisturbed, tmp_path)]
            assert rows[0] == rows[1]
        else:
            assert manifests[0]["files"][name]["sha256"] == manifests[1]["files"][name]["sha256"], name


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "quickstart"])
def test_each_recipe_notebook_runs_to_the_end(name, undisturbed, small):
    "Their cells are the quickstart's (see above), so its finished run serves them too: the same values in the same folder"
    status, output = papermill(FOLDER / f"{name}.ipynb", undisturbed, "-p", "recipe", "tiny", *longer(small))
    assert status == 0, output[-3000:]
    assert "verdict:" in shown(undisturbed, name) and ": verified," in shown(undisturbed, name) and pictures(undisturbed, name) >= 3
    assert only_run(undisturbed).name.startswith("tiny-")


def test_lora_and_qlora_side_by_side(small, tmp_path):
    from importlib.util import find_spec

    status, output = papermill(FOLDER / "qwen_medqa.ipynb", tmp_path, "-p", "recipe", "tiny", *small)
    assert status == 0, output[-3000:]
    text, runs = shown(tmp_path, "qwen_medqa"), sorted(run.name.split("-")[1] for run in (tmp_path / "runs").iterdir())
    if find_spec("bitsandbytes"):
        assert runs == ["lora", "qlora"] and "qlora-" in text and "p, adjusted for all pairs" in text
    else:
        assert runs == ["lora"] and "QLoRA is left out: bitsandbytes is not installed" in text


def test_many_runs_killed_between_two_of_them(small, tmp_path):
    options = [*small, "-y", "seeds: [1, 2]"]
    process = papermill(FOLDER / "compare_many_runs.ipynb", tmp_path, *options, wait=False)
    assert kill_kernel(process, lambda: any(tmp_path.glob("runs/*/report.html")) and len(list(tmp_path.glob("runs/*"))) == 2) != 0
    (first,) = [page.parent for page in tmp_path.glob("runs/*/report.html")]
    before = (first / "manifest.json").read_bytes()
    status, output = papermill(FOLDER / "compare_many_runs.ipynb", tmp_path, *options)
    assert status == 0, output[-3000:]
    assert (first / "manifest.json").read_bytes() == before, "a finished run is not done again"
    text = shown(tmp_path, "compare_many_runs")
    assert text.count(": verified,") == 2 and "Over 2 runs and" in text and "p, adjusted for all pairs" in text and "not shown" in text


def test_results_analysis_takes_up_a_finished_run(undisturbed, small):
    "The same values in the same folder are the same run, so nothing is trained again"
    before = (only_run(undisturbed) / "manifest.json").read_bytes()
    status, output = papermill(FOLDER / "results_analysis.ipynb", undisturbed, "-p", "recipe", "tiny", *longer(small))
    assert status == 0, output[-3000:]
    text = shown(undisturbed, "results_analysis")
    assert ": verified," in text and "Every measure" in text and "one run" in text and pictures(undisturbed, "results_analysis") >= 3
    assert (only_run(undisturbed) / "manifest.json").read_bytes() == before


def test_data_exploration_of_a_file(small, tmp_path):
    status, output = papermill(FOLDER / "data_exploration.ipynb", tmp_path, "-p", "recipe", "tiny", *small[:9], "-p", "rows_shown", 1)
    assert status == 0, output[-3000:]
    assert "answered yes" in shown(tmp_path, "data_exploration") and pictures(tmp_path, "data_exploration") >= 4


def test_a_conversation(undisturbed, tmp_path):
    pytest.importorskip("medibuddy.chat.session", reason="this installation has no chat")
    options = ["-p", "recipe", "tiny", "-p", "finished_run", only_run(undisturbed), "-p", "max_new_tokens", 12]
    status, output = papermill(FOLDER / "chat.ipynb", tmp_path, *options)
    assert status == 0, output[-3000:]
    (transcript,) = only_run(undisturbed).parent.glob("*-chat.jsonl")
    assert sum(json.loads(line)["role"] == "user" for line in transcript.read_text().splitlines()) == 3
    text = shown(tmp_path, "chat")
    assert "This may be an emergency" in text and "Is ibuprofen used for fever?" in text and "| You | Tuned | Base |" in text
    transcript.unlink()
