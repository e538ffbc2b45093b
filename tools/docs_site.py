"""Write the pages of the docs: `make docs` builds the site, `make docs-pages` the page of the command line.

On GitHub, README.md and docs/ are read as they are. The site has the same pages: they are copied to build/docs, with
the files that they link to, and the API reference is added. Zensical builds the site from there, as mkdocs.yml says.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from hf_dino.cli import app as hf_dino_app


ROOT = Path(__file__).parents[1]
STAGED = ROOT / "build" / "docs"
COMMAND_LINE_PAGE = ROOT / "docs" / "reference" / "command_line.md"
ASSETS = (".png", ".jpg", ".svg", ".gif", ".ipynb")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}

API = {
    "configuration": ("Configuration", ["DinoDetrConfig"]),
    "model": (
        "Model",
        [
            "modeling_dino_detr.DinoDetrModel",
            "modeling_dino_detr.DinoDetrForObjectDetection",
            "query_selection_dino_detr",
            "denoising_dino_detr",
            "deformable_attention_dino_detr",
        ],
    ),
    "outputs": (
        "Outputs",
        [
            "modeling_dino_detr.DinoDetrObjectDetectionOutput",
            "modeling_dino_detr.DinoDetrModelOutput",
            "modeling_dino_detr.DinoDetrDenoisingOutput",
        ],
    ),
    "image_processor": (
        "Image processor",
        [
            "image_processing_dino_detr.DinoDetrImageProcessor",
            "image_processing_dino_detr.DinoDetrImageProcessorPil",
            "image_processing_dino_detr.DinoDetrImageProcessorMixin",
        ],
    ),
    "loss": ("Loss", ["loss_dino_detr"]),
    "data": ("Data", ["data"]),
    "family": ("The family", ["family", "detectors"]),
    "training": ("Training", ["training"]),
    "comparison": ("Comparison", ["compare"]),
    "evaluation": ("Evaluation", ["evaluation"]),
    "inference": ("Inference", ["inference"]),
    "drawing": ("Drawing", ["visualization"]),
    "inspection": ("Inspection", ["inspection"]),
    "export": ("Export", ["export", "exported"]),
    "conversion": ("Conversion", ["conversion"]),
    "hub": ("Model folders and the Hub", ["hub", "model_info", "model_card"]),
}
"""Pages of the API reference: title, and modules and objects of hf_dino, whose docstrings are shown."""


def stage() -> None:
    """Write the pages of the site to build/docs, and everything that they link to."""
    shutil.rmtree(STAGED, ignore_errors=True)
    found = [Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    found += sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
    for path in found:  # grows by what the pages link to
        found += [link for link in _stage(path) if link not in found]
    shutil.copy(ROOT / "docs" / "site.css", STAGED)
    for name, (title, objects) in API.items():
        references = "".join(f"::: hf_dino.{each}\n\n" for each in objects)
        _write(Path("reference/api") / f"{name}.md", f"# {title}\n\n{references}")


def site_path(path: Path) -> Path:
    """Return the path of a file of the repository on the site: docs/ is its root, and source code has a page."""
    if path.name == "README.md":
        return path.with_name("index.md")
    page = path if path.suffix in (".md", *ASSETS) else path.with_name(f"{path.name}.md")
    return page.relative_to("docs") if page.parts[0] == "docs" else page


def _stage(path: Path) -> list[Path]:
    """Copy a file of the repository to its place on the site, and return the files that it links to."""
    source = ROOT / path
    links: list[Path] = []

    def rewrite(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match[1].partition("#")
        linked = Path(os.path.normpath(path.parent / target))
        if not target or not (ROOT / linked).is_file():
            return match[0]
        links.append(linked)
        return f"]({os.path.relpath(site_path(linked), site_path(path).parent)}{hash_sign}{anchor})"

    if path.suffix in ASSETS:
        (STAGED / site_path(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, STAGED / site_path(path))
    elif path.suffix == ".md":
        _write(site_path(path), re.sub(r"\]\(([^)\s]+)\)", rewrite, source.read_text(encoding="utf-8")))
    else:
        code = f"````{LANGUAGES.get(path.suffix, 'text')}\n{source.read_text(encoding='utf-8')}````\n"
        _write(site_path(path), f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{code}")
    return links


def _write(path: Path, text: str) -> None:
    target = STAGED / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")


def command_line_page() -> str:
    """Return the page of all commands with their options, as the parser has them."""
    group = typer.main.get_command(hf_dino_app)
    sections = [_command_section(name, command) for name, command in _commands(group, "hf-dino")]
    head = (
        "# Command line\n\n<!-- written by `make docs-pages`; do not edit -->\n\n"
        "`hf-dino COMMAND --help` prints the same, and `python -m hf_dino` is the same command. `--a-b` and `--a_b`\n"
        "are the same option; a list takes its values after one another, as in `--classes person car`.\n\n"
    )
    return head + "\n".join(sections)


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _command_section(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join([name, *command.collect_usage_pieces(context)]).replace("{", "").replace("}", "")
    parameters = [each for each in command.get_params(context) if each.name != "help"]
    parameters.sort(key=lambda each: each.param_type_name)
    rows = ["| option | | default, range |\n|---|---|---|\n"]
    for heading, options in groupby(parameters, key=lambda each: getattr(each, "rich_help_panel", None)):
        rows += [f"| **{heading}** | | |\n"] if heading else []
        rows += [_row(each, context) for each in options]
    help = re.sub(r"(?<![`\w-])(--\w+)(?![^`\n]*`)", r"`\1`", inspect.cleandoc(command.help))
    return f"## {name}\n\n```text\n{usage}\n```\n\n{help}\n\n{''.join(rows)}"


def _row(parameter: Any, context: Any) -> str:
    names, help = parameter.get_help_record(context)
    if parameter.param_type_name == "argument":
        names = names.partition(" <")[0]
    names, _, choices = names.partition(" <")
    text, _, note = help.partition("  [")
    text, _, default = text.partition(" Default: ")
    value = f" One of {choices.rstrip('>').replace('|', ', ')}." if choices else ""
    spelled = "<br>".join(f"`{each}`" for each in re.split(", | / ", names))
    return f"| {spelled} | {text}{value} | {default.rstrip('.')}{note.removesuffix(']')} |\n".replace("default: ", "")


def main(pages: bool = False) -> None:
    """Build the site into site/; with --pages, only write the page of the command line in docs/."""
    if pages:
        COMMAND_LINE_PAGE.write_text(command_line_page(), encoding="utf-8")
        return
    stage()
    build = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    process = subprocess.run(build, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(process.stderr)
    raise typer.Exit(process.returncode or int("griffe:" in process.stderr))  # its warnings about docstrings count too


if __name__ == "__main__":
    typer.run(main)
