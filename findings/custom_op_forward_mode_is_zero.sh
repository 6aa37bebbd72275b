#!/bin/sh
# torch.library.custom_op: forward-mode derivatives are exactly 0, without an error or a warning.
#
# Version:   torch 2.14.1 and 2.13.0. Python 3.10 or newer, on a CPU.
# Behaviour: an op made with torch.library.custom_op and register_autograd has right gradients by torch.autograd.grad, and
#            torch.library.opcheck passes. torch.func.grad refuses it with an error, but torch.func.jvp, jacfwd and linearize return a
#            derivative of 0 for it, and torch.autograd.forward_ad returns no tangent, which stands for 0. register_autograd has no way to
#            give a forward-mode formula, and its documentation does not speak of forward mode. The same function as a
#            torch.autograd.Function without a jvp method raises NotImplementedError there.
# Seen:      the lines below "expected", for x = 3 and f(x) = x^2, whose derivative is 6.
# Why it matters: whoever takes jacfwd or a Jacobian-vector product through such an op gets wrong numbers in silence.
#            gradcheck(check_forward_ad=True) does find it.
#
# Installs into a temporary folder, which it removes. Exit code 0: as stated; 1: the behaviour changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==${TORCH:-2.14.1}" numpy

cat > "$folder/try.py" <<'PROGRAM'
import warnings

import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, linearize

warnings.simplefilter("always")


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


square.register_fake(torch.empty_like)
square.register_autograd(
    lambda ctx, gradient: 2 * ctx.saved_tensors[0] * gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


x, one = torch.tensor(3.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
print("opcheck", set(torch.library.opcheck(square, (x.clone().requires_grad_(),)).values()))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    leaf = x.clone().requires_grad_()
    print("autograd.grad", torch.autograd.grad(square(leaf), leaf)[0].item())
    try:
        print("func.grad", grad(square)(x).item())
    except RuntimeError:
        print("func.grad RuntimeError")
    print("jvp", jvp(square, (x,), (one,))[1].item())
    print("jacfwd", jacfwd(square)(x).item())
    print("linearize", linearize(square, x)[1](one).item())
    with forward_ad.dual_level():
        print("dual", forward_ad.unpack_dual(square(forward_ad.make_dual(x, one))).tangent)
print("warned of forward mode", any("forward" in str(w.message).lower() or "jvp" in str(w.message).lower() for w in said))
try:
    with forward_ad.dual_level():
        print("Function", forward_ad.unpack_dual(Square.apply(forward_ad.make_dual(x, one))).tangent)
except NotImplementedError:
    print("Function NotImplementedError")
PROGRAM

cat > "$folder/expected" <<'LINES'
opcheck {'SUCCESS'}
autograd.grad 6.0
func.grad RuntimeError
jvp 0.0
jacfwd 0.0
linearize 0.0
dual None
warned of forward mode False
Function NotImplementedError
LINES

"$folder/venv/bin/python" "$folder/try.py" > "$folder/seen"
cat "$folder/seen"
if ! diff "$folder/expected" "$folder/seen"; then
    echo "changed: no longer as stated above" >&2
    exit 1
fi
echo "as stated, torch $("$folder/venv/bin/python" -c 'import torch; print(torch.__version__)')"
