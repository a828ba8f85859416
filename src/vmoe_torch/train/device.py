"""The device that a user names, for training and commands alike."""

import torch


def chosen_device(key: str, name: str, number: int = 0) -> torch.device:
    """The device of a name.

    Args:
        key: what errors call it.
        name: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        number: of the GPU, where the name has none.

    Raises:
        ValueError: if there is no such GPU.
    """
    sees_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if sees_cuda else "cpu"
    kind, _, index = name.partition(":")
    if kind != "cuda":
        return torch.device(name)
    # Not by torch.device, to which cuda:256 is cuda:0.
    number, count = int(index or number), torch.cuda.device_count() if sees_cuda else 0
    if number >= count:
        rule = f"one of {count} CUDA devices" if count else "cpu or auto, as PyTorch sees no CUDA device"
        raise ValueError(f"{key} must be {rule}, got cuda:{number}")
    return torch.device("cuda", number)
