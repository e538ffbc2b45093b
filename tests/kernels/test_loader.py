"""The loader of the kernel compiles once, survives whatever happens to a build, and explains what is wrong.

Most tests compile a library that is no operator at all, which takes a moment; those that load one use an operator of a
few lines, in a process of its own.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock

from helpers.command_line import hf_dino
from hf_dino import kernels
from hf_dino.kernels import build, compilers, prebuilt, report
from hf_dino.kernels.build import Builder, is_complete
from hf_dino.kernels.compilers import KernelError


ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "kernels"
COMPILER = shutil.which("g++") or shutil.which("clang++") or ""

needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs g++ or clang++")

# Starts the loader without the rest of hf_dino, which takes seconds to import.
CHILD = f"""
import sys, types
package = types.ModuleType("hf_dino")
package.__path__ = [{str(ROOT / "src" / "hf_dino")!r}]
sys.modules["hf_dino"] = package
from pathlib import Path
import torch
from hf_dino import kernels
from hf_dino.kernels.build import Builder
builder = Builder(Path(sys.argv[1]), Path(sys.argv[2]))
kernels.get_builder = lambda: builder
"""

BINDING = """
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY_FRAGMENT(TORCH_EXTENSION_NAME, library) {
  library.def("same(Tensor tensor) -> Tensor");
}
"""

OPERATOR = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
torch::stable::Tensor same(const torch::stable::Tensor& tensor) { return tensor; }
STABLE_TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, %s, library) {
  library.impl("same", TORCH_BOX(&same));
}
"""

PYTHON_SIDE = {
    "__init__.py": "from .registration import ops\n\n\ndef same(tensor):\n    return ops.same(tensor)\n",
    "registration.py": (
        "import torch\n\nfrom ._ops import add_op_namespace_prefix, ops\n\n"
        "torch.library.register_fake(add_op_namespace_prefix('same'), torch.empty_like)\n"
    ),
}


