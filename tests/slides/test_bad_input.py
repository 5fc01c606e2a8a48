import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from gigavim.errors import CorruptSlideError, SlideError, UnsupportedSlideError
from gigavim.slides import image, open_slide
from gigavim.slides.base import OpenOptions
from gigavim.slides.tiff import TiffSlide


def refuse(path, match, error=SlideError):
    with pytest.raises(error, match=match) as caught:
        open_slide(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_missing_file_offers_names_nearby(tmp_path):
    (tmp_path / "tumor_01.svs").write_bytes(b"x")
    refuse(tmp_path / "tumour_01.svs", r"does not exist; did you mean tumor_01\.svs\?")
    refuse(tmp_path / "nowhere" / "a.svs", "does not exist")


def test_no_slide_at_all(tmp_path):
    empty = tmp_path / "empty.svs"
    empty.touch()
    refuse(empty, "is empty", CorruptSlideError)
    text = tmp_path / "notes.svs"
    text.write_text("These are my notes.\n" * 100)
    refuse(text, "of no format", UnsupportedSlideError)
    pointer = tmp_path / "pointer.svs"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(pointer, "Git LFS pointer.*git lfs pull", UnsupportedSlideError)


def test_directory_that_is_no_slide(tmp_path):
    refuse(tmp_path, "is a directory", UnsupportedSlideError)
    (tmp_path / "scan.svs").write_bytes(b"x")
    refuse(tmp_path, "is a directory.*scan.svs.*give one slide", UnsupportedSlideError)


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.svs")
    refuse(tmp_path / "pipe.svs", "not an ordinary file")


def test_no_permission(tmp_path, picture, monkeypatch):
    path = tmp_path / "private.tif"
    tifffile.imwrite(path, picture(20, 20), photometric="rgb")
    path.chmod(0)
    if os.access(path, os.R_OK):
        # The administrator may read everything.
        def refused(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", refused)
    refuse(path, "no permission")


def tiff_of_tags(path, tags, tail=b""):
    """Write a classic little-endian TIFF of one directory of LONG tags, values in place."""
    entries = b"".join(struct.pack("<HHII", code, 4, 1, value) for code, value in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + directory + tail)
    return path


GIGANTIC = [
    (256, 10**9),
    (257, 10**9),
    (258, 8),
    (259, 1),
    (262, 1),
    (277, 1),
]


@pytest.mark.parametrize(
    "rest",
    [
        [(273, 8), (278, 10**9), (279, 10**9)],
        [(273, 8), (278, 1), (279, 1)],
        [(322, 256), (323, 256), (324, 8), (325, 65536)],
        [(322, 10**9), (323, 10**9), (324, 8), (325, 100)],
        [(322, 0), (323, 0), (324, 8), (325, 100)],
        [(322, 16), (323, 16), (324, 2**31), (325, 2**31)],
        [],
    ],
    ids=["one strip", "thin strips", "tiles", "one tile", "empty tiles", "beyond", "nothing"],
)
@pytest.mark.parametrize("compression", [1, 5, 7, 8, 50000])
def test_tiff_that_claims_a_billion_pixels_a_side(tmp_path, rest, compression):
    tags = [(code, compression if code == 259 else value) for code, value in GIGANTIC + rest]
    path = tiff_of_tags(tmp_path / "huge.tif", tags, tail=b"\0" * 1000)
    refuse(path, r"huge\.tif: ")


def test_strip_that_decodes_to_far_more_than_the_file(tmp_path):
    """A few bytes of Deflate that claim 30,000 x 30,000 px in one strip."""
    tags = [(256, 30_000), (257, 30_000), (258, 8), (259, 8), (262, 1), (277, 1), (273, 200)]
    path = tiff_of_tags(tmp_path / "bomb.tif", [*tags, (278, 30_000), (279, 50)], b"\x78" * 200)
    refuse(path, "claims 30000 x 30000 px in a file of")


def test_image_above_the_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch, picture):
    path = tmp_path / "large.png"
    Image.fromarray(picture(100, 100)).save(path)
    monkeypatch.setattr(image, "MAX_IMAGE_PX", 9999)
    refuse(path, "100 x 100 px: .*limited to 9,999 px.*tiled TIFF", UnsupportedSlideError)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP"])
def test_cut_off_image(tmp_path, picture, form):
    path = tmp_path / f"cut.{form.lower()}"
    Image.fromarray(picture(200, 200)).save(path, form)
    path.write_bytes(path.read_bytes()[:2000])
    refuse(path, "cannot be decoded", CorruptSlideError)


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "BMP"), ("CMYK", "JPEG")],
)
def test_plain_images_of_every_mode(tmp_path, picture, mode, form):
    path = tmp_path / f"plain.{form.lower()}"
    Image.fromarray(picture(40, 60)).convert(mode).save(path, form)
    with open_slide(path) as slide:
        assert slide.reader == "image"
        assert slide.mpp is None
        assert slide.read_level(0, 0, 0, 60, 40).std() > 10
        assert slide.thumbnail(10).shape == (7, 10, 3)


