"""The command line: each module parses one command and calls one function of the library."""
