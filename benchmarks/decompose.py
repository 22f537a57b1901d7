"""Decomposition at the size of the published dictionaries: planted atoms, time, memory, and the same table from every format.

    python -m benchmarks.decompose [--quick] [--d-sae N] [--d-model N] [--folder FOLDER]

A dictionary of random rows, 131072 x 3584, is written in four layouts (ours, SAELens' of today, SAELens' of version 5 with a
dictionary of scaled activations and the file of their scale, dictionary_learning's); a vector is the sum of 10 unit rows of known
weight plus noise. Each layout is opened memory-mapped by a process of its own, which runs both pursuits to 50 atoms and prints
what it took: seconds, and the peak of resident memory beyond the decoder itself (whose pages the process reads and the system may
take back). Then `pvsae decompose` runs on each, and its tables have to be the same.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import check, record

WEIGHTS = (5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.25, 1.0)
NOISE = 0.5  # length of what is no atom; the smallest weight is twice that
K, BLOCK = 50, 19
LAYOUTS = ("ours", "saelens", "saelens_5", "dictionary_learning")
SCALE = 0.25  # of the activations that the dictionary in SAELens' older layout is of
MIB = 2**20


class Memory:
    """Peaks of resident memory while it is open, in MiB beyond what there was before: of all pages (`peak`), and of those that
    belong to no file (`anonymous`). A thread looks every 5 ms. NaN where there is no /proc."""

    def __enter__(self) -> Memory:
        self.peak = self.anonymous = math.nan
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(_resident(),), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self, before: tuple[float, float]) -> None:
        while True:
            now = [a - b for a, b in zip(_resident(), before, strict=True)]
            self.peak, self.anonymous = (
                max(a, b) if b == b else a for a, b in zip(now, (self.peak, self.anonymous), strict=True)
            )
            if self._over.wait(0.005):
                return


def _resident() -> tuple[float, float]:
    """(all, anonymous) resident memory of this process, in MiB."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(lines["VmRSS"].split()[0]) / 1024, int(lines["RssAnon"].split()[0]) / 1024
    except (OSError, KeyError):
        return math.nan, math.nan


def planted(d_sae: int, seed: int = 1) -> list[int]:
    """Ten different latents."""
    return torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[: len(WEIGHTS)].tolist()


