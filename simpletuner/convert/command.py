"""Reads shell text with one command line of the scripts: exports, continued lines, the launcher's flags, the script's.

Nothing is run: a word with a command substitution is refused.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from simpletuner.config.errors import Problems, UserError, suggestion
from simpletuner.convert.flags import LAUNCH_FLAGS, LAUNCH_GROUPS, SCRIPTS, flags_of

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SHORT = {"-q": "--quiet", "-m": "--module", "-t": "--tee"}


@dataclass(frozen=True)
class Command:
    """One command line, read."""

    script: str
    given: Mapping[str, str]
    """Flag of the script -> its text; "true" for a switch."""
    launcher: Mapping[str, str]
    """Flag of ``accelerate launch`` -> its text."""
    environment: Mapping[str, str]
    """Variables that are set for this command."""
    with_accelerate: bool


def read_command(text: str, environ: Mapping[str, str]) -> Command:
    """Returns the command line in a shell text.

    Args:
        text: The command, over as many lines as it likes, with the ``export`` lines before it.
        environ: For ``$NAME`` that the text does not set; a name that is nowhere set becomes ``{env:NAME}``, which the
            config files look up when they are read.

    Raises:
        UserError: It is no command of the five scripts, or has flags that they do not know.
    """
    known, words, own = dict(environ), list[str](), dict[str, str]()
    # A line of flags goes on with the command before it: within quotes nobody writes the backslashes.
    for line in re.sub(r"\\\s*\n|\n\s*(?=-)|\\\s*$", " ", text).splitlines():
        found = [_expanded(word, known) for word in _split(line)]
        if found[:1] == ["export"]:
            found = found[1:]
        own = {}
        while found and (match := _ASSIGNMENT.fullmatch(found[0])):
            own[match[1]] = match[2]
            found = found[1:]
        if not found:
            known |= own
        elif any(PurePosixPath(word).name in SCRIPTS for word in found):
            words = found
            break
    place = next((i for i, word in enumerate(words) if PurePosixPath(word).name in SCRIPTS), None)
    if place is None:
        raise UserError("convert-command: no command line of these scripts: " + ", ".join(SCRIPTS))
    problems = Problems()
    script = PurePosixPath(words[place]).name
    launcher = _launcher(words[:place], problems)
    flags = {name: flag.switch for name, flag in flags_of(SCRIPTS[script]).items()}
    given = _read_flags(words[place + 1 :], flags, script, problems)
    problems.raise_any()
    return Command(script, given, launcher, own, "accelerate" in words[:place])


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"convert-command: a quote is not closed in: {line.strip()}") from error


def _expanded(word: str, known: Mapping[str, str]) -> str:
    """Returns a word with its variables replaced."""
    if "$(" in word or "`" in word:
        raise UserError(f"convert-command: '{word}' runs a command; write what it prints")
    return re.sub(
        r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))",
        lambda match: known.get(match[1] or match[2], f"{{env:{match[1] or match[2]}}}"),
        word,
    )


def _launcher(words: Sequence[str], problems: Problems) -> dict[str, str]:
    """Returns the flags of ``accelerate launch``; of another launcher only what needs no translation is taken."""
    rest = [word for word in words if PurePosixPath(word).name not in ("python", "python3", "accelerate", "launch")]
    if rest and "accelerate" not in words:
        problems.lines.append(
            f"convert-command: '{' '.join(words)}': write the command as accelerate launch [flags] script"
        )
        return {}
    switches = {name: flag.switch for name, flag in LAUNCH_FLAGS.items()}
    kept: list[str] = []
    skip = False
    for word in rest:
        name = _SHORT.get(word, word).removeprefix("--").partition("=")[0].replace("-", "_")
        reason = next((why for start, why in LAUNCH_GROUPS.items() if name.startswith(start)), None)
        if word.startswith("-") and reason and name not in switches:
            problems.lines.append(f"accelerate launch --{name}: not supported: {reason}")
            skip = "=" not in word
        elif not skip or word.startswith("-"):
            _, equals, value = word.partition("=")
            kept.append(f"--{name}{equals}{value}" if word.startswith("-") else word)
            skip = False
        else:
            skip = False
    found = _read_flags(kept, switches, "accelerate launch", problems)
    for name in found:
        if LAUNCH_FLAGS[name].target == "refused":
            problems.lines.append(f"accelerate launch --{name}: not supported: {LAUNCH_FLAGS[name].note}")
    return found


def _read_flags(words: Sequence[str], switches: Mapping[str, bool], owner: str, problems: Problems) -> dict[str, str]:
    """Returns flag -> text; as argparse does it: ``--a=b``, ``--a b``, beginnings of names, and the last one wins.

    Args:
        words: The words behind the owner.
        switches: Known flag -> whether it stands without a value.
        owner: Whose flags they are, for messages.
        problems: Takes a line for each word that is not understood.
    """
    found: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        if waiting is not None:
            found[waiting], waiting = word, None
            continue
        flag, equals, value = word.partition("=")
        name = _whole_name(flag.removeprefix("--"), switches) if flag.startswith("--") else None
        if name is None:
            hint = suggestion(flag.removeprefix("--"), switches) if flag.startswith("--") else ""
            problems.lines.append(f"{owner}: '{flag}': it has no such flag{hint}")
        elif switches[name]:
            found[name] = "true"
        elif equals:
            found[name] = value
        else:
            waiting = name
    if waiting is not None:
        problems.lines.append(f"{owner}: --{waiting}: its value is missing")
    return found


def _whole_name(begun: str, known: Mapping[str, bool]) -> str | None:
    """Returns the one flag that a word is, or is the beginning of."""
    if begun in known:
        return begun
    ways = [name for name in known if name.startswith(begun)]
    return ways[0] if len(ways) == 1 and begun else None
