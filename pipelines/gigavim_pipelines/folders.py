"""Folders of results: each slide's appears in one rename, whole, and takes its own place only."""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from uuid import uuid4

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
        record = Record.read(self.slides / slide_id / record_name(slide_id))
        return record if record is not None and record.id == slide_id else None

    def ids(self) -> set[str]:
        """Ids of the slides that have a folder."""
        with suppress(OSError), os.scandir(self.slides) as items:
            return {item.name for item in items if not item.name.startswith(".")}
        return set()

    def without_record(self, slide_id: str) -> str:
        """What is wrong with a slide's folder that holds no record; nothing if there is none."""
        folder = self.slides / slide_id
        if os.path.lexists(folder / record_name(slide_id)):
            return "its record is damaged"
        with suppress(OSError):
            return "its record is missing" if any(folder.iterdir()) else ""
        return ""

    @contextmanager
    def staging(self, slide_id: str, *, overwrite: bool, own: Iterable[str] = ()) -> Iterator[Path]:
        """A folder to work in, which becomes the slide's when a `with` block ends well.

        Results that an earlier run made for the slide are then removed; other files in its folder
        stay, and where a result takes the name of one it becomes `NAME.old`.

        Args:
            slide_id: whose.
            overwrite: replace also files that no run made.
            own: names that an earlier run made, where there may be no record to say so.

        Raises:
            OutputError: the disk refuses.
        """
        final = self.slides / slide_id
        partial = final.with_name(f".partial-{uuid4().hex[:8]}-{slide_id}")
        with explained(final):
            partial.mkdir(parents=True)
        try:
            yield partial
            with explained(final):
                self._place(partial, final, set(own), overwrite=overwrite)
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

    def _place(self, partial: Path, final: Path, own: set[str], *, overwrite: bool) -> None:
        if not final.exists():
            partial.rename(final)
        else:
            # What a damaged record cannot tell any more: this folder's results are a run's.
            damaged = self.record(final.name) is None and os.path.lexists(
                final / record_name(final.name)
            )
            if damaged or overwrite:
                own |= {item.name for item in partial.iterdir()}
            previous = final.with_name(f".previous-{uuid4().hex[:8]}-{final.name}")
            final.rename(previous)
            partial.rename(final)
            self._clear(previous, final, own)
        _sync_folder(final.parent)

    def _clear(self, previous: Path, final: Path, own: Iterable[str] = ()) -> None:
        """Move what no run made to the new folder, and remove the rest."""
        record = Record.read(previous / record_name(final.name))
        made = {record_name(final.name), *own, *(_own(record) if record is not None else ())}
        for item in list(previous.iterdir()):
            if item.name in made:
                _remove(item)
            else:
                item.rename(_free_name(final / item.name))
        _remove_empty(previous)


def _own(record: Record) -> set[str]:
    """Names in a slide's folder that are a run's."""
    return {Path(output.path).parts[0] for output in record.outputs.values()}


def _free_name(path: Path) -> Path:
    """The path itself, or one after it that is free: `a.txt`, `a.txt.old`, `a.txt.old2`."""
    names = chain([path.name, f"{path.name}.old"], (f"{path.name}.old{n}" for n in count(2)))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


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
