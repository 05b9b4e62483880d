"""Every CUDA kernel goes through NVRTC, which needs no GPU: no spilled register, no array in memory, registers as the
design allows. And the little that stands between a launcher and the GPU."""

import concurrent.futures
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minillm.kernels
from minillm.kernels import cuda, device
from minillm.kernels.jit import cache_root

MODULES = [importlib.import_module(f"minillm.kernels.{m.name}") for m in pkgutil.iter_modules(minillm.kernels.__path__)]
SOURCES = sorted({x for m in MODULES for x in vars(m).values() if isinstance(x, cuda.Source)}, key=lambda s: s.name)
FILES = sorted(cuda.FOLDER.glob("*.cu"))
OTHERS = ("sm_80", "sm_100")
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)


def one_of_each_kernel(source):
    """The first instance of every kernel in a file, of those that every architecture has."""
    return list({instance.split("<")[0]: instance for instance in reversed(source.instances_of("sm_80"))}.values())


def brought_more(source):
    """The kernels of a file whose launch brings shared memory besides their own."""
    parts = source.path.read_text(encoding="utf-8").split("__global__")[1:]
    names = [re.search(r"\bvoid\s+(\w+)", re.sub(r"__launch_bounds__\(.*\)", "", part))[1] for part in parts]
    return {name for name, part in zip(names, parts, strict=True) if "DYNAMIC_SHARED(" in part}


def check_resources(source, found, architecture):
    """Complain of what does not fit in registers. The budget is for sm_90a, whose compiler it was read off; another
    architecture's may use a few more."""
    for instance, made in found.items():
        what = f"{source.name}, {instance}, {architecture}: {made._replace(code=made.code[:4])}"
        assert made.code.startswith(b"\x7fELF"), what
        assert made.spilled == 0 and made.stack == 0 and not made.lost, what
        assert made.shared <= (cuda.OWN_SHARED if instance.split("<")[0] in brought_more(source) else 48 << 10), what
        assert made.registers <= (source.instances[instance] if architecture == cuda.HOPPER else 255), what


def compile_part(name, instances, architecture):
    """compile_instances in another process. What came out is kept beside the compiled kernels, under the hash of all
    that it depends on: who changes one kernel waits for that one. Of the code only the beginning is kept."""
    source = next(s for s in SOURCES if s.name == name)
    reader = Path(cuda.__file__).read_text(encoding="utf-8")
    told = repr((source.text(), instances, cuda.options(architecture), cuda.nvrtc_version(), reader))
    path = cache_root() / f"nvrtc-{hashlib.sha256(told.encode()).hexdigest()[:24]}.json"
    if not path.exists():
        found = cuda.compile_instances(source, instances, architecture)
        rows = {instance: made._replace(code=made.code[:4].decode("latin-1")) for instance, made in found.items()}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({instance: row._asdict() for instance, row in rows.items()}, file)
        os.replace(file.name, path)  # whole or not there, whoever else compiles the same
    kept = json.loads(path.read_text())
    return {i: cuda.Compiled(**row)._replace(code=row["code"].encode("latin-1")) for i, row in kept.items()}


