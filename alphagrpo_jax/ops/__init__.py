"""Pure array functions: no parameters, no configuration."""
