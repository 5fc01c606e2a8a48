"""What commands that work through slides share: their flags, their names, their loop."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options
from gigavim.cli.progress import Bars
from gigavim.config import Settings, load_settings
from gigavim.errors import GigavimError
from gigavim.names import as_text, own_name, result_stem
from gigavim.outputs.formats import FORMATS

if TYPE_CHECKING:
    from gigavim.engine.plan import Plan
    from gigavim.progress import Progress
    from gigavim.results import Result

output = click.option(
    "-o",
    "--output",
    "--results-dir",
    "--job-dir",
    "output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the results  [default: gigavim_out].",
)
overwrite = click.option(
    "--overwrite", is_flag=True, default=None, help="Replace results that are there."
)
fail_fast = click.option(
    "--fail-fast/--skip-errors",
    default=False,
    help="Stop at the first slide that fails, or go on  [default: go on].",
)

_SLIDE_FLAGS = (
    output,
    click.option("--model", metavar="NAME|DIR", help="A name of `gigavim models`, or a folder."),
    click.option("--weights", metavar="FILE", help="Other weights for that model (safetensors)."),
    click.option(
        "--mpp",
        type=click.FloatRange(min=0, min_open=True),
        metavar="UM",
        help="Micrometres per pixel at which the model sees the slide  [default: as trained].",
    ),
    click.option(
        "--mag",
        type=click.FloatRange(min=0, min_open=True),
        metavar="X",
        help="The same as a magnification: --mag 20 is --mpp 0.5.",
    ),
    options.slide_mpp,
    click.option(
        "--allow-mpp-mismatch",
        is_flag=True,
        default=None,
        help="Run the model at a resolution, or on a kind of image, it was not trained for.",
    ),
    options.channels_option,
    click.option(
        "--context",
        type=click.Choice(["slide", "window"]),
        help="See the slide as one sequence, or only windows of it, each by itself as in tools "
        "that work tile by tile  [default: slide].",
    ),
    click.option(
        "--window-px",
        type=click.IntRange(8, 1 << 16),
        metavar="PX",
        help="Side of these windows at the model's resolution  [default: 224].",
    ),
    click.option("--tissue", metavar="auto|none|FILE", help="What to look at  [default: auto]."),
    click.option(
        "--min-tissue",
        type=click.FloatRange(0, 1),
        metavar="SHARE",
        help="Share of a patch that must be tissue  [default: 0, any].",
    ),
    overwrite,
    click.option(
        "--device",
        callback=options.device,
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, mps  [default: auto].",
    ),
    click.option(
        "--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Of matrix products."
    ),
    click.option("--threads", type=click.IntRange(min=0), help="CPU threads of the encoder."),
    click.option("--num-workers", type=click.IntRange(min=0), help="Threads that read the slide."),
    click.option(
        "--max-memory",
        callback=options.size,
        metavar="SIZE",
        help="Such as 4GB  [default: 80 % of what is free].",
    ),
    click.option(
        "--max-gpu-memory",
        callback=options.size,
        metavar="SIZE",
        help="The same for the device's memory.",
    ),
    click.option(
        "--scratch-dir", metavar="DIR", help="For working files  [default: in the output]."
    ),
    click.option("--dry-run", is_flag=True, help="Say what it would take, and stop."),
    fail_fast,
    options.config,
    options.as_json,
    options.verbosity,
)


def slide_options(function: options.Function) -> options.Function:
    """The flags of a command that runs a model over slides."""
    for flag in reversed(_SLIDE_FLAGS):
        function = flag(function)
    return function


_WRITING_FLAGS = (
    click.option(
        "--min-area",
        "min_area_um2",
        type=click.FloatRange(min=0),
        metavar="UM2",
        help="Leave out polygons below so many square micrometres  [default: 0].",
    ),
    click.option(
        "--simplify",
        "simplify_um",
        type=click.FloatRange(min=0),
        metavar="UM",
        help="Simplify outlines of polygons within so many micrometres  [default: 0, exact].",
    ),
    click.option(
        "--pool",
        type=click.IntRange(1),
        metavar="N",
        help="One entry of h5, AnnData, SpatialData per N x N tokens, their mean  [default: 1].",
    ),
    click.option("--ngff", type=click.Choice(["0.4", "0.5"]), help="OME-Zarr  [default: 0.4]."),
)


def writing_options(function: options.Function) -> options.Function:
    """The flags that say how formats are written."""
    for flag in reversed(_WRITING_FLAGS):
        function = flag(function)
    return function


def formats(default: str) -> options.Decorator:
    """--format, repeatable; `default` says what is written without it."""
    known = [name for name, entry in FORMATS.items() if not entry.by_itself]
    return click.option(
        "--format",
        "formats",
        multiple=True,
        type=click.Choice(known),
        metavar="NAME",
        help=f"Repeatable: {', '.join(known)}  [default: {default}].",
    )


def settings_from(
    config: Path | None, flags: dict[str, Any], **sections: dict[str, Any]
) -> Settings:
    """Settings of the file and the flags of `slide_options`; `sections` are further values.

    Raises:
        SettingsError: the file or a value is wrong.
        click.UsageError: two flags contradict each other.
    """
    if flags["mpp"] and flags["mag"]:
        raise click.UsageError("--mpp and --mag say the same thing: give one of them.")
    # 10 um / magnification, by convention.
    mpp = 10 / flags["mag"] if flags["mag"] else flags["mpp"]
    return load_settings(config).with_flags(
        input={"slide_mpp": flags["slide_mpp"], "channels": flags["channels"]},
        model={
            "name": flags["model"],
            "weights": flags["weights"],
            "mpp": mpp,
            "allow_mpp_mismatch": flags["allow_mpp_mismatch"],
            "context": flags["context"],
            "window_px": flags["window_px"],
        },
        tokens={key: flags[key] for key in ("tissue", "min_tissue", "num_workers")},
        compute={
            key: flags[key]
            for key in (
                "device", "precision", "threads", "max_memory", "max_gpu_memory", "scratch_dir"
            )
        },
        output=output_section(flags),
        **sections,
    )  # fmt: skip


def output_section(flags: dict[str, Any]) -> dict[str, Any]:
    """The output settings among a command's flags."""
    return {
        "directory": None if flags["output"] is None else str(flags["output"]),
        "formats": list(flags["formats"]) or None,
        "overwrite": flags["overwrite"],
        **{key: flags[key] for key in ("min_area_um2", "simplify_um", "pool", "ngff")},
    }


