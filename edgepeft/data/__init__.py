"""Data sets shipped with the package: plain CSV files, documented by a README each."""

import pathlib


def home_assistant() -> pathlib.Path:
    """Return the folder of the home-assistant intent data (train/validation/test CSV)."""
    return pathlib.Path(__file__).resolve().parent / "home_assistant"
