"""Verifier worker processes: the pool, its ledger of samples, the process itself, the audit log."""
