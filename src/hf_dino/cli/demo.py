"""`hf-dino demo`."""

from pathlib import Path
from typing import Annotated

import typer

from ..utils.errors import InputError
from .models import load_model
from .options import DeviceOption, MaxImagePixelsOption, log_to_terminal


def demo(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Option(
            "--model_name_or_path",
            "--model",
            metavar="NAME",
            help="Directory or Hub id (OWNER/NAME) of a model, or an exported model; of several, one chooses on the "
            "page.",
        ),
    ],
    examples: Annotated[
        Path | None, typer.Option(metavar="DIRECTORY", help="Directory of images to try on the page.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="INTEGER", min=1, max=65535, help="Port of the page.", show_default="the first free one from 7860"
        ),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also open the page to the internet, through a tunnel of Gradio's makers.")
    ] = False,
    device: DeviceOption = None,
    space: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Write a Space for the Hub into a new directory instead, with the models and examples.",
        ),
    ] = None,
    max_image_pixels: MaxImagePixelsOption = None,
) -> None:
    """Show a page on which one drops an image, and sees the objects in it and where the model looked.

    It needs the extra `demo`, runs on this machine until Ctrl-C, and loads nothing from the internet.
    """
    log_to_terminal()
    if space is not None and (port or share or device):
        context.fail("--port, --share and --device are not read with --space; remove them.")
    if space is not None:
        from ..demo.space import write_space

        write_space(space, model, examples)
        print(f"wrote {space}; try it: cd {space} && python app.py")
        return

    from ..demo.page import launch_page, make_page

    page = make_page({name: load_model(name, device) for name in model}, examples)
    try:
        launch_page(page, server_port=port, share=share)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise InputError(f"--port {port or 7860}: is not free; use a different one") from error
