"""Errors that are the user's to mend: one sentence naming the file, column, row or key, and the fix."""


class UserError(Exception):
    """Base of every error that ``run_expid.py`` prints, a line for each mistake, and answers with exit code 2."""


class ConfigError(UserError):
    """A configuration file, an experiment id or a ``--set`` option is wrong."""


class DataError(UserError):
    """A data file is missing, unreadable, or holds something the model must not be trained on."""


class FileError(UserError):
    """A file cannot be written: the disk is full, its folder is not writable, or another process holds it."""
