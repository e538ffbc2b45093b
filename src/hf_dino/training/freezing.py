"""Parts of a pre-trained model that are left as they are, by names that do not depend on the kind of backbone."""

import re
from collections.abc import Collection
from itertools import takewhile

from transformers import PreTrainedModel

from ..utils.errors import InputError, summarize_list


# The backbone in the sense of the official implementation: without `input_proj`, which is new in every detector
BACKBONE = "model.backbone.body."

# What transformers and timm call a backbone's stages: `stages.0.`, `layers_0.`, `layer1.`, `blocks.0.`
_STAGE = re.compile(r"\b(?:stages|layers|layer|blocks)[._]?(\d+)\.")


def freezable_stages(model: PreTrainedModel) -> dict[str, list[str]]:
    """Say what [`freeze`] can freeze.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`.

    Returns:
        `dict[str, list[str]]`: Names of parameters by stage: `stem`, which is all up to the backbone's first stage and
        with it, `backbone`, `backbone.stage1` and so on, `encoder` and `decoder`.
    """
    names = [name for name, _ in model.named_parameters()]
    body = [name for name in names if name.startswith(BACKBONE)]
    by_number: dict[int, list[str]] = {}
    for name in body:
        if found := _STAGE.search(name):
            by_number.setdefault(int(found[1]), []).append(name)
    stages = [by_number[number] for number in sorted(by_number)]
    before_stages = list(takewhile(lambda name: not _STAGE.search(name), body))
    return {
        "stem": sum(stages[:1], before_stages),
        "backbone": body,
        **{f"backbone.stage{number}": stage for number, stage in enumerate(stages, start=1)},
        **{part: [name for name in names if name.startswith(f"model.{part}.")] for part in ("encoder", "decoder")},
    }


def freeze(model: PreTrainedModel, stages: Collection[str] | None = None) -> None:
    """Leave stages of a model as they are: neither their parameters nor the statistics of their batch norms change.

    Args:
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`.
        stages (`Collection[str]`, *optional*): Names that [`freezable_stages`] gives. By default what the original
            never trains: the stem of a pre-trained ResNet, which finds edges and colors anywhere, and nothing of
            other backbones, or of one that is trained from scratch, which `freeze_backbone_batch_norms=False` tells.

    Raises:
        InputError: If the model has no such stage.
    """
    if stages is None:
        config = model.config
        is_pretrained_resnet = config.freeze_backbone_batch_norms and config.backbone_config.model_type == "resnet"
        stages = ["stem"] if is_pretrained_resnet else []
    names_of_stage = freezable_stages(model)
    if unknown := [stage for stage in stages if stage not in names_of_stage]:
        raise InputError(
            f"this model has no stage {summarize_list(unknown)} to freeze; it has {', '.join(names_of_stage)}"
        )
    frozen = {name for stage in stages for name in names_of_stage[stage]}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    model.train(model.training)  # which puts batch norms that are frozen now into evaluation mode
