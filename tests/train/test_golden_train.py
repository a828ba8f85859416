"""Schedules, losses, mixup, optimiser steps and whole training steps: what the original computes."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch import VMoE, auxiliary_loss
from vmoe_torch.train import Config
from vmoe_torch.train.build import build_loss
from vmoe_torch.train.config import LossConfig, OptimConfig, ScheduleConfig
from vmoe_torch.train.mixup import DirichletMixup, mix
from vmoe_torch.train.optimizer import build_optimizer, build_schedule
from vmoe_torch.weights.names import from_original

TRAIN_STEPS = golden_cases("train", lambda config: "deterministic" in config)
OPTIMIZERS = golden_cases("train", lambda config: config.get("name") in ("adam", "sgd"))
LOSSES = [
    (case, hard)
    for case in golden_cases("train", lambda config: str(config.get("name")).endswith("_xent"))
    # Soft labels have no class.
    for hard in ((False,) if case.endswith("soft") else (False, True))
]
SCHEDULES = golden_cases("train", lambda config: "schedule" in config)


def schedule_config(golden: dict, total: int) -> ScheduleConfig:
    """Our configuration of a schedule of the original."""
    name = {"warmup_linear_decay": "linear", "warmup_cosine_decay": "cosine"}[golden["schedule"]]
    return ScheduleConfig(
        name,
        updates=total,
        warmup_updates=golden["warmup_steps"],
        # "linear" always begins its decay at the peak.
        warmup_prefix=name == "cosine",
        min_lr=golden["end_value"],
    )


def optim_config(golden: dict) -> OptimConfig:
    """Our configuration of an optimiser of the original."""
    options = {"lr": golden["learning_rate"]["peak_value"], "clip_norm": golden["gradient_clip"]["global_norm"]}
    if golden["name"] == "sgd":
        return OptimConfig("momentum", momentum=golden["momentum"], weight_decay=0.0, **options)
    ((pattern, weight_decay),) = golden["weight_decay"]
    assert pattern == ".*/kernel"
    betas = (golden["b1"], golden["b2"])
    return OptimConfig("adamw", betas=betas, weight_decay=weight_decay, decay="kernels", **options)


def tensors(arrays: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The original's parameters (or gradients) under a prefix, named and laid out as ours."""
    return from_original({n.removeprefix(f"{prefix}/"): a for n, a in arrays.items() if n.startswith(f"{prefix}/")})


