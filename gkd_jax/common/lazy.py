"""Lazy re-exports of a package (PEP 562): importing a package does not import its modules."""

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax.common import moved


def load_export(package: str, exports: Mapping[str, Sequence[str]], name: str) -> Any:
    """Returns a name that a package re-exports, importing the module that defines it.

    Packages call this function from their `__getattr__`. The value is cached in the package's
    namespace. A former name (`common.moved`) is accepted with a warning.

    Args:
      package: `__name__` of the package.
      exports: for each module of the package, the public names that the package re-exports.
      name: the requested attribute.

    Raises:
      AttributeError: the package does not re-export this name.
    """
    for module, names in exports.items():
        if name in names:
            value = getattr(importlib.import_module(f"{package}.{module}"), name)
            setattr(sys.modules[package], name, value)
            return value
    return moved.load_moved(package, name)
