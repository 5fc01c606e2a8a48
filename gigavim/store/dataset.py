"""An archive of embedding stores as a PyTorch data set of bags, for training on whole slides."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gigavim.errors import StoreError
from gigavim.store.layout import SUFFIX
from gigavim.store.reader import EmbeddingStore
from gigavim.store.views import feature_chunks, spots


class Bag(NamedTuple):
    """One slide."""

    features: Tensor
    """(n, D) float32."""
    xy_level0: Tensor
    """(n, 2) float64, centres."""
    label: Tensor
    """As given for the slide; nan where none was."""
    name: str
    """Of the slide."""


class EmbeddingBags(Dataset[Bag]):
    """Stores as bags of embeddings, read when asked for; safe with worker processes.

    Args:
        stores: folders or URLs, as `find_stores` lists them.
        labels: one number per store.
        pool: side in cells of the windows that become one instance: 1, or a power of two that
            every store has. 16 makes instances of 128 or 256 px, the usual tile of MIL.
        limit: instances per bag at most; a fresh random draw (torch's generator) each time.

    Raises:
        StoreError: labels and stores differ in number, or there is no store.
    """

    def __init__(
        self,
        stores: Sequence[str | Path],
        labels: Sequence[float] | None = None,
        *,
        pool: int = 16,
        limit: int | None = None,
    ) -> None:
        if not stores:
            raise StoreError("there is no store to make bags of")
        if labels is not None and len(labels) != len(stores):
            raise StoreError(f"{len(stores)} stores have {len(labels)} labels")
        self.stores, self.pool, self.limit = list(stores), pool, limit
        self._seen: set[int] = set()
        """Stores whose files were all there: on object storage it takes a request or two to see."""
        self.labels = [float("nan")] * len(stores) if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.stores)

    def __getitem__(self, number: int) -> Bag:
        store = EmbeddingStore.open(self.stores[number], complete=number not in self._seen)
        self._seen.add(number)
        parts = list(feature_chunks(store, self.pool))
        features = torch.from_numpy(np.concatenate(parts))
        xy = torch.from_numpy(spots(store, self.pool).centres_xy_level0)
        if self.limit is not None and len(features) > self.limit:
            drawn = torch.randperm(len(features))[: self.limit].sort().values
            features, xy = features[drawn], xy[drawn]
        return Bag(features, xy, torch.tensor(self.labels[number]), store.info.slide.name)


def find_stores(folder: str | Path) -> list[Path]:
    """All stores below a folder, by name; hidden ones are what killed runs left."""
    found = (path for path in Path(folder).rglob(f"*{SUFFIX}") if path.is_dir())
    return sorted(path for path in found if not path.name.startswith("."))
