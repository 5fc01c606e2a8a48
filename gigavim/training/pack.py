"""Labelled pictures in one file: read by a recipe's rules, packed, loaded again.

A packed file is a .npz without pickled objects: JPEG bytes of the pictures, PNG bytes of the
labels (values are those of the recipe's classes, 255 is ignored), groups, names, resolutions.
"""

import io
import json
import logging
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gigavim.errors import OutputError, SettingsError
from gigavim.training import slides
from gigavim.training.masks import (
    find_mask,
    in_words,
    label_map,
    open_picture,
    read_mask,
    without_mask,
)
from gigavim.training.recipe import IGNORED, DataRecipe, Recipe

log = logging.getLogger(__name__)

FORMAT = "gigavim-pack/1"
TOLD_SECONDS = 10.0
LITTER = ("Thumbs.db", "desktop.ini")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
"""Files without a resolution of their own; anything else is opened as a slide."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A labelled picture."""

    image: NDArray[np.uint8]
    """(h, w, 3)"""
    labels: NDArray[np.uint8]
    """(h, w)"""
    group: str
    name: str
    mpp: float
    """Micrometres per pixel."""


def read_pictures(root: Path, recipe: Recipe, *, labelled: bool = True) -> Iterator[Picture]:
    """Find the pictures of a recipe below a folder, with labels by its rules, or without any.

    Raises:
        SettingsError: there are none, one has no mask or no group, or sizes differ.
    """
    data = recipe.data
    keyed: dict[tuple[str, str], list[Path]] = {}
    for path in _picture_paths(root, recipe):
        key = _key(path, root, data)
        keyed.setdefault((key, "" if data.stitch_cols else path.as_posix()), []).append(path)
    grouped = [(key, group_of(key, data), members) for (key, _), members in keyed.items()]
    for _, group, members in grouped:
        if group is None:
            log.warning("%s is of no group of the recipe: left out", members[0])
    used = [path for _, group, members in grouped if group is not None for path in members]
    missing = without_mask(used, data.masks) if labelled else ""
    if missing:
        raise SettingsError(f"{root}: {missing}, which data.masks looks for from their folders")
    unnamed: Counter[Any] = Counter()
    told = time.monotonic()
    for place, (key, group, members) in enumerate(grouped):
        if group is None:
            continue
        if time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            log.info("%d of %d pictures are read", place, len(grouped))
        image, labels, mpp = _scene(members, recipe, unnamed, labelled=labelled)
        mpp = data.mpp_of.get(key, mpp)
        name = members[0].relative_to(root).as_posix()
        yield shrink(Picture(image, labels, group, name, mpp), data.pack_mpp)
    if unnamed:
        default = next((c.name for c in recipe.classes if c.is_default), None)
        fate = "not labelled" if default is None else f"{default}, the default class"
        log.info("masks show what no class names: %s; that is %s", in_words(unnamed), fate)


def group_of(key: str, data: DataRecipe) -> str | None:
    """The group of a key, None where the recipe lists groups but not this one."""
    if not data.groups:
        return key
    for group, keys in data.groups.items():
        for wanted in keys:
            first, dash, last = wanted.partition("-")
            if wanted == key:
                return group
            numbers = (first, key, last)
            if dash and all(n.isdigit() for n in numbers) and (int(first) <= int(key) <= int(last)):
                return group
    return None


def shrink(picture: Picture, mpp: float | None) -> Picture:
    """Bring a picture that is finer than `mpp` to it by area; labels by nearest."""
    if mpp is None or picture.mpp > mpp / 1.1:
        return picture
    h, w = (max(1, round(side * picture.mpp / mpp)) for side in picture.labels.shape)
    image = Image.fromarray(picture.image).resize((w, h), Image.Resampling.BOX)
    labels = Image.fromarray(picture.labels).resize((w, h), Image.Resampling.NEAREST)
    exact = picture.mpp * picture.labels.shape[0] / h
    return Picture(np.asarray(image), np.asarray(labels), picture.group, picture.name, exact)


def write_pack(target: Path, pictures: Iterator[Picture], recipe: Recipe) -> int:
    """Write a packed file, whole or not at all; returns how many pictures it holds."""
    images, labels, facts = [], [], []
    for picture in pictures:
        images.append(_encoded(picture.image, "JPEG", quality=recipe.data.pack_quality))
        labels.append(_encoded(picture.labels, "PNG", optimize=True))
        facts.append([picture.name, picture.group, picture.mpp])
    about = {"format": FORMAT, "classes": recipe.class_names, "pictures": facts}
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                images=np.frombuffer(b"".join(images), np.uint8),
                image_bytes=np.array([len(b) for b in images], np.int64),
                labels=np.frombuffer(b"".join(labels), np.uint8),
                label_bytes=np.array([len(b) for b in labels], np.int64),
            )
        part.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)
    return len(images)


