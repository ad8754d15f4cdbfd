"""The errors a user can meet. Each text says where, what was expected, what was found and what to do.

Anything else that escapes is a defect of edgepeft itself and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


class EdgePeftError(Exception):
    """Base of all errors raised for the user; the command line prints the text alone and exits with `exit_code`."""

    exit_code = 1


class ConfigError(EdgePeftError):
    """A flag, a configuration file or a combination of them cannot be used."""

    exit_code = 2


class DataError(EdgePeftError):
    """A data file is missing, damaged or does not hold what the task needs."""


class ModelError(EdgePeftError):
    """A model folder is missing, damaged or of a kind that is not supported."""


class ArtifactError(EdgePeftError):
    """A file edgepeft wrote earlier is missing or was changed since."""


class VerifyError(EdgePeftError):
    """An exported file does not do what the trained model does."""


class TargetError(EdgePeftError):
    """A target, its toolchain or its runtime cannot be used."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name: the nearest one first, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), [n.lower() for n in names], n=1, cutoff=0.5)
    nearest = next((n for n in names if close and n.lower() == close[0]), None)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."


def all_of(*asks: Callable[[], Any]) -> list[Any]:
    """Return what each gives. Raises one error of the first one's class that says what all of them have to say."""
    found, errors = [], []
    for ask in asks:
        try:
            found.append(ask())
        except EdgePeftError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("\n".join(map(str, errors))) from errors[0]
    return found


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def blaming(path: Path, advice: str) -> Iterator[None]:
    """Turn what a library raises over a model's file into one ModelError that names the file.

    A library has a class for each thing that can be wrong with a file, bare Exception among them. What is not the
    file's doing goes through: our own errors, exhausted memory, and Ctrl-C, also where it met a library that was
    loading, whose import failed of it.
    """
    try:
        yield
    except EdgePeftError:
        raise
    except Exception as error:
        if any(isinstance(cause, (KeyboardInterrupt, MemoryError)) for cause in causes(error)):
            raise
        found = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(f"{path}: cannot be used: {type(error).__name__}: {found}. {advice}") from None
