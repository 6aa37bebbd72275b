"""What the interpreter refuses to go on with. Each message names the thread, the line of PTX and the address."""


class PtxError(Exception):
    """A fault of the kernel. ``lane`` is the first thread at fault, as a number within its chunk of blocks."""

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.lane = lane


class OutOfBounds(PtxError):
    """An access outside of every buffer, or outside of the block's shared or the thread's local memory."""


class Misaligned(PtxError):
    """An address that is not a multiple of the size of the whole (vector) access."""


class Uninitialized(PtxError):
    """A read of memory that nobody wrote."""


class SharedRace(PtxError):
    """Two threads touch the same byte of shared memory, one of them writes, and nothing orders them."""


class GlobalConflict(PtxError):
    """Two threads store to the same byte of global memory in a launch, or ``ld.global.nc`` reads a byte stored in it."""


class BarrierError(PtxError):
    """A barrier that not all live threads of the block reach."""


class WarpError(PtxError):
    """A warp-wide instruction without all the lanes that its member mask names, or a value taken from an absent lane."""


class UnknownInstruction(PtxError):
    """An opcode, a modifier or an operand that the interpreter does not know."""


class Trapped(PtxError):
    """``trap``, a failed ``assert``, ``printf``, or a kernel that does not come to an end."""
