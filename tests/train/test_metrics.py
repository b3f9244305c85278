"""What a run writes of itself."""

from bitjax.train import Report, read_metrics
from bitjax.train.metrics import MetricsWriter, scalars


def report(step, **more):
    return Report(
        step=step, steps=9, loss=2.5 / step, learning_rate=1e-3, gradient_norm=1.0,
        tokens_per_second=100.0, seconds_left=75.0, valid_loss=None, **more,
    )  # fmt: skip


LAYERS = {"blocks.0.ffn.down": {"zero": 0.5, "flips": 0.25}}


def test_records_hold_what_has_a_value():
    assert set(report(1, flip_rate=0.25, layers=LAYERS).record()) == {
        "step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "flip_rate",
        "layers",
    }  # fmt: skip


def test_scalars_name_the_field_before_the_layer():
    found = dict(scalars({"step": 3, "loss": 1.5, "layers": LAYERS}))
    assert found == {"loss": 1.5, "zero/blocks.0.ffn.down": 0.5, "flips/blocks.0.ffn.down": 0.25}


def test_steps_to_be_repeated_are_forgotten(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(report(step))
        writer.rewind(1)
        writer.write(report(2))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    with MetricsWriter(tmp_path, 1):
        pass
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
