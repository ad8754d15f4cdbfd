"""Settings: defaults, file and flags, and what is said when one cannot be used."""

import dataclasses

import pytest

from edgepeft.config import Config, flag, read_file, resolve
from edgepeft.errors import ConfigError


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "edgepeft.toml"
    file.write_text('rank = 4\nformat = "i8c"\nlearning-rate = 1\n')
    config = resolve(file, {"rank": 8, "format": None})
    assert (config.rank, config.format, config.learning_rate, config.seed) == (8, "i8c", 1.0, 0)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("format", "i4b23", "Did you mean 'i4b32'"),
        ("method", "lara", "Did you mean 'lora'"),
        ("target", "rpi44", "Did you mean 'rpi4'"),
        ("task", "text-clasification", "Did you mean 'text-classification'"),
        ("embedding_format", "i4b3", "Did you mean 'i4b32'"),
        ("solver", "rnt", "Did you mean 'rtn'"),
        ("adapter", "mergd", "Did you mean 'merged'"),
        ("activation", "int4", "Did you mean 'int8'"),
        ("rank", 0, "at least 1"),
        ("dropout", 1.5, "at most 0.9"),
        ("double_quant", True, "needs --format nf4b64"),
    ],
)
def test_a_bad_value_is_named_with_the_nearest_good_one(field, value, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Config(**{field: value})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter_from": "x", "teacher": "self"}, "--teacher self: nothing is trained with --adapter-from"),
        ({"adapter_from": "x", "start": "pissa"}, "--start pissa: nothing is trained"),
        ({"method": "experts", "adapter": "merged"}, "--method experts stands .*--adapter separate, or auto"),
        ({"method": "prefix", "adapter": "merged"}, "--method prefix stands"),
        ({"teacher": "self"}, "a backbone knows no classes.*--lesson-hidden 1"),
        ({"size": "12MB", "embedding_format": "float"}, "--size chooses the embeddings' formats too"),
    ],
)
def test_settings_that_cannot_both_hold_are_told(settings, said):
    with pytest.raises(ConfigError, match=said):
        Config(**settings)


def test_an_unknown_task_is_all_that_is_said_of_its_settings():
    with pytest.raises(ConfigError) as caught:
        Config(task="classification")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "max_length"])
def test_a_zero_that_is_given_is_no_default(name):
    with pytest.raises(ConfigError, match=f"{flag(name)}: expected at least"):
        resolve(None, {name: 0})


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        Config(format="x", rank=0, method="y")
    assert all(flag(name) in str(caught.value) for name in ("format", "rank", "method"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak = 4", "Did you mean 'rank'"),
        ('rank = "4"', "rank: expected int, found '4'"),
        ("rank = true", "rank: expected int, found True"),
        ("rank = = 4", "not valid TOML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, said):
    file = tmp_path / "edgepeft.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_file(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_file(tmp_path / "none.toml")


def test_every_field_has_help_and_a_default_its_own_check_accepts():
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(Config))
    assert Config() == Config(**dataclasses.asdict(Config()))
