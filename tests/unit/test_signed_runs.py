"""Which run a job with a key joins, what it believes there, and that it shuts others out."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.unit.donors import Run
from tests.unit.jobs import DonorAlone, ReceiverAlone
from tests.unit.keys import KEY, OTHER_KEY, key_file
from tests.unit.starts import PEER, Jobs, bridge_of
from tests.unit.teaching import Donor, weights
from tests.unit.teaching import Receiver as TaughtReceiver
from toolkit.bridge import runs, teachers
from toolkit.bridge.agreement import attempts_of, donors_of, has_ended, read_claim
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.config import Role
from toolkit.bridge.errors import BridgeError, OtherKeyError
from toolkit.bridge.payload import parse_record
from toolkit.bridge.replay import KeptPayloads

each_role = pytest.mark.parametrize("role", ["donor", "receiver"])
unlike_keys = pytest.mark.parametrize(
    ("theirs", "mine", "why"),
    [
        (None, KEY, "it is not signed, but a key is given here"),
        (KEY, None, "it is signed, but no key is given here"),
        (OTHER_KEY, KEY, "it was signed with another key"),
    ],
    ids=["only I", "only they", "another"],
)


@each_role
def test_that_two_jobs_with_one_key_meet(jobs: Jobs, role: Role) -> None:
    first, second = jobs.start(PEER[role], key=KEY), jobs.start(role, key=KEY)

    assert (first.run_id, first.run_dir) == (second.run_id, second.run_dir)


@each_role
@unlike_keys
@pytest.mark.parametrize("run", [None, "mine"])
def test_that_jobs_with_unlike_keys_part_at_once(
    jobs: Jobs, role: Role, theirs: bytes | None, mine: bytes | None, why: str, run: str | None
) -> None:
    first = jobs.start(PEER[role], key=theirs, run=run)
    before = set(jobs.runs_dir.rglob("*"))
    with pytest.raises(OtherKeyError) as caught:
        jobs.start(role, key=mine, run=run)

    message = str(caught.value)
    assert f"run {first.run_dir.name!r} has another key than this job (run.json: {why}" in message
    for remedy in ("GRADIENT_BRIDGE_KEY", "--key_file", "or none of them one", "--run NAME"):
        assert remedy in message
    assert KEY.decode() not in message
    left = {path.name for path in set(jobs.runs_dir.rglob("*")) - before}
    beats = {name for name in left if name.endswith("heartbeat")}  # of the other job
    assert left == beats, "it leaves nothing in a run that is not its own"


@pytest.fixture
def dead(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody lives, so that nobody's life need be watched for long."""
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.01)


@unlike_keys
@pytest.mark.usefixtures("dead")
def test_that_a_run_with_another_key_that_is_over_is_left_alone(
    jobs: Jobs, theirs: bytes | None, mine: bytes | None, why: str
) -> None:
    jobs.start("donor", key=theirs, beats=False)

    assert jobs.start("receiver", key=mine).run_dir.name == "0002"


def test_that_two_pairs_with_two_keys_may_share_a_directory(jobs: Jobs) -> None:
    first = [jobs.start("donor", key=OTHER_KEY), jobs.start("receiver", key=OTHER_KEY)]
    second = [jobs.start("donor", key=KEY), jobs.start("receiver", key=KEY)]

    assert [run.run_dir.name for run in first + second] == ["0001", "0001", "0002", "0002"]


@unlike_keys
@pytest.mark.usefixtures("dead")
def test_that_a_checkpoint_leads_to_no_run_with_another_key(
    jobs: Jobs, tmp_path: Path, theirs: bytes | None, mine: bytes | None, why: str
) -> None:
    first = jobs.start("receiver", key=theirs, beats=False)
    content = {"job": "receiver", "run": "0001", "run_id": first.run_id}
    (tmp_path / "gradient_bridge.json").write_text(json.dumps(content))

    with pytest.raises(OtherKeyError, match=why):
        jobs.start("receiver", key=mine, resume_from_checkpoint=tmp_path)
    resumed = jobs.start("receiver", key=theirs, resume_from_checkpoint=tmp_path)
    assert resumed.run_id == first.run_id


