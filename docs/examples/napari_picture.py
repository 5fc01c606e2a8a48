"""A picture of napari with a slide and its label map, out of one OME-Zarr.

    gigavim segment slide.svs -o maps --format ome-zarr
    pip install 'napari[pyqt6]' napari-ome-zarr          # in an environment of their own
    python napari_picture.py maps/slide.ome.zarr picture.png [--center Y X --zoom Z]

Without a screen: `xvfb-run python napari_picture.py …`.
"""

import argparse
from pathlib import Path

import napari
from qtpy.QtTest import QTest


def main() -> None:
    """Open, show and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ome_zarr", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--center", type=float, nargs=2, metavar=("Y", "X"), help="micrometres")
    parser.add_argument("--zoom", type=float, help="screen pixels per micrometre")
    options = parser.parse_args()
    viewer = napari.Viewer()
    viewer.window.resize(1100, 760)
    viewer.open(options.ome_zarr, plugin="napari-ome-zarr")
    for layer in viewer.layers:
        if isinstance(layer, napari.layers.Labels):  # the reader adds them, but hides them
            layer.visible = True
            layer.opacity = 0.5
    viewer.reset_view()
    if options.center:
        viewer.camera.center = options.center
    if options.zoom:
        viewer.camera.zoom = options.zoom
    QTest.qWait(3000)  # levels load in the background
    viewer.screenshot(str(options.picture), canvas_only=False, flash=False)
    viewer.close()


if __name__ == "__main__":
    main()
