"""Who computes: the native kernels are here, the order of preference, use_backend and the environment."""

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import modreg_fast as mrf
from modreg_fast.backends import computes, implementation, measured, resolve
from modreg_fast.functional import gradient_statistics, softmax_fisher_information
from modreg_fast.parity import OPS

X = torch.randn(2, 3, 4)


def test_native_kernels_are_built():
    """Where they are missing on purpose, say so: MODREG_FAST_SKIP_NATIVE=1."""
    status = mrf.backends()["cpu"]
    assert status.available or os.environ.get("MODREG_FAST_SKIP_NATIVE") == "1", f"native backend: {status.detail}"


def test_reference_is_always_there():
    statuses = mrf.backends()
    assert statuses["reference"].available and all(
        isinstance(status.detail, str) and status.detail for status in statuses.values()
    )


def test_the_answer_is_a_copy():
    mrf.backends().clear()
    assert mrf.backends()


def test_order_of_preference(backend, monkeypatch):
    """The argument, use_backend, the environment, the best for the device."""
    module = sys.modules["modreg_fast.backends"]  # the attribute of that name is the function
    monkeypatch.setattr(module, "_environment", None)
    available = [name for name, status in mrf.backends().items() if status.available]
    assert resolve(None, X, "test") == available[0]
    monkeypatch.setattr(module, "_environment", backend)
    assert resolve(None, X, "test") == backend
    with mrf.use_backend("reference"):
        assert resolve(None, X, "test") == "reference"
        assert resolve(backend, X, "test") == backend
        with mrf.use_backend(backend):
            assert resolve(None, X, "test") == backend
        assert resolve(None, X, "test") == "reference"
    assert resolve(None, X, "test") == backend


def test_the_table_covers_what_both_gpu_backends_compute():
    both = [op for op in OPS if all(computes(backend, op) for backend in measured.CANDIDATES)]
    kinds = list(itertools.product(("forward", "backward"), (2, 4), ("pixels", "channels")))
    assert {"softmax_fisher", "gradient_statistics"} <= set(both)
    assert {(op, *kind) for op in both for kind in kinds} <= set(measured.TIMES) <= {(op, *kind) for op in OPS for kind in kinds}


