"""Where class tokens stand among the patches of a sequence."""

from itertools import pairwise

import torch
from torch import Tensor

from gigavim.model.config import CLASS_TOKENS, ClassToken


def class_slots(patches: int, kind: ClassToken) -> tuple[int, ...]:
    """Return the places of the class tokens in a sequence of so many patches.

    The published "middle" token stands before patch `patches // 2`.
    """
    slots: dict[ClassToken, tuple[int, ...]] = {
        "none": (),
        "head": (0,),
        "middle": (patches // 2,),
        "double": (0, patches + 1),
    }
    return slots[kind]


def patch_slots(index: Tensor, patches: int, kind: ClassToken) -> Tensor:
    """Map places among the patches, (n,) int64, to places in the sequence, (n,) int64."""
    if kind == "middle":
        return index + (index >= patches // 2)
    return index + (CLASS_TOKENS[kind] > 0)


def insert_class_tokens(patches: Tensor, tokens: Tensor, kind: ClassToken) -> Tensor:
    """Put class tokens (B, k, D) among patches (B, M, D): returns (B, M + k, D)."""
    if kind == "none":
        return patches
    place = class_slots(patches.shape[1], kind)[0]
    return torch.cat((patches[:, :place], tokens[:, :1], patches[:, place:], tokens[:, 1:]), 1)


def without_class_tokens(sequence: Tensor, kind: ClassToken) -> Tensor:
    """Take the class tokens out of (B, L, D): returns (B, M, D)."""
    if kind == "none":
        return sequence
    places = class_slots(sequence.shape[1] - CLASS_TOKENS[kind], kind)
    edges = (-1, *places, sequence.shape[1])
    return torch.cat([sequence[:, a + 1 : b] for a, b in pairwise(edges)], 1)
