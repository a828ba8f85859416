"""Two packages from one tree: vmoe_torch (src/) and vmoe_kernels (kernels/); pyproject.toml describes them."""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

HERE = Path(__file__).parent
ROOTS = ("src", "kernels")


def readme(repository: str) -> str:
    """README.md for a package index, which has no files beside it: what it links and shows is at the repository."""

    def absolute(link: re.Match) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({repository}/{kind}/HEAD/{link['path']})"

    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)]+)\)", absolute, text)


class StaticEditable(editable_wheel):
    """Editable installs by a .pth file with both roots.

    For packages from two folders setuptools would install an import hook, which type checkers and editors do not run:
    to them the packages would not exist. There is no public way to ask for the file; without these two private names
    the install is the hook again, and tests/test_package.py says so.
    """

    def _select_strategy(self, name, tag, build_lib):
        try:
            from setuptools.command.editable_wheel import _StaticPth
        except ImportError:
            return super()._select_strategy(name, tag, build_lib)
        if self.mode == "strict":
            return super()._select_strategy(name, tag, build_lib)
        return _StaticPth(self.distribution, name, [HERE / root for root in ROOTS])


setup(
    long_description=readme(tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["urls"]["Repository"]),
    long_description_content_type="text/markdown",
    package_dir={"": "src", "vmoe_kernels": "kernels/vmoe_kernels"},
    packages=[*find_packages("src"), *find_packages("kernels")],
    package_data={"vmoe_torch": ["py.typed"], "vmoe_kernels": ["py.typed"], "vmoe_torch.data": ["fashion_mnist/*"]},
    cmdclass={"editable_wheel": StaticEditable},
)