@pytest.fixture(scope="module")
def compiled():
    """compiled(source, instances, architecture) -> {instance: Compiled}. All cores compile what the default tests will
    ask for, from the first question on, the longest first: it is most of what this file takes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        started = {}

        def start(source, instances, architecture):
            parts = [instances[i : i + 5] for i in range(0, len(instances), 5)]
            key = source.name, architecture, *instances
            started[key] = [pool.submit(compile_part, source.name, part, architecture) for part in parts]
            return started[key]

        for source in sorted(SOURCES, key=lambda s: s.name != "attention.cu"):
            start(source, list(source.instances), cuda.HOPPER)
        for architecture, source in itertools.product(OTHERS, SOURCES):
            start(source, one_of_each_kernel(source), architecture)

        def compiled(source, instances, architecture):
            parts = started.get((source.name, architecture, *instances)) or start(source, instances, architecture)
            return {name: made for part in parts for name, made in part.result().items()}

        yield compiled
        pool.shutdown(cancel_futures=True)


def test_every_file_has_a_source_and_every_kernel_an_instance():
    assert [s.name for s in SOURCES] == [f.name for f in FILES] and FILES
    for source in SOURCES:
        text = re.sub(r"__launch_bounds__\(.*\)", "", source.path.read_text(encoding="utf-8"))
        written = set(re.findall(r"__global__\s+void\s+(\w+)", text))
        assert written == {instance.split("<")[0] for instance in source.instances}, source.name


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_instructions_stand_in_common_cuh_alone(file):
    """So that what runs here without a GPU is the kernel itself, and no stand-in for it."""
    text = re.sub(r"//[^\n]*", "", file.read_text(encoding="utf-8"))
    for word in ("asm", "__shared__", "#ifdef", "#if "):
        assert word not in text, f"{file.name} has {word}"


@every_source
def test_every_instance_fits_in_its_registers(source, compiled):
    check_resources(source, compiled(source, list(source.instances), cuda.HOPPER), cuda.HOPPER)


@pytest.mark.parametrize("architecture", OTHERS)
@every_source
def test_other_architectures_take_it_too(source, architecture, compiled):
    check_resources(source, compiled(source, one_of_each_kernel(source), architecture), architecture)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
@every_source
def test_every_instance_on_every_architecture(source, architecture, compiled):
    check_resources(source, compiled(source, source.instances_of(architecture), architecture), architecture)


# ------------------------------------------------------------------ compiling, loading, launching

DOUBLED = """
#include "common.cuh"
template <typename T> __global__ void doubled(T* x) { x[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x]; }
"""


def source_of(text, folder, **instances):
    (folder / "some.cu").write_text(text)
    source = cuda.Source("some.cu", instances)
    source.path = folder / "some.cu"
    return source


def test_a_spill_is_seen(tmp_path):
    """The check of registers can fail: 64 numbers that live at once do not fit in the 32 that these bounds leave."""
    text = """
#include "common.cuh"
__global__ void __launch_bounds__(1024, 2) greedy(float* x) {
    float kept[64];
    for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; ++i) x[(63 - i) * 1024 + threadIdx.x] = kept[i] * kept[(i * 7) % 64];
}
"""
    source = source_of(text, tmp_path, greedy=32)
    with pytest.raises(AssertionError, match="spilled"):
        check_resources(source, cuda.compile_instances(source, ["greedy"], "sm_90"), "sm_90")


def test_products_that_can_not_overlap_are_seen():
    """The assembler waits for each one where their registers do not fit, and says so in one line of many."""
    instance = "backward_keys<bf16, 64, 128, 64, 8, 2, WGMMA, false>"
    made = cuda.compile_instances(cuda.Source("attention.cu", {instance: 168}), [instance], cuda.HOPPER)[instance]
    assert "wgmma.mma_async instructions are serialized" in made.lost
    with pytest.raises(AssertionError, match="serialized"):
        source = cuda.Source("attention.cu", {instance: 255})
        check_resources(source, {instance: made._replace(spilled=0, stack=0)}, cuda.HOPPER)


def test_a_mistake_in_a_kernel_is_told_with_its_line(tmp_path):
    source = source_of(DOUBLED.replace("+", "+ y +"), tmp_path, **{"doubled<float>": 16})
    with pytest.raises(RuntimeError, match=r'some.cu\(3\): error: identifier "y" is undefined'):
        cuda.compile_instances(source, ["doubled<float>"], "sm_90")


class Function:
    """As CuPy's: it has an address and can be called, and nothing else can be set on it."""

    __slots__ = ("launched", "ptr", "symbol")

    def __init__(self, symbol, launched):
        self.symbol, self.launched, self.ptr = symbol, launched, id(symbol)

    def __call__(self, grid, block, args, shared_mem=0, stream=None):  # None: the current stream
        self.launched.append((self.symbol, grid, block, args, shared_mem, stream))


