"""`olmo completion`: a script by which a shell completes commands, options and names of runs."""

from __future__ import annotations

import shlex

from olmo.commands import build_parser, commands, load_command

BASH = """\
_olmo() {{
    local typed="${{COMP_WORDS[COMP_CWORD]}}" words=""
    case "${{COMP_WORDS[*]:1:$((COMP_CWORD-1))}} " in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$typed") $(compgen -f -- "$typed"))
}}
complete -o filenames -F _olmo olmo
"""
RUNS = "$(ls checkpoints 2> /dev/null)"
SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, /) -> None:
    """Print a script that completes `olmo` in a shell: bash, zsh or fish.

    It completes commands, options, names of runs and files. Print it again after an update.

    Args:
        shell: bash, zsh or fish

    Example:
        eval "$(olmo completion bash)"             # in ~/.bashrc
        eval "$(olmo completion zsh)"              # in ~/.zshrc
        olmo completion fish > ~/.config/fish/completions/olmo.fish
    """
    if shell not in SHELLS:
        raise ValueError(f"expected one of {', '.join(SHELLS)}, found {shell}")
    if shell == "zsh":
        print("autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit")
    print(format_fish() if shell == "fish" else format_bash(), end="")


def list_options(verb: str) -> dict[str, str]:
    """A command's flags with their help."""
    actions = build_parser(verb, load_command(verb))._actions
    return {flag: action.help or "" for action in actions for flag in action.option_strings}


def format_bash() -> str:
    """The script for bash; zsh reads it, too."""
    first = sorted({verb.split()[0] for verb in commands()})
    cases = [f'        " ") words="{" ".join(first)}" ;;']
    for verb in commands():
        flags = " ".join(flag for flag in list_options(verb) if flag.startswith("--"))
        cases.append(f'        "{verb} "*) words="{flags} {RUNS}" ;;')
    for group in sorted({verb.split()[0] for verb in commands() if " " in verb}):
        inner = [verb.split()[1] for verb in commands() if verb.startswith(f"{group} ")]
        cases.append(f'        "{group} ") words="{" ".join(inner)}" ;;')
    return BASH.format(cases="\n".join(cases))


def format_fish() -> str:
    """The script for fish, with the help of each option."""
    lines = [
        f"complete -c olmo -n __fish_use_subcommand -a {shlex.quote(' '.join(first))}"
        for first in [sorted({verb.split()[0] for verb in commands()})]
    ]
    for verb in commands():
        command, *inner = verb.split()
        seen = f"__fish_seen_subcommand_from {command}"
        if inner:
            lines.append(f"complete -c olmo -n {shlex.quote(seen)} -a {inner[0]}")
            seen += f"; and __fish_seen_subcommand_from {inner[0]}"
        lines.append(f"complete -c olmo -n {shlex.quote(seen)} -a '(ls checkpoints 2> /dev/null)'")
        for flag, help in list_options(verb).items():
            if flag.startswith("--"):
                lines.append(
                    f"complete -c olmo -n {shlex.quote(seen)} -l {flag[2:]} -d {shlex.quote(help)}"
                )
    return "\n".join(lines) + "\n"
