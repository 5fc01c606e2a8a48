"""The strip below an overlay: colours of the classes, and a scale bar."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]

INK: RGB = (38, 38, 44)
PAPER: RGB = (255, 255, 255)
LEAST_WIDTH_PX = 360


def add_legend(
    picture: Image.Image, entries: Sequence[tuple[str, RGB]], *, um_per_px: float, metric: bool
) -> Image.Image:
    """The picture at the top-left of a sheet with a legend below it.

    Args:
        picture: RGB.
        entries: names and colours.
        um_per_px: micrometres per pixel of the picture; no scale bar where it is not positive.
        metric: the scale bar counts in cm, m and km, not in um and mm.
    """
    width = max(picture.width, LEAST_WIDTH_PX)
    size = min(max(width // 72, 13), 26)
    font = ImageFont.load_default(size)
    bar = scale_bar(um_per_px, longest_px=width // 5, metric=metric)
    bar_width = 0
    if bar is not None:
        bar_width = max(bar[0], math.ceil(font.getlength(bar[1]))) + 2 * size
    lines = _lines(entries, font, room=width - bar_width - size)
    line_px = round(1.7 * size)
    strip_px = max(len(lines), 2 if bar else 1) * line_px + size
    sheet = Image.new("RGB", (width, picture.height + strip_px), PAPER)
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    draw.line([(0, picture.height), (width, picture.height)], fill=(210, 210, 214))
    for row, line in enumerate(lines):
        middle = picture.height + size // 2 + row * line_px + line_px // 2
        for x, name, color in line:
            half = size // 2
            draw.rectangle([x, middle - half, x + size, middle + half], fill=color, outline=INK)
            draw.text((x + round(1.5 * size), middle), name, fill=INK, font=font, anchor="lm")
    if bar is not None:
        _draw_bar(draw, bar, font, right=width - size, top=picture.height + size // 2 + size // 4)
    return sheet


def scale_bar(um_per_px: float, *, longest_px: int, metric: bool) -> tuple[int, str] | None:
    """Length in pixels and text of the longest bar of 1, 2 or 5 times a power of ten."""
    longest_um = um_per_px * longest_px
    if not (math.isfinite(longest_um) and longest_um > 0):
        return None
    power = 10.0 ** math.floor(math.log10(longest_um))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= longest_um * (1 + 1e-9))
    # The font that Pillow brings has no "µ".
    units = [(1e9, "km"), (1e6, "m"), (1e4, "cm")] if metric else [(1e3, "mm"), (1.0, "um")]
    least = 0.999 if metric else 0.0999  # 0.2 mm reads better than 200 um
    scale, unit = next((u for u in units if length_um >= least * u[0]), units[-1])
    return max(1, round(length_um / um_per_px)), f"{length_um / scale:g} {unit}"


def _lines(
    entries: Sequence[tuple[str, RGB]], font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
    *, room: int,
) -> list[list[tuple[int, str, RGB]]]:  # fmt: skip
    """Entries with their x, broken into lines where they would not fit."""
    size = math.ceil(font.getbbox("Mg")[3])
    lines: list[list[tuple[int, str, RGB]]] = [[]]
    x = size
    for name, color in entries:
        needed = 2 * size + math.ceil(font.getlength(name))
        if lines[-1] and x + needed > room:
            lines.append([])
            x = size
        lines[-1].append((x, name, color))
        x += needed + size
    return lines


def _draw_bar(
    draw: ImageDraw.ImageDraw,
    bar: tuple[int, str],
    font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
    *,
    right: int,
    top: int,
) -> None:
    length, text = bar
    size = math.ceil(font.getbbox("Mg")[3])
    thick = max(3, size // 4)
    centre = right - max(length, math.ceil(font.getlength(text))) // 2
    left = centre - length // 2
    draw.rectangle([left, top + thick, left + length - 1, top + 2 * thick - 1], fill=INK)
    draw.text((centre, top + 3 * thick), text, fill=INK, font=font, anchor="ma")
