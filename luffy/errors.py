"""Errors that a user can mend.

Everything that a person may get wrong (an option, a path, a damaged file) is raised as `UserError` with one
line that names the option and the mend. The command line prints that line and exits with status 2; any other
exception is a defect of ours and keeps its traceback.
"""


class UserError(Exception):
    """A mistake with a mend, in one line: what is wrong, which option it is, what to do instead."""


class RankMismatchError(RuntimeError):
    """Ranks disagree about something that all of them must know alike (a plan, a batch, a configuration)."""


class StoppedError(Exception):
    """A run ended early because it was asked to, by the signal `number`; nothing that was saved is lost."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = int(number)

    @property
    def status(self) -> int:
        """The exit status, in a shell's terms: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.number
