"""Folders are opened again by plain transformers only where a test asks for `verified`: it takes seconds a folder."""

import pytest


@pytest.fixture
def verified():
    return True


@pytest.fixture(autouse=True)
def unverified(monkeypatch, request):
    if "verified" not in request.fixturenames:
        monkeypatch.setattr("luffy.hf.saving._verify", lambda *arguments: None)
