"""Command line: one dataclass per subcommand, one module per group of subcommands."""
