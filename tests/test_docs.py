"""What README and docs say is there: links, commands, flags, trainers and Python examples."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

import pytest

from tests.conftest import ROOT, clean_environment, run

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [(page, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_python_examples_run(page, code):
    exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"\b(?:docs|benchmarks|tests)/[\w/]+\.(?:md|py)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_nothing_is_left_to_be_filled_in(page):
    assert not re.search(r"@[A-Z]+@|\b[A-Z]+_TABLE\b|\bTODO\b|\bTBD\b", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_commands_exist(page):
    ours = {e.name for e in entry_points(group="console_scripts") if e.name.startswith("h2a_")}
    kinds = "convert|demo|plan|import|evaluate|crossval|compare|doctor"
    assert set(re.findall(rf"(?<![/\w])h2a_(?:{kinds})\w*(?![\w/.])", page.read_text())) <= ours


def test_flags_in_the_readme_are_the_commands():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "conversion.md").read_text()
    for name in ("cipa", "isanet", "h2aseg", "evaluation", "crossval"):
        text += (ROOT / "docs" / f"{name}.md").read_text()
    for command in ("h2a_convert_sts", "h2a_convert_autopet", "h2a_plan", "h2a_import_weights", "h2a_demo",
                    "h2a_evaluate", "h2a_crossval", "h2a_compare"):  # fmt: skip
        help_text = run(command, "--help", environment=clean_environment()).stdout
        for line in re.findall(rf"^{command} (.*)$", text, re.M):
            for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", line.split("#")[0]):
                assert flag in help_text, f"{command} {flag}"


def test_trainers_in_the_docs_are_found():
    from nnunet_h2a.trainers import TRAINERS

    pattern = r"nnUNetTrainer(?:H2ASeg|ISANet|CIPA|Demo)(?:Demo|PET|CT)?(?:_[a-zA-Z0-9]+)?(?![a-zA-Z0-9])"
    for page in PAGES:
        for name in re.findall(pattern, page.read_text()):
            assert name in TRAINERS, f"{page.name}: {name}"
