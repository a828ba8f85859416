"""A run so small that a test may make several."""

import pytest

from tests.tiny import tiny_config, write_fashion_mnist


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory):
    """A folder of Fashion-MNIST files with 80 training and 20 test images."""
    folder = tmp_path_factory.mktemp("images")
    write_fashion_mnist(folder, 80, 20)
    return folder


@pytest.fixture
def tiny(tiny_images, tmp_path):
    """Five updates of 16 images per epoch, two epochs; everything random is on."""
    return tiny_config(tiny_images, tmp_path / "run")
