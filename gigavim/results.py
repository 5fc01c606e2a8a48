"""What a run over a slide returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore


@dataclass(frozen=True, slots=True)
class Result:
    """The files made of a slide, and what there is to say about them."""

    slide: Path
    outputs: dict[str, Path]
    """Written files (and folders, where a format is one) by format."""
    summary: dict[str, Any]
    """Areas, tokens, timings, provenance."""

    def areas(self) -> list[str]:
        """One line per class for people: name, share of the map, area."""
        lines = []
        for entry in self.summary["classes"]:
            sizes = [
                f"{entry[key]:,.3f} {unit}"
                for key, unit in (("area_mm2", "mm2"), ("area_ha", "ha"))
                if entry.get(key) is not None
            ]
            lines.append(f"{entry['name']:<12} {entry['fraction']:6.1%}  {' '.join(sizes)}")
        return lines


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
