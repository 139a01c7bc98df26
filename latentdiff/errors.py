"""The one exception that a user's mistake raises."""


class InputError(ValueError):
    """Something the caller gave cannot be used; the message says what it is and what to do."""
