"""The order of ``diversevit --help``: commands by what they are for."""

from typing import Any

PANELS = {
    "Train": ("run", "train", "sweep"),
    "Use trained heads": ("evaluate", "select-heads", "probe", "predict"),
    "Look at runs": ("report", "selection-study"),
    "Data and machine": ("data", "cost", "doctor"),
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 doctor found a fault, or trainings of a sweep failed; 2 a mistake, said in one line "
    "on standard error; 130 interrupted."
)


def arrange(app: Any) -> None:
    """Give each command and group of a typer app its panel, and the help its last line."""
    panels = {name: panel for panel, names in PANELS.items() for name in names}
    for entry in (*app.registered_commands, *app.registered_groups):
        name = entry.name or entry.callback.__name__.replace("_", "-")
        entry.rich_help_panel = panels.get(name)
    app.info.epilog = EXIT_CODES
