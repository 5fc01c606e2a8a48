import pytest
import torch

from gigavim.training.data import NUCLEI, TISSUE, Fields


@pytest.fixture(scope="session")
def synthetic_fields() -> Fields:
    """Six fields of pink tissue with dark round nuclei, of three slides."""
    generator = torch.Generator().manual_seed(7)
    rows, cols = torch.meshgrid(torch.arange(320), torch.arange(320), indexing="ij")
    images = torch.empty(6, 320, 320, 3, dtype=torch.uint8)
    labels = torch.full((6, 320, 320), TISSUE, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:] = torch.tensor([128, 80, 110], dtype=torch.uint8)
        for y, x in torch.randint(10, 310, (40, 2), generator=generator).tolist():
            nucleus = (rows - y) ** 2 + (cols - x) ** 2 < 100
            image[nucleus] = torch.tensor([50, 30, 90], dtype=torch.uint8)
            label[nucleus] = NUCLEI
    return Fields(images, labels, tuple(range(6)), ("a", "a", "b", "b", "c", "c"))
