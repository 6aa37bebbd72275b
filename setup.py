"""Builds the native extension with ninja: each kernel source once per instruction set, then the binding on LibTorch's stable ABI.

Where an nvcc is found (in CUDA_HOME or on PATH), the CUDA kernels are built too, whether or not torch has CUDA. Without a compiler the
package still installs, and modreg_fast.backends() says why a native backend is missing.

Environment: MODREG_FAST_SKIP_NATIVE=1 builds no native code, MODREG_FAST_SKIP_CUDA=1 none for CUDA; with MODREG_FAST_FORCE_CUDA=1 a
CUDA part that cannot be built is an error; TORCH_CUDA_ARCH_LIST as in torch, by default "8.0;9.0;10.0+PTX"; MODREG_FAST_BUILD_HARNESS=1
also builds the development harness of the inner functions (pybind11, for the tests); MODREG_FAST_SANITIZE=address,undefined (or
thread) instruments the CPU kernels and the binding with GCC's sanitizers (see `make sanitize`); CXX names the compiler; MAX_JOBS limits
the parallel compilations.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = ("softmax_fisher", "gradient_statistics", "modality_cross_entropy")
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"

# -Wno-psabi and the other two: GCC's own notes on vector arguments and on its intrinsics headers.
FLAGS = "-std=c++17 -O3 -g0 -fPIC -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized -Wno-uninitialized -fno-math-errno -fno-trapping-math"
SANITIZE = os.environ.get("MODREG_FAST_SANITIZE")
if SANITIZE:
    FLAGS = f"{FLAGS.replace('-O3 -g0', '-O1 -g1')} -fsanitize={SANITIZE} -fno-omit-frame-pointer"
HEADERS = "\n  depfile = $out.d\n  deps = gcc"  # of a rule of ninja: the compiler says what it read
STABLE_ABI = "-DPy_LIMITED_API=0x030A0000 -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY"


def ninja_program() -> str:
    """ninja on PATH, or the one that the Python package carries."""
    found = shutil.which("ninja")
    if found is None:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return found


class Ninja:
    """A build.ninja file in the making."""

    def __init__(self, directory: Path, compiler: str) -> None:
        self.directory = directory
        self.lines = [f"cxx = {compiler}", f"flags = {FLAGS}"]
        self.rule("compile", "$cxx $flags $extra -MMD -MF $out.d -c $in -o $out", HEADERS)
        self.rule("link", f"$cxx -shared {f'-fsanitize={SANITIZE}' if SANITIZE else ''} $in -o $out $extra")

    def rule(self, name: str, command: str, headers: str = "") -> None:
        self.lines.append(f"rule {name}\n  command = {command}\n  description = $out{headers}")

    def compile(self, source: str, name: str, extra: str, rule: str = "compile") -> str:
        self.lines.append(f"build {name}.o: {rule} {ROOT / 'csrc' / source}\n  extra = {extra}")
        return f"{name}.o"

    def link(self, objects: list[str], target: Path, extra: str = "") -> None:
        self.lines.append(f"build {target}: link {' '.join(objects)}\n  extra = {extra}")

    def run(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([ninja_program(), "-C", str(self.directory), *(["-j", jobs] if jobs else [])], check=True)


def cpu_objects(ninja: Ninja) -> list[str]:
    objects = [ninja.compile("cpu/dispatch.cpp", "dispatch", "")]
    for isa, flags in INSTRUCTION_SETS.items():
        objects += [ninja.compile(f"cpu/{stem}.cpp", f"{stem}.{isa}", f"-DMRF_ISA={isa} {flags}") for stem in KERNELS]
    return objects


class Nvcc:
    """The CUDA compiler; ``RuntimeError`` with the reason where there is none to use."""

    def __init__(self) -> None:
        if os.environ.get("MODREG_FAST_SKIP_CUDA") == "1":
            raise RuntimeError("it was skipped (MODREG_FAST_SKIP_CUDA=1)")
        home = os.environ.get("CUDA_HOME")
        self.program = shutil.which("nvcc", path=f"{home}/bin" if home else None)
        if self.program is None:
            raise RuntimeError(f"no nvcc was found {f'in CUDA_HOME={home}' if home else 'on PATH'} when it was installed")
        # nvcc itself says where its libraries are, also behind a wrapper.
        dry = subprocess.run([self.program, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
        paths = " ".join(dict.fromkeys(re.findall(r'"(-L[^"]*)"', dry)))
        # Static and hidden, so that it stays apart from the CUDA runtime that torch brings.
        self.libraries = f"{paths} -lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
        known = subprocess.run([self.program, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";")
        self.architectures, self.flags = [], ""
        for entry in filter(None, requested):
            version = entry.removesuffix("+PTX").replace(".", "")
            if f"compute_{version.rstrip('af')}" not in known:
                continue
            self.architectures.append(f"sm_{version}")
            self.flags += f" -gencode arch=compute_{version},code=sm_{version}"
            if entry.endswith("+PTX"):
                self.flags += f" -gencode arch=compute_{version},code=compute_{version}"
        if not self.architectures:
            raise RuntimeError(f"{self.program} supports none of the architectures {';'.join(requested)}")


def cuda_objects(ninja: Ninja, nvcc: Nvcc, includes: str) -> list[str]:
    command = f"{nvcc.program} -ccbin $cxx -std=c++17 -O3 -Xcompiler -fPIC {nvcc.flags} -MD -MF $out.d -c $in -o $out"
    ninja.rule("cuda", command, HEADERS)
    objects = [
        ninja.compile(f"cuda/{stem}.cu", f"{stem}.cuda", "", "cuda") for stem in (*KERNELS, "softmax_fisher_general", "launch")
    ]
    define = f"-DMRF_CUDA_ARCHITECTURES='\"{', '.join(nvcc.architectures)}\"'"
    return [*objects, ninja.compile("cuda/module.cpp", "module.cuda", f"{includes} {STABLE_ABI} {define}")]


def build_native(ninja: Ninja, target: Path, nvcc: Nvcc | None) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = " ".join(f"-isystem {path}" for path in [*include_paths(), sysconfig.get_path("include")])
    objects = [ninja.compile("module.cpp", "module", f"{includes} {STABLE_ABI}"), ninja.compile("glibc.cpp", "glibc", "")]
    objects += cpu_objects(ninja)
    libraries = " ".join(f"-L{path}" for path in library_paths()) + " -ltorch -ltorch_cpu -lc10"
    if nvcc is not None:
        objects += cuda_objects(ninja, nvcc, includes)
        # libtorch stays a dependency though nothing of it is used: where torch has CUDA it brings the library that knows the stream.
        libraries = f"-Wl,--no-as-needed {libraries} {nvcc.libraries}"
    ninja.link(objects, target, libraries)
    ninja.run()


def build_harness(ninja: Ninja, target: Path) -> None:
    import pybind11

    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    objects = [ninja.compile("harness/module.cpp", "harness", includes)]
    for isa, flags in INSTRUCTION_SETS.items():
        objects.append(ninja.compile("harness/inner.cpp", f"inner.{isa}", f"-DMRF_ISA={isa} {flags}"))
        objects.append(ninja.compile("cpu/softmax_fisher.cpp", f"softmax_fisher.{isa}", f"-DMRF_ISA={isa} {flags}"))
    ninja.link(objects, target)
    ninja.run()


def build_with_cuda(directory: Path, compiler: str, target: Path, reason: Path) -> None:
    """With the CUDA kernels where they can be built; else without, and the reason goes to a file that backends() reads."""
    try:
        build_native(Ninja(directory, compiler), target, Nvcc())
        reason.unlink(missing_ok=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        if os.environ.get("MODREG_FAST_FORCE_CUDA") == "1":
            raise
        print(f"WARNING: modreg_fast is built without CUDA: {error}")
        build_native(Ninja(directory, compiler), target, None)
        reason.write_text(f"the native extension was built without CUDA: {error}\n")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        harness = ext.name.endswith("_harness")
        package = ROOT / "modreg_fast" if self.inplace else target.parent
        reason = package / "_native_missing.txt"
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
        try:
            if compiler is None:
                raise RuntimeError("no C++ compiler was found when it was installed")
            # One folder for both extensions: ninja finds there the kernels that the other one compiled.
            directory = Path(self.build_temp).absolute()
            if harness:
                build_harness(Ninja(directory, compiler), target)
            else:
                build_with_cuda(directory, compiler, target, package / "_cuda_missing.txt")
                reason.unlink(missing_ok=True)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("MODREG_FAST_FORCE_CUDA") == "1":
                raise
            print(f"WARNING: {ext.name} was not built, the package works without it: {error}")
            if not harness:
                reason.write_text(f"the native extension was not built: {error}; install a C++17 compiler and install again\n")


names = []
if os.environ.get("MODREG_FAST_SKIP_NATIVE") != "1":
    names.append("modreg_fast._native")
    if os.environ.get("MODREG_FAST_BUILD_HARNESS") == "1":
        names.append("modreg_fast._native_harness")

setup(
    ext_modules=[Extension(name, [], py_limited_api=not name.endswith("_harness"), optional=True) for name in names],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if names else {},
)
