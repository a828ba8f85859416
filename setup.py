"""Two packages from one tree: vmoe_torch (src/) and vmoe_kernels (kernels/)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TRAIN = ["torchvision>=0.26", "tqdm>=4.66", "tensorboard>=2.16", "matplotlib>=3.9"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]
EXPORT = ["onnx>=1.18", "onnxscript>=0.6", "onnxruntime>=1.22"]
TEST = ["hypothesis>=6.100", "pytest>=8.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.6"]
DEV = [*TRAIN, *DOCS, *EXPORT, *TEST]

setup(
    name="vmoe-torch",
    version="0.1.0.dev0",
    description="V-MoE, the sparse vision mixture of experts (arXiv 2106.05974), for PyTorch and timm.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src", "vmoe_kernels": "kernels/vmoe_kernels"},
    packages=[*find_packages("src"), "vmoe_kernels"],
    package_data={"vmoe_torch.data": ["fashion_mnist/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "timm>=1.0.26",
        "einops>=0.8",
        "numpy>=1.26",
        # Checkpoints: ranks fetch once; any remote file system; the converted files. torch and timm need them as well.
        "filelock>=3.12",
        "fsspec>=2024.6",
        "safetensors>=0.4.3",
    ],
    extras_require={"train": TRAIN, "export": EXPORT, "docs": DOCS, "dev": DEV, "gcs": ["gcsfs>=2024.6"]},
    entry_points={"console_scripts": ["vmoe = vmoe_torch.cli:main"]},
)