class FakeDevice:
    """As much of cupy.cuda as a launch needs; the "GPU" notes what it was given."""

    capability = "90"

    def __init__(self):
        self.loaded, self.launched, self.allowed = [], [], []
        self.driver = SimpleNamespace(
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
            funcSetAttribute=lambda function, attribute, value: self.allowed.append((attribute, value)),
        )

        class Module:
            load = lambda _, code: self.loaded.append(code)
            get_function = lambda _, symbol: Function(symbol, self.launched)

        self.function, self.runtime = SimpleNamespace(Module=Module), SimpleNamespace(getDevice=lambda: 0)

    def Device(self, number=0):
        return SimpleNamespace(
            id=number, compute_capability=self.capability, attributes={"MaxSharedMemoryPerBlockOptin": 232_448}
        )


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    fake = FakeDevice()
    monkeypatch.setattr(cuda, "cuda", lambda: fake)
    monkeypatch.setattr(cuda, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(cuda, "backend", cuda.Gpu())
    for kept in (cuda._function, cuda._architecture):
        kept.cache_clear()
    yield fake
    for kept in (cuda._function, cuda._architecture):
        kept.cache_clear()


def test_a_kernel_is_compiled_once_and_then_read_from_the_disk(gpu, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    source, x = source_of(DOUBLED, tmp_path / "source", **{"doubled<float>": 16}), np.zeros(32, np.float32)
    source.launch("doubled<float>", 2, 32, (x, None, np.int32(3)), shared=1)
    cuda._function.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "compile_instances", None)  # would not be callable
        source.launch("doubled<float>", (2, 3), 64, (x,), shared=100_000)
    assert gpu.loaded[0] == gpu.loaded[1] and gpu.loaded[0].startswith(b"\x7fELF")
    name, (first, second) = "_Z7doubledIfEvPT_", gpu.launched
    assert first == (name, (2, 1, 1), (32, 1, 1), (x, np.uintp(0), np.int32(3)), 1, None)
    assert second == (name, (2, 3, 1), (64, 1, 1), (x,), 100_000, None)
    source.launch("doubled<float>", 1, 32, (x,), shared=60_000)
    assert gpu.allowed == [(8, 100_000)]  # once, and only what is more than a block gets anyway
    edited = source_of(DOUBLED.replace("+", "*"), tmp_path / "source", **{"doubled<float>": 16})
    edited.launch("doubled<float>", 2, 32, (x,))
    assert gpu.loaded[2] != gpu.loaded[0]


def test_what_is_compiled_ahead_is_not_compiled_at_a_launch(gpu, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    kinds = {"doubled<float>": 16, "doubled<int>": 16}
    source = source_of(DOUBLED, tmp_path / "source", **kinds)
    cuda.compile_ahead([source])
    monkeypatch.setattr(cuda, "compile_instances", None)  # would not be callable
    for instance in kinds:
        source.launch(instance, 1, 32, ())
    assert [name for name, *_ in gpu.launched] == ["_Z7doubledIfEvPT_", "_Z7doubledIiEvPT_"]


def test_the_limit_of_shared_memory_holds_for_a_kernels_own_too(gpu, tmp_path):
    """A vocabulary of 24,576 in 16 bits is 48 KB, and the reductions' 256 bytes came on top: no launch."""
    source = source_of(DOUBLED, tmp_path, **{"doubled<float>": 16})
    source.launch("doubled<float>", 1, 32, (), shared=47 << 10)
    assert gpu.allowed == []
    source.launch("doubled<float>", 1, 32, (), shared=48 << 10)
    assert gpu.allowed == [(8, 48 << 10)]


def test_what_hopper_has_is_compiled_for_hopper_and_refused_elsewhere(gpu, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        cuda, "_compiled", lambda source, instance, architecture: found.append(architecture) or (b"", b"")
    )
    source = source_of(DOUBLED, tmp_path, **{"doubled<float>": 16, "doubled<int>": 16})
    source.hopper = {"doubled<int>"}
    for instance in source.instances:
        source.launch(instance, 1, 32, ())
    cuda.compile_ahead([source])
    assert found == ["sm_90a"] * 4
    for kept in (cuda._architecture, cuda._function):
        kept.cache_clear()
    found.clear()
    monkeypatch.setattr(FakeDevice, "capability", "100")
    source.launch("doubled<float>", 1, 32, ())
    with pytest.raises(
        ValueError, match=r"^some.cu, doubled<int> needs a GPU of sm_90a \(H100, H200\); this .* sm_100$"
    ):
        source.launch("doubled<int>", 1, 32, ())
    cuda.compile_ahead([source])
    assert found == ["sm_100"] * 2


def test_how_much_shared_memory_there_is(gpu):
    cuda.Gpu._attributes.cache_clear()
    assert cuda.backend.shared_limit() == 232_448 - 1024  # which a kernel may have of its own
    cuda.Gpu._attributes.cache_clear()


def test_an_empty_grid_launches_nothing(gpu, tmp_path):
    source = source_of(DOUBLED, tmp_path, **{"doubled<float>": 16})
    source.launch("doubled<float>", 0, 32, ())
    source.launch("doubled<float>", (3, 0), 32, ())
    assert not gpu.launched


def test_the_types_that_kernels_take():
    assert [cuda.c_type(np.zeros(1, t)) for t in ("f4", "f2")] == ["float", "fp16"]
    with pytest.raises(TypeError, match="take float32, bfloat16, float16, and this array is float64"):
        cuda.c_type(np.zeros(1))


def test_wide_accesses_need_multiples_of_sixteen_bytes():
    x = np.zeros((4, 33), np.float32)
    x = x[:, (-x.ctypes.data // 4) % 4 :][:, :16] if x.ctypes.data % 16 else x[:, :16]
    assert not cuda.wide(x)  # rows of 33
    y = np.zeros((4, 32 + 4), np.float32)
    assert cuda.wide(y[:, :16]) == (y.ctypes.data % 16 == 0)
    assert not cuda.wide(y[:, 1:17]) and not cuda.wide(y[:, :15])


def test_an_array_of_another_layout_or_dtype_is_copied():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert cuda.contiguous(x) is x is cuda.contiguous(x, np.float32)
    for y, dtype in ((x[:, 1:], None), (x.T, np.float32), (x, np.float64), (x[::2], np.int32)):
        found = cuda.contiguous(y, dtype)
        assert found.flags.c_contiguous and found.dtype == (dtype or y.dtype) and np.array_equal(found, y)


def test_a_number_without_a_size_is_refused(gpu, tmp_path):
    source = source_of(DOUBLED, tmp_path, **{"doubled<float>": 16})
    for number in (3, 0.5, True):
        with pytest.raises(TypeError, match=rf"^some.cu, doubled<float>: argument 1 is {number}; give its type"):
            source.launch("doubled<float>", 1, 32, (np.float64(1), number))
    assert not gpu.launched


def test_nvrtc_that_is_not_there_is_told(monkeypatch):
    cuda._nvrtc.cache_clear()
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ImportError, match=r"CUDA kernels need NVRTC: pip install 'minillm-train\[cuda13\]'"):
        cuda._nvrtc()
    monkeypatch.undo()
    assert cuda.nvrtc_version() >= (12, 0)


def test_device_cuda_is_cupys(monkeypatch):
    monkeypatch.setattr(device, "_cupy", lambda: SimpleNamespace(cuda="here"))
    assert device.cuda() == "here"
