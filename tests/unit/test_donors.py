"""The donors of a run over real streams: found, waited for, given up, remembered."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.unit.donors import PATIENCE, Run
from toolkit.bridge.errors import PeerError
from toolkit.bridge.liveness import PeerWatch


def test_that_a_step_waits_for_every_donor_that_was_found(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.donate("a", 0, at=0)
    run.transport.open_stream("b")
    assert run.donors.look(0) is None
    run.donate("b", 0, at=0)
    assert run.take() == {"a": 0, "b": 0}


def test_that_a_donor_that_comes_later_takes_part_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.donate("a", 0, at=0)
    assert run.take() == {"a": 0}
    run.donate("a", 1, at=1)
    run.donate("late", 0, at=1)
    with caplog.at_level(logging.INFO):
        assert run.take() == {"a": 1, "late": 0}
    assert "the late joins at receiver step 1" in caplog.text


def test_that_a_donor_that_leaves_stops_nobody(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for donor in ("a", "b"):
        run.donate(donor, 0, at=0)
    run.take()
    run.donate("b", 1, at=0, kind="end")
    run.donate("a", 1, at=1)
    assert run.take() == {"a": 1, "b": None}
    with pytest.raises(PeerError, match="the b has ended"):
        run.donors.require_peers()


def test_that_as_many_donors_are_waited_for_as_are_expected(tmp_path: Path) -> None:
    run = Run(tmp_path, num_expected=2, require_peer=True)
    run.donate("a", 0, at=0)
    with pytest.raises(PeerError, match=r"the donor did not come .* waited for the donor's"):
        run.take()


def test_that_one_that_never_comes_is_given_up_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    assert run.donors.want_weights()
    assert run.take() == run.take() == {}
    assert caplog.text.count("TRAINING ALONE: the donor did not come") == 1
    assert not run.donors.want_weights(), "nobody is there to read them"
    run.donate("donor", 0, at=2)
    assert run.take() == {"donor": 0}
    assert run.donors.want_weights()


def test_that_each_silent_donor_is_given_up_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    for donor in ("a", "b"):
        run.donate(donor, 0, at=0)
    run.take()
    run.donate("a", 1, at=1)
    assert run.take() == {"a": 1, "b": None}
    assert caplog.text.count("TRAINING ALONE: the b fell silent") == 1
    assert "the a fell silent" not in caplog.text
    run.donate("b", 1, at=2)
    run.donate("a", 2, at=2)
    assert run.take() == {"a": 2, "b": 1}, "it is back"


def test_that_a_donor_that_nobody_waits_for_is_missed_once_it_falls_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, max_staleness=None)
    run.donate("a", 0, at=0)
    assert run.take() == {"a": 0}
    watch, beats = PeerWatch(run.transport, "another"), 0
    while watch.silent_seconds < 2 * PATIENCE:  # a slow one, whose heart beats
        beats += 1
        run.transport.beat("a", beats)
        assert run.take() == {"a": None}
    assert "TRAINING ALONE" not in caplog.text
    while "TRAINING ALONE" not in caplog.text:
        assert run.take() == {"a": None}, "no step waits"
    assert run.take() == {"a": None}
    assert caplog.text.count("TRAINING ALONE: the a fell silent for 0.05 s") == 1
    with pytest.raises(PeerError):
        run.donors.require_peers()
    run.donate("a", 1, at=0)
    assert run.take() == {"a": 1}
    run.donors.require_peers()


def test_that_the_end_of_one_that_finished_before_is_said_where_it_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    early = Run(tmp_path, max_staleness=None)
    early.donate("a", 0, at=0)
    early.donate("a", 1, at=0, kind="end")
    run = Run(tmp_path, max_staleness=None)  # a receiver that starts now
    assert run.take() == {"a": 0}
    assert "TRAINING ALONE" not in caplog.text
    assert run.take() == run.take() == {"a": None}
    assert caplog.text.count("TRAINING ALONE: the a has ended. From receiver step 1 on") == 1


def test_that_the_state_crosses_a_json_file(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for donor in ("a", "b"):
        run.donate(donor, 0, at=0)
    run.take()
    state = json.loads(json.dumps(run.donors.state()))

    later = Run(tmp_path)
    assert later.donors.cursors() == {"a": 0, "b": 0}
    later.donors.load_state(state)
    assert later.donors.cursors() == {"a": 1, "b": 1}
    assert json.loads(json.dumps(later.donors.state())) == state
    assert [later.donors.published(name) for name in later.donors.names] == [(0, 1), (0, 1)]
