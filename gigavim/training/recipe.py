"""Recipes: everything that makes a trained model, in one strict TOML file.

A recipe names no place on a machine: where the data lie is said on the command line. Unknown keys
and values of the wrong kind are `SettingsError`s that name the key and the file.
"""

import difflib
import math
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gigavim.errors import GigavimError, SettingsError
from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.config import HeadKind, VimConfig
from gigavim.tokens.order import ScanOrder

IGNORED = 255
"""Label of pixels that teach nothing and count nowhere."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[Positive, Positive]


class _Section(BaseModel):
    # Lax only in that a whole number may stand for a float and an array for a tuple, as in TOML.
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecipe(_Section):
    """What is trained, and what its card says."""

    name: Annotated[str, Field(min_length=1)]
    description: str
    licence: str
    encoder: VimConfig
    head: HeadKind = "linear"
    """What turns tokens into pixels: "linear" each by itself, "fpn" with layers in between and
    neighbours, "upernet" with the whole slide pooled too, "segmenter" by attention in squares."""
    head_width: Annotated[int, Field(ge=0, le=4096)] = 0
    """Channels of the head, where it has a choice; 0 is the default of its kind."""
    order: str
    mpp: Positive
    """Micrometres per pixel at which the model works."""
    mpp_range: Range
    illumination: Literal["brightfield", "any"] = "any"
    """How the pictures are lit, where that matters for use."""
    mean: tuple[Share, ...]
    std: tuple[Positive, ...]
    tied_rates: bool = False
    """Keep the decay rates of a channel's states in the ratio 1 : 2 : ... : 16: much faster on
    CPUs, where training always does so."""
    encoder_weights: str = ""
    """Encoder weights to start from: an imported folder, safetensors or a published .pth."""

    @field_validator("order")
    @classmethod
    def _order_is_known(cls, order: str) -> str:
        try:
            return str(ScanOrder.parse(order))
        except GigavimError as error:
            raise ValueError(str(error)) from None

    @property
    def scan_order(self) -> ScanOrder:
        """`order`, parsed."""
        return ScanOrder.parse(self.order)


class ClassRecipe(_Section):
    """A class and how masks show it."""

    name: str
    color_rgb: tuple[int, int, int]
    parent: str | None = None
    object_type: Literal["annotation", "detection", "none"] = "annotation"
    mask_values: tuple[int, ...] = ()
    """Grey values of this class in masks of one channel."""
    mask_rgb: tuple[tuple[int, int, int], ...] = ()
    """Colours of this class in colour masks."""
    is_default: bool = False
    """What no class claims is this class; without such a class it is ignored."""
    is_empty_glass: bool = False
    """Also claims what `data.glass` finds, in place of the default class."""

    @property
    def has_rule(self) -> bool:
        """Whether masks of values or colours can show it."""
        claims = self.mask_values or self.mask_rgb or self.is_default or self.is_empty_glass
        return bool(claims)

    @property
    def spec(self) -> ClassSpec:
        """The class as a card names it."""
        return ClassSpec(self.name, self.color_rgb, self.parent, self.object_type)


class DataRecipe(_Section):
    """Pictures with masks, found below the folder that the command line names."""

    images: tuple[str, ...]
    """Glob patterns."""
    masks: str
    """The mask of a picture, from its folder: "../masks/{stem}.*". A .geojson is QuPath's: an area
    is of the class that its classification names."""
    region: str = "Region*"
    """Classification of the areas that were annotated; outside of them nothing is labelled."""
    group_pattern: str
    """A regular expression on the path; what its first bracket finds is the picture's key."""
    groups: dict[str, tuple[str, ...]] = {}
    """Group to keys. A key like "5-12" is a range of numbers. Without any, keys are groups."""
    mpp: Positive
    """Micrometres per pixel of the pictures as stored."""
    mpp_of: dict[str, Positive] = {}
    """Other resolutions, by key."""
    stitch_cols: Annotated[int, Field(ge=0)] = 0
    """Pictures of one key, by name, are a cut of one scene row by row, so many in a row."""
    pack_mpp: Positive | None = None
    """Finest resolution worth storing in a packed file."""
    pack_quality: Annotated[int, Field(ge=50, le=100)] = 92
    """Of the JPEG pictures in a packed file."""
    glass: Annotated[float, Field(gt=0, le=255)] | None = None
    """Grey value of empty glass in the pictures."""
    source: str
    """Citation, for the card."""
    licence: str

    @field_validator("group_pattern")
    @classmethod
    def _pattern_finds_a_key(cls, pattern: str) -> str:
        try:
            brackets = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        if not brackets:
            raise ValueError("needs a bracket, which finds the key: '(\\d+)\\.png$'")
        return pattern

    @field_validator("groups")
    @classmethod
    def _a_key_is_of_one_group(
        cls, groups: dict[str, tuple[str, ...]]
    ) -> dict[str, tuple[str, ...]]:
        ranges = [(*_first_and_last(key), key, group) for group in groups for key in groups[group]]
        for place, (first, last, key, group) in enumerate(ranges):
            for other_first, other_last, other, other_group in ranges[:place]:
                if group == other_group:
                    continue
                if key == other or (first <= other_last and other_first <= last):
                    raise ValueError(
                        f"{key} of {group} is also in {other_group} ({other}): a picture of two "
                        "groups could be learnt from and scored on"
                    )
        return groups


