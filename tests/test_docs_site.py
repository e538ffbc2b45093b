"""The pages that are written by programs say what those do, links lead somewhere, and the site builds."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers.paths import ROOT
from test_docs import NOTEBOOKS, PAGES


SITE = runpy.run_path(str(ROOT / "tools" / "docs_site.py"))
LINKING = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "llms.txt"))]


def test_the_page_of_the_command_line_is_what_the_parser_says():
    written = SITE["COMMAND_LINE_PAGE"].read_text(encoding="utf-8")
    assert written == SITE["command_line_page"](), "run `make docs-pages`"


@pytest.mark.parametrize("page", NOTEBOOKS["PAGES"], ids=lambda page: page.stem)
def test_notebook_is_what_its_page_says(page):
    path = NOTEBOOKS["NOTEBOOKS"] / f"{page.stem}.ipynb"
    assert path.read_text(encoding="utf-8") == NOTEBOOKS["notebook_text"](page), "run `make docs-pages`"
    nbformat.validate(nbformat.read(path, as_version=4))


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_local_link_leads_to_a_file(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.is_file(), target  # a directory has no page on the site
        assert not anchor or anchor in slugs(linked), target


def test_every_page_is_in_the_navigation_and_in_the_index_for_language_models():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "llms.txt").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert re.search(rf": {SITE['site_path'](page.relative_to(ROOT))}$", navigation, re.MULTILINE), page
        assert f"({page.relative_to(ROOT)})" in index, page
    for name in SITE["API"]:
        assert f": reference/api/{name}.md\n" in navigation


def test_images_of_the_docs_are_used():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [image.name for image in (ROOT / "docs").rglob("*.png") if image.name not in text]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_web(tmp_path):
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "build", "site", "runs", "wheels", "fixtures", "*.so", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "NO_COLOR": "1"}
    build = [sys.executable, "tools/docs_site.py"]
    process = subprocess.run(build, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "No issues found" in process.stdout + process.stderr
    pages = list((checkout / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe)[^>]* src=\W?http", html), page
        assert not re.search(r"<link[^>]*(?:stylesheet|preconnect)[^>]*http", html), page
    text = (checkout / "site" / "search.json").read_text(encoding="utf-8")
    assert "hf-dino predict" in text and "DinoDetrConfig" in text
