"""A dictionary's fingerprint is of what it computes with, and of nothing else."""

from __future__ import annotations

import pytest

from pvsae.saes.dictionary import SAE
from pvsae.saes.fingerprint import ROWS, fingerprint
from pvsae.saes.folders import load, save
from tests.saes.small import make_sae

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


@pytest.mark.parametrize("name", ARRAYS)
def test_one_changed_number_of_any_array_changes_it(name) -> None:
    sae = make_sae(d_model=4, d_sae=ROWS + 8)  # more rows than are hashed at once
    arrays = {each: getattr(sae, each).clone() for each in ARRAYS}
    arrays[name][(-1,) * arrays[name].ndim] += 0.001
    assert fingerprint(SAE(**arrays, info=sae.info)) != fingerprint(sae)


def test_where_it_lies_and_what_it_is_called_do_not_matter(tmp_path) -> None:
    sae = make_sae()
    assert fingerprint(load(save(sae, tmp_path / "a"))) == fingerprint(load(save(sae.with_info(block=3), tmp_path / "b")))
    assert fingerprint(sae) != fingerprint(make_sae(1))
