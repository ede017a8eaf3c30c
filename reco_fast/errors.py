"""What a user did wrong, as exceptions whose message is one line: every command prints it and exits with 2."""


class ConfigError(Exception):
    """A user's mistake. The message is one line: the flag or file, what came and what was expected."""


class DataError(ValueError):
    """A user's mistake about data, in one line: the path, what was expected, what came."""
