import csv

import pytest

from gigavim_pipelines.entries import Entry
from gigavim_pipelines.manifest import read_manifest
from gigavim_pipelines.tables import escaped, plain, write_csv


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-x",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "'=1",
        "''-1",
        "'",
        "it's",
        "",
        "plain",
        "1=1",
    ],
)
def test_no_text_is_a_formula_and_all_comes_back(text):
    assert plain(escaped(text)) == text
    assert not escaped(text).startswith(("=", "+", "-", "@", "\t", "\r"))


def test_numbers_stay_numbers(tmp_path):
    write_csv(tmp_path / "t.csv", ["id", "=x"], [{"id": "=cmd|'/c calc'!A1", "=x": -1.5}, {}])
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["id", "'=x"], ["'=cmd|'/c calc'!A1", "-1.5"], ["", ""]]


def test_a_list_of_failed_slides_is_the_manifest_that_it_was(run, faulty, make_slides, tmp_path):
    slides = make_slides(**{"-a": "unwell", "=b": "unwell", "'=c": "unwell"})
    rows = ["-a.svs,@x,=SUM(1)", "=b.svs,,-", "'=c.svs,,'"]
    (slides / "list.csv").write_text("\n".join(["slide,id,label", *rows]))
    given = read_manifest(slides / "list.csv")
    assert [entry.id for entry in given] == ["@x", "=b", "'=c"]
    command = ("batch", faulty, slides / "list.csv", "-o", "out", "--workers", 1, "--tries", 1)
    assert run(*command).code == 3
    for name in ("failed.csv", "index.csv"):
        with (tmp_path / "out" / name).open() as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    failed = read_manifest(tmp_path / "out/failed.csv")
    assert sorted(failed, key=lambda entry: entry.slide) == sorted(
        given, key=lambda entry: entry.slide
    )
    assert isinstance(failed[0], Entry)
