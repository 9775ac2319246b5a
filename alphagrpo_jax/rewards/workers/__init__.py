"""Verifier pools: worker processes with their ledger and audit log, and a pool in this process."""
