"""A store's finished parts are hashed and brought to the disk while the rest is made."""

from pathlib import Path

from gigavim.outputs.atomic import explained, sync, sync_tree
from gigavim.store.checksums import part_checksums, write_checksums
from gigavim.store.crew import Crew
from gigavim.store.layout import CHECKSUMS


class Seal:
    """Checksums of a store, and the promise that it is on the disk.

    Args:
        folder: the store.
        crew: hashes and syncs parts; it is through before `finish` is called.
    """

    def __init__(self, folder: Path, crew: Crew) -> None:
        self._folder, self._crew = folder, crew
        self._synced: set[Path] = set()
        self._digests: dict[str, str] = {}

    def part(self, name: str) -> None:
        """Have the crew seal a folder of the store to which nothing will be written any more."""
        self._crew.later(self._sync, self._folder / name)
        self._crew.later(self._hash, name)

    def finish(self) -> None:
        """Seal what is left of the finished store; all of it is on the disk when this returns.

        Raises:
            OutputError: the disk refuses.
        """
        with explained(self._folder):
            with Crew() as crew:
                crew.do(sync_tree, self._folder, but=self._synced)
                crew.do(write_checksums, self._folder, self._digests)
            sync(self._folder / CHECKSUMS)
            sync(self._folder)

    def _sync(self, folder: Path) -> None:
        with explained(folder):
            sync_tree(folder)
        self._synced.add(folder)

    def _hash(self, part: str) -> None:
        self._digests |= part_checksums(self._folder, part)
