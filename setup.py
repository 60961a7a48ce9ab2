"""Maps the packages and hands the compiling to CMake.  What is built is said in CMakeLists.txt."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FOLDERS = {"fastattn": "fastattn", "fastattn.kernels": "kernels", "fastattn.bench": "bench"}


class CMakeBuild(build_ext):
    def run(self):
        # A developer's build stays apart: tools of an isolated environment lie elsewhere each time,
        # and what was compiled with them is compiled again.
        build = ROOT / "build" / "cmake" if self.inplace else Path(self.build_temp).resolve()
        output = ROOT / "fastattn" if self.inplace else Path(self.build_lib).resolve() / "fastattn"
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        cmake = shutil.which("cmake", path=search) or "cmake"
        options = {
            "FASTATTN_OUTPUT": output,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja", path=search),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines])
        subprocess.check_call([cmake, "--build", build])

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


def packages():
    for name, folder in FOLDERS.items():
        yield name
        inside = find_namespace_packages(ROOT / folder, exclude=["results*", "__pycache__"])
        yield from (f"{name}.{package}" for package in inside)


setup(
    packages=sorted(packages()),
    package_dir=FOLDERS,
    package_data={"": ["*.md", "py.typed"]},
    ext_modules=[Extension("fastattn._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