class SplitRecipe(_Section):
    """What is held out: whole groups, so that no picture of a held-out slide or place is seen."""

    validation_groups: Annotated[tuple[str, ...], Field(min_length=1)]


class ScheduleRecipe(_Section):
    """How long and how fast to learn."""

    steps: Count = 4000
    max_minutes: Positive | None = None
    """If given, `steps` is set by the speed, so that the training takes this long."""
    batch_blocks: Count = 64
    """Blocks of tokens in a step, except where one canvas is larger."""
    largest_blocks: Count = 64
    """Blocks of the largest canvas, drawn in the second half; a quarter of it in the first."""
    peak_rate: Positive = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    final_rate: Share = 0.01
    """Learning rate at the end as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    clip_norm: Positive = 1.0
    average: Share = 0.998
    """Decay of the moving average of the weights, which is what is kept."""
    drop_path: Share = 0.0
    half_depth: Share = 0.0
    """The first part of the training, in which every second layer is left out."""
    recompute_tokens: Count = 262_144
    """Batches of more tokens keep only the stream between layers and recompute the rest."""
    workers: Count = 1
    """Batches per step, on a thread each; more than one helps on CPUs only."""
    seed: int = 0
    validate_every: Count = 500
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations without a better score after which training stops; 0: never."""


class LossRecipe(_Section):
    """Weighted cross entropy plus soft Dice."""

    class_weights: tuple[Positive, ...]
    dice_classes: tuple[str, ...]
    monitor: str
    """The score to be best in: "miou", or "dice:" or "iou:" and a class."""


class AugmentRecipe(_Section):
    """What happens to pictures at random."""

    kind: Literal["stain", "colour"]
    strength: Annotated[float, Field(ge=0, le=3)] = 1.0
    scale: Range = (0.7, 1.4)
    """Factors on the pictures' micrometres per pixel, drawn per canvas."""
    turn_degrees: Annotated[float, Field(ge=0, le=45)] = 15.0
    """Rotation beyond quarter turns."""
    stretch: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    blur_px: Annotated[float, Field(ge=0.3, le=2.0)] = 1.1
    """The largest sigma of the Gaussian blur."""
    one_group: Share = 0.5
    """Share of canvases composed of one group only."""
    glass_class: str | None = None
    """What empty glass is; without one none is added."""
    object_class: str | None = None
    """What a pen stroke hides, and dust must not."""
    ground_class: str | None = None
    """What hidden objects become."""


