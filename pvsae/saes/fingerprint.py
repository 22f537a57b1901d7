"""Fingerprint of a dictionary: are these the arrays that a run, a count or a table was made with?

Knows: what a dictionary computes with. Does not know: who keeps the fingerprint, and what is to be done about another one.
"""

from __future__ import annotations

import hashlib

import torch

from pvsae.saes.dictionary import SAE

ROWS = 4096  # hashed at once: a dictionary may be larger than what is left of the memory


def fingerprint(sae: SAE) -> str:
    """Hash of all that a dictionary computes with. Of the arrays and not of a file: a release is no folder of the user's."""
    digest = hashlib.sha256(f"{sae.dtype} {sae.top_k} {sae.apply_b_dec_to_input}".encode())
    for array in (sae.b_enc, sae.b_dec, sae.threshold, sae.W_enc.T, sae.W_dec):
        for part in array.split(ROWS):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
