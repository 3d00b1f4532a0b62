"""TensorRT and the CUDA runtime without a GPU, as every version offers them, with right numbers.

``make_tensorrt(version, library)`` gives a module whose classes have exactly the names that
``api_surfaces.json`` records for that version; anything else raises AttributeError, as there. An
"engine" keeps the ONNX bytes, and executing it runs ONNX Runtime on the buffers at the tensors'
addresses. ``FakeCudart`` is the library below :class:`smskd_export.runner.run.Cuda`: memory is host
memory with bounds, and a stream is a list of work that happens only when somebody waits for it.
"""

import ctypes
import json
import time
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort

SURFACES = json.loads(Path(__file__).with_name("api_surfaces.json").read_text())
VERSIONS = [name for name in SURFACES if name not in ("about", "rtx-1.7")]
MAGIC = b"fake engine\n"
NOT_READY, BAD, CAPTURE_ERROR = 600, 1, 901


class Function:
    """A C function: takes attributes as ctypes gives them."""

    def __init__(self, work):
        self.work, self.argtypes, self.restype, self.calls = work, None, None, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.work(*arguments)


def plain(value):
    return value.value or 0 if hasattr(value, "value") else value


def put(reference, value):
    """Write through a ``ctypes.byref``."""
    reference._obj.value = value


class FakeCudart:
    """The functions of libcudart that the runner calls; fails where the real one would."""

    def __init__(self, cuda=12, free=8 << 30, uncapturable=False):
        self.memory, self.streams, self.events, self.graphs = {}, {}, {}, {}
        self.capturing, self.last, self.spinning = None, 1000, False
        self.cuda, self.free, self.uncapturable = cuda, free, uncapturable
        for name in dir(type(self)):
            if name.startswith("call_"):
                setattr(self, "cuda" + name[5:], Function(getattr(self, name)))
        if cuda == 12:  # versions 11 and 13 have one name, 12 has two
            self.cudaGetDeviceProperties_v2 = self.cudaGetDeviceProperties

    @property
    def live(self):
        """What was not given back."""
        return [*self.memory, *self.streams, *self.events, *self.graphs]

    def handle(self, kind, value):
        self.last += 1
        kind[self.last] = value
        return self.last

    def enqueue(self, stream, work):
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.streams[stream].append(work)

    def at(self, address, count):
        """Whether these bytes lie in something allocated."""
        return any(a <= address and address + count <= a + len(b) for a, b in self.memory.items())

    def call_GetErrorString(self, code):
        return f"fake error {code}".encode()

    def call_SetDeviceFlags(self, flags):
        self.spinning = flags == 1
        return 0

    def call_RuntimeGetVersion(self, reference):
        put(reference, self.cuda * 1000 + 60)
        return 0

    def call_GetDeviceProperties(self, record, device):
        record[:9] = b"Fake GPU\0"
        return 0

    def call_DeviceGetAttribute(self, reference, attribute, device):
        put(reference, {75: 8, 76: 7}[attribute])
        return 0

    def call_DeviceGetPCIBusId(self, text, length, device):
        text.value = b"0000:01:00.0"
        return 0

    def call_MemGetInfo(self, free, total):
        put(free, self.free)
        put(total, 8 << 30)
        return 0

    def call_Malloc(self, reference, count):
        buffer = ctypes.create_string_buffer(plain(count))
        self.memory[ctypes.addressof(buffer)] = buffer
        put(reference, ctypes.addressof(buffer))
        return 0

    call_MallocHost = call_Malloc

    def call_Free(self, address):
        return 0 if self.memory.pop(address, None) is not None else BAD

    call_FreeHost = call_Free

    def call_MemcpyAsync(self, target, source, count, kind, stream):
        if not (self.at(target, count) and self.at(source, count)) or kind not in (1, 2):
            return BAD
        self.enqueue(stream, lambda: ctypes.memmove(target, source, count))
        return 0

    def call_StreamCreate(self, reference):
        put(reference, self.handle(self.streams, []))
        return 0

    def call_StreamDestroy(self, stream):
        return 0 if self.streams.pop(stream, None) is not None else BAD

    def call_StreamSynchronize(self, stream):
        if self.capturing is not None:
            return CAPTURE_ERROR
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()
        return 0

    def call_EventCreate(self, reference):
        put(reference, self.handle(self.events, 0))
        return 0

    def call_EventDestroy(self, event):
        return 0 if self.events.pop(event, None) is not None else BAD

    def call_EventRecord(self, event, stream):
        self.events[event] = 0
        self.enqueue(stream, lambda: self.events.__setitem__(event, time.perf_counter_ns()))
        return 0

    def call_EventElapsedTime(self, reference, first, second):
        if not (self.events[first] and self.events[second]):
            return NOT_READY
        put(reference, (self.events[second] - self.events[first]) / 1e6)
        return 0

    def call_StreamBeginCapture(self, stream, mode):
        if self.streams[plain(stream)]:
            return CAPTURE_ERROR
        self.capturing = []
        return 0

    def call_StreamEndCapture(self, stream, reference):
        work, self.capturing = self.capturing, None
        if self.uncapturable:
            return CAPTURE_ERROR
        put(reference, self.handle(self.graphs, work))
        return 0

    def call_GraphInstantiateWithFlags(self, reference, graph, flags):
        put(reference, self.handle(self.graphs, self.graphs[plain(graph)]))
        return 0

    def call_GraphDestroy(self, graph):
        return 0 if self.graphs.pop(plain(graph), None) is not None else BAD

    call_GraphExecDestroy = call_GraphDestroy

    def call_GraphLaunch(self, graph, stream):
        for step in self.graphs[graph]:
            self.enqueue(stream, step)
        return 0


