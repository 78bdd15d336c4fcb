"""The command line: thin. Each command is one module with ``main(arguments) -> exit code``."""