@pytest.mark.parametrize("name", ["../runs/0001", "/", ".."])
def test_that_no_checkpoint_leads_out_of_the_directory(
    jobs: Jobs, tmp_path: Path, name: str
) -> None:
    first = jobs.start("receiver", beats=False)
    content = {"job": "receiver", "run": name, "run_id": first.run_id}
    (tmp_path / "gradient_bridge.json").write_text(json.dumps(content))

    with pytest.raises(BridgeError, match="must be a plain directory name"):
        jobs.start("receiver", resume_from_checkpoint=tmp_path)


@pytest.mark.timeout(20)
def test_that_a_forged_claim_stands_for_no_job_and_is_in_nobodys_way(jobs: Jobs) -> None:
    """Unsigned, of another run with the same key, and the run's own under another number."""
    other, run = jobs.start("donor", key=KEY, run="other"), jobs.start("donor", key=KEY, run="mine")
    transport, theirs = bridge_of(run, KEY), other.run_dir / "bridge" / "donor" / "attempts"
    for job in ("receiver", "evil", os.fsdecode(b"\xff")):
        (transport.root / job / "attempts").mkdir(parents=True)
        shutil.copy(theirs / "0001.json", transport.root / job / "attempts" / "0001.json")
        (transport.root / job / "attempts" / "0002.json").write_text('{"heads": [], "pid": 1}')
    shutil.copy(theirs / "0001.json", transport.root / "donor" / "attempts" / "0003.json")
    own = transport.root / "donor" / "attempts"
    shutil.copy(own / "0001.json", own / "0002.json")

    assert donors_of(transport) == ["donor"]
    assert attempts_of(transport, "donor") == [1]
    assert attempts_of(transport, "receiver") == []
    assert read_claim(transport, "receiver") is None
    assert jobs.start("receiver", key=KEY, run="mine").attempt == 3, "after those in the way"


def test_that_what_founds_a_run_must_be_signed(jobs: Jobs) -> None:
    started = [jobs.start("donor", key=KEY, run=name, beats=False) for name in ("a", "b")]
    heads = [run.run_dir / "bridge" / "heads" / "heads.h2.json" for run in started]
    shutil.copy(heads[1], heads[0])
    with pytest.raises(OtherKeyError, match=r"heads/heads.h2.json: it was signed .* another .*run"):
        jobs.start("receiver", key=KEY, run="a")
    heads[1].write_text('{"founder": "donor"}')
    with pytest.raises(OtherKeyError, match=r"heads/heads.h2.json: it is not signed"):
        jobs.start("receiver", key=KEY, run="b")


def test_that_a_job_with_a_key_says_who_else_may_delete_runs(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    jobs.runs_dir.mkdir()
    jobs.runs_dir.chmod(0o777)
    jobs.start("donor", run="open")
    assert "may delete" not in caplog.text
    jobs.start("donor", run="signed", key=KEY)
    assert "others may delete or replace whole runs" in caplog.text


def test_that_the_end_of_another_job_ends_nobody(jobs: Jobs) -> None:
    """The donor's own end, signed for this run, in the receiver's stream."""
    run = jobs.start("donor", key=KEY)
    jobs.start("receiver", key=KEY)
    jobs.publish(run, "donor", key=KEY)
    transport = bridge_of(run, KEY)
    assert has_ended(transport, "donor")
    shutil.copy(transport.path("donor", 0), transport.path("receiver", 0))

    assert not has_ended(transport, "receiver")


def test_that_a_directory_alone_is_no_donor(tmp_path: Path) -> None:
    signed, unsigned = Run(tmp_path / "signed"), Run(tmp_path / "unsigned")
    signed.transport.signer = Signer(KEY, "run")
    for run in (signed, unsigned):
        run.transport.open_stream("evil")
        run.donors.discover()

    assert unsigned.donors.names == ["evil"]
    assert signed.donors.names == []


def test_that_a_bridge_with_a_key_is_its_owners_alone(jobs: Jobs) -> None:
    (jobs.runs_dir / "mine" / "bridge").mkdir(parents=True)
    old = os.umask(0)
    try:
        (jobs.runs_dir / "mine" / "bridge").chmod(0o777)
        for name, key in (("mine", KEY), ("new", KEY), ("open", None)):
            run = jobs.start("donor", key=key, run=name)
            jobs.publish(run, "donor", key=key)
            transport = bridge_of(run, key)
            transport.acknowledge("donor", 1)
            transport.keep("donor", 0)
            transport.reject("donor", 0, "digest", "")
        jobs.kill_all()
    finally:
        os.umask(old)
    for name, expected in (("mine", {0o600, 0o700}), ("new", {0o600, 0o700}), ("open", None)):
        bridge = jobs.runs_dir / name / "bridge"
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (bridge, *bridge.rglob("*"))}
        assert modes == (expected or {0o666, 0o777}), name
    assert stat.S_IMODE((jobs.runs_dir / "new").stat().st_mode) == 0o755


