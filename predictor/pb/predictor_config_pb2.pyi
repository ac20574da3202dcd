from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class PredictorConfig(_message.Message):
    __slots__ = ("model", "listen", "cube", "max_samples", "cube_wait_s", "cube_timeout_ms", "compute_threads", "max_keys", "grpc", "cube_token_file", "cube_cache_mb", "cube_tls_ca", "cube_tls_cert", "cube_tls_key", "log", "slow_request_ms", "tracer_interval_s", "tracer_file", "otel_endpoint", "batching", "batch_max_samples", "batch_max_delay_ms", "allow_recording")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    CUBE_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CUBE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    CUBE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_THREADS_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_FIELD_NUMBER: _ClassVar[int]
    GRPC_FIELD_NUMBER: _ClassVar[int]
    CUBE_TOKEN_FILE_FIELD_NUMBER: _ClassVar[int]
    CUBE_CACHE_MB_FIELD_NUMBER: _ClassVar[int]
    CUBE_TLS_CA_FIELD_NUMBER: _ClassVar[int]
    CUBE_TLS_CERT_FIELD_NUMBER: _ClassVar[int]
    CUBE_TLS_KEY_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    SLOW_REQUEST_MS_FIELD_NUMBER: _ClassVar[int]
    TRACER_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    TRACER_FILE_FIELD_NUMBER: _ClassVar[int]
    OTEL_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BATCHING_FIELD_NUMBER: _ClassVar[int]
    BATCH_MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BATCH_MAX_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_RECORDING_FIELD_NUMBER: _ClassVar[int]
    model: _containers.RepeatedScalarFieldContainer[str]
    listen: str
    cube: str
    max_samples: int
    cube_wait_s: int
    cube_timeout_ms: int
    compute_threads: int
    max_keys: int
    grpc: str
    cube_token_file: str
    cube_cache_mb: int
    cube_tls_ca: str
    cube_tls_cert: str
    cube_tls_key: str
    log: str
    slow_request_ms: int
    tracer_interval_s: int
    tracer_file: str
    otel_endpoint: str
    batching: str
    batch_max_samples: int
    batch_max_delay_ms: int
    allow_recording: bool
    def __init__(self, model: _Optional[_Iterable[str]] = ..., listen: _Optional[str] = ..., cube: _Optional[str] = ..., max_samples: _Optional[int] = ..., cube_wait_s: _Optional[int] = ..., cube_timeout_ms: _Optional[int] = ..., compute_threads: _Optional[int] = ..., max_keys: _Optional[int] = ..., grpc: _Optional[str] = ..., cube_token_file: _Optional[str] = ..., cube_cache_mb: _Optional[int] = ..., cube_tls_ca: _Optional[str] = ..., cube_tls_cert: _Optional[str] = ..., cube_tls_key: _Optional[str] = ..., log: _Optional[str] = ..., slow_request_ms: _Optional[int] = ..., tracer_interval_s: _Optional[int] = ..., tracer_file: _Optional[str] = ..., otel_endpoint: _Optional[str] = ..., batching: _Optional[str] = ..., batch_max_samples: _Optional[int] = ..., batch_max_delay_ms: _Optional[int] = ..., allow_recording: _Optional[bool] = ...) -> None: ...

class ClientConfig(_message.Message):
    __slots__ = ("target", "model", "data", "batch", "concurrency", "timeout_ms")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    target: str
    model: str
    data: str
    batch: int
    concurrency: int
    timeout_ms: int
    def __init__(self, target: _Optional[str] = ..., model: _Optional[str] = ..., data: _Optional[str] = ..., batch: _Optional[int] = ..., concurrency: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...
