"""Values that are wrong for an argument of a kind, for ``wrong_calls.py``: ``wrong`` takes a right one and makes it wrong."""

import tempfile
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

NAN, INF = float("nan"), float("inf")


class Wrapper(Tensor):
    """A tensor without memory that no operator knows."""

    @staticmethod
    def __new__(cls, x):
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, strides=x.stride())

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


def distributed(x):
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
    return DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()])


def without_storage(x):
    x = x.detach().clone()
    x.untyped_storage().resize_(0)
    return x


def another_size(x, rng, dims):
    dims = [d for d in range(x.dim())[dims] if x.shape[d] > 1]
    return x.narrow(rng.choice(dims), 0, 1).clone() if dims else torch.cat([x.reshape(1), x.reshape(1)])


NOT_TENSORS = {"None": None, "text": "x", "number": 3.0, "list": [1.0, 2.0], "dict": {}, "object": object(), "type": Tensor}
NUMBERS = {"nan": NAN, "inf": INF, "-1": -1.0, "text": "1", "None": None, "complex": 1j, "list": [1.0, 2.0, 3.0], "dict": {}}
INTEGERS = {"0": 0, "-1": -1, "2^31": 2**31, "2^70": 2**70, "fraction": 1.5, "nan": NAN, "text": "1", "None": None, "list": [1]}
NAMES = {"unknown": "no_such", "bytes": b"cpu", "number": 3, "list": ["cpu"], "long": "x" * 10000, "zero": "cpu\0"}


def wrong_tensor(x: Tensor, rng, raw: bool, alone: bool = False, dims: slice = slice(None)) -> dict[str, Callable]:
    """Ways to make a tensor wrong. ``raw``: for the native ops, which take memory as it is. ``alone``: nothing that it has to fit.
    ``dims``: those whose size is not free."""
    plain = x.detach()
    found: dict[str, Callable] = {name: lambda value=value: value for name, value in NOT_TENSORS.items()}
    for dtype in (torch.int32, torch.complex64, torch.uint8, torch.float8_e5m2, torch.bool):
        if dtype != x.dtype and not (dtype == torch.uint8 and not x.is_floating_point()):
            found[str(dtype)] = lambda dtype=dtype: plain.to(dtype)
    found["sparse"] = plain.to_sparse
    found["distributed"] = lambda: distributed(plain)
    if plain.dtype == torch.float32:
        found["quantized"] = lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8)
        found["mkldnn"] = plain.to_mkldnn
    if not alone:
        found["meta"] = lambda: plain.to("meta")
        found["another size"] = lambda: another_size(plain, rng, dims)
        found["more dimensions"] = lambda: plain[None, None]
        found["fewer dimensions"] = lambda: plain.reshape(-1)[0]
        found["empty"] = lambda: plain.new_empty(0)
        found["huge"] = lambda: plain.new_zeros(()).expand(2**20, 2**20, 2**20, 2)
    if raw:
        found["a wrapper"] = lambda: Wrapper(plain)
        found["without storage"] = lambda: without_storage(plain)
        found["huge of its rank"] = lambda: plain.new_zeros(()).expand((2**20,) * max(1, plain.dim()))
    return found


def wrong(kind: str, value, rng, raw: bool):
    """A wrong value of a kind, and its name."""
    if kind in ("tensor", "alone"):
        choices = wrong_tensor(value, rng, raw, kind == "alone")
    elif kind in ("optional", "resizable"):  # a tensor that may be left out; masks have any resolution
        choices = wrong_tensor(value, rng, raw, dims=slice(0, 1) if kind == "resizable" else slice(None))
        del choices["None"]
    elif kind in ("tensors", "nested"):
        k = rng.randrange(len(value))
        inner = "tensors" if kind == "nested" else "tensor"

        def changed():
            name, element = wrong(inner, value[k], rng, raw)
            changed.name = f"[{k}] {name}"
            return [*value[:k], element, *value[k + 1 :]]

        choices = {
            "changed": changed,
            "one less": lambda: list(value[:k]) + list(value[k + 1 :]),
            "one more": lambda: [*value, value[k]],
            "none of them": lambda: value[k] if kind == "nested" else 3,
        }
        if raw and kind == "tensors":
            choices["all of them meta"] = lambda: [x.to("meta") for x in value]
        if kind == "tensors" and not raw and len(value) == 1:
            del choices["one less"]
        name = rng.choice(["changed"] * 6 + sorted(choices))
        result = choices[name]()
        return getattr(choices[name], "name", name), result
    elif kind == "mapping":
        key = rng.choice(sorted(value))

        def inside():
            element = value[key]
            name, element = wrong("tensors" if isinstance(element, list) else "tensor", element, rng, raw)
            inside.name = f"[{key}] {name}"
            return {**value, key: element}

        choices = {"inside": inside, "empty": dict, "list": lambda: list(value), "None": lambda: None, "text": lambda: "rgb"}
        name = rng.choice(["inside"] * 6 + sorted(choices))
        result = choices[name]()
        return getattr(choices[name], "name", name), result
    elif kind == "sigma":
        options = {
            "nan": [0.5, NAN],
            "-1": [0.5, -1.0],
            "inf": [INF, 0.5],
            "three": [0.5] * 3,
            "one": [0.5],
            "none": [],
            "text": ["a", "b"],
        }
        choices = {name: lambda value=value: value for name, value in options.items()}
    else:
        table = {"number": NUMBERS, "integer": INTEGERS, "name": NAMES, "choice": {**NAMES, "None": None}}[kind]
        if kind == "integer" and not raw:
            table = {name: x for name, x in table.items() if name != "2^31"}
        choices = {name: lambda value=value: value for name, value in table.items()}
    name = rng.choice(sorted(choices))
    return name, choices[name]()


