import pytest
import torch
from kornia.augmentation import AugmentationSequential, RandomHorizontalFlip

from gigavim.training.stain import STAINS, RandomStain


@pytest.fixture(scope="module")
def tissue():
    """Six images of mixed haematoxylin and eosin, some of it bare glass."""
    amounts = torch.rand(6, 3, 17, 23, generator=torch.Generator().manual_seed(0))
    amounts[:, 2] *= 0.1
    amounts[..., :5] = 0
    return (-torch.einsum("cs,nshw->nchw", STAINS, amounts)).exp()


def changed(images, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return RandomStain(generator=generator, p=1.0, **settings)(images)


def test_other_stains_on_the_same_glass(tissue):
    found = changed(tissue)
    assert found.shape == tissue.shape
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found[..., :5], torch.ones_like(found[..., :5]))
    density, before = -found[..., 5:].log(), -tissue[..., 5:].log()
    ratio = density.mean((1, 2, 3)) / before.mean((1, 2, 3))
    assert ratio.std() > 0.03
    assert ((ratio > 0.4) & (ratio < 2.5)).all()


def test_no_strength_changes_nothing(tissue):
    assert torch.allclose(changed(tissue, strength=0.0), tissue, atol=1e-5)


def test_looks_repeat_by_seed(tissue):
    assert torch.equal(changed(tissue, seed=3), changed(tissue, seed=3))
    assert not torch.equal(changed(tissue, seed=3), changed(tissue, seed=4))


def test_cells_of_a_canvas_share_a_look(tissue):
    same = tissue[:1].expand(6, -1, -1, -1)
    found = changed(same, cells=3).view(2, 3, *tissue.shape[1:])
    within = (found - found[:, :1]).abs().mean()
    between = (found[0] - found[1]).abs().mean()
    assert 0 < within < between


def test_it_composes_with_kornias_own(tissue):
    torch.manual_seed(0)
    both = AugmentationSequential(
        RandomStain(p=1.0), RandomHorizontalFlip(p=1.0), data_keys=["input", "mask"]
    )
    mask = (tissue[:, :1] > 0.5).float()
    image, marks = both(tissue, mask)
    assert torch.equal(marks, mask.flip(-1))
    assert image.shape == tissue.shape
    assert not torch.equal(image, tissue.flip(-1))
    assert torch.equal(RandomStain(p=0.0)(tissue), tissue)
