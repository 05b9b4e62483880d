"""Packages that only some of minillm needs: imported where they are used, and named where they are missing."""

import importlib


def extra(module, name):
    """The imported `module`; where it is not installed, a ModuleNotFoundError that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{error.name} is not installed; it comes with: pip install "minillm-train[{name}]"', name=error.name
        ) from None
