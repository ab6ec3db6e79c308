"""Every command of README and docs can be pasted into bash and zsh as it is printed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(\.venv/bin/)?(deliberate|make|pip3?|python3?|git|cd|source|export)\s")
# What either shell expands or acts on outside quotes; zsh refuses a pattern that matches nothing,
# and without `interactivecomments` takes # and what follows it as arguments.
EXPANDED = set("[]{}*?()<>|&;!$`^#")
OPERATORS = {"|", "&&", "||", ">", "&"}


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of the commands of a page: fenced, indented, and in running text."""
    text = page.read_text(encoding="utf-8")
    prose, fenced, language = [], False, ""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            fenced, language = not fenced, line[3:].strip()
            prose.append("")
            continue
        if fenced:
            prose.append("")
            if language in ("", "sh", "bash", "zsh", "console") and line.strip():
                yield number, line.strip()
        elif line.startswith("    ") and COMMAND.match(line.strip() + " "):
            prose.append("")
            yield number, line.strip()
        else:
            # a heading is a synopsis: [--out FOLDER] is not typed
            prose.append("" if line.startswith("#") else line)
    joined = "\n".join(prose)
    for span in re.finditer(r"(?<!`)`([^`]+)`(?!`)", joined):
        code = " ".join(span.group(1).split())
        if COMMAND.match(code):
            yield joined.count("\n", 0, span.start()) + 1, code


def unsafe(command: str) -> list[str]:
    """What a shell would change of a command: each with the characters around it."""
    found, quote, word_start = [], "", True
    words = command.split(" ")
    at = 0
    for word in words:
        if not quote and word in OPERATORS:
            at += len(word) + 1
            continue
        for place, sign in enumerate(word):
            around = command[max(0, at + place - 12) : at + place + 12]
            if quote:
                if sign == quote:
                    quote = ""
                elif quote == '"' and sign in "$`!":
                    found.append(around)
            elif sign in "'\"":
                quote = sign
            elif sign in EXPANDED or (sign == "=" and word_start and place == 0):
                found.append(around)
        at += len(word) + 1
        word_start = True
    return [*found, "a quote is not closed"] if quote else found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_example_holds_a_sign_that_a_shell_expands(page):
    wrong = [
        f"{page.name}:{number}: {command}: {each}"
        for number, command in commands(page)
        for each in unsafe(command)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_pages_have_examples():
    counts = {page.name: len(list(commands(page))) for page in PAGES}
    assert counts["README.md"] > 20 and counts["cli.md"] > 5, counts


@pytest.mark.parametrize(
    ("command", "safe"),
    [
        ("deliberate eval modes=[dense]", False),
        ("deliberate eval 'modes=[dense]'", True),
        ('deliberate eval "modes=[dense]"', True),
        ("deliberate train data.weights={words:1}", False),
        ("deliberate train # a comment", False),
        ("deliberate train =x", False),
        ("deliberate generate 'open", False),
        ('deliberate generate "$HOME"', False),
        ("deliberate env --json > env.json", True),
        ("rm *.json", False),
    ],
)
def test_the_check_itself(command, safe):
    assert (not unsafe(command)) == safe


def test_bash_hands_every_example_on_as_it_is_printed(tmp_path):
    """With files around that an unquoted pattern would match, and patterns without match fatal."""
    for name in ("modes=d", "x"):
        (tmp_path / name).touch()
    script = ["shopt -s failglob", "deliberate() { printf '%s\\n' \"$#\"; }"]
    script += ['for name in make pip python python3 git; do eval "$name() { deliberate; }"; done']
    every = [c for page in PAGES for _, c in commands(page) if c.startswith("deliberate ")]
    script += [c for c in every if not re.search(r"(^| )(\||&&|>)( |$)", c)]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
