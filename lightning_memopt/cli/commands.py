"""The commands of ``lightning-memopt``: what each does, and the module that does it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        does: What it does, in one line.
        module: The module whose ``main`` takes the arguments and returns the exit status; None for Lightning's own.
        reads_configs: Whether ``main`` also takes a function that reads the config of a run.
    """

    does: str
    module: str | None = None
    reads_configs: bool = False


COMMANDS = {
    "fit": Command("Train a model."),
    "validate": Command("Evaluate a model on the validation data."),
    "test": Command("Evaluate a model on the test data."),
    "predict": Command("Run a model on the data for predictions."),
    "plan": Command(
        "Show the memory that a run needs on every rank, before it runs.",
        "lightning_memopt.planner.plan_command",
        reads_configs=True,
    ),
    "roles": Command(
        "Show the role of every weight, and what decided it.",
        "lightning_memopt.planner.roles_command",
        reads_configs=True,
    ),
    "export": Command(
        "Write a checkpoint's weights for other programs.", "lightning_memopt.strategy.export.export_command"
    ),
    "inspect": Command("Show what a checkpoint holds.", "lightning_memopt.strategy.export.inspect_command"),
    "doctor": Command("Show what works on this machine, and what is missing.", "lightning_memopt.cli.doctor_command"),
    "completion": Command("Print a script that completes commands in a shell.", "lightning_memopt.cli.completion"),
}
