"""The exceptions that the command line turns into exit codes."""


class ConfigError(ValueError):
    """A setting or an input is wrong: the message names it and the remedy (exit code 2)."""


class Interrupted(BaseException):
    """The run was asked to stop and can be resumed by the same command (exit code 75).

    Like KeyboardInterrupt no Exception, so that no handler of errors takes it for one.
    """
