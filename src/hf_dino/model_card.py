"""Write model cards (the README.md of a model directory) of converted and fine-tuned models.

Only measured results enter the card's `model-index`, which leaderboards read. Published ones are quoted in the text.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .configuration_dino_detr import UNUSED_LABEL, DinoDetrConfig
from .family import FAMILY, member_of


TAGS = ["object-detection", "vision", "detr", "dino", "dino-detr", "hf_dino"]
OTHER_TAGS = ["object-detection", "vision", "detr", "hf_dino"]

METRIC_NAMES = {
    "ap": "AP@[.50:.95]",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "ar_1": "AR 1",
    "ar_10": "AR 10",
    "ar_100": "AR 100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}
"""Key and display name of the twelve COCO metrics, each in [0, 1], in pycocotools' order."""

COCO_MAX_DETECTIONS = 100
"""Detections with the highest scores that COCO's metrics count, of each class in each image."""


def describe_max_detections(max_detections: int) -> str:
    """Return a note on metrics that count another number of detections than COCO's, empty if it is COCO's."""
    if max_detections == COCO_MAX_DETECTIONS:
        return ""
    return (
        f"With {max_detections} detections of a class in an image instead of {COCO_MAX_DETECTIONS}: not comparable "
        "with COCO's metrics."
    )


def metric_name(metric: str) -> str:
    """Return the display name of a metric, also of one that is not COCO's: `ar_500` is AR 500."""
    return METRIC_NAMES.get(metric, metric.replace("_", " ").upper() if metric.startswith("ar_") else metric)


@dataclass(frozen=True)
class CodeBase:
    """Another implementation of DINO, whose checkpoints can be converted.

    Args:
        name (`str`): Its name.
        url (`str`): Its repository.
        owner (`str`): Who releases its checkpoints.
        settings (`str`): Source of the converted model's settings.
        differences (`str`): Differences that its users may notice.
        model (`str`): Name of the model.
        num_labels (`int`): Number of labels of its models of COCO.
        paper (`str`): The model's paper, unless that is DINO's.
    """

    name: str
    url: str
    owner: str
    settings: str
    differences: str = ""
    model: str = "DINO"
    num_labels: int = 80
    paper: str = ""


CODE_BASES = {
    "official": CodeBase(
        name="IDEA-Research/DINO",
        url="https://github.com/IDEA-Research/DINO",
        owner="IDEA-Research",
        settings="All settings were read from the file.",
        num_labels=91,
    ),
    "dab_deformable": CodeBase(
        name="IDEA-Research/DAB-DETR",
        url="https://github.com/IDEA-Research/DAB-DETR",
        owner="IDEA-Research",
        settings="All settings were read from the file, or are fixed in its code.",
        model="DAB-Deformable-DETR",
        num_labels=91,
        paper="[DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR](https://arxiv.org/abs/2201.12329)",
    ),
    "dn_deformable": CodeBase(
        name="IDEA-Research/DN-DETR",
        url="https://github.com/IDEA-Research/DN-DETR",
        owner="IDEA-Research",
        settings="All settings were read from the file, or are fixed in its code.",
        model="DN-Deformable-DETR",
        num_labels=91,
        paper="[DN-DETR: Accelerate DETR Training by Introducing Query DeNoising](https://arxiv.org/abs/2203.01305)",
    ),
    "detrex": CodeBase(
        name="detrex",
        url="https://github.com/IDEA-Research/detrex",
        owner="IDEA-Research",
        settings="The sizes were read from the shapes of the tensors; the file contains no settings, so the others, "
        "such as the 8 heads of the attention, are detrex's defaults.",
        differences="detrex evaluates one image at a time, and treats the padding of a larger batch as image; this "
        "model uses padding masks, so an image gives the same detections in any batch. detrex clips boxes to the "
        "image and drops those that become empty; this model returns them as they are predicted.",
    ),
    "mmdet": CodeBase(
        name="MMDetection",
        url="https://github.com/open-mmlab/mmdetection",
        owner="OpenMMLab",
        settings="The sizes were read from the shapes of the tensors, all else from the configuration in the file.",
        differences="Both use padding masks. MMDetection resizes images with OpenCV, whose pixels differ slightly, "
        "and clips boxes to the image; this model returns them as they are predicted. `box_prediction_epsilon` in "
        "the configuration is MMDetection's.",
    ),
}


