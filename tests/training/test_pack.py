import re
import shutil
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from gigavim.errors import SettingsError
from gigavim.training.masks import glass_mask
from gigavim.training.pack import read_pack, read_pictures, shrink, split, write_pack
from gigavim.training.recipe import IGNORED, Recipe
from gigavim.training.run import check_labels
from gigavim.training.score import show

NUCLEI, TISSUE = 2, 1


def test_pictures_with_their_labels_and_groups(pictures_folder, recipe):
    found = list(read_pictures(pictures_folder, recipe))
    assert [p.group for p in found] == ["a", "a", "b", "b", "c", "c"]
    for picture in found:
        dark = picture.image[..., 0] < 80
        assert (picture.labels[dark] == NUCLEI).all()
        assert (picture.labels[~dark] == TISSUE).all()


def test_packing_keeps_labels_exactly_and_colours_closely(tmp_path, pictures_folder, recipe):
    target = tmp_path / "new" / "packed.npz"
    assert write_pack(target, read_pictures(pictures_folder, recipe), recipe) == 6
    assert [p.name for p in target.parent.iterdir()] == ["packed.npz"]
    pairs = zip(read_pack(target, recipe), read_pictures(pictures_folder, recipe), strict=True)
    for found, expected in pairs:
        assert np.array_equal(found.labels, expected.labels)
        assert np.abs(found.image.astype(int) - expected.image).mean() < 4
        assert (found.group, found.name, found.mpp) == (expected.group, expected.name, 0.25)


def test_packed_classes_are_matched_by_name(tmp_path, pictures_folder, recipe):
    write_pack(tmp_path / "packed.npz", read_pictures(pictures_folder, recipe), recipe)
    first, *others = recipe.classes
    turned = recipe.model_copy(update={"classes": (*others, first)})
    found = read_pack(tmp_path / "packed.npz", turned)[0]
    assert set(np.unique(found.labels)) == {0, 1}  # tissue and nuclei now come first
    fewer = recipe.model_copy(update={"classes": tuple(others)})
    with pytest.raises(SettingsError, match="the recipe has not: background"):
        read_pack(tmp_path / "packed.npz", fewer)


def test_no_group_is_on_both_sides(pictures_folder, recipe):
    train, held_out = split(list(read_pictures(pictures_folder, recipe)), recipe)
    assert {p.group for p in train} == {"a", "c"}
    assert {p.group for p in held_out} == {"b"}


@pytest.mark.parametrize(
    ("groups", "complaint"), [(("a", "b", "c"), "no group for training"), (("z",), "names z")]
)
def test_a_split_needs_both_sides(pictures_folder, recipe, groups, complaint):
    other = recipe.model_copy(
        update={"split": recipe.split.model_copy(update={"validation_groups": groups})}
    )
    with pytest.raises(SettingsError, match=complaint):
        split(list(read_pictures(pictures_folder, recipe)), other)


def test_scenes_are_stitched_and_colours_read(tmp_path, recipe_text):
    text = recipe_text.replace("mask_values = [255]", "mask_rgb = [[9, 8, 7]]")
    text = text.replace("is_default = true", "mask_rgb = [[1, 2, 3]]")
    text = text.replace("is_empty_glass = true", "").replace("'(\\d+)\\.\\w+$'", "'scene(\\d+)/'")
    text = text.replace("glass = 148.0", "stitch_cols = 3")
    values = tomllib.loads(text)
    scene = tmp_path / "scene5"
    for kind in ("images", "masks"):
        (scene / kind).mkdir(parents=True)
    for part in range(6):
        pixels = np.full((10, 20, 3), 40 * part, np.uint8)
        Image.fromarray(pixels).save(scene / f"images/part_{part + 1}.png")
        mask = np.full((10, 20, 3), (1, 2, 3) if part % 2 else (9, 8, 7), np.uint8)
        mask[0] = 200
        shown = Image.fromarray(mask)
        shown = shown.quantize() if part == 3 else shown  # some sets mix palette masks in
        shown.save(scene / f"masks/part_{part + 1}.png")
    (picture,) = read_pictures(tmp_path, Recipe.model_validate(values))
    assert picture.image[5::10, 10::20, 0].tolist() == [[0, 40, 80], [120, 160, 200]]
    assert picture.labels[5::10, 10::20].tolist() == [[2, 1, 2], [1, 2, 1]]
    assert (picture.labels[0] == IGNORED).all()


def test_empty_glass_is_bright_and_colourless():
    image = np.full((200, 200, 3), 148, np.uint8)
    image[:100] = (130, 80, 110)  # tissue
    image[150:, :50] = (148, 148, 120)  # bright but yellow
    mask = glass_mask(image, 148)
    assert mask[120:140].all()
    assert not mask[:90].any()
    assert not mask[160:, :40].any()


