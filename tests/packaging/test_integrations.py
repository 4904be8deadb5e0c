"""Modules for frameworks ask for theirs alone, and say what to install where it is missing."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import fastsam.integrations

MODULES = [module.name for module in pkgutil.iter_modules(fastsam.integrations.__path__)]


def test_all_of_them_are_looked_at():
    assert MODULES == ["lightning", "timm", "transformers"]


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_framework_is_named_with_what_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"fastsam.integrations.{name}", raising=False)
    told = rf"fastsam\.integrations\.{name} needs {name}; pip install 'fastsam-torch\[frameworks\]'"
    with pytest.raises(ImportError, match=told):
        importlib.import_module(f"fastsam.integrations.{name}")


def test_fastsam_imports_none_of_them():
    code = f"import sys, fastsam; assert not [m for m in {['fastsam.integrations', *MODULES]} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)
