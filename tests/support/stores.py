"""Small stores for tests, and what they answer."""

import numpy as np

from cube import build
from cube.rows import RowFormat
from cube.sources import Batch, Cursor, Source
from cube.storage.index import partitions_of
from cube.storage.segment import Segment, SegmentWriter
from cube.storage.store import About
from cube.version import Version


def segment_of(path, keys, rows, row_format=RowFormat.F32, partitions=1, default_row=(), table="t", version=None):
    """Write a segment of distinct keys and their rows ([n, dim]), and open it."""
    keys, rows = np.array(keys, np.uint64), np.array(rows, np.float32)
    default = row_format.encode(np.array([default_row], np.float32)).tobytes() if len(default_row) else b""
    writer = SegmentWriter(
        path, About(table, version or Version(7), 0, 1, rows.shape[1], row_format, default), partitions
    )
    raw, partition = row_format.encode(rows), partitions_of(keys, partitions)
    for number in range(partitions):
        writer.add(writer.prepare(keys[partition == number], raw[partition == number]))
    writer.finish()
    writer.close()
    return Segment(path)


def looked_up(store, keys):
    """Rows (float32[n, dim]) and marks; the buffers start as NaN, so that what is not written shows."""
    keys = np.array(keys, np.uint64)
    rows, found = np.full((keys.size, store.about.dim), np.nan, np.float32), np.empty(keys.size, np.bool_)
    assert store.lookup(keys, rows, found) == np.count_nonzero(~found)
    return rows, found


class Arrays(Source):
    """Rows that are in memory: keys uint64[n], rows float32[n, dim]."""

    def __init__(self, keys, rows, files=()):
        self.keys, self.rows = np.array(keys, np.uint64), np.array(rows, np.float32)
        self.files, self.dim, self.most_rows = list(files), self.rows.shape[1], len(self.keys)

    def batches(self, start, most):
        for at in range(start.at, len(self.keys), most):
            yield Batch(self.keys[at : at + most], self.rows[at : at + most], Cursor(0, min(at + most, len(self.keys))))


def built(data, table, version, keys, rows, shards=1, **options):
    """Build a version of a table from rows in memory."""
    return build.build(Arrays(keys, rows), data, table, version, build.Options(shards=shards, **options))
