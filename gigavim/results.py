"""What a run over a slide returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigavim.frames import length_text

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore

AREA_UNITS = {
    "area_mm2": (("mm2", 1.0, 0.01), ("um2", 1e-6, 0.0)),
    "area_ha": (("km2", 100.0, 10.0), ("ha", 1.0, 0.1), ("m2", 1e-4, 0.0)),
}
"""The units each kind of area is told in: name, size in the kind's own, from how many on."""


@dataclass(frozen=True, slots=True)
class Result:
    """The files made of a slide, and what there is to say about them."""

    slide: Path
    outputs: dict[str, Path]
    """Written files (and folders, where a format is one) by format."""
    summary: dict[str, Any]
    """Areas, tokens, timings, provenance."""

    def made_by(self) -> str:
        """The model, and at what resolution it saw the slide, for people."""
        model = self.summary["provenance"]["model"]
        seen = "" if model["mpp"] is None else f" at {length_text(model['mpp'])} per pixel"
        context = model.get("context", "slide")
        return f"{model['name']}{seen}{'' if context == 'slide' else f', {context} alone'}"

    def areas(self) -> list[str]:
        """One line per class for people: name, share of the map, area."""
        lines = []
        for entry in self.summary["classes"]:
            sizes = [area_text(entry[k], k) for k in AREA_UNITS if entry.get(k) is not None]
            lines.append(
                f"{entry['name']:<12} {entry['fraction']:6.1%}  {' '.join(sizes)}".rstrip()
            )
        return lines


def area_text(area: float, kind: str) -> str:
    """An area, of a kind of `AREA_UNITS`, in the unit that suits its size."""
    units = AREA_UNITS[kind]
    unit, size, _ = next((one for one in units if area >= one[2] * one[1]), units[-1])
    value = area / size
    return f"{value:,.{0 if value >= 1000 or unit == units[-1][0] else 3}f} {unit}"


@dataclass(frozen=True, slots=True)
class Segmentation(Result):
    """What `segment` made."""


@dataclass(frozen=True, slots=True)
class Embedding(Result):
    """What `embed` made; the store is `outputs["store"]`."""

    def open(self) -> "EmbeddingStore":
        """Open the store."""
        from gigavim.store.reader import EmbeddingStore

        return EmbeddingStore.open(self.outputs["store"])
