"""The documentation: it builds, says nothing of what is not there, leaves out nothing that is, and its example runs."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from support.every_method import PATTERNS, EveryMethod, layer
from support.imports import KNOWN_TO_A_METHOD, imports
from support.paths import ROOT

import secateur
from secateur.cli.app import app
from secateur.deployment.formats import FORMATS
from secateur.deployment.sparsity_support import RULES
from secateur.methods import METHODS, REFINEMENTS, SWITCHES
from secateur.methods.base import importance
from secateur.methods.cost import Cost
from secateur.methods.least_squares import normalise
from secateur.methods.statistics import Stats
from secateur.pruning.planning.forecast import lines as forecast_lines
from secateur.pruning.planning.measured import ALLOCATIONS
from secateur.pruning.structured.channel_scores import SELECTIONS
from secateur.pruning.structured.depth import BLOCKS
from secateur.pruning.structured.expert_scores import EXPERTS

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
IDENTIFIERS = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# What is said of the package


def test_the_reference_names_what_is_public_and_nothing_else():
    assert sorted(name.rpartition(".")[2] for name in IDENTIFIERS) == secateur.__all__
    for identifier in IDENTIFIERS:
        module, _, name = identifier.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(secateur, name)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_what_is_public_is_documented_where_it_is_defined(identifier):
    """`__doc__` alone would not do: that of a table is what dict says of itself."""
    module, _, name = identifier.rpartition(".")
    body = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")).body
    for number, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            assert ast.get_docstring(node)
            return
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == name:
            after = body[number + 1]
            assert isinstance(after, ast.Expr)
            assert isinstance(after.value, ast.Constant)
            return
    pytest.fail(f"{identifier} is defined elsewhere")


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("methods.md", [*METHODS, *(f"+{name}" for name in (*REFINEMENTS, *SWITCHES)), "uniform", *ALLOCATIONS]),
        ("structured.md", [*SELECTIONS, *BLOCKS, *EXPERTS]),
        ("deploying.md", [name for name in RULES if name != "packed-int8"]),
        ("deploying.md", list(FORMATS)),
    ],
    ids=["methods", "structures", "runtimes", "formats"],
)
def test_every_line_of_a_table_is_described(page, names):
    text = read(f"docs/{page}")
    assert [name for name in names if f"`{name}`" not in text and f"`…{name}`" not in text] == []


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `secateur …` line in blocks of code, without comments."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```|((?:^    [^\n]*\n)+)", text, re.M | re.S):
        for line in "".join(block).splitlines():
            if found := re.match(r"\s*(?:\$ )?secateur (.*?)(?:\s+# .*)?$", line):
                yield found[1].split()


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_commands_exist_with_their_options(file):
    known = typer.main.get_command(app)
    for first, *words in commands(file.read_text(encoding="utf-8")):
        if first.startswith("-"):
            assert first in ("--version", "--help", "--install-completion", "--show-completion")
            continue
        assert first in known.commands, f"secateur {first}"  # type: ignore[attr-defined]
        options = {o for p in known.commands[first].params for o in p.opts}  # type: ignore[attr-defined]
        assert {word for word in words if word.startswith("--")} <= options, (first, words)


# Links, navigation, and files for people who work on it


def navigation(entries: list) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from navigation(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    assert sorted(navigation(yaml.safe_load(read("mkdocs.yml"))["nav"])) == sorted(page.name for page in PAGES)


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.name)
def test_links_lead_to_files(file):
    links = re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text(encoding="utf-8"), flags=re.S)
    )
    inside = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in inside if link and not (file.parent / link).exists()] == []


def test_the_citation_is_valid_and_of_this_version():
    cited, project = yaml.safe_load(read("CITATION.cff")), tomllib.loads(read("pyproject.toml"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what CFF 1.2.0 wants
    assert cited.keys() <= {"cff-version", "message", "title", "authors", "abstract", "type", "version", "license",
                            "keywords"}  # fmt: skip
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["authors"] == [{"name": "The Secateur authors"}]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])


def test_contributing_is_short():
    assert len(read("CONTRIBUTING.md").splitlines()) < 60


# The site


class Page(HTMLParser):
    """What a built page refers to, what can be referred to in it, and what it would fetch."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.anchors.add(held.get("id") or "")
        address = held.get("href") or held.get("src") or ""
        if tag == "a":
            self.links.add(address)
        elif tag in ("link", "script", "img", "iframe") and held.get("rel") not in ("next", "prev", "canonical"):
            self.fetched.add(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_the_site_has_every_page_and_nothing_from_elsewhere(site):
    pages = {file.name: Page(file) for file in site.glob("*.html") if file.name != "404.html"}
    assert pages.keys() == {f"{page.stem}.html" for page in PAGES}
    for name, page in pages.items():
        assert pages.keys() <= {link.partition("#")[0] or name for link in page.links} | {name}, "not in the navigation"
        for address in page.fetched:
            assert not re.match(r"(https?:)?//", address), f"{name} fetches {address}"
        for link in page.links:
            if re.match(r"https?:", link) or not link:
                continue
            target, _, anchor = link.partition("#")
            assert (site / (target or name)).is_file(), f"{name} links to {link}"
            assert anchor in pages.get(target or name, page).anchors, f"{name} links to {link}"


def test_the_site_holds_the_docstrings(site):
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    for identifier in IDENTIFIERS:
        assert identifier in Page(site / "api.html").anchors
    assert "Prune a model and write the result to the folder out" in text, "the function, not its module"


# The example of a method


@pytest.fixture
def table() -> Iterator[dict]:
    """The methods, given back as they were."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def block(title: str) -> str:
    found = re.findall(
        rf'^```python title="{re.escape(title)}"\n(.*?)^```$', read("docs/adding-a-method.md"), re.M | re.S
    )
    assert len(found) == 1, title
    return found[0]


def executed(*titles: str, **names: object) -> dict:
    held = dict(names)
    for title in titles:
        exec(compile(block(title), title, "exec"), held)
    return held


@pytest.fixture
def surgeon(table: dict) -> Iterator[secateur.Method]:
    """The method of the example, in the table by the line of the example."""
    held = executed("src/secateur/methods/surgeon.py")
    table |= eval("{" + block("the line in METHODS") + "}", held)
    return table["surgeon"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["surgeon", "surgeon+refit", "surgeon+swap"])
@pytest.mark.usefixtures("surgeon")
def test_the_example_passes_what_every_method_passes(name, pattern):
    checks = [getattr(EveryMethod(), check) for check in dir(EveryMethod) if check.startswith("test_")]
    assert len(checks) > 5
    for check in checks:
        check(name, pattern)


def test_the_example_equals_its_reference(surgeon):
    titles = ("tests/reference/surgeon.py", "in tests/methods/test_methods.py")
    names = {"surgeon": surgeon, "layer": layer, "Stats": Stats, "normalise": normalise, "np": np}
    executed(*titles, **names)["test_surgeon_costs_what_leaving_out_one_weight_costs"]()


def test_the_example_keeps_to_the_layers_and_documents_itself(tmp_path):
    file = tmp_path / "surgeon.py"
    file.write_text(block("src/secateur/methods/surgeon.py"), encoding="utf-8")
    assert set(imports(file)) <= KNOWN_TO_A_METHOD
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_a_method_is_added_without_touching_the_package(table, tiny_llama, text_file, tmp_path):
    executed("from your own code")
    report = secateur.prune(
        tiny_llama, out=tmp_path / "out", method="half-wanda+refit", calibration=str(text_file), samples=4, seq_len=32
    )
    assert report.sparsity == 0.5


@pytest.mark.parametrize(
    "method", ["half-wanda", "half-wanda+refit", "half-wanda+swap", "half-wanda+refit+dense-target"]
)
def test_a_method_of_ones_own_runs_under_a_limit_and_is_not_forecast(method, table, tiny_llama, text_file, tmp_path):
    executed("from your own code")
    report = secateur.prune(
        tiny_llama, out=tmp_path / "out", method=method, calibration=str(text_file), samples=4, seq_len=32,
        memory="10MB",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "pruning.json").read_text(encoding="utf-8"))
    assert (report.sparsity, record["options"]["passes"]) == (0.5, "two")
    assert "does not say what it costs" in report.note
    assert record["note"] == report.note
    foreseen = secateur.forecast(tiny_llama, method=method, samples=4, seq_len=32, memory="10MB")
    assert (foreseen.memory, foreseen.operations, foreseen.seconds, foreseen.fits) == ({}, {}, None, None)
    assert (foreseen.passes, foreseen.left_out[-1]) == ("two", report.note)
    assert foreseen.disk_bytes > 0
    assert report.note in forecast_lines(foreseen)


def test_a_method_of_ones_own_that_states_its_cost_is_forecast(table, tiny_llama):
    wanda, ours = secateur.METHODS["wanda"], secateur.scored({"square"}, "row", importance, cost=Cost())
    secateur.METHODS["ours"] = ours
    options = {"samples": 4, "seq_len": 32, "measure": False}
    for refinement in ("", "+refit", "+swap", "+refit+dense-target", "+refine"):
        known = secateur.forecast(tiny_llama, method=f"wanda{refinement}", **options)
        found = secateur.forecast(tiny_llama, method=f"ours{refinement}", **options)
        assert (found.memory, found.operations) == (known.memory, known.operations)
    assert wanda.cost == ours.cost


def test_the_program_in_the_reference_is_a_program():
    code = re.search(r"```python\n(.*?)```", read("docs/api.md"), re.S)
    assert code
    call = ast.parse(textwrap.dedent(code[1])).body[1]
    assert isinstance(call, ast.Assign)
    assert isinstance(call.value, ast.Call)
    assert {k.arg for k in call.value.keywords} <= secateur.prune.__annotations__.keys()
