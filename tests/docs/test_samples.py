"""What README, docs and deploy show is what the programs take."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from resilver.config import load_agent_config, load_coordinator_config
from resilver.config_reload import RELOADABLE_AGENT, RELOADABLE_COORDINATOR
from resilver.errors import CLASSES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOADERS = {"agent.toml": load_agent_config, "coordinator.toml": load_coordinator_config}


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


SAMPLES = [(page.name, text) for page in PAGES for text in fences(page, "toml")]
SAMPLES += [(path.name, path.read_text()) for path in sorted((ROOT / "deploy").glob("*.toml"))]
COMMANDS = sorted(
    {
        line.removeprefix("$ ").split("   ")[0].split(" #")[0].strip()
        for page in PAGES
        for text in fences(page, "console")
        for line in text.splitlines()
        if line.startswith("$ resilver ")
    }
)


@pytest.mark.parametrize(("page", "text"), SAMPLES, ids=[f"{name}-{n}" for n, (name, _) in enumerate(SAMPLES)])
def test_every_sample_configuration_is_valid(page: str, text: str, tmp_path: Path) -> None:
    kind = page if page in LOADERS else text.splitlines()[0].lstrip("# ")
    path = tmp_path / "sample.toml"
    path.write_text(text)
    assert LOADERS[kind](path).cluster


def test_every_key_of_a_configuration_stands_in_its_sample() -> None:
    for name, loader in LOADERS.items():
        path = ROOT / "deploy" / name
        text = path.read_text()
        config = loader(path)
        fields = {
            field for field in config.__struct_fields__ if field not in ("stated", "tls", "limits", "space", "etcd")
        }
        assert not {field for field in fields if not re.search(rf"^(# )?(\[\[)?{field}\b", text, re.MULTILINE)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_shown_exists(command: str) -> None:
    words = shlex.split(command)
    nouns = {"certs", "node", "replica", "store", "volume"}
    verbs = [word for word in words[1:] if not word.startswith("-")][: 2 if words[1] in nouns else 1]
    shown = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
    done = subprocess.run(
        [sys.executable, "-m", "resilver.cli.main", *verbs, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not {option for option in shown if option not in done.stdout}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "check"):
        assert re.search(rf"^{target}:", text, re.MULTILINE)


def test_every_reloadable_key_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    keys = {key.split(".")[-1] for key in RELOADABLE_AGENT | RELOADABLE_COORDINATOR if not key.startswith("space.")}
    assert not {key for key in keys if key not in text}


def test_every_reason_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "reasons.md").read_text()
    missing = {reason for cls in CLASSES for reason in cls.reasons if f"`{reason}`" not in text}
    assert not missing
