#!/bin/sh
# Triton: do_not_specialize has no effect on an argument that is a tuple.
#
# Version:   triton 3.4.0, 3.7.1 and 3.9.0, with numpy. Python 3.10 to 3.13, Linux; no GPU.
# Behaviour: @triton.jit(do_not_specialize=["pair"]) takes the name and says nothing, but integers in a tuple of that name are specialized
#            like any other: 1 becomes a constant, multiples of 16 are marked as such, and each pattern of them is a compilation of its
#            own. An integer argument beside it is not specialized, as asked.
# Seen:      the lines below "expected": per call the types of the arguments and what is known of them ("D": divisible by 16), which
#            make up the key by which compiled kernels are found.
# Why it matters: kernels that take strides or sizes of several tensors as tuples compile anew, for seconds each, when a size changes from
#            odd to even or to 1, though their authors asked for one kernel. N numbers may make 3^N.
#
# Installs into a temporary folder, which it removes. Exit code 0: as stated; 1: the behaviour changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "triton==${TRITON:-3.9.0}" numpy

cat > "$folder/try.py" <<'PROGRAM'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature


@triton.jit(do_not_specialize=["plain", "pair"])
def kernel(plain, pair):
    tl.device_print("sum", plain + pair[0] + pair[1])


bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
for plain, pair in ((3, (3, 5)), (16, (16, 5)), (1, (1, 5))):
    bound, specialization, options = bind(plain, pair)
    of_plain, (types, known) = specialization
    print(f"plain={plain}: {of_plain[0]}", f"pair={pair}: {types} {known}", sep="   ")
PROGRAM

cat > "$folder/expected" <<'LINES'
plain=3: i32   pair=(3, 5): ('i32', 'i32') ('', '')
plain=16: i32   pair=(16, 5): ('i32', 'i32') ('D', '')
plain=1: i32   pair=(1, 5): ('constexpr', 'i32') (1, '')
LINES

"$folder/venv/bin/python" "$folder/try.py" > "$folder/seen"
cat "$folder/seen"
if ! diff "$folder/expected" "$folder/seen"; then
    echo "changed: no longer as stated above" >&2
    exit 1
fi
echo "as stated, triton $("$folder/venv/bin/python" -c 'import triton; print(triton.__version__)')"
