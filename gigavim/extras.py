"""Libraries that only some of gigavim needs: the extras of its package."""

import importlib
from typing import Any

from gigavim.errors import SettingsError


def installed(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        SettingsError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"{module} is not installed, and this needs it: pip install 'gigavim[{extra}]'"
        ) from error
