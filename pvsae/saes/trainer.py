"""Training: several dictionaries from one stream of activations, with schedules, metrics, checkpoints, and a calibrated end.

Knows: how many steps there are, what the learning rate and k are at each, when to log and save, how a dictionary is finished.
Does not know: how a step works (step.py), where activations come from (stream.py), files of dictionaries (folders.py) and of
checkpoints (checkpoint.py).

A training folder::

    metrics.jsonl            a line a logged step and dictionary
    checkpoint.pt            everything that the next step depends on, the stream included; checkpoint.STEP.*.pt are parts of it
    NAME/                    each finished dictionary, in SAELens' layout

Activations are scaled before a step (TrainConfig.unit), and the scale is folded into the biases and the threshold at the end, so
a saved dictionary takes raw residuals.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from pvsae.errors import UserError
from pvsae.runs import atomic_path, differing_keys
from pvsae.saes import checkpoint
from pvsae.saes.dictionary import SAE
from pvsae.saes.folders import CONFIG, load, save
from pvsae.saes.grid import check_shards, grid_of
from pvsae.saes.info import SAEInfo
from pvsae.saes.kernels import CHOICES, PRODUCTS
from pvsae.saes.parallel import ALONE, Group
from pvsae.saes.step import Learner, StepConfig, StepStats

UNITS = ("element", "token")
# What may change on the way (checkpoint.py has the last word), and what of it is not to be seen in a dictionary.
_FREE = ("log_every", "checkpoint_every", "width_shards", "drop_dead")
_UNSEEN = ("log_every", "checkpoint_every", "width_shards")

Batch = Mapping[int, Tensor]
Log = Callable[[dict[str, Any]], None]
Reading = Callable[[], StepStats]  # see Learner.begin


class Stream(Protocol):
    """What a trainer asks of a stream; see stream.ActivationStream."""

    @property
    def scale(self) -> Mapping[int, float]: ...
    def batches(self, batch_size: int) -> Iterator[Batch]: ...
    def held_out(self, n_tokens: int) -> Batch: ...
    def info(self, block: int) -> SAEInfo: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """One dictionary.

    Attributes:
        block: decoder block, counted from 0, whose output it reads.
        d_sae: number of latents.
        k: mean number of active latents a token.
        seed: of its initial weights.
        lr: learning rate at its peak; None is 2e-4 / sqrt(d_sae / 16384), the law that Gao et al. 2024 found.
    """

    block: int
    d_sae: int
    k: float
    seed: int = 0
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.d_sae < 1 or not 0 < self.k <= self.d_sae:
            raise UserError(f"a dictionary of {self.d_sae} latents with k {self.k}", "at least 1 latent, and 0 < k <= d_sae")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"learning rate {self.lr}", "a positive number, or nothing for the default")

    @property
    def name(self) -> str:
        """Its folder's name, but for learning rates side by side, see TrainConfig.names."""
        return f"block-{self.block}_width-{self.d_sae}_k-{self.k:g}" + (f"_seed-{self.seed}" if self.seed else "")

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.d_sae / 2**14)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How dictionaries are trained; the defaults follow the dictionaries behind the paper where they do not depend on size.

    Attributes:
        dictionaries: what to train, all from the same tokens.
        tokens: training tokens in all.
        batch: tokens a step, over all processes.
        warmup: steps of linear warm-up; a tenth of the steps if there are fewer than ten times as many.
        decay: share of the steps, at the end, over which the learning rate falls linearly to 0.
        k_anneal: share of the steps over which k falls linearly from `k_start` times its value; 0 for none.
        k_start: see k_anneal.
        calibration_tokens: held-out tokens on which the final threshold is set.
        drop_dead: leave latents that are dead at the end out of the finished dictionary. The dead-latent loss has turned them
            towards what the others leave over, so they would be among the rows nearest to a persona vector and mean nothing.
        log_every, checkpoint_every: steps.
        unit: what has a mean square of 1 after scaling: "element", so that |x|^2 is d_model on average, or "token", so that it
            is 1, as dictionary_learning does it. Adam hardly sees the difference, but the clip and the biases' learning rate do.
        width_shards: processes that share the latents of each dictionary, for those that outgrow one GPU. The number of all
            processes (torchrun's) is a multiple of it, and so is every d_sae; if there are more, they share the tokens.
        step: what a step does.
    """

    dictionaries: tuple[DictionaryConfig, ...]
    tokens: int
    batch: int = 2048
    warmup: int = 1000
    decay: float = 0.2
    k_anneal: float = 0.0
    k_start: float = 8.0
    calibration_tokens: int = 16_384
    drop_dead: bool = False
    log_every: int = 10
    checkpoint_every: int = 1000
    unit: str = "element"
    width_shards: int = 1
    step: StepConfig = field(default_factory=StepConfig)

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "calibration_tokens", "log_every", "checkpoint_every", "width_shards"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", "at least 1")
        if self.unit not in UNITS:
            raise UserError(f"unit is {self.unit!r}", "one of " + ", ".join(UNITS))
        if not self.dictionaries:
            raise UserError("no dictionary to train", "at least one of dictionaries: {block, d_sae, k}")
        if self.steps < 1:
            raise UserError(f"{self.tokens} tokens in batches of {self.batch}", "at least one whole batch", "raise tokens")
        for name in ("decay", "k_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}", "a share of the steps from 0 to 1")
        for d in self.dictionaries:
            if d.d_sae % self.width_shards:
                raise UserError(
                    f"width_shards is {self.width_shards}, and {d.name} has {d.d_sae} latents",
                    f"a d_sae that is a multiple of {self.width_shards}: every shard has as many latents",
                )
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}", "a number of steps, 0 for none")
        if not self.k_start > 0:
            raise UserError(f"k_start is {self.k_start}", "a positive number")
        _check_step(self.step)
        if len(set(self.names)) < len(self.names):
            raise UserError(
                f"two dictionaries are the same: {max(self.names, key=self.names.count)}",
                "another block, width, k, seed or lr each",
            )

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def names(self) -> tuple[str, ...]:
        """Folders of the dictionaries, in their order; where nothing but the learning rate tells some apart, with that."""
        names = [d.name for d in self.dictionaries]
        rates = [f"_lr-{d.peak_lr:g}" if names.count(d.name) > 1 else "" for d in self.dictionaries]
        return tuple(name + rate for name, rate in zip(names, rates, strict=True))

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(sorted({d.block for d in self.dictionaries}))

    def lr_share(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        warm = min(self.warmup, self.steps // 10)
        cool = max(1, round(self.decay * self.steps))
        return min(1.0, (step + 1) / (warm + 1), (self.steps - step) / cool)

    def k_at(self, step: int, k: float, d_sae: int) -> float:
        """k at a step, counted from 0."""
        length = self.k_anneal * self.steps
        extra = (self.k_start - 1) * max(0.0, 1 - step / length) if length else 0.0
        return min(k * (1 + extra), d_sae)


def _check_step(step: StepConfig) -> None:
    """Raises UserError for options of a step with which it would go wrong without a word (a clip below 0 climbs), or late."""
    wrong = {
        "aux_coef": (step.aux_coef >= 0, "0 or more; 0 leaves dead latents dead"),
        "aux_k": (step.aux_k is None or step.aux_k >= 1, "at least 1, or null for half of d_model"),
        "dead_after": (step.dead_after >= 1, "at least 1 token"),
        "clip": (step.clip is None or step.clip > 0, "a positive number, or null for no limit"),
        "threshold_decay": (0 <= step.threshold_decay < 1, "a number from 0 to less than 1"),
        "betas": (all(0 <= beta < 1 for beta in step.betas), "two numbers from 0 to less than 1"),
        "eps": (step.eps > 0, "a positive number"),
        "kernels": (step.kernels in CHOICES, "one of " + ", ".join(CHOICES)),
        "product": (step.product in PRODUCTS, "one of " + ", ".join(PRODUCTS)),
    }
    for name, (right, expected) in wrong.items():
        if not right:
            raise UserError(f"step.{name} is {getattr(step, name)}", expected)


@dataclass(frozen=True)
class Trained:
    """A finished dictionary, and what its training ended with."""

    name: str
    sae: SAE
    last: dict[str, Any]


def train(
    stream: Stream,
    config: TrainConfig,
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    log: Log | None = None,
    progress: bool = True,
    at_end: Callable[[], object] | None = None,
) -> list[Trained]:
    """Trains every dictionary of the config, from the checkpoint in the folder if there is one, and saves them.

    Args:
        stream: where activations come from. Every process of a group sees the same batches and takes its own part of them.
        folder: see the head of this module.
        device: where the dictionaries live.
        group: processes that share the work; the first one writes.
        log: called with every line of metrics.jsonl (for TensorBoard, W&B and the like).
        progress: whether to show a bar.
        at_end: called when the last step is done and no dictionary is saved yet. Whoever is killed later finds the dictionaries,
            and the stream that made them is not asked again.

    Raises:
        UserError: the stream ends before the tokens are reached, a checkpoint or dictionaries of another config, activations that
            are not finite, and what `check_processes` raises.
    """
    folder = Path(folder)
    if finished(config, folder):
        return read_back(config, folder)
    check_processes(config, group, folder)
    run = _Run(stream, config, folder, device, group)
    if run.done < config.steps:
        run.train(log, progress)
    if at_end is not None:
        at_end()
    return [run.finish(i) for i in range(len(config.dictionaries))]


def finished(config: TrainConfig, folder: Path) -> bool:
    """Whether all dictionaries are in the folder, by their names; `read_back` looks at what they are."""
    return all((folder / name / CONFIG).is_file() for name in config.names)


def check_processes(config: TrainConfig, group: Group, folder: Path) -> None:
    """Raises UserError for processes that cannot share a training equally, or not as those did that began it in the folder."""
    check_shards(group.size, config.width_shards)
    checkpoint.check(folder, config.width_shards)
    rows = group.size // config.width_shards
    if config.batch % rows:
        of_each = f", {config.width_shards} for each part of the tokens" if config.width_shards > 1 else ""
        raise UserError(f"batches of {config.batch} tokens on {group.size} processes{of_each}", f"a multiple of {rows}")


def read_back(config: TrainConfig, folder: Path) -> list[Trained]:
    """The dictionaries of a finished training. UserError if they come from another config: names do not tell all of it."""
    return [_read_back(config, i, folder) for i in range(len(config.dictionaries))]


def _read_back(config: TrainConfig, i: int, folder: Path) -> Trained:
    name = config.names[i]
    sae = load(folder / name)
    found, mine = (
        {key: value for key, value in values.items() if key not in _UNSEEN}
        for values in (dict(sae.info.training.get("config") or {}), _record(config, config.dictionaries[i]))
    )
    if other := differing_keys(found, mine):
        raise UserError(
            f"{folder / name} was trained with another config; it differs in: {', '.join(other)}",
            "the options that it was trained with",
            "choose another --out, or delete that folder",
        )
    return Trained(name, sae, dict(sae.info.training.get("last", {})))


class _Run:
    """A training run in progress."""

    def __init__(self, stream: Stream, config: TrainConfig, folder: Path, device: torch.device | str, group: Group) -> None:
        self.stream, self.config, self.folder, self.device = stream, config, folder, device
        self.grid = grid_of(group, config.width_shards)
        self.last: list[dict[str, Any]] = [{} for _ in config.dictionaries]
        self.done = 0
        saved = self._saved()
        # The first tokens of the stream's own beginning are held out, so looking at them takes nothing from training.
        held_out = None if saved else self._scaled(stream.held_out(config.calibration_tokens))
        self.learners: list[Learner] = []
        memory: list[Tensor] = []  # one for all: gradients are used up within a step
        for i, d in enumerate(config.dictionaries):
            sample = held_out[d.block] if held_out else None
            width = sample.shape[1] if sample is not None else saved["learners"][i]["parameters"][3].shape[0]  # type: ignore[index]
            center = geometric_median(sample.float()) if sample is not None else None
            self.learners.append(
                Learner(width, d.d_sae, config.step, seed=d.seed, center=center, device=device, grid=self.grid, memory=memory)
            )
        if saved:
            self._restore(saved)
        self._trim_metrics()

    # ------------------------------------------------------------------------------------------------------------- steps
    def train(self, log: Log | None, progress: bool) -> None:
        """Runs to the last step."""
        config = self.config
        share = config.batch // self.grid.data.size
        first = self.grid.data.rank * share
        writes = self.grid.everyone.rank == 0
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            (self.folder / "metrics.jsonl").open("a") if writes else contextlib.nullcontext() as file,
            tqdm(
                total=config.steps * config.batch, initial=self.done * config.batch, desc="training", unit="tok",
                unit_scale=True, disable=not (progress and writes),
            ) as bar,
        ):  # fmt: skip
            before: list[Reading] = []
            for batch in self.stream.batches(config.batch):
                mine = self._scaled({b: x[first : first + share] for b, x in batch.items()})
                begun = [self._begin(learner, d, mine) for learner, d in zip(self.learners, config.dictionaries, strict=True)]
                self.done += 1
                last = self.done == config.steps
                logs, saves = self.done % config.log_every == 0 or last, self.done % config.checkpoint_every == 0 or last
                # A GPU is still at work on this step, and not to be waited for; the numbers of the one before are here.
                self._read(before, self.done - 1)
                if logs or saves or not self.queues:
                    stats, begun = self._read(begun, self.done), []
                before = begun
                if logs:
                    for i, (name, s) in enumerate(zip(config.names, stats, strict=True)):
                        self.last[i] = {"step": self.done, "tokens": self.done * config.batch, "dictionary": name, **asdict(s)}
                        if writes:
                            print(json.dumps(self.last[i]), file=file, flush=True)
                        if log is not None and writes:
                            log(self.last[i])
                    bar.set_postfix(_shown(stats), refresh=False)
                bar.update(config.batch)
                if last:
                    break
                if saves:
                    self.save()
        if self.done < config.steps:
            raise UserError(
                f"the activations ended after {self.done * config.batch:,} tokens",
                f"{config.tokens:,} tokens, as the config asks for",
                "give more text, let the corpus repeat, or lower tokens",
            )
        self.save()

    @property
    def queues(self) -> bool:
        """Whether steps are queued on a device that works while the host goes on."""
        return any(learner.fused for learner in self.learners)

    def _begin(self, learner: Learner, d: DictionaryConfig, batch: Batch) -> Reading:
        k = self.config.k_at(self.done, d.k, d.d_sae)
        return learner.begin(batch[d.block], k, d.peak_lr * self.config.lr_share(self.done))

    def _read(self, begun: Sequence[Reading], step: int) -> list[StepStats]:
        """Statistics of a step, counted from 1. UserError if a loss is not finite."""
        stats = [read() for read in begun]
        for name, s in zip(self.config.names, stats, strict=False):
            if not math.isfinite(s.loss):
                raise UserError(
                    f"the loss of {name} is {s.loss} at step {step}",
                    "a finite loss",
                    "lower lr, or look for activations that are far too large (outlier_multiple)",
                )
        return stats

    def _scaled(self, batch: Batch) -> dict[int, Tensor]:
        return {b: x.to(self.device, torch.float32) * self._scale(b, x.shape[1]) for b, x in batch.items()}

    def _scale(self, block: int, d_model: int) -> float:
        """What residuals of a block are multiplied by; the stream's own scale makes their mean square norm d_model."""
        return self.stream.scale[block] * (d_model**-0.5 if self.config.unit == "token" else 1.0)

    # ------------------------------------------------------------------------------------------------------- checkpoints
    def save(self) -> None:
        """Writes the checkpoint."""
        state = {"config": _plain(self.config), "done": self.done, "last": self.last}
        if self.grid.everyone.rank == 0:
            state["stream"] = self.stream.state()
        checkpoint.save(self.folder, self.done, state, [learner.state() for learner in self.learners], self.grid)

    def _saved(self) -> dict[str, Any] | None:
        """The checkpoint in the folder, or None. UserError if it is one of another config."""
        state = checkpoint.load(self.folder, self.grid)
        if state is None:
            return None
        mine = _plain(self.config)
        other = sorted(key for key in mine if state["config"].get(key) != mine[key] and key not in _FREE)
        if other:
            raise UserError(
                f"{self.folder / checkpoint.FILE} belongs to another training; it differs in: {', '.join(other)}",
                "the same options until a training is finished",
                "choose another --out, or delete that folder",
            )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.stream.restore(state["stream"])
        for learner, saved in zip(self.learners, state["learners"], strict=True):
            learner.restore(saved)
        self.done, self.last = state["done"], state["last"]

    def _trim_metrics(self) -> None:
        """Drops lines that were written after the checkpoint; they will be written again."""
        metrics = self.folder / "metrics.jsonl"
        if self.grid.everyone.rank == 0 and metrics.is_file():
            kept = [line for line in metrics.read_text().splitlines() if _step_of(line) <= self.done]
            with atomic_path(metrics) as path:
                path.write_text("".join(f"{line}\n" for line in kept))

    # --------------------------------------------------------------------------------------------------------------- end
    def finish(self, i: int) -> Trained:
        """Sets the threshold on held-out tokens, folds the scale, saves."""
        d, name, learner = self.config.dictionaries[i], self.config.names[i], self.learners[i]
        held_out = self._scaled(self.stream.held_out(self.config.calibration_tokens))[d.block]
        scale = self._scale(d.block, held_out.shape[1])
        threshold = calibrated_threshold(learner, held_out, d.k)
        # In the units of the saved dictionary, whose threshold it is, and not of the lines of metrics.
        thresholds = {"running_threshold": learner.threshold, "threshold": threshold}
        last = {**self.last[i], **{name: t / scale for name, t in thresholds.items()}}
        source = self.stream.info(d.block)
        notes = list(source.notes)
        if len(held_out) < self.config.calibration_tokens:
            notes.append(
                f"its threshold was set on {len(held_out):,} held-out tokens, of {self.config.calibration_tokens:,} wanted"
            )
        info = replace(
            source,
            k=d.k,
            training={
                **source.training, "config": _record(self.config, d),
                "scale": scale, "tokens": self.done * self.config.batch, "last": last,
                "versions": {name: version(name) for name in ("pvsae", "torch")},
            },
        )  # fmt: skip
        arrays = [learner.W_enc, learner.b_enc, learner.W_dec, learner.silent_for]
        if self.grid.width.size > 1:
            first = self.grid.data.rank == 0
            gathered = [self.grid.width.rows_on_host(t) if first else None for t in arrays]
            arrays = [t for t in gathered if t is not None]
        if arrays:  # here is the whole dictionary
            W_enc, b_enc, W_dec, silent_for = arrays
            alive = silent_for < self.config.step.dead_after
            if self.config.drop_dead and 0 < (n_alive := int(alive.sum())) < d.d_sae:
                W_enc, b_enc, W_dec = W_enc[alive], b_enc[alive], W_dec[alive]
                notes.append(f"{d.d_sae - n_alive:,} of {d.d_sae:,} latents were dead at the end of training, and left out")
            info = replace(info, notes=tuple(notes))
            ref = str(self.folder / name)
            sae = SAE(W_enc.T, b_enc, W_dec, learner.b_dec, threshold, info=info, ref=ref).unscaled(scale)
            if self.grid.everyone.rank == 0:
                save(sae, self.folder / name)
        if self.grid.width.size > 1:
            self.grid.everyone.wait()
            return _read_back(self.config, i, self.folder)
        return Trained(name, sae, last)


def calibrated_threshold(learner: Learner, x: Float[Tensor, "n d_model"], k: float) -> float:
    """The threshold that k activations a token pass, on tokens that were not trained on.

    The running mean of the smallest kept activation lags behind the weights, and is noisy with small batches; this is exact, in
    fp32, as a saved dictionary is used, whatever product it was trained with.
    """
    kept = learner.grid, learner.guess, learner.change, learner.rest, learner.product_dtype
    learner.grid, learner.guess, learner.product_dtype = learner.grid.row, None, torch.float32
    try:
        _, smallest = learner.select(x, k)
    finally:
        learner.grid, learner.guess, learner.change, learner.rest, learner.product_dtype = kept
    # The smallest is to pass too, and what passes is above the threshold.
    return float(torch.nextafter(torch.tensor(smallest), torch.tensor(0.0)))


def geometric_median(x: Float[Tensor, "n d_model"], n_steps: int = 50) -> Float[Tensor, " d_model"]:
    """The point with the smallest sum of distances to the rows (Weiszfeld's iteration), where b_dec starts."""
    guess = x.mean(0)
    for _ in range(n_steps):
        weight = 1 / torch.linalg.vector_norm(x - guess, dim=1).clamp_min(1e-8)
        moved = weight @ x / weight.sum()
        close = bool(torch.linalg.vector_norm(moved - guess) <= 1e-5 * torch.linalg.vector_norm(guess).clamp_min(1e-8))
        guess = moved
        if close:
            break
    return guess


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for a line that was cut short, which can only be the last one."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _shown(stats: Sequence[StepStats]) -> dict[str, str]:
    """What the progress bar says: of the worst dictionary where there are several."""
    return {
        "FVU": f"{max(s.fvu for s in stats):.4f}",
        "L0": f"{max(s.l0 for s in stats):.1f}",
        "dead": str(max(s.n_dead for s in stats)),
    }


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The config as values that survive a checkpoint unchanged."""
    out = {f.name: getattr(config, f.name) for f in fields(config)}
    out["dictionaries"] = [asdict(d) for d in config.dictionaries]
    out["step"] = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config.step).items()}
    return out


def _record(config: TrainConfig, d: DictionaryConfig) -> dict[str, Any]:
    """What a dictionary keeps of the config: all but the other dictionaries, which change nothing in it."""
    return {**_plain(config), "dictionaries": [asdict(d)]}
