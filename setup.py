"""Packaging of alphagrpo_jax. The tested versions are pinned in constraints.txt."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "alphagrpo_jax" / "__init__.py").read_text(), re.MULTILINE
)[1]

setuptools.setup(
    name="alphagrpo_jax",
    version=VERSION,
    description="AlphaGRPO for unified multimodal models, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["alphagrpo_jax", "alphagrpo_jax.*"]),
    package_data={"alphagrpo_jax": ["py.typed", "shapes/assets/**", "rewards/templates/**"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "aiohttp>=3.13,<4",
        "array_record>=0.8,<0.9",
        "certifi>=2025.1,<2027",
        "chex>=0.1.90,<0.2",
        "flax>=0.12,<0.13",
        "httptools>=0.6,<1",  # uvicorn parses requests by it, faster than without
        "huggingface_hub>=2,<3",
        "importlib_resources>=6,<8",  # tensorflow-datasets imports it without declaring it
        "jax>=0.10,<0.12",
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "ml-collections>=1.0,<2",
        "numpy>=2,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11,<14",
        "prometheus_client>=0.22,<1",
        "pydantic>=2.10,<3",
        "safetensors>=0.8,<0.9",
        "scipy>=1.15,<2",
        "starlette>=1.0,<2",
        "tenacity>=9.2,<10",
        "tensorboardX>=2.6.4,<3",
        "tensorflow-datasets>=4.9.9,<5",  # used without TensorFlow: array_record files only
        "tokenizers>=0.22,<0.24",
        "torch>=2.10,<3",  # the verifiers; everything else is JAX
        "tqdm>=4.66,<5",
        "transformers>=5,<6",
        "uvicorn>=0.40,<1",
    ],
    extras_require={
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
        "tests": [
            "accelerate>=1.10,<2",
            "httpx2>=2.16,<3",
            "openai>=3,<4",
            "peft>=0.18,<0.22",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff==0.17.6",
        ],
        "dev": ["pyright[nodejs]==1.1.414"],  # brings its own Node.js: nothing else to install
        # Hugging Face judges larger than one device, and the spelled-out numbers of SmolVLM.
        "judges": ["accelerate>=1.10,<2", "num2words>=0.5.14,<0.6"],
        # Judges whose processors need it. Each torchvision fits one torch only: this one the pinned
        # torch, from the same index; beside another, see the command in the error's message.
        "torchvision": ["torch==2.13.0", "torchvision==0.28.0"],
        "wandb": ["wandb>=0.22,<1"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        "plan": ["libtpu>=0.0.42,<0.0.43"],  # the TPU compiler; it needs no TPU
        "tpu": ["jax[tpu]>=0.10,<0.12"],
    },
)
