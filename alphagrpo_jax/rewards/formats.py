"""Rewards for the form of a think text."""


def format_reward(text: str) -> float:
    """1.0 if the text, without outer white space, is `<think> ... </think>`, else 0.0."""
    stripped = text.strip()
    return float(stripped.startswith("<think>") and stripped.endswith("</think>"))
