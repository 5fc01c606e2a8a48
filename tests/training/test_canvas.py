import pytest
import torch

from gigavim.training.atlas import Atlas
from gigavim.training.canvas import Canvases
from gigavim.training.pack import Picture, read_pictures

CPU = torch.device("cpu")
GLASS, TISSUE, NUCLEI = 0, 1, 2


@pytest.fixture(scope="module")
def canvases(pictures_folder, recipe):
    return Canvases(Atlas(list(read_pictures(pictures_folder, recipe)), CPU), recipe)


@pytest.mark.parametrize("blocks_hw", [(1, 1), (2, 4), (8, 8)], ids=str)
def test_labels_stay_on_their_pixels(canvases, blocks_hw):
    """Whatever is drawn, nuclei are darker in red than the tissue around them."""
    compared = 0
    for seed in range(4):
        images, labels = canvases.draw(blocks_hw, 3, torch.Generator().manual_seed(seed))
        assert images.shape == (3, 3, 32 * blocks_hw[0], 32 * blocks_hw[1])
        assert labels.shape == (3, *images.shape[2:])
        assert torch.isfinite(images).all()
        for image, label in zip(images, labels, strict=True):
            nuclei, tissue = image[0][label == NUCLEI], image[0][label == TISSUE]
            if len(nuclei) > 200 and len(tissue) > 200:
                compared += 1
                assert nuclei.median() < tissue.median()
    assert compared or blocks_hw == (1, 1)


def test_glass_is_bright(canvases):
    found = 0
    for seed in range(8):
        images, labels = canvases.draw((4, 4), 2, torch.Generator().manual_seed(seed))
        for image, label in zip(images, labels, strict=True):
            glass, tissue = image[:, label == GLASS], image[:, label == TISSUE]
            if glass.numel() > 2000 and tissue.numel() > 2000:
                found += 1
                assert glass.median() > tissue.median()
    assert found


def test_canvases_repeat_by_seed(canvases):
    one, other = (canvases.draw((2, 2), 2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_a_window_shows_what_is_there():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (37, 51, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 9, (37, 51), generator=generator, dtype=torch.uint8)
    other = Picture(image.numpy()[:5, :4].copy(), labels.numpy()[:5, :4].copy(), "b", "b", 1.0)
    atlas = Atlas([other, Picture(image.numpy(), labels.numpy(), "a", "a", 1.0)], CPU)
    whole = torch.tensor([[37 / 2, 51 / 2]])
    colours, marks = atlas.sample(torch.tensor([1]), (37, 51), whole, torch.eye(2)[None])
    assert torch.equal(colours[0].permute(1, 2, 0), image.float())
    assert torch.equal(marks[0], labels)
    turned = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
    _, marks = atlas.sample(torch.tensor([1]), (51, 37), whole, turned)
    assert torch.equal(marks[0], labels.rot90(-1)) or torch.equal(marks[0], labels.rot90(1))
    _, marks = atlas.sample(torch.tensor([1]), (41, 51), whole, torch.eye(2)[None])
    assert torch.equal(marks[0, :2], labels[:2].flip(0))  # mirrored beyond the border


def test_coarse_windows_average():
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    image[::2] = 200
    atlas = Atlas([Picture(image.numpy(), image[..., 0].numpy(), "a", "a", 1.0)], CPU)
    middle = torch.tensor([[32.0, 32.0]])
    colours, _ = atlas.sample(torch.tensor([0]), (8, 8), middle, 4 * torch.eye(2)[None])
    assert (colours - 100).abs().max() < 2
