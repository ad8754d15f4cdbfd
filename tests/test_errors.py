"""How errors of libraries become ours, and which do not."""

from pathlib import Path

import pytest

from edgepeft.errors import DataError, ModelError, blaming


@pytest.mark.parametrize("error", [Exception("two\n lines."), KeyError("two lines"), OSError("two lines")], ids=repr)
def test_an_error_of_a_library_names_the_file(error):
    expected = rf"some/file: cannot be used: {type(error).__name__}: '?two lines'?\. Do this\."
    with pytest.raises(ModelError, match=expected), blaming(Path("some/file"), "Do this."):
        raise error


def dressed():
    """Return what a library makes of Ctrl-C while it loads."""
    error = ImportError("cannot be imported")
    error.__context__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), DataError(), dressed()], ids=repr)
def test_what_is_not_the_doing_of_the_file_goes_through(error):
    with pytest.raises(type(error)) as caught, blaming(Path("some/file"), "Do this."):
        raise error
    assert caught.value is error
