"""What the stages are tested on: two traits in few words, and a judge that reads nothing but bytes."""

from __future__ import annotations

import pytest
from byte_judge import ByteJudge

from pvsae.traits import Pair, TraitArtifacts, save_trait


@pytest.fixture
def byte_judge() -> ByteJudge:
    return ByteJudge()


@pytest.fixture(scope="session")
def stage_library(tmp_path_factory):
    """A library of two traits, each with five pairs of instructions and twenty questions each way."""
    things = ("rain", "bread", "trains", "chess", "wool", "salt", "doors", "maps", "bees", "clay")
    things += ("ink", "rope", "coal", "moss", "tides", "bells", "kites", "soap", "lamps", "owls")
    others = ("snow", "cheese", "ships", "cards", "silk", "pepper", "walls", "globes", "ants", "sand")
    others += ("chalk", "wire", "wood", "ferns", "rivers", "drums", "sails", "wax", "fire", "cats")
    manners = ("Be {}", "Sound {}", "Stay {}", "Seem {}", "Act {}")
    root = tmp_path_factory.mktemp("library")
    for name in ("gloomy", "chatty"):
        save_trait(
            TraitArtifacts(
                name,
                f"It is {name}.",
                tuple(Pair(f"{m.format(name)} always.", f"{m.format('anything but ' + name)} always.") for m in manners),
                tuple(f"What do you think of {thing}?" for thing in things),
                tuple(f"Tell me about {thing}." for thing in others),
                f"How {name} is this answer?\nQuestion: {{question}}\nAnswer: {{answer}}\nA number from 0 to 100, or REFUSAL.",
            ),
            root,
        )
    return root
