"""Compile the kernel into a cache, once for all processes.

An entry of the cache is laid out as a build variant of Hugging Face's kernel-builder, so that the `kernels` library
can load it too:

    cpu-<hash of the sources>-<hash of all else>/
    ├── __init__.py, …              the Python side, copied from kernels/torch-ext
    ├── _ops.py                     loads the libraries next to it
    ├── hf_dino_kernels_cpu.so      an entry for CUDA has both: the schema is in this one
    ├── hf_dino_kernels_cuda.so
    ├── metadata.json               for the `kernels` library
    └── build.log                   each command, followed by its output
"""

import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock, Timeout

from ..utils.io import atomic_directory
from .compilers import (
    CPP_FLAGS,
    CUDA_FLAGS,
    DEFINITIONS,
    NAMESPACE,
    X86_FLAGS,
    KernelError,
    compile_command,
    link_command,
    requested_architectures,
)


METADATA = {  # for the `kernels` library; name and version as in kernels/build.toml
    "name": "hf-dino-deformable-attention",
    "id": NAMESPACE,
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
}
PACKAGE = Path("torch-ext", "hf_dino_deformable_attention")
SOURCES = {"cpu": ("torch-ext/torch_binding.cpp", "csrc/cpu/*.cpp"), "cuda": ("csrc/cuda/*.cu",)}
LIBRARIES = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}  # in an entry for the device
TIME_LIMIT = 600  # seconds for one build
SHOWN_LINES = 15  # of the output of a compiler that fails

OPS_PY = f'''"""The operators of the libraries next to this file, which hf_dino.kernels compiled."""

from pathlib import Path

import torch


loaded = {{Path(library).name for library in torch.ops.loaded_libraries}}  # by an entry whose other library is broken
for library in sorted(Path(__file__).parent.glob("{NAMESPACE}_*.so")):  # cpu before cuda: the schema comes first
    if library.name not in loaded:
        torch.ops.load_library(library)

ops = torch.ops.{NAMESPACE}


def add_op_namespace_prefix(name: str) -> str:
    return f"{NAMESPACE}::{{name}}"
'''


class Builder:
    """A cache of compiled kernels, which compiles those that it lacks.

    Args:
        sources (`Path`): The directory that contains csrc and torch-ext.
        cache (`Path`): Where entries are kept; made if it does not exist, for its owner only.
        time_limit (`float`): Seconds for one build, and for waiting for another process that builds.
    """

    def __init__(self, sources: Path, cache: Path, time_limit: float = TIME_LIMIT):
        self.sources = sources
        self.cache = cache
        self.time_limit = time_limit
        self._failures: dict[str, KernelError] = {}

    def entry(self, device_type: str) -> Path:
        """Return the directory of the entry for `"cpu"` or `"cuda"`, which need not exist yet.

        The compiler is not part of its name, so that a container image may be used without the one that made it.

        Raises:
            KernelError: If there are no sources.
        """
        cuda = [CUDA_FLAGS, torch.version.cuda, requested_architectures()] if device_type == "cuda" else []
        machine = [sys.platform, platform.machine(), platform.libc_ver()]
        flags = [CPP_FLAGS, X86_FLAGS, DEFINITIONS, os.environ.get("CXX")]
        name = [device_type, hash_sources(self.sources), short_hash([torch.__version__, *machine, *flags, *cuda])]
        return self.cache / "-".join(name)

    def get_or_build(self, device_type: str) -> Path:
        """Return the entry for `"cpu"` or `"cuda"`, compiled if it is not there. A failure is not tried again.

        Raises:
            KernelError: If it is not there and cannot be compiled.
        """
        if error := self._failures.get(device_type):
            raise error
        try:
            entry = self.entry(device_type)
            return entry if is_complete(entry) else self._build_once(entry, device_type)
        except KernelError as error:
            self._failures[device_type] = error
            raise

    def _build_once(self, entry: Path, device_type: str) -> Path:
        others = [self.get_or_build("cpu")] if device_type == "cuda" else []
        try:
            self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(f"{entry}.lock", timeout=self.time_limit):  # which the system releases after kill -9
                if not is_complete(entry):  # else another process was faster
                    self._build(entry, device_type, others)
        except Timeout:
            raise KernelError(f"another process has held {entry}.lock for {self.time_limit:.0f} s: end it") from None
        except (OSError, NotImplementedError) as error:  # the latter on file systems without locks
            raise KernelError(
                f"the kernel cannot be built in {self.cache}: {error}; set XDG_CACHE_HOME to a directory "
                "that can be written and has space"
            ) from error
        return entry

    def _build(self, entry: Path, device_type: str, others: list[Path]) -> None:
        deadline = time.monotonic() + self.time_limit
        shutil.rmtree(entry, ignore_errors=True)  # an incomplete one
        with atomic_directory(entry) as draft:
            package = self.sources / PACKAGE
            shutil.copytree(
                package,
                draft,
                ignore=shutil.ignore_patterns("__pycache__"),
                copy_function=shutil.copyfile,  # without the permissions, since an installation may be read-only
                dirs_exist_ok=True,
            )
            (draft / "_ops.py").write_text(OPS_PY)
            for library in (path for other in others for path in other.glob("*.so")):
                shutil.copyfile(library, draft / library.name)
            self._compile(device_type, draft, deadline)
            (draft / "metadata.json").write_text(json.dumps({**METADATA, "backend": {"type": device_type}}, indent=2))

    def _compile(self, device_type: str, draft: Path, deadline: float) -> None:
        sources = [path for pattern in SOURCES[device_type] for path in sorted(self.sources.glob(pattern))]
        # Of a function that several files instantiate the linker keeps the first: let it be one that always runs.
        sources.sort(key=lambda source: source.name in X86_FLAGS)
        work, log = draft / "objects", draft / "build.log"
        work.mkdir()
        objects = [work / f"{source.name}.o" for source in sources]
        compile_all = [compile_command(*pair, self.sources / "csrc") for pair in zip(sources, objects)]
        run_all(compile_all, log, deadline)
        run_all([link_command(objects, draft / f"{NAMESPACE}_{device_type}.so", device_type)], log, deadline)
        shutil.rmtree(work)


