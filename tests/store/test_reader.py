"""A store against the model run whole, and its views against each other."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr

import gigavim
from gigavim.config import Settings
from gigavim.errors import OutputError, StoreError
from gigavim.model.checkpoint import save_model
from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.sequence import class_slots
from gigavim.model.vim import Vim
from gigavim.slides import open_slide
from gigavim.store.verify import verify_store


def reference(path, model_folder):
    """Every token of a slide by the model itself: final-normed, (rows, cols, D)."""
    model, card = gigavim.load_model(model_folder)
    config = card.config
    with open_slide(path) as slide:
        level = slide.levels[0]
        side = config.patch_px * card.scan_order.block
        own = slide.read_level(0, 0, 0, level.width, level.height)
    more = [(0, -n % side) for n in own.shape[:2]]
    pixels = np.pad(own, (*more, (0, 0)), mode="symmetric")
    height, width = pixels.shape[:2]
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (card.mean, card.std))
    image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
    rows, cols = height // config.patch_px, width // config.patch_px
    with torch.inference_mode():
        sequence = model.encoder.encode(
            model.encoder.tokens(image[None].float(), order=card.scan_order)
        )[0]
        logits = model.head.decode(sequence)
    return sequence.numpy(), logits.softmax(1).mean((2, 3)).numpy(), (rows, cols)


@pytest.fixture
def embedded(make_slide, tiny_model, tmp_path):
    def embed(path=None, **sections):
        settings = Settings().with_flags(
            model={"name": str(tiny_model)},
            tokens={"tissue": "none"},
            compute={"precision": "fp32", "threads": 1},
            embedding={"dtype": "float32", "probabilities": True, **sections.pop("embedding", {})},
            output={"directory": str(tmp_path / "out"), **sections.pop("output", {})},
        )
        return gigavim.embed(path or make_slide(size=(301, 423)), settings=settings)

    return embed


def test_embeddings_are_those_of_the_model(embedded, make_slide, tiny_model):
    path = make_slide(size=(301, 423))
    store = embedded(path).open()
    expected, shares, (rows, cols) = reference(path, tiny_model)
    assert store.index.shape == (rows, cols)
    np.testing.assert_allclose(store.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(store.probabilities[:], shares, atol=2e-3)
    np.testing.assert_allclose(store.mean, expected.mean(0), rtol=1e-4, atol=1e-5)
    assert store.class_tokens is None
    assert np.array_equal(store.slide_embedding, store.mean)


@pytest.mark.parametrize("kind", ["head", "middle", "double"])
def test_class_tokens_are_told_from_patches(kind, make_slide, make_card, tmp_path):
    torch.manual_seed(3)
    config = VimConfig(
        d_model=32, depth=2, patch_px=8, stride_px=8, class_token=kind, pooling="class",
        position="sincos", token_um=4.0,
    )  # fmt: skip
    save_model(tmp_path / "model", SegmentationModel(Vim(config), 3), make_card(config))
    path = make_slide(size=(160, 224))
    settings = Settings().with_flags(
        model={"name": str(tmp_path / "model")}, tokens={"tissue": "none"},
        compute={"precision": "fp32"}, embedding={"dtype": "float32"},
        output={"directory": str(tmp_path / "out")},
    )  # fmt: skip
    store = gigavim.embed(path, settings=settings).open()
    sequence, _, (rows, cols) = reference(path, tmp_path / "model")
    slots = class_slots(rows * cols, kind)
    patches = np.delete(sequence, slots, 0)
    assert len(store) == rows * cols
    np.testing.assert_allclose(store.numpy(), patches, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(store.class_tokens, sequence[list(slots)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(store.slide_embedding, store.class_tokens.mean(0))
    np.testing.assert_allclose(store.mean, patches.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        store.grid(1).compute()[1, 2], store.numpy()[store.index[1, 2]], rtol=1e-6
    )


def test_positions_index_and_windows_agree(embedded):
    store = embedded().open()
    everything = store.numpy()
    index = store.index[:]
    rows, cols = np.nonzero(index >= 0)
    assert np.array_equal(np.sort(index[rows, cols]), np.arange(len(store)))
    assert np.array_equal(store.row_col[:][index[rows, cols]], np.stack([rows, cols], 1))
    patch = store.info.grid.patch_px * store.frame.scale_x
    assert np.allclose(store.xy_level0[:], store.row_col[:][:, ::-1] * patch)
    window = store.window(40, 17, 100, 64)
    x, y = store.xy_level0[:].T
    touching = (x < 140) & (x + patch > 40) & (y < 81) & (y + patch > 17)
    assert np.array_equal(window.places, np.flatnonzero(touching))
    assert np.array_equal(window.embeddings, everything[touching])
    assert np.array_equal(window.xy_level0, store.xy_level0[:][touching])
    assert len(store.window(1e6, 0, 10, 10).places) == 0
    assert len(store.window(-50, -50, 50, 50).places) == 0


def test_at_level0_finds_the_patch_under_a_point(embedded):
    store = embedded().open()
    row, col = 5, 7
    expected = store.numpy()[store.index[row, col]]
    for x, y in ((56, 40), (63.9, 47.9), (60, 44)):
        assert np.array_equal(store.at_level0(x, y), expected)
    assert np.isnan(store.at_level0(-1, 4)).all()
    assert np.isnan(store.at_level0(423.5, 4)).all()
    many = store.at_level0(np.array([60, -3, 60]), np.array([44, 4, 44]))
    assert many.shape == (3, store.info.width)
    assert np.array_equal(many[[0, 2]], [expected, expected])


def test_grids_are_means_of_their_cells(embedded):
    store = embedded().open()
    full = store.grid(1).compute()
    index = store.index[:]
    assert np.array_equal(full[3, 4], store.numpy()[index[3, 4]])
    assert store.info.pools
    for pool in store.info.pools:
        level, counts = store.grid(pool).compute(), store.pooled_counts(pool)
        assert level.shape[:2] == tuple(-(-side // pool) for side in index.shape)
        for y, x in ((0, 0), (level.shape[0] - 1, level.shape[1] - 1)):
            cells = full[y * pool : (y + 1) * pool, x * pool : (x + 1) * pool]
            cells = cells.reshape(-1, cells.shape[-1])
            there = ~np.isnan(cells).any(1)
            assert counts[y, x] == there.sum()
            np.testing.assert_allclose(level[y, x], cells[there].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(StoreError, match="choose from 1, 2"):
        store.grid(3)


def test_tissue_only_where_it_is(embedded, make_slide, tiny_model, tmp_path):
    settings = Settings().with_flags(
        model={"name": str(tiny_model)}, output={"directory": str(tmp_path / "auto")}
    )
    store = gigavim.embed(make_slide(size=(900, 700)), settings=settings).open()
    assert 0 < len(store) < store.index.size
    assert store.embeddings.dtype == np.float16
    assert store.probabilities is None
    level = store.grid(2).compute()
    assert np.array_equal(np.isnan(level).all(2), store.pooled_counts(2) == 0)
    assert np.array_equal(store.labels.read_coverage() == 1, store.index[:] >= 0)
    assert store.tissue.any()
    assert not store.tissue.all()
    assert np.isnan(store.at_level0(3, 3)).all()
    assert len(store.window(0, 0, 20, 20).embeddings) == 0


def test_views_of_other_libraries(embedded):
    store = embedded().open()
    assert store.dask().shape == (len(store), store.info.width)
    assert np.array_equal(store.dask().compute(), store.numpy())
    pytest.importorskip("xarray")
    data = store.to_xarray()
    assert np.array_equal(data["embeddings"].isel(token=9).values, store.numpy()[9])
    assert data["x_level0"].values[9] == store.xy_level0[9, 0]
    assert list(data["class"].values) == ["background", "tissue", "nuclei"]


@pytest.mark.parametrize("pool", [1, 2])
def test_anndata(embedded, pool):
    pytest.importorskip("anndata")
    store = embedded().open()
    table = store.to_anndata(pool=pool)
    assert table.X.dtype == np.float32
    side = (pool - 1) * 8 + 8
    place = np.argmin(np.abs(table.obsm["spatial"] - (3 * pool * 8 + side / 2)).sum(1))
    assert np.array_equal(table.obsm["spatial"][place], [3 * pool * 8 + side / 2] * 2)
    np.testing.assert_array_equal(table.X[place], store.grid(pool)[3, 3].compute())
    assert set(table.obs["label"].unique()) <= {"background", "tissue", "nuclei"}
    x, y = table.obsm["spatial"][place].astype(int)
    value = int(store.labels.read(y, y + 1, x, x + 1)[0, 0])
    assert table.obs["label"].iloc[place] == store.classes[value].name
    assert table.uns["spatial"]["slide.tif"]["scalefactors"]["spot_diameter_fullres"] == side


def test_a_store_pickles_and_reads_from_a_url(embedded):
    result = embedded()
    store = result.open()
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(
        again.window(0, 0, 50, 50).embeddings, store.window(0, 0, 50, 50).embeddings
    )
    remote = gigavim.open_embeddings(result.outputs["store"].as_uri())
    assert np.array_equal(remote.at_level0(60, 44), store.at_level0(60, 44))


def test_a_rerun_is_the_same_store(embedded, make_slide, tmp_path):
    path = make_slide(size=(301, 423))
    first = embedded(path, output={"directory": str(tmp_path / "a")}).outputs["store"]
    second = embedded(path, output={"directory": str(tmp_path / "b")}).outputs["store"]
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    differing = {str(n) for n in names if (first / n).read_bytes() != (second / n).read_bytes()}
    assert differing <= {"zarr.json", "checksums.sha256"}


def test_what_is_no_store_says_so(tmp_path, embedded):
    with pytest.raises(StoreError, match="nowhere"):
        gigavim.open_embeddings(tmp_path / "nowhere")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="no embedding store"):
        gigavim.open_embeddings(tmp_path / "other.zarr")
    folder = embedded().outputs["store"]
    text = (folder / "zarr.json").read_text()
    for key, value, words in (
        ("version", [9, 0], "newer gigavim"),
        ("tokens", "many", "tokens"),
        ("grid", {"rows": -1}, "grid.rows"),
    ):
        description = json.loads(text)
        description["attributes"]["gigavim_store"][key] = value
        (folder / "zarr.json").write_text(json.dumps(description))
        with pytest.raises(StoreError, match=words):
            gigavim.open_embeddings(folder)
    (folder / "zarr.json").write_text(text)
    shutil.rmtree(folder / "tokens")
    with pytest.raises(StoreError, match="gigavim verify"):
        gigavim.open_embeddings(folder).numpy()


def a_shard(folder, part):
    return next(p for p in (folder / part).rglob("*") if p.is_file() and p.name != "zarr.json")


@pytest.mark.parametrize("part", ["tokens/embeddings", "tokens/xy_level0", "map/labels", "index"])
@pytest.mark.parametrize("is_url", [False, True])
def test_a_missing_shard_is_not_read_as_zeros(embedded, part, is_url):
    folder = embedded().outputs["store"]
    shard = a_shard(folder, part)
    shard.unlink()
    location = f"file://{folder}" if is_url else folder
    with pytest.raises(StoreError, match=f"1 of its files are missing.*{part}"):
        gigavim.open_embeddings(location)


def test_storage_that_lists_nothing_is_believed(embedded, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    folder = embedded().outputs["store"]
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "find", lambda *_: [])
    assert len(gigavim.open_embeddings(f"file://{folder}"))


def test_a_shard_that_cannot_be_decoded_is_damage(embedded):
    folder = embedded().outputs["store"]
    for part in ("tokens/embeddings", "index", "slide/mean"):
        shard = a_shard(folder, part)
        shard.write_bytes(shard.read_bytes()[:8])
    store = gigavim.open_embeddings(folder)
    for read in (store.numpy, lambda: store.window(0, 0, 99, 99), lambda: store.slide_embedding):
        with pytest.raises(StoreError, match="gigavim verify"):
            read()
    assert np.isnan(store.at_level0(np.nan, 1.0)).all()


def test_a_store_is_replaced_only_when_told_and_other_folders_never(embedded, tmp_path):
    folder = embedded().outputs["store"]
    before = (folder / "checksums.sha256").read_bytes()
    with pytest.raises(OutputError, match="--overwrite"):
        embedded()
    assert (folder / "checksums.sha256").read_bytes() == before
    embedded(output={"overwrite": True})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]
    precious = tmp_path / "mine" / folder.name
    precious.mkdir(parents=True)
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is a folder"):
        embedded(output={"overwrite": True, "directory": str(precious.parent)})
    assert (precious / "thesis.txt").exists()


def test_a_failing_run_leaves_no_store(embedded, tmp_path, monkeypatch):
    import gigavim.store.build as build

    def fail(*arguments):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(build, "write_pooled", fail)
    with pytest.raises(OutputError, match="no space left"):
        embedded()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [(700, 90), (513, 300), (256, 64)])
def test_everything_is_on_the_disk_and_hashed_before_it_has_its_name(
    embedded, make_slide, monkeypatch, size
):
    synced, named = {}, []
    fsync, replace = os.fsync, Path.replace

    def syncing(handle):
        fsync(handle)
        status = os.fstat(handle)
        synced[status.st_ino] = status.st_mtime_ns

    def replacing(path, target):
        if path.name.startswith(".partial"):
            named.append({item: item.stat() for item in (path, *path.rglob("*"))})
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    result = embedded(make_slide(size=size))
    assert len(named) == 1
    for path, status in named[0].items():
        assert synced[status.st_ino] == status.st_mtime_ns, path
    assert verify_store(result.outputs["store"]).problems == []


def test_numbers_beyond_float16_are_refused(make_slide, make_card, tmp_path):
    config = VimConfig(d_model=32, depth=2, patch_px=8, stride_px=8, class_token="none",
                       pooling="mean", position="sincos", token_um=4.0)  # fmt: skip
    model = SegmentationModel(Vim(config), 3)
    torch.nn.init.constant_(model.encoder.norm_f.weight, 1e5)
    save_model(tmp_path / "large", model, make_card(config))
    path = make_slide(size=(160, 224))
    settings = Settings().with_flags(
        model={"name": str(tmp_path / "large")}, tokens={"tissue": "none"},
        compute={"precision": "fp32"}, output={"directory": str(tmp_path / "out")},
    )  # fmt: skip
    with pytest.raises(OutputError, match="--embedding-dtype float32"):
        gigavim.embed(path, settings=settings)
    assert not list((tmp_path / "out").glob("*"))
    settings = settings.with_flags(embedding={"dtype": "float32"})
    assert np.abs(gigavim.embed(path, settings=settings).open().numpy()).max() > 65504


def test_the_map_is_that_of_segment(embedded, make_slide, tiny_model, tmp_path):
    path = make_slide(size=(301, 423))
    result = embedded(path)
    settings = Settings().with_flags(
        model={"name": str(tiny_model)},
        tokens={"tissue": "none"},
        compute={"precision": "fp32", "threads": 1},
        output={"directory": str(tmp_path / "maps")},
    )
    maps = gigavim.segment(path, settings=settings)
    labels = tifffile.imread(maps.outputs["ome-tiff"])
    assert np.array_equal(result.open().labels.read(0, 301, 0, 423), labels)
    assert result.summary["classes"] == maps.summary["classes"]