def test_shrinking_keeps_ground(pictures_folder, recipe):
    picture = next(read_pictures(pictures_folder, recipe))
    small = shrink(picture, 0.5)
    assert small.mpp * small.labels.shape[0] == pytest.approx(0.25 * picture.labels.shape[0])
    share = [(p.labels == NUCLEI).mean() for p in (picture, small)]
    assert share[1] == pytest.approx(share[0], rel=0.1)


def test_what_is_missing_is_said(tmp_path, pictures_folder, recipe):
    with pytest.raises(SettingsError, match="nothing there matches"):
        list(read_pictures(tmp_path, recipe))
    (tmp_path / "set/images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "set/images/1.png")
    with pytest.raises(SettingsError, match=r"1 of 1 pictures have no mask.*1\.png"):
        list(read_pictures(tmp_path, recipe))
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    with pytest.raises(SettingsError, match="not a packed file"):
        read_pack(tmp_path / "broken.npz", recipe)


def test_masks_of_any_kind_show_the_same(tmp_path, pictures_folder, recipe):
    expected = [p.labels for p in read_pictures(pictures_folder, recipe)]
    values = [np.asarray(Image.open(p)) for p in sorted(pictures_folder.glob("*/masks/*"))]
    shutil.copytree(pictures_folder, tmp_path / "data")
    folder = tmp_path / "data/set/masks"
    for number in range(1, 7):
        (folder / f"{number}.png").unlink()
    one, two, three, four, five, six = values
    Image.fromarray(one > 0).save(folder / "1.png")  # of one bit
    Image.fromarray(np.stack([two] * 3, -1)).save(folder / "2.png")
    tifffile.imwrite(folder / "3.tif", three.astype(np.uint16), compression="lzw")
    tifffile.imwrite(folder / "4.tif", four.astype(np.int32))
    _with_palette(five).save(folder / "5.png")  # its numbers count, not its colours
    Image.fromarray(six).convert("LA").save(folder / "6.png")
    (tmp_path / "data/set/images/.DS_Store").write_bytes(b"x")
    (tmp_path / "data/set/images/Thumbs.db").write_bytes(b"x")
    everything = recipe.data.model_copy(update={"images": ("*/images/*",)})
    found = read_pictures(tmp_path / "data", recipe.model_copy(update={"data": everything}))
    for picture, labels in zip(found, expected, strict=True):
        assert np.array_equal(picture.labels, labels), picture.name


def _with_palette(mask):
    picture = Image.fromarray(mask, "L").convert("P")
    picture.putdata(mask.ravel().tolist())
    picture.putpalette([10, 200, 30] * 256)
    return picture


def test_values_that_no_class_names_are_told(tmp_path, pictures_folder, recipe, caplog):
    caplog.set_level("INFO", logger="gigavim.training")
    shutil.copytree(pictures_folder, tmp_path / "data")
    path = tmp_path / "data/set/masks/2.png"
    Image.fromarray(np.full((162, 162), 7, np.uint8)).save(path)
    list(read_pictures(tmp_path / "data", recipe))
    assert re.search(r"no class names: 0 \(\d+%\), 7 \(\d+%\); that is tissue", caplog.text)
    Image.fromarray(np.full((162, 100), 7, np.uint8)).save(path)
    with pytest.raises(SettingsError, match=r"2\.png: the mask has 100 x 162 px.*162 x 162"):
        list(read_pictures(tmp_path / "data", recipe))
    rgb = np.full((162, 162, 3), (60, 16, 152), np.uint8)
    Image.fromarray(rgb).save(path)
    with pytest.raises(SettingsError, match=r"2\.png: nuclei: mask_values.*mask_rgb"):
        list(read_pictures(tmp_path / "data", recipe))


def test_labels_must_teach_and_score(pictures_folder, recipe, caplog):
    train, held_out = split(list(read_pictures(pictures_folder, recipe)), recipe)
    shown = [show(p, recipe.model.mpp, torch.device("cpu")) for p in held_out]
    check_labels(train, shown, recipe)
    assert "no picture for training shows 'background'" in caplog.text
    blank = [replace(s, labels=torch.full_like(s.labels, TISSUE)) for s in shown]
    with pytest.raises(SettingsError, match=r"no picture held out shows nuclei.*loss\.monitor"):
        check_labels(train, blank, recipe)
    unknown = [replace(p, labels=np.full_like(p.labels, IGNORED)) for p in train]
    with pytest.raises(SettingsError, match="no picture for training shows any class"):
        check_labels(unknown, shown, recipe)
