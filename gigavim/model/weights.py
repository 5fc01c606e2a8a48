"""State dicts from files, safely, and into modules, strictly."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gigavim.errors import ModelError

NAMES_SHOWN = 5


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file; raises `ModelError` where that fails."""
    if path.is_dir():
        raise ModelError(f"{path}: a folder; give the .safetensors file in it, or --model {path}")
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: the weights are not there") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from None


@torch.no_grad()
def fill(module: nn.Module, state: dict[str, Tensor], *, source: Path) -> None:
    """Copy a state dict into a module.

    Raises `ModelError` naming missing and unknown tensors, and those of another shape, of which
    nothing is copied then.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise ModelError(f"{source}: tensors are missing: {_some(missing)}")
    unknown = sorted(state.keys() - wanted.keys())
    if unknown:
        raise ModelError(f"{source}: tensors that the model has not: {_some(unknown)}")
    for name, parameter in wanted.items():
        found = state[name]
        if found.shape != parameter.shape:
            raise ModelError(
                f"{source}: {name} has shape {tuple(found.shape)}, "
                f"but the model's is {tuple(parameter.shape)}"
            )
        if not found.is_floating_point() or not torch.isfinite(found).all():
            raise ModelError(f"{source}: {name} holds values that are no finite numbers")
    module.load_state_dict(state)


@torch.no_grad()
def untied(module: nn.Module) -> float:
    """How far decay rates are from the ratio 1 : 2 : ... : N at most, as a logarithm."""
    worst = 0.0
    for name, parameter in module.named_parameters():
        if name.endswith(("A_log", "A_b_log")):
            states = torch.arange(1.0, parameter.shape[1] + 1, device=parameter.device).log()
            rest = parameter - states
            worst = max(worst, float((rest - rest.mean(1, keepdim=True)).abs().max()))
    return worst


@torch.no_grad()
def tie_rates(module: nn.Module) -> None:
    """Bring the decay rates of a channel's states to the ratio 1 : 2 : ... : N exactly.

    Kernels for CPUs look for this ratio; training and half precision round it.
    """
    for name, parameter in module.named_parameters():
        if name.endswith(("A_log", "A_b_log")):
            states = torch.arange(1.0, parameter.shape[1] + 1, device=parameter.device).log()
            parameter.copy_((parameter - states).mean(1, keepdim=True) + states)


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
