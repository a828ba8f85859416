"""Whole models: images per second of vmoe_b16 (K=1, C=1) beside timm's dense ViT-B/16, inference and training steps."""

import time

import torch

from benchmarks.protocol import Samples
from benchmarks.session import Session, first_line

OP = "model"
MOE, DENSE = "vmoe_b16", "vit_base_patch16_224"
# Steps that follow each other without a wait, as in training; one sample is their mean.
ROUNDS, STEPS = 10, 3


def run(session: Session, images: int = 128, moe: str = MOE, dense: str = DENSE) -> None:
    """Both models in turn, wall-clock over whole steps: what a user of the model sees, launches included."""
    if not session.begin(OP):
        return
    import timm

    import vmoe_torch  # noqa: F401  (registers the models)

    torch.manual_seed(0)
    made = {"num_classes": 1000}
    settings = {"num_selected_experts": 1, "capacity_factor": 1.0, "noise_std": 0.0}
    models = {"ours": timm.create_model(moe, **made, **settings), "dense": timm.create_model(dense, **made)}
    size = models["dense"].pretrained_cfg["input_size"][-1]
    x = torch.randn(images, 3, size, size, device=session.device, dtype=session.dtype)
    # Compiling takes longest, so it comes last.
    for compiled in (False, True):
        for direction in ("forward", "both"):
            case = f"B={images} {size} px{', compiled' if compiled else ''}"
            if not session.begin(f"{OP} {direction} {case}"):
                return
            calls = {}
            for name, model in models.items():
                model = model.to(session.device, session.dtype).train(direction == "both")
                model = session.compiler(model) if compiled else model
                calls[name] = _training(model, x) if direction == "both" else _inference(model, x)
            try:
                _time(session, direction, case, calls)
            except Exception as error:  # A failure of one mode must not cost the others their numbers.
                session.note(f"{OP} {direction} {case}: left out: {first_line(error)}")
            for model in models.values():
                model.zero_grad(set_to_none=True)


def _inference(model, x):
    @torch.inference_mode()
    def call():
        return model(x)

    return call


def _training(model, x):
    def call():
        model.zero_grad(set_to_none=True)
        model(x).float().square().mean().backward()

    return call


def _time(session: Session, direction: str, case: str, calls) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            _wait(session)
            start = time.perf_counter()
            for _ in range(STEPS):
                call()
            _wait(session)
            seconds[name].append((time.perf_counter() - start) / STEPS)
    session.add(OP, direction, case, {name: Samples(tuple(times)) for name, times in seconds.items()})


def _wait(session: Session) -> None:
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
