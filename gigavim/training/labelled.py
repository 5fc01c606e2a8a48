"""Pictures and masks of any laboratory, read without a recipe: what masks mean is said in a line.

A rule such as "nuclei=1-" says which values of a mask show a class of the model. Everything that no
rule names is "other": data sets seldom label all the classes that a model tells apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigavim.errors import MissingMppError, SettingsError
from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard
from gigavim.training.masks import find_mask, open_picture, read_mask, without_mask
from gigavim.training.pack import PICTURES, Picture
from gigavim.training.recipe import IGNORED
from gigavim.training.slides import LARGEST_PX

OTHER = "other"
UNKNOWN = "ignored"
"""The name in a rule for values that count nowhere."""
Ranges = tuple[tuple[int, int], ...]
"""First and last of runs of values."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes that data label, out of those of a model."""

    specs: tuple[ClassSpec, ...]
    """In order of label value."""
    of_model: tuple[int, ...]
    """For each class of the model, which of them it is."""

    @classmethod
    def all_of(cls, card: ModelCard) -> "Classes":
        """Every class of a model."""
        return cls(card.classes, tuple(range(len(card.classes))))


@dataclass(frozen=True, slots=True)
class Rules:
    """Which values of masks show which classes."""

    classes: Classes
    values: tuple[Ranges, ...]
    """Of each class but the first, which is what no rule names."""
    ignored: Ranges = ()

    @classmethod
    def parse(cls, rules: Sequence[str], card: ModelCard) -> "Rules":
        """Read rules "NAME=VALUES"; raises `SettingsError` for a name that the model has not."""
        known = {spec.name: place for place, spec in enumerate(card.classes)}
        found: dict[str, Ranges] = {}
        for rule in rules:
            name, _, values = rule.partition("=")
            if name not in known and name != UNKNOWN:
                raise SettingsError(
                    f"--class {rule}: {card.name} knows no class {name!r}; its classes are "
                    f"{', '.join(known)} (and {UNKNOWN!r} are values that count nowhere)"
                )
            found[name] = (*found.get(name, ()), *_ranges(rule, values))
        named = [name for name in known if name in found]
        if not named:
            raise SettingsError("--class has to name at least one class of the model")
        other = ClassSpec(OTHER, (235, 235, 240), object_type="none")
        specs = (other, *(card.classes[known[name]] for name in named))
        places = tuple(named.index(name) + 1 if name in named else 0 for name in known)
        return cls(
            Classes(specs, places), tuple(found[name] for name in named), found.get(UNKNOWN, ())
        )

    def labels(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        """Turn mask values (h, w) into label values (h, w)."""
        labels = np.zeros(mask.shape, np.uint8)
        for index, ranges in enumerate((*self.values, self.ignored), 1):
            value = IGNORED if index > len(self.values) else index
            for first, last in ranges:
                labels[(mask >= first) & (mask <= last)] = value
        return labels


def read_labelled(
    root: Path, rules: Rules, *, images: str, masks: str, mpp: float | None
) -> list[Picture]:
    """Read pictures and their masks, all of one group.

    Args:
        root: the folder. images: a glob pattern below it.
        masks: of a picture, from its folder: "../masks/{stem}.*".
        mpp: micrometres per pixel, where the files do not say or say it wrong.

    Raises:
        SettingsError: there are none, a mask is missing or has another size, or no mask shows a
            class.
        MissingMppError: a picture's resolution is not known.
    """
    paths = [p for p in sorted(root.glob(images)) if p.is_file() and not p.name.startswith(".")]
    if not paths:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:8])
        raise SettingsError(
            f"{root}: nothing there matches {images!r}; there are {there or 'no files'}: say with "
            "--images where the pictures are, such as --images 'tissue/*.tif'"
        )
    missing = without_mask(paths, masks)
    if missing:
        raise SettingsError(
            f"{root}: {missing}: say with --masks where they are, from a picture's folder, such as "
            "--masks '../labels/{stem}_mask.png'"
        )
    pictures, met = [], set[int]()
    for path in paths:
        mask_path = find_mask(path, masks)
        assert mask_path is not None
        pixels, own = _read(path, mpp)
        mask = read_mask(mask_path)
        if mask.ndim == 3:
            raise SettingsError(
                f"{mask_path}: shows colours, not one number a pixel; masks in colours need "
                "--recipe with mask_rgb"
            )
        if mask.dtype == np.bool_:
            mask = mask.astype(np.uint8)
        if mask.shape != pixels.shape[:2]:
            raise SettingsError(
                f"{mask_path}: the mask has {mask.shape[1]} x {mask.shape[0]} px, its picture "
                f"{path.name} {pixels.shape[1]} x {pixels.shape[0]}"
            )
        met |= set(np.unique(mask)[:1000].tolist())
        name = path.relative_to(root).as_posix()
        pictures.append(Picture(pixels, rules.labels(mask), "all", name, own))
    for spec, index in zip(rules.classes.specs[1:], range(1, 256), strict=False):
        if not any((p.labels == index).any() for p in pictures):
            values = ", ".join(str(v) for v in sorted(met)[:8])
            raise SettingsError(
                f"{root}: no mask has a value that --class says is {spec.name}; masks hold "
                f"{values}{', ...' if len(met) > 8 else ''}"
            )
    return pictures


def _read(path: Path, mpp: float | None) -> tuple[NDArray[np.uint8], float]:
    if path.suffix.lower() in PICTURES:
        if mpp is None:
            raise _no_mpp(path)
        return np.asarray(open_picture(path).convert("RGB")), mpp
    from gigavim.slides import open_slide

    with open_slide(path, mpp=mpp) as slide:
        if slide.mpp is None:
            raise _no_mpp(path)
        bounds = slide.bounds
        if bounds.width_level0 * bounds.height_level0 > LARGEST_PX:
            raise SettingsError(f"{path}: too large to be scored as one picture: cut it into parts")
        pixels = slide.read(
            bounds.x_level0, bounds.y_level0, bounds.width_level0, bounds.height_level0
        )
        return pixels, (slide.mpp.x * slide.mpp.y) ** 0.5


def _no_mpp(path: Path) -> MissingMppError:
    return MissingMppError(
        f"{path}: does not say how many micrometres a pixel covers: give it with --mpp, such as "
        "--mpp 0.25 for a scan at 40x"
    )


def _ranges(rule: str, values: str) -> Ranges:
    ranges = []
    for part in values.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*))?\s*", part)
        if match is None:
            raise SettingsError(
                f"--class {rule}: give values as NAME=255, NAME=1,3 or NAME=2-5, or NAME=1- for "
                "all from 1 on (numbered objects)"
            )
        first = int(match[1])
        last = int(match[3]) if match[3] else (1 << 62 if match[2] else first)
        ranges.append((first, last))
    return tuple(ranges)
