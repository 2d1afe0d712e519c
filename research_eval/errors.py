"""The exceptions for what a user can mend, and the number of the signal that an interruption stands for."""

import signal


class ConfigError(ValueError):
    """A config, flag, file or data set that the user has to change.

    The message says where, what was given and what to do. Commands print it and exit with 2.
    """


class Superseded(ConfigError):
    """Another process has continued the run, or has finished it: this one writes nothing more about it."""


class RunIsBusy(ConfigError):
    """Another process works in the folder of the run."""


def signal_of(interruption: KeyboardInterrupt) -> int:
    """The signal's number: the exception's argument if it has one, else that of Ctrl-C, for which Python gives none."""
    return int(interruption.args[0]) if interruption.args else int(signal.SIGINT)
