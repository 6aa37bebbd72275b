"""An entry of a module, with all that it may call, made ready for the machine."""

from . import access
from .control import callee
from .memory import LONGEST_ACCESS
from .parser import Function, Instruction, Module, Variable


class Program:
    """Code, and where variables are. ``key`` tells modules apart, whose global variables outlive a launch.

    ``shared_granule`` and ``store_granule`` are the bytes of the shortest access to shared memory and of the shortest store to global
    memory: the grain at which these must be watched."""

    def __init__(self, module: Module, key: str, entry: str):
        self.key, self.entry = key, module.function(entry)
        self._link(module, self.entry)
        self.registers = module.registers  # of all functions that were read so far
        self._lay_out(module, self.entry)
        self.shared_granule = self._shortest("shared", access.ACCESSES)
        self.store_granule = self._shortest("global", ("st",))

    def _link(self, module: Module, entry: Function) -> None:
        """The entry and all functions that it may call, one after the other."""
        self.code: list[Instruction] = []
        self.start: dict[str, int] = {}
        self.function_at: list[Function] = []
        names = [entry.name]
        for name in names:
            function = module.function(name)
            self.start[name] = len(self.code)
            self.code += function.instructions
            self.function_at += [function] * len(function.instructions)
            for instruction in function.instructions:
                if instruction.opcode == "call":
                    called = callee(instruction)
                    if called in module.functions and called not in names:
                        names.append(called)
        self.functions = {name: module.functions[name] for name in names}

    def _lay_out(self, module: Module, entry: Function) -> None:
        """Offsets of variables in shared, local and parameter memory. A function has one frame, which forbids recursion; the parameters of
        functions and of call sequences lie in local memory too. ``dynamic_shared``: its variables start where the others end."""
        self.shared_size = self.local_size = self.parameter_size = 0
        self.offset: dict[Variable, int] = {}
        own = [v for f in self.functions.values() for v in f.variables + (f.parameters + f.results if f is not entry else [])]
        self.in_local = {v for v in own if v.space in ("local", "param")}
        for variable in own + [v for v in module.variables.values() if v.space == "shared"]:
            self._place(variable, "local_size" if variable in self.in_local else "shared_size")
        for variable in entry.parameters:
            self._place(variable, "parameter_size")
        dynamic = [v for v in module.variables.values() if v.space == "shared" and v.extern]
        self.dynamic_shared = bool(dynamic)
        if dynamic:
            self.shared_size = -(-self.shared_size // 16) * 16
            self.offset |= dict.fromkeys(dynamic, self.shared_size)

    def _place(self, variable: Variable, field: str) -> None:
        self.offset[variable] = -(-getattr(self, field) // variable.align) * variable.align
        setattr(self, field, self.offset[variable] + variable.size)

    def _shortest(self, space: str, opcodes) -> int:
        """Bytes of the shortest access to a space, generic ones included."""
        sizes = [LONGEST_ACCESS]
        for instruction in self.code:
            spaces = {name.removesuffix("::cta") for name in instruction.modifiers} & set(access.SPACES)
            if instruction.opcode in opcodes and (not spaces or space in spaces):
                sizes.append(access.access_size(instruction))
        return min(sizes)
