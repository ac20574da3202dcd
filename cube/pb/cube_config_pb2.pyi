from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CubeConfig(_message.Message):
    __slots__ = ("data", "shard", "listen", "keep_versions", "max_keys", "verify", "in_memory", "grpc", "shard_rule", "workers", "token_file", "tls_cert", "tls_key", "tls_client_ca", "legacy_table", "replicas", "log")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    KEEP_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    SHARD_RULE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FILE_FIELD_NUMBER: _ClassVar[int]
    TLS_CERT_FIELD_NUMBER: _ClassVar[int]
    TLS_KEY_FIELD_NUMBER: _ClassVar[int]
    TLS_CLIENT_CA_FIELD_NUMBER: _ClassVar[int]
    LEGACY_TABLE_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    data: str
    shard: _containers.RepeatedCompositeFieldContainer[ShardConfig]
    listen: str
    keep_versions: int
    max_keys: int
    verify: str
    in_memory: bool
    grpc: str
    shard_rule: str
    workers: int
    token_file: str
    tls_cert: str
    tls_key: str
    tls_client_ca: str
    legacy_table: str
    replicas: ReplicasConfig
    log: str
    def __init__(self, data: _Optional[str] = ..., shard: _Optional[_Iterable[_Union[ShardConfig, _Mapping]]] = ..., listen: _Optional[str] = ..., keep_versions: _Optional[int] = ..., max_keys: _Optional[int] = ..., verify: _Optional[str] = ..., in_memory: _Optional[bool] = ..., grpc: _Optional[str] = ..., shard_rule: _Optional[str] = ..., workers: _Optional[int] = ..., token_file: _Optional[str] = ..., tls_cert: _Optional[str] = ..., tls_key: _Optional[str] = ..., tls_client_ca: _Optional[str] = ..., legacy_table: _Optional[str] = ..., replicas: _Optional[_Union[ReplicasConfig, _Mapping]] = ..., log: _Optional[str] = ...) -> None: ...

class ReplicasConfig(_message.Message):
    __slots__ = ("policy", "retries", "hedge", "hedge_share", "timeout_ms")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    HEDGE_FIELD_NUMBER: _ClassVar[int]
    HEDGE_SHARE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    retries: int
    hedge: float
    hedge_share: float
    timeout_ms: int
    def __init__(self, policy: _Optional[str] = ..., retries: _Optional[int] = ..., hedge: _Optional[float] = ..., hedge_share: _Optional[float] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class ShardConfig(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...
