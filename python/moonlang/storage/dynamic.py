"""A store of the user's own: a class that is a `PageStore`, named in the extra config."""

from __future__ import annotations

import importlib

from moonlang.base.errors import ConfigError
from moonlang.core.ports import KvStore
from moonlang.storage.channel import StoreChannel, StoreOptions

_EXAMPLE = (
    'Give --hicache-storage-backend-extra-config \'{"backend_name": "mine", "module_path": "my.module", '
    '"class_name": "MyStore"}\'; the class gets the whole extra config as its one argument.'
)


def open_store(options: StoreOptions) -> KvStore:
    """extra config: module_path, class_name, and whatever the class wants. It is code that the operator names."""
    module_path, class_name = options.extra.get("module_path"), options.extra.get("class_name")
    if not (isinstance(module_path, str) and isinstance(class_name, str)):
        raise ConfigError("The dynamic KV store needs module_path and class_name.", hint=_EXAMPLE)
    try:
        kind = getattr(importlib.import_module(module_path), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The KV store {module_path}.{class_name} cannot be found: {error}.", hint=_EXAMPLE
        ) from error
    return StoreChannel(kind(options.extra), options)


BACKEND = open_store
