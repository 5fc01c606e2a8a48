"""`gigavim info`: what a slide, or an embedding store, is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options
from gigavim.errors import GigavimError
from gigavim.names import as_text

if TYPE_CHECKING:
    from gigavim.slides.base import Slide


@click.command("info")
@options.inputs()
@options.slide_mpp
@options.channels_option
@options.as_json
@options.verbosity
def command(
    inputs: tuple[Path, ...], slide_mpp: float | None, channels: list[int] | None, as_json: bool
) -> int:
    """Say what a slide is: format, levels, resolution and its source, bounds, georeference.

    Of an embedding store: its slide, tokens, grids, classes, and how it was made.

    \b
    Examples:
      gigavim info slide.svs
      gigavim info out/slide.embeddings.zarr
      gigavim info --json *.tif | jq .mpp
    """
    from gigavim.slides import open_slide
    from gigavim.store.layout import is_store

    failures = 0
    picked = None if channels is None else (channels[0], channels[1], channels[2])
    for path in inputs:
        try:
            if is_store(path):
                facts = describe_store(path)
            else:
                with open_slide(path, mpp=slide_mpp, channels=picked) as slide:
                    facts = describe(slide)
        except GigavimError as error:
            if len(inputs) == 1:
                raise
            click.echo(f"Error: {options.one_line(error)}", err=True)
            failures += 1
            continue
        if as_json:
            import orjson

            click.echo(orjson.dumps(facts).decode())
        else:
            click.echo(_store_table(facts) if "tokens" in facts else _table(facts))
    if not failures:
        return 0
    return 1 if failures == len(inputs) else 3


def describe(slide: "Slide") -> dict[str, Any]:
    """The facts about a slide as plain data, ready for JSON."""
    mpp, bounds, georeference = slide.mpp, slide.bounds, slide.georeference
    width, height = slide.levels[0].width, slide.levels[0].height
    return {
        "path": as_text(slide.path),
        "reader": slide.reader,
        "width_px": width,
        "height_px": height,
        "megapixels": round(width * height / 1e6, 3),
        "mpp": None if mpp is None else {"x": mpp.x, "y": mpp.y, "source": mpp.source},
        "levels": [
            {
                "width_px": level.width,
                "height_px": level.height,
                "downsample": round(level.downsample_x, 4),
                "tile_px": [level.tile_width, level.tile_height],
            }
            for level in slide.levels
        ],
        "bounds_level0": {
            "x": bounds.x_level0,
            "y": bounds.y_level0,
            "width": bounds.width_level0,
            "height": bounds.height_level0,
        },
        "background_rgb": list(slide.background_rgb),
        "crs": None if georeference is None else georeference.crs_wkt,
        "transform": None if georeference is None else list(georeference.transform),
        "description": dict(slide.description),
    }


def describe_store(path: Path) -> dict[str, Any]:
    """The facts about an embedding store as plain data, ready for JSON."""
    from gigavim.store.reader import EmbeddingStore

    store = EmbeddingStore.open(path)
    info = store.info
    return {
        "path": as_text(path),
        "format": ".".join(map(str, info.version)),
        "slide": info.slide.model_dump(mode="json"),
        "tokens": info.tokens,
        "width": info.width,
        "dtype": str(store.embeddings.dtype),
        "grid": info.grid.model_dump(mode="json"),
        "map": info.frame.model_dump(mode="json"),
        "pools": list(info.pools),
        "slide_embedding": info.slide_embedding,
        "probabilities": store.probabilities is not None,
        "classes": [spec.name for spec in info.classes],
        "provenance": info.provenance,
    }


def _store_table(facts: dict[str, Any]) -> str:
    grid, provenance, area = facts["grid"], facts["provenance"], facts["map"]
    model, pooling = provenance.get("model", {}), facts["slide_embedding"]
    mpp = "unknown mpp" if area["mpp_xy"] is None else _per_pixel(*area["mpp_xy"])
    rows = [
        ("store", f"gigavim embeddings, format {facts['format']}"),
        ("slide", facts["slide"]["path"]),
        ("tokens", f"{facts['tokens']:,} x {facts['width']} {facts['dtype']}"),
        ("grid", f"{grid['rows']:,} x {grid['cols']:,} cells of {grid['patch_px']} px"),
        ("map", f"{area['width_px']:,} x {area['height_px']:,} px, {mpp}"),
        ("pooled by", ", ".join(map(str, facts["pools"])) or "nothing"),
        ("slide vector", {"mean": "mean of all tokens"}.get(pooling, "mean of the class tokens")),
        ("classes", ", ".join(facts["classes"])),
        ("model", f"{model.get('name')} (sha256 {str(model.get('sha256'))[:12]})"),
        ("made", f"{provenance.get('made')} by gigavim {provenance.get('gigavim')}"),
    ]
    width = max(len(key) for key, _ in rows)
    return "\n".join([facts["path"], *(f"  {key:<{width}}  {value}" for key, value in rows)])


def _table(facts: dict[str, Any]) -> str:
    mpp, bounds = facts["mpp"], facts["bounds_level0"]
    rows = [
        ("reader", facts["reader"]),
        (
            "size",
            f"{facts['width_px']:,} x {facts['height_px']:,} px ({facts['megapixels']:,} Mpx)",
        ),
        ("mpp", "unknown: give --slide-mpp" if mpp is None else _mpp_text(mpp)),
    ]
    if (bounds["width"], bounds["height"]) != (facts["width_px"], facts["height_px"]):
        size = f"{bounds['width']:,} x {bounds['height']:,} px"
        rows.append(("bounds", f"{size} at {bounds['x']:,}, {bounds['y']:,}"))
    for number, level in enumerate(facts["levels"]):
        tiles = " x ".join(str(side) for side in level["tile_px"])
        text = f"{_size(level)}, 1/{level['downsample']:g}, tiles {tiles}"
        rows.append((f"level {number}", text))
    if facts["crs"] and "crs" not in facts["description"]:
        rows.append(("crs", _crs_name(facts["crs"])))
    rows += [(key, value) for key, value in facts["description"].items()]
    width = max(len(key) for key, _ in rows)
    return "\n".join([facts["path"], *(f"  {key:<{width}}  {value}" for key, value in rows)])


def _size(facts: dict[str, Any]) -> str:
    return f"{facts['width_px']:,} x {facts['height_px']:,} px"


def _mpp_text(mpp: dict[str, Any]) -> str:
    return f"{_per_pixel(mpp['x'], mpp['y'])} ({mpp['source']})"


def _per_pixel(x_um: float, y_um: float) -> str:
    unit, scale = ("m", 1e-6) if x_um >= 1e4 else ("um", 1.0)
    x, y = (f"{mpp * scale:.4g}" for mpp in (x_um, y_um))
    return f"{x if x == y else f'{x} x {y}'} {unit} per pixel"


def _crs_name(wkt: str) -> str:
    """The quoted name at the start of a WKT string."""
    return wkt.split('"')[1] if '"' in wkt else wkt
