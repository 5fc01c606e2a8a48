"""Training in several processes (torchrun): each draws its own canvases, gradients are averaged."""

import os
from collections.abc import Sequence

import torch
from torch import nn


class Ranks:
    """This process among those of a training; one alone where torchrun has not started it."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self.device = int(os.environ.get("WORLD_SIZE", "1")), 0, device
        if self.count > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def average_grads(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.count == 1:
            return
        import torch.distributed as dist

        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.count
        for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def agree(self, value: float) -> float:
        """The mean of a number over the processes, so that all decide alike."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return float(shared) / self.count

    def leave(self) -> None:
        """End the group; the other processes wait for the first one's last work no longer."""
        if self.count > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
