"""What configuration names as module:name: classes and functions of Python."""

import importlib
import re
from typing import Any

from cube.errors import BadConfig, ServingError

_NAMED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def imported(target: str, place: str, kind: str) -> Any:
    """What a module has under a name. What the module does when it is imported happens now.

    target: "module:name". place, kind: for messages, as in "a class of this name". Raises BadConfig, and what of
    cube.errors the module raises.
    """
    if not _NAMED.fullmatch(target):
        raise BadConfig(place, repr(target), f"module:{kind}")
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ServingError:
        raise
    except Exception as error:  # the module's own code runs here
        raise BadConfig(place, f"{type(error).__name__}: {error}", f"a module {module} that can be imported") from error
    if found is None:
        raise BadConfig(place, f"no {name} in module {module}", f"a {kind} of this name")
    return found
