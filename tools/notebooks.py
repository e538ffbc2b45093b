"""Write docs/notebooks from pages of the docs, so that text and code have one home: `make docs-pages`.

A block of Python becomes a cell, commands become a cell of bash, and what is between them becomes text. The first cell
sets the names that a reader changes.
"""

import os
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "detect.md", ROOT / "docs" / "finetune.md")
NOTEBOOKS = ROOT / "docs" / "notebooks"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
NAMES = {"MODEL": "dino-4scale-r50", "OUTPUT": "runs/mine", "DATASET": "mine", "IMAGE": "image.jpg"}
"""Names in the pages, by the environment variable that has them in a notebook."""


def make_notebook(page: Path) -> nbformat.NotebookNode:
    """Return the notebook of a page, without outputs."""
    text, *blocks = BLOCK.split(page.read_text(encoding="utf-8"))
    names = {variable: name for variable, name in NAMES.items() if re.search(_word(name), "".join(blocks))}
    settings = "\n".join(f"os.environ[{variable!r}] = {name!r}" for variable, name in names.items()).replace("'", '"')
    cells = [new_markdown_cell(_relink(text).strip()), new_code_cell(f"import os\n\n# change these names\n{settings}")]
    for language, code, text in zip(blocks[::3], blocks[1::3], blocks[2::3]):
        cells.append(new_code_cell(_with_variables(language, code.rstrip("\n"))))
        cells += [new_markdown_cell(_relink(text).strip())] if text.strip() else []
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def _word(name: str) -> str:
    return rf"(?<![\w./-]){re.escape(name)}(?![\w./-])"


def _with_variables(language: str, code: str) -> str:
    for variable, name in NAMES.items():
        if language == "bash":
            code = re.sub(_word(name), f'"${variable}"', code)
        else:
            code = code.replace(f'"{name}"', f'os.environ["{variable}"]')
    return f"%%script bash -e\n{code}" if language == "bash" else code


def _relink(text: str) -> str:
    """Make the links of a page relative to the notebook."""
    above = os.path.relpath(ROOT / "docs", NOTEBOOKS)
    return re.sub(r"\]\((?!http|#)", f"]({above}/", text)


def notebook_text(page: Path) -> str:
    """Return the content of the notebook's file."""
    return nbformat.writes(make_notebook(page)) + "\n"


def main() -> None:
    """Write the notebooks."""
    NOTEBOOKS.mkdir(exist_ok=True)
    for page in PAGES:
        (NOTEBOOKS / f"{page.stem}.ipynb").write_text(notebook_text(page), encoding="utf-8")


if __name__ == "__main__":
    main()
