"""Faults planted in tiny CUDA kernels: the interpreter must name each, and pass the same kernel without it."""

import numpy as np
import ptx
import pytest

pytestmark = pytest.mark.skipif(ptx.NVCC is None, reason="needs nvcc to compile the kernels")

# Every kernel has 64 threads per block, reads x (64 floats per block), writes y, and goes wrong where fault is 1.
SOURCE = r"""
#include <cassert>
#include <cstdio>
#include <cuda_pipeline.h>

#define KERNEL(name) extern "C" __global__ void name(const float* x, float* y, int fault)
#define SETUP const int t = threadIdx.x, i = blockIdx.x * 64 + t; (void)i; (void)t;
extern __shared__ float dynamic[];
__device__ float scratch[64];

KERNEL(load_behind_the_end) { SETUP y[i] = x[i + fault]; }
KERNEL(load_before_the_start) { SETUP y[i] = x[i - fault]; }
KERNEL(load_far_away) { SETUP y[i] = x[i + (long long)fault * 1000000007]; }
KERNEL(load_from_null) { SETUP y[i] = fault ? *(const float*)(t * 4ull) : x[i]; }
KERNEL(store_behind_the_end) { SETUP y[i + fault] = x[i]; }
KERNEL(misaligned_vector) { SETUP if (t < 8) { float4 v = *(const float4*)(x + 4 * t + fault); y[t] = v.x + v.w; } }
KERNEL(misaligned_float) { SETUP y[i] = t < 60 ? *(const float*)((const char*)(x + i) + fault) : 0; }
KERNEL(misaligned_store) {
  SETUP if (t >= 62) y[i] = x[i];
  else if (t % 2 == 0) *(float2*)(y + i + fault) = make_float2(x[i], x[i + 1]);
}
KERNEL(misaligned_shared) {
  SETUP __shared__ __align__(8) float s[64];
  s[t] = x[i];
  __syncthreads();
  if (t >= 62) { y[i] = 0; return; }
  const float2 v = ((const float2*)(s + fault))[t / 2];
  y[i] = v.x + v.y;
}
KERNEL(atomic_behind_the_end) { SETUP y[i] = x[i]; if (t == 63) atomicAdd((int*)&scratch[t + fault], 1); }
KERNEL(read_of_unwritten_output) { SETUP y[i] = fault ? y[i ^ 1] : x[i]; }
KERNEL(output_left_unwritten) { SETUP if (!fault || t != 17) y[i] = x[i]; }
KERNEL(two_writers) { SETUP y[fault ? i - (t & 1) : i] = x[i]; if (fault && (t & 1)) y[i] = 0; }
KERNEL(two_writers_in_different_blocks) { SETUP y[i] = x[i]; if (fault && blockIdx.x == 1 && t == 0) y[0] = 1; }
KERNEL(cached_load_of_a_store) { SETUP y[i] = x[i]; if (fault) y[i] += __ldg(y + i); }

KERNEL(shared_behind_the_end) { SETUP dynamic[t + fault] = x[i]; __syncthreads(); y[i] = dynamic[t + fault]; }
KERNEL(shared_left_unwritten) {
  SETUP __shared__ float s[64];
  if (!fault || t != 5) s[t] = x[i];
  __syncthreads();
  y[i] = s[63 - t];
}
KERNEL(missing_barrier) { SETUP __shared__ float s[64]; s[t] = x[i]; if (!fault) __syncthreads(); y[i] = s[t ^ 32]; }
KERNEL(missing_barrier_of_the_warp) { SETUP __shared__ float s[64]; s[t] = x[i]; if (!fault) __syncwarp(); y[i] = s[t ^ 1]; }
KERNEL(missing_barrier_before_reuse) {
  SETUP __shared__ float s[64];
  s[t] = x[i];
  __syncthreads();
  const float v = s[t ^ 32];
  if (!fault) __syncthreads();
  s[t] = v + 1;
  y[i] = s[t];
}
KERNEL(broadcast_then_write) {
  SETUP __shared__ float s[2];
  if (t == 0) s[0] = x[i];
  __syncthreads();
  const float v = s[0];
  if (!fault) __syncthreads();
  if (t == 0) s[0] = v + 1;
  y[i] = v;
}
KERNEL(reader_of_a_broadcast_writes) {
  SETUP __shared__ float s[2];
  if (t == 0) s[0] = x[i];
  __syncthreads();
  const float v = s[0];
  if (!fault) __syncthreads();
  if (t == 63) s[0] = v + 1;
  y[i] = v;
}
KERNEL(lane_of_a_broadcast_writes) {
  SETUP __shared__ float s[2];
  if (t == 0) s[0] = x[i];
  __syncthreads();
  float v = 0;
  if (t < 32) {
    v = s[0];
    if (!fault) __syncwarp();
    if (t == 31) s[0] = v + 1;
  }
  y[i] = v;
}
KERNEL(warp_barrier_orders_no_other_warp) {
  SETUP __shared__ float s[64];
  s[t] = x[i];
  __syncwarp();
  if (!fault) __syncthreads();
  y[i] = s[fault && t < 32 ? t : t ^ 32];
}
KERNEL(two_threads_write_shared) { SETUP __shared__ float s[64]; s[fault ? t / 2 : t] = x[i]; __syncthreads(); y[i] = s[t / 2]; }
KERNEL(two_lanes_write_two_values) {
  SETUP __shared__ float s[32];
  s[t / 2] = x[fault ? i : i & ~1];
  __syncthreads();
  y[i] = s[t / 2];
}
KERNEL(two_warps_write_the_same) { SETUP __shared__ float s[64]; s[fault ? t % 32 : t] = x[0]; __syncthreads(); y[i] = s[t % 32]; }
KERNEL(shuffle_orders_no_memory) {
  SETUP __shared__ float s[64];
  s[t] = x[i];
  const float v = __shfl_xor_sync(~0u, x[i], 1);
  if (!fault) __syncwarp();
  y[i] = s[t ^ 1] + v;
}
KERNEL(async_copy_without_wait) {
  SETUP __shared__ float s[64];
  __pipeline_memcpy_async(s + t, x + i, 4);
  __pipeline_commit();
  if (!fault) __pipeline_wait_prior(0);
  y[i] = s[t];
}
KERNEL(async_copy_waits_for_too_few) {
  SETUP __shared__ float s[128];
  __pipeline_memcpy_async(s + t, x + i, 4);
  __pipeline_commit();
  __pipeline_memcpy_async(s + 64 + t, x + i, 4);
  __pipeline_commit();
  if (fault) __pipeline_wait_prior(1); else __pipeline_wait_prior(0);
  y[i] = s[t] + s[64 + t];
}

KERNEL(local_behind_the_end) {
  SETUP float a[4];
  for (int k = 0; k < 4; ++k) a[k] = x[i] * k;
  y[i] = a[fault ? 4 + (t & 3) : (t & 3)];
}
KERNEL(local_left_unwritten) {
  SETUP float a[4];
  for (int k = 0; k < 4 - fault; ++k) a[(k + t) & 3] = x[i];
  y[i] = a[3];
}

KERNEL(barrier_in_a_branch) { SETUP if (!fault || t < 32) __syncthreads(); y[i] = x[i]; __syncthreads(); }
KERNEL(barriers_of_two_branches) {
  SETUP if (fault ? t < 32 : t < 64) { y[i] = x[i]; __syncthreads(); } else { y[i] = 2 * x[i]; __syncthreads(); y[i] += 1; }
}
KERNEL(shuffle_in_a_branch) { SETUP float v = x[i]; if (!fault || t % 32 < 16) v += __shfl_xor_sync(~0u, v, 1); y[i] = v; }
KERNEL(shuffle_after_an_exit) { SETUP y[i] = x[i]; if (fault && t == 3) return; y[i] += __shfl_xor_sync(~0u, x[i], 1); }
KERNEL(vote_in_a_branch) { SETUP unsigned v = 0; if (!fault || t % 2) v = __ballot_sync(~0u, t & 4); y[i] = v; }
KERNEL(shuffle_from_an_absent_lane) {
  SETUP float v = x[i];
  if (t % 32 < 16) v += __shfl_sync(0xFFFFu, v, fault ? 20 : 3);
  y[i] = v;
}
KERNEL(shuffle_by_a_stranger) { SETUP y[i] = __shfl_xor_sync(fault ? 0xFFFEu << 16 | 0xFFFFu : ~0u, x[i], 1); }

KERNEL(failed_assert) { SETUP assert(!fault || t != 9); y[i] = x[i]; }
KERNEL(printing) { SETUP if (fault) printf("thread %d\n", t); y[i] = x[i]; }
KERNEL(trap) { SETUP if (fault && t == 40) __trap(); y[i] = x[i]; }
KERNEL(endless_loop) { SETUP while (fault && x[i] < 1e30f) __threadfence(); y[i] = x[i]; }
KERNEL(unknown_instruction) { SETUP if (fault) asm volatile("nanosleep.u32 100;"); y[i] = x[i]; }
"""