def make_tensorrt(version, library=None):
    """A module like ``tensorrt`` of this version, see the top of the file."""
    surface = SURFACES[version]
    enums = {
        name: IntEnum(name, [(m, number) for number, m in enumerate(members)])
        for name, members in surface["enums"].items()
    }

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self):
            self.began = True

    trt = SimpleNamespace(
        __version__=surface["version"], ILogger=ILogger, **enums,
        surface=surface, library=library, builds=[],
    )  # fmt: skip
    for make in (_builder, _config, _parser, _error, _runtime, _engine, _context, _cache):
        cls = make(trt)
        setattr(trt, cls.__name__, _limited(cls, surface["classes"][cls.__name__]))
    return trt


def _limited(cls, names):
    """Only what the version has; the fake's own notes begin with an underscore."""
    for name in list(vars(cls)):
        if not name.startswith("_") and name not in names:
            delattr(cls, name)

    def set_attribute(self, name, value):
        if not name.startswith("_") and name not in names:
            raise AttributeError(f"{cls.__name__} of this version has no {name}")
        object.__setattr__(self, name, value)

    cls.__setattr__ = set_attribute
    return cls


def _builder(trt):
    class Builder:
        def __init__(self, logger):
            assert logger.began, "ILogger.__init__ was not called"
            self._logger = logger

        def create_network(self, flags=0):
            kinds = trt.NetworkDefinitionCreationFlag
            assert flags < 1 << len(kinds), "unknown flag"
            named = {kind.name for kind in kinds if flags >> kind & 1}
            always = "FP16" not in trt.BuilderFlag.__members__
            return SimpleNamespace(
                explicit="EXPLICIT_BATCH" in named or trt.surface["cuda"] > 11,
                typed="STRONGLY_TYPED" in named or always,
                model=None,
            )

        def create_builder_config(self):
            return trt.IBuilderConfig()

        def build_serialized_network(self, network, config):
            flags = {flag.name for flag in config._flags}
            problem = _why_not(network, flags)
            if problem:
                self._logger.log(trt.ILogger.ERROR, problem)
                return None
            self._logger.log(trt.ILogger.INFO, "not of interest")
            self._logger.log(trt.ILogger.WARNING, "a fake warns")
            trt.builds.append({"flags": flags, "typed": network.typed, "config": config})
            if config._timing is not None:
                config._timing._data += b"."
            head = json.dumps({"version": trt.__version__}).encode() + b"\n"
            return MAGIC + head + network.model

        max_batch_size = 1  # what tells 8.x from 10

    return Builder


def _types(model):
    graph = onnx.load_from_string(model).graph
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
    return half, any(node.op_type == "QuantizeLinear" for node in graph.node)


