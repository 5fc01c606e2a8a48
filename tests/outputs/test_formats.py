"""Every format, opened by its own library, holds the slide's things where the slide has them.

The slide has a bounds offset, odd sizes and a downsample of 5/3; the model calls dark pixels
tissue, so one dark rectangle has to come back at the place it was painted.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
import tifffile
import zarr
from rasterio.transform import Affine

import gigavim
from gigavim.config import Settings
from gigavim.outputs.formats import FORMATS
from gigavim.outputs.results import WRITERS

BOUNDS_XY = (100, 60)
BOX = (200, 100, 350, 225)
"""Left, top, right, bottom of the rectangle, from the bounds' corner, in level-0 pixels."""
SCALE = 0.5 / 0.3
SIZE_HW = (397, 601)
GROUND = Affine.translation(5e5, 4.6e6) @ Affine.rotation(20) @ Affine.scale(0.6, -0.6)
SLIDE_FORMATS = [
    "ome-tiff", "ome-zarr", "geojson", "geojson.gz", "overlay", "csv", "h5-trident", "h5-clam",
    "h5-stamp", "anndata", "spatialdata",
]  # fmt: skip


def settings_for(model: Path, folder: Path, **output) -> Settings:
    return Settings().with_flags(
        model={"name": str(model), "allow_mpp_mismatch": True},
        tokens={"tissue": "none"},
        compute={"precision": "fp32", "threads": 1},
        output={"directory": str(folder), **output},
    )


