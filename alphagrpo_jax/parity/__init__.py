"""Recomputing recorded outputs of the official BAGEL code: fixtures, rules and cases."""
