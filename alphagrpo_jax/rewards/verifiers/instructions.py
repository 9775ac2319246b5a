"""The texts that verifiers are given, whatever model or server answers."""

# AlphaGRPO's verifier is told to audit strictly, to answer only yes or no, and to answer no where
# the subject of a question is absent.
AUDIT_INSTRUCTION = (
    "You are a strict image auditor. Answer only yes or no. "
    "If a subject of the question is absent, answer no."
)
RATE_INSTRUCTION = (
    "You are a strict image auditor. Answer only with a number from 0 to 10, "
    "where 0 is the worst and 10 is the best."
)
# What ratings are asked for; the shapes world's verifier was trained on exactly these.
RATE_PROMPT = "How well does the image match the prompt: {prompt}?"
RATE_QUALITY = "How well is the image drawn?"
