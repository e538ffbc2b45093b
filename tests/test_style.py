"""The words of the project are those of the field, and its imports run one way."""

import ast
import re
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "hf_dino"
TEXTS = (".py", ".md", ".yaml", ".toml", ".html", ".h", ".cuh", ".cu", ".cpp", ".sh", ".json")
FORBIDDEN = {
    r"[Pp]ictures?|\w*PICTURES?\w*|\w*_pictures?(?:_\w+)?": "image",
    r"[Dd]ata sets?|data_set": "dataset",
    r"the original's|the original (?:code|authors?|recipe|config\w*)": "the official implementation",
    r"anew|whence|thereby|wherefore|drawn again": "again, reinitialized, sampled again",
    r"shar(?:e|ed|es|ing) out|shared-out": "shard, split",
    r"[Ss]ee that|[Ss]ays? whether": "check that, return whether",
    r"[Tt]here is no such": "X not found",
    r"nobody|everybody|somebody": "the process, the user",
    # transformers writes American English
    r"\w*(?:[Cc]entre[sd]?|[Cc]olour\w*|[Bb]ehaviour\w*|[Nn]eighbour\w*|[Ff]avour\w*)": "-er, -or",
    r"\w*(?:[Nn]ormal|[Ii]nitial|[Rr]ecogn|[Oo]ptim|[Oo]rgan)is(?:e|ed|es|er|ers|ing|ation)": "-ize",
    r"\w*(?:[Ss]erial|[Gg]eneral|[Ll]ocal|[Ss]ummar)is(?:e|ed|es|ing|ation)|[Aa]nalys(?:e|ed|ing)": "-ize, -yze",
    r"\w*[Ll]icence\w*|[Gg]rey\w*|[Ll]abelled|[Cc]ancelled|[Aa]rtefact\w*": "license, gray, labeled, artifact",
}
THIS = Path(__file__).name


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    paths = (ROOT / name for name in listed.stdout.splitlines() if Path(name).name != THIS)
    return [path for path in paths if path.suffix in TEXTS and path.is_file() and "fixtures" not in path.parts]


@pytest.mark.parametrize("pattern", FORBIDDEN, ids=FORBIDDEN.values())
def test_words_of_the_vocabulary(pattern):
    forbidden = re.compile(rf"(?<![\w-])(?:{pattern})(?!\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert not found, f"write {FORBIDDEN[pattern]!r}:\n" + "\n".join(found)


def test_docstrings_begin_with_what_is_done():
    found = []
    for path in tracked_files():
        if path.suffix != ".py" or "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = text.split()[0]
                if first in ("What", "Say", "See", "Whether", "How", "Where", "Who", "Which"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {first}")
    assert not found, "begin with a verb:\n" + "\n".join(found)


# A module imports from its own rank or an earlier one; single files stand with the folder that their place names.
RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            ("core", "family", "registration"),
            ("utils", "visualization"),
            ("kernels",),
            ("data", "detectors", "backbone_weights", "hub", "model_card", "publishing", "__init__"),
            ("conversion",),
            ("evaluation", "inference", "model_info", "exported"),
            ("export", "inspection"),
            ("demo",),
            ("training", "training_arguments"),
            ("compare",),
            ("cli", "__main__"),
        ]
    )
    for name in names
}
# inside `try:`; a model folder without the package has no kernel
OPTIONAL = {("deformable_attention_dino_detr", "kernels")}


def rank(module: str) -> int:
    """Rank of a module below hf_dino, given as a dotted name."""
    name = module.split(".")[0]
    return RANKS["core" if name.endswith("_dino_detr") else name]


def imported_modules(path: Path) -> set[str]:
    """Modules below hf_dino that a file imports, wherever in it, as dotted names."""
    here = list(path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            found.add(".".join([*base, node.module or node.names[0].name]))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_dino."):
            found.add(node.module.removeprefix("hf_dino."))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    later = [name for name in imported_modules(path) if rank(name) > rank(module) and (module, name) not in OPTIONAL]
    assert not later, f"{module} must not import {later}"


def test_modules_are_few_and_well_filled():
    around_the_core = [path for path in PACKAGE.rglob("*.py") if not path.stem.endswith("_dino_detr")]
    modules = [path for path in around_the_core if path.name not in ("__init__.py", "__main__.py")]
    assert len(modules) <= 100
    assert not [path.name for path in modules if len(path.read_text(encoding="utf-8").splitlines()) < 40]
