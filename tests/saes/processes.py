"""Starts processes that work together, as torchrun would, for the tests of this folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from pvsae.saes.parallel import Group, join, leave


def together(work: Callable[..., Any], n: int, *args: Any) -> None:
    """Calls work(group, *args) in n processes; an error in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_start, (n, port, work, args), nprocs=n)


def _start(rank: int, n: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    group = join()
    assert (group.rank, group.size) == (rank, n)
    work(group, *args)
    leave()


def halves(group: Group) -> Group:
    """The half of an even number of processes that this one is in, as a group of its own."""
    import torch.distributed as dist

    half = group.size // 2
    handles = [dist.new_group(list(range(start, start + half))) for start in (0, half)]
    return Group(group.rank % half, half, handles[group.rank // half])
