"""The model card: all that must be known to use a model rightly, kept beside its weights."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gigavim.errors import ModelError, SettingsError
from gigavim.frames import ClassSpec
from gigavim.model.config import HeadKind, VimConfig
from gigavim.tokens.order import ScanOrder

CARD_NAME = "card.json"
ENCODER_FORMAT: Final = "gigavim-encoder/1"
WEIGHTS_NAME = "weights.safetensors"
LARGEST_CARD_BYTES = 1 << 20

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNKNOWN_LICENCE = (
    "not stated in the file. The published Vim weights: code Apache-2.0, model card header "
    "Apache-2.0, its text 'non-commercial'; ask their authors before redistributing them"
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TrainingRecord(_Strict):
    """How a model came to be."""

    script: str
    """The command that trained it."""
    data: str
    """Data sets with their sources."""
    data_licence: str
    split: str
    """What was held out, and by which group."""
    seeds: tuple[int, ...] = ()
    hours: Annotated[float, Field(ge=0)] = 0.0
    hardware: str = ""


class ModelCard(_Strict):
    """What a segmentation model expects and delivers; see `read_card`."""

    format: Literal["gigavim-model/1"] = "gigavim-model/1"
    name: Annotated[str, Field(min_length=1)]
    description: str
    config: VimConfig
    head: HeadKind = "linear"
    """What turns tokens into pixels."""
    head_width: Annotated[int, Field(ge=0, le=4096)] = 0
    """Channels of the head, where it has a choice; 0 is the default of its kind."""
    tied_rates: bool = False
    """The decay rates of a channel's states are in the ratio 1 : 2 : ... : N, which loading
    restores exactly."""
    mpp: Positive
    """Micrometres per pixel at which the model works."""
    mpp_range: tuple[Positive, Positive]
    """Finest and coarsest scan, in micrometres per pixel, that it may be used on."""
    illumination: Literal["brightfield", "any"] = "any"
    """How the slides of its training are lit; "any" where that makes no difference."""
    mean: tuple[Fraction, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[Positive, ...]
    classes: Annotated[tuple[ClassSpec, ...], Field(min_length=1, max_length=255)]
    """In order of label value."""
    order: str
    """The scan order of its training, as `ScanOrder` writes it."""
    licence: str
    """Of the weights."""
    training: TrainingRecord
    metrics: dict[str, Finite] = {}
    """On held-out data."""
    precision_note: str = ""
    """What arithmetic in bfloat16 costs in quality."""
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """Of weights.safetensors; filled in when the model is saved."""

    @field_validator("order")
    @classmethod
    def _order_is_known(cls, order: str) -> str:
        try:
            ScanOrder.parse(order)
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return order

    @field_validator("classes")
    @classmethod
    def _classes_make_sense(cls, classes: tuple[ClassSpec, ...]) -> tuple[ClassSpec, ...]:
        names = [spec.name for spec in classes]
        if len(set(names)) != len(names):
            raise ValueError("two classes have the same name")
        for spec in classes:
            if any(not 0 <= value <= 255 for value in spec.color_rgb):
                raise ValueError(f"color_rgb of {spec.name!r} is not within 0..255")
            if spec.parent is not None and (spec.parent == spec.name or spec.parent not in names):
                raise ValueError(f"parent {spec.parent!r} of {spec.name!r} is not another class")
            if spec.object_type not in ("annotation", "detection", "none"):
                raise ValueError(
                    f"object_type of {spec.name!r} is {spec.object_type!r}, not annotation, "
                    f"detection or none"
                )
        return classes

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        channels = self.config.in_channels
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"mean and std need one value for each of {channels} channels")
        if not self.mpp_range[0] <= self.mpp <= self.mpp_range[1]:
            raise ValueError("mpp lies outside mpp_range")
        order = ScanOrder.parse(self.order)
        if self.config.position == "block" and self.config.grid_hw != (order.block, order.block):
            raise ValueError(
                f"positions are learned per block of {self.config.grid_hw} tokens, "
                f"but the order is {self.order}"
            )
        return self

    @property
    def scan_order(self) -> ScanOrder:
        """`order`, parsed."""
        return ScanOrder.parse(self.order)


class EncoderCard(_Strict):
    """What is known of an encoder's weights."""

    format: Literal["gigavim-encoder/1"] = ENCODER_FORMAT
    name: str
    source: str
    """File name it was imported from and which of its weights, or how it was trained."""
    source_sha256: str = ""
    config: VimConfig
    mean: tuple[Fraction, ...] = IMAGENET_MEAN
    std: tuple[Positive, ...] = IMAGENET_STD
    licence: str = UNKNOWN_LICENCE
    sha256: str = ""
    """Of weights.safetensors."""


def read_card(path: Path) -> ModelCard:
    """Read a card.json; raises `ModelError` naming the file and every wrong or unknown field."""
    blob = _content(path)
    try:
        return ModelCard.model_validate_json(blob)
    except ValidationError as error:
        if _is_encoders(blob):
            raise ModelError(
                f"{path.parent}: an encoder without a head, which cannot segment by itself; "
                f"`gigavim train RECIPE --data DATA --weights {path.parent}` starts a model from it"
            ) from None
        raise ModelError(f"{path}: not a valid model card: {_in_words(error)}") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def read_encoder_card(path: Path) -> EncoderCard:
    """Read an encoder's card.json; raises `ModelError` as `read_card` does."""
    blob = _content(path)
    try:
        return EncoderCard.model_validate_json(blob)
    except ValidationError as error:
        raise ModelError(f"{path}: not an encoder's card: {_in_words(error)}") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def is_encoder(folder: Path) -> bool:
    """Whether a folder holds an encoder, by its card."""
    path = folder / CARD_NAME
    return path.is_file() and _is_encoders(_content(path))


def _is_encoders(blob: bytes) -> bool:
    try:
        values = json.loads(blob)
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("format") == ENCODER_FORMAT


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_CARD_BYTES:
            raise ModelError(f"{path}: far too large to be a model card")
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(
            f"{path}: not found; a model is a folder with {CARD_NAME} and {WEIGHTS_NAME}"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def _in_words(error: ValidationError) -> str:
    return "; ".join(_complaint(dict(item)) for item in error.errors(include_url=False))


def _complaint(item: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "card"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: unknown field"
    return f"{place}: {item['msg']}"
