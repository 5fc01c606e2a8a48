"""Folders of results: each slide's appears in one rename, whole, and takes its own place only."""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from gigavim.errors import OutputError
from gigavim.outputs.atomic import explained
from gigavim_pipelines.record import Record, record_name

log = logging.getLogger(f"gigavim.{__name__}")

_TEMPORARY = re.compile(r"^\.(partial|previous)-[0-9a-f]{8}-(?P<id>.+)$")


class Archive:
    """The output folder of a run.

    slides/ID/      results of a slide and its record
    logs/           last words of workers that died
    ledger*.sqlite  the state of each slide
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slides = root / "slides"
        self.logs = root / "logs"

    def make(self) -> None:
        """Create the folders; `OutputError` if the disk refuses."""
        with explained(self.slides):
            self.slides.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)

    def record(self, slide_id: str) -> Record | None:
        """The record of a finished slide."""
        return Record.read(self.slides / slide_id / record_name(slide_id))

    @contextmanager
    def staging(self, slide_id: str, *, overwrite: bool) -> Iterator[Path]:
        """A folder to work in, which becomes the slide's when a `with` block ends well.

        Results that an earlier run made for the slide are then removed; other files in its folder
        stay.

        Raises:
            OutputError: the disk refuses, or a file that no run made has the name of a result;
                with `overwrite` it is replaced.
        """
        final = self.slides / slide_id
        partial = final.with_name(f".partial-{uuid4().hex[:8]}-{slide_id}")
        with explained(final):
            partial.mkdir(parents=True)
        try:
            yield partial
            with explained(final):
                self._place(partial, final, overwrite=overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def recover(self, slide_ids: Iterable[str]) -> None:
        """Remove what killed runs left half-done of these slides; put back results set aside."""
        wanted = set(slide_ids)
        for item in list(self.slides.iterdir()):
            match = _TEMPORARY.match(item.name)
            if match is None or match["id"] not in wanted:
                continue
            final = self.slides / match["id"]
            if match[1] == "partial":
                shutil.rmtree(item, ignore_errors=True)
            elif not final.exists():
                item.rename(final)
            else:
                self._clear(item, final)

    def _place(self, partial: Path, final: Path, *, overwrite: bool) -> None:
        if not final.exists():
            partial.rename(final)
        else:
            record = self.record(final.name)
            own = _own(record, final.name) if record is not None else set()
            new = {item.name for item in partial.iterdir()}
            foreign = {item.name for item in final.iterdir()} - own
            if foreign & new and not overwrite:
                raise OutputError(
                    f"{final / min(foreign & new)}: is there already, and no record says that a run"
                    " made it; move it away, or use --overwrite."
                )
            previous = final.with_name(f".previous-{uuid4().hex[:8]}-{final.name}")
            final.rename(previous)
            partial.rename(final)
            self._clear(previous, final)
        _sync_folder(final.parent)

    def _clear(self, previous: Path, final: Path) -> None:
        """Move what no run made to the new folder, and remove the rest."""
        record = Record.read(previous / record_name(final.name))
        own = _own(record, final.name) if record is not None else set()
        for item in list(previous.iterdir()):
            if item.name not in own and not (final / item.name).exists():
                item.rename(final / item.name)
            else:
                _remove(item)
        _remove_empty(previous)


def _own(record: Record, slide_id: str) -> set[str]:
    """Names in a slide's folder that are a run's."""
    names = {Path(output.path).parts[0] for output in record.outputs.values()}
    return names | {record_name(slide_id)}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system syncs folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
