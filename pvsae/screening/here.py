"""The engine of one process: parts one after the other. (ray_cluster.py has the same face, on a cluster.)

Knows: that a shard which is there and whole is not made again. Does not know: what a shard holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pvsae.models import ChatModel
from pvsae.parts import Part
from pvsae.screening.worker import DataSet, Job, Worker

Todo = Sequence[tuple[DataSet, Part]]


def screen_here(job: Job, model: ChatModel, todo: Todo) -> Iterator[tuple[DataSet, Part, dict[str, Any]]]:
    """Makes these shards, and gives each one's note when it is on disk."""
    worker = Worker(job, model)
    for data, part in todo:
        yield data, part, worker.screen(data, part)
