"""A store's parts are hashed and brought to the disk as soon as they are finished.

Files are read for their checksums while they are still in memory, and while more is made.
"""

from pathlib import Path

from gigavim.outputs.atomic import explained, sync, sync_tree
from gigavim.store.checksums import file_checksum, write_checksums
from gigavim.store.crew import Crew
from gigavim.store.layout import CHECKSUMS


class Seal:
    """Checksums of a store, and the promise that it is on the disk.

    Args:
        folder: the store.
        keep: its content in memory, for those who read it next.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self._folder, self._keep = folder, keep
        self._digests: dict[str, str] = {}

    def file(self, path: Path) -> None:
        """Seal a file of the store, if it is there; nothing will be written to it any more.

        Raises:
            OutputError: the disk refuses.
        """
        if path.exists():
            with explained(self._folder):
                digest = file_checksum(path)
                sync(path, drop=not self._keep)
            self._digests[path.relative_to(self._folder).as_posix()] = digest

    def folder(self, name: str) -> None:
        """Seal all files of a folder of the store; nothing will be written there any more."""
        for path in (self._folder / name).rglob("*"):
            if path.is_file() and path.relative_to(self._folder).as_posix() not in self._digests:
                self.file(path)

    def finish(self) -> None:
        """Seal what is left of the finished store; all of it is on the disk when this returns.

        Raises:
            OutputError: the disk refuses.
        """
        with explained(self._folder):
            with Crew() as crew:
                crew.do(
                    sync_tree, self._folder, but={self._folder / name for name in self._digests}
                )
                crew.do(write_checksums, self._folder, self._digests)
            sync(self._folder / CHECKSUMS)
            sync(self._folder)
