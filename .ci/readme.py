"""Make README.md from nbs/index.ipynb (nbdev's own way needs Quarto, which is not everywhere).

python .ci/readme.py          writes README.md
python .ci/readme.py --check  says whether README.md is what the notebook gives
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "<!-- Made from nbs/index.ipynb by .ci/readme.py; edit the notebook, not this file. -->\n\n"


def render() -> str:
    "Render the notebook as Markdown: hidden cells left out, directives removed"
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    cells = []
    for cell in notebook.cells:
        directives = re.findall(r"^#\|\s*(\w+)", cell.source, re.M) if cell.cell_type == "code" else []
        if "hide" in directives:
            continue
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            cell.outputs = []
        cells.append(cell)
    notebook.cells = cells
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    # image paths are relative to nbs/ in the notebook and to the top level in README.md
    text = re.sub(r"\]\(images/", "](nbs/images/", text)
    return NOTICE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    "Write README.md, or compare it"
    path, text = ROOT / "README.md", render()
    if "--check" not in sys.argv:
        path.write_text(text, encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return 0
    print("README.md is not what nbs/index.ipynb gives; run: python .ci/readme.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
