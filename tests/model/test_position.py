from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gigavim.model.config import VimConfig
from gigavim.model.position import block_position, grid_position, split_table, wave_position
from gigavim.model.sequence import class_slots, insert_class_tokens
from gigavim.model.vim import Vim

VECTORS = load_file(Path(__file__).parents[1] / "data" / "golden" / "posembed_interp.safetensors")
WAVES = {"d_model": 32, "depth": 1, "class_token": "none", "pooling": "mean", "position": "sincos"}
SIDES = st.integers(1, 40)


def _cells(rows, cols):
    cells = torch.arange(rows * cols)
    return cells // cols, cells % cols


def _resized(pos_embed, grid_hw, kind):
    """The whole table (1, M + k, D) for another grid, class tokens back in their slots."""
    patches, own = split_table(pos_embed, kind)
    side = round(len(patches) ** 0.5)
    table = grid_position(patches, (side, side), *_cells(*grid_hw), grid_hw)
    return insert_class_tokens(table[None], own[None], kind)


@pytest.mark.parametrize("name", [name for name in VECTORS if ".to" in name])
def test_resized_tables_meet_the_published_numbers(name):
    origin, source, target = name.split(".")
    grid_hw = tuple(int(side) for side in target.removeprefix("to").split("x"))
    kind = "none" if source == "src196" else "head" if origin == "ref" else "middle"
    found = _resized(VECTORS[source], grid_hw, kind)
    torch.testing.assert_close(found, VECTORS[name], rtol=1e-5, atol=1e-5)  # their own rounding


@settings(max_examples=40, deadline=None)
@given(table_hw=st.tuples(SIDES, SIDES), grid_hw=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_any_subset_of_cells_equals_torch_on_the_whole_grid(table_hw, grid_hw, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(table_hw[0] * table_hw[1], 5, generator=generator)
    square = table.view(1, *table_hw, 5).permute(0, 3, 1, 2)
    whole = F.interpolate(square.double(), grid_hw, mode="bicubic", align_corners=False)
    row, col = _cells(*grid_hw)
    some = torch.randperm(len(row), generator=generator)[: 1 + len(row) // 3]
    found = grid_position(table, table_hw, row[some], col[some], grid_hw)
    wanted = whole[0].flatten(1).T[some].float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_a_far_corner_of_a_huge_grid_needs_no_table_of_the_grid():
    table = torch.randn(196, 8)
    grid_hw = (1_000_000, 3_000_000)
    row = torch.tensor([0, 999_999])
    col = torch.tensor([0, 2_999_999])
    found = grid_position(table, (14, 14), row, col, grid_hw)
    assert torch.isfinite(found).all()
    near = grid_position(table, (14, 14), torch.tensor([999]), torch.tensor([2999]), (1000, 3000))
    torch.testing.assert_close(found[1], near[0], atol=1e-2, rtol=0)


def test_no_cells_have_no_positions():
    none = torch.empty(0, dtype=torch.int64)
    assert grid_position(torch.randn(12, 4), (3, 4), none, none, (9, 9)).shape == (0, 4)


def test_a_table_of_blocks_repeats():
    table = torch.randn(12, 4)
    row, col = _cells(9, 8)
    found = block_position(table, (3, 4), row, col).view(3, 3, 2, 4, 4)
    for block in found.movedim(2, 1).flatten(0, 1):
        assert torch.equal(block.reshape(12, 4), table)


def test_waves_depend_on_micrometres_only_and_tell_places_apart():
    fine = VimConfig(**WAVES, token_um=2.0)
    model = Vim(fine)
    row, col = _cells(30, 30)
    found = model.position(row, col, (30, 30))
    moved = model.position(row[:1], col[:1], (30, 30), origin_um=(2.0 * 7, 2.0 * 11))
    torch.testing.assert_close(moved[0], found[11 * 30 + 7])
    distance = torch.cdist(found, found) + torch.eye(900) * 9
    assert distance.min() > 0.1


def test_waves_far_from_the_corner_keep_their_precision():
    far_um = torch.tensor([4.0e6, 4.0e6 + 4.0], dtype=torch.float64)  # 4 m away, one token apart
    found = wave_position(far_um, far_um, 32, 16.0, 262144.0)
    again = wave_position(far_um % 16, far_um % 16, 32, 16.0, 262144.0)
    torch.testing.assert_close(found[:, 0], again[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["none", "head", "middle", "double"])
def test_position_of_a_subset_is_that_of_the_whole_image(kind):
    pooling = "mean" if kind == "none" else "class"
    config = VimConfig(
        d_model=32,
        depth=1,
        patch_px=8,
        stride_px=4,
        class_token=kind,
        pooling=pooling,
        grid_hw=(5, 3),
    )
    model = Vim(config)
    images = torch.zeros(1, 3, 40, 28)
    sequence = model.tokens(images)[0]  # no pixels: bias 0, so these are the positions alone
    slots = class_slots(9 * 6, kind)
    keep = [i for i in range(len(sequence)) if i not in slots]
    row, col = _cells(9, 6)
    torch.testing.assert_close(sequence[keep], model.position(row, col, (9, 6)))
    torch.testing.assert_close(sequence[list(slots)], model.class_rows())
