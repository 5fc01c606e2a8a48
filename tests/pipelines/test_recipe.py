import numpy as np
import pytest
import rasterio
import tifffile

from gigavim.errors import GigavimError, SettingsError
from gigavim_pipelines.recipe import TASKS, list_recipes, load_recipe, with_overrides


def test_shipped_recipes_are_of_known_tasks_and_say_what_they_do():
    recipes = list_recipes()
    assert {"segment", "qc", "aerial"} <= set(recipes)
    for recipe in recipes.values():
        assert recipe.recipe.task in TASKS
        assert recipe.recipe.description


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tokens]\ntisue = 'none'\n", ["tokens.tisue", "tokens.tissue"]),
        ("[recipe]\ntask = 'segmet'\n", ["segmet", "segment", "module:function"]),
        ("[recipe]\ntask = 'no.such:thing'\n", ["no.such:thing", "PYTHONPATH"]),
        ("[batch]\ntimout = '1h'\n", ["batch.timout", "batch.timeout"]),
        ("[batch]\ntries = 0\n", ["batch.tries"]),
        ("[batch]\ntimeout = '5parsecs'\n", ["batch.timeout", "5parsecs", "90s"]),
        ("[batch]\nretry_wait = '-1s'\n", ["batch.retry_wait"]),
        ("[batch]\nworker_memory = 'much'\n", ["batch.worker_memory", "1.5GB"]),
        ("[compute]\nmax_memory = 'much'\n", ["compute.max_memory", "1.5GB"]),
        ("[tokens]\ntissue = 'nowhere.png'\n", ["tokens.tissue", "nowhere.png"]),
        ("[output]\ndirectory = 'x'\n", ["output.directory", "-o"]),
        ("[recipe\n", ["not valid TOML"]),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(tmp_path, text, words):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        load_recipe(str(path))
    assert all(word in str(error.value) for word in words)
    assert "own.toml" in str(error.value)


def segment(*overrides):
    return with_overrides(load_recipe("segment"), overrides)


def test_the_fingerprint_changes_with_what_changes_results_only(tmp_path):
    plain = load_recipe("segment").fingerprint()
    assert segment("compute.threads=1").fingerprint() == plain
    assert segment("batch.tries=9").fingerprint() == plain
    assert segment("tokens.min_tissue=0.5").fingerprint() != plain
    assert segment("model.name=histo-nuclei-nano").fingerprint() != plain
    assert load_recipe("qc").fingerprint() != plain
    with pytest.raises(GigavimError):
        segment("model.name=no-such").fingerprint()


def test_overrides_take_toml_or_bare_words():
    recipe = segment("output.formats=['geojson']", "tokens.tissue=none", "tokens.min_tissue=1")
    assert recipe.output.formats == ["geojson"]
    assert recipe.tokens.tissue == "none"
    assert recipe.tokens.min_tissue == 1.0


def test_paths_hold_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.geojson").write_text("{}")
    recipe = segment("tokens.tissue=mask.geojson")
    assert recipe.tokens.tissue == str(tmp_path / "mask.geojson")


def test_segment_and_aerial_recipes_run(run, tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(60, 220, (200, 260, 3), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "slide.tif", pixels, photometric="rgb", tile=(64, 64),
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    with rasterio.open(
        tmp_path / "field.tif", "w", driver="GTiff", width=260, height=200, count=3, dtype="uint8",
        crs="EPSG:32633", transform=rasterio.Affine(0.5, 0, 5e5, 0, -0.5, 5e6),
    ) as file:  # fmt: skip
        file.write(pixels.transpose(2, 0, 1))
    model = ("--model", "histo-nuclei-nano", "--workers", 1)
    result = run("batch", "segment", "slide.tif", "-o", "out", *model)
    assert result.code == 0, result.err
    assert (tmp_path / "out/slides/slide/slide.labels.ome.tif").exists()
    insist = ("--set", "model.allow_mpp_mismatch=true")
    result = run("batch", "aerial", "field.tif", "-o", "fields", *model, *insist)
    assert result.code == 0, result.err
    with rasterio.open(tmp_path / "fields/slides/field/field.labels.tif") as labels:
        assert labels.crs.to_epsg() == 32633
