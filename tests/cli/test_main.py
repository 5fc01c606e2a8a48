"""The command line as a whole: help, errors, exit codes, what it imports."""

import subprocess
import sys

import pytest

from gigavim.cli.main import COMMANDS


def test_help_lists_every_command_and_the_exit_codes(run):
    result = run("--help")
    assert result.code == 0
    assert all(name in result.out for name in COMMANDS)
    assert "Exit codes" in result.out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_has_help_with_an_example(run, name):
    result = run(name, "--help")
    assert result.code == 0
    assert f"gigavim {name}" in result.out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["segment", "--help"], ["batch", "--help"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from gigavim.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'zarr', 'dask', 'numba', 'rasterio', 'openslide', 'skimage', 'scipy',"
        " 'distributed', 'gigavim_pipelines'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_version(run):
    import gigavim

    assert run("--version").out.strip() == f"gigavim, version {gigavim.__version__}"


def test_unknown_command_is_a_usage_error(run):
    result = run("segmnt", "x.svs")
    assert result.code == 2
    assert "Did you mean segment?" in result.err


def test_a_slide_where_a_command_should_be_is_understood(run):
    result = run("slide.svs")
    assert result.code == 2
    assert "gigavim segment slide.svs" in result.err


@pytest.mark.parametrize(
    "flags",
    [("--max-memory", "lots"), ("--max-gpu-memory", "-3GB"), ("--max-memory", "0"),
     ("--device", "toaster"), ("--device", "cuda:x")],
)  # fmt: skip
def test_a_flag_that_makes_no_sense_is_a_usage_error(run, flags):
    result = run("segment", "a.svs", "b.svs", *flags)
    assert result.code == 2
    assert flags[0] in result.err
    assert "a.svs" not in result.err


@pytest.mark.parametrize("command", ["info", "segment"])
@pytest.mark.parametrize("count", [1, 2])
def test_an_odd_file_name_does_not_break_the_one_line(run, tmp_path, command, count):
    names = [f"{number}\n\x1b[31mred.svs" for number in range(count)]
    result = run(command, *(tmp_path / name for name in names))
    assert result.code == 1
    errors = [line for line in result.err.splitlines() if line.startswith("Error:")]
    assert [line.split(":")[1].endswith(r"\n\x1b[31mred.svs") for line in errors] == [True] * count
    assert "\x1b" not in "".join(errors)


def test_underscores_are_understood(run, make_slide, tiny_model):
    path = make_slide()
    assert run("segment", path, "--model", tiny_model, "--dry_run").code == 0
