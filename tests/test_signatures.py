"""Checks are skipped for tensors whose like have passed them before. What differs in anything that a check looks at is checked."""

import threading

import pytest
import torch
from torch.func import vmap

from modreg_fast import _validate as validate
from modreg_fast import use_backend
from modreg_fast.functional import gradient_statistics, modality_cross_entropy, softmax_fisher_information

SHAPE = (2, 5, 4)


def pair(**options):
    return [torch.randn(SHAPE, **options) for _ in range(2)]


def fisher(a, b, **options):
    return softmax_fisher_information([[a], [b]], **options)


def statistics(a, b, **options):
    return gradient_statistics([a], [b], **options).attribution


def entropy(a, b, target=None, **options):
    target = torch.zeros(2, 4, dtype=torch.int64) if target is None else target
    return modality_cross_entropy([a, b], target, **options).information


FUNCTIONS = [fisher, statistics, entropy]


@pytest.fixture(autouse=True)
def nothing_accepted():
    validate._accepted.clear()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_second_call_is_accepted(function, monkeypatch):
    first = pair()
    expected = function(*first)
    monkeypatch.setattr(validate, "feature", None)  # a check would fail
    assert torch.equal(function(*first), expected)
    assert torch.equal(function(*(x.clone().requires_grad_() for x in first)), expected)
    with pytest.raises(TypeError):
        function(*pair(dtype=torch.float64))


# What full validation refuses, each close to the accepted pair.
WRONG = {
    "one of them on another device": lambda a, b: (a, b.to("meta")),
    "another shape": lambda a, b: (a, b[:, :4]),
    "a transposed shape": lambda a, b: (a, b.transpose(1, 2)),
    "integers": lambda a, b: (a, b.long()),
    "complex": lambda a, b: (a, b.to(torch.complex64)),
    "sparse": lambda a, b: (a, b.to_sparse()),
    "no tensor": lambda a, b: (a, b.numpy()),
    "nested": lambda a, b: (a, torch.nested.nested_tensor(list(b), layout=torch.strided)),
    "nested, jagged": lambda a, b: (a, torch.nested.nested_tensor(list(b), layout=torch.jagged)),
}
WRONG_OPTIONS = [{"channel_dim": True}, {"channel_dim": 1.0}, {"channel_dim": 0}, {"eps": float("inf")}, {"backend": "none"}]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", [*WRONG, *WRONG_OPTIONS], ids=str)
def test_never_accepts_what_the_checks_refuse(function, case):
    a, b = pair()
    tensors, options = (WRONG[case](a, b), {}) if isinstance(case, str) else ((a, b), case)
    function(a, b)
    before = set(validate._accepted)
    with pytest.raises((TypeError, ValueError)) as second:
        function(*tensors, **options)
    assert validate._accepted == before
    validate._accepted.clear()
    with pytest.raises(second.type) as first:
        function(*tensors, **options)
    assert str(first.value) == str(second.value)


def test_structure():
    """The same tensors in other lists."""
    a, b = pair()
    fisher(a, b)
    both = torch.stack([a, b])
    with pytest.raises(TypeError):
        softmax_fisher_information([both])  # as rows: iterating over it gives the accepted tensors
    with pytest.raises(ValueError, match="scales"):
        softmax_fisher_information([[a, b], [a]])
    assert softmax_fisher_information([[a, b]]).shape == (1, 2, 2)
    assert softmax_fisher_information([[a], [b]]).shape == (2, 1, 2)
    statistics(a, b)
    with pytest.raises(ValueError, match="features"):
        gradient_statistics([a, b])
    with pytest.raises(ValueError, match="features"):
        gradient_statistics([a], features=[], values=None)
    with pytest.raises(ValueError):
        gradient_statistics([a], values=[b])
    target = torch.zeros(2, 4, dtype=torch.int64)
    entropy(a, b, target)
    for other in (target[:, :3], target.float(), target.to("meta")):
        with pytest.raises((TypeError, ValueError)):
            entropy(a, b, other)
    with pytest.raises(ValueError, match="target"):  # values are looked at in every call
        entropy(a, b, target + 5)
    with pytest.raises(ValueError, match="weight"):
        entropy(a, b, target, weight=torch.ones(5, requires_grad=True))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_plain_tensor_is_not_remembered(function):
    """Subclasses, tensors of inference mode and under transforms are checked, and right, in every call."""
    a, b = pair()
    expected = function(a, b)
    validate._accepted.clear()
    with torch.inference_mode():
        inference = [a.clone(), b.clone()]
        assert torch.equal(function(*inference), expected)
    assert torch.equal(function(*inference), expected)
    other = b.clone().requires_grad_()
    function(inference[0], other).sum().backward()  # a copy is saved
    assert vmap(function, (0, None))(torch.stack([a, a]), b).shape == (2, *expected.shape)
    signatures = set(validate._accepted)

    class Image(torch.Tensor):
        pass

    function(a.as_subclass(Image), b)
    assert validate._accepted == signatures
    assert torch.equal(function(a, b), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_state_around_the_call(function):
    """The default dtype, the grad mode and the backend belong to the call, not to the signature."""
    a, b = pair()
    expected = function(a, b)
    torch.set_default_dtype(torch.float64)
    try:
        assert function(a, b).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    a.requires_grad_()
    with torch.no_grad():
        assert not function(a, b).requires_grad
    assert function(a, b).requires_grad
    with use_backend("reference"):
        torch.testing.assert_close(function(a, b).detach(), expected)


def test_few_are_remembered():
    for n in range(1, validate._MOST_SIGNATURES + 20):
        validate.accept(("test", n))
    assert len(validate._accepted) <= validate._MOST_SIGNATURES


def test_threads():
    """Many, each with shapes of its own, while the memory is emptied."""
    errors = []

    def work(n):
        try:
            for k in range(30):
                x = torch.randn(2, 3 + n, 1 + k % 5)
                assert fisher(x, x).shape == (2, 1, 2)
                with pytest.raises(ValueError):
                    fisher(x, x[:, 1:])
                validate._accepted.clear()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
