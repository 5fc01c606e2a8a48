"""A tiny model and slides, made on the spot, and a runner of the command line."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from gigavim.cli.main import main
from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.checkpoint import save_model
from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


def tiny_card(config: VimConfig, *, mpp: float = 0.5, order: str = "blocks(4)") -> ModelCard:
    return ModelCard(
        name="tiny",
        description="Random weights, for tests.",
        config=config,
        mpp=mpp,
        mpp_range=(mpp / 2, mpp),
        mean=(0.8, 0.7, 0.8),
        std=(0.2, 0.2, 0.2),
        classes=(
            ClassSpec("background", (255, 255, 255), object_type="none"),
            ClassSpec("tissue", (200, 80, 160)),
            ClassSpec("nuclei", (60, 60, 200), parent="tissue", object_type="detection"),
        ),
        order=order,
        licence="Apache-2.0",
        training=TrainingRecord(script="none", data="none", data_licence="none", split="none"),
    )


@pytest.fixture(scope="session")
def make_card() -> Callable[..., ModelCard]:
    return tiny_card


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    config = VimConfig(
        d_model=32, depth=2, patch_px=8, stride_px=8, class_token="none", pooling="mean",
        position="block", grid_hw=(4, 4),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, SegmentationModel(Vim(config), 3), tiny_card(config))
    return folder


def tissue_like(height: int, width: int, seed: int = 0) -> np.ndarray:
    """White glass with a stained disc: (height, width, 3) uint8."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 244, np.uint8)
    y, x = np.ogrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.35 * min(height, width)) ** 2
    stain = np.clip(random.normal((190, 120, 170), 25, (height, width, 3)), 0, 255)
    pixels[disc] = stain.astype(np.uint8)[disc]
    return pixels


@pytest.fixture
def make_slide(tmp_path) -> Callable[..., Path]:
    def make(name: str = "slide.tif", *, size=(300, 420), mpp: float | None = 0.5) -> Path:
        path = tmp_path / name
        resolution = {} if mpp is None else {
            "resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER",
        }  # fmt: skip
        tifffile.imwrite(
            path, tissue_like(*size), tile=(128, 128), photometric="rgb", compression="deflate",
            **resolution,
        )  # fmt: skip
        return path

    return make


