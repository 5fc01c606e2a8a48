import os

import pytest

from gigavim.errors import SettingsError
from gigavim_pipelines.discovery import discover
from gigavim_pipelines.entries import LONGEST_ID, Entry, safe_id, shard


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def ids(*archives, **options):
    return [entry.id for entry in discover([str(archive) for archive in archives], **options)]


def test_folders_are_searched_through_and_through(tmp_path):
    make(
        tmp_path, "a.svs", "deep/down/b.NDPI", "c.ome.tif", "notes.txt", ".hidden/d.svs", ".e.svs",
        "thumbs/a.png", "a.labels.ome.tif", "f.mrxs", "f/Dat0.tif", "out/slides/a/g.svs",
    )  # fmt: skip
    assert ids(tmp_path, out=tmp_path / "out") == ["a", "c", "b", "f"]
    assert ids(tmp_path / "thumbs") == ["a"]
    assert ids(tmp_path, suffixes=["png", ".txt"]) == ["notes", "a"]


def test_folders_that_are_one_slide_are_not_entered(tmp_path):
    make(tmp_path, "dicom/1.dcm", "dicom/2.dcm", "image.zarr/zarr.json", "image.zarr/0/x.tif")
    make(tmp_path, "mixed/1.dcm", "mixed/2.svs")
    assert ids(tmp_path) == ["dicom", "image", "1", "2"]
    assert ids(tmp_path / "dicom") == ["dicom"]


def test_globs_slides_and_what_is_named_twice(tmp_path):
    make(tmp_path, "a.svs", "b.svs", "odd name.bin", "d/c.svs")
    assert ids(tmp_path / "*.svs", tmp_path / "a.svs") == ["a", "b"]
    assert ids(tmp_path / "**/*.svs") == ["a", "b", "c"]
    assert ids(tmp_path / "odd name.bin") == ["odd name"]
    assert ids(make(tmp_path, "[x].svs") / "[x].svs") == ["[x]"]


def test_slides_of_one_name_are_told_apart(tmp_path):
    make(
        tmp_path,
        "p1/s.svs",
        "p2/s.svs",
        "p2/t.svs",
        "q/p1/s.svs",
        "u.svs",
        "u.tif",
        "V.svs",
        "v.tif",
    )
    found = ids(tmp_path / "p1", tmp_path / "p2")
    assert found == ["p1__s", "p2__s", "t"]
    found = ids(tmp_path)
    assert len({name.casefold() for name in found}) == len(found) == 8
    assert {"u.svs", "u.tif"} <= {name.split("__")[-1] for name in found}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", "plain"), ("a:b*c", "a_b_c"), ("..", "_"), (".x", "_x"), ("", "_"), (" x ", "x"),
        ("ünï", "ünï"), (os.fsdecode(b"\xff"), "�"), ("a\nb", "a_b"),
    ],
)  # fmt: skip
def test_ids_can_name_folders(name, expected):
    assert safe_id(name) == expected
    assert safe_id(safe_id(name)) == safe_id(name)


def test_long_names_stay_different():
    names = [f"{'é' * 150}{number}" for number in range(3)]
    found = {safe_id(name) for name in names}
    assert len(found) == 3
    assert all(len(name.encode()) <= LONGEST_ID for name in found)


def test_shards_part_the_slides_whatever_their_order():
    entries = [Entry(name, f"/{name}.svs") for name in "gfedcba"]
    parts = [shard(entries, part, 3) for part in (1, 2, 3)]
    assert sorted(entry.id for part in parts for entry in part) == list("abcdefg")
    assert [len(part) for part in parts] == [3, 2, 2]
    assert shard(entries[::-1], 2, 3) == parts[1]


def test_what_is_not_there_is_named_with_what_is_near(tmp_path):
    make(tmp_path, "cohort/a.svs")
    with pytest.raises(SettingsError, match=r"did you mean .*cohort"):
        discover([str(tmp_path / "cohorts")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"no slides found.*--wsi-ext"):
        discover([str(tmp_path / "empty")])
    with pytest.raises(SettingsError, match="no slides found"):
        discover([str(tmp_path / "*.ndpi")])
