#!/bin/sh
# torch.distributed.fsdp.fully_shard: a gradient penalty leaves the weights without a gradient, without an error or a warning.
#
# Version:   torch 2.13.0, build for the CPU. Python 3.10 or newer; one process, gloo.
# Behaviour: a penalty on torch.autograd.grad(..., create_graph=True) through a module under fully_shard is a RuntimeError about the
#            storage of the weights, which was freed after the first derivative. set_reshard_after_backward(False), which keeps it and
#            which is advised for this (pytorch/pytorch#172543), takes the error away; but after backward() .grad of every sharded weight
#            is None, also that of a task loss in the same backward(). The documentation of FSDP1 warns of double backward, that of
#            fully_shard does not speak of it.
# Seen:      the lines below "expected"; without fully_shard the weights have their gradient.
# Why it matters: an optimizer skips what has no gradient, so whoever trains a sharded head with such a penalty (WGAN-GP, penalties on
#            attributions) goes on with weights that stand still.
#
# Installs into a temporary folder, which it removes. Exit code 0: as stated; 1: the behaviour changed.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==${TORCH:-2.13.0}" numpy

cat > "$folder/try.py" <<'PROGRAM'
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def gradient(sharded, kept, with_task):
    torch.manual_seed(0)
    head, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    if sharded:
        fully_shard(head, mesh=init_device_mesh("cpu", (1,)))
        if kept:
            head.set_reshard_after_backward(False)
    scores = head(x)
    (g,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
    loss = g.square().sum() + (scores.sum() if with_task else 0)
    try:
        loss.backward()
    except RuntimeError:
        return "RuntimeError"
    gradient = head.weight.grad
    return "None" if gradient is None else "a gradient"


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for loss, with_task in (("penalty", False), ("penalty and task", True)):
        print(loss, "| plain:", gradient(False, False, with_task))
        print(loss, "| sharded:", gradient(True, False, with_task))
        print(loss, "| sharded, kept after backward:", gradient(True, True, with_task))
print("warned of it:", any("backward" in str(w.message).lower() or "grad" in str(w.message).lower() for w in said))
dist.destroy_process_group()
PROGRAM

cat > "$folder/expected" <<'LINES'
penalty | plain: a gradient
penalty | sharded: RuntimeError
penalty | sharded, kept after backward: None
penalty and task | plain: a gradient
penalty and task | sharded: RuntimeError
penalty and task | sharded, kept after backward: None
warned of it: False
LINES

"$folder/venv/bin/python" "$folder/try.py" > "$folder/seen"
cat "$folder/seen"
if ! diff "$folder/expected" "$folder/seen"; then
    echo "changed: no longer as stated above" >&2
    exit 1
fi
echo "as stated, torch $("$folder/venv/bin/python" -c 'import torch; print(torch.__version__)')"