def converted_card(
    config: DinoDetrConfig,
    *,
    checkpoint: str,
    sha256: str,
    weights: str,
    size: Mapping[str, int],
    coco: bool = False,
    epochs: int | None = None,
    published_ap: float | None = None,
    published_hash_known: bool = False,
    source_format: str = "official",
    source_url: str | None = None,
    license_name: str | None = None,
    embedding_source: str = "",
    changes: str = "",
    is_ema: bool = False,
) -> str:
    """Write the card of a model converted from a checkpoint of another code base.

    Only for a published file does the card say that it is official and trained on COCO, and name the authors' license.

    Args:
        config (`DinoDetrConfig`): The model's configuration.
        checkpoint (`str`): Name of the file.
        sha256 (`str`): Hash of the file, in hexadecimal.
        weights (`str`): Name of the weights in the file; `"ema_model"` are EMA weights.
        size (`dict[str, int]`): Size of the image processor, in pixels.
        coco (`bool`, *optional*, defaults to `False`): Whether labels are assumed to be COCO's category ids.
        epochs (`int`, *optional*): Number of epochs trained, if the file contains it.
        published_ap (`float`, *optional*): AP that the authors published for this file, as a fraction of 1. `None` if
            the file was not recognized as a published one.
        published_hash_known (`bool`, *optional*, defaults to `False`): Whether the file was recognized by its hash,
            rather than by its name and settings.
        source_format (`str`, *optional*, defaults to `"official"`): Key of [`CODE_BASES`].
        source_url (`str`, *optional*): Address of the published file.
        license_name (`str`, *optional*): License of the published file; by default Apache-2.0.
        embedding_source (`str`, *optional*): Source of temperature and offset of the position embedding.
        changes (`str`, *optional*): Sentences about classes that were removed or replaced.
        is_ema (`bool`, *optional*, defaults to `False`): Whether the weights are EMA weights.

    Returns:
        `str`: Markdown with a metadata block, to be saved as `README.md`.
    """
    published = published_ap is not None
    code_base = CODE_BASES[source_format]
    data = ModelCardData(
        license=(license_name or "apache-2.0").lower() if published else None,
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=TAGS,
        datasets=["detection-datasets/coco"] if published else None,
    )
    title = f"{code_base.model}, {backbone_name(config)}, {config.num_feature_levels} feature levels"
    official = "official" if source_format == "official" else "published"
    name = f"[`{checkpoint}`]({source_url})" if source_url else f"`{checkpoint}`"
    origin = f"the {official} checkpoint {name}" if published else name
    kind = " of " if published else ", a checkpoint in the format of "
    ema = f" (its EMA weights, `{weights}`)" if is_ema or weights == "ema_model" else ""
    trained = f" According to the file, it was trained for {epochs} epochs." if epochs else ""
    sections = [
        f"# {title}",
        _DESCRIPTION,
        f"This is {code_base.model}, an ancestor of DINO: {code_base.paper}." if code_base.paper else "",
        f"Converted from {origin}{ema}{kind}[{code_base.name}]({code_base.url}), "
        f"SHA-256 `{sha256}`.{trained} {code_base.settings} The conversion renames, splits and reorders "
        f"tensors and does not change their values. {changes}",
        _embedding(config, embedding_source),
        f"## Differences to {code_base.name}\n\n{code_base.differences}" if code_base.differences else "",
        _usage(config),
        _preprocessing(size, config),
        _labels(config) + (_names_of_coco(source_format) if coco and not published else ""),
        _published(published_ap, published_hash_known),
        _LIMITS,
        _license_of_published(config, code_base, license_name) if published else _LICENSE,
        _CITATION,
    ]
    return _card(data, sections)


def training_command(script: str, argv: Sequence[str], num_processes: int) -> str:
    """Return the shell command that repeats a training run, without absolute paths of the machine.

    Absolute paths below the current directory become relative to it. Of any other only the last component is kept, as
    `path/to/NAME`, which has to be replaced before the command is repeated.

    Args:
        script (`str`): Path of the script.
        argv (`Sequence[str]`): Its arguments.
        num_processes (`int`): Number of processes of the run.

    Example:

    ```python
    >>> training_command("train.py", ["--dataset", "my data"], num_processes=1)
    "python train.py --dataset 'my data'"
    >>> training_command("train.py", ["--dataset", "/home/me/mine"], num_processes=4)
    'accelerate launch --multi_gpu --num_processes 4 train.py --dataset path/to/mine'

    ```
    """
    several = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(num_processes)]  # on CPUs too
    launcher = several if num_processes > 1 else ["python"]
    return shlex.join([*launcher, *(_ABSOLUTE_PATH.sub(_shorten_path, argument) for argument in (script, *argv))])


# a slash that neither continues a relative path nor belongs to a URL, and all up to the end of a JSON string
_ABSOLUTE_PATH = re.compile(r'(?<![\w./~-])/(?!/)[^"]*')


