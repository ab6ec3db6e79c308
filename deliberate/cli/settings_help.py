"""What `deliberate eval --help` and `deliberate calibrate --help` print: tasks and all settings."""

from __future__ import annotations

from collections.abc import Sequence

from deliberate.utils.errors import DeliberateError

_EXAMPLES = {"eval": "task=gsm8k data.dir=DIR", "calibrate": "size=500"}


def settings_help(command: str, arguments: Sequence[str]) -> None:
    """Prints the tasks and the configuration of a command, with the overrides that were given.

    Args:
        command: ``eval`` or ``calibrate``.
        arguments: of the command line; options among them are left out.
    """
    from omegaconf import OmegaConf

    from deliberate.eval.calibrate.command import calibration_config
    from deliberate.eval.tasks.registry import evaluation_config, task_names

    overrides = [argument for argument in arguments if not argument.startswith("-")]
    config = evaluation_config if command == "eval" else calibration_config
    example = f"deliberate {command} {_EXAMPLES[command]}"
    print(f"usage: deliberate {command} [KEY=VALUE ...]   e.g. {example}\n")
    print(f"tasks: {', '.join(task_names())}\n")
    print("settings (each can be overridden):\n")
    print(OmegaConf.to_yaml(config(overrides)), end="")


def no_options(command: str, arguments: Sequence[str]) -> None:
    """Raises `DeliberateError` for a word with a dash."""
    unknown = [argument for argument in arguments if argument.startswith("-")]
    if unknown:
        raise DeliberateError(
            f"{command} does not know the option {unknown[0]}: settings are key=value"
        )
