"""Recipes: what to do with every slide of an archive, as a TOML file.

A recipe holds sections of gigavim.toml, `[recipe]` (what it is) and `[batch]` (how it is run).
Unknown keys are errors that name the key.
"""

import difflib
import importlib
import json
import logging
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gigavim.config import Settings, read_toml, validate
from gigavim.errors import SettingsError

log = logging.getLogger(f"gigavim.{__name__}")

SlideTask = Callable[..., Any]
"""`task(path, *, settings, stem, progress)`; its answer has `.outputs`, {kind: path}, all below
`settings.output.directory`, and `.summary`, plain data."""


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

# Settings that change how fast or where, and not what comes out.
_IMMATERIAL = {
    "compute": ("device", "threads", "max_memory", "max_gpu_memory", "scratch_dir"),
    "tokens": ("num_workers", "block_px"),
    "output": ("directory", "overwrite"),
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class RecipeHead(_Section):
    """What a recipe is."""

    description: str = ""
    task: str = "segment"
    """A name in `TASKS`, or "module:function" of one's own, called as `SlideTask` says."""


class BatchSettings(_Section):
    """How a recipe is run."""

    workers: int = Field(0, ge=0, le=4096)
    """Slides at a time on this machine; 0: one per GPU, else one per four cores."""
    timeout: str = "6h"
    """Longest time for a slide; "0" for none."""
    tries: int = Field(3, ge=1, le=100)
    """How often a slide is begun whose failure may pass: I/O, a dead or hung worker."""
    retry_wait: str = "10s"
    """Before the second try; doubled for each further one."""
    worker_memory: str = "auto"
    """Beyond this a worker is replaced; auto: an equal share of the machine's."""
    recycle_after: int = Field(100, ge=0)
    """Slides after which a worker process is replaced; 0: never."""


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


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a shipped recipe or a file of one's own.

    Args:
        name_or_path: a name of `list_recipes`, or a TOML file.
        overrides: "section.key=value" each, the value as in TOML or a bare word.

    Raises:
        SettingsError: there is no such recipe, or it has a key or value that is not allowed.
    """
    shipped = {path.stem: path for path in _shipped()}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file() and path.suffix.lower() != ".toml":
        close = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingsError(
            f"no recipe is called {name_or_path!r}, nor is there such a file.{hint} Shipped are"
            f" {', '.join(sorted(shipped))}; see gigavim batch --list."
        )
    recipe = _load(path)
    for override in overrides:
        recipe = _override(recipe, override)
    recipe.function()
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
    return validate(Recipe, values, str(path))


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
