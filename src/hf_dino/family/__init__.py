"""The models from DETR to DINO, as a table of data, and what is theirs alone: see `members.py`."""

from .dn_detr import DnDetrConfig, DnDetrForObjectDetection
from .initialization import initialize_as_authors, rules_of
from .losses import deformable_detr_missing_loss
from .members import FAMILY, FamilyMember, member_of, tiny_fields


__all__ = [
    "FAMILY",
    "DnDetrConfig",
    "DnDetrForObjectDetection",
    "FamilyMember",
    "deformable_detr_missing_loss",
    "initialize_as_authors",
    "member_of",
    "rules_of",
    "tiny_fields",
]
