from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors here are too small to be worth sharing among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_config() -> VimConfig:
    return VimConfig(
        d_model=16,
        depth=2,
        patch_px=4,
        stride_px=4,
        class_token="none",
        pooling="mean",
        position="block",
        grid_hw=(4, 4),
    )


@pytest.fixture
def small_model(small_config: VimConfig) -> SegmentationModel:
    torch.manual_seed(1)
    return SegmentationModel(Vim(small_config), 3).eval()


@pytest.fixture
def make_card(small_config: VimConfig) -> Callable[..., ModelCard]:
    """Make a valid card, with changes."""

    def make(**changes: Any) -> ModelCard:
        fields: dict[str, Any] = {
            "name": "small",
            "description": "for tests",
            "config": small_config,
            "mpp": 0.5,
            "mpp_range": (0.2, 1.0),
            "mean": (0.7, 0.5, 0.6),
            "std": (0.2, 0.2, 0.1),
            "classes": (
                ClassSpec("background", (0, 0, 0), object_type="none"),
                ClassSpec("tissue", (230, 159, 0)),
                ClassSpec("nucleus", (0, 114, 178), parent="tissue", object_type="detection"),
            ),
            "order": "blocks(4)",
            "licence": "Apache-2.0",
            "training": TrainingRecord(
                script="train", data="none", data_licence="none", split="none"
            ),
        }
        return ModelCard(**(fields | changes))

    return make