FAULTS = {
    "load_behind_the_end": (ptx.OutOfBounds, r"offset 512 of x, which has 512"),
    "load_before_the_start": (ptx.OutOfBounds, r"offset -4 of x"),
    "load_far_away": (ptx.OutOfBounds, "of x, which has 512"),
    "load_from_null": (ptx.OutOfBounds, "in no buffer"),
    "store_behind_the_end": (ptx.OutOfBounds, "offset 512 of y"),
    "misaligned_vector": (ptx.Misaligned, "16 bytes at offset 4 of x"),
    "misaligned_float": (ptx.Misaligned, "4 bytes at offset 1 of x"),
    "misaligned_store": (ptx.Misaligned, "8 bytes at offset 4 of y"),
    "misaligned_shared": (ptx.Misaligned, "8 bytes at offset 4 of shared"),
    "atomic_behind_the_end": (ptx.OutOfBounds, "offset 256 of scratch, which has 256"),
    "read_of_unwritten_output": (ptx.Uninitialized, "of y"),
    "output_left_unwritten": (ptx.Uninitialized, "y: 8 of 512 bytes"),
    "two_writers": (ptx.GlobalConflict, "of y is stored to by two threads"),
    "two_writers_in_different_blocks": (ptx.GlobalConflict, "offset 0 of y"),
    "cached_load_of_a_store": (ptx.GlobalConflict, "nc"),
    "shared_behind_the_end": (ptx.OutOfBounds, "shared memory, which has 256"),
    "shared_left_unwritten": (ptx.Uninitialized, "offset 20 of shared"),
    "missing_barrier": (ptx.SharedRace, "offset"),
    "missing_barrier_of_the_warp": (ptx.SharedRace, "offset"),
    "missing_barrier_before_reuse": (ptx.SharedRace, "offset"),
    "broadcast_then_write": (ptx.SharedRace, "offset 0"),
    "reader_of_a_broadcast_writes": (ptx.SharedRace, "offset 0"),
    "lane_of_a_broadcast_writes": (ptx.SharedRace, "offset 0"),
    "warp_barrier_orders_no_other_warp": (ptx.SharedRace, "offset"),
    "two_threads_write_shared": (ptx.SharedRace, "offset"),
    "two_lanes_write_two_values": (ptx.SharedRace, "offset 0 of shared memory gets two values"),
    "two_warps_write_the_same": (ptx.SharedRace, "offset"),
    "shuffle_orders_no_memory": (ptx.SharedRace, "offset"),
    "async_copy_without_wait": (ptx.Uninitialized, "offset 0 of shared"),
    "async_copy_waits_for_too_few": (ptx.Uninitialized, "offset 256 of shared"),
    "local_behind_the_end": (ptx.OutOfBounds, "of local memory, which has 16"),
    "local_left_unwritten": (ptx.Uninitialized, "local memory"),
    "barrier_in_a_branch": (ptx.BarrierError, "32 of 64 live threads"),
    "barriers_of_two_branches": (ptx.BarrierError, "32 of 64 live threads"),
    "shuffle_in_a_branch": (ptx.WarpError, "do not come"),
    "shuffle_after_an_exit": (ptx.WarpError, "do not come"),
    "vote_in_a_branch": (ptx.WarpError, "do not come"),
    "shuffle_from_an_absent_lane": (ptx.WarpError, "lane 20"),
    "shuffle_by_a_stranger": (ptx.WarpError, "does not name"),
    "failed_assert": (ptx.Trapped, "assert: '!fault"),
    "printing": (ptx.Trapped, r"printf: 'thread %d"),
    "trap": (ptx.Trapped, r"trap.*thread \(40, 0, 0\)"),
    "endless_loop": (ptx.Trapped, "not finished after 20000 steps"),
    "unknown_instruction": (ptx.UnknownInstruction, "nanosleep"),
}


