"""The extension module itself: how tensors reach a kernel, what is refused, threads, forks, conversions.

``add_norm`` carries the arguments, being the plainest kernel.  NumPy is the only caller where torch is not
the question; one test proves that the module needs nothing else.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattn import _cpu

ROOT = Path(__file__).resolve().parent.parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
RMS = 1


def norm(x, residual=None, *, isa="scalar", new=np.empty, weight=None):
    """rms-normalised ``x + residual``, through the native call; outputs are made by ``new(shape, dtype)``."""
    rows, d = x.shape
    y, s = new((rows, d), x.dtype), new((rows, d) if residual is not None else (0,), x.dtype)
    mean, rstd = (np.empty(rows, np.float32) for _ in "ab")
    getattr(_cpu, isa).add_norm_fwd(y, s, mean, rstd, x, residual, None, weight, None, 0.0, RMS)
    return y


def expected(x):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((5, 7), dtype=np.float32)


def run(script, **environment):
    """``script`` in a fresh interpreter, its standard output; a minute is taken for a hang."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=os.sep,  # where no folder shadows what is installed
        env=os.environ | environment,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


# ---- The three ways a tensor is read ---------------------------------------------------------------


class OldTensor:
    """A tensor of a torch that has no exchange table: attributes only."""

    def __init__(self, tensor):
        self._tensor = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.stride, self.data_ptr = tensor.stride, tensor.data_ptr


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda a: OldTensor(torch.from_numpy(a))],
                         ids=["dlpack", "exchange", "attributes"])  # fmt: skip
def test_each_way_reads_strided_rows(kind, x):
    wide = np.concatenate([x, x], axis=1)[
        ::-1
    ]  # rows apart from each other, and backwards where NumPy reads
    view = np.ascontiguousarray(wide)[::2, :7] if kind is not np.asarray else wide[::2, :7]
    y = np.empty(view.shape, np.float32)
    mean, rstd = np.empty(len(view), np.float32), np.empty(len(view), np.float32)
    _cpu.scalar.add_norm_fwd(y, y[0, :0], mean, rstd, kind(view), None, None, None, None, 0.0, RMS)
    np.testing.assert_allclose(y, expected(view), rtol=1e-5)


def test_parameters_that_require_grad_and_bfloat16_are_read():
    x = torch.nn.Parameter(torch.randn(3, 8).bfloat16())
    y = norm(x, new=lambda shape, dtype: torch.full(shape, float("nan"), dtype=dtype))
    torch.testing.assert_close(
        y.float(), torch.nn.functional.rms_norm(x.float(), (8,)).detach(), atol=2e-2, rtol=1e-2
    )


def test_the_module_works_without_torch():
    origin = importlib.util.find_spec("fastattn._cpu").origin
    assert "True" in run(f"""
        import importlib.util, sys, numpy as np
        spec = importlib.util.spec_from_file_location("_cpu", {origin!r})
        cpu = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cpu)
        x, y, rows = np.full((2, 3), 2, np.float32), np.empty((2, 3), np.float32), np.empty(2, np.float32)
        getattr(cpu, cpu.isas[0]).add_norm_fwd(y, rows[:0], rows, rows, x, None, None, None, None, 0.0, 1)
        print("torch" not in sys.modules and (abs(y - 1) < 1e-6).all())
    """)


def test_memory_given_by_capsule_outlives_the_call_only(x):
    before = sys.getrefcount(x)
    norm(x)
    assert sys.getrefcount(x) == before


# ---- Refusals --------------------------------------------------------------------------------------

ARGUMENTS = ("y", "s", "mean", "rstd", "x", "residual", "bias", "weight", "beta", "eps", "kind")


def fake():
    with torch._subclasses.FakeTensorMode():
        return torch.empty(5, 7)


