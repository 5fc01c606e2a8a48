"""Ids stay as they are, whatever comes to an archive later."""

import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.errors import SettingsError
from gigavim_pipelines.discovery import discover
from gigavim_pipelines.entries import Entry, safe_id
from gigavim_pipelines.naming import Known, name_slides


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def ids(*slides, known=None):
    """Ids by path of slides that are called by their file's name."""
    entries = [
        Entry(safe_id(slide.rsplit("/", 1)[-1].rsplit(".", 1)[0]), slide) for slide in slides
    ]
    return {entry.slide: entry.id for entry in name_slides(entries, known)}


def remembered(names):
    """An output folder that knows slides, without results of them."""
    return Known(
        by_slide=dict(names), slides={name.casefold(): slide for slide, name in names.items()}
    )


def test_slides_of_one_name_are_told_apart_by_folder_then_ending():
    assert ids("/d/a/1.svs", "/d/b/1.svs", "/d/2.svs") == {
        "/d/a/1.svs": "a__1", "/d/b/1.svs": "b__1", "/d/2.svs": "2",
    }  # fmt: skip
    assert ids("/d/1.svs", "/d/1.tif") == {"/d/1.svs": "1.svs", "/d/1.tif": "1.tif"}
    assert ids("/d/V.svs", "/d/v.svs")["/d/V.svs"].startswith("V-")
    found = ids("/a/a/x.svs", "/a/b/x.svs", "/b/a/x.svs", "/b/b/x.svs", "/c/a__a__x.svs")
    assert found["/c/a__a__x.svs"] == "a__a__x"
    assert len({name.casefold() for name in found.values()}) == 5
    # The same in whatever order they come.
    assert ids("/c/a__a__x.svs", "/b/b/x.svs", "/b/a/x.svs", "/a/b/x.svs", "/a/a/x.svs") == found


def test_what_comes_later_takes_no_id_away():
    first = ids("/d/a/1.svs")
    assert first == {"/d/a/1.svs": "1"}
    later = ids("/d/b/1.svs", "/d/a/1.svs", known=remembered(first))
    assert later == {"/d/a/1.svs": "1", "/d/b/1.svs": "b__1"}
    assert ids("/d/b/1.svs", known=remembered(later)) == {"/d/b/1.svs": "b__1"}


paths = st.lists(
    st.builds(
        lambda parts, name, ending: "/".join(["", *parts, f"{name}.{ending}"]),
        st.lists(st.sampled_from(["a", "b", "a__b", "A"]), max_size=3),
        st.sampled_from(["x", "X", "a__x", "b__x"]),
        st.sampled_from(["svs", "tif"]),
    ),
    unique=True,
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(paths, st.data())
def test_ids_differ_and_those_that_are_known_stay(slides, data):
    some = data.draw(st.lists(st.sampled_from(slides), unique=True))
    before = ids(*some) if some else {}
    after = ids(*slides, known=remembered(before))
    assert before.items() <= after.items()
    assert len({name.casefold() for name in after.values()}) == len(slides)
    assert all(safe_id(name) == name for name in after.values())
    # Shards that start while others have noted some of their slides agree with them.
    whole = ids(*slides)
    noted = data.draw(st.lists(st.sampled_from(slides), unique=True))
    assert ids(*slides, known=remembered({slide: whole[slide] for slide in noted})) == whole


def test_manifests_have_the_last_word():
    entries = [Entry("1", "/d/a/1.svs"), Entry("1", "/d/b/1.svs", given=True)]
    assert [entry.id for entry in name_slides(entries)] == ["a__1", "1"]
    known = remembered({"/d/a/1.svs": "1"})
    assert [entry.id for entry in name_slides(entries, known)] == ["a__1", "1"]
    with pytest.raises(SettingsError, match="column `id`"):
        name_slides([Entry("x", "/a.svs", given=True), Entry("X", "/b.svs", given=True)])


def test_rows_without_ids_are_named_as_files_are(tmp_path):
    make(tmp_path, "a/1.svs", "b/1.svs")
    (tmp_path / "list.csv").write_text("slide,id\na/1.svs,\nb/1.svs,\n")
    found = discover([str(tmp_path / "list.csv")])
    assert [entry.id for entry in found] == ["a__1", "b__1"]


def test_a_moved_archive_keeps_its_ids_and_another_one_gets_its_own(run, faulty, tmp_path):
    make(tmp_path, "one/1.svs", "one/2.svs")
    for path in (tmp_path / "one").iterdir():
        path.write_text(f"fine {path.name}")
    assert run("batch", faulty, "one", "-o", "out", "--workers", 1).code == 0
    (tmp_path / "one").rename(tmp_path / "moved")
    result = run("batch", faulty, "moved", "-o", "out", "--workers", 1)
    assert "0 to do, 2 done before" in result.err
    assert "no longer" not in result.err
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    (tmp_path / "other/1.svs").write_text("fine, but another slide")
    (tmp_path / "other/2.svs").unlink()
    result = run("batch", faulty, "other", "-o", "out", "--workers", 1)
    assert "1 slide: 1 to do" in result.err
    folders = sorted(path.name for path in (tmp_path / "out/slides").iterdir())
    assert folders == ["1", "2", "other__1"]
    assert (tmp_path / "out/slides/1/1.txt").read_text().startswith("fine")


def test_names_that_are_no_utf8_stay_apart_and_stay(run, faulty, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in (b"a\xe8.svs", b"a\xe9.svs"):
        (folder / os.fsdecode(name)).write_text(f"fine {name[1]}")
    command = ("batch", faulty, "slides", "-o", "out", "--workers", 1)
    assert "2 slides done" in run(*command).err
    folders = sorted(path.name for path in (tmp_path / "out/slides").iterdir())
    assert len(folders) == 2
    assert "0 to do, 2 done before" in run(*command).err
    make(tmp_path, "slides/deep/x.svs")
    assert "1 to do, 2 done before" in run(*command).err
    assert folders == sorted(path.name for path in (tmp_path / "out/slides").glob("a*"))
