import csv

import numpy as np
import pytest
import torch
from PIL import Image

from gigavim.errors import SettingsError
from gigavim.training import augment, data
from gigavim.training.data import BACKGROUND, NUCLEI, TISSUE
from gigavim.training.mosaic import canvas, sources


def test_no_slide_is_on_both_sides(synthetic_fields):
    train, validation = data.split(synthetic_fields, ["b"])
    assert set(train.groups) == {"a", "c"}
    assert set(validation.groups) == {"b"}
    assert len(train) + len(validation) == len(synthetic_fields)
    assert not set(train.numbers) & set(validation.numbers)


@pytest.mark.parametrize("groups", [[], ["a", "b", "c"], ["unknown"]])
def test_a_split_needs_both_sides(synthetic_fields, groups):
    with pytest.raises(SettingsError, match="choose among"):
        data.split(synthetic_fields, groups)


def test_background_is_bright_and_colourless():
    image = np.full((200, 200, 3), 148, np.uint8)
    image[:100] = (130, 80, 110)  # tissue
    image[150:, :50] = (148, 148, 120)  # bright but yellow
    mask = data.background_mask(image)
    assert mask[120:140].all()
    assert not mask[:90].any()
    assert not mask[160:, :40].any()


def test_pack_and_load(tmp_path):
    generator = np.random.default_rng(0)
    for number, mode in ((1, "RGB"), (2, "RGBA")):
        for kind in ("images", "masks"):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (512, 512, len(mode)), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set/images" / f"{number}.png")
        mask = np.zeros((512, 512), np.uint8)
        mask[:256] = 1
        Image.fromarray(mask).save(tmp_path / "set/masks" / f"{number}.png")
    with (tmp_path / "groups.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["group", "first", "last"], ["g1", 1, 1], ["g2", 2, 9]])
    assert data.pack(tmp_path, tmp_path / "groups.csv", tmp_path / "packed.npz") == 2
    fields = data.load(tmp_path / "packed.npz")
    assert fields.groups == ("g1", "g2")
    assert fields.images.shape == (2, 320, 320, 3)
    assert (fields.labels[:, :150] == NUCLEI).all()
    assert (fields.labels[:, 170:] != NUCLEI).all()


def test_nothing_to_pack_is_said(tmp_path):
    (tmp_path / "groups.csv").write_text("group,first,last\n")
    with pytest.raises(SettingsError, match="holds no"):
        data.pack(tmp_path, tmp_path / "groups.csv", tmp_path / "packed.npz")


def test_labels_stay_on_their_pixels(synthetic_fields):
    """Whatever is drawn, nuclei are darker in red than the tissue around them."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        image, labels = canvas(sources(synthetic_fields), 128, 256, generator)
        assert image.shape == (3, 128, 256)
        assert labels.shape == (128, 256)
        assert 0 <= image.min() <= image.max() <= 1
        nuclei, tissue = image[0][labels == NUCLEI], image[0][labels == TISSUE]
        if len(nuclei) > 200 and len(tissue) > 200:
            assert nuclei.median() < tissue.median() - 0.03


def test_canvases_repeat_by_seed(synthetic_fields):
    one, other = (
        canvas(sources(synthetic_fields), 128, 128, torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_glass_is_background():
    found = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        density = torch.full((3, 128, 128), 0.8)
        labels = torch.full((128, 128), NUCLEI)
        image, labels = augment.finish(density, labels, generator)
        glass, tissue = image[:, labels == BACKGROUND], image[:, labels == NUCLEI]
        if glass.numel() > 600 and tissue.numel() > 600:
            found += 1
            assert glass.mean() > tissue.mean() + 0.05
    assert found