def test_transparent_image_shows_the_background(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (30, 20), (0, 0, 0, 0)).save(path)
    with open_slide(path) as slide:
        assert (slide.read_level(0, 0, 0, 30, 20) == 255).all()


def test_the_first_readers_reason_is_given(tmp_path):
    path = tmp_path / "ycbcr.tif"
    Image.fromarray(np.full((64, 64, 3), (180, 60, 90), np.uint8)).convert("YCbCr").save(
        path, compression="tiff_lzw"
    )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages.first.tags["PhotometricInterpretation"].overwrite(5)
    with pytest.raises(UnsupportedSlideError, match="photometric kind 5"):
        TiffSlide(path, OpenOptions())
    # No other reader knows these colours either: the first one's reason is given.
    refuse(path, "photometric kind 5")


def test_reads_with_openslide_what_the_direct_reader_cannot(pyramid, caplog, monkeypatch):
    path, pixels, _ = pyramid

    def unable(*args):
        raise UnsupportedSlideError(f"{path}: is beyond the direct reader")

    monkeypatch.setattr(TiffSlide, "_open", unable)
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
        np.testing.assert_array_equal(slide.read_level(0, 10, 20, 300, 200), pixels[20:220, 10:310])
    assert "beyond the direct reader; read by openslide instead" in caplog.text


READ_ONE = """
import logging, sys
logging.disable(logging.CRITICAL)
from gigavim.errors import GigavimError
from gigavim.slides import open_slide
try:
    with open_slide(sys.argv[1]) as slide:
        level = slide.levels[0]
        width, height = min(level.width, 2048), min(level.height, 2048)
        pixels, unreadable = slide.read_level_salvage(0, 0, 0, width, height)
        slide.thumbnail(128)
        print("read", 0 if unreadable is None else unreadable.mean())
except GigavimError as error:
    print("refused", error)
"""

READABLE = {
    "child_ifd.tiff",
    "child_ifd_jpeg.tiff",
    "crash-0da013a13571cc8eb457a39fee8db18f8a3c7127.tif",
    "crash-74d2a78403a5a59db1fb0a2b8735ac068a75f6e3.tif",
    "multipage_multiple_frame_loop.tiff",
    "multipage_out_of_order.tiff",
    "multipage_single_frame_loop.tiff",
    "old-style-jpeg-compression-no-samplesperpixel.tif",
    "pil136.tiff",
    "tiff_overflow_rows_per_strip.tif",
    "tiff_wrong_bits_per_sample.tiff",
    "tiff_wrong_bits_per_sample_2.tiff",
    "tiff_wrong_bits_per_sample_3.tiff",
    "total-pages-zero.tif",
}
"""Odd files that other programs read too; the others are refused."""


@pytest.mark.slow
def test_every_corrupt_file_is_refused_or_read(data):
    files = sorted(path for path in (data / "corrupt").rglob("*") if path.is_file())

    def outcome(path):
        command = [sys.executable, "-c", READ_ONE, str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(files, pool.map(outcome, files)))
    assert files
    for path, result in results.items():
        assert result.returncode == 0, (path, result.stderr[-2000:])
        lines = result.stdout.strip().splitlines()
        assert len(lines) == 1, path
        word, rest = lines[0].split(" ", 1)
        if path.name in READABLE:
            assert (word, float(rest)) == ("read", 0.0), path
        elif path.name == "corrupt.tif":
            assert (word, float(rest)) == ("read", 0.25), path
        else:
            assert word == "refused", path
            assert path.name in rest


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_that_lead_nowhere_say_where(tmp_path):
    link, loop = tmp_path / "link.svs", tmp_path / "loop.svs"
    link.symlink_to("/nowhere/slide.svs")
    loop.symlink_to(loop)
    refuse(link, r"is a link to /nowhere/slide\.svs, which does not exist")
    refuse(loop, "is a link to")


def test_names_as_long_as_they_can_be(tmp_path):
    refuse(tmp_path / f"{'x' * 300}.svs", "does not exist")
    path = tmp_path / f"{'x' * 245}.png"
    try:
        Image.new("RGB", (8, 8)).save(path)
    except OSError:
        pytest.skip("the file system takes no such name")
    with open_slide(path) as slide:
        assert slide.levels[0].width == 8