@pytest.fixture(scope="session")
def make_exact_model(tmp_path_factory) -> Callable[[int, int], Path]:
    """A model that calls dark pixels tissue: tokens carry the brightness of their pixels."""

    def make(patch_px: int, stride_px: int) -> Path:
        config = VimConfig(
            d_model=patch_px**2, depth=1, patch_px=patch_px, stride_px=stride_px,
            class_token="none", pooling="mean", position="none",
        )  # fmt: skip
        model = SegmentationModel(Vim(config), 2)
        with torch.no_grad():
            for layer in model.encoder.layers:
                layer.mixer.out_proj.weight.zero_()
            pixels = torch.eye(patch_px**2).view(-1, 1, patch_px, patch_px)
            model.encoder.patch_embed.proj.weight.copy_(pixels.expand(-1, 3, -1, -1) / 3)
            model.encoder.patch_embed.proj.bias.zero_()
            each = torch.eye(patch_px**2)
            model.head.linear.weight.copy_(torch.cat((each, -each)))
            model.head.linear.bias.zero_()
        card = ModelCard(
            name="exact", description="Dark is tissue.", config=config, mpp=0.5,
            mpp_range=(0.01, 0.5), mean=(0.6,) * 3, std=(1.0,) * 3,
            classes=(
                ClassSpec("background", (255, 255, 255), object_type="none"),
                ClassSpec("tissue", (255, 0, 0)),
            ),
            order="hilbert", licence="none",
            training=TrainingRecord(script="", data="", data_licence="", split=""),
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("model") / "exact"
        save_model(folder, model, card)
        return folder

    return make


@pytest.fixture(scope="session")
def write_scn() -> Callable[..., None]:
    return write_leica


def write_leica(
    path: Path, pixels: np.ndarray, x: int, y: int, canvas_hw: tuple[int, int], *, nm: int = 500
) -> None:
    """A Leica SCN, whose scanned area lies at (x, y) of a larger canvas: it has bounds."""
    height, width = pixels.shape[:2]
    space = "http://www.leica-microsystems.com/scn/2010/10/01"
    scan = (
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.75</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
    )
    head = '<creationDate>2026-01-01T00:00:00Z</creationDate><device model="x" version="1"/>'
    canvas = f'sizeX="{canvas_hw[1] * nm}" sizeY="{canvas_hw[0] * nm}"'
    xml = f"""<?xml version="1.0"?><scn xmlns="{space}" uuid="urn:uuid:0">
<collection name="c" uuid="urn:uuid:1" {canvas} barcode="">
<image name="macro" uuid="urn:uuid:2">{head}
<pixels sizeX="64" sizeY="48"><dimension sizeX="64" sizeY="48" r="0" ifd="0"/></pixels>
<view {canvas} offsetX="0" offsetY="0"/>{scan}</image>
<image name="main" uuid="urn:uuid:3">{head}
<pixels sizeX="{width}" sizeY="{height}">
<dimension sizeX="{width}" sizeY="{height}" r="0" ifd="1"/></pixels>
<view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{x * nm}" offsetY="{y * nm}"/>{scan}
</image></collection></scn>"""
    common = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        macro = np.full((48, 64, 3), 200, np.uint8)
        writer.write(macro, tile=(64, 64), description=xml, **common)
        writer.write(
            pixels, tile=(128, 128), compressionargs={"level": 98}, resolutionunit="CENTIMETER",
            resolution=(1e7 / nm, 1e7 / nm), **common,
        )  # fmt: skip


Photos = dict[tuple[int, int], tuple[int, int]]
"""Where the camera took a photo: its column and row, and the x and y of its corner, in pixels."""

SLIDE_ID = "0123456789ABCDEF0123456789ABCDEF"
DIVISIONS = 2


def write_mrxs(
    path: Path,
    world: np.ndarray,
    photos: Photos,
    *,
    grid_wh: tuple[int, int],
    image_px: int = 64,
    overlap_px: int = 0,
    with_positions: bool = True,
    mpp: float = 0.5,
) -> None:
    """Write a 3DHISTECH MIRAX slide of two levels, in lossless images.

    A photo is stored in 2 x 2 images of `image_px` at level 0 and as one image, halved, at level 1.
    Photos lie on a grid, most of it empty; those taken may stray from their places in it.

    Args:
        path: the .mrxs file; its folder of the same name holds the data.
        world: (height, width, 3) uint8, what there is to photograph.
        photos: those taken.
        grid_wh: columns and rows of the grid.
        image_px: side of an image.
        overlap_px: by how much neighbouring photos are meant to overlap.
        with_positions: whether the photos' places are stored; else they are those of the grid.
        mpp: micrometres per pixel of level 0.
    """
    folder = path.with_suffix("")
    folder.mkdir()
    cover = io.BytesIO()
    Image.new("RGB", (40, 30), (250, 0, 0)).save(cover, "JPEG")
    path.write_bytes(cover.getvalue())  # a picture of the label: not the slide
    images_x, images_y = grid_wh[0] * DIVISIONS, grid_wh[1] * DIVISIONS
    data = bytearray(b"header")
    levels: list[list[tuple[int, int, int]]] = [[], []]  # (image index, offset, length)
    for (column, row), (x, y) in photos.items():
        side = image_px * DIVISIONS
        photo = world[y : y + side, x : x + side]
        assert photo.shape == (side, side, 3)
        first = row * DIVISIONS * images_x + column * DIVISIONS
        for j in range(DIVISIONS):
            for i in range(DIVISIONS):
                part = photo[j * image_px :, i * image_px :][:image_px, :image_px]
                levels[0].append((first + j * images_x + i, *_append(data, _png(part))))
        halves = photo.reshape(image_px, 2, image_px, 2, 3).mean((1, 3)).round().astype(np.uint8)
        levels[1].append((first, *_append(data, _png(halves))))
    places = [photos.get((c, r), (0, 0)) for r in range(grid_wh[1]) for c in range(grid_wh[0])]
    positions = b"".join(struct.pack("<bii", 0, *place) for place in places)
    record = _append(data, positions) if with_positions else None
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_index(levels, record))
    (folder / "Slidedat.ini").write_text(
        _slidedat(images_x, images_y, image_px, overlap_px, mpp, with_positions)
    )


