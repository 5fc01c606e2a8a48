"""A tiny model and small slides, made on the spot, and a runner of the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from gigavim.cli.main import main
from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.checkpoint import save_model
from gigavim.model.config import VimConfig
from gigavim.model.heads import SegmentationModel
from gigavim.model.vim import Vim


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


def tiny_card(config: VimConfig, *, mpp: float = 0.5, order: str = "blocks(4)") -> ModelCard:
    return ModelCard(
        name="tiny",
        description="Random weights, for tests.",
        config=config,
        mpp=mpp,
        mpp_range=(mpp / 2, mpp),
        mean=(0.8, 0.7, 0.8),
        std=(0.2, 0.2, 0.2),
        classes=(
            ClassSpec("background", (255, 255, 255), object_type="none"),
            ClassSpec("tissue", (200, 80, 160)),
            ClassSpec("nuclei", (60, 60, 200), parent="tissue", object_type="detection"),
        ),
        order=order,
        licence="Apache-2.0",
        training=TrainingRecord(script="none", data="none", data_licence="none", split="none"),
    )


@pytest.fixture(scope="session")
def make_card() -> Callable[..., ModelCard]:
    return tiny_card


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    config = VimConfig(
        d_model=32, depth=2, patch_px=8, stride_px=8, class_token="none", pooling="mean",
        position="block", grid_hw=(4, 4),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, SegmentationModel(Vim(config), 3), tiny_card(config))
    return folder


def tissue_like(height: int, width: int, seed: int = 0) -> np.ndarray:
    """White glass with a stained disc: (height, width, 3) uint8."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 244, np.uint8)
    y, x = np.ogrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.35 * min(height, width)) ** 2
    stain = np.clip(random.normal((190, 120, 170), 25, (height, width, 3)), 0, 255)
    pixels[disc] = stain.astype(np.uint8)[disc]
    return pixels


@pytest.fixture
def make_slide(tmp_path) -> Callable[..., Path]:
    def make(name: str = "slide.tif", *, size=(300, 420), mpp: float | None = 0.5) -> Path:
        path = tmp_path / name
        resolution = {} if mpp is None else {
            "resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER",
        }  # fmt: skip
        tifffile.imwrite(
            path, tissue_like(*size), tile=(128, 128), photometric="rgb", compression="deflate",
            **resolution,
        )  # fmt: skip
        return path

    return make
