"""Texts that verifiers get, whatever model or server answers."""

# As AlphaGRPO asks: audit strictly, answer only yes or no, and no where the subject is absent.
AUDIT_INSTRUCTION = (
    "You are a strict image auditor. Answer only yes or no. "
    "If a subject of the question is absent, answer no."
)
RATE_INSTRUCTION = (
    "You are a strict image auditor. Answer only with a number from 0 to 10, "
    "where 0 is the worst and 10 is the best."
)
# Questions that ask for ratings; the shapes world's verifier was trained on exactly these.
RATE_PROMPT = "How well does the image match the prompt: {prompt}?"
RATE_QUALITY = "How well is the image drawn?"
# What a judge is asked before the prompt that stands in the place of its reply (`likelihood`).
CAPTION_REQUEST = "Describe the image."