def write(folder: Path, d_sae: int, d_model: int, seed: int = 0) -> dict[bool, Path]:
    """The dictionary in subfolders of LAYOUTS, and the two vectors (signed or not) as official files."""
    from safetensors.torch import save_file

    from pvsae.saes.dictionary import SAE, SAEInfo
    from pvsae.saes.folders import load_folder, save

    rows = torch.randn(d_sae, d_model, generator=torch.Generator().manual_seed(seed))
    rows *= 0.5 + torch.rand(d_sae, 1, generator=torch.Generator().manual_seed(seed + 1))  # rows need not have one length
    b_enc, b_dec = (0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed + 2)) for n in (d_sae, d_model))
    info = SAEInfo(model="Qwen/Qwen2.5-7B-Instruct", block=BLOCK, k=64)
    ours = save(SAE(rows.T, b_enc, rows, b_dec, 0.5, info=info), folder / "ours")
    config = json.loads((ours / "cfg.json").read_text())
    del config["metadata"]["pvsae"]
    (folder / "saelens").mkdir(exist_ok=True)
    (folder / "saelens" / "cfg.json").write_text(json.dumps(config))
    arrays = {"W_enc": rows.T.contiguous(), "b_enc": b_enc, "W_dec": rows, "b_dec": b_dec, "threshold": torch.full((d_sae,), 0.5)}
    save_file(arrays, folder / "saelens" / "sae_weights.safetensors", {"format": "pt"})
    _write_version_5(folder / "saelens_5", arrays)
    transposed = arrays["W_enc"]
    (folder / "dictionary_learning").mkdir(exist_ok=True)
    state = {"encoder.weight": rows, "encoder.bias": b_enc, "decoder.weight": transposed, "b_dec": b_dec}
    counted = {"k": torch.tensor(64, dtype=torch.int), "threshold": torch.tensor(0.5)}
    torch.save({**state, **counted}, folder / "dictionary_learning" / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "activation_dim": d_model, "dict_size": d_sae, "k": 64, "layer": BLOCK}
    trainer |= {"lm_name": "Qwen/Qwen2.5-7B-Instruct"}
    (folder / "dictionary_learning" / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    assert load_folder(ours).d_sae == d_sae
    units = rows[planted(d_sae)] / rows[planted(d_sae)].norm(dim=1, keepdim=True)
    noise = torch.randn(d_model, generator=torch.Generator().manual_seed(7))
    vectors = {}
    for signed in (False, True):
        found = _weights(signed) @ units + NOISE * noise / noise.norm()
        official = torch.zeros(BLOCK + 3, d_model)
        official[BLOCK + 1] = found
        vectors[signed] = folder / f"{'signed' if signed else 'nonnegative'}_response_avg_diff.pt"
        torch.save(official, vectors[signed])
    return vectors


def _write_version_5(folder: Path, arrays: dict[str, Tensor]) -> None:
    """All fields on one level, and arrays for activations that were multiplied by SCALE, which a second file says."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    scaled = {name: arrays[name] * SCALE for name in ("b_enc", "b_dec", "threshold")}
    save_file({**arrays, **scaled}, folder / "sae_weights.safetensors")
    d_sae, d_model = arrays["W_dec"].shape
    config = {
        "architecture": "jumprelu", "d_in": d_model, "d_sae": d_sae, "dtype": "float32", "device": "cpu",
        "model_name": "Qwen/Qwen2.5-7B-Instruct", "hook_name": f"blocks.{BLOCK}.hook_resid_post", "hook_layer": BLOCK,
        "hook_head_index": None, "prepend_bos": True, "context_size": 1024, "dataset_path": "", "activation_fn_str": "relu",
        "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "normalize_activations": "expected_average_only_in", "sae_lens_training_version": "5.10.0",
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALE}))


def _weights(signed: bool) -> Tensor:
    weights = torch.tensor(WEIGHTS)
    weights[1::2] *= -1 if signed else 1
    return weights


def measure(dictionary: Path, vector: Path, nonnegative: bool) -> dict[str, Any]:
    """One pursuit in this process: atoms with weights, seconds, peak memory in MiB."""
    from pvsae.saes.folders import load
    from pvsae.saes.pursuit import Atoms, pursue

    sae = load(dictionary)
    v = torch.load(vector, weights_only=True)[BLOCK + 1]
    torch.ones(8, 8) @ torch.ones(8, 8)  # what a first product sets up is not the pursuit's
    with Memory() as memory:
        started = time.perf_counter()
        atoms = Atoms(sae.W_dec)
        opened = time.perf_counter()
        found = pursue(atoms, v, K, nonnegative=nonnegative)
        done = time.perf_counter()
    ten = found.at_most(len(WEIGHTS))
    return {
        "latents": list(ten.latents), "weights": list(ten.weights), "explained": ten.explained,
        "atoms": len(found.steps[-1].latents),
        "seconds_lengths": opened - started, "seconds_pursuit": done - opened, "passes": found.passes,
        "decoder_mib": sae.W_dec.numel() * sae.W_dec.element_size() / MIB, "peak": memory.peak, "anonymous": memory.anonymous,
    }  # fmt: skip


def tables(dictionary: Path, vectors: dict[bool, Path], out: Path) -> dict[str, Any]:
    """The tables of `pvsae decompose`, of both vectors."""
    from pvsae.stages import DecomposeConfig, decompose

    found: dict[str, Any] = {}
    for signed, vector in vectors.items():
        config = DecomposeConfig(vectors=str(vector), dictionary=str(dictionary), k=20, model="Qwen/Qwen2.5-7B-Instruct")
        found |= {f"{signed}/{name}": t for name, t in decompose.run(config, out / f"{signed}").tables.items()}
    return found


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether all tables agree: texts and latents exactly, numbers to rounding."""
    import pandas as pd

    try:
        for name in first.keys() | second.keys():
            pd.testing.assert_frame_equal(first[name], second[name], rtol=1e-4, atol=1e-5)
    except (AssertionError, KeyError) as error:
        print(error)
        return False
    return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--d-sae", type=int, default=131072)
    parser.add_argument("--d-model", type=int, default=3584)
    parser.add_argument("--quick", action="store_true", help="8192 x 512")
    parser.add_argument("--folder", help="where the dictionaries are written (default: a temporary folder; 8 times the decoder)")
    parser.add_argument("--one", nargs=3, metavar=("DICTIONARY", "VECTOR", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(measure(Path(options.one[0]), Path(options.one[1]), options.one[2] == "nonnegative")))
        return
    d_sae, d_model = (8192, 512) if options.quick else (options.d_sae, options.d_model)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        vectors = write(folder, d_sae, d_model)
        checks, details = [], {"d_sae": d_sae, "d_model": d_model, "planted": planted(d_sae), "weights": WEIGHTS}
        for layout in LAYOUTS:
            for signed, vector in vectors.items():
                mode = "signed" if signed else "nonnegative"
                found = _apart(folder / layout, vector, mode)
                checks += _checks(found, f"{layout}, {mode}", d_sae, signed)
                details[f"{layout}/{mode}"] = found
                print(
                    f"{layout}, {mode}: {found['seconds_lengths']:.1f} s for the lengths, {found['seconds_pursuit']:.1f} s for "
                    f"{found['atoms']} atoms in {found['passes']} passes; peak {found['peak']:.0f} MiB, of which anonymous "
                    f"{found['anonymous']:.0f} (decoder {found['decoder_mib']:.0f})",
                    flush=True,
                )
        reference = tables(folder / LAYOUTS[0], vectors, folder / "run-ours")
        for layout in LAYOUTS[1:]:
            equal = same(reference, tables(folder / layout, vectors, folder / f"run-{layout}"))
            checks.append(check(f"tables of {layout} are those of our folder", float(equal), "== 1"))
        record("decompose", checks, details)


def _apart(dictionary: Path, vector: Path, mode: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.decompose", "--one", str(dictionary), str(vector), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _checks(found: dict[str, Any], name: str, d_sae: int, signed: bool) -> list[dict[str, Any]]:
    expected = dict(zip(planted(d_sae), _weights(signed).tolist(), strict=True))
    got = dict(zip(found["latents"], found["weights"], strict=True))
    hits = [latent for latent in expected if latent in got]
    wrong = max((abs(got[latent] - expected[latent]) for latent in hits), default=math.nan)
    return [
        check(f"{name}: planted atoms found, of 10", len(hits), "== 10"),
        check(f"{name}: largest error of a weight", wrong, "<= 0.1"),
        check(f"{name}: seconds to {K} atoms, lengths included", found["seconds_lengths"] + found["seconds_pursuit"], "<= 20"),
        check(f"{name}: anonymous memory beyond the decoder, MiB", found["anonymous"], "<= 1000"),
    ]


if __name__ == "__main__":
    main()
