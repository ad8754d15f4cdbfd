import pytest
from models import copy_of, tiny_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A small BERT folder that no test changes."""
    return tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture
def model(bert, tmp_path):
    """A copy that a test may damage."""
    return copy_of(bert, tmp_path / "model")
