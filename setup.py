"""Metadata of nanodiff. `pip install -e .[test]` is all the set-up there is."""

from setuptools import find_packages, setup

setup(
    name="nanodiff",
    version="0.1.0",
    description="Image diffusion with no deep-learning framework: every layer's backward written by hand",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["nanodiff", "nanodiff.*"]),
    package_data={"nanodiff.kernels": ["*.cu", "*.cuh"]},
    install_requires=[
        "numpy>=2.0",
        "numba>=0.61",
        "pillow>=10",
        "imageio>=2.30",
        "safetensors>=0.4",
        "tqdm>=4.60",
        "pooch>=1.8",
    ],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "setuptools>=77"],
        "bench": ["torch>=2.6"],
        "cuda12": ["cupy-cuda12x>=14", "nvidia-cuda-nvrtc-cu12>=12.9"],  # one of the two, as the driver says
        "cuda13": ["cupy-cuda13x>=14", "nvidia-cuda-nvrtc"],
        "plot": ["matplotlib>=3.8"],
    },
    entry_points={"console_scripts": ["nanodiff = nanodiff.__main__:main"]},
)
