"""Embedding stores: what a slide became, in one zarr hierarchy that every next tool is fed from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore


def open_embeddings(location: str | Path, **storage_options: Any) -> "EmbeddingStore":
    """Open a store of `gigavim embed` for reading.

    Args:
        location: its folder, or with fsspec a URL such as "s3://bucket/slide.embeddings.zarr", of
            which only the parts that are asked for are read.
        **storage_options: for fsspec.

    Raises:
        StoreError: there is no such store, or it is damaged or of a later version.
    """
    from gigavim.store.reader import EmbeddingStore

    return EmbeddingStore.open(location, **storage_options)
