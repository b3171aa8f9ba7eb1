"""`olmo --help`, the help of every command, and what shells complete."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from olmo import cli
from olmo.commands import USER_COMMANDS, build_parser, command_groups, commands, load_command
from olmo.completion import completion
from olmo.usage import parse_docstring

USERS = [verb for group in USER_COMMANDS.values() for verb in group]


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("verb", commands())
def test_every_command_and_option_is_described(verb: str):
    parser = build_parser(verb, load_command(verb))
    assert parser.description and parser.description[0].isupper()
    for action in parser._actions:
        meaning = (action.help or "").split(" (")[0]
        assert meaning, f"{verb} {action.dest}: add it to Args: of the docstring"
    assert max(map(len, parser.format_help().splitlines())) <= 80
    if verb not in USERS:
        return
    assert parser.epilog, f"{verb}: add an Example: to the docstring"
    for line in parser.epilog.splitlines()[1:]:
        check_example(line, verb)


def check_example(line: str, verb: str = "") -> None:
    """An example is a command line that can be parsed, up to where the shell's part begins."""
    command = next(part for part in line.replace('eval "$(', "").split("#")).split(" | ")[0]
    command = command.split(" < ")[0].split(" > ")[0].replace(')"', "")
    olmo, *words = shlex.split(command)
    found = " ".join(words[: 1 + (verb or "").count(" ")])
    assert olmo == "olmo" and found == (verb or found)
    rest = words[1 + found.count(" ") :]
    if "--help" not in rest:
        build_parser(found, load_command(found)).parse_args(rest)


def test_the_overview_is_not_cut_and_begins_with_the_user_s_commands(capsys):
    cli.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    headings = [line.removesuffix(":") for line in lines if line.endswith(":")]
    assert headings == [*command_groups(), "examples"]
    assert headings[0] == "from text to a run" and headings[-2].startswith("stages")
    for line in cli.EXAMPLES:
        check_example(line)


def test_every_rule_has_a_description_for_snakemake_list():
    root = Path(__file__).parents[2]
    for file in (root / "Snakefile", *(root / "rules").glob("*.smk")):
        rules = re.findall(r"^(?:rule|checkpoint) (\w+):\n(.*)", file.read_text(), re.M)
        assert not [name for name, first in rules if not first.startswith('    """')], file


def test_a_docstring_s_parts():
    text = """Do it. Then rest.

More of it.

Args:
    one: the first,
        on two lines
    two: the second

Example:
    olmo do 1

Raises ValueError for three."""
    usage = parse_docstring(text)
    assert usage.summary == "Do it"
    assert usage.description == "Do it. Then rest.\n\nMore of it."
    assert usage.options == {"one": "the first, on two lines", "two": "the second"}
    assert usage.examples == "olmo do 1"


def test_what_is_misspelt_is_told_the_nearest(capsys):
    for words, told in (
        (["generat"], "unknown command 'generat'; the nearest: generate; olmo --help lists all"),
        (["store", "verfy"], "unknown command 'store verfy'; the nearest: store verify, store"),
    ):
        with pytest.raises(SystemExit, match=told):
            cli.main(words)
    with pytest.raises(SystemExit):
        cli.main(["generate", "olmo-tiny", "--prompt", "a", "--temprature", "1"])
    assert capsys.readouterr().err == (
        "olmo generate: unknown option --temprature; the nearest is --temperature; "
        "olmo generate --help shows all options\n"
    )


def completed(script: str, typed: str, folder: Path) -> list[str]:
    """What bash offers for a line."""
    words = typed.split(" ")
    program = f"{script}\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\n" + (
        f'COMP_CWORD={len(words) - 1}\n_olmo\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True, cwd=folder
    )
    return done.stdout.split()


def test_bash_completes_commands_options_and_runs(tmp_path: Path, capsys):
    (tmp_path / "checkpoints/olmo-tiny").mkdir(parents=True)
    completion("bash")
    script = capsys.readouterr().out
    assert completed(script, "olmo gen", tmp_path) == ["generate"]
    assert completed(script, "olmo store ver", tmp_path) == ["verify"]
    assert completed(script, "olmo generate --tok", tmp_path) == ["--tokens", "--tokenizer"]
    assert completed(script, "olmo chat olmo-", tmp_path) == ["olmo-tiny"]
    assert completed(script, "olmo runs chec", tmp_path) == ["checkpoints"], "files, too"


def test_fish_and_zsh(capsys):
    completion("fish")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("complete -c olmo -n ") for line in lines)
    assert any("-l temperature -d '0 for the most likely" in line for line in lines)
    completion("zsh")
    assert "bashcompinit\n_olmo()" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected one of bash, zsh, fish, found tcsh"):
        completion("tcsh")


# The public command line: a change here breaks scripts, and belongs into the CHANGELOG.
COMMANDS = """source-list sources given-tokens documents tags quality references digests duplicates
mixed tokenizer tokens instructions statistics order positions start train soup hf heldout
docstrings evaluate inspect seen replay blame generate chat new plan check runs watch diff fork
bench compare scores checkpoint-convert environment store-verify store-gc store-checkout store-why
store-trace store-pin store-push store-pull store-affected completion text-index
ladder ladder-check certificate-make certificate-verify"""


def test_the_commands_are_what_they_were():
    """A new one is in the list, or a rule calls it."""
    rules = (Path(__file__).parents[2] / "rules").glob("*.smk")
    called = {
        name for rule in rules for name in re.findall(r"\bolmo ([a-z-]+) --", rule.read_text())
    }
    names = {name.replace(" ", "-") for name in commands()}
    assert called and called | set(COMMANDS.split()) == names


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_runs_the_script(capsys):
    completion("zsh")
    # As bashcompinit calls it: with arrays from 0. It offers all words; zsh keeps those that match.
    call = "emulate -L sh; setopt ksharrays; COMP_WORDS=(olmo store tr); COMP_CWORD=2; _olmo"
    program = f"{capsys.readouterr().out}\ncall() {{ {call}; echo ${{COMPREPLY[*]}} }}; call"
    done = subprocess.run(["zsh", "-fc", program], capture_output=True, text=True)
    assert done.stdout.startswith("trace why affected verify ") and not done.stderr
