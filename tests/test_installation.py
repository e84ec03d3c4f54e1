"""The command that installs an extra, wherever the package came from; what extras need."""

import json
from importlib import metadata

import pytest

from diversevit_fast import installation
from diversevit_fast.errors import UsageError, require
from diversevit_fast.installation import extras, install_command, requirements

REQUIRES = """\
torch>=2.10
triton>=3.6; sys_platform == 'no such system'
timm>=1.0.20; extra == 'train'
Pillow; extra == 'train'
transformers>=4.50; extra == 'hf'
winner; extra == 'train' and sys_platform == 'no such system'
diversevit-fast[hf]; extra == 'recipes'
lightning; extra == 'recipes'
diversevit-fast[recipes,train]; extra == 'all'
"""


class Installed(metadata.Distribution):
    """A package whose installer left these files."""

    def __init__(self, **files):
        lines = [f"Requires-Dist: {line}" for line in REQUIRES.splitlines()]
        lines += [f"Provides-Extra: {name}" for name in ("train", "hf", "recipes", "all")]
        self.files_left = {"METADATA": "\n".join(["Name: diversevit-fast", *lines]), **files}

    def read_text(self, filename):
        return self.files_left.get(filename)

    def locate_file(self, path):
        raise NotImplementedError


@pytest.fixture
def comes(monkeypatch):
    """Make the package come from somewhere; ``None``: it is not installed."""

    def come(came: dict | None = None, installer: str | None = "pip") -> None:
        files = {"direct_url.json": came and json.dumps(came), "INSTALLER": installer}
        found = Installed(**files) if installer or came else None
        monkeypatch.setattr(installation, "distribution", lambda: found)

    return come


def test_from_a_checkout(comes, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    comes({"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert install_command("train") == f'pip install -e "{folder}[train]"'
    comes({"url": folder.as_uri(), "dir_info": {}})
    assert install_command("train") == f'pip install "{folder}[train]"'


def test_from_a_wheel(comes, tmp_path):
    wheel = tmp_path / "diversevit_fast-1.0-py3-none-any.whl"
    comes({"url": wheel.as_uri(), "archive_info": {}})
    assert install_command("hf") == 'pip install -e ".[hf]" in a checkout of this package'  # gone
    wheel.touch()
    assert install_command("hf") == f'pip install "{wheel}[hf]"'


def test_from_an_address(comes):
    comes({"url": "https://host/x.whl", "archive_info": {}})
    assert install_command("hf") == 'pip install "diversevit-fast[hf] @ https://host/x.whl"'
    comes({"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "0"}})
    assert install_command("hf") == 'pip install "diversevit-fast[hf] @ git+https://host/x.git"'


def test_from_an_index(comes):
    comes()
    assert install_command("hf") == 'pip install "diversevit-fast[hf]"'


def test_not_installed(comes):
    comes(installer=None)
    assert install_command("hf") == 'pip install -e ".[hf]" in a checkout of this package'
    assert extras() == requirements("hf") == []


def test_the_message_of_a_missing_package_ends_with_the_command():
    with pytest.raises(UsageError) as raised:
        require("no_such_package", extra="train")
    assert str(raised.value).endswith(f"; {install_command('train')}")


def test_what_extras_need(comes):
    pytest.importorskip("packaging")
    comes()
    assert extras() == ["all", "hf", "recipes", "train"]
    assert requirements() == ["torch"]
    assert requirements("train") == ["timm", "pillow"]
    assert requirements("recipes") == ["transformers", "lightning"]
    assert requirements("all") == ["transformers", "lightning", "timm", "pillow"]
