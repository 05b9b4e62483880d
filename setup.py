import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
# The version's one home is the package; it is read as text, because importing the package here may need what is
# not installed yet.
version = re.search(r'^__version__ = "(.+)"$', (root / "minillm/__init__.py").read_text(encoding="utf-8"), re.M)[1]

data = ["pyarrow>=20", "zstandard>=0.23", "ftfy>=6.3", "py3langid>=0.4", "rensa>=0.5,<0.6"]
plot = ["matplotlib>=3.9"]
log = ["tensorboardX>=2.6"]
serve = ["starlette>=1.0", "uvicorn>=0.50"]
evaluate = ["lm_eval[api]>=0.4.13,<0.5"]  # api: to measure a server, too
# The tests compile every CUDA kernel without a GPU and count its registers: another compiler would count others.
nvrtc = ["cuda-pathfinder>=1.3", "nvidia-cuda-nvrtc==13.0.*", "nvidia-cuda-runtime==13.0.*"]
test = [
    "pytest>=8.2",
    "hypothesis>=6.100",
    "pytest-timeout>=2.3.1",
    "pytest-xdist>=3.6",
    "setuptools>=77",
    *data,
    *plot,
    *log,
    *serve,
    *nvrtc,
]

setup(
    name="minillm-train",  # the name `minillm` belongs to another distribution; the import name is `minillm`
    version=version,
    description="LLM training from scratch on NumPy and CuPy: hand-written autograd, fused kernels in Numba and CUDA",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The minillm authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # The kernels' folder stands beside the package, its import name inside: a top-level `kernels` would collide with
    # a published distribution of that name.
    packages=[*find_packages(include=["minillm", "minillm.*"]), "minillm.kernels"],
    package_dir={"minillm.kernels": "kernels"},
    package_data={"minillm.kernels": ["*.cu", "*.cuh"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "numpy>=2.1.2,<2.6",
        "numba>=0.66,<0.70",
        "threadpoolctl>=3.2",
        "ml_dtypes>=0.5",
        "safetensors>=0.5",
        "tokenizers>=0.21,<0.24",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "tyro>=1.0.17,<2",
    ],
    extras_require={
        # One of these two, by driver: two CuPy wheels in one environment break each other. crt: the headers below
        # <mma.h>. CUDA 13.0 is the compiler whose registers the tests count, and every driver of 13 takes its code.
        "cuda12": ["cupy-cuda12x[ctk]>=14.2,<15", "nvidia-cuda-nvcc-cu12", "numba-cuda[cu12]>=0.30,<0.31"],
        "cuda13": ["cupy-cuda13x[ctk]>=14.2,<15", "cuda-toolkit[crt]==13.0.*", "numba-cuda[cu13]>=0.30,<0.31"],
        "data": data,
        "plot": plot,
        "log": log,
        "serve": serve,
        "eval": evaluate,
        "test": test,
        "dev": [*test, "ruff==0.17.5"],  # pinned: another version formats and warns differently
    },
)
