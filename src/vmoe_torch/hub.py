"""Models on the Hugging Face Hub: timm's `save_for_hf` and `push_to_hf_hub`, and a card that says how to use them.

timm's own card does not say that `import vmoe_torch` is needed, without which `timm.create_model("hf-hub:...")` ends in
"Unknown model", and says nothing of the routing. What is saved is the same, and the routing travels in both.
"""

from pathlib import Path
from typing import Any

from timm.models import push_to_hf_hub as timm_push
from timm.models import save_for_hf as timm_save
from torch import nn

from vmoe_torch.control import capacity_text, moe_layers
from vmoe_torch.files import write_text
from vmoe_torch.layers.int8_experts import int8_layers, weight_count
from vmoe_torch.models.description import model_arguments
from vmoe_torch.models.vmoe import VMoE


def save_for_hf(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    model_card: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """timm's `save_for_hf` with a README.md: weights, config.json with the routing as it is set now, and a card.

    `timm.create_model(f"local-dir:{folder}", pretrained=True)` gives the model back; its arguments come before those
    that were saved.

    Args:
        model: a VMoE that timm made.
        folder: where to; made if it is missing. A README.md that is there stays.
        name: of the model, for the card; None is the folder's.
        model_card: entries of timm's card that take the place of ours: "tags", "license", "description", "details",
            "usage", "citation".
        model_args: arguments that take the place of those that the model was made with.
        **options: what timm's takes, e.g. safe_serialization=True for model.safetensors.

    Raises:
        TypeError: if `timm.create_model` could not make the model again.
    """
    folder = Path(folder)
    timm_save(model, folder, model_args=_arguments(model) | (model_args or {}), **options)
    readme = folder / "README.md"
    if not readme.exists():
        name = name or folder.resolve().name
        card = {**card_of(model, f"local-dir:{name}"), **(model_card or {})}
        write_text("card", readme, _text(name, card))


def push_to_hf_hub(
    model: nn.Module,
    repo_id: str,
    *,
    model_card: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """timm's `push_to_hf_hub` with our card, where the repository has none yet; see `save_for_hf`.

    Args:
        model: a VMoE that timm made.
        repo_id: "someone/vmoe".
        model_card: as `save_for_hf`.
        model_args: as `save_for_hf`.
        **options: what timm's takes, e.g. private=True.

    Returns:
        What timm returns.
    """
    card = {**card_of(model, f"hf-hub:{repo_id}"), **(model_card or {})}
    return timm_push(model, repo_id, model_args=_arguments(model) | (model_args or {}), model_card=card, **options)


def card_of(model: nn.Module, name: str) -> dict[str, Any]:
    """A model's card, as timm's `push_to_hf_hub(model_card=...)` takes it.

    Args:
        model: a VMoE that timm made.
        name: that `timm.create_model` will take, as "hf-hub:someone/vmoe".
    """
    layers = {f"`{layer_name}`": _routing_text(layer) for layer_name, layer in moe_layers(model).items()}
    lines = [
        "This model is a V-MoE of the package `vmoe-torch`, which must be imported: without it, timm says",
        '"Unknown model".',
        "",
        "```python",
        "import timm",
        "import vmoe_torch  # registers the models",
        "",
        f'model = timm.create_model("{name}", pretrained=True).eval()',
        "```",
        "",
        "The routing is part of it; `vmoe_torch.set_routing` changes it, and so do arguments of `create_model`.",
    ]
    details = {
        "Architecture": model.pretrained_cfg["architecture"],
        "Parameters (M)": f"{weight_count(model) / 1e6:.1f}",
        "Image size": " x ".join(map(str, model.patch_embed.img_size or ("any", "any"))),
    }
    if int8_layers(model):
        details["Experts"] = "int8 weights, one scale for each expert and output channel"
    if layers:
        details["Routing of each MoE layer, in eval mode"] = layers
    return {
        "tags": ["image-classification", "timm", "vmoe-torch", "mixture-of-experts"],
        "license": model.pretrained_cfg.get("license") or "apache-2.0",
        "description": "Vision Transformer with sparse mixture-of-experts layers (V-MoE, arXiv:2106.05974).",
        "details": details,
        "usage": "\n".join(lines),
    }


def _routing_text(layer: nn.Module) -> str:
    routing, slots = layer.routing(), layer.own_router().slots_per_expert
    if slots is not None:
        return f"{layer.router_type}, {layer.num_experts} experts of {slots} slots, every image on its own"
    if layer.router_type == "expert_choice":
        factor = capacity_text(routing["eval_capacity_factor"])
        return (
            f"expert_choice, {layer.num_experts} experts, capacity factor {factor}, groups of {routing['group_size']}"
        )
    order = f"BPR by {routing['priority']} gate" if routing["batch_priority"] else "position order"
    mean, threshold = routing.get("mean_selected_experts"), routing.get("gate_threshold")
    more = "" if mean is None else f", {mean} experts per token on average"
    more += "" if threshold is None else f", gates from {threshold:g} on"
    return (
        f"K={routing['num_selected_experts']}, capacity factor {capacity_text(routing['eval_capacity_factor'])}, "
        f"{order}, groups of {routing['group_size']}{more}"
    )


def _arguments(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, VMoE) or model.made_with is None:
        raise TypeError(f"model must be a VMoE that timm.create_model made, got {type(model).__name__}")
    return model_arguments(model)


def _text(name: str, card: dict[str, Any]) -> str:
    """A card in Markdown, as timm's `push_to_hf_hub` writes it; that function of timm's is private."""
    head = ["---", "tags:", *(f"- {tag}" for tag in card["tags"]), "pipeline_tag: image-classification"]
    head += ["library_name: timm", f"license: {card['license']}", "---", f"# Model card for {name}", ""]
    text = [card["description"], "", "## Model Details"]
    for title, value in card["details"].items():
        if isinstance(value, dict):
            text += [f"- **{title}:**", *(f"  - {key}: {item}" for key, item in value.items())]
        else:
            text.append(f"- **{title}:** {value}")
    text += ["", "## Model Usage", card["usage"]]
    if "citation" in card:
        text += ["", "## Citation", f"```bibtex\n{card['citation']}\n```"]
    return "\n".join([*head, *text]) + "\n"