def write_sources(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Write sources laid out as the kernel's; their library registers no operator."""
    return write_sources(
        tmp_path / "sources",
        {
            "torch-ext/torch_binding.cpp": "int schema() { return 1; }\n",
            "csrc/header.h": "#pragma once\n",
            "csrc/cpu/one.cpp": '#include "header.h"\nint one() { return 1; }\n',
            "csrc/cpu/avx2.cpp": "int two() { return 2; }\n",
            "csrc/cuda/three.cu": "int three() { return 3; }\n",
            f"{build.PACKAGE}/__init__.py": "",
        },
    )


@pytest.fixture
def operator_sources(tmp_path: Path) -> Path:
    """Write sources of an operator `same` for both devices, whose Python side registers something once."""
    return write_sources(
        tmp_path / "operator",
        {
            "torch-ext/torch_binding.cpp": BINDING,
            "csrc/cpu/same.cpp": OPERATOR % "CPU",
            "csrc/cuda/same.cu": OPERATOR % "CUDA",
            **{f"{build.PACKAGE}/{name}": text for name, text in PYTHON_SIDE.items()},
        },
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "caches" / "cache"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the compiler that is found, whatever the environment of the tests is, and forget earlier uses."""
    for name in ("CXX", "HF_DINO_KERNELS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kernels, "_found", {})
    kernels._warn_once.cache_clear()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Builder], None]:
    """Make `operators` use a builder."""
    return lambda builder: monkeypatch.setattr(kernels, "get_builder", lambda: builder)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a shell script the compiler; `"$@"` are its arguments. Return a file that it may write to."""

    def replace(script: str) -> Path:
        path, notes = tmp_path / "compiler", tmp_path / "notes"
        path.write_text(f'#!/bin/sh\nNOTES="{notes}"\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return notes

    return replace


def child(code: str, sources: Path, cache: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(sources), str(cache)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(process_id: int) -> bool:
    """Return whether a process runs, rather than waiting to be reaped."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process_id)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


# Compiling once, and again when something has changed


@needs_compiler
def test_entry_is_compiled_once_and_is_private(sources: Path, cache: Path) -> None:
    builder = Builder(sources, cache)
    assert not is_complete(builder.entry("cpu"))
    entry = builder.get_or_build("cpu")
    made = (entry / "metadata.json").stat().st_mtime_ns
    assert Builder(sources, cache).entry("cpu") == Builder(sources, cache).get_or_build("cpu") == entry
    assert (entry / "metadata.json").stat().st_mtime_ns == made
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in cache.iterdir()} <= {entry.name, f"{entry.name}.lock"}
    assert not (entry / "objects").exists()
    assert "one.cpp" in (entry / "build.log").read_text()


@needs_compiler
def test_entry_depends_on_all_that_goes_into_it(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[[str], Path]
) -> None:
    entries = {Builder(sources, cache).get_or_build("cpu")}
    (sources / "csrc" / "header.h").write_text("#pragma once\n// changed\n")
    entries.add(Builder(sources, cache).get_or_build("cpu"))
    (sources / build.PACKAGE / "__init__.py").write_text("changed = True\n")
    entries.add(Builder(sources, cache).get_or_build("cpu"))
    monkeypatch.setattr(torch, "__version__", "2.99")
    entries.add(Builder(sources, cache).get_or_build("cpu"))
    monkeypatch.setattr(build, "CPP_FLAGS", [*build.CPP_FLAGS, "-g"])
    entries.add(Builder(sources, cache).get_or_build("cpu"))
    compiler(f'exec {COMPILER} "$@"')
    entries.add(Builder(sources, cache).get_or_build("cpu"))
    assert len(entries) == 6


@needs_compiler
def test_vector_instructions_only_where_they_are_meant(sources: Path, cache: Path) -> None:
    log = (Builder(sources, cache).get_or_build("cpu") / "build.log").read_text().splitlines()
    (link,) = [line for line in log if "-shared" in line]
    compilations = {line.split(" -c ")[1].split()[0].rpartition("/")[2]: line for line in log if " -c " in line}
    assert compilations.keys() == {"torch_binding.cpp", "one.cpp", "avx2.cpp"}
    assert {name for name, line in compilations.items() if "-mavx" in line} <= {"avx2.cpp"}
    # the linker keeps the first of equal functions, which has to run everywhere
    assert link.index("one.cpp.o") < link.index("avx2.cpp.o")


@needs_compiler
def test_entry_of_a_compiler_that_is_gone_is_used(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Builder(sources, cache).get_or_build("cpu")
    monkeypatch.setenv("PATH", "")
    assert Builder(sources, cache).get_or_build("cpu") == entry


@needs_compiler
@pytest.mark.parametrize("missing", ["hf_dino_kernels_cpu.so", "metadata.json", "_ops.py"])
def test_incomplete_entry_is_compiled_again(missing: str, sources: Path, cache: Path) -> None:
    entry = Builder(sources, cache).get_or_build("cpu")
    (entry / missing).unlink()
    assert not is_complete(entry)
    assert Builder(sources, cache).get_or_build("cpu") == entry
    assert is_complete(entry)


@needs_compiler
def test_entry_for_cuda_needs_the_libraries_of_both_devices(sources: Path, cache: Path) -> None:
    builder = Builder(sources, cache)
    entry = builder.entry("cuda")
    shutil.copytree(builder.get_or_build("cpu"), entry)
    assert not is_complete(entry)
    shutil.copy(entry / "hf_dino_kernels_cpu.so", entry / "hf_dino_kernels_cuda.so")
    assert is_complete(entry)
    (entry / "hf_dino_kernels_cpu.so").unlink()
    assert not is_complete(entry)


@needs_compiler
def test_read_only_installation_is_compiled(sources: Path, cache: Path) -> None:
    for path in sources.rglob("*.*"):
        path.chmod(0o444)
    entry = Builder(sources, cache).get_or_build("cpu")
    assert all(path.stat().st_mode & 0o200 for path in entry.iterdir()), "the user can remove and replace them"


# What may happen to a build


@needs_compiler
def test_build_that_is_killed_leaves_nothing_in_the_way(
    sources: Path, cache: Path, compiler: Callable[[str], Path]
) -> None:
    notes = compiler('echo $$ >>"$NOTES"; exec sleep 100')
    process = child('builder.get_or_build("cpu")', sources, cache)
    wait_for(lambda: notes.exists() and notes.read_text().endswith("\n"))
    process.kill()
    process.communicate()
    for process_id in map(int, notes.read_text().split()):
        os.kill(process_id, signal.SIGKILL)  # no parent is left to end them
    assert list(cache.glob(".*.part"))

    compiler(f'exec {COMPILER} "$@"')  # of the same name: the same entry
    start = time.monotonic()
    assert is_complete(Builder(sources, cache).get_or_build("cpu"))
    assert not list(cache.glob(".*.part"))
    assert time.monotonic() - start < 30


@needs_compiler
def test_eight_processes_compile_once(operator_sources: Path, cache: Path, compiler: Callable[[str], Path]) -> None:
    notes = compiler(f'echo "$@" >>"$NOTES"; exec {COMPILER} "$@"')
    code = """
import multiprocessing

def use():
    assert kernels.operators("cpu").same(torch.tensor(7.0)).item() == 7.0

processes = [multiprocessing.get_context("fork").Process(target=use) for _ in range(8)]  # PyTorch is imported once
for process in processes:
    process.start()
for process in processes:
    process.join(100)
print([process.exitcode for process in processes])
"""
    assert result(child(code, operator_sources, cache)) == f"{[0] * 8}\n"
    commands = notes.read_text().splitlines()
    assert sum(" -c " in command for command in commands) == 2  # the schema, and the operator
    assert sum("-shared" in command for command in commands) == 1


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_time_limit_ends_the_compilers(sources: Path, cache: Path, compiler: Callable[[str], Path]) -> None:
    notes = compiler('sleep 100 & echo $$ $! >>"$NOTES"; wait')
    start = time.monotonic()
    with pytest.raises(KernelError, match="takes too long"):
        Builder(sources, cache, time_limit=1).get_or_build("cpu")
    assert time.monotonic() - start < 30
    processes = list(map(int, notes.read_text().split()))
    assert len(processes) >= 2
    wait_for(lambda: not any(map(runs, processes)))  # the compilers, and what they started
    assert not list(cache.glob("*.part")) and not list(cache.glob("*/metadata.json"))


@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_interrupt_ends_the_compilers(
    sources: Path, cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = compiler('echo $$ >>"$NOTES"; exec sleep 100')

    def interrupt(seconds: float) -> None:
        if notes.exists() and notes.read_text().endswith("\n"):
            raise KeyboardInterrupt

    monkeypatch.setattr(build.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Builder(sources, cache).get_or_build("cpu")
    monkeypatch.undo()
    wait_for(lambda: not any(map(runs, map(int, notes.read_text().split()))))


@needs_compiler
def test_lock_that_is_never_released_is_reported(sources: Path, cache: Path) -> None:
    builder = Builder(sources, cache, time_limit=0.1)
    cache.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, FileLock(f"{builder.entry('cpu')}.lock"):
        error = pool.submit(builder.get_or_build, "cpu").exception()
    assert isinstance(error, KernelError)
    assert "another process has held" in str(error)


# Where nothing can be kept


def no_directory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the directory should be")


def no_permission(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    cache.mkdir(parents=True)
    cache.chmod(0o500)


def no_space(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if cache in target.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


@needs_compiler
@pytest.mark.parametrize("obstacle", [no_directory, no_permission, no_space])
def test_cache_that_cannot_be_written_is_explained(
    obstacle: Callable[[Path, pytest.MonkeyPatch], None],
    sources: Path,
    cache: Path,
    use: Callable[[Builder], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    obstacle(cache, monkeypatch)
    use(Builder(sources, cache))
    assert kernels.operators("cpu") is None
    (record,) = caplog.records
    assert f"cannot be built in {cache}" in record.getMessage()
    assert "set XDG_CACHE_HOME" in record.getMessage()
    assert not list(cache.glob("*.part")) and not list(cache.glob("*/metadata.json"))


@needs_compiler
def test_read_only_cache_is_used(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = Builder(sources, cache).get_or_build("cpu")
    monkeypatch.setattr(build, "FileLock", None)  # a lock needs a file that can be written
    assert Builder(sources, cache).get_or_build("cpu") == entry
    assert not caplog.records


# Messages where there is no kernel


def missing(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def named_but_missing(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")


def silent(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")


def talkative(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler("for line in $(seq 1 50); do echo line $line; done; echo the reason >&2; exit 1")


FAILURES = [
    (missing, "C++ compiler not found: install one (apt install g++"),
    (named_but_missing, "CXX=/no/such/compiler -O1 is not a program"),
    (silent, "(it printed nothing)"),
    (talkative, "line 50\n    the reason"),
]


@pytest.mark.parametrize(("failure", "reason"), FAILURES)
def test_failure_is_reported_once_and_not_repeated(
    failure: Callable[[Callable[[str], Path], pytest.MonkeyPatch], None],
    reason: str,
    sources: Path,
    cache: Path,
    use: Callable[[Builder], None],
    compiler: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failure(compiler, monkeypatch)
    use(Builder(sources, cache))
    assert kernels.operators("cpu") is None
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.operators(torch.device("cpu", 0)) is None
    (warning,) = caplog.records
    assert reason in warning.getMessage()
    assert "line 30\n" not in warning.getMessage()
    assert "HF_DINO_KERNELS=off" in warning.getMessage()
    assert not list(cache.glob("*/metadata.json"))


def test_failure_shows_the_output_of_the_command_that_failed_alone(
    sources: Path, cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "2")
    compiler(
        """
        case "$*" in
            *" -c "*one.cpp*) until [ -e "$NOTES" ]; do sleep 0.01; done; echo the reason; exit 1 ;;
            *) seq 1 50; touch "$NOTES"; exec sleep 100 ;;
        esac
        """
    )
    with pytest.raises(KernelError) as error:
        Builder(sources, cache).get_or_build("cpu")
    command, *output = str(error.value).splitlines()[1:]
    assert "one.cpp" in command
    assert [line.strip() for line in output] == ["the reason"]


@needs_compiler
def test_log_has_each_command_followed_by_its_output(
    sources: Path, cache: Path, compiler: Callable[[str], Path]
) -> None:
    compiler(f'for word; do last=$word; done; echo "made $last"; exec {COMPILER} "$@"')
    log = (Builder(sources, cache).get_or_build("cpu") / "build.log").read_text().splitlines()
    assert len(log) == 8
    assert all(output == f"made {command.split()[-1]}" for command, output in zip(log[::2], log[1::2]))


def test_failure_of_the_cpu_is_not_repeated_for_cuda(
    sources: Path,
    cache: Path,
    use: Callable[[Builder], None],
    compiler: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    notes = compiler('echo "$@" >>"$NOTES"; exit 1')
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    nvcc(cache.parent / "cuda", monkeypatch)
    monkeypatch.setenv("MAX_JOBS", "1")
    use(Builder(sources, cache))
    assert kernels.operators("cuda") is None
    assert kernels.operators("cpu") is None
    assert len(caplog.records) == 1
    assert len(notes.read_text().splitlines()) == 1


def test_threads_look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def find(device_type: str) -> None:
        looked.append(device_type)
        time.sleep(0.1)

    monkeypatch.setattr(kernels, "_find", find)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(kernels.operators, ["cpu"] * 8))
    assert looked == ["cpu"]


def test_off_means_off(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", "off")
    monkeypatch.setattr(kernels, "get_builder", None)  # not to be called
    assert kernels.operators("cpu") is None
    assert kernels.operators("cuda:1") is None
    assert not caplog.records


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
@pytest.mark.parametrize("mode", ["auto", "require"])
def test_devices_without_a_kernel_are_silent(
    device: str, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", mode)
    assert kernels.operators(device) is None
    assert not caplog.records


def test_require_stops(
    sources: Path,
    cache: Path,
    use: Callable[[Builder], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", "require")
    monkeypatch.setenv("PATH", "")
    use(Builder(sources, cache))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"HF_DINO_KERNELS=require, but.*C\+\+ compiler not found"):
            kernels.operators("cpu")
    assert not caplog.records


def test_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", "1")
    for _ in range(2):
        with pytest.raises(ValueError, match="must be auto, off or require, not '1'"):
            kernels.operators("cpu")


def test_report_of_an_unknown_mode_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", "1")
    assert hf_dino(["kernels"]) == 2
    assert "HF_DINO_KERNELS must be auto, off or require, not '1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "changed", "reason"),
    [("cpu", (sys, "platform", "win32"), "Linux and macOS"), ("cuda", (torch.version, "cuda", None), "without CUDA")],
)
def test_unsupported_platforms_are_logged_quietly(
    device: str,
    changed: tuple[object, str, object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "hf_dino.kernels")
    monkeypatch.setattr(*changed)
    assert kernels.operators(device) is None
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert record.levelno == logging.INFO
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setenv("HF_DINO_KERNELS", "require")
    with pytest.raises(RuntimeError, match=reason):
        kernels.operators(device)


def test_missing_sources_are_explained(cache: Path, use: Callable[[Builder], None]) -> None:
    with pytest.raises(KernelError, match="reinstall hf-dino"):
        Builder(cache / "nothing", cache).get_or_build("cpu")


# CUDA: which nvcc, for which GPUs


def nvcc(home: Path, monkeypatch: pytest.MonkeyPatch, release: str = "13.0") -> Path:
    """Put an nvcc that only answers questions into a toolkit in `home`, and a script that calls it on the PATH."""
    wrapper = home.parent / "wrapper" / "nvcc"
    scripts = {
        home / "bin" / "nvcc": f'[ "$1" = --version ] && echo "tools, release {release}, V{release}.88" '
        "|| echo compute_80 compute_90 compute_100",
        wrapper: f'exec "{home}/bin/nvcc" "$@"',
    }
    for script, code in scripts.items():
        script.parent.mkdir(parents=True)
        script.write_text(f"#!/bin/sh\n{code}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    return wrapper


@needs_compiler
def test_nvcc_may_be_a_wrapper_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = nvcc(tmp_path / "toolkit", monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0")
    command = compilers.compile_command(Path("source.cu"), tmp_path / "object", tmp_path)
    assert command[0] == str(wrapper)
    assert "-gencode=arch=compute_90,code=[sm_90,compute_90]" in command


def test_cuda_home_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path / "toolkit", monkeypatch, release="12.8")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert compilers.find_nvcc() == str(tmp_path / "toolkit" / "bin" / "nvcc")


def test_toolkit_of_another_major_version_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path / "toolkit", monkeypatch, release="13.0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(KernelError, match=r"is of CUDA 13\.0.*of CUDA 12\.8: install the CUDA 12 toolkit.*CUDA_HOME"):
        compilers.find_nvcc()


def test_missing_toolkit_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(compilers.os, "access", lambda path, mode: False)
    with pytest.raises(KernelError, match="nvcc not found: install the CUDA 12 toolkit"):
        compilers.find_nvcc()


def test_gpus_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 6), (9, 0)][device])
    assert compilers.requested_architectures() == "8.6;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert compilers.requested_architectures() == "8.0"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compilers.requested_architectures() == compilers.DEFAULT_ARCHITECTURES


KNOWN = ["8.0", "9.0", "10.0"]


@pytest.mark.parametrize(
    ("requested", "chosen"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("9.0a 8.0", ["8.0", "9.0a"]),
        ("7.0;8.0", ["8.0"]),  # older than nvcc knows: left out
        ("9.0;12.0", ["9.0+PTX"]),  # newer: runs PTX
        ("12.0+PTX", ["10.0+PTX"]),
        ("8.6", ["8.0+PTX"]),
    ],
)
def test_architectures_are_those_that_nvcc_knows(requested: str, chosen: list[str]) -> None:
    assert compilers.choose_architectures(requested, KNOWN) == chosen


@pytest.mark.parametrize(
    ("requested", "reason"), [("7.0", "older toolkit"), ("Hopper", "not a list of architectures")]
)
def test_unusable_architectures_are_explained(requested: str, reason: str) -> None:
    with pytest.raises(KernelError, match=reason):
        compilers.choose_architectures(requested, KNOWN)


# Loading, in processes of their own: operators cannot be registered twice


@needs_compiler
@pytest.mark.parametrize("first", ["hf_dino", "kernels"])
def test_local_kernel_of_the_kernels_library(first: str, operator_sources: Path, cache: Path) -> None:
    pytest.importorskip("kernels", reason="needs the kernels library")
    code = f"""
from kernels import get_local_kernel
entry = builder.get_or_build("cpu")
uses = {{"hf_dino": lambda: kernels.operators("cpu"), "kernels": lambda: get_local_kernel(entry)}}
for use in sorted(uses, key=lambda name: name != {first!r}):
    print(uses[use]().same(torch.tensor(7.0)).item())
print(get_local_kernel(entry).same is kernels.operators("cpu").same)
"""
    output = result(child(code, operator_sources, cache, HF_HUB_OFFLINE="1"))
    assert output.splitlines()[:2] == ["7.0", "7.0"], output


@needs_compiler
def test_first_use_may_be_within_torch_compile(operator_sources: Path, cache: Path) -> None:
    code = """
def double(tensor):
    return 2 * kernels.operators(tensor.device).same(tensor)

print(torch.compile(double, fullgraph=True, backend="eager")(torch.tensor(7.0)).item())
"""
    assert result(child(code, operator_sources, cache)) == "14.0\n"


@needs_compiler
def test_kernel_of_other_sources_is_not_mixed_in(sources: Path, cache: Path) -> None:
    code = """
kernels.load(builder.get_or_build("cpu"))
(builder.sources / "csrc" / "header.h").write_text("// changed")
print(kernels.operators("cpu"))
"""
    output = result(child(code, sources, cache))
    assert "a kernel from other sources is loaded already" in output
    assert output.endswith("None\n")


@needs_compiler
def test_python_side_that_fails_is_explained(sources: Path, cache: Path) -> None:
    (sources / build.PACKAGE / "__init__.py").write_text("raise RuntimeError('no such thing')\n")
    output = result(child('print(kernels.operators("cpu"))', sources, cache))
    assert "cannot be loaded: no such thing" in output
    assert output.endswith("None\n")


@needs_compiler
@pytest.mark.slow
def test_cuda_joins_the_cpu(operator_sources: Path, cache: Path) -> None:
    if torch.version.cuda is None:
        pytest.skip("needs a PyTorch with CUDA")
    try:
        compilers.find_nvcc()
    except KernelError as error:
        pytest.skip(str(error))
    for devices in ["cpu", "cuda"], ["cuda", "cpu"]:
        uses = "\n".join(f'kernels.operators("{device}").same(torch.tensor(7.0))' for device in devices)
        code = f"""
{uses}
assert kernels.operators("cpu") is kernels.operators("cuda")
print(torch._C._dispatch_has_kernel_for_dispatch_key("hf_dino_kernels::same", "CUDA"))
"""
        assert result(child(code, operator_sources, cache, TORCH_CUDA_ARCH_LIST="8.0")) == "True\n"
    (entry,) = cache.glob("cuda-*/metadata.json")
    assert json.loads(entry.read_text())["backend"] == {"type": "cuda"}


# The report


@pytest.fixture
def run_report(
    sources: Path, cache: Path, use: Callable[[Builder], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    monkeypatch.setattr(report, "get_builder", lambda: Builder(sources, cache))
    monkeypatch.setattr(report, "device_types", lambda: ["cpu"])
    return lambda *arguments: hf_dino(["kernels", *arguments])


@needs_compiler
def test_report_tells_what_is_used(
    run_report: Callable[..., int],
    sources: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_report() == 0
    output = capsys.readouterr().out
    assert str(cache) in output
    assert COMPILER in output
    assert "compiled at its first use" in output
    assert not cache.exists()

    entry = Builder(sources, cache).get_or_build("cpu")
    assert run_report() == 0
    assert f"the kernel in {entry}" in capsys.readouterr().out

    monkeypatch.setenv("HF_DINO_KERNELS", "off")
    assert run_report() == 0
    assert "HF_DINO_KERNELS=off" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("mode", "arguments", "code"), [("auto", [], 0), ("auto", ["--build"], 1), ("require", [], 1)]
)
def test_report_without_a_compiler(
    mode: str,
    arguments: list[str],
    code: int,
    run_report: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", mode)
    monkeypatch.setenv("PATH", "")
    assert run_report(*arguments) == code
    assert "the reference implementation in PyTorch: C++ compiler not found" in capsys.readouterr().out


@needs_compiler
def test_report_builds(sources: Path, cache: Path) -> None:
    code = """
from hf_dino.kernels import report
report.get_builder, report.device_types = kernels.get_builder, lambda: ["cpu"]
sys.exit(report.report_kernels(build=True))
"""
    output = result(child(code, sources, cache))
    assert "the kernel in" in output.splitlines()[-1]
    assert list(cache.glob("cpu-*/hf_dino_kernels_cpu.so"))


def test_import_compiles_nothing_and_report_finds_the_sources(cache: Path) -> None:
    output = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning:runpy", "-m", "hf_dino", "kernels"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f" {KERNEL}\n" in output
    assert f" {cache / 'hf_dino' / 'kernels'}\n" in output
    assert not cache.exists()


# Kernels that were compiled elsewhere


BUILT_FOR = {"platform": "manylinux_2_28_x86_64", "torch": "2.10"}
BUILT_FOR_CUDA = {**BUILT_FOR, "cuda": "13", "architectures": "8.0 9.0 12.0+PTX"}

needs_platform = pytest.mark.skipif(
    BUILT_FOR["platform"] not in prebuilt.platform_tags(), reason="needs Linux for x86-64 with glibc 2.28"
)


def write_prebuilt(folder: Path, sources: Path, device: str, built_for: dict[str, str]) -> Path:
    entry = folder / f"{device}-{build.hash_sources(sources)}-{built_for['platform']}"
    libraries = [f"{compilers.NAMESPACE}_{name}.so" for name in build.LIBRARIES[device]]
    names = dict.fromkeys(["__init__.py", "_ops.py", *libraries], "")
    write_sources(entry, {**names, "metadata.json": json.dumps({"built_for": built_for})})
    return entry


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory where prebuilt entries are looked for, without any that are installed."""
    monkeypatch.setattr(prebuilt, "PACKAGED", tmp_path / "prebuilt")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not list(Path(path).glob("hf_dino_cuda*"))])
    return tmp_path / "prebuilt"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record which entries are loaded instead of loading them."""
    entries: list[Path] = []

    def load(entry: Path) -> ModuleType:
        entries.append(entry)
        return ModuleType(entry.name)

    monkeypatch.setattr(kernels, "load", load)
    return entries


@needs_platform
@pytest.mark.parametrize("mode", ["auto", "require"])
def test_matching_prebuilt_is_used_and_nothing_is_compiled(
    mode: str,
    sources: Path,
    cache: Path,
    packaged: Path,
    loaded: list[Path],
    use: Callable[[Builder], None],
    compiler: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_DINO_KERNELS", mode)
    notes = compiler('echo "$@" >>"$NOTES"; exit 1')
    entry = write_prebuilt(packaged, sources, "cpu", BUILT_FOR)
    use(Builder(sources, cache))
    assert kernels.operators("cpu") is kernels.operators("cpu") is not None
    assert loaded == [entry]
    assert not cache.exists() and not notes.exists() and not caplog.records


def of_other_sources(entry: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "csrc" / "header.h").write_text("// changed")


def incomplete(entry: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry / f"{compilers.NAMESPACE}_cpu.so").unlink()


def without_metadata(entry: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry / "metadata.json").write_text("{}")


def with_wrong_types(entry: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry / "metadata.json").write_text(json.dumps({"built_for": {**BUILT_FOR, "torch": None}}))


def for_another_machine(entry: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuilt, "platform_tags", lambda: iter(["musllinux_1_2_x86_64"]))


def for_a_later_pytorch(entry: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")


MISMATCHES = [
    (of_other_sources, "it is not of the sources in"),
    (incomplete, "files are missing"),
    (without_metadata, "its metadata.json cannot be read ('built_for')"),
    (with_wrong_types, "it is for PyTorch None and later"),
    (for_another_machine, "it is for manylinux_2_28_x86_64, and this is musllinux_1_2_x86_64"),
    (for_a_later_pytorch, "it is for PyTorch 2.10 and later, and this is 2.9.1+cpu"),
]


@needs_compiler
@needs_platform
@pytest.mark.parametrize(("change", "reason"), MISMATCHES)
def test_prebuilt_that_does_not_match_is_reported_and_compiled_instead(
    change: Callable[[Path, Path, pytest.MonkeyPatch], None],
    reason: str,
    sources: Path,
    cache: Path,
    packaged: Path,
    loaded: list[Path],
    use: Callable[[Builder], None],
    run_report: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    entry = write_prebuilt(packaged, sources, "cpu", BUILT_FOR)
    assert run_report() == 0
    assert f"{entry}: matches" in capsys.readouterr().out
    change(entry, sources, monkeypatch)
    assert run_report() == 0
    output = capsys.readouterr().out
    assert f"{entry}: not used, {reason}" in output and "compiled at its first use" in output
    use(Builder(sources, cache))
    assert kernels.operators("cpu") is not None
    assert loaded == [Builder(sources, cache).entry("cpu")]
    assert not caplog.records


def test_without_a_compiler_the_reason_against_a_prebuilt_kernel_is_told(
    sources: Path, cache: Path, packaged: Path, use: Callable[[Builder], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = write_prebuilt(packaged, sources, "cpu", BUILT_FOR)
    without_metadata(entry, sources, monkeypatch)
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("HF_DINO_KERNELS", "require")
    use(Builder(sources, cache))
    reason = (
        f"CXX=/nonexistent is not a program.*; the prebuilt kernel in {entry} is not used: its metadata.json cannot"
    )
    with pytest.raises(RuntimeError, match=reason):
        kernels.operators("cpu")


@needs_platform
@pytest.mark.parametrize(
    ("cuda", "architectures", "reason"),
    [
        ("13.2", "9.0", ""),
        ("13.0", "8.6 9.0a;10.0 13.0+PTX", "it is for GPUs 8.0 9.0 12.0+PTX, and not for 10.0"),
        ("12.8", "9.0", "it is for CUDA 13, and PyTorch is of CUDA 12.8"),
        (None, "9.0", "it is for CUDA 13, and PyTorch is of CUDA None"),
    ],
)
def test_prebuilt_for_cuda_is_for_one_major_version_and_some_gpus(
    cuda: str | None,
    architectures: str,
    reason: str,
    sources: Path,
    packaged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    entry = write_prebuilt(tmp_path / "site-packages" / "hf_dino_cuda13", sources, "cuda", BUILT_FOR_CUDA)
    monkeypatch.setattr(sys, "path", [*sys.path, str(entry.parents[1]), str(entry.parents[1]), "missing"])
    assert prebuilt.prebuilt_entries("cuda") == [entry]
    assert prebuilt.prebuilt_entries("cpu") == []
    assert prebuilt.mismatch(entry, sources) == reason


def test_code_runs_on_its_gpus_and_later_ones() -> None:
    names = ["7.5", "8.0", "8.6", "9.0", "10.0", "10.3", "12.0", "12.1"]
    for compiled in range(len(names)):
        for wanted in range(len(names)):
            same_major = names[compiled].split(".")[0] == names[wanted].split(".")[0]
            assert compilers.runs_on(names[wanted], [names[compiled] + "+PTX"]) is (wanted >= compiled)
            assert compilers.runs_on(names[wanted], [names[compiled]]) is (wanted >= compiled and same_major)
    assert not compilers.runs_on("9.0", [])


@needs_compiler
@needs_platform
def test_damaged_prebuilt_is_compiled_instead_with_one_warning(operator_sources: Path, cache: Path) -> None:
    entry = write_prebuilt(cache.parent / "prebuilt", operator_sources, "cpu", BUILT_FOR)
    shutil.copytree(operator_sources / build.PACKAGE, entry, dirs_exist_ok=True)
    (entry / "_ops.py").write_text(build.OPS_PY)
    code = f"""
