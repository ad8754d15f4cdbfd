"""The frozen model: which families are known, where a model comes from, how it is loaded packed."""
