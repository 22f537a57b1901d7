"""From the command line to a stage's config.

Knows: that an option has the name of the config's field, and is absent where it was not given. Does not know: any stage.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any


def config_from(kind: type, args: argparse.Namespace) -> Any:
    """A config of this kind (a data class) with the options that were given; lists become tuples, others keep their defaults.

    Raises: UserError as the config does.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in vars(args).items() if key in names})
