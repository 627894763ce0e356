"`medibuddy doctor` and `medibuddy init` as people run them, and what the package carries for them."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, medibuddy

from medibuddy.doctor import read_lock
from medibuddy.recipe import Recipe


def test_copies_in_the_package_are_what_they_copy():
    "To mend: cp constraints.txt medibuddy/ ; cp nbs/recipes/{quickstart,data_exploration,results_analysis}.ipynb medibuddy/project/"
    assert (ROOT / "medibuddy" / "constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()
    copies = sorted((ROOT / "medibuddy" / "project").glob("*.ipynb"))
    assert len(copies) == 3
    for copy in copies:
        assert copy.read_bytes() == (ROOT / "nbs" / "recipes" / copy.name).read_bytes(), copy.name


def test_a_usable_machine(tmp_path):
    done = medibuddy("doctor", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["usable"] and facts["place"] == "plain"
    found = {finding["what"]: finding for finding in facts["findings"]}
    assert {"python", "torch", "transformers", "trl", "peft", "gpu", "disk"} <= set(found)
    assert found["trl"]["found"] == read_lock()["trl"] and found["trl"]["state"] == "ok"


def test_a_wrong_library_is_named_with_the_line_that_mends_it(tmp_path):
    "Another release of trl, as an installation leaves it, in front of the installed one; and Colab's environment"
    facts = tmp_path / "site" / "trl-1.15.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.15.0\n")
    done = medibuddy("doctor", env={"PYTHONPATH": str(tmp_path / "site"), "COLAB_RELEASE_TAG": "release-colab"}, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("problem  trl") and "1.15.0" in lines[0]
    assert lines[1].strip() == f'fix: pip install "trl=={read_lock()["trl"]}"'
    assert "Google Colab" in done.stdout and "not usable yet: 1 problem" in lines[-1]


def test_a_project_works_as_it_is(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("init", "my project", "--json")
    folder = tmp_path / "my project"
    assert status == 0 and sorted(json.loads(out)["files"]) == sorted([".gitignore", "README.md", "data/README.md", "data_exploration.ipynb", "fine_tune.ipynb", "plan.yaml", "recipe.yaml", "results_analysis.ipynb"])
    monkeypatch.chdir(folder)
    assert Recipe.load("recipe.yaml").name == "my project"

    import papermill
    import yaml

    plan = yaml.safe_load(Path("plan.yaml").read_text())
    for notebook in ("data_exploration.ipynb", *plan["notebooks"]):
        known = papermill.inspect_notebook(notebook)
        assert known["recipe"]["default"] == '"recipe.yaml"'
        assert set(plan["parameters"]) | {"seed"} <= set(known) | {"learning_rate"} or notebook == "data_exploration.ipynb"


def test_init_refuses_a_folder_with_content_and_unknown_recipes(call, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("two years of work")
    status, _, err = call("init", tmp_path / "mine")
    assert status == 2 and "thesis.txt" in err and (tmp_path / "mine" / "thesis.txt").read_text() == "two years of work"
    status, _, err = call("init", tmp_path / "new", "--recipe", "qwen-medqe")
    assert status == 2 and "qwen-medqa" in err and not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert call("init", tmp_path / "empty")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "mine"]


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_init_leaves_nothing_under_the_name(tmp_path):
    "Killed at several moments: the folder is whole or not there"
    for moment in (0.0, 0.02, 0.05, 0.1, 0.3, 1, 10):
        process = subprocess.Popen([sys.executable, "-c", f"from medibuddy.commands.project import init; print('go', flush=True); init({str(tmp_path / 'p')!r})"], env=environment(), stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(moment)
        process.kill()
        process.wait()
        if (tmp_path / "p").exists():
            assert len([p for p in (tmp_path / "p").rglob("*") if p.is_file()]) == 8
            break
    else:
        pytest.fail("never finished within ten seconds")


def test_a_full_disk_leaves_no_half_project(tmp_path, monkeypatch):
    import errno

    from medibuddy.commands.project import init
    from medibuddy.run import RunError

    whole, left = Path.write_text, [5]

    def write(path, *args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(RunError, match="No space left"):
        init(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_the_shell_completes_commands_and_options(tmp_path):
    script = Path(sys.executable).parent / "medibuddy"

    def complete(line):
        done = subprocess.run([script], env=environment(_MEDIBUDDY_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split()) - 1)), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert set(complete("medibuddy do")) == {"download", "doctor"}
    assert complete("medibuddy train --rest") == ["--restart"]
    done = subprocess.run([script, "--install-completion", "bash"], env=environment(HOME=str(tmp_path)), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "complete_bash" in next((tmp_path / ".bash_completions").iterdir()).read_text()
