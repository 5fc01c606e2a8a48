"""Encoder weights from elsewhere: the published .pth files, and safetensors of any origin."""

import argparse
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gigavim.errors import ModelError
from gigavim.model.config import Bidirectional, ClassToken, VimConfig
from gigavim.model.vim import Vim
from gigavim.model.weights import fill, read_safetensors

TRAINING_PX = 224
"""Side of the images that all published weights were trained on."""


def load_encoder_weights(path: Path, *, config: VimConfig | None = None, ema: bool = False) -> Vim:
    """Build an encoder from a weights file, on the CPU in float32, ready for inference.

    Args:
        path: safetensors, or a .pth as the published training code writes it (a dict with "model"
            and "model_ema") or a plain state dict. Segmentation models give their encoder.
        config: what the encoder must be; inferred from the tensors' names and shapes if absent,
            with the published switches (middle class token, halved sum) where these do not tell.
        ema: take "model_ema", the averaged weights, instead of "model".

    Raises:
        ModelError: the file cannot be read, would run code, or does not fit.
    """
    state = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, ema=ema)
    state = _without_prefixes(state)
    try:
        found = config if config is not None else infer_config(state)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    encoder = Vim(found)
    fill(encoder, state, source=path)
    return encoder.eval()


def infer_config(state: dict[str, Tensor]) -> VimConfig:
    """Read the configuration off a state dict; raises `ModelError` where shapes do not tell it."""
    d_model, in_channels, patch_px, _ = _shape(state, "patch_embed.proj.weight", 4)
    d_inner, d_state = _shape(state, "layers.0.mixer.A_log", 2)
    rank = _shape(state, "layers.0.mixer.dt_proj.weight", 2)[1]
    class_token: ClassToken = "none"
    if "cls_token_head" in state:
        class_token = "double"
    elif "cls_token" in state:
        class_token = "middle"
    bidirectional: Bidirectional = "none"
    if "layers.0.mixer.conv1d_b.weight" in state:
        bidirectional = "v2"
    elif "layers.0.mixer.A_b_log" in state:
        bidirectional = "v1"
    class_tokens = {"none": 0, "middle": 1, "double": 2}[class_token]
    side = _grid_side(state, class_tokens)
    return VimConfig(
        d_model=d_model,
        depth=_depth(state),
        d_state=d_state,
        d_conv=_shape(state, "layers.0.mixer.conv1d.weight", 3)[2],
        expand=d_inner // d_model,
        dt_rank=None if rank == math.ceil(d_model / 16) else rank,
        patch_px=patch_px,
        stride_px=_stride(patch_px, side),
        in_channels=in_channels,
        class_token=class_token,
        pooling="class" if class_tokens else "mean",
        bidirectional=bidirectional,
        position="grid" if side else "none",
        grid_hw=(side, side) if side else (14, 14),
        num_classes=_shape(state, "head.weight", 2)[0] if "head.weight" in state else 0,
    )


def _read_pickle(path: Path, *, ema: bool) -> dict[str, Tensor]:
    """Read a .pth without running anything in it; `argparse.Namespace` alone is let in, by name."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, as it is no plain weights file or would run code when loaded "
            f"({_first_line(error)}); convert it to safetensors where you trust it"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged archive surfaces as almost any type
        raise ModelError(f"{path}: not a whole weights file ({_first_line(error)})") from error
    return _tensors(path, content, "model_ema" if ema else "model")


def _tensors(path: Path, content: Any, key: str) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
        content = content[key]
    elif isinstance(content, dict) and isinstance(content.get("model"), dict):
        raise ModelError(f"{path}: holds no {key!r}; it has {', '.join(map(str, content))}")
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path}: holds no state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(f"{path}: entry {name!r} is no tensor, so this is no state dict")
        # A pickled view can claim any shape over a few bytes.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelError(f"{path}: tensor {name} claims more values than the file holds")
    return cast(dict[str, Tensor], content)


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop "module." of data-parallel training, and all but the encoder of a larger model."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    part = {
        name.removeprefix("encoder."): tensor
        for name, tensor in state.items()
        if name.startswith("encoder.")
    }
    return part or state


def _depth(state: dict[str, Tensor]) -> int:
    matches = (re.match(r"layers\.(\d{1,6})\.", name) for name in state)
    layers = {int(match[1]) for match in matches if match}
    if layers != set(range(len(layers))):
        raise ModelError("the layers in it are not numbered 0, 1, 2, ...")
    return len(layers)


def _grid_side(state: dict[str, Tensor], class_tokens: int) -> int:
    """Return the side of the square position table, 0 if there is none."""
    if "pos_embed" not in state:
        return 0
    patches = _shape(state, "pos_embed", 3)[1] - class_tokens
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches:
        raise ModelError(f"pos_embed has {patches} patches, which is no square: state the config")
    return side


def _stride(patch_px: int, side: int) -> int:
    """Tell the stride by the grid that images of the published size give; else the patch."""
    for stride_px in (patch_px, patch_px // 2, patch_px // 4):
        if stride_px and (TRAINING_PX - patch_px) // stride_px + 1 == side:
            return stride_px
    return patch_px


def _shape(state: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise ModelError(f"no Vim encoder, as there is no {name} in it")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ModelError(f"{name} has shape {shape}, which is no Vim encoder's")
    return shape


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
