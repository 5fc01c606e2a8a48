"""What slides are called: ids that stay as they are, whatever comes to an archive later.

1. An id that a manifest gives is kept.
2. A slide that the output folder knows keeps the id that it has there.
3. A new slide is called by its file's name without ending. Where several slides of the archive are
   so called, or the output folder has other results of that name, as many names of parent folders
   come in front as tell them apart: `a/1.svs` and `b/1.svs` become `a__1` and `b__1`; then the
   ending: `1.svs` and `1.tif`; at last eight digits of the SHA-256 of the slide's path.

The third rule looks at all slides of the archive, known or not, so that the shards of a run, of
which one may have noted some already when the next begins, agree.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain, count
from pathlib import Path, PurePosixPath

from gigavim.errors import SettingsError
from gigavim.names import as_text
from gigavim_pipelines import remote
from gigavim_pipelines.entries import Entry, is_remote, safe_id
from gigavim_pipelines.fingerprints import same_input
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.ledger import read_ledgers


@dataclass(frozen=True, slots=True)
class Known:
    """The ids of an output folder."""

    archive: Archive | None = None
    by_slide: dict[str, str] = field(default_factory=dict)
    slides: dict[str, str] = field(default_factory=dict)
    """The slide of each id; letter case is no difference, as on many disks."""

    def holds(self, name: str, entry: Entry) -> bool:
        """Whether an id is that of another slide than `entry`, one that still counts.

        A slide that was moved, with its results here, is the same slide.
        """
        slide = self.slides.get(name.casefold())
        if slide is None or slide == as_text(entry.slide) or self.archive is None:
            return False
        record = self.archive.record(name)
        if record is None:
            return slide_exists(slide)
        return not same_input(entry, record.stamp, record.input, unreadable=False)


def known_names(out: Path) -> Known:
    """The ids that runs into an output folder gave, by its ledgers and records."""
    archive, rows = Archive(out), read_ledgers(out)[0]
    named = [(str(row["slide"]), str(row["id"]), row["state"] == "done") for row in rows]
    unknown = archive.ids() - {name for _, name, _ in named}
    found = ((archive.record(name), name) for name in sorted(unknown))
    named += [(record.slide, name, True) for record, name in found if record is not None]
    # Of several ids of a slide the one with results counts.
    named.sort(key=lambda one: (not one[2], one[1]))
    known = Known(archive)
    for slide, name, _ in named:
        known.by_slide.setdefault(slide, name)
        known.slides.setdefault(name.casefold(), slide)
    return known


def name_slides(entries: Iterable[Entry], known: Known | None = None) -> list[Entry]:
    """Drop slides that are listed twice, and give each of the others an id of its own.

    Args:
        entries: with the ids that manifests give, else those made of the file's name.
        known: what the output folder calls its slides.

    Raises:
        SettingsError: manifests give one id to two slides.
    """
    known = known or Known()
    unique: dict[str, Entry] = {}
    for entry in entries:
        if entry.given or not (entry.slide in unique and unique[entry.slide].given):
            unique[entry.slide] = entry
    listed = list(unique.values())
    taken: dict[str, Entry] = {}
    for entry in listed:
        if entry.given and taken.setdefault(entry.id.casefold(), entry) is not entry:
            raise SettingsError(
                f"{entry.slide}: the id {entry.id!r} is that of {taken[entry.id.casefold()].slide}"
                " too; give each slide its own in the manifest's column `id`."
            )
    proposed = _proposed(listed, set(taken))
    names = {entry.slide: entry.id for entry in listed if entry.given}
    for entry in listed:
        # Names that are no UTF-8 are not known by what a ledger can hold of them.
        name = known.by_slide.get(entry.slide)
        if name is not None and entry.slide not in names and name.casefold() not in taken:
            names[entry.slide] = name
            taken[name.casefold()] = entry
    new = sorted((entry for entry in listed if entry.slide not in names), key=lambda one: one.slide)

    def keep(entry: Entry, candidates: Iterable[str]) -> None:
        for name in candidates:
            if name.casefold() not in taken and not known.holds(name, entry):
                names[entry.slide] = name
                taken[name.casefold()] = entry
                return

    for entry in new:
        keep(entry, [proposed[entry.slide]])
    for entry in new:
        if entry.slide not in names:
            keep(entry, chain((one[0] for one in _candidates([entry])), _numbered(entry)))
    return [replace(entry, id=names[entry.slide]) for entry in listed]


def slide_exists(slide: str) -> bool:
    """Whether there is such a slide; where that cannot be found out, yes."""
    if "\ufffd" in slide:  # its name is no UTF-8, and what is known of it only text
        return True
    return remote.exists(slide) if is_remote(slide) else os.path.lexists(slide)


def _proposed(entries: Sequence[Entry], taken: set[str]) -> dict[str, str]:
    """Different ids for the slides that are given none, by slide; `taken` ones are left out."""
    groups: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.slide):
        if not entry.given:
            groups[entry.id.casefold()].append(entry)
    found: dict[str, str] = {}
    # Those that have their name alone come first, and keep it.
    for group in sorted(groups.values(), key=len):
        numbered = zip(*map(_numbered, group), strict=True)
        for names in chain(_candidates(group), map(list, numbered)):
            folded = {name.casefold() for name in names}
            if len(folded) == len(names) and not folded & taken:
                break
        found |= {entry.slide: name for entry, name in zip(group, names)}
        taken |= folded
    return found


def _numbered(entry: Entry) -> Iterator[str]:
    """Ids with digits of the path's checksum: there is always another one."""
    for salt in count():
        name = os.fsencode(entry.slide) + (str(salt).encode() if salt else b"")
        yield safe_id(f"{entry.id[:150]}-{sha256(name).hexdigest()[:8]}")


def _candidates(group: Sequence[Entry]) -> Iterator[list[str]]:
    """Ids for slides of one name, longer and longer."""
    paths = [PurePosixPath(_parts_of(entry.slide)) for entry in group]
    parents = [path.parts[:-1] for path in paths]
    for stems in ([entry.id for entry in group], [path.name for path in paths]):
        for depth in range(1 + max(map(len, parents))):
            yield [
                safe_id("__".join([*above[max(0, len(above) - depth) :], stem]))
                for above, stem in zip(parents, stems)
            ]


def _parts_of(slide: str) -> str:
    return slide.split("://", 1)[-1].replace("\\", "/").lstrip("/")
