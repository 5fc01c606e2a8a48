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


@pytest.mark.parametrize("kind", ["stain", "colour"])
def test_canvases_repeat_by_seed(canvases, kind):
    """Whatever torch's own generator has drawn meanwhile, which they leave alone."""
    augment = canvases.recipe.augment.model_copy(update={"kind": kind})
    canvases = Canvases(canvases.atlas, canvases.recipe.model_copy(update={"augment": augment}))
    torch.manual_seed(1)
    one = canvases.draw((2, 2), 8, torch.Generator().manual_seed(3))
    untouched = torch.rand(1)
    other = canvases.draw((2, 2), 8, torch.Generator().manual_seed(3))
    assert torch.equal(untouched, torch.rand(1, generator=torch.Generator().manual_seed(1)))
    model = canvases.recipe.model
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    colours = one[0] * std + mean
    assert colours.min() > -1e-4
    assert colours.max() < 1 + 1e-4
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
    assert (colours[0].permute(1, 2, 0) - image).abs().max() < 0.01  # of 255
    assert torch.equal(marks[0], labels)
    turned = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
    _, marks = atlas.sample(torch.tensor([1]), (51, 37), whole, turned)
    assert torch.equal(marks[0], labels.rot90(-1)) or torch.equal(marks[0], labels.rot90(1))
    _, marks = atlas.sample(torch.tensor([1]), (41, 51), whole, torch.eye(2)[None])
    assert torch.equal(marks[0, :2], labels[:2].flip(0))  # mirrored beyond the border


def grey(labels):
    """A picture whose labels are its colours."""
    colours = labels[..., None].expand(*labels.shape, 3).contiguous()
    return Picture(colours.numpy(), labels.numpy(), "a", "a", 1.0)


def test_a_far_window_is_mirrored_again_and_again():
    labels = torch.arange(6, dtype=torch.uint8).view(1, 6).expand(5, 6).contiguous()
    picture = Picture(
        labels[..., None].expand(5, 6, 3).numpy().copy(), labels.numpy(), "a", "a", 1.0
    )
    atlas = Atlas([picture], CPU)
    middle = torch.tensor([[2.5, 3.0]])
    colours, marks = atlas.sample(torch.tensor([0]), (3, 30), middle, torch.eye(2)[None])
    there_and_back = torch.cat((labels[0], labels[0].flip(0)))
    assert torch.equal(marks[0, 1], there_and_back.repeat(3)[:30])
    assert (colours[0, 0] - marks[0]).abs().max() < 0.01


def test_labels_turn_with_their_pixels():
    """At any angle colours and labels show one place, at its size."""
    rows, cols = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    labels = (((rows - 20) ** 2 + (cols - 50) ** 2 < 150) * 200).byte()
    picture = Picture(
        labels[..., None].expand(60, 80, 3).numpy().copy(), labels.numpy(), "a", "a", 1.0
    )
    atlas, index = Atlas([picture], CPU), torch.zeros(9, dtype=torch.long)
    angle = torch.linspace(0.1, 6, 9)
    turn = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), -1).view(9, 2, 2)
    centre = torch.tensor([[20.0, 50.0]]).expand(9, 2)
    found = atlas.sample(index, (31, 47), centre, 0.8 * turn)
    assert ((found[0][:, 0] > 100) == (found[1] > 100)).float().mean() > 0.98
    area = 150 * torch.pi / 0.8**2
    assert ((found[1] > 0).sum((1, 2)) - area).abs().max() < 0.05 * area


def test_coarse_windows_average():
    image = torch.zeros(64, 64, 3, dtype=torch.uint8)
    image[::2] = 200
    atlas = Atlas([Picture(image.numpy(), image[..., 0].numpy(), "a", "a", 1.0)], CPU)
    middle = torch.tensor([[32.0, 32.0]])
    colours, _ = atlas.sample(torch.tensor([0]), (8, 8), middle, 4 * torch.eye(2)[None])
    assert (colours - 100).abs().max() < 2
