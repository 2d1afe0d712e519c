"""The one exception for what a user can mend."""


class ConfigError(ValueError):
    """A config, flag, file or data set that the user has to change.

    The message says where, what was given and what to do. Commands print it and exit with 2.
    """
