"""The specific part: nothing of the others is left in it, and it is what a joint fit sees."""

from __future__ import annotations

import pytest
import torch

from pvsae.errors import UserError
from pvsae.stages.strength import gap_in_raw
from pvsae.vectors import PersonaVectors, specific
from pvsae.vectors.specificity import shares, specific_rows


def vectors(n_blocks: int = 3, d_model: int = 12, **changes: PersonaVectors) -> dict[str, PersonaVectors]:
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(n_blocks, d_model, generator=generator) * 2
    rows = {t: common + torch.randn(n_blocks, d_model, generator=generator) for t in ("evil", "curt", "silly")}
    made = {
        t: PersonaVectors(t, {"response_avg_diff": r, "prompt_last_diff": 2 * r}, {"diagnostics": {}}) for t, r in rows.items()
    }
    return {**made, **changes}


def test_it_is_orthogonal_to_every_other_vector_and_says_what_is_left() -> None:
    found = vectors()
    part = specific(found, "evil")
    for statistic in ("response_avg_diff", "prompt_last_diff"):
        for other in ("curt", "silly"):
            assert (part.of(statistic) * found[other].of(statistic)).sum(1).abs().max() < 1e-4
        share = part.norms(statistic).square() / found["evil"].norms(statistic).square()
        assert part.meta["specific"]["share"][statistic] == pytest.approx(share.tolist())
        assert float(share.max()) < 0.9
    assert part.trait == "evil"
    assert part.meta["specific"]["against"] == ["curt", "silly"]
    assert "diagnostics" not in part.meta
    table = shares([part], "response_avg_diff").set_index("block")
    cosine = torch.cosine_similarity(part.of(), found["evil"].of(), dim=1)
    assert table["cosine"].tolist() == pytest.approx(cosine.tolist(), abs=1e-6)


def test_a_joint_fit_has_the_same_coefficient() -> None:
    found = vectors()
    x = torch.randn(12, generator=torch.Generator().manual_seed(2)).double()
    part = specific(found, "evil").of()[1].double()
    together = torch.stack([found[t].of()[1] for t in ("evil", "curt", "silly")]).double()
    joint = torch.linalg.lstsq(together.T, x[:, None]).solution[0, 0]
    assert float(x @ part / (part @ part)) == pytest.approx(float(joint), rel=1e-4)


def test_others_may_be_chosen_and_may_depend_on_each_other() -> None:
    found = vectors()
    part = specific(found, "evil", ["curt", "curt"]).of()
    assert (part * found["curt"].of()).sum(1).abs().max() < 1e-4
    assert (part * found["silly"].of()).sum(1).abs().min() > 1e-2
    doubled = specific_rows(found["evil"].of(), [found["curt"].of(), 3 * found["curt"].of()])
    assert torch.allclose(doubled, part, atol=1e-5)
    assert torch.equal(specific_rows(found["evil"].of(), []), found["evil"].of())


def test_blocks_that_a_file_does_not_have_stay_missing() -> None:
    found = vectors()
    rows = found["evil"].of().clone()
    rows[2] = float("nan")
    cut = PersonaVectors("evil", {"response_avg_diff": rows}, {"missing_blocks": {"2": "after the final norm"}})
    part = specific({**found, "evil": cut}, "evil")
    assert part.missing_blocks == {2: "after the final norm"}
    assert part.statistics == ("response_avg_diff",)
    assert part.meta["specific"]["share"]["response_avg_diff"][2] is None
    assert torch.isfinite(part.of()[:2]).all()
    assert list(shares([part], "response_avg_diff")["block"]) == [0, 1]
    other = specific({"evil": cut, "curt": found["curt"]}, "curt")
    assert other.missing_blocks == {2: "'evil': after the final norm"}, "where nothing can be taken out, nothing is specific"
    assert torch.isnan(other.of()[2]).all()
    with pytest.raises(UserError, match="cannot be used at block 2: 'evil': after the final norm"):
        other.direction(2)


def test_the_gap_along_another_statistic_is_refused() -> None:
    part = specific(vectors(), "evil")
    whole = vectors()["evil"]
    along = part.of()[1] / part.norms()[1]
    assert gap_in_raw(part, 1) == pytest.approx(float(whole.of()[1] @ along / part.norms()[1]), rel=1e-4)
    with pytest.raises(UserError, match="the unit 'gap' along prompt_last_diff"):
        gap_in_raw(part, 1, "prompt_last_diff")


def test_what_cannot_be_done_is_said() -> None:
    found = vectors()
    with pytest.raises(UserError, match="no vectors of 'kind'"):
        specific(found, "kind")
    with pytest.raises(UserError, match="nothing to take out"):
        specific({"evil": found["evil"]}, "evil")
    with pytest.raises(UserError, match="among what is to be taken out"):
        specific(found, "evil", ["evil", "curt"])
    with pytest.raises(UserError, match="d_model=4"):
        specific({**found, "curt": PersonaVectors("curt", {"response_avg_diff": torch.ones(3, 4)})}, "evil")
    with pytest.raises(UserError, match="no statistic"):
        specific({**found, "curt": PersonaVectors("curt", {"prompt_avg_diff": torch.ones(3, 12)})}, "evil")
