"""Is a store what it was when it was made, and is what it was made of still there?"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gigavim.errors import GigavimError, StoreError
from gigavim.model.checkpoint import load_card
from gigavim.progress import Progress, Silent
from gigavim.store.checksums import check_files, read_checksums
from gigavim.store.reader import EmbeddingStore
from gigavim.store.slide import open_slide_of


@dataclass(slots=True)
class Verification:
    """What was found."""

    location: str
    confirmed: list[str] = field(default_factory=list)
    """What is as it was."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be looked at, and why."""
    problems: list[str] = field(default_factory=list)
    """What is not as it was."""


def verify_store(
    path: str | Path, *, slide: str = "", progress: Progress | None = None
) -> Verification:
    """Check a store's files against its checksums, its arrays, its slide and its model.

    Args:
        path: the store's folder.
        slide: where its slide is now, if not where it was.
        progress: told of the files.

    Raises:
        StoreError: there is no store, or it has no checksums.
    """
    folder, progress = Path(path), progress or Silent()
    store = EmbeddingStore.open(folder, complete=False)
    result = Verification(str(path))
    files = len(read_checksums(folder))
    with progress.stage("verify", files, "files") as advance:
        result.problems += check_files(folder, advance=advance)
    if not result.problems:
        result.confirmed.append(f"{files} files have their checksums")
        result.problems += _inconsistencies(store)
    if not result.problems:
        result.confirmed.append(f"{len(store):,} tokens, their index and positions agree")
    _check_slide(store, slide, result)
    _check_model(store, result)
    return result


def _inconsistencies(store: EmbeddingStore) -> Iterator[str]:
    """What the checksums cannot tell: parts that do not belong together."""
    info, grid = store.info, store.info.grid
    try:
        expected = {
            "index": (store.index.shape, (grid.rows, grid.cols)),
            "tokens/embeddings": (store.embeddings.shape, (info.tokens, info.width)),
            "map/labels": (
                (store.labels.height, store.labels.width),
                (info.frame.height_px, info.frame.width_px),
            ),
        }
        for name, (found, wanted) in expected.items():
            if found != wanted:
                yield f"{name}: is {found}, and the description says {wanted}"
        index, row_col = np.asarray(store.index[:]), np.asarray(store.row_col[:])
    except StoreError as error:
        yield str(error)
        return
    row, col = np.nonzero(index >= 0)
    places = index[row, col]
    if len(places) != info.tokens or not np.array_equal(np.sort(places), np.arange(info.tokens)):
        yield "index: does not name every token once"
    elif not np.array_equal(row_col[places], np.stack([row, col], 1)):
        yield "tokens/row_col: contradicts the index"


def _check_slide(store: EmbeddingStore, path: str, result: Verification) -> None:
    known = Path(path or store.info.slide.path)
    if not known.exists():
        result.unchecked.append(f"slide: {known} is not there; name it with --slide FILE")
        return
    try:
        open_slide_of(store, path).close()
        result.confirmed.append(f"slide: {known} has the fingerprint recorded")
    except GigavimError as error:
        result.problems.append(f"slide: {error}")


def _check_model(store: EmbeddingStore, result: Verification) -> None:
    model = store.info.provenance.get("model", {})
    name, sha256 = str(model.get("name", "")), model.get("sha256")
    settings = store.info.provenance.get("settings", {}).get("model", {})
    if model.get("other_weights"):
        result.unchecked.append(f"model: {name} ran with other weights, SHA-256 {sha256}")
        return
    chosen = str(settings.get("name", "auto"))
    try:
        card = load_card(name if chosen == "auto" else chosen)
    except GigavimError:
        result.unchecked.append(f"model: {name} is not there; its weights had SHA-256 {sha256}")
        return
    if card.sha256 == sha256:
        result.confirmed.append(f"model: {name} is there with the weights that ran")
    else:
        result.problems.append(
            f"model: {name} has other weights now ({card.sha256[:12]}…) than those that ran"
            f" ({str(sha256)[:12]}…)"
        )
