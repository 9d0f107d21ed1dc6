"""The command ``lightning-memopt completion``, which prints a script that completes commands in a shell.

The script holds all words, because asking Python at every key would take seconds.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from typing import Any

from lightning_memopt.cli.commands import COMMANDS
from lightning_memopt.optim import classes
from lightning_memopt.planner.settings import PRECISIONS
from lightning_memopt.planner.skeletons import model_names
from lightning_memopt.plans.recipes import recipe_names
from lightning_memopt.terminal.parser import Parser

SHELLS = ("bash", "zsh")
STRATEGIES = ("memopt_fsdp", "memopt_fsdp_offload", "ddp", "auto")
_OWN = {name for name, value in vars(classes).items() if isinstance(value, type) and hasattr(value, "_recipe")}
OPTIMIZERS = sorted(f"lightning_memopt.{name}" for name in {*_OWN, "MemOpt"})
# Values of options; a star stands for Lightning's commands.
VALUES: dict[str, Iterable[str]] = {
    "plan:--model": model_names(),
    "roles:--model": model_names(),
    "plan:--recipe": recipe_names(),
    "plan:--precision": PRECISIONS,
    "completion:completion": SHELLS,
    "*:--trainer.strategy": STRATEGIES,
    "*:--trainer.precision": PRECISIONS,
    "*:--optimizer": [*OPTIMIZERS, "torch.optim.AdamW"],
    "*:--optimizer.recipe": recipe_names(),
    "*:--lr_scheduler": ["lightning_memopt.WarmupSchedule"],
    "*:--lr_scheduler.decay": ["cosine", "linear", "constant"],
    "*:--scheduler_interval": ["step", "epoch"],
    "*:--parser_mode": ["yaml", "omegaconf", "omegaconf+"],
}

SCRIPT = """\
_lightning_memopt() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" command="" prefix="" words="" i
  if [[ "$word" == "=" ]]; then
    word=""
  elif [[ "$previous" == "=" ]]; then
    previous="${{COMP_WORDS[COMP_CWORD-2]}}"
  elif [[ "$word" == --*=* ]]; then
    previous="${{word%%=*}}"; prefix="$previous="; word="${{word#*=}}"
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "${{COMP_WORDS[i]}}" in
      {commands}) command="${{COMP_WORDS[i]}}"; break ;;
    esac
  done
  case "$command:$previous" in
{values}
    *)
      if [[ -n "$prefix" || ( -n "$command" && "$word" != -* ) ]]; then COMPREPLY=(); return; fi
      case "$command" in
{options}
      esac ;;
  esac
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$word"))
}}
complete -o default -F _lightning_memopt lightning-memopt
"""


def main(args: Sequence[str]) -> int:
    """Run the command and return its exit status.

    Args:
        args: The arguments after ``completion`` on the command line.
    """
    options = _parser().parse_args(args)
    if options.shell == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(script(), end="")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lightning-memopt completion",
        allow_abbrev=False,
        description="Print a script for a shell that completes commands, options and some of their values.",
        epilog="bash: lightning-memopt completion bash > ~/.local/share/bash-completion/completions/lightning-memopt",
    )
    parser.add_argument("shell", choices=SHELLS, help="The shell.")
    return parser


def script() -> str:
    """Return the function for bash, which zsh can run."""
    lightnings = [name for name, command in COMMANDS.items() if command.module is None]
    patterns = {key: [key] if key[0] != "*" else [f"{name}{key[1:]}" for name in lightnings] for key in VALUES}
    values = [f'    {"|".join(patterns[key])}) words="{" ".join(words)}" ;;' for key, words in VALUES.items()]
    words = {"": [*COMMANDS, "--help", "--version", "--parser_mode"], **_options_of_runs()}
    for name, command in COMMANDS.items():
        if command.module is not None:
            words[name] = _options_of(import_module(command.module).main, command.reads_configs)
    options = [f'        "{name}") words="{" ".join(sorted(set(each)))}" ;;' for name, each in words.items()]
    return SCRIPT.format(commands="|".join(COMMANDS), values="\n".join(values), options="\n".join(options))


def _options_of(main: Callable[..., int], reads_configs: bool) -> list[str]:
    """Return the options that a command of this package names in the first paragraph of its help."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        main(["--help"], None) if reads_configs else main(["--help"])
    return re.findall(r"--[a-z][\w-]*", shown.getvalue().partition("\n\n")[0]) + ["--help"]


def _options_of_runs() -> dict[str, list[str]]:
    """Return the options of Lightning's commands, and those of this package's classes in them."""
    from jsonargparse import capture_parser

    from lightning_memopt.cli import MemOptCLI
    from lightning_memopt.cli.messages import arguments_of

    parser: Any = capture_parser(MemOptCLI)
    (found,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    classes = {"optimizer": "lightning_memopt.MemOpt", "lr_scheduler": "lightning_memopt.WarmupSchedule"}
    own = [f"--{key}.{name}" for key, path in classes.items() for name in arguments_of(path)]
    options = {
        name: [text for action in each._actions for text in action.option_strings] for name, each in found.items()
    }
    return {name: [*(text for text in each if text.startswith("--")), *own] for name, each in options.items()}
