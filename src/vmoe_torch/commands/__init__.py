"""The subcommands of `vmoe`, one module each: `add` makes the parser, `run` runs it."""
