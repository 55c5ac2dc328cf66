"""Coverage-guided fuzzing of the reader; the harness itself is shown on its seeds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fuzz_reader import Reader

NUM_RUNS = 200_000


def test_that_the_harness_reaches_acceptance_in_every_way(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for seed in reader.seeds():
        reader.take(seed)

    assert reader.accepted == [1, 1, 1, 1]


def test_that_no_damaged_seed_is_a_finding(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for seed in [b"", *reader.damaged_seeds()]:
        reader.take(seed)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason='atheris is not installed: pip install -e ".[fuzz]"',
)
def test_that_200_000_fuzzed_inputs_find_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz_reader", f"-runs={NUM_RUNS}", "-max_len=16384",
         "-seed=1", f"-artifact_prefix={tmp_path}/"],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-4000:]
    counts = re.search(r"#(\d+)\s+DONE\s+cov: (\d+).*", done.stdout)
    assert counts, done.stdout[-4000:]
    print(counts[0])
    print([line for line in done.stdout.splitlines() if "accepted by way" in line][-1])
    assert int(counts[1]) == NUM_RUNS
    assert int(counts[2]) > 50, "the reader was not instrumented"
