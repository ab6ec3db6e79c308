"""The words that this project once had for things that the field has words for do not come back.

A lint: every docstring, comment, other string and name of the Python files, and README and docs,
is searched for the left-hand words below. A reader who knows the papers and nothing of this project
must understand every sentence, so a rule says which word to use. Run as a script,
`python tests/test_plain_english.py [FOLDER ...]`, it prints what it finds.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("deliberate", "kernels", "train", "eval", "configs")


@dataclass(frozen=True)
class Rule:
    """Words that are not used in this sense, and those that are.

    Attributes:
        say: what to write instead.
        text: regular expression over prose: docstrings, comments, strings and pages.
        name: regular expression over names, split into words at underscores and capitals.
    """

    say: str
    text: str = ""
    name: str = ""


_WHO = r"(?:tokens?|who|which|that|nobody|everyone|sequences?|rows?|drafts?|it|they|one|ones)"
_EXIT = r"(?:an?|the|this|that|its|each|every|no|some|one|all|any|these|those|three|two|\d)"

RULES = (
    Rule(
        "exits (early); no token exits",
        rf"\b{_WHO} (?:(?:may|can|must|would|will|never|ever|has|have|had|not|did|does|could) )*"
        r"(?:leaves?|left)\b(?! out| over| behind| to | by | of | for | in | alone| padd)"
        r"|\b(?:leaves?|left|leaving) (?:early|the network|there\b|it early|at half|after layer)"
        rf"|\b(?:leaves?|left|leaving) at {_EXIT}\b"
        r"|\bto leave(?:[;.,]| (?:early|there|at|here|where|with))|\bnobody leaves"
        r"|\b(?:never leave|leave (?:always|never|with it|as soon)|leave together)\b"
        r"|\bleaving\b(?! (?:\w+ ){0,2}out)"
        r"|\blets? (?:\w+ ){0,3}go\b(?! on)|\bleavers?\b",
        r"\bleav(?:e|es|ing|ers?)\b",
    ),
    Rule(
        "evaluate (an exit); evaluation pays",
        rf"\bask(?:s|ed|ing)? (?:{_EXIT} )?(?:exits?|gate|head|reader|probe)s?\b"
        r"|\b(?:exits?|gates?|heads?|probes?) (?:\w+ )?(?:is|are|was|were|be|being|not|never) "
        r"(?:\w+ )?asked\b|\basking (?:it|them|pays|an?|the|with|exits?)\b|\bworth asking\b"
        r"|\bexits? (?:that (?:is|are|was|were) )?asked\b|\bits asking\b",
        r"\bask(?:s|ing)\b|\bask exit",
    ),
    Rule(
        "deferred tokens, run in the same pass",
        r"\briders?\b|\brid(?:es?|ing) along",
        r"\briders?\b",
    ),
    Rule(
        "is pending (at an exit)",
        rf"\b(?:tokens?|states?|who|all|everyone|everything) (?:that |who )?(?:may )?waits?\b"
        rf"|\bwait(?:s|ing)? at {_EXIT}\b|\btokens? (?:may )?wait\b|\bwaiting tokens?\b",
    ),
    Rule(
        "is accepted",
        r"\b(?:tokens?|drafts?|answers?|guess|it|they|them|what|and|early|not|all) stands?\b"
        r"(?! for\b| in\b| on\b| at\b| beside\b| before\b| behind\b| there\b| between\b| above\b)"
        r"|\bstands? or (?:falls?|not)|\bto stand\b(?! in| for)",
        r"\bst(?:ands?|ood)\b",
    ),
    Rule(
        "is rolled back",
        r"\btak(?:es?|en|ing) (?:\w+ )?back\b|\btook (?:\w+ )?back\b",
        r"\btaken? back",
    ),
    Rule(
        "rejected draft", r"\brefus(?:ed|es?|al) (?:drafts?|tokens?)\b|\bdrafts? (?:\w+ )?refused\b"
    ),
    Rule(
        "the full-depth model predicts",
        r"\b(?:the )?(?:top|full depth) (?:says|said|answers|answered)\b"
        r"|\bwhat the (?:top|full depth) (?:says|said)\b|\bthe top's (?:word|answer|say)",
    ),
    Rule("repeats itself", r"\b(?:goes|go|going|went) round\b(?! in)"),
    Rule(
        "deliberation rounds, gate threshold",
        r"\bthink(?:s|ing)? (?:\w+ )?(?:again|twice|further|harder)\b|\b(?:second )?thoughts?\b"
        r"|\bthinks\b|\bthinking (?:round|token)s?\b"
        r"|\b(?:gate's|own|the|which|below its|of a) bands?\b"
        r"|\bexits and band\b|\bband of the gate",
        r"\bthoughts?\b|\bthink(?:s|ing)?\b|\bbands?\b",
    ),
    Rule(
        "lambda (seconds per expected disagreement); largest lambda; cost",
        r"\bdearest\b|\b(?:the|an?|one|its|this|that|each|every|same|which|per) prices?\b"
        r"|\b(?:of|under|by|at) prices?\b"
        r"|\bprices? (?:of the policy|is|are|that|list|grid|=)|\bpriced\b|\bfor the price\b",
        r"\bprices?\b|\bdearest\b|\bpriced\b",
    ),
    Rule("guarantee; to meet it", r"\bpromis(?:e|es|ed|ing)\b", r"\bpromis(?:e|es|ed|ing)\b"),
    Rule("exit policy", r"\bpac(?:er|ers|ing)\b", r"\bpac(?:er|ers|ing)\b"),
    Rule(
        "disable (for n tokens)",
        r"\b(?:planner|exits?|it|that) (?:\w+ )?(?:rests|rested|resting)\b(?! on)"
        r"|\bto rest\b(?! on)"
        r"|\bexit rests\b|\brests (?:an?|the|its|it|for)\b|\bplanner rests\b",
        r"\brest(?:s|ing|ed)\b|\blongest rest\b",
    ),
    Rule("discarded", r"\b(?:in )?vain\b", r"\bvain\b"),
    Rule(
        "evaluate; a probe pass; re-evaluate",
        r"\bglanc(?:e|es|ed|ing)\b|\b(?:sees?|saw|seen|looks?|looked) (?:\w+ ){0,3}again\b",
        r"\bglanc(?:e|es|ed|ing)\b",
    ),
    Rule("needs, lacks; what is missing", r"\bow(?:e|es|ed|ing)\b(?! to\b)", r"\bow(?:es?|ed)\b"),
    Rule("leased", r"\blent\b|\blend(?:s|ing)?\b", r"\blent\b|\blend\b"),
    Rule("head buffers", r"\bdesks?\b", r"\bdesks?\b"),
    Rule("step outputs", r"\btapes?\b", r"\btapes?\b"),
    Rule(
        "the value, what is allowed, what to do",
        r"\bis no (?:time|number|name|share|count|token|measure|probability|depth|layer)\b"
        r"|as if (?:it|they) had never been",
    ),
    Rule("full-depth pass", r"\bwhole pass(?:es)?\b", r"\bwhole pass"),
    Rule("token_range, position_range", name=r"\bspeaks of\b"),
)


@dataclass(frozen=True)
class Allowed:
    """Words of the left-hand side that stay, and why.

    Attributes:
        where: path, or beginning of paths, from the root of the repository.
        text: regular expression that the line's text must match.
        reason: why it stays.
    """

    where: str
    text: str
    reason: str


ALLOWED = (
    Allowed("CHANGELOG.md", r"^\| `", "the table of renamed settings names the old ones"),
    Allowed(
        "deliberate/", r"^RENAMED|^    +\"[\w.]+\": \"[\w.]+\",$", "tables of renamed settings"
    ),
    Allowed("", r"\bleave=", "an argument of tqdm"),
    Allowed(
        "deliberate/calibration/certificate.py", r'"price"', "a key of version 1 of certificates"
    ),
    Allowed(
        "eval/",
        r"\b(?:price|prices|band|leaving)\b(?: ?[:=]|\.| is|:)",
        "keys of version 1 of reports",
    ),
    Allowed("", r"\bthinking_token_budget\b", "vLLM's name of a request's field"),
    Allowed(
        "",
        r"\b(?:max_thinking_tokens|thinking_budget_tokens|thinking_budget)\b",
        "names of a request's field in NIM, llama.cpp and SGLang",
    ),
    Allowed("", r"\bthink_below\b", "a key of version 1 of a gate's saved configuration"),
    Allowed("deliberate/cost/", r"\bthinking\b", "a key of version 1 of stored cost models"),
    Allowed("deliberate/reasoning/", r"\bbands?\b|Bands?|_bands", "bands of confidence, no gate's"),
    Allowed("eval/benchmarks/", "bands", "bands of confidence, no gate's"),
    Allowed("configs/bench_chains.yaml", r"\bbands?\b", "bands of confidence, no gate's"),
    Allowed("docs/cli.md", r"\bbands\b", "bands of confidence, no gate's"),
    Allowed("deliberate/utils/hydra_config.py", "leaves", "a tree's leaves"),
    Allowed(
        "deliberate/data/word_problems.py",
        r"price|leaves?|left|cost",
        "the grammar's own sentences: changing one changes the bundled data set",
    ),
)

# Rooms that use the field's words and stay so: the beginning of paths from the root.
CLEAN: tuple[str, ...] = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/concepts.md",
    "docs/extending.md",
    "docs/performance.md",
    "docs/calibration.md",
    "docs/decoding.md",
    "docs/deliberation.md",
    "docs/kernels.md",
    "docs/longtext.md",
    "docs/architectures.md",
    "docs/cli.md",
    "docs/serving.md",
    "docs/reasoning.md",
    "docs/training.md",
    "deliberate/__init__.py",
    "deliberate/api/",
    "deliberate/cache/",
    "deliberate/calibration/",
    "deliberate/cli/",
    "deliberate/config.py",
    "deliberate/cost/",
    "deliberate/data/",
    "deliberate/engine/",
    "deliberate/modeling/",
    "deliberate/policies/",
    "deliberate/reasoning/",
    "deliberate/serving/",
    "deliberate/trace.py",
    "deliberate/utils/",
    "deliberate/executors/",
    "deliberate/installation.py",
    "deliberate/checkpoints/",
    "kernels/native",
    "kernels/ops/",
    "kernels/tools/",
    "configs/",
    "train/",
    "eval/",
)


@dataclass(frozen=True)
class Find:
    """A left-hand word: where it is and what to say."""

    path: str
    line: int
    word: str
    say: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word!r}: say {self.say}"


def words(name: str) -> str:
    """A name's words in lower case: ``_countVain_2`` is "count vain 2"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return " ".join(part for part in apart.lower().split("_") if part)


