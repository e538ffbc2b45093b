"""Packaging: metadata, dependencies with reasons, and a setup command that explains and repairs its failures."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

needs_shell = pytest.mark.skipif(not shutil.which("sh") or not shutil.which("make"), reason="needs sh and make")


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "tools/setup.sh", ".venv"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def only_command(folder: Path, name: str, script: str) -> None:
    """Put an executable shell script into `folder`, made to stand in for a program."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the two files that the setup command reads."""
    folder = tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "setup.sh", folder / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Make the only folder on the PATH: the tools of any POSIX system, a Python that installs nothing, and no uv."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "cat", "cksum", "dirname", "fold", "mkdir", "mv", "rm", "touch", "cp", "chmod"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    # `python -m venv DIR` copies this script; `-m pip install` fails when FAIL is set and otherwise writes a line
    only_command(
        folder,
        "python3",
        f"""
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "{folder}/python3" "$3/bin/python" ;;
    "-m pip install"*) [ -z "$FAIL" ] && echo installed >>install.log ;;
    "-m "*) ;;
    *) exec "{sys.executable}" "$@" ;;
esac""",
    )
    return folder


def test_installed_metadata_matches() -> None:
    try:
        version = metadata.version("hf-dino")
    except metadata.PackageNotFoundError:
        pytest.skip("hf_dino runs from the checkout without being installed")
    assert f'version = "{version}"' in PYPROJECT


def test_package_says_it_is_typed() -> None:
    assert (ROOT / "src" / "hf_dino" / "py.typed").is_file()


def test_every_dependency_has_a_reason() -> None:
    section = PYPROJECT.split("[project.optional-dependencies]")[0].split("dependencies = [")[1]
    lines = [line for line in section.splitlines() if line.strip().startswith('"')]
    assert len(lines) >= 3
    assert not [line for line in lines if not re.search(r'",\s+# \S', line)]


# packages that are imported under another name than that of the distribution
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}


def requirements(section: str) -> set[str]:
    """Return the names of the packages in one list of the project file."""
    lines = PYPROJECT.split(f"\n{section} = [\n")[1].split("\n]")[0]
    return set(re.findall(r'^ +"([\w.-]+)[<>=]', lines, re.MULTILINE))


def imported_packages(*patterns: str) -> set[str]:
    """Return the names of third-party packages that Python files import, at the top or anywhere else."""
    names, own = set(), {path.stem for pattern in patterns for path in ROOT.glob(pattern)} | {"hf_dino"}
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names |= {str(node.module).split(".")[0]}
    return {DISTRIBUTIONS.get(name, name) for name in names - own - sys.stdlib_module_names}


def extras_imported() -> dict[str, set[str]]:
    """Return the names of the packages that `import_extra` imports on demand, by the extra that installs them."""
    packages: dict[str, set[str]] = {}
    for path in ROOT.glob("src/**/*.py"):
        for call in re.findall(r'import_extra\("([\w.]+)", "([\w-]+)"', path.read_text(encoding="utf-8")):
            name = call[0].split(".")[0]
            packages.setdefault(call[1], set()).add(DISTRIBUTIONS.get(name, name))
    return packages


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    extras = extras_imported()
    imported = imported_packages("src/**/*.py", "conversion/*.py", "examples/*.py") | extras.pop("train")
    of_extras = {"gradio", "ray", "pyarrow"}  # the last comes with ray[data]
    assert imported - of_extras == requirements("dependencies") | requirements("train")
    assert of_extras - {"pyarrow"} <= imported & (requirements("demo") | {"ray"})
    assert extras.pop("demo") <= requirements("demo")
    assert extras.pop("tracking") == requirements("tracking")
    assert extras.pop("export") == requirements("export") - {"onnxscript"}  # torch imports it
    assert extras.pop("openvino") == requirements("openvino")
    assert extras.pop("download") == requirements("download")
    assert list(extras) == ["hub-data"] and extras["hub-data"] <= requirements("hub-data")


def test_model_and_conversion_need_no_extra() -> None:
    """The package can be imported and checkpoints converted where only the dependencies are installed."""
    # without what torch and huggingface_hub require themselves
    packages = requirements("train") - {"pyyaml", "jinja2"} | {"datasets", "timm"}
    script = (
        f"import sys\nsys.modules |= dict.fromkeys({sorted(packages)})\n"
        "from hf_dino.conversion import convert_checkpoint\nimport hf_dino.hub, hf_dino.model_card\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    assert imported_packages("src/hf_dino/*_dino_detr.py", "src/hf_dino/conversion/*.py") <= requirements(
        "dependencies"
    )


def test_supported_versions() -> None:
    assert 'requires-python = ">=3.10"' in PYPROJECT
    assert '"torch>=2.10"' in PYPROJECT
    assert '"transformers>=5.14,<6"' in PYPROJECT


@needs_shell
def test_setup_installs_once_and_again_when_the_project_file_changes(checkout: Path, bin_folder: Path) -> None:
    for _ in range(2):
        assert setup(checkout, PATH=str(bin_folder)).returncode == 0
    assert (checkout / "install.log").read_text() == "installed\n"
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# one more line\n")
    assert setup(checkout, PATH=str(bin_folder)).returncode == 0
    assert (checkout / "install.log").read_text() == "installed\n" * 2


@needs_shell
def test_failed_installation_is_explained_and_repaired_by_the_next_run(checkout: Path, bin_folder: Path) -> None:
    failed = setup(checkout, PATH=str(bin_folder), FAIL="1")
    assert failed.returncode == 1
    assert "could not be set up" in failed.stderr
    assert "network" in failed.stderr
    assert not (checkout / ".venv" / ".hf_dino-ready").exists()
    (checkout / ".venv" / "half of a package").touch()
    assert setup(checkout, PATH=str(bin_folder)).returncode == 0
    assert (checkout / ".venv" / ".hf_dino-ready").exists()
    assert not (checkout / ".venv" / "half of a package").exists()
    assert not list(checkout.glob(".venv.old*"))


@needs_shell
def test_missing_python_is_explained(checkout: Path, bin_folder: Path) -> None:
    only_command(bin_folder, "python3", "exit 127")
    result = setup(checkout, PATH=str(bin_folder))
    assert result.returncode == 1
    assert "no Python 3.10 or newer" in " ".join(result.stderr.split())
    result = setup(checkout, PATH=str(bin_folder), PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "PYTHON=/no/such/python" in result.stderr
    assert not (checkout / ".venv").exists()


@needs_shell
def test_environment_of_somebody_else_is_never_removed(checkout: Path, bin_folder: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").touch()
    result = setup(checkout, PATH=str(bin_folder))
    assert result.returncode == 1
    assert "left alone" in " ".join(result.stderr.split())
    assert (checkout / ".venv" / "mine").exists()


@needs_shell
def test_make_lists_its_targets() -> None:
    listing = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "test-floor", "lint", "format"):
        assert f"make {target} " in listing


def test_every_module_can_be_imported_first() -> None:
    """None relies on another that happened to be imported before it."""
    package = ROOT / "src" / "hf_dino"
    names = [
        ".".join(("hf_dino", *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if not path.stem.startswith("__")
    ]
    forget = "for name in [n for n in sys.modules if n.split('.')[0] == 'hf_dino']: del sys.modules[name]"
    script = f"import importlib, sys\nfor module in {names}:\n    {forget}\n    importlib.import_module(module)\n"
    search_path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": search_path})