# -- both jobs ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_state")
def test_a_receiver_with_a_key_and_its_replay(tmp_path: Path) -> None:
    key = key_file(tmp_path, KEY)
    job = ReceiverAlone(tmp_path / "runs", key_file=key, keep_payloads=True)
    transport = job.receiver.transport
    (transport.root / "donor" / "attempts").mkdir()
    transport.small.create("donor/attempts/0001.json", b"{}")
    for value in (0.3, -0.7):
        with job.accelerator.accumulate(job.model):
            job.backward()
            job.donate(job.constant(value))
            job.receiver.inject()
            job.optimizer.step()
            job.receiver.commit()
    job.receiver.close()
    run_dir = job.receiver.run_dir

    assert job.receiver.fates()["applied"] == 2
    ledger = run_dir / "bridge" / "receiver" / "ledger-0001.jsonl"
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600
    with pytest.raises(OtherKeyError, match="has another key than this job"):
        KeptPayloads(run_dir, UNSIGNED)
    kept = KeptPayloads(run_dir, Signer(KEY))
    assert kept.read("donor", 1).header.sequence == 1
    path = transport.kept_path("donor", 1)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b"hmac_sha256", b"hmac_sha257"))
    with pytest.raises(BridgeError, match=r"payload 1 .* was changed: it is not signed"):
        kept.read("donor", 1)
    for file in (path for path in tmp_path.joinpath("runs").rglob("*") if path.is_file()):
        assert KEY not in file.read_bytes(), file


@pytest.mark.usefixtures("fresh_state")
def test_a_donor_with_a_key(tmp_path: Path) -> None:
    job = DonorAlone(tmp_path / "runs", key_file=key_file(tmp_path, KEY))
    job.donor.close()
    transport = job.donor.transport

    assert transport.read_header("donor", 0).kind == "end"
    data = transport.read("donor", 0, max_bytes=10_000)
    assert parse_record(data, transport.signer).header.run_id == job.donor.run_id


@pytest.mark.usefixtures("fresh_state")
def test_a_teacher_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "LOOK_SECONDS", 0.0)
    settings = {"key_file": key_file(tmp_path, KEY), "peer_wait": 0.2}
    job = TaughtReceiver(tmp_path / "runs", settings)
    with job.receiver:
        donor = Donor(tmp_path / "runs", key=KEY)
        signer = donor.transport.signer
        donor.transport.signer = UNSIGNED
        donor.teach(0, weights(7))
        donor.transport.signer = signer
        job.steps_until(lambda: donor.reason(0))
        assert (donor.reason(0), job.versions()) == ("unauthenticated", {})
        donor.teach(1, weights(7))
        job.steps_until(job.versions)


@pytest.mark.usefixtures("fresh_state")
def test_that_a_job_without_its_key_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="cannot be read"):
        DonorAlone(tmp_path / "runs", key_file=tmp_path / "nowhere")

    assert not (tmp_path / "runs").exists()
