"""Upload a model, files exported from it and a Space to the Hub: collect, check, compare, and send in one commit each.

Nothing is sent that was not checked, and nothing in a repository is replaced that was not listed.
"""

import hashlib
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, RepoCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from .configuration_dino_detr import DinoDetrConfig
from .hub import load_detector
from .utils.errors import BrokenInputError, InputError, summarize_list
from .utils.io import sha256


CARD = "README.md"
CODE = {path.name: path for path in sorted(Path(__file__).parent.glob("*_dino_detr.py"))}
"""The files of the package that a model directory contains."""

_MODEL_FILES = (
    "config.json", "preprocessor_config.json", "model*.safetensors", "model*.safetensors.index.json", CARD, "LICENSE*",
    *CODE,
)  # fmt: skip

_TRAINING_STATE = (
    "optimizer*", "scheduler*", "scaler*", "sampler*", "random_states*", "rng_state*", "training_args*",
    "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.log", "events.out.tfevents*",
)  # fmt: skip
"""Names of files that are of no use to others, or that run code when they are read."""

_TOKEN = rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}"
_CLIENT_ERRORS: Any = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
"""Errors of the HTTP client, whose package depends on the release of huggingface_hub, and of hf_xet."""

_ANSWERS = {
    401: "the token is not valid; log in again with `hf auth login`, or set HF_TOKEN",
    403: "your token has no permission to write to it; use one that has, or another OWNER",
    404: "repository not found, or your token cannot see it",
    409: "the name is taken by a repository that your token cannot see; use another NAME",
    412: "the repository was changed since its files were listed; start again",
}


@dataclass(frozen=True)
class Upload:
    """Files to upload to a repository.

    Args:
        repo_id (`str`): Owner and name.
        repo_type (`str`): `"model"` or `"space"`.
        files (`dict[str, Path]`): By path in the repository.
        left_out (`list[str]`): What lies beside the files and is not uploaded.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Path]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Repository:
    """A repository as it is on the Hub.

    Args:
        exists (`bool`): Whether it exists and can be seen.
        is_private (`bool`): Whether only its owner can see it.
        commit (`str`, *optional*): Hash of the last commit; `None` if the revision does not exist.
        files (`dict[str, tuple[int, str]]`): Size in bytes and hash of each file: SHA-256, or git's of small ones.
    """

    exists: bool = False
    is_private: bool = False
    commit: str | None = None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


def collect_model(folder: Path, repo_id: str, more: Sequence[Path] = ()) -> Upload:
    """Collect what `from_pretrained` reads from a model directory, its card and code, and other files.

    Args:
        folder (`Path`): The model directory. Checkpoints, logs and everything else in it are left out.
        repo_id (`str`): Owner and name of the repository.
        more (`Sequence[Path]`, *optional*): Files and directories to upload beside them, under their own names. Hidden
            files in directories are left out.

    Raises:
        InputError: If a file is not found, or two have the same name in the repository.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a model directory")
    files = {path.name: path for pattern in _MODEL_FILES for path in sorted(folder.glob(pattern)) if path.is_file()}
    left_out = [path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if path.name not in files]
    for given in map(Path.resolve, more):
        inside, hidden = ([given], []) if given.is_file() else _files_below(given)
        left_out += [path.relative_to(given.parent).as_posix() for path in hidden]
        if not inside:
            raise InputError(f"--files {given}: file not found, or directory without files")
        for path in inside:
            name = path.relative_to(given.parent).as_posix()
            if files.setdefault(name, path).resolve() != path.resolve():
                raise InputError(f"--files {given}: the repository would have two files named {name}; rename one")
    return Upload(repo_id, "model", files, [name for name in left_out if name not in files])


def collect_space(folder: Path, repo_id: str) -> Upload:
    """Collect the files of a Space. Hidden files and caches of Python are left out.

    Raises:
        InputError: If the directory is not that of a Space.
    """
    if not (folder / CARD).is_file():
        raise InputError(f"--space_dir {folder}: is not the directory of a Space (it has no {CARD})")
    files, hidden = ({path.relative_to(folder).as_posix(): path for path in paths} for paths in _files_below(folder))
    return Upload(repo_id, "space", files, list(hidden))


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files in a directory, and those that are hidden or a cache of Python."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = {path: path.relative_to(folder).parts for path in paths}
    hidden = [path for path in paths if any(part[0] == "." or part == "__pycache__" for part in parts[path])]
    return [path for path in paths if path not in hidden], hidden