def laid_out(channels: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    x = torch.zeros(2, channels, 40, dtype=dtype)
    return x if layout == "pixels" else x.mT.contiguous().mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_faster_one(dtype):
    chosen = set()
    for (op, pass_, size, layout), rows in measured.TIMES.items():
        if size != min(dtype.itemsize, 4):
            continue
        for channels, triton, cuda in rows:
            for near in (channels, channels + 1, 2 * channels // 3):
                chosen.add(measured.faster(op, pass_, laid_out(near, dtype, layout)))
                assert measured.faster(op, pass_, laid_out(near, dtype, layout)) == ("triton" if triton < cuda else "cuda")
        if not rows:
            assert measured.faster(op, pass_, laid_out(64, dtype, layout)) == "triton"
    assert chosen == {"triton", "cuda"}
    # More channels than cuda takes, an op that was not measured, a tensor in neither layout.
    assert measured.faster("softmax_fisher", "forward", laid_out(4097, dtype, "channels")) == "triton"
    assert measured.faster("nothing", "forward", laid_out(64, dtype, "channels")) == "triton"
    spread = torch.zeros(2, 128, 80, dtype=dtype)[:, ::2, ::2]
    assert measured.faster("softmax_fisher", "forward", spread) == measured.faster(
        "softmax_fisher", "forward", laid_out(64, dtype, "pixels")
    )


@pytest.fixture
def two_gpu_backends(monkeypatch):
    """On CPU tensors, computed by the reference; who was asked, and for which pass."""
    module, asked = sys.modules["modreg_fast.backends"], []

    def stand_in(name: str) -> SimpleNamespace:
        def op(stem: str) -> SimpleNamespace:
            compute = implementation("reference", stem)

            def asking(pass_: str):
                return lambda *inputs: (asked.append((name, pass_)), getattr(compute, pass_)(*inputs))[1]

            return SimpleNamespace(forward=asking("forward"), backward=asking("backward"))

        return SimpleNamespace(**{stem: op(stem) for stem in ("softmax_fisher", "gradient_statistics")})

    usable = mrf.backends()["reference"]
    monkeypatch.setattr(module, "_environment", None)
    for table, entry in (
        ("_REGISTRY", lambda _: module._REGISTRY["reference"]),
        ("_STATUS", lambda _: usable),
        ("_MODULES", stand_in),
    ):
        names = {name: entry(name) for name in measured.CANDIDATES}
        monkeypatch.setattr(module, table, {**names, "reference": getattr(module, table)["reference"]})
    return asked


def information(xs, **options):
    return softmax_fisher_information([[x] for x in xs], **options)


def test_the_faster_one_computes(two_gpu_backends):
    """Each pass where the table says, by default; what is asked for wins."""
    seen = set()
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("pixels", "channels")):
        xs = [laid_out(64, dtype, layout).normal_().requires_grad_() for _ in range(2)]
        for options in ({}, {"backend": "triton"}, {"backend": "cuda"}):
            two_gpu_backends.clear()
            information(xs, **options).sum().backward()
            expected = [options.get("backend") or measured.faster("softmax_fisher", p, xs[0]) for p in ("forward", "backward")]
            assert two_gpu_backends == list(zip(expected, ("forward", "backward"), strict=True))
            seen.add(tuple(expected))
    assert ("triton", "cuda") in seen  # bfloat16 with channels side by side
    with mrf.use_backend("cuda"):
        two_gpu_backends.clear()
        information(xs)
    assert two_gpu_backends == [("cuda", "forward")]


def test_backends_says_which_is_taken(two_gpu_backends):
    details = {name: status.detail for name, status in mrf.backends().items()}
    assert "by default" in details["triton"] and "by default" in details["cuda"] and "by default" not in details["reference"]


def test_the_faster_one_computes_what_is_compiled(two_gpu_backends):
    xs = [laid_out(64, torch.bfloat16, "channels").normal_().requires_grad_() for _ in range(2)]
    torch.compile(information, fullgraph=True, backend="aot_eager")(xs).sum().backward()
    assert two_gpu_backends == [("triton", "forward"), ("cuda", "backward")]


def test_the_largest_scale_decides(two_gpu_backends, monkeypatch):
    times = {("gradient_statistics", "forward", 4, "pixels"): ((8, 1.0, 2.0), (512, 2.0, 1.0))}
    monkeypatch.setattr(measured, "TIMES", times)
    few, many = torch.rand(2, 8, 900), torch.rand(2, 512, 4)
    gradient_statistics([many, few], [many, few])
    gradient_statistics([many, few[:, :, :9]], [many, few[:, :, :9]])
    assert [name for name, _ in two_gpu_backends] == ["triton", "cuda"]


def test_use_backend_ends_with_an_exception(backend):
    before = resolve(None, X, "test")
    with pytest.raises(KeyError), mrf.use_backend(backend):
        raise KeyError
    assert resolve(None, X, "test") == before


def test_backward_runs_where_forward_ran(backend, monkeypatch):
    """Whatever is set when ``backward`` is called, also on the threads of autograd."""
    ran = []
    spy = lambda name, stem: ran.append(name) or implementation(name, stem)  # noqa: E731
    monkeypatch.setattr("modreg_fast.ops._op.implementation", spy)
    x = [[X.clone().requires_grad_()], [X.clone().flip(0).requires_grad_()]]
    with mrf.use_backend(backend):
        value = softmax_fisher_information(x).sum()
    with mrf.use_backend("reference"):
        value.backward()
    assert ran == [backend, backend]


def run(code, **environment):
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_environment_variable():
    code = (
        "import torch\nfrom modreg_fast.backends import resolve, use_backend\n"
        "assert resolve(None, torch.ones(1), 'x') == 'reference'\nwith use_backend('reference'): pass"
    )
    result = run(code, MODREG_FAST_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    result = run("import modreg_fast", MODREG_FAST_BACKEND="nonsense")
    assert (
        result.returncode != 0
        and "MODREG_FAST_BACKEND: backend must be one of" in result.stderr
        and "'nonsense'" in result.stderr
    )
