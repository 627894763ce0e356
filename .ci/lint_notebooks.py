"""What nbdev does not check: directives it would silently ignore, cells that mix imports with code, secrets in outputs.

python .ci/lint_notebooks.py [NOTEBOOK ...]   all notebooks under nbs/ without arguments
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# `#| gpu` (undeclared) would run, `#| hide,` (a typo) would be ignored: both without a word
DIRECTIVES = {"default_exp", "export", "exporti", "hide", "eval", "slow", "cuda", "net"}
SECRET = re.compile(r"hf_[A-Za-z0-9]{20,}|wandb_v1_\w{10,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY")
LONGEST_EXPORT = 60  # lines


def directive_problems(source: str):
    "Directives that nbdev does not know, misspelt ones, and `eval: false` without a reason"
    lines = source.split("\n")
    for number, line in enumerate(lines):
        if re.match(r"\s*#\s*\|", line):
            match = re.fullmatch(r"#\|\s*([\w-]+)(?:\s*:\s*(\S+)|\s+(\S.*))?\s*", line)
            if not match or match.group(1) not in DIRECTIVES:
                yield f"directive `{line.strip()}` is not one of {', '.join(sorted(DIRECTIVES))}"
            elif match.group(1) == "eval" and not (match.group(2) == "false" and lines[number + 1 : number + 2] and lines[number + 1].startswith("# ")):
                yield "`eval` must be `#| eval: false` with a comment below it that says why"


def code_problems(source: str):
    "Exported cells that are too long, star imports, imports beside other code"
    code = "\n".join(line for line in source.split("\n") if not line.startswith("%") and not line.startswith("!"))
    exported = re.search(r"^#\|\s*exporti?\b", source, re.M)
    if exported and len(source.split("\n")) > LONGEST_EXPORT:
        yield f"exported cell of {len(source.split(chr(10)))} lines; the limit is {LONGEST_EXPORT}"
    try:
        body = ast.parse(code).body
    except SyntaxError as error:
        yield f"does not parse: {error}"
        return
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if exported and any(alias.name == "*" for node in imports for alias in node.names):
        yield "an exported cell imports *"
    closing = any("nbdev_export" in ast.unparse(node) for node in body)
    if imports and len(imports) < len(body) and not closing and (exported or not re.search(r"^#\|\s*hide\b", source, re.M)):
        yield "imports share a cell with other code (documentation builds run import cells)"


def problems(path: Path):
    "Everything wrong with one notebook"
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        yield f"not valid JSON: {error}"
        return
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if SECRET.search(source + json.dumps(cell.get("outputs", []))):
            yield f"cell {number}: looks like a secret"
        if cell["cell_type"] == "code":
            for text in (*directive_problems(source), *code_problems(source)):
                yield f"cell {number}: {text}"


def main() -> int:
    "Lint the notebooks named, or all"
    paths = [Path(p) for p in sys.argv[1:]] or sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    found = [f"{path}: {text}" for path in paths for text in problems(path)]
    print("\n".join(found) or f"{len(paths)} notebooks linted")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
