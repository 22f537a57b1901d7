"""Dictionaries in folders, in the layout of SAELens: cfg.json beside sae_weights.safetensors.

Knows: that layout (versions 6 and earlier), which parts of it this package's SAE can honour, and where our own facts go in it.
Does not know: other trainers' folders (foreign.py), the hub (releases.py), what a dictionary computes.

We write architecture "jumprelu" (or "topk") and put SAEInfo into `metadata.pvsae`, which SAELens keeps and ignores. Weights are
never unpickled, and opened memory-mapped: a page is read when it is used.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvsae.errors import UserError
from pvsae.runs import atomic_path, read_json, write_json
from pvsae.saes.dictionary import SAE, SAEInfo

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
LAYOUT = "6.54.12"  # the SAELens version whose layout is written; without one, SAELens takes a folder for an older layout
ARCHITECTURES = ("jumprelu", "standard", "topk", "batchtopk")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_HOOK = re.compile(r"^blocks\.(\d+)\.hook_(\w+)$")


# ----------------------------------------------------------------------------------------------------------------- save
def save(sae: SAE, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a folder that `load` and `sae_lens.SAE.load_from_disk` read.

    Args:
        dtype: of the weights in the file; None takes the dictionary's own.

    Both files are written beside their place and then moved there, weights first, so a folder with a cfg.json is whole.

    Raises: UserError where the folder cannot be written, or for a dtype that the layout has no name for.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    kind = dtype or sae.dtype
    dtype_name = str(kind).removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise UserError(f"a dictionary in {kind} cannot be saved", "one of " + ", ".join(DTYPES))
    arrays = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.top_k is None:
        arrays["threshold"] = sae.threshold
    # Biases and thresholds stay in fp32: in bf16 they would move the number of active latents. SAELens casts them when it loads.
    kinds = {key: kind if key.startswith("W") else sae.acts_dtype for key in arrays}
    config = _config_of(sae, dtype_name)
    with contextlib.suppress(OSError):  # what is wrong with the folder, atomic_path says better
        (folder / CONFIG).unlink()  # a config of other weights must not stand beside these for a moment
    with atomic_path(folder / WEIGHTS) as tmp:
        save_file({name: value.to("cpu", kinds[name]).contiguous() for name, value in arrays.items()}, tmp, {"format": "pt"})
    write_json(folder / CONFIG, config)
    return folder


def _config_of(sae: SAE, dtype: str) -> dict[str, Any]:
    from dataclasses import replace
    from importlib.metadata import version

    info = replace(sae.info, dtype=dtype)
    return {
        "architecture": "jumprelu" if sae.top_k is None else "topk",
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        **({} if sae.top_k is None else {"k": sae.top_k, "rescale_acts_by_decoder_norm": False}),
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": LAYOUT,
            "sae_lens_training_version": None,
            "model_name": info.model,
            "hook_name": info.hook_name,
            "hook_head_index": None,
            "prepend_bos": info.prepend_bos,
            "context_size": info.context_size,
            "dataset_path": info.dataset,
            "neuronpedia_id": info.neuronpedia,
            "pvsae": {"version": version("pvsae"), **info.to_dict()},
        },
    }


# ----------------------------------------------------------------------------------------------------------------- load
def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    calibrate: Tensor | None = None,
) -> SAE:
    """Opens a dictionary: a folder of SAELens' layout, a folder of dictionary_learning, or a release "RELEASE/ID".

    Args:
        source: the folder, or the name of a release where there is no such folder.
        device, dtype: where and what the weights are to be; on the CPU and in the file's dtype they stay memory-mapped.
        scale: factor s that activations were multiplied by in training, where the folder says that there was one and not which.
        calibrate: residuals [n, d_model] for the threshold of an unfinished run of dictionary_learning.

    Raises: UserError for a missing folder or file, an architecture or normalisation that cannot be honoured, arrays that do not
        fit the config, values that are not finite.
    """
    folder = Path(source).expanduser()
    if (folder / CONFIG).is_file():
        return load_folder(folder, scale=scale).to(device, dtype)
    if (folder / "ae.pt").is_file():
        from pvsae.saes.foreign import load_dictionary_learning

        return load_dictionary_learning(folder, calibrate=calibrate).to(device, dtype)
    if not folder.exists() and str(source).count("/") >= 1 and not str(source).startswith((".", "/", "~")):
        from pvsae.saes.releases import load_release

        return load_release(str(source), scale=scale).to(device, dtype)
    raise UserError(
        f"no dictionary in {source}" if folder.exists() else f"there is no dictionary {str(source)!r}",
        f"a folder with {CONFIG} and {WEIGHTS} (SAELens), with ae.pt and config.json (dictionary_learning), or RELEASE/ID",
        "check the path; a training run keeps its dictionaries in subfolders",
    )


def load_folder(folder: str | Path, *, scale: float | None = None) -> SAE:
    """Opens one folder of SAELens' layout, memory-mapped; see `load`."""
    folder = Path(folder)
    config = read_json(folder / CONFIG, "config of a dictionary")
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} holds a {type(config).__name__}", "the JSON object that SAELens writes")
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"{folder} has a {CONFIG} and no {WEIGHTS}", "both files", "copy the whole folder (pickled weights are not read)"
        )
    if scale is None and (folder / SCALER).is_file():
        scale = read_json(folder / SCALER, "activation scaler").get("scaling_factor")
    return from_state(current_config(config), open_arrays(file), ref=str(folder), scale=scale)