def check_upload(upload: Upload, folder: Path) -> list[str]:
    """Check files before they are sent: complete, readable, and with nothing that is not for others.

    Args:
        upload (`Upload`): The files.
        folder (`Path`): The directory of the model or of the Space.

    Returns:
        `list[str]`: What the card lacks, though the files can be uploaded.

    Raises:
        InputError: If the directory has no usable model.
        BrokenInputError: If something is missing, or must not be sent.
    """
    validate_id(upload.repo_id)
    if upload.repo_type == "model":
        model, _ = load_detector(str(folder))
        problems = _missing_files(upload.files, CODE if isinstance(model.config, DinoDetrConfig) else {})
    else:
        problems = [] if space_sdk(upload) else [f"{CARD}: has no `sdk` in its metadata, such as `sdk: gradio`"]
    problems += [problem for name, path in upload.files.items() for problem in _leaks(name, path)]
    if problems:
        raise BrokenInputError(f"{folder}: cannot be uploaded: {summarize_list(problems, 3)}")
    return _missing_metadata(upload.files[CARD]) if upload.repo_type == "model" else []


def validate_id(repo_id: str) -> None:
    """Check the name of a repository.

    Raises:
        InputError: If it is not OWNER/NAME in characters that the Hub accepts.
    """
    try:
        validate_repo_id(repo_id)
        is_valid = repo_id.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise InputError(
            f"{repo_id}: must be OWNER/NAME, each of letters, digits, '-', '_' and '.', without '--' or '..'"
        )


def _missing_files(files: Mapping[str, Path], code: Mapping[str, Path]) -> list[str]:
    """Return what a model lacks: a part of it, or of its code, which models of transformers do not need."""
    needed = ["config.json", "preprocessor_config.json", CARD, *code]
    problems = [f"{name} not found" for name in needed if name not in files]
    if not any(name.endswith(".safetensors") for name in files):
        problems.append("model.safetensors not found")
    there = {name: path.read_bytes() for name, path in files.items() if name in needed}
    changed = [name for name, path in code.items() if there.get(name) not in (None, path.read_bytes())]
    if changed:
        names = summarize_list(changed, 3)
        problems.append(f"code of another hf_dino than the installed one ({names}); save it again, see docs/hub.md")
    named = needed[:2] if code else ()
    without_code = [name for name in named if b'"auto_map"' not in there.get(name, b'"auto_map"')]
    return problems + [f"{name}: does not name the code of the model; save the model again" for name in without_code]


def _leaks(name: str, path: Path) -> Iterator[str]:
    """Yield what must not leave this machine: training states, tokens, and paths that tell the user's name."""
    if any(fnmatch(path.name, pattern) for pattern in _TRAINING_STATE):
        yield f"{name}: is a training state, a log or a pickle"
    if name in CODE or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # of weights, only the header is text: its length in 8 bytes, then JSON
        end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
        if re.compile(_TOKEN).search(content, 0, end):
            yield f"{name}: contains a token of the Hub"
        if found := _local_paths().search(content, 0, end):
            yield f"{name}: contains the local path {found[0].decode(errors='replace')}"


def _local_paths() -> re.Pattern[bytes]:
    """Match the home directory and the current one, unless they are the root."""
    folders = {str(folder) for folder in (Path.home(), Path.cwd()) if folder != Path(folder.anchor)}
    names = b"|".join(re.escape(name.encode()) for name in sorted(folders, key=len, reverse=True))
    return re.compile(rb"(?<![\w./-])(?:" + (names or b"(?!)") + rb")(?![\w-])")


def _missing_metadata(card: Path) -> list[str]:
    """Return what a model card lacks for its readers, and for the search of the Hub."""
    data = read_metadata(card, ModelCard)
    tested = {result.dataset_name for result in data.get("eval_results") or ()}
    missing = {
        "a license; add `license: apache-2.0` or that of your weights": data.get("license"),
        "a dataset; add `datasets:` with its name on the Hub": data.get("datasets") or tested,
        "a measured result; `hf-dino evaluate --update_card` adds it": tested,
    }
    return [f"{CARD}: its metadata lacks {name}" for name, found in missing.items() if not found]


def space_sdk(upload: Upload) -> str:
    """Return the `sdk` of a Space, empty if its card does not tell."""
    return str(read_metadata(upload.files[CARD], RepoCard).get("sdk") or "")


def read_metadata(card: Path, kind: type[RepoCard]) -> Any:
    """Read the metadata of a card.

    Raises:
        InputError: If the file is not found.
        BrokenInputError: If its metadata is not valid.
    """
    if not card.is_file():
        raise InputError(f"{card}: file not found")
    try:
        return kind.load(card).data
    # not YAML, or a `model-index` in which something is missing
    except (YAMLError, ValueError, TypeError, OSError) as error:
        raise BrokenInputError(f"{card}: has no valid metadata ({' '.join(str(error).split())})") from None