@pytest.mark.parametrize("case", SCHEDULES)
def test_schedule_equals_the_original(case):
    config, arrays = manifest("train")[case]["config"], golden_arrays("train", case)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=config["peak_value"])
    # A length in updates does not care for epochs.
    schedule = build_schedule(optimizer, schedule_config(config, config["total_steps"]), updates_per_epoch=7)
    rates = []
    for step in arrays["steps"].tolist():
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0
    np.testing.assert_allclose(rates, arrays["lr"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("case", "hard"), LOSSES)
def test_loss_equals_the_original(case, hard):
    arrays = {name: torch.from_numpy(array) for name, array in golden_arrays("train", case).items()}
    labels = arrays["labels"]
    kind = manifest("train")[case]["config"]["name"].removesuffix("_xent")
    # Classes come without mixup, their probabilities with it.
    config = Config.from_dict({"loss": {"kind": kind}, "data": {"mixup": 0.0 if hard else 0.2}})
    logits = arrays["logits"].requires_grad_()
    loss = build_loss(config)(logits, labels.argmax(1) if hard else labels)
    loss.backward()
    assert relative_error(loss, arrays["mean_loss"]) <= 1e-6
    assert relative_error(logits.grad, arrays["grad_mean"]) <= 1e-6


def test_mixup_equals_the_original():
    arrays = golden_arrays("train", "mixup/device")
    for device in range(3):
        shares = arrays["alpha_raw"][device, 0]
        for name in ("images", "labels"):
            mixed = mix(torch.from_numpy(arrays[name][device]), shares)
            assert relative_error(mixed, arrays[f"mixed_{name}"][device]) <= 1e-6


def test_mixup_draws_what_it_says():
    np.random.seed(3)
    images, labels = torch.eye(4).reshape(4, 1, 2, 2), torch.arange(4)
    mixed, targets = DirichletMixup(0.2, num_classes=4)(images, labels)
    np.random.seed(3)
    largest = np.random.dirichlet([0.2, 0.2]).max()
    assert relative_error(mixed.reshape(4, 4), targets) <= 1e-6
    assert targets.diagonal().tolist() == pytest.approx([largest] * 4)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_smoothed_labels_give_both_losses_the_same_targets():
    logits, labels = torch.randn(6, 10), torch.randint(10, (6,))
    soft = nn.functional.one_hot(labels, 10) * 0.9 + 0.01
    log_p, log_q = logits.log_softmax(1), nn.functional.logsigmoid(logits)
    want = {
        "softmax": -(soft * log_p).sum(1).mean(),
        "sigmoid": -(soft * log_q + (1 - soft) * nn.functional.logsigmoid(-logits)).sum(1).mean(),
    }
    for kind, loss in want.items():
        got = build_loss(Config(loss=LossConfig(kind, label_smoothing=0.1)))(logits, labels)
        assert relative_error(got, loss) <= 1e-6


class Parameters(nn.Module):
    """Parameters by qualified name."""

    def __init__(self, parameters: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in parameters.items():
            module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(value.clone()))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizer_equals_the_original(case):
    config, want = manifest("train")[case]["config"], golden_arrays("train", case)
    given = golden_arrays("train", "optimizer/inputs")
    model, optim = Parameters(tensors(given, "params")), optim_config(config)
    optimizer = build_optimizer(model, optim)
    schedule = build_schedule(optimizer, schedule_config(config["learning_rate"], config["total_steps"]), 1)
    for step in range(4):
        schedule.step_update(step)
        gradients = tensors(given, f"grads_{step}")
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        if step + 1 in (1, 4):
            after = tensors(want, f"params_after_{step + 1}")
            for name, parameter in model.named_parameters():
                assert relative_error(parameter, after[name]) <= 2e-6, name


@pytest.mark.parametrize("case", TRAIN_STEPS)
def test_training_steps_equal_the_original(case):
    config, arrays = manifest("train")[case]["config"], golden_arrays("train", case)
    model = tiny_model(config["model"], noise=not config["deterministic"])
    model.load_state_dict(tensors(arrays, "params_init"))
    model.train()
    optim = optim_config(config["optimizer"])
    optimizer = build_optimizer(model, optim)
    schedule = build_schedule(
        optimizer, schedule_config(config["optimizer"]["learning_rate"], config["total_steps"]), 1
    )
    kind = config["loss"].removesuffix("_xent")
    loss_of = build_loss(Config.from_dict({"loss": {"kind": kind}, "data": {"mixup": 0.2}}))
    for step in range(4):
        schedule.step_update(step)
        images = torch.from_numpy(arrays[f"step{step}/images"]).permute(0, 3, 1, 2)
        optimizer.zero_grad()
        loss = loss_of(model(images), torch.from_numpy(arrays[f"step{step}/labels"]))
        # Its gradient is injected by the layers.
        auxiliary = auxiliary_loss(model)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        metrics = {name: arrays[f"step{step}/metrics/{name}"] for name in ("main_loss", "auxiliary_loss")}
        assert relative_error(loss, metrics["main_loss"]) <= 1e-5
        assert relative_error(auxiliary, metrics["auxiliary_loss"]) <= 2e-5
        assert relative_error(norm, arrays[f"step{step}/metrics/global_norm/grads"]) <= 1e-5
        if step + 1 in (2, 4):
            after = tensors(arrays, f"params_after_{step + 1}")
            for name, parameter in model.named_parameters():
                got, want = parameter, after[name]
                if name.endswith("qkv.bias"):
                    # The keys' bias has no gradient but rounding, which Adam blows up.
                    (got, want) = (torch.cat([value.chunk(3)[0], value.chunk(3)[2]]) for value in (got, want))
                assert relative_error(got, want) <= 2e-5, name


def tiny_model(golden: dict, noise: bool) -> VMoE:
    """The model of a training step, from the original's configuration."""
    encoder, moe = golden["encoder"], golden["encoder"]["moe"]
    router = moe["router"]
    return VMoE(
        img_size=32,
        patch_size=golden["patch_size"][0],
        embed_dim=golden["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / golden["hidden_size"],
        num_classes=golden["num_classes"],
        representation_size=golden["representation_size"],
        head_bias_init=golden["head_bias_init"],
        moe_layers=moe["layers"],
        num_experts=moe["num_experts"],
        group_size=moe["group_size"] // 17,
        num_selected_experts=router["num_selected_experts"],
        capacity_factor=router["dispatcher"]["capacity_factor"],
        batch_priority=router["dispatcher"]["batch_priority"],
        noise_std=router["noise_std"] if noise else 0.0,
        importance_loss_weight=router["importance_loss_weight"],
        load_loss_weight=router["load_loss_weight"],
    )