def run_all(commands: list[list[str]], log: Path, deadline: float) -> None:
    """Run commands in parallel, and append each with its output to a log once all have succeeded.

    No command outlives the call: when one fails, when time is up or when the user interrupts, the others are killed.

    Args:
        commands (`list[list[str]]`): Each a program with its arguments.
        log (`Path`): Created if it does not exist.
        deadline (`float`): By the clock of `time.monotonic`.

    Raises:
        KernelError: If one fails, or if they take too long.
    """
    jobs = os.environ.get("MAX_JOBS", "")  # as for torch.utils.cpp_extension
    limit = max(1, int(jobs)) if jobs.isdecimal() else min(4, os.cpu_count() or 1)
    with ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile(dir=log.parent)) for _ in commands]
        waiting, running = list(zip(commands, outputs)), dict[subprocess.Popen[bytes], IO[bytes]]()
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    command, output = waiting.pop(0)
                    running[_start(command, output)] = output
                time.sleep(0.01)
                if failed := [process for process in running if process.poll()]:
                    raise KernelError(_failure(failed[0], _read(running[failed[0]])))
                running = {process: output for process, output in running.items() if process.returncode is None}
                if time.monotonic() > deadline:
                    raise KernelError("compiling takes too long: set MAX_JOBS to the number of compilers at a time")
        finally:
            for process in running:
                with suppress(ProcessLookupError, PermissionError):  # it has just ended by itself
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with log.open("a", encoding="utf-8") as joined:
            joined.writelines(f"{shlex.join(command)}\n{_read(output)}" for command, output in zip(commands, outputs))


def _start(command: list[str], output: IO[bytes]) -> "subprocess.Popen[bytes]":
    # in a session of its own, so that it can be killed with the processes that it starts
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _read(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


def _failure(process: "subprocess.Popen[bytes]", printed: str) -> str:
    lines = printed.splitlines()[-SHOWN_LINES:] or ["(it printed nothing)"]
    return "\n    ".join(["this command failed:", shlex.join(map(str, process.args)), *lines])  # type: ignore[arg-type]


def is_complete(entry: Path) -> bool:
    """Return whether an entry can be loaded; it gets its name when all is written, but files may have been deleted."""
    libraries = [f"{NAMESPACE}_{device}.so" for device in LIBRARIES[entry.name.partition("-")[0]]]
    return all((entry / name).is_file() for name in ("__init__.py", "_ops.py", "metadata.json", *libraries))


def hash_sources(sources: Path) -> str:
    """Hash all files that are compiled, included or copied, with their names.

    Raises:
        KernelError: If there are none.
    """
    files = [path for name in ("csrc", "torch-ext") for path in sorted((sources / name).rglob("*"))]
    files = [path for path in files if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")]
    if not files:
        raise KernelError(f"the sources of the kernel are not in {sources}: reinstall hf-dino")
    return short_hash([[(path.relative_to(sources).as_posix(), path.read_bytes()) for path in files], OPS_PY])


def short_hash(content: object) -> str:
    """Return eight letters, enough to tell the entries of one cache apart."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]
