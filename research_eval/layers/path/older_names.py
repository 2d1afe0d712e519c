"""Names of a `goe_original` checkpoint's entries in version 0.1, when the model itself owned all buffers."""

from __future__ import annotations

from typing import Any

from torch import nn

RENAMED = {
    "router.": "policy.router.",
    "features.": "policy.features.",
    "action_values.": "value.action_values.",
    "reward.": "value.reward.",
    "balance_bias": "balance.bias",
    "load": "balance.load",
    "threshold": "halting.threshold",
}


def accept_older_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of an old checkpoint; drop an entry if the model lacks its mechanism.

    The model registers this function as a hook that runs before a state is loaded.
    """
    own = module.state_dict()
    for old, new in RENAMED.items():
        for key in [key for key in state if key.startswith(prefix + old) and key.removeprefix(prefix) not in own]:
            name = new + key.removeprefix(prefix + old)
            value = state.pop(key)
            if name in own:
                state[prefix + name] = value
