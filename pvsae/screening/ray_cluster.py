"""The engine of a cluster: the same worker on the parts, as Ray Data with a pool of actors.

Knows: Ray, imported when this engine is asked for and not before. Does not know: what a shard holds (worker.py).

Only the names of parts go through Ray. Each worker reads its rows where they lie and writes its shards to the run folder, so
data, run folder and model have to be reachable under the same paths on every machine. A worker that dies is started again by Ray
(on another machine where its own is gone), and finds in the cache what it had generated. Nothing is reported to anybody: usage
statistics are turned off.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pvsae.errors import UserError
from pvsae.parts import Part
from pvsae.screening.room import pool_size
from pvsae.screening.worker import DataSet, Job, Worker

log = logging.getLogger(__name__)

REFUSAL = "refusal"
PATIENCE = 10.0  # seconds for a cluster to answer at its address
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Actor:
    """A worker with a model of its own, in a process of its own.

    Ray wraps what a worker raises, and loses which error it was. So what is meant for the user goes the way of the results.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.refusal: UserError | None = None  # why this worker cannot work: told at the first part that it is given
        try:
            self.worker = self._open(job)
        except UserError as error:
            self.refusal = error

    @staticmethod
    def _open(job: Job) -> Worker:
        from pvsae.models import load
        from pvsae.models.fingerprint import fingerprint

        model = load(**job.model)
        if fingerprint(model) != job.fingerprint:
            raise UserError(
                f"{job.model['name']} on this machine is another model than where the run was started",
                "the same weights, dtype and adapter on every machine",
            )
        return Worker(job, model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes the shards of a batch of {data, part}, numbers both; gives their notes as JSON beside them, and in place of a
        note {"refusal": [what, expected, fix]} where there is something that the user has to put right."""
        notes = [json.dumps(self._note(int(i), int(k))) for i, k in zip(batch["data"], batch["part"], strict=True)]
        return {"data": batch["data"], "part": batch["part"], "note": notes}

    def _note(self, i: int, k: int) -> dict[str, Any]:
        try:
            if self.refusal is not None:
                raise self.refusal
            data = self.job.data[i]
            return self.worker.screen(data, data.parts[k])
        except UserError as error:
            return {REFUSAL: [error.what, error.expected, error.fix]}


def screen_on_ray(
    job: Job, todo: Sequence[tuple[DataSet, Part]], *, workers: int, address: str | None = None, gpus: float = 0
) -> Iterator[tuple[DataSet, Part, dict[str, Any]]]:
    """Makes these shards, and gives each one's note when it is on disk, in no order.

    Args:
        workers: actors, each with a model, one CPU and `gpus` GPUs. Fewer where the cluster cannot hold as many, which is logged.
        address: of a running cluster; None is what RAY_ADDRESS says, else a local cluster that ends with the call.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached or cannot hold a worker, or what a worker had to say to
            the user.
    """
    if not todo:
        return
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address or os.environ.get("RAY_ADDRESS"), workers)
    try:
        size = _pool_size(ray, min(workers, len(todo)), {"CPU": 1, **({"GPU": gpus} if gpus else {})})
        job = everywhere(job)
        index = {data.name: i for i, data in enumerate(job.data)}
        items = [{"data": index[data.name], "part": part.number} for data, part in todo]
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=gpus or None,
        )
        for row in made.iter_rows():
            data = job.data[int(row["data"])]
            note = json.loads(row["note"])
            if REFUSAL in note:
                raise UserError(*note[REFUSAL])
            yield data, data.parts[int(row["part"])], note
    finally:
        if started:
            ray.shutdown()


def _pool_size(ray: Any, workers: int, needs: dict[str, float]) -> int:
    """How many workers to ask for. Logs what the user should know about it."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    size, said = pool_size(workers, needs, machines, ray.available_resources())
    if said:
        log.warning(said)
    return size


def everywhere(job: Job) -> Job:
    """The job with absolute paths: workers run in folders of their own."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve())

    data = tuple(
        replace(
            one,
            source=one.source if one.source.path is None else replace(one.source, path=absolute(one.source.path)),
            parts=tuple(replace(part, file=absolute(part.file)) for part in one.parts),
        )
        for one in job.data
    )
    model = dict(job.model)
    for name in ("name", "adapter"):
        if model.get(name) and Path(model[name]).is_dir():
            model[name] = absolute(model[name])
    return replace(job, data=data, model=model, answers=job.answers.resolve(), shards=job.shards.resolve())


def check_installed() -> None:
    """UserError where Ray is not installed. Does not import it."""
    if find_spec("ray") is None:
        raise UserError("Ray is not installed", "it, for --engine ray", "pip install 'pvsae[ray]'")


def _ray() -> Any:
    check_installed()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a worker without GPUs leaves CUDA_VISIBLE_DEVICES alone
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"Ray Data cannot be imported: {error}", "all of ray[data]", "pip install 'pvsae[ray]'") from error
    return ray


def _start(ray: Any, **options: Any) -> None:
    """A cluster on this machine. Ray waits half a minute for its own processes, which a busy machine may exceed: tried again."""
    for left in (2, 1, 0):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or not left:
                raise
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int) -> None:
    options: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    try:
        if address:
            _knock(ray, address)
            ray.init(address=address, **options)
        else:
            _start(ray, num_cpus=workers, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"no Ray cluster at {address or 'this machine'}: {(str(error) or type(error).__name__).splitlines()[0]}",
            "the address of a running cluster, or none for one on this machine",
            "`ray start --head` on one machine, and what it says on the others",
        ) from error


def _knock(ray: Any, address: str) -> None:
    """OSError where nobody listens at HOST:PORT. Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():  # "auto", or what Ray has to make sense of
        return
    host = host.strip("[]")
    hosts = [host, ray.util.get_node_ip_address()] if host in LOOPBACK else [host]  # Ray takes the second for the first
    for one in hosts:
        try:
            socket.create_connection((one, int(port)), timeout=PATIENCE).close()
            return
        except OSError as error:
            found = error
    raise found
