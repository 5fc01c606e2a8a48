"""Index and report, from a real run."""

import csv
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pyarrow.parquet
import pytest
import tifffile

import gigavim
from gigavim_pipelines import report


@pytest.fixture
def archive(run, make_tissue, tmp_path):
    """Two slides with stores, one of them with an awkward name, and one that failed."""
    (tmp_path / "slides").mkdir()
    names = ["plain.tif", "<script>alert(1)<'&.tif"]
    for number, name in enumerate(names):
        tifffile.imwrite(
            tmp_path / "slides" / name, make_tissue(number), photometric="rgb", tile=(64, 64),
            resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
    (tmp_path / "slides/bad.tif").write_text("words")
    rows = [["slide", "label"], *([name, "<b>tumour</b>"] for name in [*names, "bad.tif"])]
    with (tmp_path / "slides/list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    command = ("batch", "embed", "slides/list.csv", "-o", "out", "--workers", 1)
    result = run(*command, "--set", "compute.threads=1", "--model", "histo-nuclei-nano")
    assert result.code == 3, result.err
    return tmp_path / "out"


class Page(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]


def test_index_and_report_tell_of_every_slide(archive, run):
    rows = {
        row["id"]: row for row in pyarrow.parquet.read_table(archive / "index.parquet").to_pylist()
    }
    with (archive / "index.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == list(rows)
    plain = rows["plain"]
    assert (plain["state"], plain["width_px"], plain["height_px"]) == ("done", 420, 300)
    shares = [value for key, value in plain.items() if key.startswith("fraction ")]
    assert sum(shares) == pytest.approx(1)
    assert plain["area_mm2 tissue"] == pytest.approx(
        plain["fraction tissue"] * 0.42 * 0.3 * 0.25, 1e-6
    )
    store = gigavim.open_embeddings(archive / plain["store"])
    assert plain["embedding"] == pytest.approx(store.slide_embedding.tolist())
    assert (rows["bad"]["state"], rows["bad"]["embedding"]) == ("failed", None)
    assert rows["bad"]["reason"]

    text = (archive / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "b" in page.tags
    assert "<b>tumour" not in text
    assert "gigavim batch embed out/failed.csv -o out" in text
    assert len(re.findall("data:image/jpeg", text)) == 2
    # Nothing is fetched, and what is linked to is there.
    links = [address for address in page.addresses if not address.startswith("data:")]
    assert len(links) >= 5
    assert all((archive / unquote(link)).exists() for link in links), links


def test_a_report_can_be_asked_for_and_large_ones_have_their_pictures_beside(
    archive, run, monkeypatch
):
    names = ("report.html", "index.csv", "index.parquet")
    for name in names:
        (archive / name).unlink()
    monkeypatch.setattr(report, "MOST_INLINE", 1)
    assert run("status", "out", "--report").code == 3
    assert all((archive / name).exists() for name in names)
    text = (archive / "report.html").read_text()
    assert "data:image" not in text
    assert 'src="slides/plain/plain.thumb.jpg"' in text


def test_slides_that_were_removed_are_shown_as_such_and_count_no_more(archive, run):
    assert "Areas of the classes" in (archive / "report.html").read_text()
    slides = archive.parent / "slides"
    for path in slides.glob("[!b]*.tif"):
        path.unlink()
    (slides / "list.csv").write_text("slide\nbad.tif\n")
    result = run(
        "batch", "embed", "slides/list.csv", "-o", "out", "--workers", 1,
        "--model", "histo-nuclei-nano",
    )  # fmt: skip
    assert result.code == 3
    assert "2 no longer in the archive" in result.err
    text = (archive / "report.html").read_text()
    assert text.count("<td>removed") == 2
    assert "<b>2</b>removed" in text
    assert "Areas of the classes" not in text
    assert len(re.findall("data:image/jpeg", text)) == 2