def python_texts(source: str) -> Iterator[tuple[str, int, str]]:
    """Kind ("name" or "text"), line and text of what a Python file says.

    Comments that follow one another are one text, as are the lines of a string, so that a phrase is
    found across a line's end.
    """
    comments: list[str] = []
    began = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#: ")
            if comments and token.start[0] == last + 1:
                comments.append(text)
            else:
                if comments:
                    yield "text", began, "\n".join(comments)
                comments, began = [text], token.start[0]
            last = token.start[0]
        elif token.type == tokenize.NAME:
            yield "name", token.start[0], words(token.string)
        elif token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            yield "text", token.start[0], token.string
    if comments:
        yield "text", began, "\n".join(comments)


def page_texts(source: str) -> Iterator[tuple[str, int, str]]:
    """The same of a Markdown page, a paragraph a text; fenced blocks in JSON are file formats."""
    paragraph: list[str] = []
    began, skipped, fenced = 1, False, False
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        if line.startswith("```"):
            fenced = not fenced
            skipped = fenced and line[3:].strip() in ("json", "jsonl")
        if line.strip() and not skipped and not line.startswith("```"):
            if not paragraph:
                began = number
            paragraph.append(line)
        elif paragraph:
            yield "text", began, "\n".join(paragraph)
            paragraph = []


