from dataclasses import replace

import pytest
import torch

from gigavim.errors import ModelError, SettingsError
from gigavim.training import loop
from gigavim.training.atlas import Atlas
from gigavim.training.canvas import Canvases
from gigavim.training.pack import read_pictures
from gigavim.training.run import new_model
from gigavim.training.schedule import Pace, Schedule, canvas_shape

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def canvases(pictures_folder, recipe):
    return Canvases(Atlas(list(read_pictures(pictures_folder, recipe)), CPU), recipe)


def changed(canvases, **schedule):
    recipe = canvases.recipe
    section = recipe.schedule.model_copy(update=schedule)
    return Canvases(canvases.atlas, recipe.model_copy(update={"schedule": section}))


def objective(model, recipe):
    return loop.segmentation(loop.vim_forward(model, recipe), recipe)


def trained(canvases, on_step=None, model=None, progress=None):
    model = model or new_model(canvases.recipe)
    progress = progress or loop.start(model, canvases.recipe)
    losses = []

    def note(progress, loss, tokens):
        losses.append(loss)
        return on_step is not None and on_step(progress)

    loop.train(model, canvases, progress, objective(model, canvases.recipe), on_step=note)
    return model, progress, losses


def same(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return [name for (name, a), b in pairs if not torch.equal(a, b)] == []


@pytest.mark.parametrize("workers", [1, 2])
def test_training_lowers_the_loss_and_repeats(canvases, workers):
    canvases = changed(canvases, workers=workers, drop_path=0.1)
    first, _, losses = trained(canvases)
    second, _, again = trained(canvases)
    assert losses == again
    assert same(first, second)
    batch = canvases.draw((2, 2), 2, torch.Generator().manual_seed(99))
    with torch.no_grad():
        before, after = (
            objective(model, canvases.recipe)(batch, 1, None).item()
            for model in (new_model(canvases.recipe), first)
        )
    assert after < before


@pytest.mark.parametrize(
    "changes",
    [
        {"class_token": "middle", "pooling": "class"},
        {"class_token": "double", "pooling": "class"},
        {"bidirectional": "layer_pairs", "divide_out": False},
        {"bidirectional": "v1", "divide_out": False},
        {"bidirectional": "none", "divide_out": False},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_variants_of_the_paper_train(canvases, changes):
    encoder = replace(canvases.recipe.model.encoder, **changes)
    section = canvases.recipe.model.model_copy(update={"encoder": encoder, "head": "fpn"})
    other = Canvases(canvases.atlas, canvases.recipe.model_copy(update={"model": section}))
    before = new_model(other.recipe).state_dict()
    model, _, losses = trained(other)
    assert all(torch.isfinite(torch.tensor(losses)))
    for name, value in model.state_dict().items():
        if "encoder.layers" in name:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("head", ["fpn", "upernet", "segmenter"])
def test_decoders_learn_the_pictures(canvases, head):
    parts = {
        "model": canvases.recipe.model.model_copy(update={"head": head}),
        "schedule": canvases.recipe.schedule.model_copy(update={"steps": 24}),
    }
    other = Canvases(canvases.atlas, canvases.recipe.model_copy(update=parts))
    _, _, losses = trained(other)
    assert sum(losses[-6:]) < sum(losses[:6])


def test_a_resumed_run_is_the_same_run(canvases, tmp_path):
    whole, expected, _ = trained(canvases)
    model, progress, _ = trained(canvases, on_step=lambda p: p.step == 3)
    loop.save(tmp_path / "checkpoint.pt", model, progress)
    again = new_model(canvases.recipe)
    progress = loop.resume(tmp_path / "checkpoint.pt", again, canvases.recipe)
    assert progress.step == 3
    _, progress, _ = trained(canvases, model=again, progress=progress)
    assert progress.step == canvases.recipe.schedule.steps
    assert same(whole, again)
    for name, value in expected.average.items():
        assert torch.equal(progress.average[name], value), name


def test_a_checkpoint_of_another_model_is_refused(canvases, tmp_path):
    model = torch.nn.Linear(2, 2)
    path = tmp_path / "checkpoint.pt"
    loop.save(path, model, loop.start(model, canvases.recipe))
    with pytest.raises(SettingsError, match=r"checkpoint\.pt: not a checkpoint of this recipe"):
        loop.resume(path, new_model(canvases.recipe), canvases.recipe)


def test_a_checkpoint_with_other_groups_held_out_is_refused(canvases, tmp_path):
    model, path = new_model(canvases.recipe), tmp_path / "checkpoint.pt"
    loop.save(path, model, loop.start(model, canvases.recipe))
    other = canvases.recipe.split.model_copy(update={"validation_groups": ("a",)})
    changed = canvases.recipe.model_copy(update={"split": other})
    with pytest.raises(SettingsError, match=r"validation_groups was \['b'\], is now \['a'\]"):
        loop.resume(path, new_model(changed), changed)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SettingsError, match="not a checkpoint"):
        loop.resume(path, new_model(canvases.recipe), canvases.recipe)


@pytest.mark.parametrize("layer", ["encoder.layers.0.mixer.out_proj", "encoder.layers.1.norm"])
def test_a_bad_gradient_names_its_layer(canvases, layer):
    model = new_model(canvases.recipe)

    def spoil(grad):
        return torch.full_like(grad, float("nan"))

    model.get_submodule(layer).weight.register_hook(spoil)
    with pytest.raises(ModelError, match=f"step 0: gradients are not finite.*{layer}"):
        trained(canvases, model=model)


def test_recomputing_changes_nothing(canvases):
    batch = canvases.draw((1, 2), 2, torch.Generator().manual_seed(5))
    grads = []
    for tokens in (1, 1_000_000):
        recipe = changed(canvases, recompute_tokens=tokens, drop_path=0.5).recipe
        model = new_model(recipe)
        generator = torch.Generator().manual_seed(1)
        objective(model, recipe)(batch, 1, generator).backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_what_decays(canvases):
    model = new_model(canvases.recipe)
    decayed, plain = loop.decay_groups(model, 0.05)
    ids = {id(p) for p in plain["params"]}
    free = {name for name, p in model.named_parameters() if id(p) in ids}
    for name, parameter in model.named_parameters():
        expected = parameter.ndim < 2 or any(
            part in name for part in ("A_log", "A_b_log", "conv1d", "pos_embed")
        )
        assert (name in free) == expected, name
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_rate_warms_up_and_cools_down(recipe):
    schedule = Schedule(recipe.schedule.model_copy(update={"warmup_steps": 100}), 1000)
    assert schedule.rate(0) < schedule.rate(50) < schedule.rate(99)
    assert schedule.rate(100) == pytest.approx(schedule.recipe.peak_rate)
    assert schedule.rate(999) < 0.02 * schedule.recipe.peak_rate


def test_canvases_grow(recipe):
    update = {"largest_blocks": 64, "batch_blocks": 8}
    schedule = Schedule(recipe.schedule.model_copy(update=update), 1000)
    generator = torch.Generator().manual_seed(0)
    early = [schedule.canvas_blocks(10, generator) for _ in range(300)]
    late = [schedule.canvas_blocks(900, generator) for _ in range(300)]
    assert max(early) == 16
    assert max(late) == 64
    for blocks in (1, 2, 8, 64):
        rows, cols = canvas_shape(blocks, generator)
        assert rows * cols == blocks
        assert max(rows, cols) <= 4 * min(rows, cols)


@pytest.mark.parametrize("growth", [1.0, 3.0])
def test_a_plan_ends_with_its_time(recipe, growth):
    """Steps of longer canvases may take longer than their tokens say."""
    schedule = recipe.schedule.model_copy(update={"largest_blocks": 64, "batch_blocks": 16})

    def seconds(blocks):
        return 0.1 * max(blocks, 16) / 16 * (growth if blocks > 16 else 1)

    pace, generator = Pace(schedule), torch.Generator().manual_seed(0)
    step, spent, steps, budget = 0, 0.0, 10**9, 400.0
    while step < steps and spent < budget:
        blocks = Schedule(schedule, steps).canvas_blocks(step, generator)
        step, spent = step + 1, spent + seconds(blocks)
        pace.note(blocks, seconds(blocks))
        if pace.is_known and step % 60 == 0 and step < 0.9 * steps:
            steps = pace.steps(step, budget - spent, late=step > steps / 2)
    assert spent == pytest.approx(budget, rel=0.05)
    assert step >= 0.97 * steps


class Clock:
    """Stands in for the module `time`: each step takes as long by it, whatever the machine does."""

    def __init__(self, step_seconds):
        self.now, self.step_seconds = 0.0, step_seconds

    def monotonic(self):
        self.now += self.step_seconds
        return self.now


@pytest.mark.parametrize("step_seconds", [0.03, 0.07])
def test_minutes_are_kept_and_the_end_is_reached(canvases, monkeypatch, step_seconds):
    monkeypatch.setattr(loop, "time", Clock(step_seconds))
    canvases = changed(canvases, max_minutes=0.08)
    _, progress, losses = trained(canvases)
    assert 0.9 * 4.8 < progress.seconds <= 4.8 + step_seconds
    assert progress.step == progress.steps == len(losses)
    schedule = canvases.recipe.schedule
    rate = progress.optimizer.param_groups[0]["lr"]
    assert rate < 2 * schedule.final_rate * schedule.peak_rate  # it came down as planned


def test_one_step_that_takes_all_the_time_is_the_last(canvases, monkeypatch):
    monkeypatch.setattr(loop, "time", Clock(100.0))
    _, progress, losses = trained(changed(canvases, max_minutes=0.08))
    assert progress.step == progress.steps == len(losses) == 1
