"""Jobs that number the classes of a head in different ways are told so before they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from tests.unit.jobs import DonorAlone
from tests.unit.run_files import Inspect
from tests.unit.starts import SCHEMAS, Jobs
from toolkit import cli
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.errors import ClassMismatchError, OtherKeyError
from toolkit.bundled import load_task
from toolkit.data import make_dataset
from toolkit.silos import SiloSource, own_task

CAT_FIRST, DOG_FIRST = ["cat", "dog", "horse"], ["dog", "cat", "horse"]
KEY = b"k" * 32


def naming(names: list[str], head: str = "heads.h2") -> dict[str, Any]:
    return {"class_names": {head: names}}


def test_that_another_order_is_refused_class_by_class(jobs: Jobs) -> None:
    jobs.start("receiver")
    jobs.start("donor", naming(CAT_FIRST), donor_name="east")
    with pytest.raises(ClassMismatchError) as caught:
        jobs.start("donor", naming(DOG_FIRST), donor_name="west")
    first, *lines = str(caught.value).split("\n")
    assert lines == ["  class 0: west 'dog', east 'cat'", "  class 1: west 'cat', east 'dog'"]
    for part in ("'heads.h2'", "run 0001", "align_labels_with_mapping", "--run NAME"):
        assert part in first
    assert "west" not in jobs.claims()["0001"], "its place is free for a corrected start"
    jobs.start("donor", naming(CAT_FIRST), donor_name="west")


@pytest.mark.parametrize("role", ["receiver", "donor"])
def test_that_a_receiver_may_state_them_too(jobs: Jobs, role: str) -> None:
    first, second = ("receiver", "donor") if role == "donor" else ("donor", "receiver")
    jobs.start(first, naming(CAT_FIRST))  # type: ignore[arg-type]
    with pytest.raises(ClassMismatchError, match=f"class 0: {second} 'dog', {first} 'cat'"):
        jobs.start(second, naming(DOG_FIRST))  # type: ignore[arg-type]


def test_that_nothing_is_compared_where_a_job_states_none(jobs: Jobs) -> None:
    jobs.start("receiver", naming(CAT_FIRST, "heads.h3") | with_h3())
    jobs.start("donor", donor_name="silent")
    jobs.start("donor", naming(DOG_FIRST), donor_name="east")
    jobs.start("donor", donor_name="mute")


def with_h3() -> dict[str, Any]:
    return {"schemas": {**SCHEMAS, "heads.h3": {}}}


def test_that_a_job_that_is_refused_states_nothing(jobs: Jobs) -> None:
    run = jobs.start("donor", naming(CAT_FIRST)).run_dir
    names = {"heads.h3": CAT_FIRST, "heads.h2": DOG_FIRST}
    with pytest.raises(ClassMismatchError):
        jobs.start("receiver", {"class_names": names} | with_h3())
    stated = sorted(path.name for path in (run / "bridge" / "heads").glob("*.classes"))
    assert stated == ["heads.h2.classes"]


def test_that_classes_without_a_counterpart_are_absent_and_long_lists_are_cut(jobs: Jobs) -> None:
    jobs.start("receiver", naming([str(number) for number in range(40)]))
    with pytest.raises(ClassMismatchError) as caught:
        jobs.start("donor", naming(["0", "one"]))
    _, *lines = str(caught.value).split("\n")
    assert lines[:2] == [
        "  class 1: donor 'one', receiver '1'",
        "  class 2: donor absent, receiver '2'",
    ]
    assert len(lines) == 21
    assert lines[-1] == "  and 19 more"


def test_that_a_job_fits_its_earlier_start(jobs: Jobs) -> None:
    jobs.start("donor", naming(CAT_FIRST), run="mine", beats=False)
    with pytest.raises(ClassMismatchError, match="as the earlier donor states them"):
        jobs.start("donor", naming(DOG_FIRST), run="mine")
    assert jobs.start("donor", naming(CAT_FIRST), run="mine").attempt == 2


@pytest.mark.parametrize("content", ["{}", '{"names": 1, "founder": "east"}'])
def test_that_a_damaged_statement_is_no_traceback(jobs: Jobs, content: str) -> None:
    run = jobs.start("receiver", naming(CAT_FIRST)).run_dir
    (run / "bridge" / "heads" / "heads.h2.classes").write_text(content)
    with pytest.raises(ClassMismatchError, match=r"class 0: donor 'cat', (\?|east) absent"):
        jobs.start("donor", naming(CAT_FIRST))


def test_that_they_are_signed(jobs: Jobs) -> None:
    run = jobs.start("receiver", naming(CAT_FIRST), key=KEY).run_dir
    stated = run / "bridge" / "heads" / "heads.h2.classes"
    stated.write_bytes(stated.read_bytes().replace(b"horse", b"mouse"))
    with pytest.raises(OtherKeyError, match="classes"):
        jobs.start("donor", naming(CAT_FIRST), key=KEY, run="0001")


@pytest.mark.parametrize("names", ["cat", [], [1, 2], ["cat", None]])
def test_names_that_are_none(names: Any) -> None:
    with pytest.raises(ValueError, match=r"class_names of 'heads\.h2' must be a list of names"):
        BridgeConfig(class_names={"heads.h2": names})


@pytest.mark.usefixtures("fresh_state")
def test_that_a_job_states_what_its_settings_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class_names has 'heads\.h3', which .* shares heads\.h2"):
        DonorAlone(tmp_path / "runs", class_names={"heads.h3": CAT_FIRST})
    donor = DonorAlone(tmp_path / "runs", class_names={"heads.h2": CAT_FIRST}).donor
    assert (donor.run_dir / "bridge" / "heads" / "heads.h2.classes").is_file()
    donor.close()


def test_that_the_bundled_data_name_their_classes() -> None:
    names = load_task("digits").class_names_of(["h2", "h3"])
    assert names == {
        "h2": ["0 or 1", "2 or 3", "4 or 5", "6 or 7", "8 or 9"],
        "h3": ["even", "odd"],
    }
    for task in map(load_task, ("overlap", "text")):
        for head, number in task.num_classes.items():
            assert len(task.class_names_of([head])[head]) == number


@pytest.mark.parametrize("are_named", [True, False])
def test_that_data_of_ones_own_may_name_their_classes(tmp_path: Path, are_named: bool) -> None:
    pixels = np.full((3, 2, 2), 0.5, dtype=np.float32)
    columns = {"image": pixels.tolist(), "label": [1, 0, 2]}
    rows = Dataset.from_dict(columns)
    if are_named:
        label = ClassLabel(names=DOG_FIRST)
        rows = rows.cast(Features({**rows.features, "label": label}))
    rows.save_to_disk(str(tmp_path / "own"))
    task = own_task({"h2": SiloSource(dataset_name=str(tmp_path / "own"))}, {"h1": 3, "h2": 3})
    assert task.class_names_of(["h1", "h2"]) == ({"h2": DOG_FIRST} if are_named else {})
    assert task.train["h2"][:]["h2"].tolist() == [1, 0, 2]


def test_that_named_labels_are_numbers_as_others_are() -> None:
    images = np.zeros((3, 1, 2, 2), dtype=np.float32)
    labels = {"h2": np.array([2, 0, 1]), "h3": np.array([0, 0, 1])}
    rows = make_dataset(images, labels, {"h2": CAT_FIRST})
    assert rows.features["h3"] == Value("int64")
    assert rows[:]["h2"].tolist() == [2, 0, 1]
    assert rows[:]["h2"].dtype == rows[:]["h3"].dtype


def test_that_inspect_tells_them(
    jobs: Jobs, inspect: Inspect, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = jobs.start("receiver", naming(CAT_FIRST)).run_dir / "bridge" / "heads"
    (heads / "heads.h3.classes").write_text('{"names": [1]}')
    (heads / "heads.h4.classes").write_text("[")
    _, run = inspect(jobs.runs_dir / "0001")
    assert run["class_names"] == {"heads.h2": CAT_FIRST}
    cli.main(["inspect", str(jobs.runs_dir / "0001"), "--seconds", "0.02"])
    assert "classes of heads.h2, from 0 on: cat, dog, horse" in capsys.readouterr().out
