"""Opens a dictionary, reads a vector against it, prints how much memory that took, in bytes: python peak.py FOLDER D_MODEL."""

import json
import sys

import torch

from pvsae.saes.folders import load


def resident(kind: str) -> int:
    """ "VmRSS" now, "VmHWM" at most so far, "RssAnon" without pages of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind + ":"))


def main(folder: str, d_model: int) -> None:
    torch.manual_seed(0)
    torch.ones(8, 8) @ torch.ones(8, 8)  # what a first product sets up is not the dictionary's
    start = resident("VmRSS")
    sae = load(folder)
    opened = resident("VmRSS") - start
    v = torch.randn(d_model)
    cosines = sae.cosines(v)
    best = cosines.topk(5)
    values, latents = sae.top(v, 20)
    acts = sae.encode_sparse(v[None])
    peak = resident("VmHWM")  # not ru_maxrss, in which the process that started this one counts
    weights = sae.W_enc.numel() * sae.W_enc.element_size() + sae.W_dec.numel() * sae.W_dec.element_size()
    print(
        json.dumps(
            {
                "opened": opened,
                "peak": peak - start,
                "weights": weights,
                "anonymous": resident("RssAnon"),
                "best": best.indices.tolist(),
                "cosine": float(best.values[0]),
                "top": latents[:3].tolist(),
                "value": float(values[0]),
                "active": len(acts.value),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
