"""The configuration: types, paths and ranges, and errors that name them."""

import json

import pytest

from vmoe_torch.recipes import load_recipe, recipe_names
from vmoe_torch.train import Config


@pytest.mark.parametrize(
    ("assignment", "section", "name", "value"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("optim.betas=0.9,0.95", "optim", "betas", (0.9, 0.95)),
        ("optim.betas=[0.9, 0.95]", "optim", "betas", (0.9, 0.95)),
        ("optim.clip_norm=none", "optim", "clip_norm", None),
        ("optim.ema_decay=0.99", "optim", "ema_decay", 0.99),
        ("schedule.epochs=3", "schedule", "epochs", 3),
        ("schedule.epochs=3.0", "schedule", "epochs", 3),
        ("run.compile=True", "run", "compile", True),
        ("run.output=a=b", "run", "output", "a=b"),
        ("data.mean=0.5", "data", "mean", (0.5,)),
        ("model.kwargs.num_experts=8", "model", "kwargs", {"num_experts": 8}),
        ("model.kwargs.moe_layers=last2", "model", "kwargs", {"moe_layers": "last2"}),
        ("model.kwargs.moe_layers=[1, 3]", "model", "kwargs", {"moe_layers": [1, 3]}),
        ('model.kwargs={"class_token": false}', "model", "kwargs", {"class_token": False}),
    ],
)
def test_override_sets(assignment, section, name, value):
    got = getattr(getattr(Config().override(assignment), section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrate=1", r"unknown config key 'optim\.lrate'; did you mean .*optim\.lr"),
        ("optim.learning_rate=1", r"unknown config key 'optim\.learning_rate'; did you mean optim\.lr"),
        ("run.amp=bfloat16", r"unknown config key 'run\.amp'; did you mean run\.precision"),
        ("optim.zzzzzz=1", r"unknown config key 'optim\.zzzzzz'"),
        ("learning=1", "unknown config key 'learning'"),
        ("optim.lr.x=1", r"optim\.lr must be of type float"),
        ("optim=1", "optim must be changed by its own keys, got '1'"),
        ("optim.lr=fast", r"optim\.lr must be of type float, got 'fast'"),
        ("schedule.epochs=1.5", r"schedule\.epochs must be of type int, got 1\.5"),
        ("schedule.epochs=true", r"schedule\.epochs must be of type int, got True"),
        ("run.compile=1", r"run\.compile must be of type bool, got 1"),
        ("optim.betas=0.9", r"optim\.betas must have 2 values, got 1"),
        ("optim.betas=a,b", r"optim\.betas must be of type float, got 'a'"),
        ("optim.lr", "an override must read key=value, got 'optim.lr'"),
        ("model.kwargs=8", "model.kwargs must be a JSON object"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ValueError, match=message):
        Config().override(assignment)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr=-1", r"optim\.lr must be at least 0 and finite, got -1"),
        ("optim.lr=NaN", r"optim\.lr must be at least 0 and finite, got nan"),
        ("optim.clip_norm=0", r"optim\.clip_norm must be above 0 or null, got 0"),
        ("optim.ema_decay=1", r"optim\.ema_decay must be in \[0, 1\), got 1"),
        ("data.batch_size=0", r"data\.batch_size must be at least 1"),
        ("run.precision=int8", r"run\.precision must be one of float32, bfloat16, float16, got 'int8'"),
        ("schedule.name=plateau", r"schedule\.name must be one of cosine"),
        ("data.name=folder", r"data\.root must name the folder of images"),
        (
            "data.name=wds/cars",
            r"data\.name must be one of folder, video, .*, wds/, .*, got 'wds/cars'",
        ),
    ],
)
def test_check_refuses(assignment, message):
    config = Config().override("data.name=fashion_mnist")
    config.check()
    with pytest.raises(ValueError, match=message):
        config.override(assignment).check()


def test_override_leaves_the_original_alone():
    config = Config().override("model.kwargs.depth=4")
    config.override("model.kwargs.depth=6", "optim.lr=1")
    assert config.model.kwargs == {"depth": 4}
    assert config.optim.lr == Config().optim.lr


def test_config_survives_json(tmp_path):
    config = load_recipe("fashion_mnist").override("optim.betas=0.9,0.95", "data.auto_augment=rand-m5")
    assert Config.from_dict(config.to_dict()) == config
    (tmp_path / "c.json").write_text(config.to_json())
    assert Config.from_file(tmp_path / "c.json") == config


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_config_file_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"config file .*c\.json"):
        Config.from_file(path)


def test_config_file_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"run": {"sed": 1}}))
    with pytest.raises(ValueError, match=r"unknown config key 'run\.sed'; did you mean run\.seed"):
        Config.from_file(tmp_path / "c.json")


def test_recipes_are_sound_and_unknown_ones_named():
    for name in recipe_names():
        # Some leave it to the user where the images are.
        load_recipe(name).override("data.root=images").check()
    with pytest.raises(ValueError, match=r"recipe must be one of .*fashion_mnist.*, got 'mnist'"):
        load_recipe("mnist")
