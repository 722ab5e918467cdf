"""What a run says of itself, by a clock that the test turns."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import flops
from blip3o_jax.errors import InputError
from blip3o_jax.presets import preset
from blip3o_jax.train import meter as meters
from blip3o_jax.train import steps
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.meter import Meter
from blip3o_jax.train.metrics import MetricWriter

CFG = TrainConfig(stage="joint", batch_size=4, num_steps=100)
STATE = steps.init_state(CFG, {"sana": {"kernel": jnp.ones(2)}})[0]
ROW = {"loss": 1.0, "skipped": 0, "skipped_in_a_row": 0, "learning_rate": 0.1}


@pytest.fixture
def clock(monkeypatch):
    """[seconds]: both clocks of the meter."""
    now = [1000.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meters.time, "time", lambda: now[0])
    return now


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_of_the_log_fits_a_terminal():
    """The first of what matters, whatever else there is; short lines show everything."""
    others = {f"grad_norm/{part}": 0.123456 for part in ("qwen3", "sana", "diffusion_connector")}
    numbers = {"accuracy_image": 0.96354, "ce": 0.2234, "flow": 0.192, **others, "skipped": 0.0}
    numbers |= {"loss": 0.41543618, "step_ms": 5469.3863, "images_per_s": 5.8507478}
    numbers |= {"goodput": 0.95116413, "learning_rate": 0.00087709504}
    line = meters.step_line(200, 336000, numbers, 61.2)
    assert len("00:00:00 " + line) <= 120
    assert line == (
        "step 200/336000 loss 0.4154 ce 0.2234 flow 0.192 accuracy_image 0.9635 "
        "images_per_s 5.851 eta 61 min"
    )
    few = {"grad_norm/sana": 0.5, "loss": 1.0, "skipped": 3.0}
    line = meters.step_line(1, 9, few, 0.4)
    assert line == "step 1/9 loss 1 grad_norm/sana 0.5 skipped 3 eta 0 min"


def test_where_the_time_goes(clock, tmp_path):
    batch = {"tokens": np.zeros((4, 116))}
    meter = Meter(CFG, tmp_path, 0, {"began": 990.0})  # ten seconds of setting up
    for step, loss in ((1, 1.0), (2, 3.0)):
        with meter.phase("data"):
            clock[0] += 1
        clock[0] += 4
        meter.add(step, batch, ROW | {"loss": loss, "learning_rate": step / 10})
    meter.log(2, STATE)
    with meter.phase("other"):
        clock[0] += 5
    clock[0] += 3
    assert meter.clock() == {"began": 990.0, "stepping": 13.0}
    meter.add(3, batch, ROW)
    meter.log(3, STATE)
    first, second = lines(tmp_path)
    assert (first["loss"], first["learning_rate"]) == (2.0, 0.2)
    assert (first["step_ms"], first["data_wait_ms"], first["images_per_s"], first["goodput"]) == (
        5000,
        1000,
        0.8,
        0.5,
    )
    assert (second["step_ms"], second["data_wait_ms"]) == (3000, 0)
    assert second["goodput"] == pytest.approx(13 / 28)
    assert "mfu" not in first  # nobody knows the peak of a CPU


def test_the_host_is_at_most_two_steps_ahead_of_the_device(tmp_path):
    """All that is dispatched must be done before a SIGTERM's checkpoint."""
    waited = []

    class Later(float):
        def block_until_ready(self):
            waited.append(float(self))
            return self

    meter = Meter(CFG, tmp_path, 0, {})
    for step in range(1, 6):
        meter.add(step, {"tokens": np.zeros((4, 116))}, ROW | {"loss": Later(step)})
        assert waited == list(range(1, step - 1))


def test_goodput_counts_the_pause_and_the_steps_that_were_lost(clock, tmp_path):
    # of a checkpoint; then steps that a kill lost, and a pause
    kept = {"began": 900.0, "stepping": 40.0}
    meter = Meter(CFG, tmp_path, 10, kept)
    clock[0] += 10
    meter.add(11, {"tokens": np.zeros((4, 116))}, ROW)
    meter.log(11, STATE)
    assert lines(tmp_path)[0]["goodput"] == pytest.approx(50 / 110)


def test_mfu_is_the_analytic_count_over_the_peak_of_all_devices(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "peak_flops", lambda kind: 1e9)
    meter = Meter(CFG, tmp_path, 0, {})
    clock[0] += 2
    meter.add(1, {"tokens": np.zeros((4, 116)), "images": 0}, ROW)
    meter.log(1, STATE)
    # eight devices, see conftest
    expected = flops.joint_step(preset("emoji_64"), 4, 116, whole_sana=False) / 2 / (8 * 1e9)
    assert lines(tmp_path)[0]["mfu"] == pytest.approx(expected, rel=1e-6)


def test_a_cached_step_does_not_count_the_encoders():
    model, batch = preset("emoji_64"), {"tokens": np.zeros((4, 116))}
    encoders = flops.ta_tok_encode(model.ta_tok, 4) + flops.dc_ae_encode(model.dc_ae, 4, 8)

    def count(cfg, batch):
        return cfg.record.flops(cfg.blip3o(), cfg.section, batch)

    assert count(CFG, batch) - count(CFG, batch | {"latents": 0}) == encoders > 0
    assert count(TrainConfig(stage="tokenizer"), batch) is None


def test_event_files_hold_scalars_and_pictures(tmp_path):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_file_loader",
        reason="needs the extra [tensorboard]",
    )
    writer = MetricWriter(tmp_path)
    writer.write(3, {"loss": 1.5})
    writer.write_image(3, "sheet", np.full((8, 8, 3), 7, np.uint8))
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {
        value.tag: (event.step, value)
        for event in loader.EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert found["loss"][0] == 3
    assert found["loss"][1].tensor.float_val == [1.5]
    assert found["sheet"][1].tensor.string_val[2] == (tmp_path / "sheet-000003.png").read_bytes()


def test_the_board_shows_one_curve_after_a_kill(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the extra [tensorboard]",
    )
    writer = MetricWriter(tmp_path)
    for step in (2, 4, 6, 8):
        writer.write(step, {"loss": step})
    MetricWriter(tmp_path, 4).write(6, {"loss": 7})  # resumed, and killed before step 8
    MetricWriter(tmp_path, 4).write(5, {"loss": 9})
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (2, 2),
        (4, 4),
        (5, 9),
    ]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2), (4, 4), (5, 9)]


def test_steps_that_are_done_again_are_written_once(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (2, 4, 6):
        writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed
    MetricWriter(tmp_path, 4).write(6, {"loss": 7})
    assert lines(tmp_path) == [
        {"step": 2, "loss": 2.0},
        {"step": 4, "loss": 4.0},
        {"step": 6, "loss": 7.0},
    ]


def test_what_is_not_finite_is_null_and_a_folder_that_cannot_be_written_is_named(tmp_path):
    MetricWriter(tmp_path).write(1, {"loss": np.nan, "ce": 2})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "ce": 2.0}]
    with pytest.raises(InputError, match=r"/proc/.* cannot be written: "):
        MetricWriter("/proc").write(1, {"loss": 1})
    with pytest.raises(InputError, match=r"/proc/parameters\.txt cannot be written: "):
        MetricWriter("/proc").write_text("parameters.txt", "a")
