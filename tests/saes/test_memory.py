"""What it costs to read a vector against a large dictionary: measured in a process of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pvsae.saes.folders import save
from tests.saes.small import make_sae

ROOT = Path(__file__).resolve().parents[2]
MB = 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")


def measure(folder, d_model):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "saes" / "peak.py"), str(folder), str(d_model)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_sparse(folder, d_sae, d_model, planted, v):
    """A folder of that size whose matrices are holes in a file, but for the latents `planted`, which look along v."""
    folder.mkdir()
    shapes = {"W_enc": [d_model, d_sae], "W_dec": [d_sae, d_model], "b_enc": [d_sae], "threshold": [d_sae], "b_dec": [d_model]}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        unit = (v / v.norm()).numpy()
        for latent in planted:
            file.seek(start + header["W_dec"]["data_offsets"][0] + 4 * latent * d_model)
            file.write(unit.tobytes())
            for i in range(d_model):
                file.seek(start + header["W_enc"]["data_offsets"][0] + 4 * (i * d_sae + latent))
                file.write(unit[i].tobytes())
    config = {
        "architecture": "jumprelu", "d_in": d_model, "d_sae": d_sae, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.19.hook_resid_post"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_peak_beyond_the_weights_is_small(tmp_path):
    """16384 x 512, 64 MB of weights: opening reads none of them, searching them takes a few chunks."""
    sae = make_sae(d_model=512, d_sae=16384)
    found = measure(save(sae, tmp_path), 512)
    torch.manual_seed(0)
    v = torch.randn(512)
    assert found["weights"] == 64 * MB
    assert found["best"] == sae.cosines(v).topk(5).indices.tolist()
    assert found["top"] == sae.top(v, 3)[1].tolist()
    assert found["opened"] < 16 * MB, "memory-mapped: a page is read when it is used"
    assert found["peak"] < found["weights"] + 250 * MB


@pytest.mark.slow
def test_the_published_size_takes_under_a_gigabyte_beyond_its_weights(tmp_path):
    """131072 x 3584 in fp32, 3.5 GiB of weights."""
    d_model, d_sae, planted = 3584, 131072, (12061, 128289)
    torch.manual_seed(0)
    v = torch.randn(d_model)
    found = measure(write_sparse(tmp_path / "large", d_sae, d_model, planted, v), d_model)
    assert sorted(found["best"][:2]) == sorted(planted)
    assert found["cosine"] == pytest.approx(1, abs=1e-4)
    assert sorted(found["top"][:2]) == sorted(planted)
    assert found["value"] == pytest.approx(float(v.norm()), rel=1e-3)
    assert found["active"] == 2
    assert found["weights"] == 2 * 4 * d_model * d_sae
    assert found["opened"] < 100 * MB
    beyond = found["peak"] - found["weights"]
    print(f"peak beyond the weights: {beyond / MB:.0f} MB, anonymous {found['anonymous'] / MB:.0f} MB")
    assert beyond < 1000 * MB
