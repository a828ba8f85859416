"""Whole tiny models against the original: logits, losses, intermediates and every gradient by name."""

import pytest
import torch

import vmoe_torch
from tests.conftest import golden_arrays, golden_cases, manifest, relative_error
from vmoe_torch.weights.names import from_original


def golden_model(case, **kwargs):
    config = manifest("models")[case]["config"]
    encoder, moe = config["encoder"], config["encoder"]["moe"]
    router, dispatcher = moe["router"], moe["router"]["dispatcher"]
    position = (encoder.get("position_emb") or {}).get("name", "learn")
    patches = (config["image"][0] // config["patch_size"][0]) * (config["image"][1] // config["patch_size"][1])
    token = config["classifier"] == "token"
    model = vmoe_torch.VMoE(
        img_size=tuple(config["image"]),
        patch_size=tuple(config["patch_size"]),
        num_classes=config["num_classes"] or 0,
        global_pool={"token": "token", "gap": "avg", "map": "map"}[config["classifier"]],
        class_token=token,
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        representation_size=config["representation_size"],
        pos_embed={"learned": "learn"}.get(position, position),
        moe_layers=tuple(moe["layers"]),
        num_experts=moe["num_experts"],
        num_selected_experts=router.get("num_selected_experts", 1),
        capacity_factor=dispatcher["capacity_factor"],
        batch_priority=dispatcher.get("batch_priority", False),
        group_size=moe["group_size"] // (patches + token),
        noise_std=0.0 if config["deterministic"] else router["noise_std"],
        dispatch_dtype="bfloat16" if dispatcher.get("bfloat16") else None,
        router="expert_choice" if router.get("name") == "NoisyTopItemsPerExpertRouter" else "top_experts",
        **kwargs,
    )
    want = golden_arrays("models", case)
    state = from_original({k.removeprefix("params/"): v for k, v in want.items() if k.startswith("params/")})
    if position == "sincos2d":
        state["pos_embed"] = model.pos_embed
    model.load_state_dict(state)
    return config, want, model


@pytest.mark.parametrize("case", golden_cases("models"))
def test_model_equals_original(case, golden_noise):
    config, want, model = golden_model(case)
    golden_noise(*(array for name, array in want.items() if name.startswith("noise/")))
    x = torch.from_numpy(want["inputs"]).permute(0, 3, 1, 2).requires_grad_()
    logits = model(x)
    bfloat16 = config["encoder"]["moe"]["router"]["dispatcher"].get("bfloat16", False)
    budget = 1e-3 if bfloat16 else 1e-5
    assert relative_error(logits, want["logits"]) <= budget
    if "metrics/auxiliary_loss" in want and model.blocks[1].mlp.__class__.__name__ == "MoeMlp":
        loss = vmoe_torch.auxiliary_loss(model)
        assert relative_error(loss, want["metrics/auxiliary_loss"].mean()) <= budget
    if "cotangent" not in want:
        return
    (logits * torch.from_numpy(want["cotangent"])).sum().backward()
    assert relative_error(x.grad, torch.from_numpy(want["grad_inputs"]).permute(0, 3, 1, 2)) <= 2e-5
    gradients = from_original({k.removeprefix("grads/"): v for k, v in want.items() if k.startswith("grads/")})
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            # The key bias has no true gradient: what is there is rounding.
            width = parameter.shape[0] // 3
            got, expected = (torch.cat([g[:width], g[2 * width :]]) for g in (parameter.grad, gradients[name]))
            assert relative_error(got, expected) <= 2e-5, name
        elif name.startswith("attn_pool.kv.bias"):
            width = parameter.shape[0] // 2
            assert relative_error(parameter.grad[width:], gradients[name][width:]) <= 2e-5, name
        else:
            assert relative_error(parameter.grad, gradients[name]) <= 2e-5, name


def test_intermediates_equal_original():
    _, want, model = golden_model("token_learned")
    model.eval()
    x = torch.from_numpy(want["inputs"]).permute(0, 3, 1, 2)
    _, blocks = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    for index, (patches, prefix) in enumerate(blocks):
        got = torch.cat([prefix, patches], 1)
        assert relative_error(got, want[f"intermediates/Encoder/encoderblock_{index}"]) <= 1e-5
