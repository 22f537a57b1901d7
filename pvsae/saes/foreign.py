"""Dictionaries of the package dictionary_learning: ae.pt beside config.json.

Knows: the arrays and names of its classes, and what its configs say.
Does not know: SAELens' layout (folders.py), the hub (releases.py).

The pickle is read with `weights_only=True`, which makes tensors and plain containers and runs no code, and memory-mapped. Its
decoder is stored the other way round than ours, so `SAE.W_dec` is a strided view of the file until `SAE.in_memory` copies it.
Scales of training are in the arrays already: the package folds them into biases and threshold when it saves.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import read_json
from pvsae.saes.dictionary import SAE, SAEInfo

WEIGHTS, CONFIG = "ae.pt", "config.json"
THRESHOLD = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")  # classes that are used with a threshold that training estimates
CLASSES = (*THRESHOLD, "AutoEncoderTopK", "AutoEncoder", "AutoEncoderNew", "JumpReluAutoEncoder")
_LAYER = re.compile(r"(?<![a-z])layer_?(\d+)")


def load_dictionary_learning(
    folder: str | Path, *, calibrate: Float[Tensor, "n d_model"] | None = None, ref: str | None = None
) -> SAE:
    """Opens a folder of dictionary_learning.

    Args:
        calibrate: raw residuals at the dictionary's site, on which the threshold of an unfinished BatchTopK run is computed so
            that k latents a token are active. Such a run has threshold -1 until its step 1000, with which every latent whose
            pre-activation is positive would count.
        ref: what to call it; None takes the path.

    Raises: UserError for a missing or damaged file, a class that an encoder and a threshold do not describe, a threshold of -1
        without `calibrate`.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "config of a dictionary")
    trainer = config.get("trainer") if isinstance(config, dict) else None
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UserError(
            f"{folder / CONFIG} names no dict_class", "the config.json that dictionary_learning writes", "copy it again"
        )
    kind = trainer["dict_class"]
    if kind not in CLASSES:
        raise UserError(
            f"{folder} holds a {kind}", "one of " + ", ".join(CLASSES), "its features are not an encoder and a threshold"
        )
    arrays = read_arrays(folder / WEIGHTS)
    info = info_of(config, folder)
    sae = _build(kind, arrays, info, ref or str(folder))
    for name, found in (("activation_dim", sae.d_model), ("dict_size", sae.d_sae)):
        if trainer.get(name, found) != found:
            raise UserError(f"{folder / CONFIG} says {name} {trainer[name]}, {WEIGHTS} has {found}", "two files of one run")
    if kind not in THRESHOLD:
        return sae
    threshold = float(arrays.get("threshold", torch.tensor(-1.0)))
    if threshold >= 0:
        return sae
    if calibrate is None:
        raise UserError(
            f"{folder} has the threshold {threshold:g}: the run was stopped before it was estimated",
            "a finished run, or activations to compute the threshold on",
            "load_dictionary_learning(folder, calibrate=residuals), with a few thousand residuals of its block",
        )
    k = _number_of("k", trainer, arrays, folder)
    found_threshold = threshold_for(sae, calibrate, k)
    note = f"threshold {found_threshold:.4g} computed on {len(calibrate)} residuals, because the file has {threshold:g}"
    return SAE(
        sae.W_enc,
        sae.b_enc,
        sae.W_dec,
        sae.b_dec,
        found_threshold,
        info=sae.with_info(notes=(*info.notes, note)).info,
        ref=sae.ref,
    )


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, memory-mapped. UserError where it cannot be read, or holds more than tensors."""
    if not file.is_file():
        raise UserError(f"there is no {file}", f"{WEIGHTS} beside {CONFIG}", "copy the whole folder")
    try:
        arrays = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} cannot be read as arrays ({reason:.200})",
            "a state dict saved by torch.save",
            "it is never unpickled as code",
        ) from error
    if not isinstance(arrays, dict) or not all(isinstance(value, Tensor) for value in arrays.values()):
        raise UserError(f"{file} holds more than named arrays", "a state dict saved by torch.save")
    return arrays


def _build(kind: str, arrays: Mapping[str, Tensor], info: SAEInfo, ref: str) -> SAE:
    def get(*names: str) -> Tensor:
        for name in names:
            if name in arrays:
                return arrays[name]
        raise UserError(f"{ref} lacks {names[0]!r}", f"the arrays of a {kind}", f"it has {', '.join(sorted(arrays)) or 'none'}")

    if "W_enc" in arrays:
        encoder, decoder = get("W_enc"), get("W_dec")
    else:
        encoder, decoder = get("encoder.weight").T, get("decoder.weight").T
    b_enc, b_dec = get("b_enc", "encoder.bias"), get("b_dec", "bias", "decoder.bias")
    top_k = _number_of("k", {"k": info.k}, arrays, ref) if kind == "AutoEncoderTopK" else None
    threshold: Tensor | float = 0.0
    if kind in (*THRESHOLD, "JumpReluAutoEncoder"):
        threshold = get("threshold").float()
    return SAE(
        encoder, b_enc, decoder, b_dec, threshold,
        info=info, ref=ref, top_k=top_k, apply_b_dec_to_input=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
    )  # fmt: skip


def _number_of(name: str, trainer: Mapping[str, Any], arrays: Mapping[str, Tensor], where: object) -> int:
    value = trainer.get(name)
    if value is None and name in arrays:
        value = int(arrays[name])
    if not value or value != int(value) or value < 1:
        raise UserError(f"{where} does not say {name}", f"a whole number {name} in {CONFIG}")
    return int(value)


def info_of(config: Mapping[str, Any], folder: str | Path) -> SAEInfo:
    """What a config.json says, and what it does not: nothing is assumed about BOS tokens or the data."""
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    notes: list[str] = []
    block = trainer.get("layer")
    named = _LAYER.search(str(trainer.get("submodule_name") or ""))
    if named is None and block is None:  # published folders are called after it: resid_post_layer_19/trainer_1
        at = Path(folder)
        named = _LAYER.search(at.name) or _LAYER.search(at.parent.name)
    if named and block is not None and int(named[1]) != block:
        notes.append(f"its config says layer {block}, its name says {named[1]}; block {named[1]} is taken")
    block = int(named[1]) if named else block
    special = buffer.get("add_special_tokens")
    if special:  # whatever the tokenizer adds: a BOS token by Llama's and Gemma's, nothing by Qwen's
        notes.append("its contexts began with the tokenizer's special tokens; whether a BOS token is among them, it does not say")
    plain = {key: value for key, value in trainer.items() if isinstance(value, str | int | float | bool | None)}
    return SAEInfo(
        model=trainer.get("lm_name"),
        block=block,
        site="resid_post" if buffer.get("io", "out") == "out" else str(buffer["io"]),
        k=trainer.get("k"),
        prepend_bos=False if special is False else None,
        context_size=buffer.get("ctx_len"),
        training={"package": "dictionary_learning", "trainer": plain, "buffer": dict(buffer)},
        notes=tuple(notes),
    )


def threshold_for(sae: SAE, x: Float[Tensor, "n d_model"], k: float) -> float:
    """The one threshold at which the residuals x have k active latents a token on average; outliers are left out.

    It stands half-way between the last activation that is kept and the first that is not, all latents of all tokens taken
    together, as BatchTopK does. Latents are read in chunks. UserError for no residuals, or k above what is positive.
    """
    x = x[~sae.outliers(x)]
    wanted = round(k * len(x))
    if wanted < 1:
        raise UserError(f"{len(x)} residuals for a threshold at k {k}", "some thousand residuals that are no outliers")
    centred = sae._centred(x)
    best = torch.empty(0, dtype=sae.acts_dtype, device=sae.device)
    for some in sae.chunks(len(x)):
        best = torch.cat([best, sae._pre(centred, some).relu().flatten()])
        best = best.topk(min(wanted + 1, len(best))).values
    last = best[min(wanted, len(best)) - 1]
    if not last > 0:
        raise UserError(f"fewer than {k} latents a token have a positive pre-activation", "residuals of the dictionary's block")
    after = best[wanted] if len(best) > wanted else last
    return float((last + after) / 2) if after < last else float(last) * (1 - 1e-6)
