"""A TensorRT and a GPU on the CPU: an engine is a registered function, and tensors are found by their address."""

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch

from pfstorer_rt.engine.session import open_session

ENGINE = b"fake-engine:"


class FakeCuda:
    """Replaces `engine.cuda.Cuda` by host memory that is found by its address, and graphs that can be replayed.

    full: memory of this shape cannot be allocated. broken: an exception that `synchronize` raises.
    """

    def __init__(self, capability=(8, 9), capturable=True, full=None, broken=None):
        self.device, self.capability, self.capturable = torch.device("cpu"), capability, capturable
        self.full, self.broken = full, broken
        self.memory, self.captures, self.replays = {}, 0, 0
        self.recording = False

    def name(self):
        return "Fake GPU 4090"

    def compute_capability(self):
        return self.capability

    def stream_handle(self):
        return 7

    def empty(self, shape, dtype):
        if shape == self.full:
            raise MemoryError("out of memory")
        tensor = torch.full(shape, float("nan"), dtype=dtype)
        self.memory[tensor.data_ptr()] = tensor
        return tensor

    def staged(self, tensor):
        return tensor

    def copy(self, target, source):
        target.copy_(source)

    def result(self, tensor):
        return tensor.clone()

    def synchronize(self):
        if self.broken:
            raise self.broken

    def run(self, work):
        return work()

    def capture(self, enqueue):
        self.captures += 1
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recording = True  # nothing is computed while a graph is captured
        enqueue(self.stream_handle())
        self.recording = False

        def replay():
            self.replays += 1
            enqueue(self.stream_handle())

        return replay


@dataclass
class State:
    """State that the classes of one library share."""

    cuda: FakeCuda | None
    functions: dict
    """Name of an engine -> function of its named inputs to its named outputs."""
    error: str
    """If not empty, every run fails with this message."""
    capturable: bool
    """What `is_stream_capturable` returns."""
    log: list = field(default_factory=list)


class Cache:
    """A runtime cache of compiled kernels."""

    def __init__(self, log):
        self.log, self.data = log, b""

    def deserialize(self, blob):
        if not blob.startswith(b"kernels"):
            raise RuntimeError("damaged blob")
        self.log.append(("cache", bytes(blob)))
        self.data = bytes(blob)

    def serialize(self):
        return self.data or b"kernels" + str(len(self.log)).encode()


class Context:
    """An execution context; `make_library` sets `state`."""

    def __init__(self, engine):
        self.engine, self.addresses, self.shapes, self.profile = engine, {}, {}, None

    def set_optimization_profile_async(self, index, stream):
        assert stream == self.state.cuda.stream_handle()
        self.profile = index

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        assert all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True)), (name, shape)
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        return self.engine.about["outputs"][name](self.shapes)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def is_stream_capturable(self, stream):
        return self.state.capturable

    def execute_async_v3(self, stream):
        cuda, functions = self.state.cuda, self.state.functions
        if self.state.error:
            self.engine.logger.log("ERROR", self.state.error)
            return False
        if cuda.recording:
            return True
        bound = {name: cuda.memory[address] for name, address in self.addresses.items()}
        inputs = {name: bound[name].clone() for name in self.engine.about["inputs"]}
        assert all(tuple(t.shape) == self.shapes[n] for n, t in inputs.items()), "bound memory has another shape"
        for name, value in functions[self.engine.name](**inputs).items():
            bound[name].copy_(value)
        self.state.log.append(("run", self.engine.name, {n: t.clone() for n, t in inputs.items()}))
        return True


class Config:
    """A runtime configuration; `make_library` sets `state`."""

    dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def create_runtime_cache(self):
        return Cache(self.state.log)

    def set_runtime_cache(self, cache):
        self.state.log.append(("set cache",))


class FailingConfig(Config):
    """A runtime configuration that cannot make a cache."""

    def create_runtime_cache(self):
        raise RuntimeError("no cache")


class Engine:
    """An engine; `make_library` sets `state`, `config` and `context`, the classes of the same library."""

    def __init__(self, name, about, logger):
        self.name, self.about, self.logger = name, about, logger
        self.names = [*about["inputs"], *about["outputs"]]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(about["profiles"])

    def get_tensor_name(self, i):
        return self.names[i]

    def get_tensor_mode(self, name):
        return "in" if name in self.about["inputs"] else "out"

    def get_tensor_dtype(self, name):
        return self.about.get("types", {}).get(name, "FLOAT")

    def get_tensor_shape(self, name):
        return self.about["inputs"].get(name, ())

    def get_tensor_profile_shape(self, name, profile):
        return self.about["profiles"][profile].get(name, [self.about["inputs"][name]] * 3)

    def create_runtime_config(self):
        return self.config()

    def create_execution_context(self, config=None):
        self.state.log.append(("context", config and config.dynamic_shapes_kernel_specialization_strategy))
        return self.context(self)


