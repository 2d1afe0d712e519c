"""The commands: their flags and what they print.

Each command has a module with `add_arguments(parser)` and a function that takes the parsed flags and returns the exit
code. A module imports the libraries that it needs inside that function, because `--help` and the message about a wrong
flag have to come at once. `app` lists the commands; `common` has what they share.
"""
