import pytest
import torch

from gigavim.errors import ModelError
from gigavim.model.config import VimConfig
from gigavim.model.heads import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.tokens.order import ScanOrder
from gigavim.training import loop
from gigavim.training.nuclei import Canvases

ORDER = ScanOrder.parse("blocks(4)")
SCHEDULE = loop.Schedule(
    steps=6, blocks=4, largest_blocks=4, warmup=2, peak_rate=5e-3, half_depth=0.0, average=0.5
)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = VimConfig(
        d_model=16, depth=2, patch_px=8, stride_px=8, class_token="none", pooling="mean",
        position="block", grid_hw=(4, 4),
    )  # fmt: skip
    return SegmentationModel(Vim(config), 3)


def run(fields, schedule=SCHEDULE, checkpoint=None, until=None):
    model, losses = tiny_model(), []
    progress = loop.resume(checkpoint, model, schedule) if checkpoint else None
    progress = loop.train(
        model,
        ORDER,
        Canvases(fields, 32),
        schedule,
        progress=progress,
        on_step=lambda progress, loss: losses.append(loss),
    )
    return model, progress, losses


def test_training_lowers_the_loss_and_repeats(synthetic_fields):
    first, _, losses = run(synthetic_fields)
    second, _, again = run(synthetic_fields)
    assert losses == again
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    batch = Canvases(synthetic_fields, 32)([(2, 2)] * 2, torch.Generator().manual_seed(99))
    with torch.no_grad():
        before, after = (
            loop.loss_of(model, batch, ORDER, SCHEDULE).item() for model in (tiny_model(), first)
        )
    assert after < before


def test_a_resumed_run_is_the_same_run(synthetic_fields, tmp_path):
    whole, _, _ = run(synthetic_fields)
    saved = tmp_path / "checkpoint.pt"
    model = tiny_model()

    class Stop(Exception):
        pass

    def stop_half_way(progress, loss):
        if progress.step == 3:
            loop.save(saved, model, progress)
            raise Stop

    with pytest.raises(Stop):
        loop.train(model, ORDER, Canvases(synthetic_fields, 32), SCHEDULE, on_step=stop_half_way)
    resumed, progress, _ = run(synthetic_fields, checkpoint=saved)
    assert progress.step == SCHEDULE.steps
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_bad_gradient_names_its_layer(synthetic_fields):
    model = tiny_model()
    with torch.no_grad():
        model.head.linear.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"step 0: .* not finite in .*encoder"):
        loop.train(model, ORDER, Canvases(synthetic_fields, 32), SCHEDULE)


def test_what_decays():
    model = tiny_model()
    decayed, plain = loop.decay_groups(model, 0.05)
    ids = {id(p) for p in plain["params"]}
    free = {name for name, p in model.named_parameters() if id(p) in ids}
    for name, parameter in model.named_parameters():
        expected = parameter.ndim < 2 or any(
            part in name for part in ("A_log", "A_b_log", "conv1d", "pos_embed")
        )
        assert (name in free) == expected, name
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_patch_labels_follow_the_scan():
    rows, cols = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    cell = (rows // 8) * 8 + cols // 8
    patches = loop.patch_labels(cell[None], 8, ORDER)
    assert patches.shape == (64, 64)
    assert (patches == patches[:, :1]).all()
    assert patches[:4, 0].tolist() == [0, 1, 2, 3]
    assert patches[4, 0] == 8  # the second row of the first block of 4 x 4 tokens


def test_rate_warms_up_and_cools_down():
    schedule = loop.Schedule(steps=1000)
    assert schedule.rate(0) < schedule.rate(50) < schedule.rate(99)
    assert schedule.rate(100) == pytest.approx(schedule.peak_rate)
    assert schedule.rate(999) < 0.02 * schedule.peak_rate


def test_canvases_grow():
    schedule = loop.Schedule(steps=1000)
    generator = torch.Generator().manual_seed(0)
    early = [schedule.canvas_blocks(10, generator) for _ in range(300)]
    late = [schedule.canvas_blocks(900, generator) for _ in range(300)]
    assert max(early) == 16
    assert max(late) == 64
    for blocks in (1, 2, 8, 64):
        rows, cols = loop.canvas_shape(blocks, generator)
        assert rows * cols == blocks
        assert max(rows, cols) <= 4 * min(rows, cols)
