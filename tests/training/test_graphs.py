"""Recorded steps give what plain ones give."""

import pytest
import torch
from torch import nn

from gigavim.training.graphs import Gradients


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def objective(self, batch, every, generator):
        images, labels = batch
        noise = torch.rand(images.shape, generator=generator, device=images.device)
        logits = self.linear(images * (noise < 0.7)) / every
        return nn.functional.cross_entropy(logits, labels)


def outcomes(model, device, *, plain):
    gradients = Gradients(model.objective, list(model.parameters()))
    if plain:
        gradients._records = False
    found = []
    for step in range(12):
        draw = torch.Generator(device).manual_seed(step)
        count = (4, 7)[step % 2]
        images = torch.randn(count, 5, generator=draw, device=device)
        labels = torch.randint(3, (count,), generator=draw, device=device)
        generator = torch.Generator(device).manual_seed(step + (1 if plain else 0))
        loss, grads = gradients((images, labels), 1 + step // 6, generator)
        found.append([loss.clone(), *(g.clone() for g in grads)])
    return found


@pytest.mark.gpu
def test_recorded_steps_give_what_plain_ones_give():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = Noisy().cuda()
    recorded, plain = (outcomes(model, "cuda", plain=p) for p in (False, True))
    for one, other in zip(recorded, plain, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_on_a_cpu_steps_are_plain_and_unused_parameters_have_zero_gradients():
    model = Noisy()
    names = [name for name, _ in model.named_parameters()]
    for loss, *grads in outcomes(model, "cpu", plain=False):
        found = dict(zip(names, grads, strict=True))
        assert loss > 0
        assert not found["unused"].any()
        assert found["linear.weight"].any()