def _why_not(network, flags):
    half, quantised = _types(network.model)
    if network.typed and flags & {"FP16", "INT8"}:
        return "a strongly typed network takes no precision flags"
    if not network.typed and half and "FP16" not in flags:
        return "the network has fp16 tensors, but fp16 is not enabled"
    if not network.typed and quantised and "INT8" not in flags:
        return "the network has Q/DQ layers, but int8 is not enabled"
    return ""


def _config(trt):
    class IBuilderConfig:
        def __init__(self):
            self._flags, self._pools, self._timing = {trt.BuilderFlag.TF32}, {}, None

        def set_flag(self, flag):
            self._flags.add(trt.BuilderFlag(flag))

        def clear_flag(self, flag):
            self._flags.discard(trt.BuilderFlag(flag))

        def set_memory_pool_limit(self, pool, size):
            self._pools[trt.MemoryPoolType(pool).name] = size

        def create_timing_cache(self, data):
            return trt.ITimingCache(data)

        def set_timing_cache(self, cache, ignore_mismatch):
            fits = cache._data.startswith(trt.__version__.encode())
            self._timing = cache if fits else None
            return fits

    return IBuilderConfig


def _cache(trt):
    class ITimingCache:
        def __init__(self, data):
            self._data = bytes(data) or trt.__version__.encode()

        def serialize(self):
            return memoryview(self._data)

    return ITimingCache


def _parser(trt):
    class OnnxParser:
        def __init__(self, network, logger):
            self._network, self._errors, self._logger = network, [], logger

        def parse(self, data):
            model = onnx.load_from_string(data)
            opset = max(o.version for o in model.opset_import if o.domain == "")
            if opset > trt.surface["max_opset"]:
                self._errors.append((0, f"opset {opset}\n is not supported", model.graph.node[0]))
            if not self._network.explicit:
                self._errors.append((0, "only explicit batch", model.graph.node[0]))
            for number, node in enumerate(model.graph.node):
                if node.op_type == "Det":
                    self._errors.append((number, "no importer for Det", node))
            self._network.model = data
            return not self._errors

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, number):
            return trt.ParserError(*self._errors[number])

    return OnnxParser


def _error(trt):
    class ParserError:
        def __init__(self, number, text, node):
            self._number, self._text, self._node = number, text, node

        def node(self):
            return self._number

        def desc(self):
            return self._text

        def node_name(self):
            return self._node.name

        def node_operator(self):
            return self._node.op_type

    return ParserError


def _runtime(trt):
    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, plan):
            head, _, model = plan[len(MAGIC) :].partition(b"\n")
            if plan[: len(MAGIC)] != MAGIC or json.loads(head)["version"] != trt.__version__:
                self._logger.log(trt.ILogger.ERROR, "serialized by another version")
                return None
            return trt.ICudaEngine(model)

    return Runtime


def _engine(trt):
    class ICudaEngine:
        def __init__(self, model):
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
            self._ports = [*self._session.get_inputs(), *self._session.get_outputs()]

        @property
        def num_io_tensors(self):
            return len(self._ports)

        def get_tensor_name(self, number):
            return self._ports[number].name

        def get_tensor_mode(self, name):
            first = name == self._ports[0].name
            return trt.TensorIOMode.INPUT if first else trt.TensorIOMode.OUTPUT

        def get_tensor_shape(self, name):
            return next(tuple(port.shape) for port in self._ports if port.name == name)

        def get_tensor_dtype(self, name):
            return trt.DataType.FLOAT

        def create_execution_context(self):
            return trt.IExecutionContext(self)

        device_memory_size = property(lambda self: 1000)
        device_memory_size_v2 = property(lambda self: 2000)

    return ICudaEngine


def _context(trt):
    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._addresses = engine, {}

        def set_tensor_address(self, name, address):
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream_handle):
            trt.library.enqueue(stream_handle, self._execute)
            return True

        def _execute(self):
            source, target = self._engine._ports
            run = self._engine._session.run
            result = run(None, {source.name: self._array(source)})[0]
            self._array(target)[...] = result

        def _array(self, port):
            count, address = int(np.prod(port.shape)), self._addresses[port.name]
            assert trt.library.at(address, 4 * count), "no memory there"
            memory = (ctypes.c_float * count).from_address(address)
            return np.ctypeslib.as_array(memory).reshape(port.shape)

    return IExecutionContext
