"""`hf-dino push`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.errors import count_of, summarize_list
from .checkpoints import format_size, print_columns
from .options import Facts, JsonOption, log_to_terminal


if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from ..publishing import Upload

logger = logging.getLogger(__name__)

SENT = ("new", "changed")
NOTES = {
    "kept": "differs on the Hub, perhaps edited there; --overwrite_card replaces it",
    "other": "only in the repository, and stays there",
    "unknown": "not compared",
}


def push(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory to upload.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Model repository on the Hub, OWNER/NAME; created if it is new.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Upload. Without it, the files are only checked and listed.")
    ] = False,
    files: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Other files and directories to upload, such as exported models."),
    ] = None,
    space: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Space on the Hub, OWNER/NAME, to upload --space_dir to.")
    ] = None,
    space_dir: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Directory of the Space, from `hf-dino demo --space`.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH", help="Branch of the model repository; created if it is new.", show_default="main"
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create_pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    commit_message: Annotated[
        str, typer.Option(metavar="TEXT", help="Message of the commit.")
    ] = "Upload with hf-dino push",
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite_card", help="Replace a README.md of the repository that differs.")
    ] = False,
    json: JsonOption = False,
) -> Facts:
    """Upload a model to the Hub, in one commit: weights, configuration, image processor, code and model card.

    Files are checked first: the model loads, its code is that of hf_dino, and no file is a training state or contains
    a token or a path of this machine. Then they are listed, with those of the repository that would be replaced. With
    --yes they are uploaded. The token is that of `hf auth login`, or of the environment variable HF_TOKEN.
    """
    if (space is None) != (space_dir is None):
        context.fail("Give both --space and --space_dir, or neither.")
    log_to_terminal()

    from huggingface_hub import HfApi

    from ..publishing import check_permissions, check_upload, collect_model, collect_space, validate_id

    for each in filter(None, (repo_id, space)):
        validate_id(each)
    plans = [_Plan(collect_model(model, repo_id, files or ()), model, revision)]
    if space is not None and space_dir is not None:
        plans.append(_Plan(collect_space(space_dir, space), space_dir))
    warnings = [text for plan in plans for text in check_upload(plan.upload, plan.folder)]
    api = HfApi()
    for plan in plans:
        plan.compare(api, overwrite_card, is_needed=yes)
        plan.print()
    for text in warnings:
        print(f"warning: {text}")
    if yes:
        for plan in plans:
            check_permissions(plan.repository, plan.upload.repo_id, private=private, create_pr=create_pr)
        for plan in plans:
            plan.push(api, message=commit_message, private=private, create_pr=create_pr)
    else:
        names = [name for plan in plans for name in plan.names]
        size = format_size(sum(plan.upload.files[name].stat().st_size for plan in plans for name in plan.names))
        print(f"nothing was sent; --yes uploads {count_of(len(names), 'file')}, {size}")
    return Facts({"uploaded": yes, "repositories": [plan.facts() for plan in plans], "warnings": warnings})


class _Plan:
    """An upload to one repository: compared, printed and sent."""

    def __init__(self, upload: "Upload", folder: Path, revision: str | None = None):
        self.upload, self.folder, self.revision = upload, folder, revision
        self.states: dict[str, str] = {}
        self.url: str | None = None

    @property
    def names(self) -> list[str]:
        """Return the files to send."""
        return [name for name, state in self.states.items() if state in (*SENT, "unknown")]

    def compare(self, api: "HfApi", overwrite_card: bool, is_needed: bool) -> None:
        """Compare the files with those of the repository, which may be out of reach unless it is needed."""
        from ..publishing import Repository, compare, read_repository

        self.repository = Repository()
        try:
            self.repository = read_repository(api, self.upload, self.revision)
        except OSError as error:
            if is_needed:
                raise
            logger.warning("%s", error)
            self.states = dict.fromkeys(self.upload.files, "unknown")
        else:
            self.states = compare(self.upload, self.repository, overwrite_card)

    def print(self) -> None:
        """List the files, those of the repository that are replaced or stay, and what is not uploaded."""
        unknown = "unknown" in self.states.values()
        known = "exists" if self.repository.exists else "not found: will be created, if your token can"
        branch = f", branch {self.revision}" if self.revision else ""
        print(f"{self.upload.repo_type} {self.upload.repo_id}{branch}: {'not reached' if unknown else known}")
        print_columns([self._row(name) for name in self.states])
        if self.upload.left_out:
            print(f"not uploaded from {self.folder}: {summarize_list(self.upload.left_out, 20)}")

    def _row(self, name: str) -> tuple[str, ...]:
        state = self.states[name]
        return state, name, format_size(self._size(name)), NOTES.get(state, "")

    def _size(self, name: str) -> int:
        path = self.upload.files.get(name)
        return path.stat().st_size if path else self.repository.files[name][0]

    def push(self, api: "HfApi", **options: Any) -> None:
        """Send the files, if there are any to send."""
        from ..publishing import push

        if not self.names:
            print(f"{self.upload.repo_id}: nothing to upload, all files are there")
            return
        self.url = push(api, self.upload, self.repository, self.names, revision=self.revision, **options)
        print(f"uploaded {count_of(len(self.names), 'file')}: {self.url}")

    def facts(self) -> dict[str, Any]:
        """Return what was listed and done."""
        files = [{"path": name, "size": self._size(name), "state": state} for name, state in self.states.items()]
        return {
            "repo_id": self.upload.repo_id,
            "type": self.upload.repo_type,
            "revision": self.revision or "main",
            "exists": self.repository.exists,
            "files": files,
            "left_out": self.upload.left_out,
            "url": self.url,
        }