def _append(data: bytearray, piece: bytes) -> tuple[int, int]:
    offset = len(data)
    data += piece
    return offset, len(piece)


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _index(levels: list[list[tuple[int, int, int]]], record: tuple[int, int] | None) -> bytes:
    """Index.dat: pointers to the levels' pages, each a list of images, and to other records."""
    head = b"01.02" + SLIDE_ID.encode()
    levels_at = len(head) + 8
    records_at = levels_at + 4 * len(levels)
    body_at = records_at + 4
    body = b""
    pointers = []
    for entries in levels:
        pointers.append(body_at + len(body))
        body += struct.pack("<ii", 0, pointers[-1] + 8) + struct.pack("<ii", len(entries), 0)
        body += b"".join(struct.pack("<iiii", *entry, 0) for entry in entries)
    pointers.append(body_at + len(body))
    if record is not None:
        body += struct.pack("<ii", 0, pointers[-1] + 8)
        body += struct.pack("<7i", 1, 0, 0, 0, *record, 0)
    return head + struct.pack("<ii", levels_at, records_at) + struct.pack("<3i", *pointers) + body


def _slidedat(
    images_x: int, images_y: int, image_px: int, overlap_px: int, mpp: float, with_positions: bool
) -> str:
    text = f"""[GENERAL]
SLIDE_VERSION = 01.02
SLIDE_ID = {SLIDE_ID}
IMAGENUMBER_X = {images_x}
IMAGENUMBER_Y = {images_y}
OBJECTIVE_MAGNIFICATION = 20
CameraImageDivisionsPerSide = {DIVISIONS}
[HIERARCHICAL]
HIER_COUNT = 1
NONHIER_COUNT = {int(with_positions)}
INDEXFILE = Index.dat
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = 2
HIER_0_VAL_0_SECTION = LAYER_0_LEVEL_0_SECTION
HIER_0_VAL_1_SECTION = LAYER_0_LEVEL_1_SECTION
NONHIER_0_NAME = VIMSLIDE_POSITION_BUFFER
NONHIER_0_COUNT = 1
NONHIER_0_VAL_0 = default
NONHIER_0_VAL_0_SECTION = NONHIERLAYER_0_SECTION
[NONHIERLAYER_0_SECTION]
VIMSLIDE_POSITION_DATA_FORMAT_VERSION = 257
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
"""
    for level in range(2):
        text += f"""[LAYER_0_LEVEL_{level}_SECTION]
OVERLAP_X = {overlap_px / 2**level:g}
OVERLAP_Y = {overlap_px / 2**level:g}
MICROMETER_PER_PIXEL_X = {mpp * 2**level:g}
MICROMETER_PER_PIXEL_Y = {mpp * 2**level:g}
IMAGE_FORMAT = PNG
IMAGE_FILL_COLOR_BGR = 16777215
DIGITIZER_WIDTH = {image_px}
DIGITIZER_HEIGHT = {image_px}
IMAGE_CONCAT_FACTOR = {level}
"""
    return text


@pytest.fixture(scope="session")
def mrxs_writer():
    """`write_mrxs`."""
    return write_mrxs
