"""The exceptions that the command line turns into exit codes."""


class ConfigError(ValueError):
    """A setting or an input is wrong: the message names it and the remedy (exit code 2)."""


class Interrupted(Exception):
    """The run was asked to stop and can be resumed by the same command (exit code 75)."""