# ---- kinds of one argument ----


def floats(*shape):
    return torch.randn(*shape)


def bools(*shape):
    return torch.rand(*shape) < 0.7


OBJECTS = {"None": None, "text": "x", "number": 3, "list": [1], "tensor": torch.ones(2), "type": dict}

SPECIAL: dict[str, Mapping[str, object]] = {
    "seed": {"-1": -1, "2^63": 2**63, "fraction": 0.5, "text": "1", "tensor": torch.tensor(1), "nan": NAN},
    "dim": {"0": 0, "7": 7, "-9": -9, "fraction": 1.5, "text": "1", "None": None, "2^70": 2**70, "nan": NAN},
    "raw_dim": {
        "0": 0,
        "3": 3,
        "-3": -3,
        "2^62": 2**62,
        "-2^63": -(2**63),
        "fraction": 1.5,
        "text": "1",
        "None": None,
        "2^70": 2**70,
    },
    "noise_seed": {
        "two": torch.ones(2, dtype=torch.int64),
        "float": floats(1),
        "text": "1",
        "number": 3,
        "meta": torch.tensor(1, device="meta"),
    },
    "custom_backend": {"unknown": "no_such", "number": 3, "None": None, "long": "x" * 10000},
    "any_dim": {"7": 7, "-9": -9, "fraction": 1.5, "text": "1", "None": None, "2^70": 2**70, "nan": NAN, "twice": (0, 0)},
    "weight": {"nan": NAN, "-1": -1.0, "inf": INF, "text": "1", "list": [1.0], "None": None},
    "weights": {"three": [1.0, 1.0, 1.0], "nan": [NAN, 1.0], "text": "ab", "number": 3.0, "-1": [1.0, -1.0], "object": object()},
    "valid": {"float": floats(2, 2, 3), "another size": bools(7, 2, 3), "text": "x", "number": 3, "huge": bools(1).expand(2**40)},
    "mask": {"float": floats(3, 4, 6), "rank": bools(3, 4), "text": "x", "None": None, "sparse": bools(3, 4, 6).to_sparse()},
    "spatial": {
        "0": (0, 3),
        "-1": (-1, 3),
        "rank": (2,),
        "text": "ab",
        "None": None,
        "fraction": (1.5, 2),
        "huge": (2**62, 2**62),
    },
    "target": {
        "sum 0": {"rgb": 0.0, "depth": 0.0},
        "nan": {"rgb": NAN, "depth": 1.0},
        "other": {"a": 1.0, "b": 1.0},
        "list": [1, 2],
    },
    "labels": {
        "float": floats(3, 4, 6),
        "size": torch.zeros(3, 2, 2, dtype=torch.int64),
        "text": "x",
        "None": None,
        "rank": torch.ones(1),
    },
    "object": OBJECTS,
    "named": {
        "text": "x",
        "None": None,
        "list": [1],
        "empty": {},
        "other": {"ir": floats(4, 5)},
        "numbers": {"rgb": 3, "depth": 3},
    },
    "absent": {
        **{"text": "x", "list": [1], "empty": {}, "one": {"rgb": floats(4, 5)}, "numbers": {"rgb": 3, "depth": 3}},
        **{"size": {"rgb": floats(4, 6), "depth": floats(4, 4)}, "batch": {"rgb": floats(3, 5), "depth": floats(4, 4)}},
    },
    "callable": {name: x for name, x in OBJECTS.items() if not callable(x)},
    "heads": {"None": None, "empty": {}, "list": [nn.Linear(5, 3)], "functions": {"rgb": len}, "one": {"rgb": nn.Linear(5, 3)}},
    "entries": {
        **{
            "unknown": {"rgb": ["no.such"]},
            "empty": {},
            "list": ["rgb"],
            "text": "rgb",
            "number": {"rgb": 3},
            "None": {"rgb": None},
        },
        **{"index": {"rgb": [("rgb", 0)]}, "no text": {"rgb": [3]}, "nothing": {"rgb": []}},
    },
    "data": {
        "empty": [],
        "None": None,
        "numbers": [1, 2],
        "text": "ab",
        "no target": [({"rgb": floats(4, 5)},)],
        "tensor": floats(3),
    },
    "none": {"text": "x", "fraction": 1.5, "list": [1]},
}
