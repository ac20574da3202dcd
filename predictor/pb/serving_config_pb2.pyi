from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InferServiceConf(_message.Message):
    __slots__ = ("port", "services", "listen")
    PORT_FIELD_NUMBER: _ClassVar[int]
    SERVICES_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FIELD_NUMBER: _ClassVar[int]
    port: int
    services: _containers.RepeatedCompositeFieldContainer[InferService]
    listen: str
    def __init__(self, port: _Optional[int] = ..., services: _Optional[_Iterable[_Union[InferService, _Mapping]]] = ..., listen: _Optional[str] = ...) -> None: ...

class InferService(_message.Message):
    __slots__ = ("name", "merger", "enable_map_request_to_workflow", "request_field_key", "value_mapped_workflows", "workflows", "parallel", "version", "tracer_interval_s", "slow_request_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MERGER_FIELD_NUMBER: _ClassVar[int]
    ENABLE_MAP_REQUEST_TO_WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_MAPPED_WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    PARALLEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRACER_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    SLOW_REQUEST_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    merger: str
    enable_map_request_to_workflow: bool
    request_field_key: str
    value_mapped_workflows: _containers.RepeatedCompositeFieldContainer[ValueMappedWorkflow]
    workflows: _containers.RepeatedScalarFieldContainer[str]
    parallel: bool
    version: str
    tracer_interval_s: float
    slow_request_ms: float
    def __init__(self, name: _Optional[str] = ..., merger: _Optional[str] = ..., enable_map_request_to_workflow: _Optional[bool] = ..., request_field_key: _Optional[str] = ..., value_mapped_workflows: _Optional[_Iterable[_Union[ValueMappedWorkflow, _Mapping]]] = ..., workflows: _Optional[_Iterable[str]] = ..., parallel: _Optional[bool] = ..., version: _Optional[str] = ..., tracer_interval_s: _Optional[float] = ..., slow_request_ms: _Optional[float] = ...) -> None: ...

class ValueMappedWorkflow(_message.Message):
    __slots__ = ("request_field_value", "workflow")
    REQUEST_FIELD_VALUE_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    request_field_value: str
    workflow: str
    def __init__(self, request_field_value: _Optional[str] = ..., workflow: _Optional[str] = ...) -> None: ...

class WorkflowConf(_message.Message):
    __slots__ = ("workflows",)
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    workflows: _containers.RepeatedCompositeFieldContainer[Workflow]
    def __init__(self, workflows: _Optional[_Iterable[_Union[Workflow, _Mapping]]] = ...) -> None: ...

class Workflow(_message.Message):
    __slots__ = ("name", "workflow_type", "nodes", "inputs", "outputs", "batch")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_TYPE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    name: str
    workflow_type: str
    nodes: _containers.RepeatedCompositeFieldContainer[DAGNode]
    inputs: _containers.RepeatedCompositeFieldContainer[RequestInput]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    batch: BatchLimits
    def __init__(self, name: _Optional[str] = ..., workflow_type: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[DAGNode, _Mapping]]] = ..., inputs: _Optional[_Iterable[_Union[RequestInput, _Mapping]]] = ..., outputs: _Optional[_Iterable[str]] = ..., batch: _Optional[_Union[BatchLimits, _Mapping]] = ...) -> None: ...

class DAGNode(_message.Message):
    __slots__ = ("name", "type", "address", "dependencies", "config", "inputs", "when", "deadline_ms", "concurrency", "executor", "batch", "queue_size")
    class Executor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        THREAD: _ClassVar[DAGNode.Executor]
        PROCESS: _ClassVar[DAGNode.Executor]
    THREAD: DAGNode.Executor
    PROCESS: DAGNode.Executor
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEPENDENCIES_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    WHEN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    EXECUTOR_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    address: _containers.RepeatedScalarFieldContainer[str]
    dependencies: _containers.RepeatedCompositeFieldContainer[DAGNodeDependency]
    config: _containers.RepeatedCompositeFieldContainer[Setting]
    inputs: _containers.RepeatedCompositeFieldContainer[NodeInput]
    when: str
    deadline_ms: float
    concurrency: int
    executor: DAGNode.Executor
    batch: BatchLimits
    queue_size: int
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., address: _Optional[_Iterable[str]] = ..., dependencies: _Optional[_Iterable[_Union[DAGNodeDependency, _Mapping]]] = ..., config: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., inputs: _Optional[_Iterable[_Union[NodeInput, _Mapping]]] = ..., when: _Optional[str] = ..., deadline_ms: _Optional[float] = ..., concurrency: _Optional[int] = ..., executor: _Optional[_Union[DAGNode.Executor, str]] = ..., batch: _Optional[_Union[BatchLimits, _Mapping]] = ..., queue_size: _Optional[int] = ...) -> None: ...