def read_only():
    a = np.zeros((5, 7), np.float32)
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    ("argument", "value", "error", "sentence"),
    [
        ("x", "s", TypeError, "argument 5 must be a tensor, got str"),
        ("x", None, TypeError, "argument 5 must be a tensor, got NoneType"),
        ("residual", 3, TypeError, "argument 6 must be a tensor, got int"),
        ("eps", "s", TypeError, "argument 10 must be a number, got str"),
        ("kind", 1.5, TypeError, "argument 11 must be an int of 64 bits, got 1.5"),
        ("kind", 2**63, TypeError, "argument 11 must be an int of 64 bits, got 9223372036854775808"),
        ("x", torch.zeros([1] * 7), ValueError, "argument 5 has 7 axes; it takes at most 6"),
        ("x", OldTensor(torch.zeros([1] * 7)), ValueError, "argument 5 has 7 axes; it takes at most 6"),
        ("x", torch.zeros(5, 7, dtype=torch.complex64), TypeError, "argument 5 has dtype with code 5 and 64 bits"),
        ("x", OldTensor(torch.zeros(5, 7, dtype=torch.complex64)), TypeError, "argument 5 has dtype torch.complex64"),
        ("x", torch.zeros(5, 7).to_sparse(), TypeError, "argument 5 is a Tensor that cannot be read"),
        ("x", torch.zeros(5, 7, device="meta"), TypeError, "argument 5 is a Tensor that cannot be read"),
        ("x", OldTensor(torch.zeros(5, 7, device="meta")), TypeError, "argument 5 is on meta; it takes cpu"),
        ("x", fake(), TypeError, "argument 5 has no memory"),
        ("x", read_only(), TypeError, "argument 5 is read-only; pass a copy"),
        ("x", np.zeros((5, 7), ">f4"), TypeError, "argument 5 is a numpy.ndarray that cannot be read"),
        ("x", torch.zeros(5, 7, dtype=torch.int32), ValueError, "x.dtype is int32; compiled for float32"),
        ("x", torch.zeros(7), ValueError, "x is float32[7]; it takes rows, D"),
        ("x", torch.zeros(7, 5).T, ValueError, "x has stride 5 on its last axis; it must be 1"),
        ("y", torch.zeros(5, 8), ValueError, "y is float32[5, 8]; axis 1 must be 7"),
        ("weight", torch.zeros(7).double(), ValueError, "a tensor is float64[7]; this kernel takes float32"),
        ("kind", 3, ValueError, "kind is 3; it takes 0 (layer), 1 (rms) or 2 (crms)"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*FakeTensor")
def test_bad_arguments_are_refused_by_name_and_place(argument, value, error, sentence):
    good = [torch.zeros(5, 7), torch.zeros(0), torch.zeros(5), torch.zeros(5), torch.zeros(5, 7)]
    call = dict(zip(ARGUMENTS, [*good, None, None, None, None, 0.0, RMS], strict=True)) | {
        argument: value
    }
    with pytest.raises(error) as refusal:
        _cpu.scalar.add_norm_fwd(*call.values())
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith("add_norm_fwd: ")


def test_a_wrong_number_of_arguments_is_refused():
    with pytest.raises(TypeError, match="add_norm_fwd: it takes 11 arguments, got 1"):
        _cpu.scalar.add_norm_fwd(1)


def test_a_wrapped_tensor_is_refused():
    def inside(x):
        with pytest.raises(TypeError, match="argument 5 is a Tensor that cannot be read"):
            norm(x, new=lambda shape, _: np.empty(shape, np.float32))
        return x

    torch.func.vmap(inside)(torch.zeros(2, 5, 7))


# ---- The module ------------------------------------------------------------------------------------


def test_the_module_says_what_it_is():
    import fastattn

    assert _cpu.version == fastattn.__version__, (
        "the extension module is older than the Python code: build again"
    )
    assert set(_cpu.isas) <= set(_cpu.compiled)
    assert _cpu.isas[-1] == _cpu.compiled[-1] == "scalar"
    assert all(callable(getattr(_cpu, isa).add_norm_fwd) for isa in _cpu.compiled)
    assert _cpu.compiler


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")
def test_core_headers_keep_their_promises(tmp_path):
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O1", "-fopenmp", f"-I{ROOT}"]
    subprocess.run([compiler, *flags, ROOT / "tests/core.cc", "-o", tmp_path / "core"], check=True)
    for threads in "1", "2":
        found = subprocess.run([tmp_path / "core"], env=os.environ | {"OMP_NUM_THREADS": threads}, text=True,
                               stdout=subprocess.PIPE, timeout=60, check=False)  # fmt: skip
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("isa", _cpu.isas)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_conversions_agree_with_torch_bit_for_bit(isa, half):
    """s = x + bias rounded to x's dtype, so that -0 in the one shows how the other is converted."""

    def through(x, bias):
        s, y, rows = torch.empty_like(x), torch.empty_like(x), torch.empty(x.shape[0])
        getattr(_cpu, isa).add_norm_fwd(y, s, rows, rows, x, None, bias, None, None, 0.0, RMS)
        return s

    def same(found, wanted):
        nan = wanted.isnan()
        assert torch.equal(found.isnan(), nan)
        assert torch.equal(found.view(torch.int16)[~nan], wanted.view(torch.int16)[~nan])

    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)
    if isa == "avx512bf16" and half is torch.bfloat16:  # this instruction takes denormals for zero
        every = every[(every == 0) | (every.abs() >= torch.finfo(half).tiny) | every.isnan()]
    same(through(every[None], torch.full((len(every),), -0.0))[0], every)

    near = every.float()[:, None].view(torch.int32) + torch.tensor(
        [-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000]
    )
    near = near.view(torch.float32).flatten()  # halfway between neighbours, and a little beside
    if isa == "avx512bf16" and half is torch.bfloat16:
        near = near[(near == 0) | (near.abs() >= torch.finfo(torch.float32).tiny) | near.isnan()]
    same(through(torch.full((1, len(near)), -0.0, dtype=half), near)[0], near.to(half))


# ---- Threads and processes -------------------------------------------------------------------------


def test_the_gil_is_released_while_a_kernel_runs():
    x = np.ones((1000, 5000), np.float32)
    done = threading.Event()

    def work():
        for _ in range(5):
            norm(x)
        done.set()

    thread, ticks = threading.Thread(target=work), 0
    thread.start()
    while not done.is_set():
        ticks += 1
    thread.join()
    assert ticks > 1000


def test_results_do_not_depend_on_the_number_of_threads(x):
    s, dy = (torch.randn(500, 300) for _ in "ab")
    weight, stat = torch.randn(300), torch.rand(500)

    def gradients(threads):
        torch.set_num_threads(threads)
        dx, dweight, dbeta = torch.empty(500, 300), torch.empty(300), torch.empty(300)
        _cpu.scalar.add_norm_bwd(dx, torch.empty(0), dweight, dbeta, torch.empty(8, 3, 300), dy, None, s, None,
                                 weight, weight, stat, stat, 0.0, 0)  # fmt: skip
        return dx, dweight, dbeta

    before = torch.get_num_threads()
    try:
        for one, three in zip(gradients(1), gradients(3), strict=True):
            assert torch.equal(one, three)
    finally:
        torch.set_num_threads(before)


@LINUX
@pytest.mark.skipif(
    "clang" in _cpu.compiler.lower(), reason="clang brings an OpenMP library of its own"
)
def test_torch_and_the_kernels_share_one_pool_of_threads():
    assert run("""
        import torch
        from fastattn import _cpu

        def threads():
            return int(next(l for l in open("/proc/self/status") if l.startswith("Threads")).split()[1])

        x, y, rows = torch.randn(1000, 1000), torch.empty(1000, 1000), torch.empty(1000)
        def kernel():
            _cpu.scalar.add_norm_fwd(y, rows[:0], rows, rows, x, None, None, None, None, 0.0, 1)

        for n in 2, 3, 4:  # growing: threads that are let go take their time
            torch.set_num_threads(n)
            assert _cpu.num_threads() == n
            kernel()
            mine = threads()
            x.exp()
            assert threads() == mine, (threads(), mine)
        libraries = {l.split()[-1] for l in open("/proc/self/maps") if "libgomp" in l or "libomp" in l}
        assert len(libraries) == 1, libraries
        print("one")
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_of_a_threaded_process_computes():
    assert "child 1" in run(
        """
        import os, torch
        from fastattn import _cpu

        x, y, rows = torch.randn(1000, 1000), torch.empty(1000, 1000), torch.empty(1000)
        def kernel():
            y.fill_(0)
            _cpu.scalar.add_norm_fwd(y, rows[:0], rows, rows, x, None, None, None, None, 0.0, 1)
            return y.clone()

        torch.set_num_threads(2)
        wanted = kernel()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # torch's own loops would hang here
            assert torch.equal(kernel(), wanted)
            print("child", _cpu.num_threads(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(kernel(), wanted)
        assert _cpu.num_threads() == 2
        """,
        PYTHONWARNINGS="ignore",  # Python 3.12 warns of what is tested here
    )
