"""The names under which Optuna's storage keeps the parameters of a study.

Some choices depend on values chosen before: a number of heads has to divide the width of the model. Optuna does not
allow the choices of one parameter to change from trial to trial. A parameter whose choices are narrowed is therefore
stored under a name of its own, which ends with the choices that were left: "dense.num_heads of 1, 2". The sampler sees
such a name as a parameter of its own.

The databases of users contain these names, and a sampler draws other values under other names. So the form has to stay
as it is. Only the two functions of this file know it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SEPARATOR = " of "  # no name of a parameter contains a blank


def narrowed_name(name: str, choices: Sequence[Any]) -> str:
    """The stored name of a parameter of which only these choices are left.

    >>> narrowed_name("dense.num_heads", [1, 2])
    'dense.num_heads of 1, 2'
    """
    return f"{name}{_SEPARATOR}{', '.join(map(json.dumps, choices))}"


def plain_name(stored_name: str) -> str:
    """The name of the parameter, the same in all trials, whatever choices were left.

    >>> plain_name("dense.num_heads of 1, 2"), plain_name("optimizer_params.lr")
    ('dense.num_heads', 'optimizer_params.lr')
    """
    return stored_name.partition(_SEPARATOR)[0]
