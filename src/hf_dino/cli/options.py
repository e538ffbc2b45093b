"""Command-line options: their spelling, those that several commands share, and checks of how they are combined."""

import inspect
import json
import logging
import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..training_arguments import (
    BOX_FORMAT_HELP,
    COLUMNS_HELP,
    DATASET_HELP,
    MAX_IMAGE_PIXELS_HELP,
    ROTATED_BOXES_HELP,
    STREAMING_HELP,
    parse_option,
)
from ..utils.errors import InputError


if TYPE_CHECKING:
    from ..data import DetectionSplit, ReadOptions


ModelOption = Annotated[
    str,
    typer.Option(
        "--model_name_or_path",
        "--model",
        metavar="NAME",
        help="Directory or Hub id (OWNER/NAME) of the model, or an exported file.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Device to run on, such as cpu, cuda, cuda:1 or mps.",
        show_default="cuda if available, otherwise cpu",
    ),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(metavar="DIRECTORY", help="Directory of images; with --annotations, instead of a dataset."),
]
AnnotationsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="COCO annotation file of --images; with --images, instead of a dataset."),
]
BoxFormatOption = Annotated[Literal["xywh", "xyxy"], typer.Option(help=BOX_FORMAT_HELP)]
RotatedBoxesOption = Annotated[Literal["enclose", "refuse"], typer.Option(help=ROTATED_BOXES_HELP)]
ColumnsOption = Annotated[list[str] | None, typer.Option(metavar="CONTENT=NAME", help=COLUMNS_HELP)]


def _set_max_image_pixels(limit: int | None) -> int | None:
    if limit is not None:
        from ..data.images import set_max_image_pixels

        set_max_image_pixels(limit)
    return limit


# takes effect when it is parsed: a command declares it and need not read it
MaxImagePixelsOption = Annotated[
    int | None,
    typer.Option(metavar="INTEGER", min=1, help=MAX_IMAGE_PIXELS_HELP, callback=_set_max_image_pixels),
]


# takes effect in `Command.invoke`: a command declares it, need not read it, and returns its `Facts`
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print only the result to the standard output, in JSON; the rest to standard error."),
]


class Facts(dict[str, Any]):
    """What a command found or did, by name, as `--json` prints it; docs/cli.md lists the names.

    Args:
        facts (`Mapping[str, Any]`): Numbers, text, paths, and lists and mappings of them.
        status (`int`, *optional*, defaults to 0): Exit status: 1 if the command found something wanting.
    """

    def __init__(self, facts: Mapping[str, Any], status: int = 0):
        super().__init__(facts)
        self.status = status