def read_repository(api: HfApi, upload: Upload, revision: str | None = None) -> Repository:
    """Read the files of a repository, without their content.

    Raises:
        InputError: If the token is not valid.
        OSError: If the Hub cannot be reached.
    """
    with _as_one_line(upload.repo_id):
        try:
            info: Any = api.repo_info(
                upload.repo_id, repo_type=upload.repo_type, revision=revision, files_metadata=True, timeout=30
            )
        except RevisionNotFoundError:
            return Repository(exists=True)
        except RepositoryNotFoundError as error:
            if error.response.headers.get("X-Error-Message") == "Invalid credentials in Authorization header":
                raise
            return Repository()
    files = {each.rfilename: (each.size or 0, each.lfs.sha256 if each.lfs else each.blob_id) for each in info.siblings}
    return Repository(True, bool(info.private), info.sha, files)


def compare(upload: Upload, repository: Repository, overwrite_card: bool = False) -> dict[str, str]:
    """Compare files with those of a repository.

    Args:
        upload (`Upload`): The files.
        repository (`Repository`): Where to.
        overwrite_card (`bool`, *optional*, defaults to `False`): Replace a card that differs.

    Returns:
        `dict[str, str]`: By path: `"new"`, `"changed"`, `"unchanged"`, `"kept"` for a card that differs, which may be
        edited on the Hub, and `"other"` for files of the repository that are not part of the upload and stay.
    """
    states = {name: _compare(path, repository.files.get(name)) for name, path in upload.files.items()}
    if states.get(CARD) == "changed" and not overwrite_card:
        states[CARD] = "kept"
    others = repository.files.keys() - states.keys() - {".gitattributes"}
    return states | dict.fromkeys(sorted(others), "other")


def _compare(path: Path, remote: tuple[int, str] | None) -> str:
    if remote is None:
        return "new"
    size, digest = remote
    return "unchanged" if path.stat().st_size == size and digest == _digest(path, len(digest)) else "changed"


def _digest(path: Path, length: int) -> str:
    if length == len(hashlib.sha256().hexdigest()):
        return sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def push(
    api: HfApi,
    upload: Upload,
    repository: Repository,
    names: Sequence[str],
    *,
    message: str,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
) -> str:
    """Upload files in one commit; create the repository and the branch if they do not exist.

    Args:
        api (`HfApi`): Client of the Hub.
        upload (`Upload`): The files.
        repository (`Repository`): The repository as it was compared; if it has changed since then, nothing is sent.
        names (`Sequence[str]`): Paths of the files to send.
        message (`str`): Message of the commit.
        revision (`str`, *optional*): Branch; by default `main`.
        private (`bool`, *optional*, defaults to `False`): Create a private repository.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of changing the branch.

    Returns:
        `str`: Address of the commit or of the pull request.

    Raises:
        InputError: If the token does not permit this.
        OSError: If the Hub cannot be reached.
    """
    repo_id, repo_type = upload.repo_id, upload.repo_type
    with _as_one_line(repo_id):
        if not repository.exists:
            sdk = space_sdk(upload) if repo_type == "space" else None
            api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=sdk)
        if revision and not repository.commit:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, upload.files[name]) for name in names],
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else repository.commit,
        )
    return str(commit.pr_url or commit.commit_url)


def check_permissions(repository: Repository, repo_id: str, *, private: bool, create_pr: bool) -> None:
    """Check all that can be wrong before the first repository is created.

    Raises:
        InputError: If there is no token, or the options do not fit the repository.
    """
    if not get_token():
        raise InputError("a token with write access is needed to upload; log in with `hf auth login` or set HF_TOKEN")
    if create_pr and not repository.exists:
        raise InputError(f"--create_pr: {repo_id} does not exist; leave it out to create the repository")
    if private and repository.exists and not repository.is_private:
        raise InputError(f"--private: {repo_id} exists and is public; make it private in its settings on the Hub")


@contextmanager
def _as_one_line(repo_id: str) -> Iterator[None]:
    """Convert errors of the client to one line, without the token, which some of them quote."""
    try:
        yield
    except _CLIENT_ERRORS as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in _ANSWERS:
            raise InputError(f"{repo_id}: {_ANSWERS[status]} ({status})") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{repo_id}: the Hub cannot be used ({_without_token(reason)[:300]})") from None


def _without_token(text: str) -> str:
    secret = get_token() or "***"
    for quoted in (secret, repr(secret)[1:-1], repr(secret.encode())[2:-1]):
        text = text.replace(quoted, "***")
    return re.sub(_TOKEN.decode(), "***", text)