def _shorten_path(match: re.Match[str]) -> str:
    path = Path(match[0])
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else f"path/to/{path.name}"


def finetuned_card(
    config: PreTrainedConfig,
    *,
    metrics: Mapping[str, float],
    dataset: str,
    command: str,
    base_model: str | None = None,
    backbone: str | None = None,
    split: str | None = None,
    size: Mapping[str, int] | None = None,
    max_detections: int = COCO_MAX_DETECTIONS,
) -> str:
    """Write the card of a model trained or fine-tuned with hf_dino.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        metrics (`dict[str, float]`): Measured metrics, as fractions of 1, with keys of `METRIC_NAMES`; may be empty.
            Negative and non-finite values, which pycocotools returns where there are no such objects, are omitted.
        dataset (`str`): Display name of the training dataset.
        command (`str`): The command that trained the model, from [`training_command`].
        base_model (`str`, *optional*): Hub id or directory of the model that was fine-tuned. `None` if training
            started from random weights, except perhaps the backbone's.
        backbone (`str`, *optional*): Pretrained weights of the backbone alone, as named for
            [`~backbone_weights.load_backbone_weights`].
        split (`str`, *optional*): Split of the dataset on which the metrics were measured.
        size (`dict[str, int]`, *optional*): Size of the image processor, in pixels.
        max_detections (`int`, *optional*, defaults to 100): Detections of a class in an image that the metrics count.

    Returns:
        `str`: Markdown with a metadata block, to be saved as `README.md`.
    """
    measured = _measurable(metrics)
    is_dino = isinstance(config, DinoDetrConfig)
    name = f"{_slug(config.model_type)}-{_slug(dataset)}"
    on_hub = base_model is not None and _is_hub_id(base_model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=TAGS if is_dino else OTHER_TAGS,
        base_model=base_model if on_hub else None,
        model_name=name if measured else None,
        eval_results=_eval_results(measured, dataset, split, max_detections) or None,
    )
    sections = [
        f"# {_model_name(config)}, {backbone_name(config)}, trained on {dataset}",
        _description(config),
        f"Trained {_start(base_model, backbone)} on {dataset}, with this command:\n\n```bash\n{command.strip()}\n```",
        _measured(measured, dataset, split, describe_max_detections(max_detections)),
        _usage(config),
        _preprocessing(size, config) if size else "",
        _labels(config),
        _LIMITS,
        _LICENSE,
        _CITATION if is_dino else "",
    ]
    return _card(data, sections)