class DAGNodeDependency(_message.Message):
    __slots__ = ("name", "mode")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: str
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[str] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("key", "text", "integer", "number", "flag", "list")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    key: str
    text: _containers.RepeatedScalarFieldContainer[str]
    integer: _containers.RepeatedScalarFieldContainer[int]
    number: _containers.RepeatedScalarFieldContainer[float]
    flag: _containers.RepeatedScalarFieldContainer[bool]
    list: bool
    def __init__(self, key: _Optional[str] = ..., text: _Optional[_Iterable[str]] = ..., integer: _Optional[_Iterable[int]] = ..., number: _Optional[_Iterable[float]] = ..., flag: _Optional[_Iterable[bool]] = ..., list: _Optional[bool] = ...) -> None: ...

class NodeInput(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    FROM_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ..., **kwargs) -> None: ...

class RequestInput(_message.Message):
    __slots__ = ("name", "datatype", "shape", "ragged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATATYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    RAGGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    datatype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    ragged: bool
    def __init__(self, name: _Optional[str] = ..., datatype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., ragged: _Optional[bool] = ...) -> None: ...

class BatchLimits(_message.Message):
    __slots__ = ("max_rows", "max_delay_ms", "preferred_rows", "allowed_rows", "max_waiting_rows", "max_in_flight", "off")
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_ROWS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    OFF_FIELD_NUMBER: _ClassVar[int]
    max_rows: int
    max_delay_ms: float
    preferred_rows: _containers.RepeatedScalarFieldContainer[int]
    allowed_rows: _containers.RepeatedScalarFieldContainer[int]
    max_waiting_rows: int
    max_in_flight: int
    off: bool
    def __init__(self, max_rows: _Optional[int] = ..., max_delay_ms: _Optional[float] = ..., preferred_rows: _Optional[_Iterable[int]] = ..., allowed_rows: _Optional[_Iterable[int]] = ..., max_waiting_rows: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., off: _Optional[bool] = ...) -> None: ...

class ResourceConf(_message.Message):
    __slots__ = ("model_toolkit_path", "model_toolkit_file", "model_manager_path", "model_manager_file", "general_model_path", "general_model_file", "cube_config_path", "cube_config_file", "cube_quant_bits", "cube_cache_path", "auth_product_name", "auth_container_id")
    MODEL_TOOLKIT_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_TOOLKIT_FILE_FIELD_NUMBER: _ClassVar[int]
    MODEL_MANAGER_PATH_FIELD_NUMBER: _ClassVar[int]
    MODEL_MANAGER_FILE_FIELD_NUMBER: _ClassVar[int]
    GENERAL_MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    GENERAL_MODEL_FILE_FIELD_NUMBER: _ClassVar[int]
    CUBE_CONFIG_PATH_FIELD_NUMBER: _ClassVar[int]
    CUBE_CONFIG_FILE_FIELD_NUMBER: _ClassVar[int]
    CUBE_QUANT_BITS_FIELD_NUMBER: _ClassVar[int]
    CUBE_CACHE_PATH_FIELD_NUMBER: _ClassVar[int]
    AUTH_PRODUCT_NAME_FIELD_NUMBER: _ClassVar[int]
    AUTH_CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    model_toolkit_path: _containers.RepeatedScalarFieldContainer[str]
    model_toolkit_file: _containers.RepeatedScalarFieldContainer[str]
    model_manager_path: str
    model_manager_file: str
    general_model_path: _containers.RepeatedScalarFieldContainer[str]
    general_model_file: _containers.RepeatedScalarFieldContainer[str]
    cube_config_path: str
    cube_config_file: str
    cube_quant_bits: int
    cube_cache_path: str
    auth_product_name: str
    auth_container_id: str
    def __init__(self, model_toolkit_path: _Optional[_Iterable[str]] = ..., model_toolkit_file: _Optional[_Iterable[str]] = ..., model_manager_path: _Optional[str] = ..., model_manager_file: _Optional[str] = ..., general_model_path: _Optional[_Iterable[str]] = ..., general_model_file: _Optional[_Iterable[str]] = ..., cube_config_path: _Optional[str] = ..., cube_config_file: _Optional[str] = ..., cube_quant_bits: _Optional[int] = ..., cube_cache_path: _Optional[str] = ..., auth_product_name: _Optional[str] = ..., auth_container_id: _Optional[str] = ...) -> None: ...

class ModelToolkitConf(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineDesc]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineDesc, _Mapping]]] = ...) -> None: ...

