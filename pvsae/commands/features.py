"""Options of `pvsae steer` that steer with single features of a dictionary instead of a whole vector.

Knows: which options belong to which of the two. Does not know: what they do (stages/feature_steer.py).
"""

from __future__ import annotations

import argparse

from pvsae.errors import UserError

_OF_FEATURES = (
    "mode",
    "together",
    "activity",
    "activity_tokens",
    "prefilter",
    "prefix",
    "questions",
    "other_model",
    "not_random",
)
_OF_VECTORS = ("layers", "multi_layer")


class Extend(argparse.Action):
    """`--feature A B --feature C` is A, B and C. (argparse's own "extend" begins with a default, which these options lack.)"""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


def add_options(steer: argparse.ArgumentParser) -> None:
    """Puts the options on the parser of `pvsae steer`."""
    group = steer.add_argument_group(
        "with single features", "With --feature, VECTORS may be left out; given, the whole vector is one of the controls."
    )
    group.add_argument(
        "--feature", nargs="+", action=Extend, dest="features", metavar="SAE:INDEX",
        help="a feature, several (SAE:3,7) or a range (SAE:10-19); SAE is a folder or RELEASE/ID (runs/feature_steer by default)",
    )  # fmt: skip
    group.add_argument("--mode", choices=("add", "clamp", "ablate"), help="what is done with its activation (default: add)")
    group.add_argument("--together", action="store_true", help="steer with all of them at once as well")
    group.add_argument(
        "--activity", nargs="+", metavar="RUN",
        help="run folders of `pvsae sae eval` that hold highest activations and densities (default: counted on a little text)",
    )  # fmt: skip
    group.add_argument("--activity-tokens", type=int, metavar="N", help="tokens to count on (default: 20000)")
    group.add_argument(
        "--prefilter", type=int, metavar="N", help="only the N features that change most what is said (output score)"
    )
    group.add_argument(
        "--questions", choices=("eval", "extract"),
        help="extract: those that vectors are made from, to choose features on that eval then measures (default: eval)",
    )  # fmt: skip
    group.add_argument(
        "--not-random", nargs="+", metavar="SAE:INDEX", help="features that are not drawn as random ones, as other candidates"
    )
    group.add_argument("--other-model", action="store_true", help="take a dictionary of another model of the same width")
    group.add_argument("--prefix", metavar="TEXT", help="neutral text for --prefilter (default: From my experience,)")


def asked_for(args: argparse.Namespace) -> bool:
    """Whether features are steered with. UserError for options that belong to the other way of steering, or for neither."""
    features = hasattr(args, "features")
    wrong = [name for name in (_OF_VECTORS if features else _OF_FEATURES) if getattr(args, name, None)]
    if wrong:
        option = f"--{wrong[0].replace('_', '-')}"
        raise UserError(
            f"{option} {'with' if features else 'without'} --feature",
            "options of one way of steering",
            f"leave {option} out" if features else "add --feature SAE:INDEX",
        )
    if getattr(args, "vectors", None) is None and not features:
        raise UserError("nothing to steer with", "vectors (a run folder of `pvsae extract` or a file), or --feature SAE:INDEX")
    return features