def _measurable(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that were measured: pycocotools returns -1 where there are no such objects."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value) and value >= 0}


def _eval_results(
    measured: Mapping[str, float], dataset: str, split: str | None, max_detections: int
) -> list[EvalResult]:
    limit = "" if max_detections == COCO_MAX_DETECTIONS else f" ({max_detections} detections per class and image)"
    return [
        EvalResult(
            task_type="object-detection",
            dataset_type=_slug(dataset),
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric_name(metric) + limit,
            metric_value=round(value, 4),
        )
        for metric, value in measured.items()
    ]


def add_results(
    card: str,
    metrics: Mapping[str, float],
    dataset: str,
    split: str | None = None,
    max_detections: int = COCO_MAX_DETECTIONS,
    model_type: str = DinoDetrConfig.model_type,
) -> str:
    """Add measured metrics to a model card: to its metadata, and as a section. Others of this split are replaced.

    Args:
        card (`str`): The card, of hf_dino or not.
        metrics (`dict[str, float]`): As for [`finetuned_card`].
        dataset (`str`): Display name of the dataset.
        split (`str`, *optional*): Split of the dataset.
        max_detections (`int`, *optional*, defaults to 100): Detections of a class in an image that the metrics count.
        model_type (`str`, *optional*): That of the configuration, for the name of a model whose card has none.

    Returns:
        `str`: The card with them.

    Raises:
        ValueError: If the metadata of the card cannot be read.
    """
    content = ModelCard(card)
    measured = _measurable(metrics)
    data: Any = content.data
    where = (dataset, split)
    others = [each for each in data.eval_results or () if (each.dataset_name, each.dataset_split) != where]
    data.eval_results = [*others, *_eval_results(measured, dataset, split, max_detections)]
    data.model_name = data.model_name or f"{_slug(model_type)}-{_slug(dataset)}"
    section = _measured(measured, dataset, split, describe_max_detections(max_detections))
    title = f"{dataset}, {split}" if split else dataset
    section = section.replace("## Results", f"## Results on {title}", 1) + "\n\n"
    same = rf"Nothing was measured|\*\*Measured\*\* with \w+ on {re.escape(title)}, as "
    earlier = re.compile(rf"^## Results[^\n]*\n\n(?:{same}).*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = earlier.sub("", content.text)
    before, limits, after = text.partition("## Limits")
    return f"---\n{data.to_yaml()}\n---\n{before.rstrip()}\n\n{section}{limits}{after}".rstrip() + "\n"


def _start(base_model: str | None, backbone: str | None) -> str:
    if base_model:
        return f"from {_origin(base_model)}"
    return (
        f"with the backbone from {_origin(backbone)} and the rest from random weights"
        if backbone
        else "from random weights"
    )


def _origin(name: str) -> str:
    if name.startswith("torchvision/"):
        return f"`{name}`"
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else f"the local model `{Path(name).name}`"


def _card(data: ModelCardData, sections: list[str]) -> str:
    body = "\n\n".join(section.strip() for section in sections if section)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


_DESCRIPTION = (
    "An object detector of the DETR family: [DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object "
    "Detection](https://arxiv.org/abs/2203.03605), for transformers. Not to be confused with the self-supervised "
    "vision transformers of the same name."
)


def _model_name(config: PreTrainedConfig) -> str:
    member = member_of(config)
    if member is None:
        return str(config.model_type).upper().replace("_", "-")
    is_dino = member in (FAMILY["dino_4scale"], FAMILY["dino_5scale"])
    return "DINO" if is_dino else member.name


def _description(config: PreTrainedConfig) -> str:
    """Return which model it is, with its paper."""
    member, name = member_of(config), _model_name(config)
    if name == "DINO":
        return _DESCRIPTION
    paper = f": {member.paper}" if member else ""
    if isinstance(config, DinoDetrConfig):
        return f"{_DESCRIPTION}\n\nThis is {name}, an ancestor or ablation of DINO{paper}."
    return f"An object detector of the DETR family, {name}{paper}, trained with hf_dino."


def _usage(config: PreTrainedConfig) -> str:
    code = _USAGE if _needs_package(config) else _USAGE.replace("import hf_dino  # registers the model\n", "")
    if not isinstance(config, DinoDetrConfig):
        return code
    return (
        code.replace("registers the model\n", "registers the model; without the package see below\n") + _USAGE_WITHOUT
    )


_USAGE = """## Usage

```python
import hf_dino  # registers the model
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForObjectDetection

model_id = "path/or/hub-id"
model = AutoModelForObjectDetection.from_pretrained(model_id).eval()
processor = AutoImageProcessor.from_pretrained(model_id)

image = ImageOps.exif_transpose(Image.open("image.jpg"))  # apply the EXIF orientation
with torch.no_grad():
    outputs = model(**processor(images=image, return_tensors="pt"))
[detections] = processor.post_process_object_detection(
    outputs, threshold=0.3, target_sizes=[(image.height, image.width)]
)
for score, label, box in zip(detections["scores"], detections["labels"], detections["boxes"]):
    print(f"{model.config.id2label[label.item()]} {score:.2f}", box.tolist())  # x0, y0, x1, y1 in pixels
```"""

_USAGE_WITHOUT = """

The directory contains the model code, so hf_dino need not be installed (torch, torchvision, transformers, scipy,
pillow and numpy must be): omit `import hf_dino` and, after reading that code, pass `trust_remote_code=True` to both
calls of `from_pretrained`. `pipeline("object-detection", model=model_id)` works either way."""


def _needs_package(config: PreTrainedConfig) -> bool:
    return type(config).__module__.startswith(__package__ or "hf_dino")


def _preprocessing(size: Mapping[str, int], config: PreTrainedConfig) -> str:
    if "shortest_edge" in size:
        resized = (
            f"so that the shorter side has {size['shortest_edge']} pixels, or fewer if the longer side would exceed "
            f"{size['longest_edge']}"
        )
    else:
        resized = f"to {size['height']} x {size['width']} pixels (height x width), regardless of the aspect ratio"
    if not isinstance(config, DinoDetrConfig):
        return f"## Preprocessing\n\nThe image processor resizes images {resized}."
    return (
        f"## Preprocessing\n\nThe image processor resizes images {resized}, and normalizes them with the mean and "
        f"standard deviation of ImageNet. Images of different sizes are padded at the right and at the bottom to form "
        f"a batch, with a `pixel_mask` that is 1 on the image. Boxes are fractions of the image without its padding. "
        f"`from_pretrained(model_id, backend='pil')` resizes with Pillow, like the official implementation."
    )


def _labels(config: PreTrainedConfig) -> str:
    names = [config.id2label[label] for label in sorted(config.id2label)]
    unused = [str(label) for label, name in enumerate(names) if name == UNUSED_LABEL]
    text = f"## Labels\n\n{len(names)} labels, named in `config.id2label`."
    if unused:
        return text + (
            f" Labels are the original category ids of the dataset, of which {len(names) - len(unused)} are used; "
            f"{', '.join(unused)} are unused and named `{UNUSED_LABEL}`."
        )
    if names == [f"class_{label}" for label in range(len(names))]:
        return text + (
            " The checkpoint does not contain their names: pass them as `id2label` to `from_pretrained`. The official "
            "implementation uses the original category ids of the dataset as labels, so label 0 is often unused."
        )
    return text + f" {', '.join(names[:30])}{' ...' if len(names) > 30 else ''}."


def _published(box_ap: float | None, hash_known: bool) -> str:
    head = "## Results\n\n"
    if box_ap is None:
        return head + "No published result is known for this file, and none was measured during the conversion."
    recognized = (
        "its SHA-256" if hash_known else "its name, settings and epoch; the hash of the file is not publicly known"
    )
    return head + (
        f"| data | metric | value | source |\n|---|---|---|---|\n"
        f"| COCO val2017 | box AP@[.50:.95] | {box_ap:.3f} | **published** by the authors, **not measured here** |\n\n"
        f"The file was recognized by {recognized}."
    )


def _measured(measured: Mapping[str, float], dataset: str, split: str | None, note: str) -> str:
    head = "## Results\n\n"
    if not measured:
        return head + "Nothing was measured."
    rows = "\n".join(f"| {metric_name(name)} | {value:.3f} |" for name, value in measured.items())
    where = f"{dataset}, {split}" if split else dataset
    how = f"**Measured** with pycocotools on {where}, as fractions of 1{'. ' if note else ':'}{note}"
    return f"{head}{how}\n\n| metric | value |\n|---|---|\n{rows}"


_LIMITS = """## Limits

Scores are not calibrated probabilities. Objects, viewpoints and scenes that are missing from the training data are
detected less reliably or not at all, and errors are not distributed evenly over people and regions: evaluate on your
own data before relying on the model, above all where people are concerned. At most `num_queries` objects per image can
be detected."""


def _names_of_coco(source_format: str) -> str:
    number = CODE_BASES[source_format].num_labels
    return (
        f" The checkpoint does not contain their names: {number} classes are assumed to be COCO's. If they are "
        f"others, pass their names as `id2label` to `from_pretrained`."
    )


_LICENSE = (
    "## License\n\nThe model code is Apache-2.0. The license of the weights depends on the training data and on the "
    "pretrained weights: add the license that applies to the weights."
)


def _embedding(config: DinoDetrConfig, source: str) -> str:
    if not source:
        return ""
    return (
        f"Position embedding: temperature {config.positional_encoding_temperature:g}, offset "
        f"{config.positional_encoding_offset:g}, {source}."
    )


def _license_of_published(config: DinoDetrConfig, code_base: CodeBase, license_name: str | None) -> str:
    text = (
        f"## License\n\nDINO's code and checkpoints are released by {code_base.owner} under "
        f"{license_name or 'Apache-2.0'}; so is this model."
    )
    if backbone_name(config).startswith("Swin"):
        text += " The Swin backbone was trained by Microsoft and is released under the MIT license."
    return text


_CITATION = """## Citation

```bibtex
@inproceedings{zhang2023dino,
  title = {{DINO}: {DETR} with Improved DeNoising Anchor Boxes for End-to-End Object Detection},
  author = {Zhang, Hao and Li, Feng and Liu, Shilong and Zhang, Lei and Su, Hang and Zhu, Jun and Ni, Lionel M. and
            Shum, Heung-Yeung},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  url = {https://arxiv.org/abs/2203.03605},
}
```"""

_RESNET_NAMES = {(3, 4, 6, 3): "ResNet-50", (3, 4, 23, 3): "ResNet-101"}
_SWIN_NAMES = {(96, 6): "Swin-T", (96, 18): "Swin-S", (128, 18): "Swin-B", (192, 18): "Swin-L"}


def backbone_name(config: Any) -> str:
    """Return the display name of a backbone: the usual one if it has one, otherwise its type."""
    backbone: Any = config.backbone_config
    if backbone.model_type == "resnet" and backbone.layer_type == "bottleneck":
        return _RESNET_NAMES.get(tuple(backbone.depths), "ResNet")
    if backbone.model_type == "swin":
        return _SWIN_NAMES.get((backbone.embed_dim, backbone.depths[2]), "Swin")
    return str(getattr(backbone, "backbone", None) or backbone.model_type)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "data"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()
