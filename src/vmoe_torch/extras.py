"""What to install where a package is missing: the extra of pyproject.toml that brings it."""

# By the names that are imported; fontTools comes with matplotlib.
EXTRAS = {
    "accelerate": "interop",
    "av": "video",
    "captum": "interop",
    "fontTools": "train",
    "fvcore": "interop",
    "gcsfs": "gcs",
    "lightning": "interop",
    "matplotlib": "train",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "open_clip": "interop",
    "openvino": "interop",
    "peft": "interop",
    "ptflops": "interop",
    "schedulefree": "interop",
    "tensorboard": "train",
    "torchao": "interop",
    "torchmetrics": "interop",
    "torchvision": "train",
    "tqdm": "train",
    "transformers": "interop",
}


def how_to_install(module: str) -> str:
    """What brings a module that is in EXTRAS; the package is in no index, so from a clone, as README.md says."""
    return f"pip install -e '.[{EXTRAS[module]}]' from a clone of vmoe-torch"
