"""What the command line refuses."""


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line that says what, and what to do."""
