"""Build the distribution: two import packages from two folders, and the CUDA library that one of them loads.

Imports nothing that has to be installed first. DSPA_BUILD_CUDA decides whether csrc/ is compiled: `auto` (the default)
compiles it where that is possible, `1` compiles it or fails, `0` does not compile it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import OptionError, SetupError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from build import LIBRARY, BuildError, build_cuda

PACKAGE = "dspa_kernels"
RECORD = "cuda_build.json"


class DspaDistribution(Distribution):
    """A distribution of any platform, or of one if the library was built."""

    has_library = False

    def has_ext_modules(self) -> bool:
        """Return True if the distribution is of one platform, as setuptools understands this method."""
        return self.has_library


class BuildCuda(Command):
    """The step of `build` that puts the library and a record of its build into the package.

    In an editable installation this is the package in the source tree. Objects are kept in build/csrc, so that only
    what has changed is compiled. The protocol is setuptools.command.build.SubCommand.
    """

    description = "compile csrc/"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    distribution: DspaDistribution
    editable_mode: bool = False

    def initialize_options(self) -> None:
        """Set no options: they come from `build` and from the environment."""
        self.build_base = self.build_lib = self.mode = ""

    def finalize_options(self) -> None:
        """Read the options of `build` and DSPA_BUILD_CUDA."""
        step = self.distribution.get_command_obj("build")
        step.ensure_finalized()
        self.build_base, self.build_lib = step.build_base, step.build_lib
        self.mode = os.environ.get("DSPA_BUILD_CUDA") or "auto"
        if self.mode not in ("auto", "1", "0"):
            raise OptionError(
                f"DSPA_BUILD_CUDA is {self.mode!r}; accepted: auto (compile the CUDA library where that is possible), "
                "1 (compile it or fail), 0 (do not compile it)"
            )

    def run(self) -> None:
        """Write the record and, if it can be built, the library."""
        package = self.root() / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        # An old library must not stay, and a file that a running program has mapped must not be overwritten.
        for name in (LIBRARY, RECORD):
            (package / name).unlink(missing_ok=True)
        record = self.build_library(package / LIBRARY)
        (package / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def build_library(self, target: Path) -> dict[str, Any]:
        """Build the library at `target` and return its record."""
        if self.mode == "0":
            return not_built("DSPA_BUILD_CUDA was 0 when the package was built")
        try:
            library = build_cuda(Path(self.build_base, "csrc").resolve())
        except BuildError as error:
            if self.mode == "1":
                raise SetupError(f"{error}. DSPA_BUILD_CUDA is 1; 0 installs without CUDA kernels") from error
            print(f"{'*' * 80}\nBuilding without CUDA kernels: {error}\n{'*' * 80}", file=sys.stderr)
            return not_built(str(error))
        self.copy_file(str(library.path), str(target))
        self.distribution.has_library = True
        return {"built": True, "reason": "", "architectures": library.architectures, "nvcc": library.nvcc}

    def root(self) -> Path:
        """Return the folder that contains the package which gets the library."""
        return Path() if self.editable_mode else Path(self.build_lib)

    def get_source_files(self) -> list[str]:
        """Return nothing, because MANIFEST.in includes all of csrc/."""
        return []

    def get_outputs(self) -> list[str]:
        """Return the files that were written, with their paths in `build_lib`."""
        names = (f"{PACKAGE}/{name}" for name in (LIBRARY, RECORD))
        return [str(Path(self.build_lib, name)) for name in names if (self.root() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Map these paths to the files in the source tree, for an editable installation."""
        outputs = self.get_outputs() if self.editable_mode else []
        return {output: str(Path(output).relative_to(self.build_lib)) for output in outputs}


def not_built(reason: str) -> dict[str, Any]:
    """Return the record of a package without the library."""
    return {"built": False, "reason": reason, "architectures": [], "nvcc": ""}


class Build(build):
    """All build steps of setuptools, followed by the library."""

    sub_commands: ClassVar[list[tuple[str, Any]]] = [*build.sub_commands, ("build_cuda", None)]


class Wheel(bdist_wheel):
    """A wheel for any Python: of one platform with the library, of any platform without."""

    distribution: DspaDistribution

    def run(self) -> None:
        """Build first, which decides the kind of wheel."""
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_library
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, ABI and platform for the wheel's name."""
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=DspaDistribution,
    cmdclass={"build": Build, "build_cuda": BuildCuda, "bdist_wheel": Wheel},
    packages=[
        *find_packages(where=".", include=["dspa_kernels", "dspa_kernels.*"]),
        *find_packages(where="python", include=["dspa", "dspa.*"]),
    ],
    package_dir={"dspa": "python/dspa"},
    package_data={
        "dspa": [
            "py.typed",
            "audit/templates/*",
            "evaluate/style.json",
            "evaluate/grading/templates/*",
            "demo/assets/*",
            "demo/assets/*/*",
            "demo/smollm2/assets/*",
            "demo/smollm2/assets/*/*",
        ],
        "dspa_kernels": ["py.typed", "launch_table.json", "cuda_table.json", "gpu_runs.json"],
    },
)
