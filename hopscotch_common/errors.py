"""Errors that one line explains, and the logger. A script's exit code comes from the error."""

import logging

logger = logging.getLogger("hopscotch")


class HopscotchError(Exception):
    """An error that one line explains; no traceback is shown for it."""

    exit_code = 1


class InputError(HopscotchError, ValueError):
    """Something that the user gave is wrong; the message says what, where, and what to do."""

    exit_code = 2


class TrainingError(HopscotchError):
    """Training cannot go on, for example because a single answer does not fit into memory."""


class Diverged(TrainingError):
    """A loss or a scale is no longer finite."""
