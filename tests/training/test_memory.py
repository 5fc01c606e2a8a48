"""`--max-gpu-memory`: batches are split, results stay, and what cannot be had is said."""

from dataclasses import replace

import pytest
import torch

from gigavim.errors import ResourceError
from gigavim.training import loop
from gigavim.training.atlas import Atlas
from gigavim.training.canvas import Canvases
from gigavim.training.graphs import Gradients
from gigavim.training.memory import Budget, Split, saved_bytes
from gigavim.training.pack import read_pictures
from gigavim.training.recipe import load_recipe
from gigavim.training.run import new_model

CPU = torch.device("cpu")
WAYS = {
    "recomputed": Split(recompute=True),
    "strips": Split(strip_rows=3),
    "groups": Split(group=3),
    "all": Split(recompute=True, strip_rows=4, group=2),
}


@pytest.fixture(scope="module", params=["linear", "fpn", "upernet", "segmenter"])
def deep(request, recipe):
    encoder = replace(recipe.model.encoder, depth=8)
    section = recipe.model.model_copy(update={"encoder": encoder, "head": request.param})
    return recipe.model_copy(update={"model": section})


def gradients_of(recipe, model, batch, way, **schedule):
    class Fixed(Budget):
        def split(self, tokens, count):
            return way

    section = recipe.schedule.model_copy(update=schedule)
    recipe = recipe.model_copy(update={"schedule": section})
    forward = loop.vim_forward(model, recipe, Fixed(model, recipe, CPU))
    found = Gradients(loop.segmentation(forward, recipe), list(model.parameters()))
    return found(batch, 1, torch.Generator().manual_seed(3))


def a_batch(pictures_folder, recipe, blocks_hw=(2, 4), count=3):
    canvases = Canvases(Atlas(list(read_pictures(pictures_folder, recipe)), CPU), recipe)
    return canvases.draw(blocks_hw, count, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_gradients(deep, pictures_folder, way, drop_path):
    model, batch = new_model(deep), a_batch(pictures_folder, deep)
    loss, grads = gradients_of(deep, model, batch, Split(), drop_path=drop_path)
    other, others = gradients_of(deep, model, batch, WAYS[way], drop_path=drop_path)
    assert float(other) == pytest.approx(float(loss), rel=1e-6)
    for one, two in zip(grads, others, strict=True):
        assert (one - two).norm() <= 1e-4 * one.norm() + 1e-9


def test_half_of_the_layers_can_be_grouped(deep, pictures_folder):
    model, batch = new_model(deep), a_batch(pictures_folder, deep)
    results = []
    for way in (Split(), Split(group=3)):
        budget = Budget(model, deep, CPU)
        budget.split = lambda tokens, count, way=way: way
        forward = loop.vim_forward(model, deep, budget)
        results.append(forward(batch[0], 2, None))
    assert torch.allclose(*results, atol=1e-6)


def test_parts_are_averaged_by_their_canvases(deep, pictures_folder):
    model, batch = new_model(deep), a_batch(pictures_folder, deep)
    tokens = batch[1][0].numel() // 64
    budget = Budget(model, deep, CPU)
    budget.limit = budget.needed(tokens, 3, Split(parts=2, recompute=True))
    assert budget.split(tokens, 3).parts == 2
    objective = loop.segmentation(loop.vim_forward(model, deep, budget), deep)
    found = Gradients(objective, list(model.parameters()))
    drawn = loop.Drawn(batch, 8, torch.Generator().manual_seed(1))
    loss, grads = loop._in_parts(found, drawn, 1, budget)
    parts = [gradients_of(deep, model, [t[s] for t in batch], Split())
             for s in (slice(0, 2), slice(2, 3))]  # fmt: skip
    assert float(loss) == pytest.approx(float(parts[0][0]) * 2 / 3 + float(parts[1][0]) / 3)
    for place, grad in enumerate(grads):
        mean = parts[0][1][place] * 2 / 3 + parts[1][1][place] / 3
        assert torch.allclose(grad, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["histo-nuclei", "histo-nuclei-nano", "aerial-landcover"])
def test_less_memory_makes_slower_ways_and_at_last_a_refusal(name):
    recipe = load_recipe(name, batch_blocks=256)
    budget = Budget(new_model(recipe), recipe, CPU, taken=1_000_000)
    tokens, count = 16384, 4
    plain = budget.taken + budget.needed(tokens, count, Split())
    seen = []
    for limit in (plain * 0.999**k for k in range(0, 6000, 50)):
        budget.limit = int(limit)
        try:
            split = budget.split(tokens, count)
        except ResourceError as error:
            message = str(error)
            break
        assert budget.taken + budget.needed(tokens, count, split) <= limit
        seen.append((split.parts, split.strip_rows is not None, split.group))
    assert seen == sorted(seen)
    assert {parts for parts, _, _ in seen} == {1, 2, 4}
    assert seen[-1][2] > 1
    blocks = int(message.partition("largest_blocks = ")[2].split()[0])
    assert "raise --max-gpu-memory" in message
    assert blocks < tokens // 256
    budget.split(blocks * 256, 256 // blocks)  # what is promised fits
    with pytest.raises(ResourceError):
        budget.split(2 * blocks * 256, 128 // blocks)


def test_a_long_sequence_keeps_what_was_reckoned_with():
    recipe = load_recipe("histo-nuclei-nano")
    encoder = replace(recipe.model.encoder, depth=9, d_model=32)
    section = recipe.model.model_copy(update={"encoder": encoder})
    recipe = recipe.model_copy(update={"model": section})
    model = new_model(recipe)
    tokens = 80 * 256  # one sequence
    images = torch.rand(1, 3, 8 * 16 * 8, 10 * 16 * 8)
    labels = torch.randint(3, (1, *images.shape[2:]))
    kept = {}
    for tight in (False, True):
        budget = Budget(model, recipe, CPU)
        if tight:
            most = Split(recompute=True, strip_rows=16, group=3)
            budget.limit = budget.needed(tokens, 1, most)
        objective = loop.segmentation(loop.vim_forward(model, recipe, budget), recipe)
        split = budget.split(tokens, 1)
        with saved_bytes() as saved:
            loss = objective((images, labels), 1, None)
        assert torch.isfinite(loss)
        assert saved.total < budget.needed(tokens, 1, split)
        kept[tight] = saved.total
    assert kept[True] < 0.4 * kept[False]
    assert split.parts == 1
    assert split.group > 1
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in grads if g is not None)


def test_the_command_keeps_a_limit_or_says_what_fits(run, recipe_text, pictures_folder, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_text.replace("batch_blocks = 4", "batch_blocks = 32"))
    common = ["train", path, "--data", pictures_folder, "--device", "cpu"]
    plain = run(*common, "-o", "plain")
    assert plain.code == 0, plain.err
    tight = run(*common, "-o", "tight", "--max-gpu-memory", "4MB")
    assert tight.code == 0, tight.err
    assert "in 4 parts" in tight.err
    assert (tmp_path / "tight/model/card.json").exists()
    refused = run(*common, "-o", "no", "--max-gpu-memory", "300KB")
    assert refused.code == 1
    assert "raise --max-gpu-memory" in refused.err
    assert not (tmp_path / "no").exists()
    assert run(*common, "--max-gpu-memory", "lots").code == 2
