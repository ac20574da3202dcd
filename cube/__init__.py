"""cube: a sharded, versioned store of embedding rows, keyed by 64-bit feature signs.

cube = RemoteCube(["127.0.0.1:8010", "127.0.0.1:8011"])
await cube.open({"embedding": (Version(1763766000), 10)}, wait_s=10)
rows = await cube.gather("embedding", Version(1763766000), keys, timeout_s=0.05)
"""

from cube.client import LocalCube, RemoteCube
from cube.version import Version

__all__ = ["LocalCube", "RemoteCube", "Version"]
