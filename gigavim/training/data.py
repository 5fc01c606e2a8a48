"""The labelled nuclei images: packing them into one file, the background rule, the split by slide.

NuInsSeg (Mahbod et al., Scientific Data 2024, CC BY 4.0): 512 x 512 px H&E fields at 40x with
binary nuclei masks, from one scanner whose empty glass is grey (148, 147, 148).
"""

import csv
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.morphology import remove_small_holes, remove_small_objects
from torch import Tensor

from gigavim.errors import SettingsError

log = logging.getLogger(__name__)

BACKGROUND, TISSUE, NUCLEI = 0, 1, 2
FIELD_PX = 512
"""Side of a field as published."""
PACKED_PX = 320
"""Side of a packed field: still finer than the model's pixels at any scale of the training."""
GLASS = 148.0
"""Grey value of empty glass in these images."""
VALIDATION_GROUPS = ("g05", "g13", "g17", "g22", "g31")
"""The slides kept for validation: epithelium, tumour, muscle, mixed and lymphoid tissue."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Packed fields, their labels and where they come from."""

    images: Tensor
    """(n, 320, 320, 3) uint8."""
    labels: Tensor
    """(n, 320, 320) uint8: BACKGROUND, TISSUE or NUCLEI."""
    numbers: tuple[int, ...]
    groups: tuple[str, ...]
    """The slide of each field."""

    def __len__(self) -> int:
        return len(self.numbers)

    def of_groups(self, groups: Iterable[str]) -> "Fields":
        """Return the fields of these slides."""
        wanted = frozenset(groups)
        keep = [i for i, group in enumerate(self.groups) if group in wanted]
        return Fields(
            self.images[keep],
            self.labels[keep],
            tuple(self.numbers[i] for i in keep),
            tuple(self.groups[i] for i in keep),
        )


def split(fields: Fields, validation: Iterable[str] = VALIDATION_GROUPS) -> tuple[Fields, Fields]:
    """Part the fields into training and validation, slide by slide.

    Raises `SettingsError` where no field is left on one side.
    """
    held_out = frozenset(validation)
    train = fields.of_groups(frozenset(fields.groups) - held_out)
    kept = fields.of_groups(held_out)
    if not len(train) or not len(kept):
        raise SettingsError(
            f"validation groups {sorted(held_out)} leave {len(train)} fields for training and "
            f"{len(kept)} for validation: choose among {sorted(set(fields.groups))}"
        )
    return train, kept


def background_mask(image: NDArray[np.uint8], glass: float = GLASS) -> NDArray[np.bool_]:
    """Where a packed field (h, w, 3) shows empty glass: bright and colourless after smoothing.

    Smoothed by a Gaussian of 3 px (about 1 um), the darkest channel is at least 0.88 of the glass
    and the channels differ by at most 0.075 of it; specks and holes under 400 px (some 45 um2) are
    dropped. Lumina and fat count as background where they are this empty.
    """
    smooth = gaussian_filter(image.astype(np.float32), (3, 3, 0))
    low, high = smooth.min(-1), smooth.max(-1)
    mask = (low >= 0.88 * glass) & (high - low <= 0.075 * glass)
    mask = remove_small_objects(mask, max_size=400)
    return np.asarray(remove_small_holes(mask, max_size=400), np.bool_)


def pack(root: Path, groups_csv: Path, target: Path) -> int:
    """Reduce the fields under `root`/*/{images,masks} and write one .npz; returns how many.

    `groups_csv` has the columns group, first, last: ranges of field numbers per slide.
    """
    with groups_csv.open(newline="") as file:
        ranges = [(r["group"], int(r["first"]), int(r["last"])) for r in csv.DictReader(file)]
    images, labels, numbers, groups = [], [], [], []
    paths = {int(p.stem): p for p in sorted(root.glob("*/images/*")) if p.stem.isdigit()}
    for number, path in sorted(paths.items()):
        group = next((g for g, first, last in ranges if first <= number <= last), None)
        masks = sorted((path.parent.parent / "masks").glob(f"{number}.*"))
        if group is None or not masks:
            log.warning("%s has no %s: left out", path, "slide group" if masks else "mask")
            continue
        image, label = _read_field(path, masks[0])
        images.append(image)
        labels.append(label)
        numbers.append(number)
        groups.append(group)
    if not images:
        raise SettingsError(f"{root} holds no */images/<number>.* with masks beside them")
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        target,
        images=np.stack(images),
        labels=np.stack(labels),
        numbers=np.array(numbers),
        groups=np.array(groups),
    )
    return len(images)


def load(path: Path) -> Fields:
    """Read what `pack` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Fields(
            torch.from_numpy(file["images"]),
            torch.from_numpy(file["labels"]),
            tuple(int(n) for n in file["numbers"]),
            tuple(str(g) for g in file["groups"]),
        )


def _read_field(image_path: Path, mask_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    size = (PACKED_PX, PACKED_PX)
    image = Image.open(image_path).convert("RGB").resize(size, Image.Resampling.BOX)
    mask = Image.open(mask_path).convert("L").point(lambda v: 255 if v else 0)
    pixels = np.asarray(image)
    nuclei = np.asarray(mask.resize(size, Image.Resampling.BOX)) >= 128
    label = np.where(background_mask(pixels), BACKGROUND, TISSUE).astype(np.uint8)
    label[nuclei] = NUCLEI
    return pixels, label
