"""Turns prompts into question records by a language model, stores them, and checks such files.

`pipeline` decomposes one prompt; `texts` has the instructions to the model and `schemas` the forms
of its replies; `running` decomposes many prompts at once; `journal` is the output file, which says
which prompts are done; `check` validates any file of records.
"""
