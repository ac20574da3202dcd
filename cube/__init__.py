"""cube: a sharded, versioned store of embedding rows, keyed by 64-bit feature signs.

cube = RemoteCube(["127.0.0.1:8010", "127.0.0.1:8011"])
await cube.open({"embedding": (Version(1763766000), 10)}, wait_s=10)
rows = await cube.gather("embedding", Version(1763766000), keys, timeout_s=0.05)
"""

import typing

from cube.version import Version

if typing.TYPE_CHECKING:
    from cube.client import LocalCube, RemoteCube

__all__ = ["LocalCube", "RemoteCube", "Version"]


def __getattr__(name: str) -> typing.Any:
    """The two cubes, once they are asked for: they load numba, which takes half a second and much here does without."""
    if name not in ("LocalCube", "RemoteCube"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cube import client

    globals()[name] = getattr(client, name)
    return globals()[name]