class EngineDesc(_message.Message):
    __slots__ = ("name", "type", "model_dir", "model_data_path", "gpu_ids", "use_gpu", "runtime_thread_num", "batch_infer_size", "cpu_math_thread_num", "reloadable_meta", "reloadable_type", "version_file", "version_type", "enable_batch_align", "enable_overrun", "allow_split_request", "sparse_param_service_type", "sparse_param_service_table_name", "enable_memory_optimization", "static_optimization", "force_update_static_cache", "enable_ir_optimization", "combined_model", "gpu_multi_stream", "gpu_memory_mb", "use_trt", "use_lite", "use_xpu", "use_ascend_cl", "use_ipu", "ipu_cfg_file", "encrypted_model", "trt_workspace_size", "trt_use_static", "min_subgraph_size", "min_input_shape", "max_input_shape", "opt_input_shape", "enable_dist_model", "dist_carrier_id", "dist_cfg_file", "dist_nranks", "dist_endpoints", "dist_subgraph_index", "engine", "device", "threads", "compile", "warm_up_file", "nan_policy", "callable", "inputs", "outputs", "memory_limit_mb")
    class SparseParamServiceType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        NONE: _ClassVar[EngineDesc.SparseParamServiceType]
        LOCAL: _ClassVar[EngineDesc.SparseParamServiceType]
        REMOTE: _ClassVar[EngineDesc.SparseParamServiceType]
    NONE: EngineDesc.SparseParamServiceType
    LOCAL: EngineDesc.SparseParamServiceType
    REMOTE: EngineDesc.SparseParamServiceType
    class MinInputShapeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MaxInputShapeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class OptInputShapeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIR_FIELD_NUMBER: _ClassVar[int]
    MODEL_DATA_PATH_FIELD_NUMBER: _ClassVar[int]
    GPU_IDS_FIELD_NUMBER: _ClassVar[int]
    USE_GPU_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_THREAD_NUM_FIELD_NUMBER: _ClassVar[int]
    BATCH_INFER_SIZE_FIELD_NUMBER: _ClassVar[int]
    CPU_MATH_THREAD_NUM_FIELD_NUMBER: _ClassVar[int]
    RELOADABLE_META_FIELD_NUMBER: _ClassVar[int]
    RELOADABLE_TYPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FILE_FIELD_NUMBER: _ClassVar[int]
    VERSION_TYPE_FIELD_NUMBER: _ClassVar[int]
    ENABLE_BATCH_ALIGN_FIELD_NUMBER: _ClassVar[int]
    ENABLE_OVERRUN_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SPLIT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SPARSE_PARAM_SERVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    SPARSE_PARAM_SERVICE_TABLE_NAME_FIELD_NUMBER: _ClassVar[int]
    ENABLE_MEMORY_OPTIMIZATION_FIELD_NUMBER: _ClassVar[int]
    STATIC_OPTIMIZATION_FIELD_NUMBER: _ClassVar[int]
    FORCE_UPDATE_STATIC_CACHE_FIELD_NUMBER: _ClassVar[int]
    ENABLE_IR_OPTIMIZATION_FIELD_NUMBER: _ClassVar[int]
    COMBINED_MODEL_FIELD_NUMBER: _ClassVar[int]
    GPU_MULTI_STREAM_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    USE_TRT_FIELD_NUMBER: _ClassVar[int]
    USE_LITE_FIELD_NUMBER: _ClassVar[int]
    USE_XPU_FIELD_NUMBER: _ClassVar[int]
    USE_ASCEND_CL_FIELD_NUMBER: _ClassVar[int]
    USE_IPU_FIELD_NUMBER: _ClassVar[int]
    IPU_CFG_FILE_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_MODEL_FIELD_NUMBER: _ClassVar[int]
    TRT_WORKSPACE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TRT_USE_STATIC_FIELD_NUMBER: _ClassVar[int]
    MIN_SUBGRAPH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MIN_INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    OPT_INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    ENABLE_DIST_MODEL_FIELD_NUMBER: _ClassVar[int]
    DIST_CARRIER_ID_FIELD_NUMBER: _ClassVar[int]
    DIST_CFG_FILE_FIELD_NUMBER: _ClassVar[int]
    DIST_NRANKS_FIELD_NUMBER: _ClassVar[int]
    DIST_ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    DIST_SUBGRAPH_INDEX_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    COMPILE_FIELD_NUMBER: _ClassVar[int]
    WARM_UP_FILE_FIELD_NUMBER: _ClassVar[int]
    NAN_POLICY_FIELD_NUMBER: _ClassVar[int]
    CALLABLE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_MB_FIELD_NUMBER: _ClassVar[int]
    name: str
    type: str
    model_dir: str
    model_data_path: str
    gpu_ids: _containers.RepeatedScalarFieldContainer[int]
    use_gpu: bool
    runtime_thread_num: int
    batch_infer_size: int
    cpu_math_thread_num: int
    reloadable_meta: str
    reloadable_type: str
    version_file: str
    version_type: str
    enable_batch_align: bool
    enable_overrun: bool
    allow_split_request: bool
    sparse_param_service_type: EngineDesc.SparseParamServiceType
    sparse_param_service_table_name: str
    enable_memory_optimization: bool
    static_optimization: bool
    force_update_static_cache: bool
    enable_ir_optimization: bool
    combined_model: bool
    gpu_multi_stream: bool
    gpu_memory_mb: int
    use_trt: bool
    use_lite: bool
    use_xpu: bool
    use_ascend_cl: bool
    use_ipu: bool
    ipu_cfg_file: str
    encrypted_model: bool
    trt_workspace_size: int
    trt_use_static: bool
    min_subgraph_size: int
    min_input_shape: _containers.ScalarMap[str, str]
    max_input_shape: _containers.ScalarMap[str, str]
    opt_input_shape: _containers.ScalarMap[str, str]
    enable_dist_model: bool
    dist_carrier_id: str
    dist_cfg_file: str
    dist_nranks: int
    dist_endpoints: _containers.RepeatedScalarFieldContainer[str]
    dist_subgraph_index: int
    engine: str
    device: str
    threads: int
    compile: str
    warm_up_file: str
    nan_policy: str
    callable: str
    inputs: _containers.RepeatedCompositeFieldContainer[RequestInput]
    outputs: _containers.RepeatedCompositeFieldContainer[RequestInput]
    memory_limit_mb: int
    def __init__(self, name: _Optional[str] = ..., type: _Optional[str] = ..., model_dir: _Optional[str] = ..., model_data_path: _Optional[str] = ..., gpu_ids: _Optional[_Iterable[int]] = ..., use_gpu: _Optional[bool] = ..., runtime_thread_num: _Optional[int] = ..., batch_infer_size: _Optional[int] = ..., cpu_math_thread_num: _Optional[int] = ..., reloadable_meta: _Optional[str] = ..., reloadable_type: _Optional[str] = ..., version_file: _Optional[str] = ..., version_type: _Optional[str] = ..., enable_batch_align: _Optional[bool] = ..., enable_overrun: _Optional[bool] = ..., allow_split_request: _Optional[bool] = ..., sparse_param_service_type: _Optional[_Union[EngineDesc.SparseParamServiceType, str]] = ..., sparse_param_service_table_name: _Optional[str] = ..., enable_memory_optimization: _Optional[bool] = ..., static_optimization: _Optional[bool] = ..., force_update_static_cache: _Optional[bool] = ..., enable_ir_optimization: _Optional[bool] = ..., combined_model: _Optional[bool] = ..., gpu_multi_stream: _Optional[bool] = ..., gpu_memory_mb: _Optional[int] = ..., use_trt: _Optional[bool] = ..., use_lite: _Optional[bool] = ..., use_xpu: _Optional[bool] = ..., use_ascend_cl: _Optional[bool] = ..., use_ipu: _Optional[bool] = ..., ipu_cfg_file: _Optional[str] = ..., encrypted_model: _Optional[bool] = ..., trt_workspace_size: _Optional[int] = ..., trt_use_static: _Optional[bool] = ..., min_subgraph_size: _Optional[int] = ..., min_input_shape: _Optional[_Mapping[str, str]] = ..., max_input_shape: _Optional[_Mapping[str, str]] = ..., opt_input_shape: _Optional[_Mapping[str, str]] = ..., enable_dist_model: _Optional[bool] = ..., dist_carrier_id: _Optional[str] = ..., dist_cfg_file: _Optional[str] = ..., dist_nranks: _Optional[int] = ..., dist_endpoints: _Optional[_Iterable[str]] = ..., dist_subgraph_index: _Optional[int] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., threads: _Optional[int] = ..., compile: _Optional[str] = ..., warm_up_file: _Optional[str] = ..., nan_policy: _Optional[str] = ..., callable: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[RequestInput, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[RequestInput, _Mapping]]] = ..., memory_limit_mb: _Optional[int] = ...) -> None: ...
