"""TensorBoard event files hold the metrics; steps taken again replace the old."""

import struct

import children
import numpy as np
import pytest

from metaopt.meta import NESConfig
from metaopt.meta.loop import read_metrics
from metaopt.meta.loop.logs import TENSORBOARD, log


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
    """The records of all event files (TFRecord: length, its CRC, data, its CRC), oldest first."""
    message = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs the extra").Event
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,), (length_crc,) = (
                struct.unpack("<Q", content[:8]),
                struct.unpack("<I", content[8:12]),
            )
            data, (data_crc,) = (
                content[12 : 12 + length],
                struct.unpack("<I", content[12 + length : 16 + length]),
            )
            assert (length_crc, data_crc) == (masked(content[:8]), masked(data))
            yield message.FromString(data)
            content = content[16 + length :]


def scalars(folder, name):
    """{step: value}, the last that was written for each step."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.tag == name:
                found[event.step] = value.simple_value
    return found


def test_event_files_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs metaopt-jax[tensorboard]")
    children.train_small(tmp_path, 4, tensorboard=True)
    children.train_small(tmp_path, 5, tensorboard=True)
    metrics = read_metrics(tmp_path)
    for name in ("meta_loss", "meta_loss_std", "grad_norm", "sigma", "lr", "non_finite"):
        found = scalars(tmp_path / TENSORBOARD, name)
        np.testing.assert_allclose([found[i] for i in range(5)], metrics[name], rtol=1e-6)
    rate = metrics["inner_steps"] / metrics["seconds"]
    np.testing.assert_allclose(metrics["inner_steps_per_second"], rate, rtol=1e-6)
    validated = ~np.isnan(metrics["validation_loss"])
    found = scalars(tmp_path / TENSORBOARD, "validation_loss")
    assert list(found) == list(metrics["step"][validated])


def test_steps_taken_again_are_purged(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs metaopt-jax[tensorboard]")
    for done, last in ((0, 5), (3, 4)):
        with log(tmp_path, done, 5, "run", tensorboard=True) as write:
            for step in range(done, last):
                write({"step": step, "meta_loss": 10.0 * done, "inner_steps_per_second": 1.0})
    purged = [event for event in events(tmp_path / TENSORBOARD) if event.session_log.status]
    assert [event.step for event in purged] == [3]
    np.testing.assert_array_equal(read_metrics(tmp_path)["meta_loss"], [0, 0, 0, 30])


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"metaopt-jax\[tensorboard\]"):
        with log(tmp_path, 0, 5, "run", tensorboard=True):
            pass


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_meta_update_does_is_said_on_terminals(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    work = NESConfig(population=2, tasks=3, min_steps=5, max_steps=9).work(groups=2)
    assert work == "2 candidates x 6 runs of 5 to 9 steps"
    with log(tmp_path, 0, 5, "run", False, work) as write:
        write({"step": 0, "meta_loss": 1.0, "inner_steps_per_second": 1.0})
    assert (work in capsys.readouterr().err) == terminal