kernels.prebuilt.PACKAGED = Path({str(entry.parent)!r})
for _ in range(2):
    print(kernels.operators("cpu").same(torch.tensor(7.0)).item(), kernels.operators("cpu").__file__)
"""
    warning, *values = result(child(code, operator_sources, cache, HF_DINO_KERNELS="require")).splitlines()
    assert warning.startswith(f"the kernel in {entry} cannot be loaded: ")
    assert warning.endswith("file too short; the kernel is compiled on this machine instead")
    compiled = Builder(operator_sources, cache).entry("cpu") / "__init__.py"
    assert values == [f"7.0 {compiled}"] * 2


@needs_compiler
@needs_platform
def test_an_entry_of_which_a_library_is_loaded_is_replaced(operator_sources: Path, cache: Path) -> None:
    """As a kernel for CUDA whose own library is broken: that for the CPU has registered its operators already."""
    compiled = Builder(operator_sources, cache).get_or_build("cpu")
    entry = cache.parent / "broken" / compiled.name
    shutil.copytree(compiled, entry)
    (entry / f"{build.NAMESPACE}_later.so").write_text("broken")
    code = f"""
try:
    kernels.load(Path({str(entry)!r}))
except kernels.KernelError as error:
    print(error)
print(kernels.load(Path({str(compiled)!r})).same(torch.tensor(7.0)).item())
"""
    error, value = result(child(code, operator_sources, cache)).splitlines()
    assert error.endswith("file too short")
    assert value == "7.0"


def test_folders_that_cannot_be_read_have_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "hf_dino_cuda13" / "cuda-1-2").mkdir(parents=True)
    unreadable = [tmp_path / "file", tmp_path / "none", tmp_path / "file" / "below", "", "x" * 5000]
    monkeypatch.setattr(sys, "path", [*map(str, unreadable), str(tmp_path)])
    assert [entry.name for entry in prebuilt.prebuilt_entries("cuda")] == ["cuda-1-2"]


WHEEL_CHILD = """
import sys, torch
from hf_dino import kernels
from hf_dino.deformable_attention_dino_detr import multi_scale_deformable_attention

