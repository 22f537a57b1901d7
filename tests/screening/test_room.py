"""How many workers a cluster can hold, and what is said about it."""

from __future__ import annotations

import pytest

from pvsae.errors import UserError
from pvsae.screening.room import fit, pool_size

CPU, GPU = {"CPU": 1}, {"CPU": 1, "GPU": 1}


def test_a_worker_fits_where_all_that_it_needs_is() -> None:
    assert fit({"CPU": 4, "memory": 10}, CPU) == 4
    assert fit({"CPU": 4, "GPU": 2}, GPU) == 2
    assert fit({"CPU": 4}, GPU) == 0
    assert fit({"CPU": 1, "GPU": 0.1 + 0.2}, {"CPU": 0.5, "GPU": 0.1}) == 2
    assert fit({"GPU": 0.1 + 0.1 + 0.1}, {"GPU": 0.1}) == 3  # not 2 by rounding
    assert fit({"GPU": 0.3 - 0.1 - 0.1 - 0.1}, {"GPU": 0.1}) == 0


def test_nothing_is_said_of_a_cluster_with_room() -> None:
    assert pool_size(2, CPU, [{"CPU": 1}, {"CPU": 1}], {"CPU": 2}) == (2, "")
    assert pool_size(2, GPU, [{"CPU": 8, "GPU": 4}], {"CPU": 8, "GPU": 4}) == (2, "")


def test_what_no_machine_can_hold_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        pool_size(2, GPU, [{"CPU": 3}, {"CPU": 1.0}], {"CPU": 4})
    assert refused.value.what.endswith("it has 4 CPU and 0 GPU on 2 machines")
    assert refused.value.expected == "1 CPU and 1 GPU on one machine for each worker"
    assert "--device cpu" in refused.value.fix
    # a CPU of one machine and the GPU of another are no room
    with pytest.raises(UserError, match="4 CPU and 1 GPU on 2 machines"):
        pool_size(1, GPU, [{"CPU": 4}, {"GPU": 1}], {"CPU": 4, "GPU": 1})
    with pytest.raises(UserError, match="0 CPU on 0 machines") as empty:
        pool_size(1, CPU, [], {})
    assert "--device" not in empty.value.fix


def test_a_cluster_that_is_too_small_gets_fewer_workers_and_says_so() -> None:
    size, said = pool_size(8, GPU, [{"CPU": 4, "GPU": 1}, {"CPU": 1, "GPU": 2}], {"CPU": 5, "GPU": 3})
    assert size == 2  # the second machine has a CPU for one
    assert said == "the Ray cluster can hold 2 of 8 workers: it has 5 CPU and 3 GPU on 2 machines, a worker takes 1 CPU and 1 GPU"


def test_a_busy_cluster_is_asked_for_all_and_says_what_is_waited_for() -> None:
    size, said = pool_size(3, CPU, [{"CPU": 4}], {"CPU": 1.5})
    assert size == 3
    assert "1 of 3 workers can start now, the rest when there is room (a worker takes 1 CPU; free: 1.5 CPU)" in said
    size, said = pool_size(3, GPU, [{"CPU": 4, "GPU": 1}], {"CPU": 4})
    assert size == 1
    assert "can hold 1 of 3 workers" in said
    assert "waiting for room for a worker (a worker takes 1 CPU and 1 GPU; free: 4 CPU and 0 GPU)" in said
