"""Show transformers' docstrings in the API reference: an extension of griffe, which mkdocstrings reads them with.

transformers writes types as Markdown, "(`int`, *optional*)", and links as "[`DinoDetrConfig`]"; griffe expects types
as plain text and links with a target.
"""

import re
from typing import Any

import griffe


ARGUMENT = re.compile(r"^( +\**\w+(?:, \w+)*)\n? *\((\[?`.*?)\)(?::|$)", re.MULTILINE)
"""A name with its type, in one line or two, and the colon if there is a description."""
LINK = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")


class TransformersDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object, if it has one."""
        if obj.docstring:
            value = ARGUMENT.sub(_plain_type, obj.docstring.value)
            obj.docstring.value = LINK.sub(lambda link: f"`{link[1].rpartition('.')[2]}`", value)


def _plain_type(match: re.Match[str]) -> str:
    plain = re.sub(r"[`*]|\[(?=`)|(?<=`)\]", "", match[2])
    return f"{match[1]} ({plain}):"
