"""One exported run for all tests of this folder."""

import pytest

from tests.export.tiny_run import export_run, make_run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(config, run) of an exported tiny BERT in i4b32, shared: do not write into it."""
    config, run = make_run(tmp_path_factory.mktemp("tiny"))
    export_run(config, run)
    return config, run
