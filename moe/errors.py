"""Errors that a user can mend. Programs print them without a traceback; everything else is a bug and shows one."""

from __future__ import annotations


class UserError(Exception):
    """What is wrong, where, and what to do about it; ``exit_code`` is what a program ends with."""

    exit_code = 1


class ConfigError(UserError):
    """One or more problems in a run's options, each a full line; reported all at once."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(UserError):
    """A corpus that cannot be read or used."""

    exit_code = 2


class TokenizerError(UserError):
    """A tokenizer that cannot be read, or that does not belong to the model."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint or exported model that is damaged, foreign or of another structure."""


class NumericsError(UserError):
    """Training met NaN or infinity; says which layer and gate went bad first."""
