"""The sample images: what other programs see in them, and that they can be made again."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio
import tifffile
from click.testing import CliRunner

SAMPLES = Path(__file__).parents[1] / "sample_data"
COMMITTED_LIMIT = 4_000_000


def run(monkeypatch, *arguments):
    monkeypatch.syspath_prepend(str(SAMPLES))
    from make import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    sys.modules.pop("make", None)
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A slide and a scene of odd sizes with three levels' worth of edges."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = run(monkeypatch, "--size", "1301x1103", "--out", folder, "all")
    assert result.exit_code == 0, result.output
    return folder


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_writes_the_four_files_and_nothing_else(made):
    assert sorted(digests(made)) == [
        "aerial.tif",
        "aerial_labels.tif",
        "histology.svs",
        "histology_labels.tif",
    ]


def test_openslide_sees_an_aperio_slide(made):
    with openslide.OpenSlide(made / "histology.svs") as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert slide.properties["openslide.objective-power"] == "20"
        assert slide.level_dimensions == ((1301, 1103), (325, 275))
        assert slide.level_downsamples[1] == pytest.approx(4, rel=0.01)
        assert set(slide.associated_images) == {"thumbnail", "label", "macro"}


@pytest.mark.parametrize("level", [0, 1])
def test_openslide_and_tifffile_decode_the_same_pixels(made, level):
    with openslide.OpenSlide(made / "histology.svs") as slide:
        seen = slide.read_region((0, 0), level, slide.level_dimensions[level])
    with tifffile.TiffFile(made / "histology.svs") as tiff:
        assert tiff.is_svs
        decoded = tiff.series[0].levels[level].asarray()
    np.testing.assert_array_equal(np.asarray(seen)[..., :3], decoded)


def test_reduced_level_is_the_mean_of_the_full_one(made):
    with tifffile.TiffFile(made / "histology.svs") as tiff:
        full, small = (tiff.series[0].levels[n].asarray().astype(float) for n in (0, 1))
    h, w = small.shape[:2]
    mean = full[: 4 * h, : 4 * w].reshape(h, 4, w, 4, 3).mean(axis=(1, 3))
    assert np.abs(mean - small).mean() < 6


def test_slide_labels_are_what_is_seen(made):
    slide = tifffile.imread(made / "histology.svs", key=0).astype(float)
    labels = tifffile.imread(made / "histology_labels.tif")
    assert labels.shape == slide.shape[:2]
    assert set(np.unique(labels)) == {0, 1, 2}
    density = -np.log10((slide + 1) / 256).mean(axis=-1)
    glass, tissue, nuclei = (density[labels == n].mean() for n in (0, 1, 2))
    assert glass < 0.06 < 0.1 < tissue < 0.25 < 0.4 < nuclei < 0.7


def test_nuclei_have_true_sizes(made):
    from skimage.measure import label, regionprops

    nuclei = tifffile.imread(made / "histology_labels.tif") == 2
    spots = [r for r in regionprops(label(nuclei)) if r.solidity > 0.93 and r.area > 30]
    diameter_um = 0.5 * np.array([r.equivalent_diameter_area for r in spots])
    assert len(spots) > 100
    assert 5 < np.median(diameter_um) < 9
    assert np.quantile(diameter_um, 0.9) < 13


def test_aerial_scene_is_a_cloud_optimized_geotiff(made):
    for name, bands, codec in (("aerial.tif", 3, "jpeg"), ("aerial_labels.tif", 1, "deflate")):
        with rasterio.open(made / name) as scene:
            assert (scene.width, scene.height, scene.count) == (1301, 1103, bands)
            assert scene.crs.to_epsg() == 32633
            assert scene.res == pytest.approx((0.3, 0.3))
            assert scene.profile["tiled"]
            assert scene.block_shapes[0] == (512, 512)
            assert scene.overviews(1)[0] == 2
            assert scene.compression.name == codec
            assert scene.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_aerial_labels_lie_on_the_picture(made):
    with (
        rasterio.open(made / "aerial.tif") as scene,
        rasterio.open(made / "aerial_labels.tif") as truth,
    ):
        assert scene.transform == truth.transform
        labels = truth.read(1)
        red, green, blue = scene.read().astype(float)
        assert truth.tags()["CLASS_5"] == "water"
    assert set(np.unique(labels)) <= {1, 2, 3, 4, 5}
    assert set(np.unique(labels)) >= {2, 3, 4}
    assert (green - red)[labels == 4].mean() > 5
    assert abs((red - blue)[labels == 3]).mean() < 15


def test_same_seed_gives_same_bytes_and_another_seed_others(tmp_path, monkeypatch):
    for folder, seed in (("a", 5), ("b", 5), ("c", 6)):
        size = ("--size", "300x277", "--seed", seed, "--out", tmp_path / folder, "all")
        result = run(monkeypatch, *size)
        assert result.exit_code == 0, result.output
    first, again, other = (digests(tmp_path / folder) for folder in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("scene", ["histology", "aerial"])
def test_regions_do_not_depend_on_how_the_image_is_cut(scene, monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    from painting import aerial, histology

    if scene == "histology":
        plan = histology.plan_slide(1600, 1500, 7)
        whole, labels = histology.render_region(plan, 500, 400, 400, 300)
        part, part_labels = histology.render_region(plan, 613, 471, 200, 150)
    else:
        whole, labels = aerial.render_region(7, 500, 400, 400, 300)
        part, part_labels = aerial.render_region(7, 613, 471, 200, 150)
    np.testing.assert_array_equal(part_labels, labels[71:221, 113:313])
    difference = np.abs(part.astype(int) - whole[71:221, 113:313])
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("size", "reason"),
    [("100", "between 256"), ("big", "neither"), ("1x2x3", "neither"), ("999999999", "200000")],
)
def test_sizes_that_make_no_sense_are_refused(tmp_path, monkeypatch, size, reason):
    result = run(monkeypatch, "--size", size, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert reason in result.output
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(monkeypatch):
    result = run(monkeypatch, "--help")
    assert result.exit_code == 0
    assert "python sample_data/make.py --size" in result.output


@pytest.mark.parametrize(
    "name", ["histology.svs", "histology_labels.tif", "aerial.tif", "aerial_labels.tif"]
)
def test_committed_files_are_small(name):
    assert (SAMPLES / name).stat().st_size <= COMMITTED_LIMIT


def test_committed_slide_opens_with_its_labels():
    labels = tifffile.imread(SAMPLES / "histology_labels.tif")
    with openslide.OpenSlide(SAMPLES / "histology.svs") as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert slide.dimensions == (4096, 3072) == labels.shape[::-1]
    assert 0.35 < (labels > 0).mean() < 0.65
    assert (labels == 2).mean() > 0.02


def test_committed_scene_opens_and_holds_every_class():
    with rasterio.open(SAMPLES / "aerial.tif") as scene:
        assert scene.crs.to_epsg() == 32633
        assert scene.read(1, window=((0, 64), (0, 64))).std() > 0
    with rasterio.open(SAMPLES / "aerial_labels.tif") as truth:
        assert set(np.unique(truth.read(1))) == {1, 2, 3, 4, 5}
