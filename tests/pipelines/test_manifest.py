import pyarrow
import pyarrow.parquet
import pytest

from gigavim.errors import SettingsError
from gigavim_pipelines.entries import Entry
from gigavim_pipelines.manifest import read_manifest


def write(tmp_path, text, name="list.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_all_columns_and_relative_paths(tmp_path):
    path = write(
        tmp_path,
        "slide,id,mpp,mask,label,age\n"
        "a.svs,first,0.25,masks/a.geojson,tumour,61\n"
        "/data/b.svs,,,,,\n"
        "s3://bucket/c.svs,,0.5,s3://bucket/c.png,,\n"
        "\n",
    )
    assert read_manifest(path) == [
        Entry("first", str(tmp_path / "a.svs"), 0.25, str(tmp_path / "masks/a.geojson"), "tumour"),
        Entry("b", "/data/b.svs"),
        Entry("c", "s3://bucket/c.svs", 0.5, "s3://bucket/c.png"),
    ]


@pytest.mark.parametrize("text", [
    "\ufeffSlide;MPP\r\na.svs;0.25\r\n", "slide\tmpp\na.svs\t0.25\n", 'wsi,mpp\n"a.svs",0.25\n',
    "image_path,spacing_at_level_0\na.svs,0.25\n",
])  # fmt: skip
def test_what_spreadsheets_and_other_tools_write(tmp_path, text):
    assert read_manifest(write(tmp_path, text)) == [Entry("a", str(tmp_path / "a.svs"), 0.25)]


def test_parquet(tmp_path):
    path = tmp_path / "list.parquet"
    columns = {"slide": ["a.svs", "b.svs"], "mpp": [0.25, None], "label": [1, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read_manifest(path) == [
        Entry("a", str(tmp_path / "a.svs"), 0.25, None, "1"),
        Entry("b", str(tmp_path / "b.svs")),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no slides"]),
        ("slide\n", ["no slides"]),
        ("path\na.svs\n", ["no column `slide`", "path"]),
        ("slide,mmp\na.svs,0.25\n", ["mmp", "`mpp`"]),
        ("slide,mpp\na.svs,0.25\nb.svs,fine\n", ["row 3", "fine"]),
        ("slide,mpp\na.svs,-1\n", ["row 2", "-1"]),
        ("slide,mpp\na.svs,nan\n", ["row 2", "nan"]),
        ("slide,id\n,x\n", ["row 2", "missing"]),
        ("slide,id\na.svs,../x\n", ["row 2", "../x"]),
        ("slide,id\na/s.svs,x\nb/s.svs,X\n", ["row 3", "row 2", "column `id`"]),
        ("slide,mpp\na.svs,1e-9\n", ["row 2", "1e-9", "0.25"]),
    ],
)
def test_what_is_wrong_is_named_with_its_row(tmp_path, text, words):
    with pytest.raises(SettingsError) as error:
        read_manifest(write(tmp_path, text))
    assert all(word in str(error.value) for word in ["list.csv", *words]), error.value


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "latin.csv").write_bytes(b"slide\n\xe9.svs\n")
    with pytest.raises(SettingsError, match="UTF-8"):
        read_manifest(tmp_path / "latin.csv")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(SettingsError, match="parquet"):
        read_manifest(tmp_path / "bad.parquet")