def read_pack(path: Path, recipe: Recipe) -> list[Picture]:
    """Read what `write_pack` wrote, classes matched by name.

    Raises `SettingsError` where it is no such file, or has a class that the recipe has not.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            images = _parts(file["images"], file["image_bytes"])
            labels = _parts(file["labels"], file["label_bytes"])
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        TypeError,
        AttributeError,
    ) as error:
        raise SettingsError(
            f"{path}: not a packed file, as `gigavim train RECIPE --data FOLDER --pack FILE` "
            "writes them"
        ) from error
    unknown = sorted(set(about["classes"]) - set(recipe.class_names))
    if unknown:
        raise SettingsError(f"{path}: has classes that the recipe has not: {', '.join(unknown)}")
    values = np.full(256, IGNORED, np.uint8)
    for value, name in enumerate(about["classes"]):
        values[value] = recipe.class_names.index(name)
    return [
        Picture(_decoded(image), values[_decoded(label)], group, name, mpp)
        for (name, group, mpp), image, label in zip(about["pictures"], images, labels, strict=True)
    ]


def split(pictures: list[Picture], recipe: Recipe) -> tuple[list[Picture], list[Picture]]:
    """Part pictures into training and validation, group by group; raises `SettingsError`."""
    held_out = set(recipe.split.validation_groups)
    there = {p.group for p in pictures}
    if held_out - there:
        raise SettingsError(
            f"split.validation_groups names {', '.join(sorted(held_out - there))}, which the data "
            f"lack; their groups are {', '.join(sorted(there))}"
        )
    if not there - held_out:
        raise SettingsError("split.validation_groups leaves no group for training")
    train = [p for p in pictures if p.group not in held_out]
    return train, [p for p in pictures if p.group in held_out]


def of_groups(
    pictures: list[Picture], groups: str | None, default: tuple[str, ...]
) -> list[Picture]:
    """Choose pictures by "a,b" or "all", or the default groups; raises `SettingsError`."""
    there = {p.group for p in pictures}
    wanted = there if groups == "all" else set(groups.split(",") if groups else default)
    if wanted - there or not pictures:
        raise SettingsError(
            f"no pictures are of {', '.join(sorted(wanted - there)) or 'any group'}; "
            f"the data's groups are {', '.join(sorted(there))}"
        )
    return [p for p in pictures if p.group in wanted]


def _picture_paths(root: Path, recipe: Recipe) -> list[Path]:
    """What the recipe's patterns find, but for what file managers leave behind."""
    patterns = recipe.data.images
    found = {path for pattern in patterns for path in root.glob(pattern)}
    paths = sorted((p for p in found if not _is_litter(p)), key=_natural)
    if not paths:
        raise SettingsError(
            f"{root}: nothing there matches {' or '.join(patterns)}, where the recipe of "
            f"{recipe.model.name} looks for pictures; for other data copy a recipe and change its "
            "[data]"
        )
    return paths


def _is_litter(path: Path) -> bool:
    return path.name.startswith(".") or path.name in LITTER


def _key(path: Path, root: Path, data: DataRecipe) -> str:
    match = re.search(data.group_pattern, path.relative_to(root).as_posix())
    if match is None or match[1] is None:
        raise SettingsError(
            f"{path}: data.group_pattern finds no key in this path; if it is no picture, let "
            f"data.images ({', '.join(data.images)}) leave it out, as by '*.png'"
        )
    return match[1]


def _natural(path: Path) -> tuple[str, int, str]:
    digits = re.search(r"(\d+)$", path.stem)
    return path.parent.as_posix(), int(digits[1]) if digits else 0, path.name


def _scene(
    paths: list[Path], recipe: Recipe, unnamed: "Counter[Any]", *, labelled: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], float]:
    """Pixels, labels and resolution of a picture, or of the parts of one stitched."""
    read = [_read(path, recipe, unnamed, labelled=labelled) for path in paths]
    if len(read) == 1:
        return read[0]
    cols = recipe.data.stitch_cols
    rows = [slice(start, start + cols) for start in range(0, len(read), cols)]
    try:
        image, labels = (
            np.vstack([np.hstack([part[kind] for part in read[row]]) for row in rows])
            for kind in (0, 1)
        )
    except ValueError as error:
        raise SettingsError(f"{paths[0].parent}: the parts do not fit together: {error}") from None
    return image, labels, read[0][2]


def _read(
    path: Path, recipe: Recipe, unnamed: "Counter[Any]", *, labelled: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], float]:
    is_slide = path.suffix.lower() not in PICTURES
    if is_slide:
        image, mpp = slides.read_slide(path, recipe)
    else:
        image, mpp = np.asarray(open_picture(path).convert("RGB")), recipe.data.mpp
    if not labelled:
        return image, np.full(image.shape[:2], IGNORED, np.uint8), mpp
    mask_path = find_mask(path, recipe.data.masks)
    assert mask_path is not None
    if mask_path.suffix == ".geojson":
        return image, slides.draw_annotations(mask_path, path, image.shape[:2], recipe), mpp
    mask = read_mask(mask_path, colours=any(c.mask_rgb for c in recipe.classes))
    if is_slide:
        mask = slides.fit_labels(mask, image.shape[:2], mask_path)
    if image.shape[:2] != mask.shape[:2]:
        raise SettingsError(
            f"{mask_path}: the mask has {mask.shape[1]} x {mask.shape[0]} px, its picture "
            f"{path.name} {image.shape[1]} x {image.shape[0]}"
        )
    try:
        return image, label_map(image, mask, recipe, unnamed), mpp
    except SettingsError as error:
        raise SettingsError(f"{mask_path}: {error}") from None


def _encoded(pixels: NDArray[np.uint8], kind: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _decoded(blob: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(blob)))


def _parts(blob: NDArray[np.uint8], sizes: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(sizes)
    return [blob[e - s : e].tobytes() for s, e in zip(sizes, ends, strict=True)]
