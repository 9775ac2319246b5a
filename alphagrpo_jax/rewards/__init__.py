"""Rewards: question records, a pool of verifier workers, and how answers become numbers.

Host side: numpy in, numpy out. A reward is a number in [0, 1] that verifiers gave, or it is
invalid; it is never made up.
"""