class Recipe(_Section):
    """A recipe; see the modules that use its sections."""

    format: Literal["gigavim-recipe/1"]
    model: ModelRecipe
    classes: Annotated[tuple[ClassRecipe, ...], Field(min_length=2, max_length=200)]
    """In order of label value. The first is also what maps show where nothing was looked at."""
    data: DataRecipe
    split: SplitRecipe
    schedule: ScheduleRecipe = ScheduleRecipe()
    loss: LossRecipe
    augment: AugmentRecipe

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = self.class_names
        if len(set(names)) != len(names):
            raise ValueError("two classes have the same name")
        if len(self.loss.class_weights) != len(names):
            raise ValueError(f"loss.class_weights needs {len(names)} values, one for each class")
        kind, _, of = self.loss.monitor.partition(":")
        if self.loss.monitor != "miou" and (kind not in ("dice", "iou") or of not in names):
            raise ValueError(f"loss.monitor is {self.loss.monitor!r}: miou, dice:CLASS, iou:CLASS")
        used = [*self.loss.dice_classes, self.augment.glass_class, self.augment.object_class]
        for name in (*used, self.augment.ground_class):
            if name is not None and name not in names:
                raise ValueError(f"{name!r} is no class; there are {', '.join(names)}")
        if sum(c.is_default for c in self.classes) > 1:
            raise ValueError("more than one class is the default")
        if any(c.is_empty_glass for c in self.classes) and self.data.glass is None:
            raise ValueError("a class is empty glass, so data.glass must give its grey value")
        return self

    @model_validator(mode="after")
    def _a_card_can_be_written(self) -> Self:
        # Else that would be found out when the training is over.
        data = self.data
        record = TrainingRecord(script="", data=data.source, data_licence=data.licence, split="")
        try:
            self.card(record)
        except ValidationError as error:
            words = (str(e["msg"]).removeprefix("Value error, ") for e in error.errors())
            raise ValueError("; ".join(words)) from None
        return self

    def card(self, record: TrainingRecord, **facts: Any) -> ModelCard:
        """The card of a model of this recipe.

        Args:
            facts: fields that the recipe does not know.
        """
        model = self.model
        known: dict[str, Any] = {
            "name": model.name,
            "description": model.description,
            "config": model.encoder,
            "head": model.head,
            "head_width": model.head_width,
            "tied_rates": model.tied_rates,
            "mpp": model.mpp,
            "mpp_range": model.mpp_range,
            "illumination": model.illumination,
            "mean": model.mean,
            "std": model.std,
            "classes": tuple(c.spec for c in self.classes),
            "order": model.order,
            "licence": model.licence,
        }
        return ModelCard(training=record, **known | facts)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in order of label value."""
        return tuple(c.name for c in self.classes)

    def label(self, name: str | None) -> int | None:
        """The label value of a class."""
        return None if name is None else self.class_names.index(name)


def shipped_recipes() -> dict[str, Path]:
    """The recipes of the package by name."""
    root = Path(str(resources.files("gigavim") / "training" / "recipes"))
    return {path.stem: path for path in sorted(root.glob("*.toml"))}


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe, given by the name of a shipped one or by its path."""
    return shipped_recipes().get(str(name_or_path), Path(name_or_path))


def load_recipe(
    name_or_path: str | Path, *, encoder_weights: Path | None = None, **schedule: Any
) -> Recipe:
    """Read a recipe: a file, or the name of a shipped one.

    Args:
        encoder_weights: win over the recipe's `model.encoder_weights`.
        schedule: values that win over those of its section; None leaves one alone.

    Raises:
        SettingsError: no such recipe, not TOML, or keys or values that are not allowed.
    """
    path = recipe_path(name_or_path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(shipped_recipes())
        raise SettingsError(f"{path}: no such recipe; shipped are {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{path}: cannot be read: {reason}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None
    if schedule.get("steps") is not None and schedule.get("max_minutes") is None:
        values.get("schedule", {}).pop("max_minutes", None)
    given = {key: value for key, value in schedule.items() if value is not None}
    if given and isinstance(values.get("schedule", {}), dict):
        values["schedule"] = values.get("schedule", {}) | given
    if encoder_weights is not None and isinstance(values.get("model", {}), dict):
        own = {"encoder_weights": str(encoder_weights)}
        values["model"] = values.get("model", {}) | own
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        complaints = "; ".join(_complaint(dict(e)) for e in error.errors(include_url=False))
        raise SettingsError(f"{path}: {complaints}") from None
    except GigavimError as error:
        raise SettingsError(f"{path}: {error}") from None


def _first_and_last(key: str) -> tuple[float, float]:
    """The numbers of a key "7" or "5-12"; an empty range for any other."""
    first, _, last = key.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        return math.inf, -math.inf
    return int(first), int(last or first)


def _complaint(item: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(), n=1)
        return f"unknown key `{place}`" + (f"; did you mean `{near[0]}`?" if near else "")
    if place in ("split", "split.validation_groups") and item["type"] in ("missing", "too_short"):
        return (
            "`split.validation_groups` has to name the groups to hold out (slides, patients or "
            "places; never pictures): scores of groups that were learnt from say nothing"
        )
    if item["type"] == "missing":
        return f"`{place}` is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"`{place}`: {message}" if place else message


def _known_keys() -> list[str]:
    keys = list(Recipe.model_fields)
    for section in (
        ModelRecipe, ClassRecipe, DataRecipe, SplitRecipe, ScheduleRecipe, LossRecipe, AugmentRecipe
    ):  # fmt: skip
        keys += section.model_fields
    return keys
