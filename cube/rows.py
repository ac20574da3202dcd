"""Row formats: how an embedding vector lies in a segment and on the wire."""

from enum import IntEnum


class RowFormat(IntEnum):
    """On disk and on the wire: never renumber."""

    F32 = 1  # dim little-endian float32

    def row_bytes(self, dim: int) -> int:
        """Bytes of one row of `dim` elements."""
        return 4 * dim