def launch(name: str, arch: str, fault: int) -> np.ndarray:
    memory = ptx.Memory()
    x = memory.put(np.arange(128, dtype=np.float32), "x")
    small = name == "misaligned_vector"  # writes eight floats
    y = memory.empty(8 if small else 128, np.float32, "y")
    text = ptx.cuda_to_ptx(SOURCE, arch)
    ptx.run(text, name, 1 if small else 2, 64, [x, y, fault], memory, shared_bytes=256, max_steps=20_000)
    return y.numpy()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name, arch):
    kind, message = FAULTS[name]
    assert np.isfinite(launch(name, arch, 0)).all()
    with pytest.raises(kind, match=message) as caught:
        launch(name, arch, 1)
    assert caught.type is kind
    if name != "output_left_unwritten":  # found after the launch
        assert "line " in str(caught.value)


REPLICATED = r"""
extern "C" __global__ void replicated(float* y, int fault) {
  __shared__ float s[32];
  const int t = threadIdx.x;
  s[t % 32] = t % 32 + fault * (t / 32);
  __syncthreads();
  y[t] = s[t % 32];
}
"""


@pytest.mark.parametrize("fault", [0, 1])
def test_several_warps_may_store_one_value_where_that_is_allowed(fault):
    """As Triton's kernels do; two values are never allowed."""
    memory = ptx.Memory()
    y, text = memory.empty(64, np.float32), ptx.cuda_to_ptx(REPLICATED, "sm_90")
    with pytest.raises(ptx.SharedRace, match="of shared memory" if not fault else "gets two values"):
        ptx.run(text, "replicated", 1, 64, [y, fault], memory, replicated=bool(fault))
    if not fault:
        ptx.run(text, "replicated", 1, 64, [y, fault], memory, replicated=True)
        np.testing.assert_array_equal(y.numpy(), np.arange(64) % 32)