torch.manual_seed(0)
value, weights = torch.randn(2, 20, 3, 8), torch.rand(2, 5, 3, 2, 4)
inputs = value, [(4, 4), (2, 2)], torch.rand(2, 5, 3, 2, 4, 2), weights
compiled = kernels.operators("cpu")
torch.testing.assert_close(compiled.deformable_attention(*inputs), multi_scale_deformable_attention(*inputs))
try:
    compiled.deformable_attention(value, [(5, 5)], *inputs[2:])
except RuntimeError:  # thrown in the library and caught in PyTorch
    print(compiled.__file__)
"""


@needs_compiler
@needs_platform
@pytest.mark.slow
def test_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling")
    pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    search_path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}
    build_wheel = [sys.executable, ROOT / "tools" / "wheels.py", "--device", "cpu", "--output_dir", tmp_path / "dist"]
    subprocess.run(build_wheel, check=True, env=environment)
    (wheel,) = (tmp_path / "dist").glob("hf_dino-*-py3-none-manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    environment |= {"PYTHONPATH": str(tmp_path / "site"), "HF_DINO_CACHE": str(tmp_path / "cache"), "PATH": ""}
    environment |= {"HF_DINO_KERNELS": "require"}
    command = [sys.executable, "-c", WHEEL_CHILD]
    printed = subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    (entry,) = (tmp_path / "site" / "hf_dino" / "prebuilt").iterdir()
    assert printed == f"{entry / '__init__.py'}\n"
    assert not (tmp_path / "cache").exists()


def test_symbols_of_newer_systems_and_of_pytorch_itself_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling")
    pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    monkeypatch.syspath_prepend(ROOT / "tools")
    import wheels

    allowed = [("GLIBC_2.28", "f"), ("GLIBC_2.2.5", "f"), ("GLIBCXX_3.4.24", "f"), ("Base", "torch_parallel_for")]
    refused = [("GLIBC_2.29", "exp"), ("GLIBC_PRIVATE", "f"), ("GLIBCXX_3.4.25", "f"), ("GOMP_1.0", "f")]
    refused += [("Base", "_ZN3c105ErrorD1Ev"), ("Base", "_ZSt28__throw_bad_array_new_lengthv")]
    assert all(wheels.is_allowed(*symbol) for symbol in allowed)
    assert not any(wheels.is_allowed(*symbol) for symbol in refused)


# The kernel itself


@pytest.fixture
def build_toml() -> Iterator[dict]:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    return tomllib.loads((KERNEL / "build.toml").read_text(encoding="utf-8"))


def test_kernel_builder_gets_the_same_sources(build_toml: dict) -> None:
    for device, patterns in build.SOURCES.items():
        sections = [section for section in build_toml["kernel"].values() if section["backend"] == device]
        listed = [Path(name) for section in sections for name in section["src"]]
        headers = {path for path in KERNEL.glob("csrc/*") if path.is_file()} | set(KERNEL.glob(f"csrc/{device}/*.*h"))
        compiled = {path for pattern in patterns for path in KERNEL.glob(pattern)}
        expected = {path.relative_to(KERNEL) for path in compiled | headers | set(KERNEL.glob(f"csrc/{device}/*.h"))}
        assert {Path(name) for name in build_toml["torch"]["src"]} | set(listed) >= expected
        assert set(listed) <= expected
        assert all(section["include"] == ["csrc"] for section in sections)


def test_kernel_builder_gets_the_same_flags(build_toml: dict) -> None:
    general, sections = build_toml["general"], build_toml["kernel"].values()
    assert (general["name"], general["version"]) == (build.METADATA["name"], build.METADATA["version"])
    assert (KERNEL / build.PACKAGE / "__init__.py").is_file()
    (abi,) = set(build_toml["torch"]["stable-abi"].values())
    major, minor = map(int, abi.split("."))
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}" in compilers.DEFINITIONS
    on_x86 = "$<$<STREQUAL:${CMAKE_SYSTEM_PROCESSOR},x86_64>:%s>"
    flags = {Path(section["src"][0]).name: section["cxx-flags"] for section in sections if "cxx-flags" in section}
    assert flags == {name: [on_x86 % ";".join(names)] for name, names in compilers.X86_FLAGS.items()}


def test_kernel_builder_reads_its_file() -> None:
    rust = pytest.importorskip("kernels._rust", reason="needs the kernels library")
    assert [str(backend) for backend in rust.Build.open(KERNEL).general.backends] == ["cpu", "cuda"]


def test_wheel_takes_the_sources_along() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    taken = {Path(name): target for name, target in targets["wheel"]["force-include"].items()}
    needed = {pattern for patterns in build.SOURCES.values() for pattern in patterns} | {str(build.PACKAGE)}
    for name in needed:
        (folder,) = [folder for folder in taken if folder in Path("kernels", name).parents]
        assert taken[folder] == f"hf_dino/kernel_sources/{folder.relative_to('kernels')}"
    assert "/kernels" in targets["sdist"]["include"]


@needs_compiler
@pytest.mark.slow
def test_kernel_compiles_and_works(tmp_path: Path) -> None:
    code = """
value, weights = torch.arange(4.0).view(1, 4, 1, 1), torch.ones(1, 1, 1, 1, 1)
center = torch.full((1, 1, 1, 1, 1, 2), 0.5)
print(kernels.operators("cpu").deformable_attention(value, [(2, 2)], center, weights).item())
"""
    assert result(child(code, KERNEL, tmp_path / "cache", HF_DINO_KERNELS="require")) == "1.5\n"
