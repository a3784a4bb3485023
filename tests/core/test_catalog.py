"""The folder is the registry."""

from __future__ import annotations

import pytest

from equipoise.core import catalog
from equipoise.core.errors import EquipoiseError, UsageError, nearest


def test_names_are_the_modules_without_an_underscore():
    found = catalog.names("core")
    assert {"files", "settings", "runs", "catalog"} <= set(found)
    assert found == sorted(found)
    assert not [name for name in catalog.names("cli") if name.startswith("_")]


def test_module_gives_the_thing_and_an_unknown_name_the_nearest():
    assert catalog.module("core", "errors").EquipoiseError is EquipoiseError
    with pytest.raises(UsageError, match="Did you mean 'settings'"):
        catalog.module("core", "setings")


def test_underscored_machinery_is_not_a_thing():
    with pytest.raises(UsageError, match="no cli entry named '_output'"):
        catalog.module("cli", "_output")


def test_nearest_lists_all_where_none_is_close():
    assert nearest("zzz", ["beta", "alpha"]) == " Known: alpha, beta."
    assert nearest("bta", ["beta", "alpha"]) == " Did you mean 'beta'?"
    assert nearest("x", []) == ""
