from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Format(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOATS: _ClassVar[Format]
    STORED: _ClassVar[Format]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Pooling]
    SUM: _ClassVar[Pooling]
    MEAN: _ClassVar[Pooling]
FLOATS: Format
STORED: Format
NONE: Pooling
SUM: Pooling
MEAN: Pooling

class Version(_message.Message):
    __slots__ = ("base", "delta")
    BASE_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    base: int
    delta: int
    def __init__(self, base: _Optional[int] = ..., delta: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("tables", "shard", "shards", "shard_rule")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARD_RULE_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TableKeys]
    shard: int
    shards: int
    shard_rule: int
    def __init__(self, tables: _Optional[_Iterable[_Union[TableKeys, _Mapping]]] = ..., shard: _Optional[int] = ..., shards: _Optional[int] = ..., shard_rule: _Optional[int] = ...) -> None: ...

class TableKeys(_message.Message):
    __slots__ = ("table", "version", "keys", "format", "pooling", "offsets")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    table: str
    version: Version
    keys: bytes
    format: Format
    pooling: Pooling
    offsets: bytes
    def __init__(self, table: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., keys: _Optional[bytes] = ..., format: _Optional[_Union[Format, str]] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., offsets: _Optional[bytes] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("tables",)
    TABLES_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TableRows]
    def __init__(self, tables: _Optional[_Iterable[_Union[TableRows, _Mapping]]] = ...) -> None: ...

class TableRows(_message.Message):
    __slots__ = ("version", "dim", "rows", "found", "absent", "row_format", "row_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    ROW_FORMAT_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: Version
    dim: int
    rows: bytes
    found: bytes
    absent: int
    row_format: str
    row_bytes: int
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., dim: _Optional[int] = ..., rows: _Optional[bytes] = ..., found: _Optional[bytes] = ..., absent: _Optional[int] = ..., row_format: _Optional[str] = ..., row_bytes: _Optional[int] = ...) -> None: ...

class ScanRequest(_message.Message):
    __slots__ = ("table", "version", "batch_rows")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    table: str
    version: Version
    batch_rows: int
    def __init__(self, table: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., batch_rows: _Optional[int] = ...) -> None: ...

class ScanReply(_message.Message):
    __slots__ = ("keys", "rows", "version", "dim", "row_format", "row_bytes", "total")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ROW_FORMAT_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    rows: bytes
    version: Version
    dim: int
    row_format: str
    row_bytes: int
    total: int
    def __init__(self, keys: _Optional[bytes] = ..., rows: _Optional[bytes] = ..., version: _Optional[_Union[Version, _Mapping]] = ..., dim: _Optional[int] = ..., row_format: _Optional[str] = ..., row_bytes: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("shard", "shards", "tables", "lookups", "shard_rule", "workers", "uptime_s", "program")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    SHARD_RULE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    shard: int
    shards: int
    tables: _containers.RepeatedCompositeFieldContainer[TableStatus]
    lookups: int
    shard_rule: str
    workers: int
    uptime_s: float
    program: str
    def __init__(self, shard: _Optional[int] = ..., shards: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableStatus, _Mapping]]] = ..., lookups: _Optional[int] = ..., shard_rule: _Optional[str] = ..., workers: _Optional[int] = ..., uptime_s: _Optional[float] = ..., program: _Optional[str] = ...) -> None: ...

class TableStatus(_message.Message):
    __slots__ = ("table", "versions", "keys_found", "keys_absent", "current")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FOUND_FIELD_NUMBER: _ClassVar[int]
    KEYS_ABSENT_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    table: str
    versions: _containers.RepeatedCompositeFieldContainer[TableVersion]
    keys_found: int
    keys_absent: int
    current: Version
    def __init__(self, table: _Optional[str] = ..., versions: _Optional[_Iterable[_Union[TableVersion, _Mapping]]] = ..., keys_found: _Optional[int] = ..., keys_absent: _Optional[int] = ..., current: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class TableVersion(_message.Message):
    __slots__ = ("version", "dim", "keys", "file_bytes", "row_format", "engine", "default_row", "verified")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROW_FORMAT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ROW_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    version: Version
    dim: int
    keys: int
    file_bytes: int
    row_format: str
    engine: str
    default_row: bool
    verified: str
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., dim: _Optional[int] = ..., keys: _Optional[int] = ..., file_bytes: _Optional[int] = ..., row_format: _Optional[str] = ..., engine: _Optional[str] = ..., default_row: _Optional[bool] = ..., verified: _Optional[str] = ...) -> None: ...

class VersionRequest(_message.Message):
    __slots__ = ("table", "version")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    table: str
    version: Version
    def __init__(self, table: _Optional[str] = ..., version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