def output_stems(inputs: tuple[Path, ...]) -> dict[Path, str]:
    """Name each slide's results: its stem, or its whole name where two share a stem.

    A path given twice counts once.

    Raises:
        click.UsageError: two inputs have the same name: one would replace the other's results.
    """
    paths = list(dict.fromkeys(inputs))
    stems = [result_stem(path) for path in paths]
    names = [
        stem if stems.count(stem) == 1 else own_name(path)
        for path, stem in zip(paths, stems, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise click.UsageError(f"two inputs are named {name}: run them with different -o.")
    return dict(zip(paths, names, strict=True))


def run_all(
    stems: dict[Path, str],
    work: Callable[[Path, str], None],
    *,
    fail_fast: bool,
    kind: str = "slides",
) -> int:
    """Do the work for each input, and return the exit code.

    One that fails does not stop the others: its error is shown, and it is named again at the end.

    Raises:
        GigavimError: of a lone input, or of any with `fail_fast`.
    """
    failed: list[tuple[Path, GigavimError]] = []
    for path, stem in stems.items():
        try:
            work(path, stem)
        except GigavimError as error:
            if len(stems) == 1 or fail_fast:
                raise
            click.echo(f"Error: {options.one_line(error)}", err=True)
            failed.append((path, error))
    if failed:
        click.echo(f"\n{len(failed)} of {len(stems)} {kind} failed:", err=True)
        for path, reason in failed:
            click.echo(f"  {path}: {type(reason).__name__}", err=True)
        return 3 if len(failed) < len(stems) else 1
    return 0


def run_slides(
    inputs: tuple[Path, ...],
    settings: Settings,
    make: "Callable[[Path, str, Progress], Result]",
    *,
    dry_run: bool,
    fail_fast: bool,
    as_json: bool,
) -> int:
    """Make results of every slide and report them, or say what they would take."""

    def work(path: Path, stem: str) -> None:
        if dry_run:
            from gigavim.segmentation import plan_segmentation

            report_plan(path, plan_segmentation(path, settings), as_json=as_json)
            return
        if not options.is_quiet():
            click.echo(f"{path}", err=True)
        report(make(path, stem, Bars(quiet=options.is_quiet())), as_json=as_json)

    return run_all(output_stems(inputs), work, fail_fast=fail_fast)


def report_plan(path: Path, plan: "Plan", *, as_json: bool) -> None:
    """What working through a slide would take."""
    if as_json:
        import orjson

        click.echo(orjson.dumps({"slide": as_text(path)} | asdict(plan)).decode())
    else:
        click.echo("\n  ".join([options.one_line(path), *plan.describe()]))


def report(result: "Result", *, as_json: bool) -> None:
    """What a user wants to know at once: areas, and where the files are."""
    if as_json:
        import orjson

        click.echo(orjson.dumps(result.summary).decode())
    elif not options.is_quiet():
        click.echo(f"  {result.made_by()}")
        for entry in result.areas():
            click.echo(f"  {entry}")
        for path in result.outputs.values():
            click.echo(f"  wrote {path}")
