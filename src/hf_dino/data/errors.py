"""The error for input that a user can repair."""


class InputError(ValueError):
    """A file or a value given by the user cannot be used; the message says what was got and what to do.

    Command line programs print it as one line, while any other exception keeps its traceback.
    """
