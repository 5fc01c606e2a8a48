"""Models on disk: a folder with card.json and weights.safetensors, shipped or the user's own."""

import contextlib
import difflib
import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from gigavim.errors import ModelError, OutputError
from gigavim.model.card import CARD_NAME, WEIGHTS_NAME, ModelCard, read_card

if TYPE_CHECKING:
    from torch import Tensor

    from gigavim.model.segmentation import SegmentationModel


def list_models() -> dict[str, ModelCard]:
    """Return the cards of the shipped models by name; torch is not imported."""
    return {folder.name: read_card(folder / CARD_NAME) for folder in _shipped_folders()}


def load_card(name_or_path: str | Path) -> ModelCard:
    """Read the card of a model, named as for `load_model`; torch is not imported."""
    return read_card(_model_folder(name_or_path) / CARD_NAME)


def load_model(name_or_path: str | Path) -> tuple["SegmentationModel", ModelCard]:
    """Load a model for inference, on the CPU in float32.

    Args:
        name_or_path: the name of a shipped model, a folder with card.json and
            weights.safetensors, or the path of such a weights file.

    Raises:
        ModelError: unknown name, invalid card, weights that are not those of the card or that do
            not fit its configuration.
    """
    from gigavim.model.weights import read_safetensors

    folder = _model_folder(name_or_path)
    card = read_card(folder / CARD_NAME)
    weights = folder / WEIGHTS_NAME
    _check_sha256(weights, card)
    state = read_safetensors(weights)
    return filled(card, state, weights), card


def filled(card: ModelCard, state: dict[str, "Tensor"], source: Path) -> "SegmentationModel":
    """Make the model of a card with the weights of a file; `ModelError` where they do not fit."""
    from gigavim.model.segmentation import SegmentationModel
    from gigavim.model.vim import Vim
    from gigavim.model.weights import fill, tie_rates

    encoder = Vim(card.config)
    model = SegmentationModel(encoder, len(card.classes), card.head, card.head_width)
    fill(model, state, source=source)
    if card.tied_rates:
        tie_rates(model)
    return model.eval()


def save_model(
    folder: Path, model: "SegmentationModel", card: ModelCard, *, half: bool = False
) -> ModelCard:
    """Write a model's card and weights into a folder, which is created if need be.

    `half` stores float16, which loading turns into float32 again: half the size.

    Either file appears whole or not at all, the card last; a card never stands beside other weights
    unnoticed, as it names their SHA-256.

    Returns:
        The card as written, with `sha256` filled in.

    Raises:
        ModelError: the card is not that of the model.
        OutputError: the folder cannot be written.
    """
    import torch
    from safetensors.torch import save

    if model.encoder.config != card.config:
        raise ModelError(f"{folder}: the card's config is not that of the model")
    if (model.head_kind, model.head_width) != (card.head, card.head_width):
        raise ModelError(f"{folder}: the card's head is not that of the model")
    if model.head.classes != len(card.classes):
        raise ModelError(
            f"{folder}: the card names {len(card.classes)} classes, "
            f"the model has {model.head.classes}"
        )
    dtype = torch.float16 if half else torch.float32
    state = {
        name: tensor.detach().to(dtype).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    blob = save(state, metadata={"format": "pt"})
    card = card.model_copy(update={"sha256": hashlib.sha256(blob).hexdigest()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / WEIGHTS_NAME, blob)
        _write_whole(folder / CARD_NAME, card.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise OutputError(f"{folder}: the model cannot be saved ({error.strerror})") from error
    return card


def _shipped_folders() -> list[Path]:
    with contextlib.suppress(ModuleNotFoundError):
        root = Path(str(resources.files("gigavim") / "models"))
        if root.is_dir():
            return sorted(card.parent for card in root.glob(f"*/{CARD_NAME}"))
    return []


def _model_folder(name_or_path: str | Path) -> Path:
    shipped = {folder.name: folder for folder in _shipped_folders()}
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_file():
        if path.name == CARD_NAME or path.name == WEIGHTS_NAME:
            return path.parent
        raise ModelError(
            f"{path}: a model is a folder with {CARD_NAME} and {WEIGHTS_NAME}, "
            f"or one of these two files"
        )
    near = difflib.get_close_matches(str(name_or_path), shipped, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = ", ".join(shipped) or "none"
    raise ModelError(
        f"no model is called {str(name_or_path)!r}, nor is there such a file or folder; {hint}"
        f"shipped models: {known}"
    )


def _check_sha256(weights: Path, card: ModelCard) -> None:
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{weights}: cannot be read ({error.strerror})") from error
    if found != card.sha256:
        raise ModelError(
            f"{weights}: SHA-256 is {found}, but the card beside it belongs to "
            f"{card.sha256 or 'no weights'}; copy both files anew from the same model"
        )


def _write_whole(path: Path, blob: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
