"""The page "From DETR to DINO" says what the table of the family says."""

import re

import pytest

from helpers.paths import ROOT
from hf_dino.family import FAMILY, FamilyMember


PAGE = (ROOT / "docs" / "from_detr_to_dino.md").read_text(encoding="utf-8")
# "Published" of a section is about all rows that it tells
SECTIONS = [part for part in re.split(r"^### ", PAGE, flags=re.MULTILINE) if "--architecture" in part]


def published(member: FamilyMember) -> str:
    if not member.published_ap:
        return "none"
    first, *others = [f"{100 * ap:.1f} after {epochs}" for epochs, ap in member.published_ap.items()]
    return ", ".join([f"{first} epochs", *others])


def row(key: str, member: FamilyMember) -> str:
    parent = FAMILY[member.parent].name if member.parent else ""
    return f"| `{key}` | [{member.name}]({member.paper}) | {parent} | {published(member)} |"


def test_table_is_that_of_the_family():
    [table] = re.findall(r"<!-- family -->\n\n(.*?)\n\n<!-- /family -->", PAGE, flags=re.DOTALL)
    rows = "\n".join(row(key, member) for key, member in FAMILY.items())
    head = "| key | model | changes | published AP |\n|---|---|---|---|"
    assert table == f"{head}\n{rows}", f"paste\n{head}\n{rows}"


@pytest.mark.parametrize("key", FAMILY)
def test_a_section_has_change_equation_command_and_published_ap(key):
    member = FAMILY[key]
    [section] = [each for each in SECTIONS[1:] if f"`hf-dino train --architecture {key}`" in each]
    text = " ".join(section.replace("\n>", "\n").split())
    assert member.change in text
    assert f"`{member.equation}`" in section
    assert f"Published: {'AP ' * bool(member.published_ap)}{published(member)}" in text


def test_every_section_tells_a_member():
    told = set(re.findall(r"`hf-dino train --architecture (\w+)`", PAGE))
    assert told == set(FAMILY)
