"""Room: how many workers a cluster can hold, and what the user is told where these are fewer than were asked for.

Knows: amounts of resources by name, in all, on each machine and free. Does not know: Ray (ray_cluster.py asks it), workers' work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pvsae.errors import UserError

Amounts = Mapping[str, float]
SLACK = 1e-6  # amounts are sums of fractions


def fit(amounts: Amounts, needs: Amounts) -> int:
    """Workers that need `needs` each and find room in `amounts`."""
    return min(int(amounts.get(name, 0) / need + SLACK) for name, need in needs.items())


def pool_size(workers: int, needs: Amounts, machines: Sequence[Amounts], free: Amounts) -> tuple[int, str]:
    """How many workers to ask the cluster for, and what the user should know about it ("" for nothing).

    Those that the cluster can never hold are not asked for. Those that it cannot hold now are: they start when there is room,
    while the others work.

    Args:
        workers: wanted, at least 1.
        needs: of a worker, all on one machine; above 0.
        machines: what each machine has, free or not.
        free: what is free in the whole cluster.

    Raises:
        UserError: no machine can hold a worker, however long one waits.
    """
    in_all = {name: sum(one.get(name, 0) for one in machines) for name in needs}
    has = f"{_words(in_all)} on {len(machines)} machine{'' if len(machines) == 1 else 's'}"
    size = min(workers, sum(fit(one, needs) for one in machines))
    if size < 1:
        raise UserError(
            f"no machine of the Ray cluster can hold a worker: it has {has}",
            f"{_words(needs)} on one machine for each worker",
            "`ray start --address=HEAD:PORT --num-cpus=N --num-gpus=N` on a machine that has them (a cluster that grows on "
            "demand has to have one first)" + (", or --device cpu" if "GPU" in needs else ""),
        )
    said = []
    if size < workers:
        said.append(f"the Ray cluster can hold {size} of {workers} workers: it has {has}, a worker takes {_words(needs)}")
    now = min(size, fit(free, needs))
    if now < size:
        left = f"a worker takes {_words(needs)}; free: {_words({name: free.get(name, 0) for name in needs})}"
        if now:
            said.append(f"the Ray cluster is busy: {now} of {size} workers can start now, the rest when there is room ({left})")
        else:
            said.append(f"the Ray cluster is busy: waiting for room for a worker ({left})")
    return size, "; ".join(said)


def _words(amounts: Amounts) -> str:
    """ "2 CPU and 0.5 GPU"."""
    return " and ".join(f"{round(amount, 3):g} {name}" for name, amount in amounts.items())
