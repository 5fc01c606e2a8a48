"""The sections that a recipe has beyond those of gigavim.toml."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gigavim.engine.memory import parse_bytes
from gigavim.errors import SettingsError


def seconds(text: str) -> float:
    """A span of time: "90", "30s", "15m", "6h".

    Raises:
        ValueError: it is none.
    """
    from dask.utils import parse_timedelta

    try:
        span = float(parse_timedelta(text))
    except (ValueError, KeyError, TypeError, OverflowError):
        span = -1.0
    if not 0 <= span < 1e8:
        raise ValueError(f"{text!r} is no span of time: write it like 90s, 15m or 6h")
    return span


def checked_size(text: str) -> str:
    """A size, or "auto"; `ValueError` if it is neither."""
    if text != "auto":
        try:
            parse_bytes(text)
        except SettingsError as error:
            raise ValueError(str(error)) from error
    return text


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class RecipeHead(_Section):
    """What a recipe is."""

    name: str = ""
    """What results are said to be made by; "": the file's name without ending."""
    description: str = ""
    task: str = "segment"
    """A name in `recipe.TASKS`, or "module:function" of one's own, a `recipe.SlideTask`."""


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

    @field_validator("timeout", "retry_wait")
    @classmethod
    def _is_span(cls, text: str) -> str:
        seconds(text)
        return text

    @field_validator("worker_memory")
    @classmethod
    def _is_size(cls, text: str) -> str:
        return checked_size(text)
