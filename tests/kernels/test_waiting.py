"""What is said while XLA compiles."""

import logging
import time

import jax
import jax.numpy as jnp
import pytest

from blip3o_jax.kernels import waiting


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.05)
    monkeypatch.setattr(waiting, "_timers", [])


def told(caplog) -> int:
    return sum(record.message.startswith("Compiling: ") for record in caplog.records)


def test_a_long_compilation_is_told_and_a_short_one_is_not(patience, caplog):
    caplog.set_level(logging.INFO, "blip3o_jax")
    waiting.started(waiting.STARTED)
    waiting.ended(waiting.ENDED, 0.01)
    waiting.started("/jax/another/event")
    time.sleep(0.2)
    assert told(caplog) == 0
    waiting.started(waiting.STARTED)
    waiting.ended("/jax/another/measurement", 1.0)
    time.sleep(0.2)
    assert told(caplog) == 1
    assert "Later starts take it from" in caplog.text


def test_jax_reports_what_is_listened_to(patience, tmp_path, monkeypatch):
    """Its names are not documented: a start and an end for a program that is new to the cache."""
    events, ends = [], []
    monkeypatch.setattr(waiting, "started", lambda event, **_: events.append(event))
    monkeypatch.setattr(waiting, "ended", lambda event, seconds, **_: ends.append(event))
    waiting.tell_of_compilation()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        jax.jit(lambda x: jnp.sin(x) * 3.25 + 0.125)(jnp.ones(7)).block_until_ready()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.monitoring.unregister_event_listener(waiting.started)
        jax.monitoring.unregister_event_duration_listener(waiting.ended)
    assert waiting.STARTED in events
    assert waiting.ENDED in ends