class Runtime:
    """A runtime; `make_library` sets `state` and `engine`, the class of the same library."""

    engine_header_size = 12

    def __init__(self, logger):
        self.logger = logger

    def get_engine_validity(self, header):
        assert len(header) <= self.engine_header_size
        if header == b"no driver...":
            self.logger.log("INTERNAL_ERROR", "CUDA driver version is insufficient")
            return "INVALID", 0
        return ("INVALID", 1 | 32) if header != ENGINE else ("VALID", 0)

    def deserialize_cuda_engine(self, payload):
        self.state.log.append(("deserialize",))
        name = payload.removeprefix(ENGINE).decode()
        if name not in ENGINES:
            self.logger.log("WARNING", "an older release")
            self.logger.log("ERROR", "magic tag\n does not match")
            return None
        return self.engine(name, ENGINES[name], self.logger)


class ILogger:
    """The base class of loggers."""

    ERROR, INTERNAL_ERROR = "ERROR", "INTERNAL_ERROR"


ENGINES = {}
"""Name of an engine -> its description, as registered by `payload`."""


def make_library(cuda, functions, version="1.7.1.116", drop=(), error="", capturable=True, config=Config):
    """Return a module with the classes that the session uses.

    functions, error, capturable: as in `State`. drop: names that this release does not have. config: the class of
    runtime configurations.
    """
    state = State(cuda, functions, error, capturable)
    lacks = {path.split(".")[0]: path.split(".")[1] for path in drop if "." in path}

    def own(kind, name, **attributes):
        """Return a subclass of this library, without the methods in `drop`."""
        missing = {lacks[name]: None} if name in lacks else {}
        return type(kind.__name__, (kind,), {"state": state, **attributes, **missing})

    contexts, configs = own(Context, "IExecutionContext"), own(config, "IRuntimeConfig")
    engines = own(Engine, "ICudaEngine", context=contexts, config=configs)
    kinds = ("FLOAT", "HALF", "BF16", "INT32", "INT64", "BOOL")
    module = ModuleType("fake_library")
    vars(module).update(
        __version__=version,
        Runtime=own(Runtime, "Runtime", engine=engines),
        ILogger=ILogger,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        DataType=SimpleNamespace(**{kind: kind for kind in kinds}),
        EngineValidity=SimpleNamespace(INVALID="INVALID"),
        EngineInvalidityDiagnostics=SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "MALFORMED_ENGINE": 32}),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="EAGER"),
        ICudaEngine=engines,
        IRuntimeConfig=configs,
        IExecutionContext=contexts,
    )
    for name in drop:
        vars(module).pop(name, None)
    module.log = state.log
    return module


def payload(name, inputs, outputs, profiles, types=None):
    """Register an engine and return its bytes; `outputs` are functions {name: shapes -> shape}."""
    ENGINES[name] = {"inputs": inputs, "outputs": outputs, "profiles": profiles, "types": types or {}}
    return ENGINE + name.encode()


def from_onnx_plan(plan, component, batches=(1, 2, 4)):
    """A fake engine that computes what a component of an ONNX plan does: (payload, function)."""
    entry = plan.manifest.payloads[component]
    inputs = {n: [d if isinstance(d, int) else -1 for d in port["shape"]] for n, port in entry.inputs.items()}
    session = open_session(plan, component, "onnxruntime")

    def run(**tensors):
        outputs = session.run(**{name: tensor.numpy() for name, tensor in tensors.items()})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    def shape_of(name):
        def shape(shapes):
            zeros = {n: torch.zeros(s) for n, s in shapes.items()} | {
                n: torch.zeros(s) for n, s in inputs.items() if n not in shapes
            }
            return tuple(run(**zeros)[name].shape)

        return shape

    if component == "denoiser":
        ladder = [{n: [[b if d == -1 else d for d in s]] * 3 for n, s in inputs.items() if -1 in s} for b in batches]
    else:
        ladder = [{n: [[1, s[1], 1, 1], [1, s[1], 8, 8], [1, s[1], 512, 512]] for n, s in inputs.items() if -1 in s}]
    outputs = {name: shape_of(name) for name in entry.outputs}
    return payload(component, inputs, outputs, ladder), run
