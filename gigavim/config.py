"""`gigavim.toml` as typed settings, and back from nothing to defaults.

Loading is strict: an unknown key or a value of the wrong kind is a `SettingsError` that names the
key, the file and what would be right. Sections and keys are those of the `gigavim.toml` in the
repository.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gigavim.errors import SettingsError

Format = Literal[
    "ome-tiff", "ome-zarr", "geojson", "geojson.gz", "geotiff", "gpkg", "geoparquet", "overlay",
    "csv", "h5-trident", "h5-clam", "h5-stamp", "anndata", "spatialdata",
]  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class InputSettings(_Section):
    """What the file says of itself, overruled."""

    slide_mpp: float = Field(0.0, ge=0, le=1e7, allow_inf_nan=False)
    channels: list[int] = []


class ModelSettings(_Section):
    """Which model, at which resolution."""

    name: str = Field("auto", min_length=1)
    weights: str = ""
    mpp: float = Field(0.0, ge=0, le=1e7, allow_inf_nan=False)
    allow_mpp_mismatch: bool = False
    context: Literal["slide", "window"] = "slide"
    window_px: int = Field(224, ge=8, le=1 << 16)


class TokenSettings(_Section):
    """What becomes tokens and how it is read."""

    tissue: str = "auto"
    min_tissue: float = Field(0.0, ge=0, le=1)
    block_px: int = Field(2048, ge=64, le=16384)
    num_workers: int = Field(0, ge=0, le=1024)


class ComputeSettings(_Section):
    """Where the encoder runs and what it may use."""

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = Field(0, ge=0, le=1024)
    max_memory: str = "auto"
    max_gpu_memory: str = "auto"
    scratch_dir: str = ""


class EmbeddingSettings(_Section):
    """What an embedding store holds."""

    dtype: Literal["float16", "float32"] = "float16"
    probabilities: bool = False


class OutputSettings(_Section):
    """What is written, and where."""

    directory: str = "gigavim_out"
    formats: list[Format] = []
    overwrite: bool = False
    max_unreadable: float = Field(0.01, ge=0, le=1)
    qupath_bounds: bool = True
    min_area_um2: float = Field(0.0, ge=0, allow_inf_nan=False)
    simplify_um: float = Field(0.0, ge=0, allow_inf_nan=False)
    pool: int = Field(1, ge=1, le=1024)
    ngff: Literal["0.4", "0.5"] = "0.4"
    slide: str = ""


class Settings(_Section):
    """All settings of a run."""

    input: InputSettings = InputSettings()
    model: ModelSettings = ModelSettings()
    tokens: TokenSettings = TokenSettings()
    compute: ComputeSettings = ComputeSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    output: OutputSettings = OutputSettings()

    def with_flags(self, **sections: dict[str, Any]) -> Self:
        """A copy in which the given values, section by section, win; `None` leaves a value alone.

        Raises:
            SettingsError: a value is out of range.
        """
        merged = self.model_dump()
        for section, values in sections.items():
            merged[section] |= {key: value for key, value in values.items() if value is not None}
        return validate(type(self), merged, "the command line")


SomeSettings = TypeVar("SomeSettings", bound=BaseModel)


def load_settings(path: Path | None = None) -> Settings:
    """Read a settings file; without `path`, `gigavim.toml` in the current folder if it is there.

    Raises:
        SettingsError: the file is missing, is not TOML, or has a key or value that is not allowed.
    """
    if path is None:
        path = Path("gigavim.toml")
        if not path.is_file():
            return Settings()
    return validate(Settings, read_toml(path), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        SettingsError: the file is missing, cannot be read, or is not TOML.
    """
    if path.exists() and not path.is_file():
        raise SettingsError(f"{path}: is no regular file, and settings are; check the name.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a mark
    except FileNotFoundError:
        raise SettingsError(f"{path}: there is no such settings file; check --config.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"{path}: cannot read the settings: {reason}.") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}.") from error


def validate(kind: type[SomeSettings], values: dict[str, Any], origin: str) -> SomeSettings:
    """Values as settings of a kind; `origin` is where they came from, for people.

    Raises:
        SettingsError: a key is unknown, or a value not allowed.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_explain(error, kind, origin)) from error


def _explain(error: ValidationError, kind: type[BaseModel], origin: str) -> str:
    """The first thing wrong, as one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, _known_keys(kind), n=1)
        section = key.rpartition(".")[0]
        known = [one for one in _known_keys(kind) if one.rpartition(".")[0] == section]
        hint = f" Did you mean `{close[0]}`?" if close else f" Settings there: {', '.join(known)}."
        return f"{origin}: unknown setting `{key}`.{hint}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{origin}: setting `{key}` = {first['input']!r}: {reason}."


def _known_keys(kind: type[BaseModel]) -> list[str]:
    sections = kind.model_fields
    keys = list(sections)
    for name, field in sections.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            keys += [f"{name}.{key}" for key in model.model_fields]
    return keys
