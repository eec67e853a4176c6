"""The site of the documentation: built without a warning, its pages there, its first page README's."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.commands import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")


def test_the_site_is_built_without_a_warning(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr.strip(), done.stdout + done.stderr
    first = re.sub(r"<[^>]+>", "", (tmp_path / "site" / "index.html").read_text("utf-8"))
    assert "make demo" in first and "make test" in first