def searched(kind: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Offset, word and what to say of every left-hand word in a text."""
    flat = re.sub(r"\s", " ", text)
    # Offsets in `flat` are those in `text`; runs of blanks are one for the rules.
    thin = [i for i, c in enumerate(flat) if c != " " or not i or flat[i - 1] != " "]
    once = "".join(flat[i] for i in thin)
    for rule in RULES:
        pattern = rule.name if kind == "name" else rule.text
        if pattern:
            for match in re.finditer(pattern, once, re.IGNORECASE):
                yield thin[match.start()], match.group(), rule.say


def files(rooms: tuple[str, ...] = ()) -> Iterator[Path]:
    """Python files, YAML settings, README and docs; only those under `rooms` where any is given."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found += sorted((ROOT / "configs").rglob("*.yaml"))
    found += sorted((ROOT / "eval").rglob("*.j2"))
    found += sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        if not rooms or name.startswith(rooms):
            yield path


def finds(path: Path, source: str | None = None) -> list[Find]:
    """Every left-hand word of a file that is not allowed there."""
    text = path.read_text(encoding="utf-8") if source is None else source
    name = path.relative_to(ROOT).as_posix()
    lines = text.split("\n")
    found = []
    for kind, line, said in (python_texts if path.suffix == ".py" else page_texts)(text):
        for offset, word, say in searched(kind, said):
            at = line + said[:offset].count("\n")
            whole = lines[at - 1]
            if not any(name.startswith(a.where) and re.search(a.text, whole) for a in ALLOWED):
                found.append(Find(name, at, word, say))
    return found


@pytest.mark.parametrize("room", CLEAN)
def test_a_room_uses_the_fields_words(room):
    found = [str(find) for path in files((room,)) for find in finds(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ('"""A token leaves at an exit."""\n', "token leaves"),
        ("# nobody\n# leaves\n", "nobody leaves"),
        ("riders = 1\n", "riders"),
        ("def countVain(): pass\n", "vain"),
        ("raise E(f'{x} is no time')\n", "is no time"),
        ("x = 'the promise\\'s'\n", "promise"),
    ],
)
def test_the_lint_finds_comments_strings_and_names(source, word):
    found = finds(ROOT / "deliberate" / "new.py", source)
    assert [find.word for find in found] == [word]


@pytest.mark.parametrize(
    "source",
    [
        '"""A token exits early; what is left out is zero. The rest waits for a copy."""\n',
        "left, right, rest, asked = 1, 2, 3, 4\n",
        '"""K stands for an exit. Nothing leaves the machine."""\n',
    ],
)
def test_the_lint_lets_common_english_pass(source):
    assert not finds(ROOT / "deliberate" / "new.py", source)


def test_every_exception_is_needed_and_has_a_reason():
    for allowed in ALLOWED:
        assert allowed.reason and (not allowed.where or (ROOT / allowed.where).exists())


if __name__ == "__main__":
    for each in files(tuple(sys.argv[1:])):
        for find in finds(each):
            print(find)
