"""What a run says of its classes."""

import pytest

from gigavim.results import Segmentation, area_text


@pytest.mark.parametrize(
    ("area", "kind", "text"),
    [
        (0.0, "area_mm2", "0 um2"),
        (0.000215, "area_mm2", "215 um2"),
        (1.0591, "area_mm2", "1.059 mm2"),
        (1234.5, "area_mm2", "1,234 mm2"),
        (0.05, "area_ha", "500 m2"),
        (45.0714, "area_ha", "45.071 ha"),
        (41_192_656_500.0, "area_ha", "411,926,565 km2"),
    ],
)
def test_areas_come_in_units_that_suit_them(area, kind, text):
    assert area_text(area, kind) == text


def test_a_class_is_a_line_with_its_share_and_its_area_where_known(tmp_path):
    classes = [
        {"name": "tissue", "fraction": 0.25, "area_mm2": 0.5},
        {"name": "nuclei", "fraction": 0.05, "area_mm2": None},
    ]
    lines = Segmentation(tmp_path, {}, {"classes": classes}).areas()
    assert lines == ["tissue        25.0%  0.500 mm2", "nuclei         5.0%"]
