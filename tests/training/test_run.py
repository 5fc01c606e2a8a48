"""A whole training: what it leaves, how it stops and goes on."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from gigavim.model.encoder import read_encoder, write_encoder
from gigavim.training import run as runs
from gigavim.training.pack import read_pictures
from gigavim.training.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(pictures_folder, recipe):
    return list(read_pictures(pictures_folder, recipe))


def changed(recipe, **schedule):
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update=schedule)})


def test_training_stops_where_it_gets_no_better(tmp_path, pictures, recipe):
    short = changed(recipe, steps=50, validate_every=2, patience=2, peak_rate=1e-12)
    result = Run(short, pictures, tmp_path, CPU).train()
    assert (result.step, result.steps) == (6, 50)  # best at 2, no better at 4 and 6
    card = json.loads((tmp_path / "model/card.json").read_text())
    assert "those of step 2, best in dice:nuclei" in card["training"]["split"]


def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path, pictures, recipe, monkeypatch):
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
    whole = Run(recipe, pictures, tmp_path / "whole", CPU).train()
    killed = Run(recipe, pictures, tmp_path / "killed", CPU)
    note = killed._on_step

    def die(progress, loss, tokens):
        note(progress, loss, tokens)
        if progress.step == 4:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(killed, "_on_step", die)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert not (tmp_path / "killed/model").exists()
    again = Run(recipe, pictures, tmp_path / "killed", CPU).train()
    assert again.metrics == whole.metrics
    one, other = (tmp_path / f"{name}/model/weights.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_an_interrupted_training_keeps_its_step(tmp_path, pictures, recipe, monkeypatch):
    whole = Run(recipe, pictures, tmp_path / "whole", CPU).train()
    stopped = Run(recipe, pictures, tmp_path / "stopped", CPU)
    note = stopped._on_step

    def interrupt(progress, loss, tokens):
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)
        return note(progress, loss, tokens)

    monkeypatch.setattr(stopped, "_on_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) == before
    again = Run(recipe, pictures, tmp_path / "stopped", CPU)
    assert again.progress.step == 2
    assert again.train().metrics == whole.metrics


def test_numbers_go_to_tensorboard(tmp_path, pictures, recipe):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Run(recipe, pictures, tmp_path, CPU).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    wanted = {row["step"]: row["val_nuclei_iou"] for row in rows if "val_nuclei_iou" in row}
    found = {event.step: event.value for event in events.Scalars("val_nuclei_iou")}
    assert found == pytest.approx(wanted, abs=1e-5)
    assert {"loss", "rate", "tokens_per_second"} <= set(events.Tags()["scalars"])


def test_places_in_micrometres_are_strewn_over_a_slide(pictures, recipe, tmp_path):
    encoder = replace(recipe.model.encoder, position="sincos", token_um=4.0)
    model = recipe.model.model_copy(update={"encoder": encoder})
    run = Run(recipe.model_copy(update={"model": model}), pictures, tmp_path, CPU)
    met = []
    tokens = run.model.encoder.tokens

    def note(*arguments, origin_um, **options):
        met.append([float(value) for value in origin_um])
        return tokens(*arguments, origin_um=origin_um, **options)

    run.model.encoder.tokens = note
    run.train()
    assert len({tuple(origin) for origin in met}) == recipe.schedule.steps
    assert max(max(origin) for origin in met) > 1e4


def test_an_encoder_or_a_model_starts_another(tmp_path, pictures, recipe, caplog):
    first = Run(recipe, pictures, tmp_path / "first", CPU).train()
    source = read_encoder(first.model)
    again = recipe.model.model_copy(update={"encoder_weights": str(first.model), "head": "fpn"})
    started = Run(
        recipe.model_copy(update={"model": again}), pictures, tmp_path / "second", CPU
    ).model.encoder
    for name, value in source.state_dict().items():
        torch.testing.assert_close(started.state_dict()[name], value, atol=5e-3, rtol=0)
    assert "ratio" not in caplog.text
    source.layers[0].mixer.A_log.data[:, 3] += 0.5  # as published weights have it
    write_encoder(tmp_path / "free", source, name="free", source="test")
    free = recipe.model.model_copy(update={"encoder_weights": str(tmp_path / "free")})
    run = Run(recipe.model_copy(update={"model": free}), pictures, tmp_path / "third", CPU)
    assert "free are not in the ratio" in caplog.text
    run.train()
    card = json.loads((tmp_path / "third/model/card.json").read_text())
    assert card["training"]["script"] == "gigavim train tiny --weights free --steps 6"
