"""The page of `hf-dino demo`, which needs the extra `demo`, and Spaces that show it."""

from ..utils.errors import import_extra


import_extra("gradio", "demo", "the page")