def open_arrays(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped. UserError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as arrays:
            return {name: arrays.get_tensor(name) for name in arrays.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}", "a whole safetensors file", "copy it again") from error


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of any SAELens version in the form that version 6 writes."""
    given = dict(config)
    metadata = given.get("metadata")
    if isinstance(metadata, dict) and metadata.get("sae_lens_version"):
        return given
    # Before version 6 all fields stood on one level, some under other names.
    for old, new in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if old in given:
            given.setdefault(new, given.pop(old))
    options = given.get("activation_fn_kwargs") or {}
    given.setdefault("architecture", "standard")
    if given.get("activation_fn") == "topk" and options.get("k") is not None:
        given["architecture"], given["k"] = "topk", options["k"]
    elif str(given.get("activation_fn") or "relu") not in ("relu", "topk"):
        raise UserError(f"activation function {given['activation_fn']!r} of a dictionary", "relu or topk")
    normalize = given.get("normalize_activations")
    if isinstance(normalize, bool) or normalize is None:
        given["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    names = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id")
    given["metadata"] = {**{name: given[name] for name in names if name in given}, **(metadata or {})}
    return given


def from_state(config: Mapping[str, Any], arrays: Mapping[str, Tensor], *, ref: str, scale: float | None = None) -> SAE:
    """A dictionary from a config of SAELens (version 6) and its arrays.

    Raises: UserError as `load`.
    """
    architecture = str(config.get("architecture", "standard"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{ref} has the architecture {architecture!r}",
            "one of " + ", ".join(ARCHITECTURES),
            "load it with sae_lens itself; its features are not computed by an encoder and a threshold alone",
        )
    if config.get("reshape_activations", "none") != "none":
        raise UserError(f"{ref} reads reshaped activations ({config['reshape_activations']})", "a dictionary of residuals")
    if config.get("finetuning_scaling_factor") and "finetuning_scaling_factor" in arrays:
        raise UserError(
            f"{ref} has a finetuning scaling factor", "weights into which it was folded", "save it anew with sae_lens"
        )
    wanted = ("W_enc", "b_enc", "W_dec", "b_dec")
    missing = [name for name in wanted if name not in arrays]
    missing += ["threshold"] if architecture == "jumprelu" and "threshold" not in arrays else []
    if missing:
        raise UserError(
            f"{ref} lacks {', '.join(missing)}", "the arrays of architecture " + architecture, "the file is not whole"
        )
    _check_sizes(config, arrays, ref)
    w_enc, b_enc, w_dec, b_dec = (arrays[name] for name in wanted)
    info = _info(config, w_dec.dtype)
    top_k, threshold = _selection(architecture, config, arrays, ref)
    if config.get("rescale_acts_by_decoder_norm"):
        # Latents are compared by what they add to the residual: the same as unit rows and an encoder that is longer by that.
        norms = torch.linalg.vector_norm(w_dec.float(), dim=1).clamp(min=1e-8)
        w_enc, b_enc, w_dec = (w_enc * norms).to(w_dec.dtype), b_enc * norms, (w_dec / norms[:, None]).to(w_dec.dtype)
    sae = SAE(
        w_enc, b_enc, w_dec, b_dec, threshold,
        info=info, ref=ref, apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)), top_k=top_k,
    )  # fmt: skip
    return _undo_scale(sae, str(config.get("normalize_activations") or "none"), scale)


def _check_sizes(config: Mapping[str, Any], arrays: Mapping[str, Tensor], ref: str) -> None:
    for key, axis in (("d_in", 1), ("d_sae", 0)):
        said, found = config.get(key), arrays["W_dec"].shape[axis]
        if said is not None and said != found:
            raise UserError(f"the config of {ref} says {key} {said}, its arrays have {found}", "a config and weights of one run")


def _selection(
    architecture: str, config: Mapping[str, Any], arrays: Mapping[str, Tensor], ref: str
) -> tuple[int | None, Tensor | float]:
    """(top_k, threshold) of an architecture."""
    if architecture == "jumprelu":
        return None, arrays["threshold"]
    if architecture == "standard":
        return None, 0.0
    if architecture == "batchtopk":
        threshold = arrays.get("topk_threshold", arrays.get("threshold"))
        if threshold is None or not bool((threshold > 0).all()):
            raise UserError(
                f"{ref} is a BatchTopK dictionary without a threshold, so how many latents are active is not known",
                "a threshold above 0, as a finished training run has",
                "save it for inference with the trainer that made it",
            )
        return None, threshold.float()
    if not isinstance(config.get("k"), int):
        raise UserError(f"the config of {ref} says k {config.get('k')!r}", "how many latents a token a topk dictionary keeps")
    return int(config["k"]), 0.0


def _undo_scale(sae: SAE, normalize: str, scale: float | None) -> SAE:
    """Honours `normalize_activations`, or says why not."""
    if normalize == "none":
        return sae
    if normalize == "expected_average_only_in":
        if scale is None:
            raise UserError(
                f"{sae.ref} was trained on scaled activations, and its folder does not say by which factor",
                "weights into which the factor was folded, or the factor",
                "pass scale=, or save it for inference with the trainer that made it",
            )
        return sae.unscaled(float(scale))
    raise UserError(
        f"{sae.ref} normalises every token by itself ({normalize})",
        "normalize_activations none or expected_average_only_in",
        "use sae_lens for it: a reconstruction there needs more than the activations",
    )


def _info(config: Mapping[str, Any], dtype: torch.dtype) -> SAEInfo:
    metadata = config.get("metadata") or {}
    name = str(dtype).removeprefix("torch.")
    own = metadata.get("pvsae")
    if isinstance(own, dict):
        return SAEInfo.from_dict({**own, "dtype": name})
    hook = metadata.get("hook_name")
    match = _HOOK.match(hook) if isinstance(hook, str) else None
    block, site = (int(match[1]), match[2]) if match else (None, str(hook or "resid_post"))
    notes = () if match or hook is None else (f"its site {hook!r} is not the output of a block",)
    if site == "resid_pre" and block:
        # What goes into block b is what came out of the one before it.
        block, site, notes = block - 1, "resid_post", (f"its site {hook!r} is the output of block {block - 1}",)
    return SAEInfo(
        model=metadata.get("model_name"),
        block=block,
        site=site,
        k=config.get("k"),
        dtype=name,
        prepend_bos=metadata.get("prepend_bos"),
        context_size=metadata.get("context_size"),
        dataset=metadata.get("dataset_path"),
        neuronpedia=metadata.get("neuronpedia_id"),
        notes=notes,
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The cfg.json of a folder, as it is, for people to look at."""
    return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