@pytest.fixture(scope="module")
def model(make_exact_model):
    return make_exact_model(4, 4)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, model, write_scn):
    folder = tmp_path_factory.mktemp("formats")
    pixels = np.full((*SIZE_HW, 3), 240, np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 60
    write_scn(folder / "leica.scn", pixels, *BOUNDS_XY, canvas_hw=(800, 1000), nm=300)
    settings = settings_for(model, folder / "out")
    return gigavim.embed(folder / "leica.scn", settings=settings)


@pytest.fixture(scope="module")
def convert(embedded, tmp_path_factory):
    def convert(*formats: str, **output) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("converted")
        output = {"directory": str(folder), "formats": list(formats), **output}
        settings = Settings().with_flags(output=output)
        return gigavim.convert(embedded.outputs["store"], settings=settings).outputs

    return convert


def assert_at_box(found_xyxy, *, shift_xy=(0.0, 0.0), within: float = 0.5 * SCALE) -> None:
    expected = np.add(BOX, (*shift_xy, *shift_xy))
    assert np.abs(np.subtract(found_xyxy, expected)).max() <= within + 1e-6


def box_of(mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def test_the_slide_is_what_it_claims_to_be(embedded):
    store = embedded.open()
    assert (store.bounds.x_level0, store.bounds.y_level0) == BOUNDS_XY
    assert store.frame.scale_x == pytest.approx(SCALE, rel=1e-3)
    assert (store.frame.height_px, store.frame.width_px) == (239, 361)


def test_every_format_has_a_writer_and_a_setting():
    asked = {name for name, entry in FORMATS.items() if not entry.by_itself}
    assert asked == set(WRITERS)
    Settings().with_flags(output={"formats": sorted(asked)})


def test_ome_tiff_and_csv(convert):
    files = convert("ome-tiff", "csv")
    labels = tifffile.imread(files["ome-tiff"])
    assert_at_box(box_of(labels == 1) * SCALE)
    rows = list(csv.DictReader(files["csv"].open()))
    assert [row["name"] for row in rows] == ["background", "tissue"]
    assert int(rows[1]["pixels"]) == (labels == 1).sum()
    assert float(rows[1]["area_mm2"]) == pytest.approx((labels == 1).sum() * 0.25e-6, rel=1e-3)


def test_geojson_follows_qupath(convert):
    files = convert("geojson", "geojson.gz")
    collection = json.loads(files["geojson"].read_text())
    assert "crs" not in collection
    (feature,) = collection["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert_at_box((*ring.min(0), *ring.max(0)))  # QuPath counts from the bounds' corner
    properties = feature["properties"]
    assert properties["objectType"] == "annotation"
    assert set(properties["classification"]) == {"name", "color"}
    assert properties["measurements"]["Area um^2"] == pytest.approx(150 * 125 * 0.09, rel=0.02)


def test_polygons_by_size_and_smoothed(convert):
    exact = json.loads(convert("geojson")["geojson"].read_text())
    small = json.loads(convert("geojson", min_area_um2=1000)["geojson"].read_text())
    none = json.loads(convert("geojson", min_area_um2=2000)["geojson"].read_text())
    assert len(exact["features"]) == len(small["features"]) == 1
    assert none["features"] == []
    assert none["gigavim"]["min_area_um2"] == 2000
    smooth = json.loads(convert("geojson", simplify_um=2.0)["geojson"].read_text())
    ring = smooth["features"][0]["geometry"]["coordinates"][0]
    assert len(ring) == 5


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(convert, version):
    folder = convert("ome-zarr", ngff=version)["ome-zarr"]
    root = zarr.open_group(folder, mode="r", zarr_format=2 if version == "0.4" else 3)
    image, labels = root["0"], root["labels/segmentation/0"]
    assert image.shape == (3, 239, 361)
    assert labels.shape == (239, 361)
    assert_at_box(box_of(labels[:] == 1) * SCALE)
    assert_at_box(box_of(image[:].mean(0) < 150) * SCALE)
    package = f"ome_zarr_models.v{version.replace('.', '')}"
    image_model = pytest.importorskip(f"{package}.image").ImageAttrs
    label_model = pytest.importorskip(f"{package}.image_label").ImageLabelAttrs
    described = [group.attrs.asdict() for group in (root, root["labels/segmentation"])]
    if version == "0.5":
        described = [attributes["ome"] for attributes in described]
        assert root["labels"].attrs["ome"] == {"version": "0.5", "labels": ["segmentation"]}
    else:
        assert root["labels"].attrs["labels"] == ["segmentation"]
    (multiscale,) = image_model.model_validate(described[0]).multiscales
    scale = multiscale.datasets[0].coordinateTransformations[0].scale
    assert scale[1:] == pytest.approx([0.5, 0.5], rel=1e-3)
    assert [axis.unit for axis in multiscale.axes[1:]] == ["micrometer"] * 2
    label = label_model.model_validate(described[1])
    assert label.image_label.colors[1].rgba == (255, 0, 0, 255)
    assert len(label.multiscales[0].datasets) == len(multiscale.datasets)
    ours = gigavim.open_slide(folder)
    assert ours.mpp.x == pytest.approx(0.5, rel=1e-3)
    assert np.array_equal(ours.read_level(0, 0, 0, 361, 239), image[:].transpose(1, 2, 0))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_is_valid_as_a_whole(convert, version):
    """Groups, arrays, axes, data types and label references, as ome-zarr-models knows them."""
    models = pytest.importorskip("ome_zarr_models")
    folder = convert("ome-zarr", ngff=version)["ome-zarr"]
    kind = getattr(models, f"v{version.replace('.', '')}")
    if version == "0.4":  # which ome-zarr-models 1.6 leaves half defined with new pydantic
        from pydantic_zarr.v2 import ArraySpec, GroupSpec

        names = {"ArraySpec": ArraySpec, "GroupSpec": GroupSpec}
        for incomplete in (kind.Labels, kind.Image, kind.ImageLabel):
            incomplete.model_rebuild(_types_namespace=names)
    root = zarr.open_group(folder, mode="r")
    image = models.open_ome_zarr(root)
    assert isinstance(image, kind.Image)
    assert image.ome_zarr_version == version
    labels = image.labels
    assert isinstance(labels, kind.Labels)
    assert isinstance(models.open_ome_zarr(root["labels"]), kind.Labels)
    label = kind.ImageLabel.from_zarr(root["labels/segmentation"])
    for group, node in ((image, root), (label, root["labels/segmentation"])):
        (multiscale,) = (group.attributes if version == "0.4" else group.attributes.ome).multiscales
        for dataset in multiscale.datasets:
            described = group.members[dataset.path]
            assert described.shape == node[dataset.path].shape
            assert len(described.shape) == len(multiscale.axes)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_opens_in_ome_zarr_py(convert, version):
    reader = pytest.importorskip("ome_zarr.reader", reason="ome-zarr is not installed")
    from ome_zarr.io import parse_url

    folder = convert("ome-zarr", ngff=version)["ome-zarr"]
    nodes = list(reader.Reader(parse_url(str(folder)))())
    found = {node.zarr.basename(): np.asarray(node.data[0]) for node in nodes if node.data}
    assert found[folder.name].shape == (3, 239, 361)
    assert_at_box(box_of(found["segmentation"] == 1) * SCALE)
    assert_at_box(box_of(found[folder.name].mean(0) < 150) * SCALE)


def test_levels_of_ome_zarr_agree(model, tmp_path):
    height, width = 1500, 2303
    pixels = np.full((height, width, 3), 240, np.uint8)
    pixels[300:1001, 400:2001] = 60
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", compression="deflate",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    settings = settings_for(model, tmp_path / "out", formats=["ome-zarr"])
    root = zarr.open_group(gigavim.embed(path, settings=settings).outputs["ome-zarr"], mode="r")
    for level in range(3):
        image, labels = root[str(level)][:], root[f"labels/segmentation/{level}"][:]
        assert image.shape[1:] == labels.shape == (-(-height // 2**level), -(-width // 2**level))
        for found in (box_of(labels == 1), box_of(image.mean(0) < 150)):
            assert np.abs(found * 2**level - (400, 300, 2001, 1001)).max() <= 2**level
    assert "3" not in root


def assert_positions(xy_level0: np.ndarray, *, cell_px: int = 4) -> None:
    """Each cell of the grid once, its corner to half a pixel of the slide."""
    rows, cols = -(-239 // cell_px), -(-361 // cell_px)
    row, col = np.mgrid[:rows, :cols].reshape(2, -1)
    expected = np.add(BOUNDS_XY, np.stack([col, row], 1) * cell_px * SCALE)
    xy = np.asarray(xy_level0)[np.lexsort(np.round(xy_level0).T)]
    assert xy.shape == expected.shape
    assert np.abs(xy - expected).max() <= 0.5


def assert_tokens_at_box(features, xy_level0, *, rounded_px: float = 0.0) -> None:
    """The rectangle lies where tokens with these corners saw it, to half a pixel of the map.

    A feature of the exact model is one pixel of its patch, negative where that is dark.
    """
    token, pixel = np.nonzero(np.asarray(features) < 0)
    xy = np.asarray(xy_level0)[token] + np.stack([pixel % 4, pixel // 4], 1) * SCALE
    found = (*xy.min(0), *(xy.max(0) + SCALE))
    assert_at_box(found, shift_xy=BOUNDS_XY, within=0.5 * SCALE + rounded_px)


def test_h5_of_trident(convert):
    h5py = pytest.importorskip("h5py")
    path = convert("h5-trident")["h5-trident"]
    with h5py.File(path) as file:
        features, coords = file["features"][:], file["coords"]
        assert features.dtype == np.float32
        assert coords.dtype == np.int64
        assert coords.attrs["patch_size"] == 4
        assert coords.attrs["patch_size_level0"] == 7
        assert coords.attrs["target_magnification"] == 20
        assert coords.attrs["level0_magnification"] == 33
        assert coords.attrs["overlap"] == 0
        assert (coords.attrs["level0_width"], coords.attrs["level0_height"]) == (1000, 800)
        xy = coords[:]
    assert_positions(xy)
    assert_tokens_at_box(features, xy, rounded_px=0.5)
    with h5py.File(path.parents[1] / "slide_features" / path.name) as file:
        assert file["features"].shape == (16,)
    with h5py.File(path.parents[1] / "patches" / f"{path.stem}_patches.h5") as file:
        assert file["coords"].attrs["patch_size"] == 4


def test_h5_of_clam(convert):
    h5py = pytest.importorskip("h5py")
    torch = pytest.importorskip("torch")
    path = convert("h5-clam")["h5-clam"]
    with h5py.File(path) as file:
        features, coords = file["features"][:], file["coords"][:]
    assert (features.dtype, coords.dtype) == (np.float32, np.int32)
    assert_positions(coords)
    assert_tokens_at_box(features, coords, rounded_px=0.5)
    tensor = torch.load(path.parents[1] / "pt_files" / "leica.pt", weights_only=True)
    assert np.array_equal(tensor.numpy(), features)
    with h5py.File(path.parents[1] / "patches" / "leica.h5") as file:
        assert np.array_equal(file["coords"][:], coords)
        assert file["coords"].attrs["patch_level"] == 0
        assert file["coords"].attrs["patch_size"] == 7


def test_h5_of_stamp(convert):
    h5py = pytest.importorskip("h5py")
    with h5py.File(convert("h5-stamp")["h5-stamp"]) as file:
        assert file.attrs["unit"] == "um"
        assert file.attrs["tile_size_px"] == 4
        assert file.attrs["tile_size_um"] == pytest.approx(2.0, rel=1e-3)
        assert file.attrs["extractor"] == "gigavim-exact"
        xy = file["coords"][:] / 0.3
        assert file["feats"].shape == (len(xy), 16)
        assert_positions(xy)
        assert_tokens_at_box(file["feats"][:], xy)


def test_pooled_entries(convert, embedded):
    h5py = pytest.importorskip("h5py")
    store = embedded.open()
    with h5py.File(convert("h5-trident", pool=2)["h5-trident"]) as file:
        assert file["coords"].attrs["patch_size"] == 8
        coords, features = file["coords"][:], file["features"][:]
    assert_positions(coords, cell_px=8)
    place = np.flatnonzero((coords == np.round(np.add(BOUNDS_XY, (80 * SCALE, 40 * SCALE)))).all(1))
    assert np.array_equal(features[place[0]], store.grid(2)[5, 10].compute().astype(np.float32))


def test_anndata_file(convert):
    anndata = pytest.importorskip("anndata")
    table = anndata.read_h5ad(convert("anndata")["anndata"])
    assert table.X.dtype == np.float32
    corners = table.obsm["spatial"] - 2 * SCALE
    assert_positions(corners)
    assert_tokens_at_box(table.X, corners)
    np.testing.assert_allclose(table.obs[["x", "y"]], corners, atol=1e-3)
    # The label is the one of the pixel at the centre.
    x, y = table.obsm["spatial"].T - np.add(BOUNDS_XY, BOX[:2])[:, None]
    inside = np.minimum.reduce([x, y, BOX[2] - BOX[0] - x, BOX[3] - BOX[1] - y])
    tissue = np.asarray(table.obs["label"] == "tissue")
    assert tissue[inside > SCALE].all()
    assert not tissue[inside < -SCALE].any()
    assert json.loads(table.uns["gigavim"]["provenance"])["model"]["name"] == "exact"


def test_spatialdata(convert, embedded):
    pytest.importorskip("anndata")
    pytest.importorskip("pyarrow")
    folder = convert("spatialdata")["spatialdata"]
    root = zarr.open_group(folder, mode="r")
    assert root.attrs["slide_properties"]["shape"] == [800, 1000]
    spatialdata = pytest.importorskip(
        "spatialdata", reason="spatialdata is not installed: its reader is not tried"
    )
    from spatialdata.transformations import get_transformation

    data = spatialdata.read_zarr(folder)
    labels = data.labels["segmentation"]
    matrix = get_transformation(labels).to_affine_matrix(("x", "y"), ("x", "y"))
    corners = box_of(labels.values == 1).reshape(2, 2)
    placed = corners @ matrix[:2, :2].T + matrix[:2, 2]
    assert_at_box(placed.ravel(), shift_xy=BOUNDS_XY)
    (name,) = data.tables
    table = data.tables[name]
    tiles = data.shapes["tiles"].set_index("tile_id").geometry.loc[table.obs["tile_id"]]
    bounds = tiles.bounds.to_numpy()
    assert_positions(bounds[:, :2])
    assert_positions(bounds[:, 2:] - 4 * SCALE)
    assert_tokens_at_box(table.X, bounds[:, :2])
    tissue = data.shapes["tissues"].total_bounds
    assert np.abs(tissue - (100, 60, 701, 457)).max() < 1.5
    wsidata = pytest.importorskip("wsidata")
    slide = wsidata.open_wsi(embedded.slide, store=str(folder))
    assert slide.tile_spec("tiles").height == 4


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("ngff", ["0.4", "0.5"])
def test_converting_later_gives_the_same_bytes(embedded, model, tmp_path, ngff):
    for name in ("h5py", "anndata", "pyarrow"):
        pytest.importorskip(name)
    wanted = {"formats": SLIDE_FORMATS, "pool": 2, "ngff": ngff}
    at_once = settings_for(model, tmp_path / "once", **wanted)
    outputs = gigavim.embed(embedded.slide, settings=at_once).outputs
    later = Settings().with_flags(output={"directory": str(tmp_path / "later"), **wanted})
    gigavim.convert(outputs["store"], settings=later)
    once, again = tree(tmp_path / "once"), tree(tmp_path / "later")
    once = {name: data for name, data in once.items() if ".embeddings.zarr/" not in name}
    assert once.keys() == again.keys()
    assert {name for name in once if once[name] != again[name]} == set()


@pytest.fixture(scope="module")
def field(tmp_path_factory) -> Path:
    """A georeferenced raster of odd sizes, not north up, with one dark rectangle."""
    path = tmp_path_factory.mktemp("field") / "field.tif"
    pixels = np.full((*SIZE_HW, 3), 240, np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 60
    with rasterio.open(
        path, "w", driver="GTiff", width=SIZE_HW[1], height=SIZE_HW[0], count=3, dtype="uint8",
        crs="EPSG:32633", transform=GROUND,
    ) as raster:  # fmt: skip
        raster.write(pixels.transpose(2, 0, 1))
    return path


def test_formats_of_georeferenced_rasters(field, model, tmp_path):
    for name in ("pyogrio", "pyarrow"):
        pytest.importorskip(name)
    wanted = {"formats": ["geotiff", "gpkg", "geoparquet", "geojson", "geojson.gz", "csv"]}
    outputs = gigavim.embed(
        field, settings=settings_for(model, tmp_path / "once", **wanted)
    ).outputs
    with rasterio.open(outputs["geotiff"]) as raster:
        assert raster.crs == "EPSG:32633"
        assert raster.colormap(1)[1][:3] == (255, 0, 0)
        to_pixels = ~GROUND @ raster.transform
        corners = box_of(raster.read(1) == 1).reshape(2, 2)
    found = np.array([to_pixels @ tuple(corner) for corner in corners])
    assert_at_box(found.ravel(), within=0.5)
    meta, _, wkb, _ = pytest.importorskip("pyogrio.raw").read(outputs["gpkg"])
    (polygon,) = shapely.from_wkb(wkb)
    parquet = pytest.importorskip("pyarrow.parquet").read_table(outputs["geoparquet"])
    (same,) = shapely.from_wkb(parquet["geometry"].to_pylist())
    assert meta["crs"] == "EPSG:32633"
    for shape in (polygon, same):
        xy = np.array([~GROUND @ corner for corner in shape.exterior.coords])
        assert_at_box((*xy.min(0), *xy.max(0)), within=0.5)
    later = Settings().with_flags(output={"directory": str(tmp_path / "later"), **wanted})
    gigavim.convert(outputs["store"], settings=later)
    once, again = tree(tmp_path / "once"), tree(tmp_path / "later")
    once = {name: data for name, data in once.items() if ".embeddings.zarr/" not in name}
    assert once.keys() == again.keys()
    assert {name for name in once if once[name] != again[name]} == set()


def test_segment_writes_the_same_as_embed_and_convert(embedded, model, tmp_path):
    pytest.importorskip("h5py")
    wanted = {"formats": ["geojson", "ome-tiff", "h5-stamp"]}
    settings = settings_for(model, tmp_path / "maps", **wanted)
    maps = gigavim.segment(embedded.slide, settings=settings).outputs
    later = Settings().with_flags(output={"directory": str(tmp_path / "later"), **wanted})
    files = gigavim.convert(embedded.outputs["store"], settings=later).outputs
    for name in ("ome-tiff", "h5-stamp"):
        assert maps[name].read_bytes() == files[name].read_bytes()
    polygons = [json.loads(path.read_text()) for path in (maps["geojson"], files["geojson"])]
    for collection in polygons:
        collection["gigavim"]["made"] = ""
    assert polygons[0] == polygons[1]
