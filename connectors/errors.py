"""The few kinds of failure, each with its own reaction."""


class TollwayError(Exception):
    """Anything Tollway raises on purpose."""


class Unavailable(TollwayError):
    """A part is away or overloaded: retry with back-off. Nothing is lost."""


class Invalid(TollwayError):
    """Data that can never be accepted: dead-letter it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Refused(TollwayError):
    """The caller asked for something wrong: the message names field, value and cure."""


class Fatal(TollwayError):
    """Going on would lose, double or mix units: stop this partition or worker and say why."""
