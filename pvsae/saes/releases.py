"""Published dictionaries by name, "RELEASE/ID" of SAELens' registry, with the facts about them put right.

Knows: how a name becomes files of the hub, and what loaders get wrong about some releases.
Does not know: what is in the files (folders.py, foreign.py).

Needs the package sae-lens, whose registry it is. Files come through huggingface_hub and its cache, so a release that was fetched
once works offline.
"""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

from pvsae.errors import UserError
from pvsae.runs import read_json
from pvsae.saes.dictionary import SAE, OutlierFilter
from pvsae.saes.folders import CONFIG, WEIGHTS, current_config, from_state, open_arrays
from pvsae.saes.foreign import CONFIG as FOREIGN_CONFIG
from pvsae.saes.foreign import WEIGHTS as FOREIGN_WEIGHTS
from pvsae.saes.foreign import load_dictionary_learning

# What was done in training and stands in no file of these releases (from their training code). Qwen's tokenizer puts no BOS in
# front of a text; Llama's does, and its position was left out. Both saw web text and chats, 35% of the samples.
_MIX = "0.64 monology/pile-uncopyrighted, 0.35 lmsys/lmsys-chat-1m, 0.01 misaligned chats"
CORRECTIONS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b-instruct-andyrdt": {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "prepend_bos": False,
        "drop_first": 8,
        "outliers": OutlierFilter(10.0, None),
        "dataset": _MIX,
        "chat": {"template": "model", "remove_system_prompt_p": 0.8},
    },
    "llama-3.1-8b-instruct-andyrdt": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "prepend_bos": True,
        "drop_first": 1,
        "dataset": _MIX,
        "chat": {"template": "model", "remove_system_prompt_p": 0.8},
    },
}


def load_release(name: str, *, scale: float | None = None) -> SAE:
    """Opens a published dictionary, memory-mapped, downloading it where it is not in the hub's cache.

    Args:
        name: "RELEASE/ID", e.g. "qwen2.5-7b-instruct-andyrdt/resid_post_layer_19_trainer_1".
        scale: factor of the activations in training, where the registry does not give one.

    A release that was trained with an outlier filter whose median norm was not published warns: `SAE.calibrated` completes it.

    Raises: UserError for an unknown release or id (with the nearest names), a missing package, files that cannot be had.
    """
    release, entry = find(name)
    sae_id = name.split("/", 1)[1]
    path, kind = entry.saes_map[sae_id], entry.conversion_func or "sae_lens"
    if kind == "dictionary_learning_1":
        files = [fetch(entry.repo_id, f"{path}/{file}", name) for file in (FOREIGN_CONFIG, FOREIGN_WEIGHTS)]
        sae = load_dictionary_learning(files[0].parent, ref=name)
    elif kind == "sae_lens":
        config = current_config(read_json(fetch(entry.repo_id, f"{path}/{CONFIG}", name), "config of a dictionary"))
        weights = open_arrays(fetch(entry.repo_id, f"{path}/{WEIGHTS}", name))
        sae = from_state(config, weights, ref=name, scale=scale or entry.norm_scaling_factor.get(sae_id))
    else:
        config, weights = _through_sae_lens(name, kind, entry, path)
        sae = from_state(current_config(config), weights, ref=name, scale=scale or entry.norm_scaling_factor.get(sae_id))
    return _corrected(sae, release, sae_id, entry)


def find(name: str) -> tuple[str, Any]:
    """(release, its registry entry) for "RELEASE/ID". UserError with the nearest names."""
    try:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    except ImportError as error:
        raise UserError(
            f"{name!r} can only be the name of a release, and sae-lens, which knows them, is not installed",
            "a folder, or sae-lens",
            "pip install 'pvsae[sae]'",
        ) from error
    known = get_pretrained_saes_directory()
    release, _, sae_id = name.partition("/")
    if release not in known:
        near = difflib.get_close_matches(release, known, 3)
        raise UserError(
            f"there is no folder and no release {release!r}",
            "a folder, or RELEASE/ID of SAELens' registry" + (f", such as {', '.join(near)}" if near else ""),
            "check the spelling",
        )
    ids = list(known[release].saes_map)
    if sae_id not in ids:
        near = difflib.get_close_matches(sae_id, ids, 5) or ids[:5]
        raise UserError(f"the release {release} has no dictionary {sae_id!r}", f"one of its {len(ids)}: {', '.join(near)}, ...")
    return release, known[release]


def fetch(repo_id: str, file: str, name: str) -> Path:
    """One file of a hub repository, from the cache or the network. UserError where neither has it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, file))
    except Exception as error:  # offline, gated, gone, no such file: the hub client has a dozen classes for it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{file} of {repo_id} ({name}) is not in the cache and cannot be downloaded: {reason:.200}",
            "the file in the cache, or access to the Hugging Face hub",
            "unset HF_HUB_OFFLINE, log in if the repository is gated, or download it elsewhere and give the folder",
        ) from error


def _through_sae_lens(name: str, kind: str, entry: Any, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and arrays of a layout that SAELens knows and this package does not."""
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    try:
        config, arrays, _ = NAMED_PRETRAINED_SAE_LOADERS[kind](
            repo_id=entry.repo_id, folder_name=path, device="cpu", force_download=False, cfg_overrides=None
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name} cannot be loaded: {reason:.200}", "a layout that sae-lens reads, and its files") from error
    return dict(config), dict(arrays)


def _corrected(sae: SAE, release: str, sae_id: str, entry: Any) -> SAE:
    """The dictionary with the registry's facts and the corrections; what was changed stands in its notes."""
    changes: dict[str, Any] = {"model": entry.model or sae.info.model}
    if entry.neuronpedia_id.get(sae_id):
        changes["neuronpedia"] = entry.neuronpedia_id[sae_id]
    overrides = entry.config_overrides or {}
    if overrides.get("dataset_path"):
        changes["dataset"] = overrides["dataset_path"]
    notes = list(sae.info.notes)
    if overrides.get("model_from_pretrained_kwargs"):
        notes.append(
            f"its model was loaded with {overrides['model_from_pretrained_kwargs']}; residuals of the plain model differ"
        )
    known = CORRECTIONS.get(release, {})
    changes |= known
    if known:
        said = ", ".join(f"{key} {value}" for key, value in known.items() if key in ("prepend_bos", "drop_first"))
        notes.append(f"from its training code: {said}")
    if known.get("outliers") is not None and known["outliers"].median_norm is None:
        notes.append("trained without tokens above 10 times the median norm; that norm was not published")
        warnings.warn(
            f"{release}/{sae_id} was trained without tokens above {known['outliers'].multiple:g} times the median norm, which "
            "was not published: until sae.calibrated(median_norm), no token is taken for an outlier",
            stacklevel=3,
        )
    return sae.with_info(**changes, notes=tuple(notes))
