"""An entry of a module, with all that it may call, made ready for the machine."""

from . import access
from .control import callee
from .memory import LONGEST_ACCESS
from .parser import Function, Instruction, Module


class Program:
    """Code, and places of variables. ``key`` tells modules apart, whose global variables outlive a launch.

    ``shared_granule`` and ``store_granule`` are the bytes of the shortest access to shared memory and of the shortest store to global
    memory: the grain at which these must be watched."""

    def __init__(self, module: Module, key: str, entry: Function, shared_bytes: int):
        self.key, self.entry, self.registers = key, entry, module.registers
        self._link(module, entry)
        self._lay_out(module, entry, shared_bytes)
        self.shared_granule = self._shortest("shared", access.ACCESSES)
        self.store_granule = self._shortest("global", ("st",))

    def _link(self, module: Module, entry: Function) -> None:
        """The entry and all functions that it may call, one after the other."""
        self.code: list[Instruction] = []
        self.start: dict[str, int] = {}
        self.function_at: list[Function] = []
        names = [entry.name]
        for name in names:
            function = module.functions[name]
            self.start[name] = len(self.code)
            self.code += function.instructions
            self.function_at += [function] * len(function.instructions)
            for instruction in function.instructions:
                if instruction.opcode == "call":
                    called = callee(instruction)
                    if called in module.functions and called not in names:
                        names.append(called)
        self.functions = {name: module.functions[name] for name in names}

    def _lay_out(self, module: Module, entry: Function, shared_bytes: int) -> None:
        """Offsets of variables in shared and local memory. A function has one frame, which forbids recursion; the parameters of
        functions and of call sequences lie in local memory too."""
        self.shared_size = self.local_size = 0
        own = [v for f in self.functions.values() for v in f.variables + (f.parameters + f.results if f is not entry else [])]
        self.in_local = {v for v in own if v.space in ("local", "param")}
        for variable in own + [v for v in module.variables.values() if v.space == "shared"]:
            field = "local_size" if variable in self.in_local else "shared_size"
            variable.offset = -(-getattr(self, field) // variable.align) * variable.align
            setattr(self, field, variable.offset + variable.size)
        dynamic = [v for v in module.variables.values() if v.space == "shared" and v.extern]
        if dynamic:
            start = -(-self.shared_size // 16) * 16
            for variable in dynamic:
                variable.offset = start
            self.shared_size = start + shared_bytes

    def _shortest(self, space: str, opcodes) -> int:
        """Bytes of the shortest access to a space, generic ones included."""
        sizes = [LONGEST_ACCESS]
        for instruction in self.code:
            spaces = {name.removesuffix("::cta") for name in instruction.modifiers} & set(access.SPACES)
            if instruction.opcode in opcodes and (not spaces or space in spaces):
                sizes.append(access.access_size(instruction))
        return min(sizes)
