"""The published model's numbers on random weights, see tests/data/README.md."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gigavim.engine.images import ImageEncoder
from gigavim.model.config import VimConfig
from gigavim.model.vim import Vim
from gigavim.training.encode import encode
from gigavim_kernels import selftest

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
GATE = 2e-5
GRADIENT_GATE = 1e-5
NOT_MODELS = ("posembed", "grads")


def _whole_files() -> list[Path]:
    root = os.environ.get("GIGAVIM_TEST_DATA")
    folder = Path(root).parent / "reference" / "golden" if root else None
    return sorted(folder.glob("*.safetensors")) if folder and folder.is_dir() else []


CASES = [
    path
    for path in [*sorted(GOLDEN.glob("*.safetensors")), *_whole_files()]
    if not any(part in path.name for part in NOT_MODELS)
]


def _name(path: Path) -> str:
    return f"{path.stem}-{'given' if path.parent == GOLDEN else 'whole'}"


def _has_logits(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return {"input", "logits"} <= set(file.keys())


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _config(settings: dict, weights: dict[str, torch.Tensor]) -> VimConfig:
    if not settings["if_cls_token"]:
        class_token = "none"
    elif settings.get("use_double_cls_token"):
        class_token = "double"
    else:
        class_token = "middle" if settings.get("use_middle_cls_token") else "head"
    bidirectional = settings["bimamba_type"]
    patch_px = settings["patch_size"]
    stride_px = settings.get("stride", patch_px)
    side = (settings["img_size"] - patch_px) // stride_px + 1
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    return VimConfig(
        d_model=settings["embed_dim"],
        depth=len(layers) or settings["depth"],
        patch_px=patch_px,
        stride_px=stride_px,
        class_token=class_token,
        pooling="mean" if class_token == "none" else "class",
        bidirectional="layer_pairs" if settings.get("if_bidirectional") else bidirectional,
        divide_out=settings["if_divide_out"],
        grid_hw=(side, side),
        num_classes=settings["num_classes"] if "head.weight" in weights else 0,
    )


def _load(path: Path) -> tuple[Vim, dict[str, torch.Tensor]]:
    vectors = load_file(path)
    weights = {
        name.removeprefix("sd."): value
        for name, value in vectors.items()
        if name.startswith("sd.") and ".fpn" not in name
    }
    with safe_open(path, "pt") as file:
        model = Vim(_config(json.loads(file.metadata()["kwargs"]), weights))
    unknown = model.load_state_dict(weights, strict="_part" not in path.stem).unexpected_keys
    assert not unknown
    return model, vectors


def _errors(path: Path) -> dict[str, float]:
    model, vectors = _load(path)
    errors = {}
    with torch.no_grad():
        if "input" in vectors:
            errors["tokens"] = _relative(model.tokens(vectors["input"]), vectors["tokens"])
        encoded, taps = model.encode_with_taps(vectors["tokens"])
        for i, tap in enumerate(taps):
            if f"block.{i}.hidden" in vectors:
                errors[f"stream {i}"] = _relative(tap.stream, vectors[f"block.{i}.residual"])
                errors[f"branch {i}"] = _relative(tap.branch, vectors[f"block.{i}.hidden"])
        if "logits" in vectors:
            errors["final norm"] = _relative(encoded, vectors["final_norm"])
            errors["features"] = _relative(model.pool(encoded), vectors["features"])
            logits = model.head(vectors["features"])
            errors["head"] = _relative(logits, vectors["logits"])
            if "input" in vectors:
                errors["logits"] = _relative(model(vectors["input"]), vectors["logits"])
    return errors


@pytest.mark.parametrize("path", CASES, ids=_name)
def test_every_stage_meets_the_published_numbers(path):
    errors = _errors(path)
    assert errors
    assert {stage: error for stage, error in errors.items() if not error <= GATE} == {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("path", [p for p in CASES if _has_logits(p)], ids=_name)
def test_the_kernels_of_a_device_meet_the_published_logits(path, where, precision):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, vectors = _load(path)
    found = ImageEncoder(model, device=where, precision=precision)(vectors["input"])
    gate = GATE
    if precision == "bf16":  # random weights magnify rounding: what plain torch does with them
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = model(vectors["input"]).float()
        gate = max(2e-2, 1.25 * _relative(rounded, vectors["logits"]))
    assert _relative(found, vectors["logits"]) <= gate


@pytest.mark.gpu
def test_gradients_on_a_gpu_meet_the_published_ones():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, _ = _load(GOLDEN / "tiny_s16_mid_div2_part.safetensors")
    model.to("cuda")
    wanted = load_file(GOLDEN / "tiny_s16_mid_div2_grads.safetensors")
    images = wanted["input"].cuda().requires_grad_()
    with selftest.exact_products():
        logits = model.classify(encode(model, model.tokens(images)))
        (logits * wanted["cotangent"].cuda()).sum().backward()
    found = {"input": images.grad} | {name: p.grad for name, p in model.named_parameters()}
    errors = {name: _relative(value.cpu(), wanted[f"grad.{name}"]) for name, value in found.items()}
    assert _relative(logits.cpu(), wanted["logits"]) <= GATE
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_GATE} == {}


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_logits_and_gradients_meet_the_published_ones(checkpoint_blocks):
    model, _ = _load(GOLDEN / "tiny_s16_mid_div2_part.safetensors")
    model.checkpoint_blocks = checkpoint_blocks
    wanted = load_file(GOLDEN / "tiny_s16_mid_div2_grads.safetensors")
    images = wanted["input"].requires_grad_()
    logits = model(images)
    (logits * wanted["cotangent"]).sum().backward()
    found = {"input": images.grad} | {name: p.grad for name, p in model.named_parameters()}
    assert _relative(logits, wanted["logits"]) <= GATE
    assert {f"grad.{name}" for name in found} == {n for n in wanted if n.startswith("grad.")}
    errors = {name: _relative(value, wanted[f"grad.{name}"]) for name, value in found.items()}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_GATE} == {}


def _swap_b_and_c(model: Vim) -> None:
    for layer in model.layers:
        rows = layer.mixer.x_proj.weight.data
        rank, states = model.config.rank, model.config.d_state
        b, c = rows[rank : rank + states].clone(), rows[rank + states :].clone()
        rows[rank : rank + states], rows[rank + states :] = c, b


def _drop_skip(model: Vim) -> None:
    for layer in model.layers:
        layer.mixer.D.data.zero_()
        layer.mixer.D_b.data.zero_()


def _swap_x_and_z(model: Vim) -> None:
    for layer in model.layers:
        weight = layer.mixer.in_proj.weight
        weight.data = weight.data.roll(len(weight) // 2, 0)


def _class_embedding_at_slot_0(model: Vim) -> None:
    table = model.pos_embed.data[0]
    place = (len(table) - 1) // 2
    model.pos_embed.data[0] = torch.cat((table[place:][:1], table[:place], table[place + 1 :]))


def _swap_directions(model: Vim) -> None:
    for layer in model.layers:
        mixer = layer.mixer
        mixer.conv1d, mixer.conv1d_b = mixer.conv1d_b, mixer.conv1d


@pytest.mark.parametrize(
    "mistake",
    [_swap_b_and_c, _drop_skip, _swap_x_and_z, _class_embedding_at_slot_0, _swap_directions],
)
def test_a_mistake_moves_the_logits_far_beyond_the_gate(mistake: Callable[[Vim], None]):
    model, vectors = _load(GOLDEN / "tiny_s16_mid_div2_part.safetensors")
    images = load_file(GOLDEN / "tiny_s16_mid_div2_grads.safetensors")["input"]
    with torch.no_grad():
        mistake(model)
        assert _relative(model(images), vectors["logits"]) > 0.28
