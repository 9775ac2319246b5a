"""Plans a run before it is paid for: what it needs on a machine, by the machine's own compiler."""
