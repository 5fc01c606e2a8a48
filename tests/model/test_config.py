import pytest

from gigavim.errors import ModelError
from gigavim.model.config import VimConfig

GOOD = {"d_model": 48, "depth": 3}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"d_model": 0}, "d_model"),
        ({"depth": -1}, "depth"),
        ({"depth": 2.5}, "depth"),
        ({"d_state": True}, "d_state"),
        ({"stride_px": 17}, "stride_px"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"grid_hw": (14,)}, "grid_hw"),
        ({"grid_hw": (14, 0)}, "grid_hw"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"num_classes": -1}, "num_classes"),
        ({"class_token": "center"}, "class_token"),
        ({"pooling": "mean"}, "pooling"),
        ({"class_token": "none"}, "pooling"),
        ({"position": "sincos"}, "token_um"),
        ({"position": "sincos", "token_um": 4.0, "d_model": 50}, "d_model"),
        ({"token_um": 4.0}, "token_um"),
        ({"bidirectional": "layer_pairs", "depth": 1}, "depth"),
        ({"bidirectional": "v3"}, "bidirectional"),
    ],
)
def test_nonsense_is_refused_by_name(changes, named):
    with pytest.raises(ModelError, match=named):
        VimConfig(**(GOOD | changes))


@pytest.mark.parametrize(("d_model", "rank"), [(192, 12), (96, 6), (100, 7), (8, 1)])
def test_rank_defaults_to_a_sixteenth_rounded_up(d_model, rank):
    assert VimConfig(d_model=d_model, depth=1).rank == rank