def print_json(content: Any) -> None:
    """Print one JSON document, in which a number that is NaN or infinite is null."""
    print(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Command(TyperCommand):
    """A command with the conventions of transformers' scripts.

    Options are spelled with underscores. An option that is a list takes several values, as in `--freeze stem encoder`,
    or none for an empty list. Help lists the options by their `rich_help_panel`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            parameter.opts = [_underscored(option) for option in parameter.opts]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after writing each option that is a list once per value, as typer expects it.

        An option with several spellings may have only one value.
        """
        ctx.meta[__name__] = list(args)  # parsing consumes them
        given = {_underscored(argument.partition("=")[0]) for argument in args if argument.startswith("--")}
        for each in self.params:
            if len(spellings := sorted(given.intersection(each.opts))) > 1:
                ctx.fail(f"Give only one of {' and '.join(spellings)}.")
        lists = {option for each in self.params if getattr(each, "multiple", False) for option in each.opts}
        return super().parse_args(ctx, list(_repeat_options(args, lists)))

    def invoke(self, ctx: Any) -> None:
        """Run the command. With `--json`, print the facts that it returns to stdout, and all else to stderr."""
        wants_json = ctx.params.get("json", False)
        with redirect_stdout(sys.stderr if wants_json else sys.stdout):
            facts = super().invoke(ctx)
        if not isinstance(facts, Facts):
            return  # of a process that is not the main one, or of a command that prints its own
        if wants_json:
            print_json(facts)
        raise typer.Exit(facts.status)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of each group of options."""
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in sorted(self.get_params(ctx), key=lambda parameter: parameter.param_type_name):
            group = getattr(parameter, "rich_help_panel", None) or f"{parameter.param_type_name.title()}s"
            groups[group] += filter(None, [_help_record(parameter, ctx)])
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class Group(TyperGroup):
    """A group of commands. Without arguments it prints its help; a wrong argument is an error of one line."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options. Those of shell completion are added after the group is made."""
        for parameter in self.params:
            parameter.opts = [_underscored(option) for option in parameter.opts]
        return super().get_params(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments up to the name of a command."""
        return super().parse_args(ctx, args or ["--help"])

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command and end the process."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.Abort:
            print("error: aborted", file=sys.stderr)
            status = 1
        except UsageError as error:
            message = " ".join(error.format_message().split())
            command = error.ctx.command_path if error.ctx else self.name
            print(f"error: {message} ({command} --help)", file=sys.stderr)
            status = error.exit_code
        sys.exit(status)


UsageError: Any = typer.BadParameter.__base__  # of click or, in later releases, typer's own


def _help_record(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """Return the name and the help of a parameter. To the name of an argument, typer adds its Python type."""
    record = parameter.get_help_record(ctx)
    if record is None or parameter.param_type_name != "argument":
        return record
    name, help = record
    return name.partition(" <")[0], help


def _underscored(option: str) -> str:
    return option[:2] + option[2:].replace("-", "_")


def _repeat_options(arguments: Sequence[str], repeated: Container[str]) -> Iterator[str]:
    """Write `--option a b` as `--option a --option b` for the options in `repeated`.

    Example:

    ```python
    >>> list(_repeat_options(["mine", "--freeze", "stem", "encoder", "--seed", "1"], {"--freeze"}))
    ['mine', '--freeze', 'stem', '--freeze', 'encoder', '--seed', '1']

    ```
    """
    starts = [index for index, argument in enumerate(arguments) if argument.startswith("--")]
    yield from arguments[: min(starts, default=None)]
    for start, stop in zip(starts, [*starts[1:], len(arguments)]):
        option, *values = arguments[start:stop]
        if _underscored(option) in repeated:
            yield from (word for value in values or [""] for word in (option, value))
        else:
            yield from (option, *values)


def parse_height_and_width(option: str, text: str) -> tuple[int, int]:
    """Parse the value of an option that is a height and a width in pixels.

    Example:

    ```python
    >>> parse_height_and_width("--image_size", "800x1066")
    (800, 1066)

    ```
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise InputError(f"{option} {text}: expected HEIGHTxWIDTH, two positive numbers of pixels")
    return int(height), int(width)


def command_line(context: typer.Context) -> str:
    """Return the command line as one would type it, for reports and model cards."""
    return shlex.join([*context.command_path.split(), *context.meta[__name__]])


def make_app(help: str) -> typer.Typer:
    """Make a group of commands, whose options and choices may be typed with dashes or with underscores."""
    return typer.Typer(
        cls=Group,
        help=help,
        rich_markup_mode=None,  # its tables cut off long names of options in narrow terminals
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["--help", "-h"],
            "token_normalize_func": lambda token: token.replace("-", "_"),
        },
    )


def require_one_source(
    context: typer.Context, name: str, dataset: str | None, images: Path | None, annotations: Path | None
) -> None:
    """End the command unless it got either a dataset or both images and annotations.

    Args:
        name (`str`): Of the dataset's parameter, for the error message.
    """
    given = tuple(value is not None for value in (dataset, images, annotations))
    if given not in ((True, False, False), (False, True, True)):
        context.fail(f"Give either {name}, or both --images and --annotations.")


def read_options(box_format: str, rotated_boxes: str, columns: Sequence[str] | None, **more: Any) -> "ReadOptions":
    """Make the options of the readers from those of a command."""
    from ..data import ReadOptions

    return ReadOptions(box_format, rotated_boxes, parse_option("columns", list(columns or [])), **more)


@dataclass(frozen=True)
class Source:
    """Dataset that a command reads: a directory, file or name on the Hub, or images with a COCO annotation file.

    The fields are options of every command.
    """

    dataset: Annotated[str | None, typer.Argument(metavar="DATASET", help=DATASET_HELP, show_default=False)] = None
    images: ImagesOption = None
    annotations: AnnotationsOption = None
    streaming: Annotated[bool, typer.Option("--streaming", help=STREAMING_HELP)] = False
    max_samples: Annotated[
        int | None,
        typer.Option(metavar="INTEGER", min=1, help="Number of images to read of each split; needs --streaming."),
    ] = None
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Directory to keep the images of --streaming in.")
    ] = None
    box_format: BoxFormatOption = "xywh"
    rotated_boxes: RotatedBoxesOption = "enclose"
    columns: ColumnsOption = None
    max_image_pixels: MaxImagePixelsOption = None
    json: JsonOption = False

    def check(self, context: typer.Context) -> None:
        """End the command if the options exclude each other."""
        require_one_source(context, "a DATASET", self.dataset, self.images, self.annotations)
        if self.dataset is None and (self.streaming or self.max_samples or self.cache_dir):
            context.fail("--streaming, --max_samples and --cache_dir need a DATASET.")

    def options(self, **more: Any) -> "ReadOptions":
        """Return the options of the readers, with more of them."""
        return read_options(self.box_format, self.rotated_boxes, self.columns, **more)

    def read(self, **more: Any) -> dict[str, "DetectionSplit"]:
        """Read the dataset, with more options of the readers."""
        from ..data.readers import read_coco_file, read_data, split_from_name

        options = self.options(**more)
        if self.dataset is not None:
            return read_data(
                self.dataset,
                streaming=self.streaming,
                max_samples=self.max_samples,
                cache_dir=self.cache_dir,
                options=options,
            )
        assert self.images is not None and self.annotations is not None
        split = split_from_name(self.annotations.stem) or "train"
        return {split: read_coco_file([self.images], self.annotations, options)}


def reads_dataset(command: Callable[..., Facts]) -> Callable[..., Facts]:
    """Add the options of [`Source`] to a command, whose first argument is one."""

    @wraps(command)
    def run(context: typer.Context, **options: Any) -> Facts:
        source = Source(**{name: options.pop(name) for name in inspect.signature(Source).parameters})
        source.check(context)
        log_to_terminal(hide=["hf_dino.data.dataset"])  # the reader, whose messages are repeated in reports
        return command(source, **options)

    own = list(inspect.signature(command).parameters.values())[1:]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    shared = inspect.signature(Source).parameters.values()
    parameters = [context, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared, *own))]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


class _StderrHandler(logging.Handler):
    """Print to the `sys.stderr` of the moment: that of a progress bar of `rich` prints above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def log_to_terminal(level: int = logging.WARNING, hide: Collection[str] = ()) -> None:
    """Print log messages to stderr, above a progress bar if there is one.

    Args:
        level (`int`, *optional*, defaults to `logging.WARNING`): Lowest level that is printed. Of other packages, at
            least warnings: the HTTP client informs of each request, with secrets that a URL may contain.
        hide (`Collection[str]`, *optional*): Names of loggers that are not printed.
    """
    handler = _StderrHandler()
    handler.addFilter(lambda record: record.name not in hide)
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("hf_dino."))
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", handlers=[handler])
