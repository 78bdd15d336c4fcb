"""The command line: thin. `main.COMMANDS` is the table of commands; each is a function of one dataclass of options."""
