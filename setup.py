"""Builds the distribution: two import packages from two folders. Imports nothing that has to be installed first."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(where=".", include=["dspa_kernels", "dspa_kernels.*"]),
        *find_packages(where="python", include=["dspa", "dspa.*"]),
    ],
    package_dir={"dspa": "python/dspa"},
    package_data={
        "dspa": ["py.typed", "demo/assets/*", "demo/assets/*/*"],
        "dspa_kernels": ["py.typed", "launch_table.json"],
    },
)
