"What the documentation says about commands, options, files and messages is so; what can be checked without Quarto is."

import json
import re
import shlex

import pytest
import yaml
from conftest import ROOT

from medibuddy.recipe import PRESETS, SECTION_OF

TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *NOTEBOOKS]
TOLD = [page for page in PAGES if page.suffix == ".md" or page.parent.name in ("tutorials", "recipes", "nbs")]  # pages that tell a reader what to type


def cells(path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def text_of(path) -> str:
    return path.read_text(encoding="utf-8") if path.suffix != ".ipynb" else "\n\n".join(cells(path, "markdown"))


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


# Links


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            assert target.startswith("https://"), target
            inside = re.search(r"github(?:usercontent)?\.com/(?:github/)?medibuddy/medibuddy/(?:blob|tree|raw)/main/([^)#]+)", target)
            assert not inside or (ROOT / inside[1]).exists(), target
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in [slug(line.lstrip("# ")) for line in text_of(found).split("\n") if line.startswith("#")], target


# Commands


def commands_in(text: str) -> list[list[str]]:
    "Every `medibuddy ...` in code, as words: fenced blocks, indented blocks, and inline code"
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text, flags=re.S)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
    lines += [line.strip() for line in rest.split("\n") if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", rest)
    found = []
    for line in lines:
        line = re.sub(r"\s+#\s.*", "", line.strip().removeprefix("$ ").removeprefix("#").strip())
        for part in line.split(" && "):
            match = re.match(r"(?:\S*/)?(?:python3? -m )?medibuddy (?=[a-z-])(.*)", part)
            if match:
                found.append(shlex.split(match[1].replace("...", "")))
    return found


@pytest.fixture(scope="module")
def helps():
    "Command -> the options that its --help shows, with the number of values that each takes"
    from importlib import import_module
    from pkgutil import iter_modules

    from typer.testing import CliRunner

    import medibuddy.commands
    from medibuddy.cli import app

    for module in iter_modules(medibuddy.commands.__path__):
        import_module(f"medibuddy.commands.{module.name}")
    runner, found = CliRunner(), {}
    listed = re.findall(r"^  ([a-z][\w-]*)  ", runner.invoke(app, ["--help"]).stdout.split("Commands:")[1], flags=re.M)
    assert "train" in listed and "doctor" in listed and "init" in listed
    for command in listed:
        text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
        found[command] = {name: bool(value) for name, value in re.findall(r"^  (--[\w-]+)( [A-Z<\[]\S*)?", text, flags=re.M)}
    found[""] = {"--install-completion": False, "--show-completion": False, "--help": False}
    return found


def check_command(words: list[str], helps: dict) -> int:
    "Assert that a command could be typed; returns how many options were looked at"
    command = "" if words[0].startswith("--") else words[0]
    assert command in helps, f"there is no `medibuddy {command}`"
    options, seen = helps[command], 0
    for number, word in enumerate(words):
        if word.startswith("--"):
            assert word in options, f"`medibuddy {command}` has no {word}"
            value = words[number + 1] if options[word] and number + 1 < len(words) else None
            seen += 1
            if word == "--set" and value:
                key = value.partition("=")[0].rpartition(".")[2]
                assert "=" in value and (key in SECTION_OF or key == "key"), f"--set {value}: no such recipe key"
            if word == "--recipe" and value and "." not in value and not value.isupper() and value != "R":
                assert (PRESETS / f"{value}.yaml").exists(), f"--recipe {value}: no such preset"
    return seen


def test_the_check_of_commands_finds_misspelt_ones(helps):
    for wrong in ("trian --run r", "train --rnu r", "train --run r --set learning_rte=1", "plan --recipe tini", "doctor --jsno"):
        with pytest.raises(AssertionError):
            check_command(wrong.split(), helps)
    assert check_command("train --run r --set learning_rate=1 --recipe tiny".split(), helps) == 3
    assert commands_in("a `medibuddy plan --gpu T4`\n\n```bash\nmedibuddy train \\\n  --run r   # why\n```\n") == [["train", "--run", "r"], ["plan", "--gpu", "T4"]]


@pytest.mark.parametrize("path", TOLD, ids=name_of)
def test_commands_are_spelt_as_their_help_says(path, helps):
    for words in commands_in(text_of(path)):
        check_command(words, helps)


def test_commands_in_recipes_and_messages(helps):
    seen = 0
    for path in PRESETS.glob("*.yaml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.match(r"#\s+medibuddy ", line):
                seen += 1
                check_command(shlex.split(line.lstrip("# ").removeprefix("medibuddy ")), helps)
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == path.stem
    assert seen >= 6


def test_every_command_is_in_the_documentation(helps):
    told = {words[0] for path in TOLD for words in commands_in(text_of(path)) if words}
    missing = {command for command in helps if command} - told - {"harness"}
    assert not missing, f"no page shows {', '.join(sorted(missing))}"


def test_papermill_lines_name_notebooks_and_parameters_that_exist():
    import papermill

    seen = 0
    for path in TOLD:
        for name, options in re.findall(r"papermill (?:nbs/recipes/)?(\w+)\.ipynb \S+((?: -[py] [^`\n]*)?)", text_of(path)):
            notebook = ROOT / "nbs" / "recipes" / f"{name}.ipynb"
            assert notebook.exists(), name
            known = set(papermill.inspect_notebook(str(notebook))) | set(SECTION_OF)
            for key in re.findall(r"-p (\w+) ", options + " ") + re.findall(r"-y '(\w+):", options):
                seen += 1
                assert key in known, f"{name} has no parameter {key}"
    assert seen >= 4


# Cells


def test_every_cell_of_a_tutorial_is_executed():
    assert len(TUTORIALS) >= 6
    for path in TUTORIALS:
        assert not any((folder / ".notest").exists() for folder in path.parents if ROOT in folder.parents)
        code = cells(path, "code")
        assert code and not any("eval: false" in source for source in code), path


# Messages


def test_messages_that_troubleshooting_quotes_are_the_programs():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "medibuddy").rglob("*.py"))
    source += "No space left on device Kernel died"  # the operating system's and papermill's
    rows = [line for line in text_of(ROOT / "nbs" / "tutorials" / "06_troubleshooting.ipynb").split("\n") if line.startswith("| ") and "You see" not in line]
    assert len(rows) >= 25
    for row in rows:
        quoted = re.findall(r"`([^`]+)`", row.split(" | ")[0])
        assert quoted, row
        for message in quoted:
            assert message.strip("[]") in source, f"no message says {message!r}"


# The site


def test_the_site_is_built_from_what_is_there():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yaml").read_text(encoding="utf-8"))
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any("nbdev_docs" in step for step in steps)
    for pattern in re.findall(r"(?:tests/\w+\.py|nbs/\S+\.ipynb)", "\n".join(steps)):
        assert list(ROOT.glob(pattern)), pattern
    assert (ROOT / "nbs" / "styles.css").exists()  # nbdev's Quarto settings name it
    for page in TUTORIALS:
        first = cells(page, "markdown")[0]
        assert first.startswith("# ") and "\n> " in first, "a title and a line below it, which the site shows as its description"
