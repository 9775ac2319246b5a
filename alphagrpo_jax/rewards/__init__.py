"""Rewards: verifier pools, verifiers, and the formulas that turn answers into numbers.

Host side: numpy in, numpy out. A reward is a number in [0, 1] computed from verifiers' answers, or
it is invalid; no number is ever made up.
"""
