"""gigavim.toml: complete, strict, and beaten by flags."""

from pathlib import Path

import pytest

from gigavim.config import Settings, load_settings
from gigavim.errors import SettingsError

REPOSITORY = Path(__file__).parents[1]


def test_the_shipped_file_states_every_default():
    import tomllib

    text = (REPOSITORY / "gigavim.toml").read_text()
    assert load_settings(REPOSITORY / "gigavim.toml") == Settings()
    assert tomllib.loads(text) == Settings().model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[compute]\ndevise = "cpu"', ["compute.devise", "compute.device"]),
        ('[compute]\nprecision = "fp16"', ["compute.precision", "fp16"]),
        ('[tokens]\nblock_px = "big"', ["tokens.block_px", "big"]),
        ("[tokens]\nmin_tissue = 1.5", ["tokens.min_tissue", "1.5"]),
        ("[input]\nslide_mpp = nan", ["input.slide_mpp"]),
        ("[nonsense]\nx = 1", ["nonsense"]),
        ("x =", ["TOML"]),
    ],
)
def test_a_wrong_file_is_refused_by_key_and_name(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        load_settings(path)
    assert all(word in str(error.value) for word in [*words, "mine.toml"])


def test_the_mark_that_windows_editors_write_is_no_error(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf[compute]\nthreads = 3\n")
    assert load_settings(path).compute.threads == 3


def test_a_missing_file_is_refused_only_if_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings() == Settings()
    with pytest.raises(SettingsError, match=r"none\.toml"):
        load_settings(tmp_path / "none.toml")


def test_flags_win_over_the_file_and_absent_flags_do_not(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[compute]\ndevice = "cpu"\nthreads = 3\n')
    settings = load_settings(path).with_flags(compute={"device": "cuda", "threads": None})
    assert settings.compute.device == "cuda"
    assert settings.compute.threads == 3


def test_a_flag_out_of_range_is_refused():
    with pytest.raises(SettingsError, match="min_tissue"):
        Settings().with_flags(tokens={"min_tissue": 2.0})
