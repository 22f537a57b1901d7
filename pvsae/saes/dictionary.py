"""SAE: a sparse dictionary for inference, on raw residuals, in as little memory as its weights take.

Knows: encoding (JumpReLU, or top-k a token), decoding, the search of all latents in chunks.
Does not know: files (folders.py, foreign.py, releases.py), training, models, hooks.

A BatchTopK dictionary with its calibrated threshold is a JumpReLU dictionary, and a ReLU dictionary one with threshold 0. Any
scale that activations had in training is folded into the arrays before they come here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvsae.errors import UserError
from pvsae.saes.info import OutlierFilter, SAEInfo, same_model

__all__ = ["SAE", "OutlierFilter", "SAEInfo", "SparseActs"]

CHUNK_BYTES = 64 * 2**20  # of one fp32 copy of some latents' rows; a few of these are alive at once


class SparseActs(NamedTuple):
    """The activations that are not zero, sorted by token, then by latent.

    Attributes:
        token: row of the input, counted over all of its leading dimensions.
        latent: index of the dictionary element.
        value: activation, fp32, greater than 0.
    """

    token: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]


class SAE:
    """A dictionary: `encode` residuals to activations, `decode` activations to residuals. Frozen: no parameter, no training.

    Activations are `pre * (pre > threshold)`, at least 0, with `pre = (x - b_dec) @ W_enc + b_enc`; with `top_k`, the top_k
    largest positive `pre` of a token. Products are taken in the dtype of the weights, everything else and every result is fp32
    (fp64 with fp64 weights). Gradients flow to x.

    Attributes:
        W_enc: [d_model d_sae]. A transposed view of one row a latent, or as it lies in a memory-mapped file.
        b_enc, threshold: [d_sae].
        W_dec: [d_sae d_model].
        b_dec: [d_model].
        apply_b_dec_to_input: whether b_dec is taken off a residual before encoding.
        top_k: latents kept a token in place of a threshold, or None.
        info: what is known of it beside the arrays.
        ref: name for configs and results: a path or a release id.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "d_model d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, " d_model"],
        threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"] | float = 0.0,
        *,
        info: SAEInfo | None = None,
        ref: str = "sae",
        apply_b_dec_to_input: bool = True,
        top_k: int | None = None,
    ) -> None:
        """Takes the arrays as they are; nothing is copied but biases and threshold.

        Args:
            threshold: one for all latents or one each; below 0 it is 0, since no activation is negative.

        Raises: UserError for shapes that do not fit, mixed or integer dtypes, NaN in a bias or threshold, a top_k out of range.
        """
        if W_dec.ndim != 2 or W_enc.shape != W_dec.shape[::-1]:
            raise UserError(
                f"W_enc {list(W_enc.shape)} and W_dec {list(W_dec.shape)} do not fit",
                "[d_model, d_sae] and [d_sae, d_model]",
                "give W_enc transposed: its rows are dimensions of the residual, its columns are latents",
            )
        if W_enc.dtype != W_dec.dtype or not W_dec.is_floating_point() or W_enc.device != W_dec.device:
            raise UserError(
                f"W_enc is {W_enc.dtype} on {W_enc.device}, W_dec is {W_dec.dtype} on {W_dec.device}",
                "one floating dtype and one device",
            )
        self.W_enc, self.W_dec = W_enc.detach(), W_dec.detach()
        self.info, self.ref = info or SAEInfo(), ref
        self.apply_b_dec_to_input, self.top_k = apply_b_dec_to_input, top_k
        self.b_enc = self._vector("b_enc", b_enc, self.d_sae)
        self.b_dec = self._vector("b_dec", b_dec, self.d_model)
        thresholds = torch.as_tensor(threshold)
        thresholds = thresholds.expand(self.d_sae) if thresholds.ndim == 0 else thresholds
        self.threshold = self._vector("threshold", thresholds, self.d_sae).clamp(min=0)
        if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= self.d_sae):
            raise UserError(f"top_k is {top_k} in a dictionary of {self.d_sae} latents", f"a whole number from 1 to {self.d_sae}")

    def __repr__(self) -> str:
        kind = "jumprelu" if self.top_k is None else f"top-{self.top_k}"
        return f"SAE({self.ref!r}, d_model {self.d_model}, d_sae {self.d_sae}, {kind}, {self.dtype}, {self.device})"

    def _vector(self, name: str, values: Tensor, size: int) -> Tensor:
        if values.shape != (size,):
            raise UserError(f"{name} of shape {list(values.shape)}", f"[{size}]")
        copied = values.detach().to(self.device, self.acts_dtype, copy=True)
        if not bool(torch.isfinite(copied).all()):
            raise UserError(f"{name} has values that are NaN or infinite", "finite values", "the file is damaged; make it anew")
        return copied

    # --------------------------------------------------------------------------------------------------------- what it is
    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def acts_dtype(self) -> torch.dtype:
        """Of activations and reconstructions: fp32, or fp64 with fp64 weights."""
        return torch.promote_types(self.dtype, torch.float32)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same dictionary on another device or in another dtype; itself where nothing changes."""
        place = self.device if device is None else torch.device(device)
        kind = dtype or self.dtype
        if kind == self.dtype and (place == self.device or (place.type == self.device.type and place.index is None)):
            return self
        return self._with(W_enc=self._rows(self.W_enc.T, place, kind).T, W_dec=self._rows(self.W_dec, place, kind))

    def in_memory(self) -> SAE:
        """Itself with both matrices one row a latent: a copy of those that lie otherwise in a file, faster where used much."""
        encoder, decoder = self.W_enc.T, self.W_dec
        if encoder.is_contiguous() and decoder.is_contiguous():
            return self
        if not encoder.is_contiguous():
            encoder = self._rows(encoder, self.device, self.dtype)
        if not decoder.is_contiguous():
            decoder = self._rows(decoder, self.device, self.dtype)
        return self._with(W_enc=encoder.T, W_dec=decoder)

    def calibrated(self, median_norm: float) -> SAE:
        """The same dictionary whose outlier filter knows the median length of residuals. UserError without a filter."""
        if self.info.outliers is None:
            raise UserError(f"{self.ref} was not trained with an outlier filter", "a dictionary whose info has outliers")
        outliers = OutlierFilter(self.info.outliers.multiple, float(median_norm))
        return self._with(info=replace(self.info, outliers=outliers))

    def unscaled(self, scale: float) -> SAE:
        """From a dictionary of `scale * x` to the same one of x: activations and reconstructions become those of raw residuals.

        Only biases and thresholds change (b / scale); rows of the decoder keep their length, the matrices are shared.
        """
        if not 0 < scale < math.inf:
            raise UserError(f"scale is {scale}", "a positive number")
        return self._with(b_enc=self.b_enc / scale, b_dec=self.b_dec / scale, threshold=self.threshold / scale)

    def with_info(self, **changes: Any) -> SAE:
        """The same dictionary (the same arrays) with other facts about it."""
        return self._with(info=replace(self.info, **changes))

    def _with(self, **changes: Any) -> SAE:
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "info", "ref", "apply_b_dec_to_input", "top_k")
        return SAE(**{**{name: getattr(self, name) for name in names}, **changes})

    def check_model(self, model: Any) -> SAE:
        """Itself, if it fits the model. UserError for another d_model or a block that the model does not have."""
        if model.d_model != self.d_model:
            raise UserError(
                f"{self.ref} has d_model {self.d_model}, the model {model.name} has {model.d_model}",
                f"a dictionary of {model.name}" + (f" (this one says it is of {self.info.model})" if self.info.model else ""),
                "load the model that the dictionary was trained on",
            )
        if self.info.block is not None and not 0 <= self.info.block < model.n_blocks:
            raise UserError(
                f"{self.ref} belongs to block {self.info.block}, the model {model.name} has blocks 0 to {model.n_blocks - 1}",
                f"a dictionary of {model.name}",
                "load the model that the dictionary was trained on",
            )
        return self

    def check_trained_on(self, model: str, other_model: bool = False) -> SAE:
        """Itself, if it says that it is of this model, or of none. A dictionary of another model of the same width computes as
        smoothly as the right one, and what it computes means nothing.

        Args:
            model: the model's name.
            other_model: take it all the same; what it is of then stands in its notes.

        Raises: UserError for a dictionary of another model.
        """
        if self.info.model is None or same_model(self.info.model, model):
            return self
        said = f"{self.ref} is of {self.info.model}, the model is {model}"
        if not other_model:
            raise UserError(
                said,
                f"a dictionary of {model}, or the model {self.info.model}",
                "--other-model, if the models are close relatives (a base model and its finetune) and you mean it",
            )
        note = f"Two models, by --other-model: {said}."
        return self if note in self.info.notes else self.with_info(notes=(*self.info.notes, note))

    # ------------------------------------------------------------------------------------------------------ encode, decode
    def outliers(self, x: Float[Tensor, "*batch d_model"]) -> Bool[Tensor, "*batch"]:
        """Tokens that the dictionary was not made for. `encode` does not ask; captures, interventions and evaluation do."""
        if self.info.outliers is None:
            return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        return self.info.outliers.outliers(x)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations of residuals, dense: 4 * d_sae bytes a token. UserError for another d_model."""
        pre = self._pre(self._centred(x), slice(None))
        if self.top_k is None:
            return self._jump(pre, self.threshold)
        kept = pre.topk(self.top_k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())

    def encode_latents(self, x: Float[Tensor, "*batch d_model"], latents: Sequence[int]) -> Float[Tensor, "*batch n"]:
        """Activations of some latents alone, in the order given; the same numbers as `encode(x)[..., latents]`.

        Without top_k it costs those latents alone; with top_k all have to be looked at, chunk by chunk.
        """
        index = torch.as_tensor(list(latents), dtype=torch.long, device=self.device)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.d_sae:
            raise UserError(f"latents {list(latents)[:5]} of a dictionary of {self.d_sae}", f"indices from 0 to {self.d_sae - 1}")
        if self.top_k is None:
            return self._jump(self._pre(self._centred(x), index), self.threshold[index])
        values, kept = self.top(x, self.top_k)
        same = kept[..., None] == index
        return (same * values[..., None]).sum(-2)

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"]) -> SparseActs:
        """The activations that are not zero, found in chunks of latents: never a dense [tokens, d_sae]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.top_k is not None:
            values, latents = self.top(flat, self.top_k)
            tokens = torch.arange(len(flat), device=self.device)[:, None].expand_as(latents)
            token, latent, value = tokens[values > 0], latents[values > 0], values[values > 0]
        else:
            centred, parts = self._centred(flat), []
            for some in self.chunks(len(flat)):
                acts = self._jump(self._pre(centred, some), self.threshold[some])
                where = acts.nonzero(as_tuple=True)
                parts.append((where[0], where[1] + some.start, acts[where]))
            token, latent, value = (torch.cat(column) for column in zip(*parts, strict=True))
        order = (token * self.d_sae + latent).argsort()
        return SparseActs(token[order], latent[order], value[order])

    def top(self, x: Float[Tensor, "*batch d_model"], k: int) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """The k largest activations of each token and their latents, largest first, found in chunks of latents.

        The threshold counts: a latent below it has activation 0. Where fewer than k are active the rest are zeros, of whichever
        latents.
        """
        if not 1 <= k <= self.d_sae:
            raise UserError(f"top {k} of a dictionary of {self.d_sae} latents", f"a number from 1 to {self.d_sae}")
        flat = self._centred(x).reshape(-1, self.d_model)
        best = flat.new_zeros(len(flat), 0, dtype=self.acts_dtype)
        which = torch.zeros(len(flat), 0, dtype=torch.long, device=self.device)
        for some in self.chunks(len(flat)):
            pre = self._pre(flat, some)
            acts = pre.relu() if self.top_k is not None else self._jump(pre, self.threshold[some])
            found = acts.topk(min(k, acts.shape[-1]), dim=-1)
            best, which = torch.cat([best, found.values], -1), torch.cat([which, found.indices + some.start], -1)
            kept = best.topk(min(k, best.shape[-1]), dim=-1)
            best, which = kept.values, which.gather(-1, kept.indices)
        if self.top_k is not None and k > self.top_k:
            best = torch.where(torch.arange(k, device=self.device) < self.top_k, best, 0.0)
        return best.reshape(*x.shape[:-1], k), which.reshape(*x.shape[:-1], k)

    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction from dense activations. UserError for another d_sae."""
        if acts.shape[-1] != self.d_sae:
            raise UserError(f"activations of {acts.shape[-1]} latents for {self.ref}", f"d_sae {self.d_sae}")
        return (acts.to(self.device, self.dtype) @ self.W_dec).to(self.acts_dtype) + self.b_dec

    def decode_sparse(self, acts: SparseActs, n_tokens: int) -> Float[Tensor, "n_tokens d_model"]:
        """Reconstruction from sparse activations; reads the rows of active latents alone."""
        starts = torch.searchsorted(acts.token, torch.arange(n_tokens, device=self.device))
        latent, rows, weights = acts.latent, self.W_dec, acts.value.to(self.dtype)
        if not rows.is_contiguous():  # embedding_bag would copy all of them
            used, latent = latent.unique(return_inverse=True)
            rows = rows[used]
        summed = torch.nn.functional.embedding_bag(latent, rows, starts, mode="sum", per_sample_weights=weights)
        return summed.to(self.acts_dtype) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction of residuals, in fp32; never a dense [tokens, d_sae] where no gradient is asked for."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.decode(self.encode(x))
        flat = x.reshape(-1, x.shape[-1])
        return self.decode_sparse(self.encode_sparse(flat), len(flat)).reshape(x.shape)

    __call__ = forward

    # -------------------------------------------------------------------------------------------------- reading a direction
    def cosines(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_sae"]:
        """Cosine of one or several vectors with every row of the decoder; 0 for rows and vectors of length 0.

        Rows are read in chunks, so that beside the weights only a few tens of MB are held.
        """
        self._check_width(v)
        flat = v.detach().reshape(-1, self.d_model).to(self.device, self.acts_dtype)
        unit = flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        out = torch.empty(len(unit), self.d_sae, dtype=self.acts_dtype, device=self.device)
        for some in self.chunks(len(unit)):
            rows = self.W_dec[some].to(self.acts_dtype)
            norms = torch.linalg.vector_norm(rows, dim=-1)
            out[:, some] = (unit @ rows.T) / norms.clamp(min=1e-30)
        return out.reshape(*v.shape[:-1], self.d_sae)

    def chunks(self, n_tokens: int = 1) -> Iterator[slice]:
        """Ranges of latents: their rows in fp32, or the activations of n tokens on them, take at most CHUNK_BYTES."""
        size = max(1, min(self.d_sae, CHUNK_BYTES // (4 * max(self.d_model, n_tokens))))
        for start in range(0, self.d_sae, size):
            yield slice(start, min(start + size, self.d_sae))

    # ------------------------------------------------------------------------------------------------------------- helpers
    def _rows(self, matrix: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy with one row a latent, however the matrix lay before, made in chunks so that only the copy takes memory."""
        out = torch.empty(self.d_sae, self.d_model, device=device, dtype=dtype)
        for some in self.chunks():
            out[some] = matrix[some].to(device, dtype)
        return out

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model:
            raise UserError(
                f"a residual of d_model {x.shape[-1]} for {self.ref}",
                f"d_model {self.d_model}" + (f", as {self.info.model} has" if self.info.model else ""),
                "take the model and the block that the dictionary was trained on",
            )

    def _centred(self, x: Tensor) -> Tensor:
        """x - b_dec in fp32, then in the weights' dtype."""
        self._check_width(x)
        x = x.to(self.device, self.acts_dtype)
        return (x - self.b_dec if self.apply_b_dec_to_input else x).to(self.dtype)

    def _pre(self, centred: Tensor, latents: slice | Tensor) -> Tensor:
        return (centred @ self.W_enc[:, latents]).to(self.acts_dtype) + self.b_enc[latents]

    @staticmethod
    def _jump(pre: Tensor, threshold: Tensor) -> Tensor:
        return torch.where(pre > threshold, pre, 0.0)
