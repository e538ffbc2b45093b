"""A page on which one drops an image, sees the objects in it, and looks at where DINO looked."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.images import list_images
from ..inspection import draw_reference_points, draw_refinement, draw_sampling_points
from ..utils.errors import InputError, count_of
from ..visualization import class_colors
from .findings import FILES, LOWEST_SCORE, Finding, find_objects


COLUMNS = ["#", "class", "score", "x0", "y0", "x1", "y1"]
MAX_HOVERED = 50  # each is an image of its own for the browser
HOVER_EDGE = 640  # pixels
DRAWING, HOVER, TABLE, LOOKS = TABS = ("Drawing", "Hover", "Table", "How DINO looked")
START = "Drop an image, take one with the camera, or choose an example."
CHOOSE = "Click a box in the drawing or a row of the table, or choose an object here."
LAYER = "Decoder layer (0: all)"
NEEDS_PYTORCH = "This needs the PyTorch model; the one chosen is an exported file, which returns detections only."

# a file is made when its button is clicked, then the hidden link to it is
CLICK_LINK = "() => setTimeout(() => document.querySelector('#download').click(), 200)"
STYLE = """
#downloads {gap: 8px}
#downloads button {min-width: 60px; flex: 1 1 60px}
@media (min-width: 900px) {#points {max-width: calc(50% - 8px); margin-right: auto}}
footer {display: none !important}
"""


def detect(models: Mapping[str, Any], image: dict[str, Any] | None, name: str) -> tuple[Finding, Any]:
    """Run the model; return what it found, and the classes to choose from."""
    detector, processor = models[name]
    finding = Finding(text=START) if image is None else find_objects(detector, processor, Path(image["path"]))
    return finding, gr.Dropdown(choices=sorted({each["name"] for each in finding.detections}), value=[])


def redraw(finding: Finding, threshold: float, classes: Sequence[str], chosen: int | None) -> tuple[Any, ...]:
    """Return the drawing, the table, the line below the image, the objects to choose from, and the downloads."""
    if not finding.preview:
        return None, [], finding.text, gr.Dropdown(choices=[], value=None), gr.Row(visible=False)
    kept = finding.keep(threshold, classes)
    count = count_of(len(kept), "detection")
    text = f"**{count}** ({len(finding.detections)} above {LOWEST_SCORE}) · {finding.text}"
    numbered = ((index, finding.detections[index]) for index in kept)
    objects = [(f"{index + 1} · {each['name']} {each['score']:.2f}", index) for index, each in numbered]
    chosen = chosen if chosen in kept else next(iter(kept), None)
    return (
        finding.draw(kept),
        finding.rows(kept),
        text,
        gr.Dropdown(choices=objects, value=chosen),
        gr.Row(visible=True),
    )


def show_hover(tab: str, finding: Finding, threshold: float, classes: Sequence[str]) -> Any:
    """Return an image whose boxes light up under the pointer, if its tab is open."""
    if tab != HOVER or not finding.preview:
        return gr.skip()
    preview = finding.open_preview()
    preview.thumbnail((HOVER_EDGE, HOVER_EDGE))
    rows = finding.scaled(finding.keep(threshold, classes)[:MAX_HOVERED], preview.width)
    boxes = [tuple(max(0, round(value)) for value in each["box"]) for each in rows]
    labels = [f"{each['name']} {each['score']:.2f}" for each in rows]
    colors = class_colors(finding.classes.values())
    color_map = {label: colors[each["name"]] for label, each in zip(labels, rows)}
    return gr.AnnotatedImage((preview, list(zip(boxes, labels))), color_map=color_map)


def show_looks(tab: str, finding: Finding, chosen: int | None, layer: int, close_up: bool) -> Any:
    """Return a line of text, the encoder's points, and the chosen object's sampling points and boxes."""
    if tab != LOOKS:
        return (gr.skip(),) * 4
    inspection = finding.inspection
    if inspection is None:
        return NEEDS_PYTORCH if finding.preview else START, None, None, None
    image = finding.open_image()
    points = draw_reference_points(image, inspection)
    if chosen is None or chosen >= len(finding.detections):
        return CHOOSE, points, None, None
    index = min(layer, len(inspection.boxes)) - 1
    sampled = draw_sampling_points(image, inspection, chosen, index if layer else None, close_up=close_up)
    label = finding.detections[chosen]["label"]
    return CHOOSE, points, sampled, draw_refinement(image, inspection, chosen, label=label, close_up=close_up)


def click_drawing(finding: Finding, threshold: float, classes: Sequence[str], event: gr.SelectData) -> Any:
    """Choose the object that was clicked, and open the tab of where DINO looked."""
    index = finding.detection_at(finding.keep(threshold, classes), tuple(event.index))
    return (gr.skip(), gr.skip()) if index is None else (index, gr.Tabs(selected=LOOKS))


def click_row(event: gr.SelectData) -> Any:
    """Choose the object of a row, and open the tab of where DINO looked."""
    return int(event.row_value[0]) - 1, gr.Tabs(selected=LOOKS)


def make_file(folder: str, kind: str, finding: Finding, threshold: float, classes: Sequence[str]) -> Path:
    """Write what is shown to a file in a new directory in `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return finding.save(finding.keep(threshold, classes), kind, Path(tempfile.mkdtemp(dir=folder)))
    except InputError:
        raise gr.Error("The image is not there any more; drop it again.", print_exception=False) from None


def wide(name: str) -> dict[str, Any]:
    """Return the options of a component that fills the width of a phone."""
    return {"elem_id": name, "min_width": 260}


def make_page(models: Mapping[str, tuple[Any, Any]], examples: Path | None = None) -> gr.Blocks:
    """Make the page, which [`launch_page`] opens.

    An image is processed once. The slider and the choice of classes only filter and draw what was found.

    Args:
        models (`Mapping[str, tuple]`): Name to model and image processor, of the models that one can choose; the
            model is a `DinoDetrForObjectDetection` or an `ExportedDetector`.
        examples (`Path`, *optional*): Directory of images to try.

    Raises:
        InputError: If there is no image in `examples`.

    Example:

    ```python
    page = make_page({"mine": load_model_and_processor("runs/mine")})
    launch_page(page)
    ```
    """
    num_layers = max(model.config.decoder_layers for model, _ in models.values())
    with gr.Blocks(title="DINO", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as page:
        finding, tab = gr.State(Finding(text=START), time_to_live=3600), gr.State(DRAWING)
        shown = partial(gr.Image, show_label=False, interactive=False, buttons=["fullscreen", "download"])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(type="filepath", image_mode=None, label="Image", height=320, elem_id="image")
                text = gr.Markdown(START, elem_id="text")
                model = gr.Dropdown(list(models), label="Model", visible=len(models) > 1, elem_id="model")
                if examples is not None:
                    gr.Examples([[str(path)] for path in list_images([examples])], image, label="Examples")
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    threshold = gr.Slider(LOWEST_SCORE, 1, 0.3, step=0.01, label="Lowest score", **wide("threshold"))
                    classes = gr.Dropdown([], multiselect=True, label="Classes (none: all)", **wide("classes"))
                with gr.Tabs(selected=DRAWING, overflow_behavior="wrap") as tabs:
                    with gr.Tab(DRAWING, id=DRAWING) as drawing_tab:
                        drawing = shown(format="jpeg", elem_id="drawing")
                    with gr.Tab(HOVER, id=HOVER) as hover_tab:
                        hover = gr.AnnotatedImage(format="jpeg", show_label=False, elem_id="hover")
                        gr.Markdown(f"Up to {MAX_HOVERED} detections, those with the highest scores.")
                    with gr.Tab(TABLE, id=TABLE) as table_tab:
                        table = gr.Dataframe(headers=COLUMNS, interactive=False, show_label=False, elem_id="table")
                    with gr.Tab(LOOKS, id=LOOKS) as looks_tab:
                        note = gr.Markdown(CHOOSE, elem_id="note")
                        with gr.Row():
                            chosen = gr.Dropdown([], label="Object", **wide("object"))
                            layer = gr.Slider(0, num_layers, num_layers, step=1, label=LAYER, **wide("layer"))
                        close_up = gr.Checkbox(label="Close-up", elem_id="close_up")
                        with gr.Row():
                            sampled = shown(format="webp", **wide("sampled"))
                            refined = shown(format="webp", **wide("refined"))
                            points = shown(format="webp", **wide("points"))
                with gr.Row(visible=False, elem_id="downloads") as downloads:
                    buttons = [gr.Button(kind, size="sm") for kind in FILES]
                download = gr.DownloadButton(visible="hidden", elem_id="download")

        quick: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_limit": 4}
        kept = [finding, threshold, classes]
        detected = gr.on(
            [image.change, model.input],
            partial(detect, models),
            [image, model],
            [finding, classes],
            preprocess=False,  # so that a broken image is told here and not by gradio
            concurrency_limit=1,
            show_progress_on=drawing,
        )
        redrawing = redraw, [*kept, chosen], [drawing, table, text, chosen, downloads]
        hovering = show_hover, [tab, *kept], hover
        looking = show_looks, [tab, finding, chosen, layer, close_up], [note, points, sampled, refined]
        for each, name in zip((drawing_tab, hover_tab, table_tab, looks_tab), TABS):
            opened = each.select(partial(str, name), None, tab, **quick)
            opened.then(*hovering, **quick)
            opened.then(*looking, **quick)
        for answer, triggers in (
            (redrawing, [threshold.input, classes.input]),
            (hovering, [threshold.release, classes.input]),
            (looking, [chosen.change, layer.input, close_up.input]),
        ):
            detected.then(*answer, **quick)
            gr.on(triggers, *answer, **quick)
        drawing.select(click_drawing, kept, [chosen, tabs], **quick)
        table.select(click_row, None, [chosen, tabs], **quick)
        for button, kind in zip(buttons, FILES):
            made = button.click(
                partial(make_file, download.GRADIO_CACHE, kind), kept, download, show_progress="hidden"
            )
            made.success(None, js=CLICK_LINK)
    return page


def launch_page(page: gr.Blocks, **options: Any) -> Any:
    """Open the page, without fonts from the web and without analytics.

    Args:
        options: Of `gradio.Blocks.launch`, such as `server_port` and `share`.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(primary_hue="blue", font=fonts[0], font_mono=fonts[1])
    return page.launch(theme=theme, css=STYLE, **options)
