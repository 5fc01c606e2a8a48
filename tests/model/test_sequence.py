import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gigavim.model.sequence import (
    class_slots,
    insert_class_tokens,
    patch_slots,
    without_class_tokens,
)

KINDS = ["none", "head", "middle", "double"]


@given(patches=st.integers(0, 300), kind=st.sampled_from(KINDS))
def test_slots_of_patches_and_class_tokens_fill_the_sequence(patches, kind):
    own = class_slots(patches, kind)
    places = patch_slots(torch.arange(patches), patches, kind).tolist()
    assert sorted([*own, *places]) == list(range(patches + len(own)))
    assert places == sorted(places)


@pytest.mark.parametrize(("patches", "slot"), [(196, 98), (729, 364)])
def test_the_middle_token_stands_where_the_published_models_have_it(patches, slot):
    assert class_slots(patches, "middle") == (slot,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [1, 2, 7])
def test_inserting_follows_the_slots_and_is_undone(kind, patches):
    rows = torch.randn(2, patches, 3)
    own = torch.randn(2, len(class_slots(patches, kind)), 3)
    sequence = insert_class_tokens(rows, own, kind)
    assert torch.equal(sequence[:, list(class_slots(patches, kind))], own)
    assert torch.equal(sequence[:, patch_slots(torch.arange(patches), patches, kind)], rows)
    assert torch.equal(without_class_tokens(sequence, kind), rows)