def test_message_names_thread_line_and_address():
    with pytest.raises(ptx.OutOfBounds) as caught:
        launch("load_behind_the_end", "sm_90", 1)
    message = str(caught.value)
    assert message.startswith("4 bytes at offset 512 of x, which has 512, block (1, 0, 0) thread (63, 0, 0), line ")
    assert "`ld.global" in message


# ---- what looks like a fault and is none ----

HARMLESS = r"""
#define KERNEL(name) extern "C" __global__ void name(const float* x, float* y)
KERNEL(halves_of_a_warp_with_their_own_masks) {
  const int t = threadIdx.x;
  float v = x[t];
  if (t % 32 < 16) v += __shfl_xor_sync(0xFFFFu, v, 1); else v -= __shfl_xor_sync(0xFFFF0000u, v, 2);
  y[t] = v;
}
KERNEL(late_lanes_join_the_shuffle) {
  const int t = threadIdx.x;
  float v = x[t];
  for (int k = 0; k < t % 7; ++k) v = v * 2 + 1;
  y[t] = v + __shfl_xor_sync(~0u, v, 1);
}
KERNEL(ended_threads_at_a_barrier) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  y[t] = 0;
  if (t >= 40) return;
  s[t] = x[t];
  __syncthreads();
  y[t] = s[39 - t];
}
KERNEL(warps_work_on_their_own_rows) {
  __shared__ float s[64];
  const int t = threadIdx.x;
  for (int k = 0; k < 3; ++k) {
    s[t] = x[t] + k;
    __syncwarp();
    const float v = s[t ^ 5];
    __syncwarp();
    s[t] = v;
  }
  y[t] = s[t];
}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "halves_of_a_warp_with_their_own_masks",
            lambda x: np.where(np.arange(64) % 32 < 16, x + x[np.arange(64) ^ 1], x - x[np.arange(64) ^ 2]),
        ),
        (
            "late_lanes_join_the_shuffle",
            lambda x: (v := np.array([(a + 1) * 2.0 ** (t % 7) - 1 for t, a in enumerate(x)])) + v[np.arange(64) ^ 1],
        ),
        ("ended_threads_at_a_barrier", lambda x: np.where(np.arange(64) < 40, x[39 - np.arange(64)], 0)),
        ("warps_work_on_their_own_rows", lambda x: x[np.arange(64) ^ 5] + 2),
    ],
)
def test_harmless_kernel_passes(name, expected):
    memory, x = ptx.Memory(), np.random.default_rng(1).standard_normal(64).astype(np.float32)
    y = memory.empty(64, np.float32)
    ptx.run(ptx.cuda_to_ptx(HARMLESS, "sm_90"), name, 1, 64, [memory.put(x), y], memory)
    np.testing.assert_allclose(y.numpy(), expected(x), rtol=1e-5, atol=1e-5)
