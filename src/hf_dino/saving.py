"""Write a trained DINO into a folder that `from_pretrained` loads."""

from pathlib import Path

from transformers import BaseImageProcessor, PreTrainedModel


def save_detector(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, card: str) -> None:
    """Write weights, configuration, image processor, model code and model card.

    Files of these names are replaced one by one: give a folder that nobody reads yet, and rename it when it is whole.

    Args:
        folder (`Path`): Made if it does not exist.
        model (`PreTrainedModel`): A `DinoDetrForObjectDetection`.
        processor (`BaseImageProcessor`): Its image processor.
        card (`str`): Its model card, from [`~model_card.converted_card`] or [`~model_card.finetuned_card`].
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(readme.stat().st_mode)  # safetensors lets only the owner read what it writes
