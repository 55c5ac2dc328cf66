"""Jobs over two hosts, whole and with one of them cut off from the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.namespaces import two_hosts
from tests.faults.running import NUM_STEPS, FaultyRecipes, Role, await_end
from tests.launching import Launcher
from tests.recipes.running import TIMEOUT, Recipes
from tests.recipes.test_slurm import check_equal_to_joint
from tests.slurm import Cluster

pytestmark = pytest.mark.faults

RANK_SECONDS, PEER_SECONDS = 30, 15  # more than the jobs need to start
PORT = 29511  # in networks of their own


@pytest.mark.parametrize("role", ["donor", "receiver"])
def test_a_host_that_is_cut_off_ends_its_job_and_not_the_other(
    recipes: FaultyRecipes, role: Role
) -> None:
    other: Role = "donor" if role == "receiver" else "receiver"
    patience = ["--peer_wait", PEER_SECONDS, "--rank_timeout", RANK_SECONDS]
    bound = {"donor": ["--max_train_steps", 2 * NUM_STEPS], "receiver": []}
    with two_hosts() as hosts:
        halves = []
        for rank, host in enumerate(hosts):
            with host.here():
                halves.append(
                    recipes.start(
                        role, *patience, *bound[role],
                        num_processes=2,
                        env={"GLOO_SOCKET_IFNAME": host.interface},
                        options=[
                            *("--num_machines", 2, "--machine_rank", rank),
                            *("--main_process_ip", hosts[0].address, "--main_process_port", PORT),
                        ],
                        log=recipes.cwd / f"{role}-{rank}.log",
                    )
                )  # fmt: skip
        alone = recipes.start(other, *patience, *bound[other])
        recipes.await_payload(50)
        assert "Num processes = 2" in halves[0].output()
        assert all(len(half.processes()) == 2 for half in halves), "a launcher and a rank on each"
        hosts[1].cut_off()
        for half in halves:
            assert half.wait(TIMEOUT, check=False) != 0
            await_end(half)
    alone.wait(TIMEOUT)
    assert f"TRAINING ALONE: the {role} fell silent for {PEER_SECONDS} s" in alone.output()
    assert not recipes.path("0001", role, "results.json").exists()
    results = recipes.results("0001", other)
    if other == "receiver":
        assert 0 < results["steps_alone"] == NUM_STEPS - recipes.check_ledger()["applied"]
    else:
        assert results["windows_alone"] > 0


def test_that_the_slurm_script_trains_over_two_hosts(launcher: Launcher, tmp_path: Path) -> None:
    with two_hosts() as hosts:
        entrances = [
            [
                *("nsenter", f"--net=/proc/{os.getpid()}/fd/{host.namespace}"),
                *("env", f"GLOO_SOCKET_IFNAME={host.interface}"),
            ]
            for host in hosts
        ]
        cluster = Cluster(tmp_path, launcher, [host.address for host in hosts], entrances)
        check_equal_to_joint(Recipes(launcher, tmp_path), cluster)
