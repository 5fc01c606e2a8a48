"""Recipes: what to do with every slide of an archive, as a TOML file.

A recipe holds sections of gigavim.toml, `[recipe]` (what it is) and `[batch]` (how it is run).
Unknown keys are errors that name the key.
"""

import difflib
import importlib
import json
import logging
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from gigavim.config import Settings, read_toml, validate
from gigavim.errors import SettingsError
from gigavim_pipelines.recipe_sections import BatchSettings, RecipeHead, checked_size

log = logging.getLogger(f"gigavim.{__name__}")


class UnknownRecipeError(SettingsError):
    """No recipe is called so."""


SlideTask = Callable[..., Any]
"""`task(path, *, settings, stem, progress)`; its answer has `.outputs`, {kind: path}, all below
`settings.output.directory`, and `.summary`, plain data."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells recipes, and states of one, apart."""

    name: str
    fingerprint: str
    """As `Recipe.fingerprint` gives it."""


@dataclass(frozen=True, slots=True)
class Task:
    """A shipped way to work on a slide."""

    target: str
    """The function, as "module:name"."""
    uses_model: bool


TASKS = {
    "segment": Task("gigavim.segmentation:segment", True),
    "embed": Task("gigavim.embedding:embed", True),
    "qc": Task("gigavim_pipelines.qc:check_quality", False),
}

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,4})?")
# Settings that change how fast or where, and not what comes out.
_IMMATERIAL = {
    "compute": ("device", "threads", "max_memory", "max_gpu_memory", "scratch_dir"),
    "tokens": ("num_workers", "block_px"),
    "output": ("directory", "overwrite"),
}


class Recipe(Settings):
    """A recipe: settings of a run, what is run, and how."""

    recipe: RecipeHead = RecipeHead()
    batch: BatchSettings = BatchSettings()

    @property
    def settings(self) -> Settings:
        """The part that is gigavim.toml's."""
        values = self.model_dump(include=set(Settings.model_fields))
        return validate(Settings, values, "the recipe")

    @property
    def uses_model(self) -> bool:
        """Whether a network runs; of one's own tasks it is not known, and assumed."""
        task = TASKS.get(self.recipe.task)
        return task is None or task.uses_model

    def function(self) -> SlideTask:
        """The function to call on each slide.

        Raises:
            SettingsError: `task` names none.
        """
        name = self.recipe.task
        target = TASKS[name].target if name in TASKS else name
        module, _, attribute = target.partition(":")
        if not attribute:
            raise SettingsError(
                f"recipe.task = {name!r} is neither of {', '.join(TASKS)} nor of the form"
                " module:function."
            )
        try:
            function: SlideTask = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise SettingsError(
                f"recipe.task = {name!r} cannot be imported: {error}. The module must be installed,"
                " or its folder on PYTHONPATH."
            ) from error
        return function

    def check(self) -> None:
        """Find out before the first slide what would make every slide fail.

        Raises:
            SettingsError: the task, device, a size or the tissue file named is none.
        """
        self.function()
        if not _DEVICE.fullmatch(self.compute.device):
            raise SettingsError(
                f"compute.device = {self.compute.device!r}: use auto, cpu, cuda, cuda:1 or mps."
            )
        for key in ("max_memory", "max_gpu_memory"):
            try:
                checked_size(getattr(self.compute, key))
            except ValueError as error:
                raise SettingsError(f"compute.{key}: {error}.") from error
        tissue = self.tokens.tissue
        if tissue not in ("auto", "none") and not Path(tissue).is_file():
            raise SettingsError(
                f"tokens.tissue = {tissue!r}: there is no such file; give auto, none, or a GeoJSON"
                " or image. What differs from slide to slide is a manifest's column mask."
            )

    def identity(self) -> Identity:
        """The name and fingerprint that its results carry."""
        return Identity(self.recipe.name, self.fingerprint())

    def fingerprint(self) -> str:
        """SHA-256 of all that determines the results: task, settings, model.

        Where things are computed, and with how much memory, is left out.

        Raises:
            ModelError: the model named cannot be read.
        """
        values = self.settings.model_dump(mode="json")
        for section, keys in _IMMATERIAL.items():
            for key in keys:
                values[section].pop(key)
        facts = {
            "task": self.recipe.task,
            "settings": values,
            "model": _models(self) if self.uses_model else None,
        }
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def list_recipes() -> dict[str, Recipe]:
    """The shipped recipes by name."""
    return {path.stem: _load(path) for path in _shipped()}


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe (a name of `list_recipes`) or a TOML file of one's own.

    Raises:
        UnknownRecipeError: there is no such recipe.
        SettingsError: it has a key or value that is not allowed.
    """
    shipped = {path.stem: path for path in _shipped()}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file() and path.suffix.lower() != ".toml":
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UnknownRecipeError(
            f"no recipe is called {name_or_path!r}, nor is there such a file.{hint} Shipped are"
            f" {', '.join(sorted(shipped))}; see gigavim batch --list."
        )
    recipe = _absolute(_load(path))
    try:
        recipe.check()
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    return recipe


def with_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A recipe with other settings, each "section.key=value", the value as in TOML or a bare word.

    Raises:
        SettingsError: a key or value is not allowed.
    """
    for override in overrides:
        recipe = _override(recipe, override)
    return _absolute(recipe)


def _load(path: Path) -> Recipe:
    values = read_toml(path)
    given = values.get("output", {})
    for key in ("directory", "overwrite"):
        if isinstance(given, dict) and key in given:
            raise SettingsError(
                f"{path}: output.{key} is not for recipes: where results go is said by -o, and"
                " --overwrite."
            )
    recipe = validate(Recipe, values, str(path))
    return recipe if recipe.recipe.name else recipe.with_flags(recipe={"name": path.stem})


def _override(recipe: Recipe, text: str) -> Recipe:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    values = recipe.model_dump()
    if not equals or not dot:
        raise SettingsError(f"--set {text}: write section.key=value, such as tokens.tissue=none.")
    if section not in values:
        raise SettingsError(f"--set {text}: there is no section {section!r}.")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    # TOML tells 2 from 2.0; on a command line nobody does.
    if isinstance(parsed, int) and isinstance(values[section].get(key), float):
        parsed = float(parsed)
    values[section][key] = parsed
    return validate(Recipe, values, f"--set {text}")


def _absolute(recipe: Recipe) -> Recipe:
    """Paths that hold for workers in other folders too."""
    model, tissue = recipe.model, recipe.tokens.tissue
    return recipe.with_flags(
        model={
            "name": str(Path(model.name).resolve()) if Path(model.name).exists() else None,
            "weights": str(Path(model.weights).resolve()) if model.weights else None,
        },
        tokens={"tissue": str(Path(tissue).resolve()) if tissue not in ("auto", "none") else None},
    )


def _shipped() -> list[Path]:
    folder = Path(str(resources.files("gigavim_pipelines"))) / "recipes"
    return sorted(folder.glob("*.toml"))


def _models(recipe: Recipe) -> Any:
    """The SHA-256 of the weights that may run."""
    from gigavim.model.checkpoint import list_models, load_card

    if recipe.model.weights:
        with Path(recipe.model.weights).open("rb") as file:
            return sha256(file.read()).hexdigest()
    if recipe.model.name == "auto":
        return {name: card.sha256 for name, card in list_models().items()}
    return load_card(recipe.model.name).sha256
